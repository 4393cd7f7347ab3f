"""Checks 1, 3 to 6, 23 and 24: kills, signals, dead and hanging processes."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from data import ImageDataset
from engine import agreement, checkpoint
from reliability.harness import (
    ENDLESS,
    ROOT,
    STOPPED,
    Result,
    Sandbox,
    at_step,
    differences,
    find_processes,
    finish,
    kill,
    launch,
    outcome,
    read_records,
    run_of,
)
from utils.signals import SIGNALS

BATCH = 8  # images of a step of the tiny run
INTERVAL = 2  # steps between its checkpoints


# --- The ledger -----------------------------------------------------------------------------------


def keep_ledger(path: Path, rank: int) -> None:
    """Have this process write each training image that it reads, "epoch index", and "at step" where it resumes."""
    ledger = os.open(f"{path}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    read, send = ImageDataset.__getitem__, agreement.send_state

    def read_and_log(self: ImageDataset, item: int | tuple[int, int, int]) -> object:
        if self.train:
            os.write(ledger, b"%d %d\n" % item[:2])
        return read(self, item)

    def send_and_log(state: checkpoint.TrainState) -> None:
        send(state)
        if state.step:
            os.write(ledger, b"at %d\n" % state.step)

    ImageDataset.__getitem__, agreement.send_state = read_and_log, send_and_log


def read_ledger(path: Path, rank: int) -> tuple[int, list[str]]:
    """The step that an attempt began at, and the images that it read; what a kill cut off is left out."""
    file = path.with_name(f"{path.name}-{rank}")
    lines = file.read_text().splitlines() if file.exists() else []
    start = int(lines.pop(0).split()[1]) if lines and lines[0].startswith("at") else 0
    return start, lines


def kept_and_lost(ledgers: list[Path], rank: int, share: int) -> tuple[list[str], int]:
    """What the attempts of one run read and kept, `share` images a step, and the most steps that one of them lost.

    What an attempt read beyond the step that the next one resumed from was lost with it.
    """
    attempts = [read_ledger(path, rank) for path in ledgers]
    attempts = [(start, images) for start, images in attempts if start or images]
    kept, lost = [], 0
    for (start, images), (resumed, _) in itertools.pairwise(attempts):
        kept += images[: (resumed - start) * share]
        lost = max(lost, start + len(images) // share - resumed)
    return kept + attempts[-1][1], lost


# --- 1, 3, 24: killed at random times -------------------------------------------------------------


def run_unkilled(sandbox: Sandbox, processes: int) -> float:
    """Run to the end without a fault, in the folder unkilled/<processes>; the seconds that it took."""
    folder = sandbox.new_folder("unkilled", processes)
    hook = functools.partial(keep_ledger, folder / "ledger")
    start = time.monotonic()
    command = sandbox.arguments(folder)
    finish(*command, log=folder / "log", processes=processes, hooks=[hook])
    return time.monotonic() - start


@functools.cache
def unkilled_seconds(sandbox: Sandbox) -> dict[int, float]:
    """The unkilled runs on one and two processes: the seconds that they took."""
    return dict(zip((1, 2), sandbox.map(run_unkilled, (1, 2)), strict=True))


def number_trials(sandbox: Sandbox, count: int) -> list[tuple[int, int, float]]:
    """Number, processes and unkilled seconds of so many trials; every fifth is of a run on two processes."""
    groups = [2 if number % 5 == 4 else 1 for number in range(count)]
    return [
        (number, group, unkilled_seconds(sandbox)[group]) for number, group in enumerate(groups)
    ]


def kill_trial(sandbox: Sandbox, trial: tuple[int, int, float]) -> dict:
    """Kill a run at one to three random times, let it finish, and compare it with the one that was not killed."""
    number, processes, seconds = trial
    random = sandbox.random("kill", number)
    folder = sandbox.new_folder("kill", number)
    wanted, kills, ledgers = random.choice((1, 1, 2, 3)), [], []
    while True:
        ledgers.append(folder / f"ledger-{len(ledgers)}")
        hook = functools.partial(keep_ledger, ledgers[-1])
        command = sandbox.arguments(folder)
        victim = launch(command, log=folder / "log", processes=processes, hooks=[hook])
        moment = random.uniform(0, seconds)
        if len(kills) == wanted or victim.ended_within(moment):
            codes = victim.wait()
            if kills or any(codes):
                break
            folder, ledgers = (
                sandbox.new_folder("kill", number),
                [],
            )  # it was over before its first kill
        else:
            victim.signal(signal.SIGKILL)
            victim.wait()
            kills.append(round(moment, 3))
    record = {"trial": number, "processes": processes, "kills_s": kills, "exit_codes": codes}
    return record | compare_with_unkilled(sandbox, folder, ledgers, processes)


def compare_with_unkilled(
    sandbox: Sandbox, folder: Path, ledgers: list[Path], processes: int
) -> dict:
    """How the run in `folder` differs from the unkilled one in its result, its records, and the images it consumed."""
    reference = sandbox.folder / "unkilled" / str(processes)
    found = {"different": differences(outcome(folder), outcome(reference)), "lost": 0}
    found |= {"repeated": 0, "skipped": 0, "images": 0}
    for rank in range(processes):
        consumed, lost = kept_and_lost(ledgers, rank, BATCH // processes)
        _, expected = read_ledger(reference / "ledger", rank)
        found["lost"] = max(found["lost"], lost)
        found["repeated"] += (Counter(consumed) - Counter(expected)).total()
        found["skipped"] += (Counter(expected) - Counter(consumed)).total()
        found["images"] += len(consumed)
    return found


@functools.cache
def kill_trials(sandbox: Sandbox) -> list[dict]:
    """The trials of checks 1, 3 and 24."""
    return sandbox.map(kill_trial, number_trials(sandbox, sandbox.count(20, 500)))


def check_random_kills(sandbox: Sandbox) -> Result:
    """Killed once to three times, then left to finish: the same tensors and counters as unkilled."""
    trials = kill_trials(sandbox)
    equal = sum(
        set(trial["different"]) <= {"metrics"} and not any(trial["exit_codes"]) for trial in trials
    )
    count = sum(len(trial["kills_s"]) for trial in trials)
    started = compare_with_python(sandbox)
    measured = f"{equal}/{len(trials)}, {count} kills"
    details = {"trials": trials, "python main.py differs in": started}
    return Result(measured, equal == len(trials) and not started, details)


def compare_with_python(sandbox: Sandbox) -> list[str]:
    """How a run of `python main.py` differs from the scorecard's own, which are forked."""
    folder = sandbox.new_folder("python")
    command = [sys.executable, "main.py", *sandbox.arguments(folder)]
    with (folder / "log").open("wb") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return differences(outcome(folder), outcome(sandbox.folder / "unkilled" / "1"))


