"""Figures 20 to 22: what does safety cost in time and memory, and does a run stay as fast as it began?"""

import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine import checkpoint
from engine.optim import create_optimizer
from engine.state import TrainState
from reliability.harness import (
    ENDLESS,
    STOPPED,
    Lab,
    Outcome,
    apart,
    expect,
    launch,
    records,
    run_of,
    stop_at,
    write_images,
)
from utils.rng import key, reseed
from utils.signals import StopRequest

# --- 20: soak -------------------------------------------------------------------------------------

LOOK = 0.1  # seconds between two looks: a batch on its way is a descriptor, of which there are more or fewer
ENDING = 2.0  # last seconds of a run, in which it lets go of what it holds


def belongings(pid: int) -> dict[str, int]:
    """What a process and its children hold: resident bytes, file descriptors, threads."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {"bytes": 0, "descriptors": 0, "threads": 0}
    for process in (str(pid), *children):
        resident = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        found["bytes"] += resident * os.sysconf("SC_PAGE_SIZE")
        found["descriptors"] += len(os.listdir(f"/proc/{process}/fd"))
        found["threads"] += len(os.listdir(f"/proc/{process}/task"))
    return found


def least(samples: list[dict[str, int]]) -> dict[str, int]:
    """The least of each quantity: what is held at all times, without a file that was just being written."""
    return {name: min(sample[name] for sample in samples) for name in samples[0]}


def soak(lab: Lab) -> Outcome:
    """Two processes with a loader worker each: speed of the first and last tenth, growth after the first third."""
    folder = lab.room("soak")
    seconds = lab.count(30, 1800)
    settings = [*ENDLESS, "DATA.NUM_WORKERS=1", "SAVE_STEPS=20"]
    command = lab.arguments(folder, *settings, f"TRAIN.MAX_SECONDS={seconds}")
    victim = launch(command, log=folder / "log", processes=2)
    pids = [process.pid for process in victim.processes]
    samples: list[dict[str, int]] = []
    while not victim.ended_within(LOOK):
        with contextlib.suppress(OSError):  # it ended meanwhile
            held = [belongings(pid) for pid in pids]
            samples.append({name: sum(h[name] for h in held) for name in held[0]})
    expect(victim, STOPPED)
    speeds = [r["time/images_per_s"] for r in records(run_of(folder) / "timing.jsonl")][5:]
    tenth = max(1, len(speeds) // 10)
    first, last = statistics.median(speeds[:tenth]), statistics.median(speeds[-tenth:])
    drift = 1 - last / first
    third = len(samples) // 3
    end = len(samples) - round(ENDING / LOOK)
    early, late = least(samples[third : 2 * third]), least(samples[2 * third : end])
    growth = {name: late[name] - early[name] for name in late}
    left = [name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in pids)]
    leaks = max(growth["descriptors"], 0) + max(growth["threads"], 0) + len(left)
    swollen = growth["bytes"] / early["bytes"]
    # Half a minute beside other work says nothing of two per cent; leaks show at once.
    passed = not leaks and swollen < lab.count(5, 2) / 100 and drift < lab.count(25, 2) / 100
    measured = f"{seconds} s: {drift:+.1%} slower, {swollen:+.1%} memory, {leaks} leaked"
    details = {"images_per_s": [first, last], "growth": growth, "steps": len(speeds)}
    return Outcome(measured, passed, details)


# --- 21: the cost of safety -----------------------------------------------------------------------


def seconds_each(function: Callable[[int], object], times: int) -> float:
    """The median over five rounds of the seconds that one of `times` calls takes."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for number in range(times):
            function(number)
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


