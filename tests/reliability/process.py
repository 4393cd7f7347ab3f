"""Figures 1, 3 to 6, 23 and 24: what do kills, signals, dead and hanging processes cost?"""

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
from engine import checkpoint
from reliability.harness import (
    ENDLESS,
    ROOT,
    STOPPED,
    Lab,
    Outcome,
    at_step,
    differences,
    finish,
    kill,
    launch,
    marked,
    outcome,
    records,
    run_of,
)
from utils.signals import SIGNALS

BATCH = 8  # images of a step of the tiny run
INTERVAL = 2  # steps between its checkpoints


# --- The ledger -----------------------------------------------------------------------------------


def keep_ledger(path: Path, rank: int) -> None:
    """Have this process write each training image that it reads, "epoch index", and "at step" where it resumes."""
    ledger = os.open(f"{path}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    read, restore = ImageDataset.__getitem__, checkpoint.restore

    def read_and_note(self: ImageDataset, item: int | tuple[int, int]) -> object:
        if self.train:
            os.write(ledger, b"%d %d\n" % item)
        return read(self, item)

    def restore_and_note(found: Path, state: checkpoint.TrainState) -> None:
        restore(found, state)
        os.write(ledger, b"at %d\n" % state.step)

    ImageDataset.__getitem__, checkpoint.restore = read_and_note, restore_and_note


def read_ledger(path: Path, rank: int) -> tuple[int, list[str]]:
    """The step that an attempt began at, and the images that it read; what a kill cut off is left out."""
    file = path.with_name(f"{path.name}-{rank}")
    lines = file.read_text().splitlines() if file.exists() else []
    start = int(lines.pop(0).split()[1]) if lines and lines[0].startswith("at") else 0
    return start, lines


def committed(ledgers: list[Path], rank: int, share: int) -> tuple[list[str], int]:
    """What the attempts of one run read and kept, `share` images a step, and the most steps that one of them lost.

    What an attempt read beyond the step that the next one went on from was lost with it.
    """
    attempts = [read_ledger(path, rank) for path in ledgers]
    attempts = [(start, images) for start, images in attempts if start or images]
    kept, lost = [], 0
    for (start, images), (resumed, _) in itertools.pairwise(attempts):
        kept += images[: (resumed - start) * share]
        lost = max(lost, start + len(images) // share - resumed)
    return kept + attempts[-1][1], lost


# --- 1, 3, 24: killed at random times -------------------------------------------------------------


def unkilled(lab: Lab, processes: int) -> float:
    """Run to the end without a fault, in the folder unkilled/<processes>; the seconds that it took."""
    folder = lab.room("unkilled", processes)
    hook = functools.partial(keep_ledger, folder / "ledger")
    start = time.monotonic()
    command = lab.arguments(folder)
    finish(*command, log=folder / "log", processes=processes, hooks=[hook])
    return time.monotonic() - start


@functools.cache
def references(lab: Lab) -> dict[int, float]:
    """The unkilled runs on one and two processes: the seconds that they took."""
    return dict(zip((1, 2), lab.map(unkilled, (1, 2)), strict=True))


def numbered(lab: Lab, count: int) -> list[tuple[int, int, float]]:
    """Number, processes and unkilled seconds of so many trials; every fifth is of a run on two processes."""
    groups = [2 if number % 5 == 4 else 1 for number in range(count)]
    return [(number, group, references(lab)[group]) for number, group in enumerate(groups)]


def killed(lab: Lab, trial: tuple[int, int, float]) -> dict:
    """Kill a run at one to three random times, let it finish, and compare it with the one that was not killed."""
    number, processes, seconds = trial
    random = lab.random("kill", number)
    folder = lab.room("kill", number)
    wanted, kills, ledgers = random.choice((1, 1, 2, 3)), [], []
    while True:
        ledgers.append(folder / f"ledger-{len(ledgers)}")
        hook = functools.partial(keep_ledger, ledgers[-1])
        command = lab.arguments(folder)
        victim = launch(command, log=folder / "log", processes=processes, hooks=[hook])
        moment = random.uniform(0, seconds)
        if len(kills) == wanted or victim.ended_within(moment):
            codes = victim.wait()
            if kills or any(codes):
                break
            folder, ledgers = lab.room("kill", number), []  # it was over before its first kill
        else:
            victim.signal(signal.SIGKILL)
            victim.wait()
            kills.append(round(moment, 3))
    record = {"trial": number, "processes": processes, "kills_s": kills, "exit_codes": codes}
    return record | compared(lab, folder, ledgers, processes)


def compared(lab: Lab, folder: Path, ledgers: list[Path], processes: int) -> dict:
    """How the run in `folder` differs from the unkilled one in its result, its records, and the images it consumed."""
    reference = lab.folder / "unkilled" / str(processes)
    found = {"different": differences(outcome(folder), outcome(reference)), "lost": 0}
    found |= {"repeated": 0, "skipped": 0, "images": 0}
    for rank in range(processes):
        consumed, lost = committed(ledgers, rank, BATCH // processes)
        _, expected = read_ledger(reference / "ledger", rank)
        found["lost"] = max(found["lost"], lost)
        found["repeated"] += (Counter(consumed) - Counter(expected)).total()
        found["skipped"] += (Counter(expected) - Counter(consumed)).total()
        found["images"] += len(consumed)
    return found


@functools.cache
def kills(lab: Lab) -> list[dict]:
    """The trials that figures 1, 3 and 24 look at."""
    return lab.map(killed, numbered(lab, lab.count(20, 500)))


def kill_at_random_times(lab: Lab) -> Outcome:
    """Killed once to three times, then left to finish: the same tensors and counters as unkilled."""
    trials = kills(lab)
    equal = sum(
        set(trial["different"]) <= {"metrics"} and not any(trial["exit_codes"]) for trial in trials
    )
    count = sum(len(trial["kills_s"]) for trial in trials)
    started = started_as_users_do(lab)
    measured = f"{equal}/{len(trials)}, {count} kills"
    details = {"trials": trials, "python main.py differs in": started}
    return Outcome(measured, equal == len(trials) and not started, details)


def started_as_users_do(lab: Lab) -> list[str]:
    """What `python main.py` ends in that a run of this scorecard, forked from it, does not."""
    folder = lab.room("python")
    command = [sys.executable, "main.py", *lab.arguments(folder)]
    with (folder / "log").open("wb") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return differences(outcome(folder), outcome(lab.folder / "unkilled" / "1"))


def work_lost(lab: Lab) -> Outcome:
    """The steps that kills cost, and the images that a run consumed, from a ledger that the data set writes."""
    trials = kills(lab)
    lost = max(trial["lost"] for trial in trials)
    repeated, skipped, images = (
        sum(trial[name] for trial in trials) for name in ("repeated", "skipped", "images")
    )
    _, order = read_ledger(lab.folder / "unkilled" / "1" / "ledger", 0)
    once = len(set(order)) == len(order)  # no image twice in an epoch of the unkilled run either
    # A checkpoint is written while the next step is trained: a kill then costs that one as well.
    passed = lost <= INTERVAL + 1 and not repeated and not skipped and once
    measured = f"≤ {lost} steps (interval {INTERVAL}); {repeated}, {skipped} of {images}"
    return Outcome(measured, passed, {"interval_steps": INTERVAL, "lost_steps": lost})


def metrics_equal(lab: Lab) -> Outcome:
    """metrics.jsonl of the killed runs, byte by byte."""
    trials = kills(lab)
    equal = sum("metrics" not in trial["different"] for trial in trials)
    return Outcome(f"{equal}/{len(trials)} files byte-equal", equal == len(trials))


# --- 4: asked to stop -----------------------------------------------------------------------------


def stopped(lab: Lab, trial: tuple[int, int, float]) -> dict:
    """Send a signal at a random time of the training, five of them in every second trial; then finish the run."""
    number, processes, seconds = trial
    random = lab.random("stop", number)
    wanted = SIGNALS[number % len(SIGNALS)]
    while True:
        folder = lab.room("stop", number)
        ledger = folder / "ledger"
        hook = functools.partial(keep_ledger, ledger)
        victim = launch(
            lab.arguments(folder), log=folder / "log", processes=processes, hooks=[hook]
        )
        while not read_ledger(ledger, 0)[1]:
            time.sleep(0.005)
        moment = random.uniform(0, 0.8 * seconds)
        if victim.ended_within(moment):
            continue
        begun = -(-len(read_ledger(ledger, 0)[1]) * processes // BATCH)
        asked = time.monotonic()
        for _ in range(5 if number % 2 else 1):
            victim.signal(wanted, *range(processes)[-1:])  # one process is told, all have to stop
            time.sleep(0.02)
        codes = victim.wait()
        took = time.monotonic() - asked
        if set(codes) != {0}:  # else the last step was over when the signal came
            break
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    saved = checkpoint.read_metadata(steps[0])["step"] if steps else 0
    finish(*lab.arguments(folder), log=folder / "log", processes=processes)
    reference = lab.folder / "unkilled" / str(processes)
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


def stop_on_request(lab: Lab) -> Outcome:
    """SIGTERM, SIGINT and SIGUSR1 in turn: exit code 75 at the next step after_step, equal bits after a restart."""
    trials = lab.map(stopped, numbered(lab, lab.count(30, 300)))
    good = sum(
        set(trial["exit_codes"]) == {STOPPED}
        and not trial["different"]
        and trial["steps_later"] <= 1
        for trial in trials
    )
    later = max(trial["steps_later"] for trial in trials)
    slowest = max(trial["stopped_in_s"] for trial in trials)
    measured = f"{good}/{len(trials)}; ≤ {max(later, 0)} steps later, ≤ {slowest:.1f} s"
    return Outcome(measured, good == len(trials), {"trials": trials})


# --- 5: a process dies ----------------------------------------------------------------------------


def bereaved(lab: Lab, number: int) -> dict:
    """Kill one of two processes under torchrun, each with a loader worker; how long the others live."""
    folder = lab.room("death", number)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["main.py", *lab.arguments(folder, *ENDLESS, "DATA.NUM_WORKERS=1")]
    mark = f"SCORECARD_TRIAL={folder}"
    environment = {**os.environ, "SCORECARD_TRIAL": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while not list(folder.glob("*/*/checkpoints/step-*")):
            assert run.poll() is None, (folder / "log").read_text()[-1000:]
            time.sleep(0.01)
        time.sleep(lab.random("death", number).uniform(0, 1))
        kill(min(marked(mark, f"RANK={number % 2}")))  # its worker was born later
        killed_at = time.monotonic()
        ranks = [f"RANK={rank}" for rank in range(2)]
        while any(marked(mark, rank) for rank in ranks) and time.monotonic() < killed_at + 60:
            time.sleep(0.02)
        gone = time.monotonic() - killed_at
        code = run.wait()
    torchrun = time.monotonic() - killed_at
    orphans = marked(mark)
    kill(*orphans)
    return {
        "rank": number % 2,
        "gone_in_s": round(gone, 2),
        "torchrun_gone_in_s": round(torchrun, 2),
        "orphans": len(orphans),
        "exit_code": code,
    }


def rank_death(lab: Lab) -> Outcome:
    """kill -9 for rank 0 and rank 1 in turn: the other process and all workers have to end, and then torchrun."""
    trials = lab.map(bereaved, range(lab.count(2, 20)))
    slowest = max(trial["gone_in_s"] for trial in trials)
    orphans = sum(trial["orphans"] for trial in trials)
    passed = slowest <= 5 and not orphans and all(trial["exit_code"] for trial in trials)
    measured = f"≤ {slowest:.1f} s, {orphans} orphans in {len(trials)} deaths"
    return Outcome(measured, passed, {"trials": trials})


# --- 6: a hang ------------------------------------------------------------------------------------

HANG_SECONDS = 6
HANG = 76


def sleep_for_ever(note: Path) -> None:
    """The line that a stack has to name."""
    note.write_text(str(time.monotonic()))
    time.sleep(3600)


def hung(lab: Lab, processes: int) -> dict:
    """Let the last of so many processes stand still after its third step."""
    folder = lab.room("hang", processes)
    last = processes - 1
    hook = at_step(3, lambda rank: sleep_for_ever(folder / "note") if rank == last else None)
    command = lab.arguments(folder, *ENDLESS, f"TRAIN.HANG_SECONDS={HANG_SECONDS}")
    codes = launch(command, log=folder / "log", processes=processes, hooks=[hook]).wait(120)
    took = time.monotonic() - float((folder / "note").read_text())
    stacks = [file.read_text() for file in run_of(folder).glob("hang-*.txt")]
    named = any("sleep_for_ever" in stack for stack in stacks)
    return {"processes": processes, "exit_codes": codes, "took_s": round(took, 1), "named": named}


def hang(lab: Lab) -> Outcome:
    """A process alone, and one of two, that stand still: ended with code 76, with the line in a file of stacks."""
    trials = lab.map(hung, (1, 2))
    slowest = max(trial["took_s"] for trial in trials)
    good = sum(HANG in trial["exit_codes"] and trial["named"] for trial in trials)
    measured = f"{good}/{len(trials)} named, ≤ {slowest:.1f} s with a timeout of {HANG_SECONDS} s"
    passed = good == len(trials) and slowest <= HANG_SECONDS + 5
    return Outcome(measured, passed, {"trials": trials})


# --- 23: useful time under faults -----------------------------------------------------------------


def effective_time(lab: Lab) -> Outcome:
    """Run `python main.py`, kill it and start it again; the share of the time that steps of the end result took.

    The short form kills once after 20 s and reckons with one such loss a minute; the full one kills every 60 s.
    """
    folder = lab.room("effective")
    stints = lab.count(2, 6)
    seconds = lab.count(20, 60)
    settings = [*ENDLESS, "SAVE_STEPS=10", "DATA.NUM_WORKERS=1"]
    command = [sys.executable, "main.py", *lab.arguments(folder, *settings)]
    start = time.monotonic()
    with (folder / "log").open("ab") as log:
        for _ in range(stints):
            run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, process_group=0)
            time.sleep(seconds)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    elapsed = time.monotonic() - start
    last = checkpoint.read_metadata(checkpoint.latest(run_of(folder) / "checkpoints"))["step"]
    times = records(run_of(folder) / "timing.jsonl")
    useful = sum(BATCH / r["time/images_per_s"] for r in times if r["step"] <= last)
    loss = (elapsed - useful) / stints
    share = 1 - loss / 60
    measured = f"{share:.0%} ({loss:.1f} s a fault)"
    details = {"stints": stints, "stint_s": seconds, "useful_s": round(useful, 2)}
    return Outcome(measured, share >= 0.8, details)
