"""Harness of the scorecard: start a run, kill it, and compare it with one that nothing happened to.

A trial runs in one of two workers, forked from a process that has imported everything and computed nothing. It forks
its victims in turn, each of which runs main.py's `main` in a process of its own. Imports take seconds: without the
forks twenty kills would take half an hour.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from helpers.images import write_image_folder

import main
from engine import checkpoint
from utils.logging import logger
from utils.signals import SIGNALS

logger.addHandler(logging.NullHandler())  # a trial writes to a log of its own
for _late in ("engine.train", "torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(_late)  # here, once, and not in every victim

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
WORKERS = 2  # trials at a time, on the two cores of a small machine
TIMEOUT = 300.0  # seconds after which a victim that should have ended counts as hung

STOPPED = 75  # the exit code of a run that was asked to stop
ENDLESS = ("TRAIN.EPOCHS=1000000", "EVAL_FREQ=1000000", "SAVE_FREQ=1000000")

# Every feature of a step is on. An epoch of the sandbox's 48 training images is six steps.
TINY = """
AMP_DTYPE: bfloat16
PRINT_FREQ: 1
THREADS: 1
DEVICE: cpu
DATA: {BATCH_SIZE: 4, IMG_SIZE: 32, NUM_WORKERS: 0}
TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 1, GLOBAL_BATCH_SIZE: 8, BASE_LR: 0.01, EMA_DECAY: 0.9}
SAVE_STEPS: 2
CHECKPOINT: {KEEP: 2}
TEST: {CROP_PCT: 1.0}
MODEL:
  DROP_PATH_RATE: 0.3
"""
MODELS = {
    "dat": """
  NAME: dat_micro
  ARGS: {stages: [LS, LD, D, D], dims: [8, 16, 16, 16], num_heads: [1, 1, 1, 1], offset_groups: [1, 1, 1, 1]}
""",
    "swin": """
  NAME: swin_tiny_patch4_window7_224
  ARGS: {embed_dim: 8, depths: [2, 2], num_heads: [1, 2], window_size: 4}
""",
    "batch_norm": """
  NAME: test_resnet
""",
}


class NotRunError(Exception):
    """This machine cannot run a check; the message names what it lacks."""


@dataclass(frozen=True)
class Result:
    """What a check found: a few words, whether they reach the target, and everything that a repetition needs."""

    measured: str
    passed: bool
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Sandbox:
    """Where trials run: a folder for what they write, the seed of every fault, the form of the scorecard."""

    folder: Path
    seed: int
    short: bool

    @classmethod
    def create(cls, folder: Path, seed: int, short: bool) -> "Sandbox":
        """A sandbox in `folder`, with its data set and configuration."""
        write_image_folder(folder / "images", train=12, val=2)
        for name, text in MODELS.items():
            (folder / f"{name}.yaml").write_text(TINY.rstrip("\n") + text)
        return cls(folder, seed, short)

    def random(self, *words: int | str) -> random.Random:
        """The random numbers of one trial: a function of the seed and the words."""
        return random.Random("/".join(map(str, (self.seed, *words))))

    def count(self, short: int, full: int) -> int:
        """`short` or `full`, by the form of the scorecard."""
        return short if self.short else full

    def new_folder(self, *words: int | str) -> Path:
        """An empty folder at that path below the sandbox's."""
        path = self.folder.joinpath(*map(str, words))
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def arguments(
        self, folder: Path, *settings: str, model: str = "dat", images: Path | None = None
    ) -> list[str]:
        """main.py's arguments for the tiny run that lives in `folder`; `settings` are KEY=VALUE."""
        paths = ["--data-path", str(images or self.folder / "images"), "--output", str(folder)]
        return ["--cfg", str(self.folder / f"{model}.yaml"), *paths, "--opts", *settings]

    def map(self, trial: Callable, items: Iterable) -> list:
        """`trial(self, item)` for each of `items`, two at a time; the results in the order of `items`."""
        return list(_workers().map(trial, *zip(*((self, item) for item in items), strict=True)))


def run_in_fork(function: Callable, *arguments: object, seconds: float = TIMEOUT) -> object:
    """`function(*arguments)`, called in a forked process: a process that computed with torch must not fork again.

    Raises TimeoutError, and EOFError where that process died.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"{function.__name__} took more than {seconds:g} s")
        return receiver.recv()
    finally:
        process.kill()
        process.join()


# --- Victims --------------------------------------------------------------------------------------


class Victim:
    """The processes of one run, or of several one after the other, started by `launch`."""

    def __init__(self, processes: list, log: Path):
        self.processes = processes
        self.log = log

    def signal(self, number: int, *ranks: int) -> None:
        """Send signal `number` to some of the processes, by default to all."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            if process.is_alive():  # until it is joined, no other process gets its number
                os.kill(process.pid, number)

    def wait(self, seconds: float = TIMEOUT) -> list[int]:
        """The exit codes, once all have ended; a victim that does not is killed: -9."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def ended_within(self, seconds: float) -> bool:
        """Whether all end in that time; those that do not keep running."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")


