"""Whole runs through main.py: the same bits after any stop, exact evaluation, and what bad input is answered.

python -m pytest tests/test_runs.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from images import write_image_folder
from runs import ROOT, arguments, launch, outcome

import main
from engine import checkpoint, run
from utils.logging import write_atomically


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two updates of 24 images an epoch, and 13 validation images, which no number of processes divides."""
    root = write_image_folder(tmp_path_factory.mktemp("images"), classes=4, train=13, val=4)
    for label in range(3):
        (root / "val" / f"class_{label}" / "003.jpg").unlink()
    return root


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory) -> Path:
    """The folder of a run in one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert main.main(arguments(folder, images)) == 0
    return folder


# --- The same bits --------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bits(images, unbroken, tmp_path):
    assert main.main(arguments(tmp_path, images, "--workers", "2")) == 0
    assert outcome(tmp_path) == outcome(unbroken)


@pytest.mark.parametrize("update", range(1, 6))
def test_stopped_at_any_update_and_resumed(update, images, unbroken, tmp_path, monkeypatch):
    save = checkpoint.save

    def save_and_die(folder, state, facts):
        path = save(folder, state, facts)
        if state.update == update:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    assert main.main(arguments(tmp_path, images)) == 130
    monkeypatch.undo()
    assert main.main(arguments(tmp_path, images)) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_the_written_configuration_runs_again_unchanged(images, unbroken, tmp_path):
    written = unbroken / "dat_micro" / "run" / "config.yaml"
    assert main.main(["--cfg", str(written), "--output", str(tmp_path)]) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_a_finished_run_does_nothing_more(images, unbroken):
    before = outcome(unbroken)
    assert main.main(arguments(unbroken, images)) == 0
    assert outcome(unbroken) == before


@pytest.mark.parametrize("processes", [2, 3])
def test_killed_and_resumed_on_many_processes(processes, images, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    reference = launch(processes, arguments(unbroken, images))
    assert reference.wait() == 0, reference.stdout.read()

    killed = launch(processes, arguments(broken, images))
    wait_for(broken / "dat_micro" / "run" / "checkpoints" / "step-1", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    kill_workers(broken)
    killed.wait()
    assert len(checkpoint.steps(broken / "dat_micro" / "run" / "checkpoints")) < 6

    resumed = launch(processes, arguments(broken, images))
    log = resumed.communicate()[0]
    assert resumed.returncode == 0, log
    assert "Resumed from" in log
    assert outcome(broken) == outcome(unbroken)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def kill_workers(folder: Path) -> None:
    """Workers of torchrun are sessions of their own: find them by their command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
