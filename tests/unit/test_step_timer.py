"""Step timer: seconds per phase, the bottleneck, and the lines in a run's timing.jsonl and log."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from helpers.images import write_image_folder
from helpers.runs import arguments

import main
from engine.grad_sync import DDPSync, DeterministicSync
from utils.bottleneck import PHASES, bottleneck, shares
from utils.distributed import Process
from utils.step_timer import StepTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock, of the process and of a CUDA stream, that only the test moves."""
    now = [100.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def synchronize(self):
            self.reached = True

        def elapsed_time(self, end):
            assert end.reached
            return 1000 * (end.time - self.time)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return sleep


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_second_is_in_one_phase(clock, device):
    timer = StepTimer(torch.device(device))
    for _ in range(2):
        with timer("data_wait"):
            clock(3)
        clock(0.5)
        with timer("forward"):
            clock(1)
    first = {"data_wait": 6, "forward": 2, "other": 1}
    assert timer.lap().seconds() == {phase: first.get(phase, 0) for phase in PHASES}
    clock(2)
    with timer("save"):
        clock(4)
    assert timer.lap().seconds() == {
        phase: {"save": 4, "other": 2}.get(phase, 0) for phase in PHASES
    }


@pytest.mark.parametrize("reduction", [DDPSync, DeterministicSync])
def test_the_reduction_is_a_part_of_the_backward_pass(clock, monkeypatch, reduction):
    cpu, model = torch.device("cpu"), torch.nn.BatchNorm1d(2)
    reduce = reduction(model, range(2), Process(0, 1, cpu))
    monkeypatch.setattr("utils.distributed.broadcast", lambda tensors: clock(3))
    timer = StepTimer(cpu)
    for micro_batch in range(2):
        with reduce.accumulate(micro_batch, timer):
            model(torch.randn(4, 2)).sum().backward()
    assert timer.lap().seconds()["backward"] == 3


def seconds(**known: float) -> dict[str, float]:
    return {phase: known.get(phase, 0.0) for phase in PHASES}


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ({"forward": 3, "backward": 5, "optimizer": 1, "other": 1}, "compute-bound: 90%"),
        ({"forward": 6, "data_wait": 4}, "input-bound: 40% .*DATA.NUM_WORKERS"),
        ({"forward": 9.5, "data_wait": 0.5}, "compute-bound: 95%"),
        ({"forward": 5, "data_wait": 2, "save": 3}, "save-bound: 30% .*SAVE_STEPS"),
        ({"forward": 5, "data_wait": 3, "save": 2}, "input-bound: 30%"),
    ],
)
def test_bottleneck(known, text):
    line = bottleneck(seconds(**known))
    assert re.match(text, line)
    assert "\n" not in line
    assert sum(shares(seconds(**known)).values()) == pytest.approx(1)


def test_a_run_records_its_phases(tmp_path: Path, capsys):
    data = write_image_folder(tmp_path / "data")
    assert main.main(arguments(tmp_path, data)) == 0
    timing = (tmp_path / "dat_micro" / "run" / "timing.jsonl").read_text().splitlines()
    for record in map(json.loads, timing):
        parts = {phase: record[f"time/{phase}"] for phase in PHASES}
        assert sum(parts.values()) == pytest.approx(1)
        assert min(parts.values()) >= 0
        assert min(parts[name] for name in ("forward", "backward", "optimizer")) > 0
        assert record["time/images_per_s"] > 0
    assert capsys.readouterr().out.count("-bound: ") == 2  # one line an epoch
