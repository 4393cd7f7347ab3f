"""Figures 2 and 7 to 10: does a run survive kills inside a save, damaged checkpoints, a full disk and a rival?"""

import contextlib
import errno
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data import ImageDataset
from engine import checkpoint
from reliability.harness import (
    STOPPED,
    Lab,
    NotRunError,
    Outcome,
    at_step,
    differences,
    expect,
    finish,
    launch,
    outcome,
    run_of,
    stop_at,
)
from reliability.kill_points import POINTS, kill_at

STORAGE = 6
MIDDLE = (
    6  # the step at which the runs that trials start from were stopped: the end of the first epoch
)


@functools.cache
def stopped_and_unbroken(lab: Lab) -> tuple[Path, Path]:
    """A run that was stopped at MIDDLE, and one that was never stopped; trials go on from copies of the first."""
    stopped, unbroken = lab.room("stopped"), lab.room("unbroken")
    hook = stop_at(MIDDLE)
    expect(launch(lab.arguments(stopped), log=stopped / "log", hooks=[hook]), STOPPED)
    finish(*lab.arguments(unbroken, "CHECKPOINT.KEEP=9"), log=unbroken / "log")
    return stopped, unbroken


def copied(lab: Lab, *words: int | str) -> Path:
    """A copy of the stopped run, to go on from."""
    folder = lab.room(*words)
    return Path(shutil.copytree(lab.folder / "stopped", folder, dirs_exist_ok=True))


def finished(lab: Lab, folder: Path) -> list[str]:
    """Let the run below `folder` finish; how it differs from the one that was never stopped."""
    finish(*lab.arguments(folder), log=folder / "log")
    return differences(outcome(folder), outcome(lab.folder / "unbroken"))


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint."""
    found = checkpoint.latest(run_of(folder) / "checkpoints")
    return checkpoint.read_metadata(found)["step"]


# --- 2: killed inside a save ----------------------------------------------------------------------


def killed_at(lab: Lab, place: tuple[str, int]) -> dict:
    """Go on from MIDDLE, die where the save reaches a point for the nth time, and finish."""
    point, nth = place
    folder = copied(lab, "points", f"{point}-{nth}")
    hook = functools.partial(kill_at, point, nth)
    codes = launch(lab.arguments(folder), log=folder / "log", hooks=[hook]).wait()
    kept = newest_step(folder)
    return {
        "point": point,
        "time": nth,
        "reached": codes == [-signal.SIGKILL],
        "newest": kept,
        "different": finished(lab, folder) if kept >= MIDDLE else ["the checkpoint before it"],
    }


def kill_points(lab: Lab) -> Outcome:
    """Every numbered point of the save path, in the full form each time that a save of the run reaches it."""
    stopped_and_unbroken(lab)
    places = [(point, 1) for point in POINTS]
    trials, nth = lab.map(killed_at, places), 1
    unreached = [trial["point"] for trial in trials if not trial["reached"]]
    while not lab.short and places:
        nth += 1
        places = [(t["point"], nth) for t in trials if t["time"] == nth - 1 and t["reached"]]
        trials += lab.map(killed_at, places)
    hit = [trial for trial in trials if trial["reached"]]
    good = sum(not trial["different"] for trial in hit)
    reached = len(POINTS) - len(unreached)
    measured = f"{reached}/{len(POINTS)} points, {good}/{len(hit)} kills survived"
    return Outcome(measured, good == len(hit) and not unreached, {"trials": trials})


# --- 7, 8: damaged checkpoints --------------------------------------------------------------------

CUTS = (0, 0.25, 0.5, 0.99, 0.9999)


def damage(source: random.Random, content: bytes) -> tuple[str, bytes | None]:
    """What happened to a file, and what is left of it: a bit flipped, its end cut off, or no file any more."""
    kind = source.choice(("flip", "flip", "cut", "missing"))
    if kind == "flip":
        return flip(source, content)
    if kind == "cut":
        length = source.randrange(len(content))
        return f"cut to {length} bytes", content[:length]
    return "missing", None


def flip(source: random.Random, content: bytes) -> tuple[str, bytes]:
    """One bit changed."""
    position, bit = source.randrange(len(content)), source.randrange(8)
    flipped = bytearray(content)
    flipped[position] ^= 1 << bit
    return f"bit {bit} of byte {position} flipped", bytes(flipped)


def replace(file: Path, content: bytes | None) -> None:
    """Give `file` other bytes, or take it away."""
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)


def detected(lab: Lab) -> Outcome:
    """Flips at random over all bytes of a checkpoint, cuts of each file, each file gone: verify() has to object."""
    stopped_and_unbroken(lab)
    folder = copied(lab, "damaged")
    step = checkpoint.latest(run_of(folder) / "checkpoints")
    files = {file: file.read_bytes() for file in sorted(step.iterdir())}
    cases = [(file, "missing", None) for file in files]
    for file, content in files.items():
        cases += [(file, f"cut to {cut:.2%}", content[: int(cut * len(content))]) for cut in CUTS]
    source = lab.random("flips")
    weights = [len(content) for content in files.values()]
    for file in source.choices(list(files), weights, k=lab.count(220, 5000) - len(cases)):
        cases.append((file, *flip(source, files[file])))
    silent = []
    for file, what, content in cases:
        replace(file, content)
        if checkpoint.verify(step) is None:
            silent.append(f"{file.name}: {what}")
        file.write_bytes(files[file])
    whole = checkpoint.verify(step) is None
    measured = f"{len(cases) - len(silent)}/{len(cases)}, {len(silent)} silent"
    return Outcome(measured, not silent and whole, {"silent": silent})


def fallen_back(lab: Lab, number: int) -> dict:
    """Damage some of a finished run's checkpoints: the newest whole one is found; a few runs go on from it, too."""
    source = lab.random("fallback", number)
    folder = lab.room("fallback", number)
    shutil.copytree(lab.folder / "unbroken", folder, dirs_exist_ok=True)
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    hurt = source.sample(steps, source.randint(1, len(steps) - 1))
    done = {}
    for step in hurt:
        file = source.choice(sorted(step.iterdir()))
        what, content = damage(source, file.read_bytes())
        replace(file, content)
        done[f"{step.name}/{file.name}"] = what
    expected = next(step for step in steps if step not in hurt)
    found = checkpoint.latest(steps[0].parent)
    different = [] if found == expected else [f"{found.name} instead of {expected.name}"]
    if number < lab.count(3, 20):
        different += finished(lab, folder)
    return {"trial": number, "damage": done, "different": different}


