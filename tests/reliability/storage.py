"""Checks 2 and 7 to 10: kills inside a save, damaged checkpoints, a full disk, a second run in the folder."""

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
    NotRunError,
    Result,
    Sandbox,
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
MIDDLE = 6  # the step that trials resume from: the end of the first epoch


@functools.cache
def reference_runs(sandbox: Sandbox) -> tuple[Path, Path]:
    """A run that was stopped at MIDDLE, and one that was never stopped; trials resume copies of the first."""
    stopped, unbroken = sandbox.new_folder("stopped"), sandbox.new_folder("unbroken")
    hook = stop_at(MIDDLE)
    expect(launch(sandbox.arguments(stopped), log=stopped / "log", hooks=[hook]), STOPPED)
    finish(*sandbox.arguments(unbroken, "CHECKPOINT.KEEP=9"), log=unbroken / "log")
    return stopped, unbroken


def copy_stopped_run(sandbox: Sandbox, *words: int | str) -> Path:
    """A copy of the stopped run, to resume."""
    folder = sandbox.new_folder(*words)
    return Path(shutil.copytree(sandbox.folder / "stopped", folder, dirs_exist_ok=True))


def finish_and_compare(sandbox: Sandbox, folder: Path) -> list[str]:
    """Let the run below `folder` finish; how it differs from the one that was never stopped."""
    finish(*sandbox.arguments(folder), log=folder / "log")
    return differences(outcome(folder), outcome(sandbox.folder / "unbroken"))


def newest_step(folder: Path) -> int:
    """The step of the newest valid checkpoint."""
    found = checkpoint.latest(run_of(folder) / "checkpoints")
    return checkpoint.read_metadata(found)["step"]


# --- 2: killed inside a save ----------------------------------------------------------------------


def kill_point_trial(sandbox: Sandbox, place: tuple[str, int]) -> dict:
    """Resume at MIDDLE, die where a save reaches a point for the nth time, and finish."""
    point, nth = place
    folder = copy_stopped_run(sandbox, "points", f"{point}-{nth}")
    hook = functools.partial(kill_at, point, nth)
    codes = launch(sandbox.arguments(folder), log=folder / "log", hooks=[hook]).wait()
    kept = newest_step(folder)
    return {
        "point": point,
        "time": nth,
        "reached": codes == [-signal.SIGKILL],
        "newest": kept,
        "different": finish_and_compare(sandbox, folder)
        if kept >= MIDDLE
        else ["the checkpoint before it"],
    }


def check_kill_points(sandbox: Sandbox) -> Result:
    """Every numbered point of the save path, in the full form each time that a save of the run reaches it."""
    reference_runs(sandbox)
    places = [(point, 1) for point in POINTS]
    trials, nth = sandbox.map(kill_point_trial, places), 1
    unreached = [trial["point"] for trial in trials if not trial["reached"]]
    while not sandbox.short and places:
        nth += 1
        places = [(t["point"], nth) for t in trials if t["time"] == nth - 1 and t["reached"]]
        trials += sandbox.map(kill_point_trial, places)
    hit = [trial for trial in trials if trial["reached"]]
    good = sum(not trial["different"] for trial in hit)
    reached = len(POINTS) - len(unreached)
    measured = f"{reached}/{len(POINTS)} points, {good}/{len(hit)} kills survived"
    return Result(measured, good == len(hit) and not unreached, {"trials": trials})


# --- 7, 8: damaged checkpoints --------------------------------------------------------------------

CUTS = (0, 0.25, 0.5, 0.99, 0.9999)


def damage(source: random.Random, content: bytes) -> tuple[str, bytes | None]:
    """What happened to a file, and what is left of it: a bit flipped, its end cut off, or nothing."""
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


