"""TRAIN.REPORT: a run leaves report.html when it ends and when it stops, and never fails because of it.

pytest tests/runs/test_run_report.py
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

from helpers.runs import arguments

import main
from tools import report

REPORT = ["--opts", "TRAIN.REPORT=True", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]


def test_a_run_that_ends_leaves_its_report(tmp_path, images):
    assert main.main(arguments(tmp_path, images, *REPORT)) == 0
    page = (tmp_path / "dat_micro" / "run" / "report.html").read_text()
    assert "The run is complete." in page
    assert "step 2 of 2 (100 %)" in page
    assert "13 images" in page
    assert "<code>--opts" not in page
    assert "<td>--opts</td>" in page


def test_a_run_that_stops_leaves_its_report(tmp_path, images, restore_signals, monkeypatch):
    def write_here(command: list[str | Path], **options: object) -> None:
        assert report.main([str(command[-1])]) == 0

    here = SimpleNamespace(run=write_here, SubprocessError=subprocess.SubprocessError)
    monkeypatch.setattr(main, "subprocess", here)  # a process of its own takes seconds to import
    stop = [*REPORT, "TRAIN.MAX_SECONDS=0.001"]
    assert main.main(arguments(tmp_path, images, *stop)) == 75
    page = (tmp_path / "dat_micro" / "run" / "report.html").read_text()
    assert "The run was stopped and saved" in page


def test_a_report_that_fails_leaves_the_run_as_it_ended(tmp_path, images, monkeypatch, capsys):
    monkeypatch.setattr(main, "REPORT_SECONDS", 0.01)
    assert main.main(arguments(tmp_path, images, *REPORT)) == 0
    assert "No report" in capsys.readouterr().err
    assert '"state": "done"' in (tmp_path / "dat_micro" / "run" / "status.json").read_text()