def launch(
    *commands: list[str], log: Path, processes: int = 1, hooks: Iterable[Callable] = ()
) -> Victim:
    """Start main.py with the arguments of each of `commands` in turn, as a group of processes.

    `hooks` are called with the rank in each process before the first command. What is printed is added to `log`.
    """
    ports = [_free_port() for _ in commands] if processes > 1 else []
    arguments = (processes, ports, commands, log, tuple(hooks))
    sys.stdout.flush()  # or the victims would write it again
    victims = [FORK.Process(target=_victim, args=(rank, *arguments)) for rank in range(processes)]
    for victim in victims:
        victim.start()
    return Victim(victims, log)


def finish(*command: str, log: Path, **options) -> Victim:
    """Run one command to its end; any exit code but 0 is an AssertionError with its last output."""
    victim = launch(list(command), log=log, **options)
    expect(victim, 0)
    return victim


def expect(victim: Victim, code: int) -> None:
    """Wait for the end; any other exit code than `code` is an AssertionError with the last output."""
    codes = victim.wait()
    assert set(codes) == {code}, f"{victim.log}: exit codes {codes}: {victim.output[-1000:]}"


def _victim(
    rank: int, processes: int, ports: list[int], commands: tuple, log: Path, hooks: tuple
) -> None:
    _die_with_parent()
    os.setsid()  # a Ctrl-C is for the scorecard
    for number in SIGNALS:  # which nohup or a shell's & may ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    for hook in hooks:
        hook(rank)
    code = 0
    for index, command in enumerate(commands):
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            place |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": ports[index]}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        code = code or main.main(command)
    sys.exit(code)


@functools.cache
def _workers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(WORKERS, mp_context=FORK, initializer=_start_worker)


def close_workers() -> None:
    """Wait for the trials that still run; a check that failed may have left some."""
    if _workers.cache_info().currsize:
        _workers().shutdown(cancel_futures=True)
        _workers.cache_clear()


def _start_worker() -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _die_with_parent() -> None:
    """Have the kernel kill this process with the one that forked it, so that a stopped scorecard leaves nobody."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def find_processes(*settings: str) -> list[int]:
    """The ids of the running processes that have all of NAME=VALUE in the environment they were started with."""
    wanted = {setting.encode() for setting in settings}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            alive = b"State:\tZ" not in (entry / "status").read_bytes()
            if alive and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return found


def kill(*pids: int) -> None:
    """SIGKILL for processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- Hooks ----------------------------------------------------------------------------------------


def at_step(step: int, action: Callable[[int], None]) -> Callable[[int], None]:
    """A hook: the run does `action(rank)` when `step` steps are done."""

    def hook(rank: int) -> None:
        assign = checkpoint.TrainState.__setattr__

        def assign_and_act(state: checkpoint.TrainState, name: str, value: object) -> None:
            assign(state, name, value)
            if name == "step" and value == step:
                action(rank)

        checkpoint.TrainState.__setattr__ = assign_and_act

    return hook


def stop_at(step: int) -> Callable[[int], None]:
    """A hook: the run is asked to stop when `step` steps are done."""
    return at_step(step, lambda rank: os.kill(os.getpid(), signal.SIGTERM))


# --- What a run leaves ----------------------------------------------------------------------------


def run_of(folder: Path) -> Path:
    """The folder of the only run below `folder`."""
    (status,) = folder.glob("*/*/status.json")
    return status.parent


def outcome(folder: Path, *, metrics: bool = True) -> dict[str, object]:
    """What must not depend on how often the run below `folder` was stopped: hashes of tensors and records, counters."""
    run = run_of(folder)
    last = checkpoint.list_checkpoints(run / "checkpoints")[0]
    found = {file.name: _sha256(file) for file in sorted(last.glob("*.safetensors"))}
    state = checkpoint.read_metadata(last)
    found |= {name: state[name] for name in ("step", "epoch", "skipped", "best", "scaler")}
    return found | ({"metrics": _sha256(run / "metrics.jsonl")} if metrics else {})


def differences(found: dict, expected: dict) -> list[str]:
    """The names whose values differ."""
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def read_records(file: Path) -> list[dict]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
