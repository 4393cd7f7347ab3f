"""Knobs of recipes in complete runs: what they do shows, and a run stopped at any step ends in the same bits."""

import json
from pathlib import Path

import pytest
from helpers.runs import arguments, outcome

import main
from engine import checkpoint

pytestmark = pytest.mark.usefixtures("restore_signals")

# Two steps an epoch: sizes, mixing and warm-up change within the run.
KNOBS = (
    "--opts",
    "DATA.IMG_SIZE_SCHEDULE=[[0, 32], [1, 48]]",
    "AUG.MIXUP_OFF_EPOCH=2",
    "AUG.REPEATS=3",
    "AUG.AUTO_AUGMENT=3a",
    "TRAIN.WARMUP_STEPS=3",
    "TRAIN.EMA_WARMUP=True",
    "TRAIN.OPTIMIZER.NAME=lamb",
    "TRAIN.LAYER_DECAY=0.9",
    "TRAIN.LR_SCALES=[['*.positions', 0.1]]",
    "TRAIN.FREEZE=stem,stages.0,!stages.0.blocks.1",
)


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory) -> Path:
    """The folder of a run with every knob that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert main.main(arguments(folder, images, *KNOBS)) == 0
    return folder


@pytest.mark.parametrize("step", [1, 3, 5])
def test_stopped_and_resumed_with_every_knob(step, images, unbroken, tmp_path, monkeypatch):
    save = checkpoint.Saver.save

    def save_and_die(self, state, metadata):
        save(self, state, metadata)
        if state.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Saver, "save", save_and_die)
    assert main.main(arguments(tmp_path, images, *KNOBS)) == 130
    monkeypatch.undo()
    assert main.main(arguments(tmp_path, images, *KNOBS)) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_the_warm_up_has_its_steps(unbroken):
    records = map(json.loads, outcome(unbroken)["metrics"].splitlines())
    rates = [record["train/lr"] for record in records if "train/lr" in record]
    assert rates[0] == rates[1] < rates[2] < rates[3] > rates[4]


def test_a_changed_knob_is_not_resumed(images, unbroken, capsys):
    for change in ("IMG_SIZE_SCHEDULE=[[0, 48]]", "IMG_SIZE_SCHEDULE=[]"):
        assert main.main(arguments(unbroken, images, *KNOBS, f"DATA.{change}")) == 4
        assert "DATA.IMG_SIZE_SCHEDULE was [[0, 32], [1, 48]], is [" in capsys.readouterr().err