def check_damage(sandbox: Sandbox) -> Result:
    """Flips at random over all bytes of a checkpoint, cuts of each file, each file gone: verify() has to object."""
    reference_runs(sandbox)
    folder = copy_stopped_run(sandbox, "damaged")
    step = checkpoint.latest(run_of(folder) / "checkpoints")
    files = {file: file.read_bytes() for file in sorted(step.iterdir())}
    cases = [(file, "missing", None) for file in files]
    for file, content in files.items():
        cases += [(file, f"cut to {cut:.2%}", content[: int(cut * len(content))]) for cut in CUTS]
    source = sandbox.random("flips")
    weights = [len(content) for content in files.values()]
    for file in source.choices(list(files), weights, k=sandbox.count(220, 5000) - len(cases)):
        cases.append((file, *flip(source, files[file])))
    silent = []
    for file, what, content in cases:
        replace(file, content)
        if checkpoint.verify(step) is None:
            silent.append(f"{file.name}: {what}")
        file.write_bytes(files[file])
    valid = checkpoint.verify(step) is None
    measured = f"{len(cases) - len(silent)}/{len(cases)}, {len(silent)} silent"
    return Result(measured, not silent and valid, {"silent": silent})


def fallback_trial(sandbox: Sandbox, number: int) -> dict:
    """Damage some of a finished run's checkpoints: the newest valid one is found, and a few runs resume from it."""
    source = sandbox.random("fallback", number)
    folder = sandbox.new_folder("fallback", number)
    shutil.copytree(sandbox.folder / "unbroken", folder, dirs_exist_ok=True)
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    chosen = source.sample(steps, source.randint(1, len(steps) - 1))
    done = {}
    for step in chosen:
        file = source.choice(sorted(step.iterdir()))
        what, content = damage(source, file.read_bytes())
        replace(file, content)
        done[f"{step.name}/{file.name}"] = what
    expected = next(step for step in steps if step not in chosen)
    found = checkpoint.latest(steps[0].parent)
    different = [] if found == expected else [f"{found.name} instead of {expected.name}"]
    if number < sandbox.count(3, 20):
        different += finish_and_compare(sandbox, folder)
    return {"trial": number, "damage": done, "different": different}


def check_fallback(sandbox: Sandbox) -> Result:
    """The newest valid checkpoint is used, whichever of the others are damaged."""
    reference_runs(sandbox)
    trials = sandbox.map(fallback_trial, range(sandbox.count(20, 200)))
    good = sum(not trial["different"] for trial in trials)
    runs = sandbox.count(3, 20)
    measured = f"{good}/{len(trials)}, {runs} of them run to the same end"
    return Result(measured, good == len(trials), {"trials": trials})


# --- 9: no space ----------------------------------------------------------------------------------


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


def drop_root(rank: int) -> None:
    """A hook: give up root's right to write everywhere."""
    import encodings.utf_8_sig  # noqa: F401  the interpreter may lie where nobody can read

    os.setgid(65534)
    os.setuid(65534)


def require_root() -> None:
    """Raise NotRunError for anybody else."""
    if os.geteuid():
        raise NotRunError("only root may mount disks and become another user")