def check_work_lost(sandbox: Sandbox) -> Result:
    """The steps that kills cost, and the images that a run consumed, from a ledger that the data set writes."""
    trials = kill_trials(sandbox)
    lost = max(trial["lost"] for trial in trials)
    repeated, skipped, images = (
        sum(trial[name] for trial in trials) for name in ("repeated", "skipped", "images")
    )
    _, order = read_ledger(sandbox.folder / "unkilled" / "1" / "ledger", 0)
    once = len(set(order)) == len(order)  # no image twice in an epoch of the unkilled run either
    # A checkpoint is written while the next step is trained: a kill then costs that one as well.
    passed = lost <= INTERVAL + 1 and not repeated and not skipped and once
    measured = f"≤ {lost} steps (interval {INTERVAL}); {repeated}, {skipped} of {images}"
    return Result(measured, passed, {"interval_steps": INTERVAL, "lost_steps": lost})


def check_metrics(sandbox: Sandbox) -> Result:
    """metrics.jsonl of the killed runs, byte by byte."""
    trials = kill_trials(sandbox)
    equal = sum("metrics" not in trial["different"] for trial in trials)
    return Result(f"{equal}/{len(trials)} files byte-equal", equal == len(trials))


# --- 4: asked to stop -----------------------------------------------------------------------------


