"""A small run for the tests: every feature of a step is on, and it takes a second."""

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, Signals

import torch

import main
from analysis import offsets
from engine import checkpoint
from engine.run_dir import RunDir
from engine.state import TrainState
from utils.distributed import Process
from utils.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]
# Pixels of TensorBoard's pictures of sampling points: at full size they take a fifth of a small run.
offsets.SIDE = 32

SMALL = """
AMP_DTYPE: float32
PRINT_FREQ: 1
THREADS: 1
DATA: {BATCH_SIZE: 4, IMG_SIZE: 32, NUM_WORKERS: 0}
MODEL:
  NAME: dat_micro
  ARGS: {stages: [L, S, D, D], dims: [16, 32, 32, 32], num_heads: [1, 2, 2, 2], offset_groups: [1, 1, 1, 2]}
  DROP_PATH_RATE: 0.3
TRAIN:
  {EPOCHS: 2, WARMUP_EPOCHS: 1, GLOBAL_BATCH_SIZE: 24, BASE_LR: 0.01, EMA_DECAY: 0.9}
SAVE_STEPS: 1
CHECKPOINT: {KEEP: 20}
TEST: {CROP_PCT: 1.0}
"""  # of the 52 images of conftest.py: four steps


def arguments(
    folder: Path, data: Path, *more: str, tag: str = "run", text: str = SMALL
) -> list[str]:
    """The command line of the small run below `folder` on `data`."""
    config = folder / "small.yaml"
    config.write_text(text)
    return [
        "--cfg",
        str(config),
        "--data-path",
        str(data),
        "--output",
        str(folder),
        "--tag",
        tag,
        *more,
    ]


def run_of(folder: Path, model: str = "dat_micro") -> Path:
    """The directory of the run that `arguments` asks for."""
    return folder / model / "run"


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """A run that is started inside ends when it has given its checkpoint of `step` to be saved."""
    save = checkpoint.Saver.save

    def save_and_end(self: checkpoint.Saver, state: TrainState, metadata: dict) -> None:
        save(self, state, metadata)
        if state.step == step:
            raise KeyboardInterrupt

    checkpoint.Saver.save = save_and_end
    try:
        yield
    finally:
        checkpoint.Saver.save = save


@contextmanager
def held(run: Path) -> Iterator[int]:
    """The number of another process, which holds the lock of the run directory."""
    folder = RunDir(run, Process(0, 1, torch.device("cpu")))
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)

    def hold() -> None:
        with folder.lock():
            barrier.wait()
            barrier.wait()

    holder = fork.Process(target=hold)
    holder.start()
    barrier.wait()
    try:
        yield holder.pid
    finally:
        barrier.wait()
        holder.join()


def launch(processes: int, argv: list[str]) -> subprocess.Popen:
    """Start main.py with `argv` under torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU"]
    command += ["--nproc-per-node", str(processes), "main.py", *argv]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["engine.train", "torch.utils.tensorboard"])  # imported once


def run_group(
    processes: int,
    argv: list[str],
    at: int = 0,
    signal: Signals = SIGTERM,
    *,
    hooks: Iterable[Callable[[int], None]] = (),
    log: Path | None = None,
) -> list[int | None]:
    """Exit codes of main.py with `argv` on so many processes, without torchrun's own start of seconds.

    Each gets `signal` when it asks for the `at`th time whether to stop. `hooks` are called with the rank in each
    process before it starts; they are pickled. What rank k prints is in `<log>-k`.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = [
        _FORKS.Process(
            target=_member, args=(rank, processes, port, argv, at, signal, tuple(hooks), log)
        )
        for rank in range(processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=120)
        process.kill()
    return [process.exitcode for process in group]


def _member(
    rank: int,
    size: int,
    port: int,
    argv: list[str],
    at: int,
    signal: Signals,
    hooks: tuple,
    log: Path | None,
) -> None:
    if log is not None:
        file = os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    for hook in hooks:
        hook(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    reason, questions = StopRequest.agree, itertools.count(1)

    def reason_after_signal(self: StopRequest) -> str | None:
        if next(questions) == at:
            os.kill(os.getpid(), signal)
        return reason(self)

    StopRequest.agree = reason_after_signal
    sys.exit(main.main(argv))


def outcome(folder: Path, tag: str = "run", model: str = "dat_micro") -> dict[str, object]:
    """What a run leaves that must not depend on how often it was stopped."""
    run = folder / model / tag
    last = checkpoint.list_checkpoints(run / "checkpoints")[0]
    files = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    state = json.loads((last / "state.json").read_text())
    counters = {name: state[name] for name in ("step", "epoch", "skipped", "best", "scaler")}
    return {**files, **counters, "metrics": (run / "metrics.jsonl").read_text()}