@contextlib.contextmanager
def mount(folder: Path, *options: str) -> Iterator[None]:
    """Mount something on `folder` while the block runs; NotRunError where that is not allowed."""
    require_root()
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise NotRunError(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def no_space_trial(sandbox: Sandbox, case: tuple[str, object]) -> dict:
    """Resume at MIDDLE where nothing more can be written, then with space; no checkpoint may be damaged."""
    kind, value = case
    folder = copy_stopped_run(sandbox, "space", f"{kind}-{value}")
    record = {"case": kind, "value": value}
    try:
        if kind == "full disk":
            with mount(folder, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
                shutil.copytree(sandbox.folder / "stopped", folder, dirs_exist_ok=True)
                filler = folder / "filler"
                record |= run_without_space(
                    sandbox, folder, at_step(value, lambda rank: fill(filler))
                )
                filler.unlink()
                return record | {"different": finish_and_compare(sandbox, folder)}
        if kind == "read-only":
            with mount(folder, "--bind", str(folder)):
                options = "remount,bind,ro", str(folder)
                subprocess.run(["mount", "-o", *options, str(folder)], check=True)
                record |= run_without_space(sandbox, folder)
        elif kind == "no permission":
            require_root()  # others cannot give up rights
            record |= run_without_space(sandbox, folder, drop_root)
        else:
            hook = {"quota per file": limit_file_size, "fsync": fail_to_sync}[kind]
            record |= run_without_space(sandbox, folder, functools.partial(hook, value))
    except NotRunError as error:
        return record | {"not run": str(error)}
    return record | {"different": finish_and_compare(sandbox, folder)}


def run_without_space(sandbox: Sandbox, folder: Path, *hooks: Callable) -> dict:
    """Start the run below `folder` where it cannot save: the exit code, and which of its checkpoints that damaged."""
    steps = checkpoint.list_checkpoints(run_of(folder) / "checkpoints")
    log = sandbox.folder / "space" / f"{folder.name}.log"
    codes = launch(sandbox.arguments(folder), log=log, hooks=hooks).wait()
    damaged = [step.name for step in steps[:1] if checkpoint.verify(step) is not None]
    return {"exit_codes": codes, "damaged": damaged}


def check_no_space(sandbox: Sandbox) -> Result:
    """Full and read-only disks, quotas, missing rights: exit code 6 or a complete run, no checkpoint damaged."""
    reference_runs(sandbox)
    source = sandbox.random("space")
    cases = [("full disk", step) for step in source.sample(range(7, 13), sandbox.count(3, 6))]
    sizes = [source.randrange(20_000, 170_000) for _ in range(sandbox.count(3, 30))]
    cases += [("quota per file", size) for size in sizes]
    cases += [("fsync", errno.EDQUOT), ("fsync", errno.ENOSPC)]
    cases += [("read-only", None), ("no permission", None)]
    trials = sandbox.map(no_space_trial, cases)
    run = [trial for trial in trials if "not run" not in trial]
    good = sum(
        not trial["damaged"] and not trial["different"] and trial["exit_codes"][0] in (0, STORAGE)
        for trial in run
    )
    missing = len(trials) - len(run)
    measured = f"{good}/{len(run)}" + (f", {missing} not run (no root)" if missing else "")
    return Result(measured, good == len(run), {"trials": trials})


# --- 10: two runs in one folder -------------------------------------------------------------------


def open_data_slowly(rank: int) -> None:
    """A hook: take half a second to open the data, so that two runs overlap."""
    build = ImageDataset.__init__

    def build_slowly(self: ImageDataset, *args: object, **kwargs: object) -> None:
        time.sleep(0.25)
        build(self, *args, **kwargs)

    ImageDataset.__init__ = build_slowly


def race_trial(sandbox: Sandbox, number: int) -> dict:
    """Start two runs at once in the folder of a finished one: one finds nothing left to do, the other is refused."""
    folder = sandbox.new_folder("race", number)
    shutil.copytree(sandbox.folder / "unbroken", folder, dirs_exist_ok=True)
    logs = [folder / "first", folder / "second"]
    runs = [launch(sandbox.arguments(folder), log=log, hooks=[open_data_slowly]) for log in logs]
    codes = [run.wait()[0] for run in runs]
    message = "is in use by" in "".join(run.output for run in runs)
    shutil.rmtree(folder)
    return {"trial": number, "exit_codes": codes, "named": message}


def check_locks(sandbox: Sandbox) -> Result:
    """Of two runs that start together, one holds the folder and the other ends with code 6 and the holder's name."""
    reference_runs(sandbox)
    trials = sandbox.map(race_trial, range(100))
    good = sum(sorted(trial["exit_codes"]) == [0, STORAGE] and trial["named"] for trial in trials)
    return Result(f"{good}/{len(trials)} races", good == len(trials), {"trials": trials})