def stop_trial(sandbox: Sandbox, trial: tuple[int, int, float]) -> dict:
    """Send a signal at a random time of the training, five in every second trial; then finish the run."""
    number, processes, seconds = trial
    random = sandbox.random("stop", number)
    wanted = SIGNALS[number % len(SIGNALS)]
    while True:
        folder = sandbox.new_folder("stop", number)
        ledger = folder / "ledger"
        hook = functools.partial(keep_ledger, ledger)
        victim = launch(
            sandbox.arguments(folder), log=folder / "log", processes=processes, hooks=[hook]
        )
        while not read_ledger(ledger, 0)[1]:
            assert any(process.is_alive() for process in victim.processes), victim.output[-1000:]
            time.sleep(0.005)
        moment = random.uniform(0, 0.8 * seconds)
        if victim.ended_within(moment):
            continue
        begun = -(-len(read_ledger(ledger, 0)[1]) * processes // BATCH)
        asked = time.monotonic()
        for more in range(5 if number % 2 else 1):  # a second SIGINT would end the run at once
            sent = SIGNALS[(number + more) % len(SIGNALS)]
            victim.signal(sent, *range(processes)[-1:])  # one process gets it, all have to stop
            time.sleep(0.02)
        codes = victim.wait()
        took = time.monotonic() - asked
        if set(codes) != {0}:  # else the last step was over when the signal came
            break
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    saved = checkpoint.read_metadata(steps[0])["step"] if steps else 0
    finish(*sandbox.arguments(folder), log=folder / "log", processes=processes)
    reference = sandbox.folder / "unkilled" / str(processes)
    return {
        "trial": number,
        "signal": wanted.name,
        "processes": processes,
        "after_s": round(moment, 3),
        "exit_codes": codes,
        "stopped_in_s": round(took, 3),
        "steps_later": saved - begun,
        "different": differences(outcome(folder), outcome(reference)),
    }


def check_signals(sandbox: Sandbox) -> Result:
    """Six signals in turn: exit code 75 after the next step, equal bits after a restart."""
    trials = sandbox.map(stop_trial, number_trials(sandbox, sandbox.count(30, 300)))
    good = sum(
        set(trial["exit_codes"]) == {STOPPED}
        and not trial["different"]
        and trial["steps_later"] <= 1
        for trial in trials
    )
    later = max(trial["steps_later"] for trial in trials)
    slowest = max(trial["stopped_in_s"] for trial in trials)
    measured = f"{good}/{len(trials)}; ≤ {max(later, 0)} steps later, ≤ {slowest:.1f} s"
    return Result(measured, good == len(trials), {"trials": trials})


# --- 5: a process dies ----------------------------------------------------------------------------


def death_trial(sandbox: Sandbox, number: int) -> dict:
    """Kill one of two processes under torchrun, each with a loader worker; how long the others live."""
    folder = sandbox.new_folder("death", number)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["main.py", *sandbox.arguments(folder, *ENDLESS, "DATA.NUM_WORKERS=1")]
    mark = f"SCORECARD_TRIAL={folder}"
    environment = {**os.environ, "SCORECARD_TRIAL": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while not list(folder.glob("*/*/checkpoints/step-*")):
            assert run.poll() is None, (folder / "log").read_text()[-1000:]
            time.sleep(0.01)
        time.sleep(sandbox.random("death", number).uniform(0, 1))
        kill(min(find_processes(mark, f"RANK={number % 2}")))  # its worker was started later
        killed_at = time.monotonic()
        ranks = [f"RANK={rank}" for rank in range(2)]
        while (
            any(find_processes(mark, rank) for rank in ranks) and time.monotonic() < killed_at + 60
        ):
            time.sleep(0.02)
        gone = time.monotonic() - killed_at
        code = run.wait()
    torchrun = time.monotonic() - killed_at
    orphans = find_processes(mark)
    kill(*orphans)
    return {
        "rank": number % 2,
        "gone_in_s": round(gone, 2),
        "torchrun_gone_in_s": round(torchrun, 2),
        "orphans": len(orphans),
        "exit_code": code,
    }


def check_process_death(sandbox: Sandbox) -> Result:
    """kill -9 for rank 0 and rank 1 in turn: the other process and all workers have to end, and then torchrun."""
    trials = sandbox.map(death_trial, range(sandbox.count(2, 20)))
    slowest = max(trial["gone_in_s"] for trial in trials)
    orphans = sum(trial["orphans"] for trial in trials)
    passed = slowest <= 5 and not orphans and all(trial["exit_code"] for trial in trials)
    measured = f"≤ {slowest:.1f} s, {orphans} orphans in {len(trials)} deaths"
    return Result(measured, passed, {"trials": trials})


# --- 6: a hang ------------------------------------------------------------------------------------

HANG_SECONDS = 6
HANG = 76


def sleep_for_ever(note: Path) -> None:
    """Hang in the line that a stack has to name."""
    note.write_text(str(time.monotonic()))
    time.sleep(3600)


def hang_trial(sandbox: Sandbox, processes: int) -> dict:
    """Have the last of so many processes hang after its third step."""
    folder = sandbox.new_folder("hang", processes)
    last = processes - 1
    hook = at_step(3, lambda rank: sleep_for_ever(folder / "note") if rank == last else None)
    command = sandbox.arguments(folder, *ENDLESS, f"TRAIN.HANG_SECONDS={HANG_SECONDS}")
    codes = launch(command, log=folder / "log", processes=processes, hooks=[hook]).wait(120)
    took = time.monotonic() - float((folder / "note").read_text())
    stacks = [file.read_text() for file in run_of(folder).glob("hang-*.txt")]
    named = any("sleep_for_ever" in stack for stack in stacks)
    return {"processes": processes, "exit_codes": codes, "took_s": round(took, 1), "named": named}


def check_hang(sandbox: Sandbox) -> Result:
    """A process alone, and one of two, that hang: exit code 76, and a file of stacks names the line."""
    trials = sandbox.map(hang_trial, (1, 2))
    slowest = max(trial["took_s"] for trial in trials)
    good = sum(HANG in trial["exit_codes"] and trial["named"] for trial in trials)
    measured = f"{good}/{len(trials)} named, ≤ {slowest:.1f} s with a timeout of {HANG_SECONDS} s"
    passed = good == len(trials) and slowest <= HANG_SECONDS + 5
    return Result(measured, passed, {"trials": trials})


# --- 23: useful time under faults -----------------------------------------------------------------


def check_useful_time(sandbox: Sandbox) -> Result:
    """Run `python main.py`, kill it and start it again; the share of the time that steps of the end result took.

    The short form kills after 20 s and computes the share for one such loss a minute; the full form kills every 60 s.
    """
    folder = sandbox.new_folder("effective")
    stints = sandbox.count(2, 6)
    seconds = sandbox.count(20, 60)
    settings = [*ENDLESS, "SAVE_STEPS=10", "DATA.NUM_WORKERS=1"]
    command = [sys.executable, "main.py", *sandbox.arguments(folder, *settings)]
    start = time.monotonic()
    with (folder / "log").open("ab") as log:
        for _ in range(stints):
            run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, process_group=0)
            time.sleep(seconds)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    elapsed = time.monotonic() - start
    last = checkpoint.read_metadata(checkpoint.latest(run_of(folder) / "checkpoints"))["step"]
    times = read_records(run_of(folder) / "timing.jsonl")
    useful = sum(BATCH / r["time/images_per_s"] for r in times if r["step"] <= last)
    loss = (elapsed - useful) / stints
    share = 1 - loss / 60
    measured = f"{share:.0%} ({loss:.1f} s a fault)"
    details = {"stints": stints, "stint_s": seconds, "useful_s": round(useful, 2)}
    return Result(measured, share >= 0.8, details)
