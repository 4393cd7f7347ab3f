"""Checks of jobs: signals to all of their processes, pauses, and other programs in the folder of a run."""

import functools
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from data import ImageDataset
from engine import checkpoint, evaluate, loop
from reliability.harness import (
    ENDLESS,
    STOPPED,
    Result,
    Sandbox,
    Victim,
    at_step,
    differences,
    expect,
    finish,
    launch,
    outcome,
    run_of,
)
from reliability.process import unkilled_seconds
from utils.signals import SIGNALS

CHECKPOINT, STORAGE = 4, 6  # exit codes


def children(victim: Victim) -> list[int]:
    """The loader workers of a victim's processes."""
    files = [Path(f"/proc/{p.pid}/task/{p.pid}/children") for p in victim.processes]
    return [int(pid) for file in files if file.exists() for pid in file.read_text().split()]


def wait_for(file: Path, victim: Victim) -> None:
    """Wait until the victim has written `file`; an AssertionError if it ends before."""
    while not file.exists():
        assert any(process.is_alive() for process in victim.processes), victim.output[-1000:]
        time.sleep(0.005)


def note_and_wait(note: Path) -> None:
    """Write the file `note` where a phase begins, and stay in it for a moment."""
    note.touch()
    time.sleep(0.3)


# --- Signals to all processes of a job ------------------------------------------------------------

ORDERS = ("workers first", "main first", "one main", "workers only")


def reach_start(note: Path, rank: int) -> None:
    """A hook: `note` is written while the data is opened."""
    build = ImageDataset.__init__

    def build_slowly(self: ImageDataset, *args: object, **kwargs: object) -> None:
        note_and_wait(note)
        build(self, *args, **kwargs)

    ImageDataset.__init__ = build_slowly


def reach_evaluation(note: Path, rank: int) -> None:
    """A hook: `note` is written when the first evaluation begins; its images take a while."""
    validate, read = loop.validate, ImageDataset.__getitem__

    def validate_and_note(**arguments: object) -> loop.Accuracy:
        note.touch()
        return validate(**arguments)

    def read_slowly(self: ImageDataset, item: object) -> object:
        time.sleep(0 if self.train else 0.05)
        return read(self, item)

    evaluate.validate, ImageDataset.__getitem__ = validate_and_note, read_slowly


def reach_training(note: Path, rank: int) -> None:
    """A hook: `note` is written after the third step."""
    at_step(3, lambda rank: note_and_wait(note))(rank)


PHASES = {"start": reach_start, "training": reach_training, "evaluation": reach_evaluation}


def signal_trial(sandbox: Sandbox, case: tuple[int, signal.Signals, str, str, int]) -> dict:
    """Signal the processes of a job, its workers included, in some phase; then let the run finish."""
    number, wanted, order, phase, processes = case
    folder = sandbox.new_folder("job", number)
    log, note = folder / "log", folder / "note"
    log.touch()
    hook = functools.partial(PHASES[phase], note)
    arguments = sandbox.arguments(folder, "DATA.NUM_WORKERS=1")
    victim = launch(arguments, log=log, processes=processes, hooks=[hook])
    wait_for(note, victim)
    time.sleep(sandbox.random("job", number).uniform(0, 0.25))
    mains, workers = [process.pid for process in victim.processes], children(victim)
    pids = {
        "workers first": workers + mains,
        "main first": mains + workers,
        "one main": mains[-1:],
        "workers only": workers if wanted == signal.SIGTERM and workers else mains,
    }[order]
    for pid in pids:
        try:
            os.kill(pid, wanted)
        except ProcessLookupError:  # a worker that has passed the signal on
            continue
    codes = victim.wait()
    status = json.loads((run_of(folder) / "status.json").read_text())
    finish(*arguments, log=log, processes=processes)
    reference = sandbox.folder / "unkilled" / str(processes)
    return {
        "signal": wanted.name,
        "order": order,
        "phase": phase,
        "processes": processes,
        "exit_codes": codes,
        "status": status["state"],
        "different": differences(outcome(folder), outcome(reference)),
    }


def check_signals_to_jobs(sandbox: Sandbox) -> Result:
    """Six signals, in four orders, to one and two processes with workers, in three phases: 75, then equal bits."""
    unkilled_seconds(sandbox)
    cases = list(itertools.product(SIGNALS, ORDERS, PHASES, (1, 2)))
    if sandbox.short:
        cases = sandbox.random("jobs").sample(cases, 12)
    trials = sandbox.map(signal_trial, [(number, *case) for number, case in enumerate(cases)])
    good = sum(
        set(trial["exit_codes"]) == {STOPPED}
        and trial["status"] == "stopped"
        and not trial["different"]
        for trial in trials
    )
    return Result(f"{good}/{len(trials)}", good == len(trials), {"trials": trials})


# --- Neighbours and pauses ------------------------------------------------------------------------

HANG_SECONDS = 4


def sleep_in_step(rank: int) -> None:
    """A hook: the last of two processes takes long for each step, so that the other one waits for it."""
    step = loop.forward_backward

    def step_slowly(*arguments: object) -> object:
        time.sleep(rank)
        return step(*arguments)

    loop.forward_backward = step_slowly