def measure_parts() -> dict[str, float]:
    """Seconds of what a step does for exactness alone, and of a checkpoint's copy, hash and write."""
    torch.set_num_threads(1)
    stop = StopRequest(0)
    parts = {
        "seed a sample": seconds_each(lambda n: reseed(key(0, "sample", 3, n)), 1000),
        "seed a micro-batch": seconds_each(lambda n: reseed(key(0, "slot", n, 1)), 1000),
        "ask whether to stop": seconds_each(lambda n: stop.agree(), 1000),
    }
    # 25 MB of weights, 100 with the moments and the EMA.
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    optimizer = create_optimizer(model, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(model, ModelEmaV3(model), optimizer, torch.amp.GradScaler(enabled=False))
    size = sum(len(file) for file in checkpoint.snapshot(state, {}).values())
    copy = seconds_each(lambda n: checkpoint.snapshot(state, {}), 1)
    return parts | {"stall per 100 MB": copy * 1e8 / size}


def cost(lab: Lab) -> Outcome:
    """Seeding, asking and copying, as shares of a step of the tiny run, the worst case; a stall at a save."""
    folder = lab.room("cost")
    command = lab.arguments(folder, *ENDLESS, "SAVE_STEPS=0", "DATA.NUM_WORKERS=0")
    hook = stop_at(lab.count(30, 200))
    expect(launch(command, log=folder / "log", hooks=[hook]), STOPPED)
    speeds = [r["time/images_per_s"] for r in records(run_of(folder) / "timing.jsonl")]
    step = 8 / statistics.median(speeds)
    parts = apart(measure_parts)
    extra = (
        8 * parts["seed a sample"] + 2 * parts["seed a micro-batch"] + parts["ask whether to stop"]
    )
    share, stall = extra / step, parts["stall per 100 MB"]
    measured = f"{share:.2%} of a step; {stall:.2f} s per 100 MB"
    details = {"seconds": parts, "step_s": step}
    return Outcome(measured, share < 0.01 and stall < 0.5, details)


# --- 22: time to resume ---------------------------------------------------------------------------


PLACES = {"the start": 1, "the middle": 500}  # steps of an epoch of 1,000


def seconds_to_step(lab: Lab, command: list[str], folder: Path, step: int) -> float:
    """From the start of a run to its end after `step`, which is the first one that it trains."""
    hook = stop_at(step)
    start = time.monotonic()
    expect(launch(command, log=folder / "log", hooks=[hook]), STOPPED)
    return time.monotonic() - start


def moved(source: Path, folder: Path, step: int) -> None:
    """A copy of the run in `source`, whose checkpoint claims to be of another step: nothing else differs."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (step,) = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    files = {file.name: file.read_bytes() for file in step.iterdir()}
    del files[checkpoint.MANIFEST]
    files["state.json"] = json.dumps(dict(checkpoint.read_metadata(step), step=step)).encode()
    shutil.rmtree(step)
    checkpoint.write(step.parent, f"step-{step}", files)


def resume_time(lab: Lab) -> Outcome:
    """Is a run that goes on in the middle of a long epoch as soon at work as one that does at its start?"""
    images, source = lab.room("resume", "images"), lab.room("resume", "run")
    write_images(images, train=1000, val=1)
    settings = [*ENDLESS, "DATA.BATCH_SIZE=2", "TRAIN.GLOBAL_BATCH_SIZE=4", "SAVE_STEPS=0"]
    seconds_to_step(lab, lab.arguments(source, *settings, images=images), source, 1)
    found: dict[str, list[float]] = {place: [] for place in PLACES}
    for number in range(lab.count(5, 15)):
        for place in sorted(PLACES, reverse=number % 2 > 0):  # neither is always the first
            step = PLACES[place]
            folder = lab.room("resume", place, number)
            moved(source, folder, step)
            command = lab.arguments(folder, *settings, images=images)
            found[place].append(seconds_to_step(lab, command, folder, step + 1))
    start, middle = (statistics.median(times) for times in found.values())
    measured = f"{start:.2f} s at the start, {middle:.2f} s in the middle"
    return Outcome(measured, middle < 1.1 * start, {"seconds": found})
