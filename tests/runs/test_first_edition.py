"""A run of the first edition resumes and evaluates: golden/first_edition was stopped after 3 of 6 steps by its code."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import outcome

import main
from engine import checkpoint

OLD = Path(__file__).parents[1] / "golden/first_edition"
# What depends on the machine that runs this test and not on the names.
ELSEWHERE = (
    "device,decoder.pillow,decoder.simplejpeg,decoder.libjpeg,decoder.pixels,"
    "versions.torch,versions.torchvision,versions.timm"
)


@pytest.fixture
def run(tmp_path) -> Path:
    """The old run, where its own configuration finds it."""
    return Path(shutil.copytree(OLD / "run", tmp_path / "dat_micro/first_edition"))


def command(folder: Path, *more: str) -> list[str]:
    cfg = str(OLD / "run/config.yaml")
    return ["--cfg", cfg, "--data-path", str(OLD), "--output", str(folder), *more]


def test_it_resumes_to_the_bits_of_a_new_run(run, tmp_path):
    assert main.main(command(tmp_path, "--accept", ELSEWHERE)) == 0
    resumed = outcome(tmp_path, "first_edition")
    assert resumed["step"] == 6
    assert main.main(command(tmp_path, "--tag", "new")) == 0
    new = outcome(tmp_path, "new")
    same_machine = (
        checkpoint.read_metadata(OLD / "run/checkpoints/step-3")["device"]
        == checkpoint.read_metadata(tmp_path / "dat_micro/new/checkpoints/step-6")["device"]
    )
    assert resumed.keys() == new.keys()
    if same_machine:
        assert resumed == new
    records = [json.loads(line) for line in resumed["metrics"].splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 4, 5, 6, 6]


def test_it_is_evaluated(run, tmp_path, capsys):
    assert main.main(command(tmp_path, "--eval")) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["model"]["images"] == record["ema"]["images"] == 8


def test_a_changed_setting_is_refused_under_its_new_name(run, tmp_path, capsys):
    more = "--accept", ELSEWHERE, "--opts", "TEST.CROP_MODE=squash", "SAVE_FREQ=1"
    assert main.main(command(tmp_path, *more)) == 4
    assert "TEST.CROP_MODE was center, is squash" in capsys.readouterr().err