def pause_trial(sandbox: Sandbox, processes: int) -> list[str]:
    """Pause all processes of a job for longer than it may hang; what is wrong afterwards."""
    folder = sandbox.new_folder("pause", processes)
    log, note = folder / "log", folder / "note"
    hooks = [sleep_in_step, functools.partial(reach_training, note)]
    settings = *ENDLESS, f"TRAIN.HANG_SECONDS={HANG_SECONDS}", "DATA.NUM_WORKERS=1"
    victim = launch(sandbox.arguments(folder, *settings), log=log, processes=processes, hooks=hooks)
    pause(victim, note)
    time.sleep(HANG_SECONDS)
    victim.signal(signal.SIGTERM)
    codes = victim.wait()
    return [] if set(codes) == {STOPPED} else [f"{processes} paused process(es): {codes}"]


def pause(victim: Victim, note: Path) -> None:
    """Stop all processes of a job when it has written `note`, and let them continue three times HANG_SECONDS later."""
    wait_for(note, victim)
    pids = [process.pid for process in victim.processes] + children(victim)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(3 * HANG_SECONDS if number == signal.SIGSTOP else 0)


def validate_late(note: Path, rank: int) -> None:
    """A hook: `note` is written when the first of two processes waits for the last one's share of an evaluation."""
    validate = loop.validate

    def wait_and_validate(**arguments: object) -> loop.Accuracy:
        time.sleep(1)
        note_and_wait(note)
        return validate(**arguments)

    if rank:
        evaluate.validate = wait_and_validate


def paused_evaluation_trial(sandbox: Sandbox) -> list[str]:
    """Pause both processes of an evaluation for longer than it may hang; what is wrong afterwards."""
    folder = sandbox.new_folder("pause", "evaluation")
    finish(*sandbox.arguments(folder), log=folder / "log")
    log, note = folder / "eval", folder / "note"
    command = [*sandbox.arguments(folder, f"TRAIN.HANG_SECONDS={HANG_SECONDS}"), "--eval"]
    hook = functools.partial(validate_late, note)
    victim = launch(command, log=log, processes=2, hooks=[hook])
    pause(victim, note)
    codes = victim.wait()
    return [] if set(codes) == {0} else [f"a paused evaluation: {codes}"]


def delete_checkpoint(rank: int) -> None:
    """A hook: a training run deletes the checkpoint whose evaluation has begun."""
    validate = loop.validate

    def validate_and_delete(**arguments: object) -> loop.Accuracy:
        (run,) = Path(os.environ["SCORECARD_RUN"]).glob("*/*")
        for step in checkpoint.list_checkpoints(run / "checkpoints"):
            step.rename(step.with_name(f".tmp-{step.name}"))
        checkpoint.remove_partial(run / "checkpoints")
        return validate(**arguments)

    evaluate.validate = validate_and_delete


def evaluation_trial(sandbox: Sandbox) -> list[str]:
    """Evaluate a run whose checkpoints are deleted meanwhile; what is wrong."""
    folder = sandbox.new_folder("neighbour")
    finish(*sandbox.arguments(folder), log=folder / "log")
    found = []
    for hooks in ((), (functools.partial(set_run, folder), delete_checkpoint)):
        log = folder / f"eval-{len(found)}"
        victim = launch([*sandbox.arguments(folder), "--eval"], log=log, hooks=hooks)
        codes = victim.wait()
        if codes != [0]:
            return [f"evaluation: {codes}: {victim.output[-300:]}"]
        found.append(json.loads(victim.output.splitlines()[-1]))
    same = found[0] == found[1] and {"model", "ema"} <= found[0].keys()
    return [] if same else ["the evaluation lacks the weights that were deleted, or they differ"]


def set_run(folder: Path, rank: int) -> None:
    """A hook: name the run to `delete_checkpoint`."""
    os.environ["SCORECARD_RUN"] = str(folder)


def second_trial(sandbox: Sandbox) -> list[str]:
    """Start a second run in the folder of one that trains, and a fresh one in that of one that has; what is wrong."""
    folder = sandbox.new_folder("second")
    log, note = folder / "log", folder / "note"
    arguments = sandbox.arguments(folder, *ENDLESS)
    first = launch(arguments, log=log, hooks=[functools.partial(reach_training, note)])
    wait_for(note, first)
    problems = []
    second = launch(arguments, log=folder / "log-second")
    if (codes := second.wait()) != [STORAGE]:
        problems.append(f"a second run: {codes}")
    status = json.loads((run_of(folder) / "status.json").read_text())
    if status["state"] != "running":
        problems.append(f"status.json of the first run: {status}")
    first.signal(signal.SIGTERM)
    expect(first, STOPPED)
    before = outcome(folder)
    fresh = launch([*arguments, "CHECKPOINT.AUTO_RESUME=False"], log=folder / "log-fresh")
    if (codes := fresh.wait()) != [CHECKPOINT]:
        problems.append(f"a fresh run in a used folder: {codes}")
    return problems + [f"{name} of a used folder" for name in differences(outcome(folder), before)]


def check_neighbours(sandbox: Sandbox) -> Result:
    """Pauses longer than HANG_SECONDS, an evaluation beside a run that prunes, a second and a fresh run in a folder."""
    trials: list[Callable] = [
        functools.partial(pause_trial, processes=1),
        functools.partial(pause_trial, processes=2),
        paused_evaluation_trial,
        evaluation_trial,
        second_trial,
    ]
    found = sandbox.map(call, trials)
    problems = [problem for trial in found for problem in trial]
    return Result(
        f"{sum(not trial for trial in found)}/{len(trials)}",
        not problems,
        {"problems": problems},
    )


def call(sandbox: Sandbox, trial: Callable[[Sandbox], list[str]]) -> list[str]:
    """The problems that a trial found."""
    return trial(sandbox)
