"""Knobs of recipes in complete runs: what they do shows, and a run stopped at any step ends in the same bits."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.images import write_image_folder
from helpers.runs import arguments, interrupted_after, outcome

import main

pytestmark = pytest.mark.usefixtures("restore_signals")

# Two steps an epoch: sizes, mixing and warm-up change within the run.
KNOBS = (
    "--opts",
    "TRAIN.EPOCHS=3",
    "DATA.IMG_SIZE_SCHEDULE=[[0, 32], [1, 48]]",
    "AUG.MIXUP_OFF_EPOCH=2",
    "AUG.REPEATS=3",
    "AUG.AUTO_AUGMENT=3a",
    "TRAIN.WARMUP_STEPS=3",
    "TRAIN.EMA_WARMUP=True",
    "TRAIN.OPTIMIZER.NAME=lamb",
    "TRAIN.LAYER_DECAY=0.9",
    "TRAIN.LR_SCALES=[['*.positions', 0.1]]",
    "TRAIN.FREEZE=stem,stages.0,stages.1,!stages.1.blocks",
)


@pytest.fixture(scope="module")
def knobs(tmp_path_factory) -> tuple[str, ...]:
    """KNOBS and a teacher of timm's."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "resnet.safetensors"
    model = timm.create_model("test_resnet", num_classes=4)
    safetensors.torch.save_file(model.state_dict(), file)
    teacher = {"PATH": file, "MODEL": "test_resnet"}.items()
    return (
        *KNOBS,
        "DISTILL.TYPE=soft",
        *(f"DISTILL.TEACHER_{key}={value}" for key, value in teacher),
    )


@pytest.fixture(scope="module")
def unbroken(images, knobs, tmp_path_factory) -> Path:
    """The folder of a run with every knob that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert main.main(arguments(folder, images, *knobs)) == 0
    return folder


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_stopped_and_resumed_with_every_knob(step, images, knobs, unbroken, tmp_path):
    with interrupted_after(step):
        assert main.main(arguments(tmp_path, images, *knobs)) == 130
    assert main.main(arguments(tmp_path, images, *knobs)) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_the_warm_up_has_its_steps(unbroken):
    records = map(json.loads, outcome(unbroken)["metrics"].splitlines())
    rates = [record["train/lr"] for record in records if "train/lr" in record]
    assert rates[0] == rates[1] < rates[2] < rates[3] > rates[4]


def test_a_changed_knob_or_teacher_is_not_resumed(images, knobs, unbroken, capsys):
    assert main.main(arguments(unbroken, images, *knobs, "DATA.IMG_SIZE_SCHEDULE=[]")) == 4
    assert "DATA.IMG_SIZE_SCHEDULE was [[0, 32], [1, 48]], is [" in capsys.readouterr().err
    step = unbroken / "dat_micro/run/checkpoints/step-6"
    other = f"DISTILL.TEACHER_PATH={step}"
    assert main.main(arguments(unbroken, images, *knobs[:-1], other)) == 4
    message = capsys.readouterr().err
    for name in ("DISTILL.TEACHER_MODEL was test_resnet, is ''", "teacher was "):
        assert name in message


def test_a_run_whose_teacher_knows_other_classes_does_not_start(images, unbroken, tmp_path, capsys):
    other = write_image_folder(tmp_path / "other", classes=3, train=13)
    teacher = "--opts", f"DISTILL.TEACHER_PATH={unbroken / 'dat_micro/run'}"
    assert main.main(arguments(tmp_path, other, *teacher)) == 4
    assert "differ from this training's; the teacher has besides class_3" in capsys.readouterr().err


def test_wrong_names_of_parameters_are_refused_before_the_data_are_opened(tmp_path, capsys):
    for key, value in (("FREEZE", "stages.7"), ("LR_SCALES", "[[offsets, 0.1]]"), ("FREEZE", "*")):
        argv = arguments(tmp_path, tmp_path / "nowhere", "--opts", f"TRAIN.{key}={value}")
        assert main.main(argv) == 2
        assert f"TRAIN.{key}: " in capsys.readouterr().err
    assert not (tmp_path / "dat_micro").exists()


def test_grey_images_that_are_no_squares_are_trained_on_and_evaluated(images, tmp_path, capsys):
    knobs = (
        "--opts",
        "DATA.IMG_SIZE=[32, 48]",
        "DATA.IN_CHANS=1",
        "TRAIN.EPOCHS=1",
        "TRAIN.WARMUP_EPOCHS=0",
    )
    assert main.main(arguments(tmp_path, images, *knobs)) == 0
    weights = safetensors.torch.load_file(
        tmp_path / "dat_micro/run/checkpoints/step-2/model.safetensors"
    )
    assert weights["stem.0.weight"].shape == (16, 1, 2, 2)
    tables = {n: t.shape for n, t in weights.items() if n.endswith("rpe_table")}
    assert tables["stages.2.blocks.0.attn.rpe_table"] == (2, 7, 11)
    capsys.readouterr()
    assert (
        main.main(arguments(tmp_path, images, *knobs, "--eval", "--out", str(tmp_path / "x"))) == 0
    )
    assert "32×48 px" in capsys.readouterr().out
    assert main.main(arguments(tmp_path, images, *knobs, "--eval", "--sizes", "48")) == 0