def fall_back(lab: Lab) -> Outcome:
    """The newest whole checkpoint is used, whichever of the others are damaged."""
    stopped_and_unbroken(lab)
    trials = lab.map(fallen_back, range(lab.count(20, 200)))
    good = sum(not trial["different"] for trial in trials)
    runs = lab.count(3, 20)
    measured = f"{good}/{len(trials)}, {runs} of them run to the same end"
    return Outcome(measured, good == len(trials), {"trials": trials})


# --- 9: no room -----------------------------------------------------------------------------------


def limit_file_size(size: int, rank: int) -> None:
    """Refuse any file to grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fail_to_sync(number: int, rank: int) -> None:
    """Have every fsync fail as it does over a quota or on a full network disk, where write() succeeded."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    os.fsync = fsync


def fill(file: Path) -> None:
    """Write into `file` until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as writer:
        while True:
            writer.write(bytes(4096))


def be_nobody(rank: int) -> None:
    """Give up root's right to write everywhere."""
    import encodings.utf_8_sig  # noqa: F401  the interpreter may lie where nobody can read

    os.setgid(65534)
    os.setuid(65534)


def require_root() -> None:
    """Raise NotRunError for anybody else."""
    if os.geteuid():
        raise NotRunError("only root may mount disks and become another user")


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Have something mounted on `folder`; NotRunError where that is not allowed."""
    require_root()
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise NotRunError(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def without_room(lab: Lab, case: tuple[str, object]) -> dict:
    """Go on from MIDDLE where nothing more can be written, then again with room; nothing that was there may be hurt."""
    kind, value = case
    folder = copied(lab, "room", f"{kind}-{value}")
    record = {"case": kind, "value": value}
    try:
        if kind == "full disk":
            with mounted(folder, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
                shutil.copytree(lab.folder / "stopped", folder, dirs_exist_ok=True)
                filler = folder / "filler"
                record |= hindered(lab, folder, at_step(value, lambda rank: fill(filler)))
                filler.unlink()
                return record | {"different": finished(lab, folder)}
        if kind == "read-only":
            with mounted(folder, "--bind", str(folder)):
                options = "remount,bind,ro", str(folder)
                subprocess.run(["mount", "-o", *options, str(folder)], check=True)
                record |= hindered(lab, folder)
        elif kind == "no permission":
            require_root()  # whom missing rights do not stop
            record |= hindered(lab, folder, be_nobody)
        else:
            hook = {"quota per file": limit_file_size, "fsync": fail_to_sync}[kind]
            record |= hindered(lab, folder, functools.partial(hook, value))
    except NotRunError as error:
        return record | {"not run": str(error)}
    return record | {"different": finished(lab, folder)}


def hindered(lab: Lab, folder: Path, *hooks: Callable) -> dict:
    """Start the run below `folder` where it cannot save: the exit code, and which of its checkpoints are hurt by it."""
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    log = lab.folder / "room" / f"{folder.name}.log"
    codes = launch(lab.arguments(folder), log=log, hooks=hooks).wait()
    hurt = [step.name for step in steps[:1] if checkpoint.verify(step) is not None]
    return {"exit_codes": codes, "hurt": hurt}


def no_room(lab: Lab) -> Outcome:
    """Full and read-only disks, quotas, missing rights: exit code 6 or a run that got through, no checkpoint hurt."""
    stopped_and_unbroken(lab)
    source = lab.random("room")
    cases = [("full disk", step) for step in source.sample(range(7, 13), lab.count(3, 6))]
    sizes = [source.randrange(20_000, 170_000) for _ in range(lab.count(3, 30))]
    cases += [("quota per file", size) for size in sizes]
    cases += [("fsync", errno.EDQUOT), ("fsync", errno.ENOSPC)]
    cases += [("read-only", None), ("no permission", None)]
    trials = lab.map(without_room, cases)
    run = [trial for trial in trials if "not run" not in trial]
    good = sum(
        not trial["hurt"] and not trial["different"] and trial["exit_codes"][0] in (0, STORAGE)
        for trial in run
    )
    missing = len(trials) - len(run)
    measured = f"{good}/{len(run)}" + (f", {missing} not run (no root)" if missing else "")
    return Outcome(measured, good == len(run), {"trials": trials})


# --- 10: two runs in one folder -------------------------------------------------------------------


def dawdle(rank: int) -> None:
    """Take half a second for opening the data, so that two runs are there at the same time."""
    build = ImageDataset.__init__

    def build_slowly(self: ImageDataset, *args: object, **kwargs: object) -> None:
        time.sleep(0.25)
        build(self, *args, **kwargs)

    ImageDataset.__init__ = build_slowly


def race(lab: Lab, number: int) -> dict:
    """Start two runs at once in the folder of a finished one: one finds nothing left to do, the other is refused."""
    folder = lab.room("race", number)
    shutil.copytree(lab.folder / "unbroken", folder, dirs_exist_ok=True)
    logs = [folder / "first", folder / "second"]
    rivals = [launch(lab.arguments(folder), log=log, hooks=[dawdle]) for log in logs]
    codes = [rival.wait()[0] for rival in rivals]
    message = "is in use by" in "".join(rival.words for rival in rivals)
    shutil.rmtree(folder)
    return {"trial": number, "exit_codes": codes, "named": message}


def races(lab: Lab) -> Outcome:
    """Of two runs that start together, one holds the folder and the other ends with code 6 and the holder's name."""
    stopped_and_unbroken(lab)
    trials = lab.map(race, range(100))
    good = sum(sorted(trial["exit_codes"]) == [0, STORAGE] and trial["named"] for trial in trials)
    return Outcome(f"{good}/{len(trials)} races", good == len(trials), {"trials": trials})
