"""Check 25: processes that were started differently, see other data or hold another state do not train together."""

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.ranks import add_arguments, change_answer, flip_bit, lose_file_handle

from engine import checkpoint
from reliability.harness import (
    Result,
    Sandbox,
    differences,
    finish,
    launch,
    outcome,
    run_of,
)

CONFIG, DATA, CHECKPOINT = 2, 3, 4  # exit codes
MIDDLE = 6  # the step that trials resume from: the end of the first epoch
PARTS = ("weights", "EMA", "moments")


@dataclass(frozen=True)
class Disagreement:
    """What one of two ranks has otherwise, the exit code of both, and words of the sentence that both end with."""

    hook: Callable[[int], None]
    code: int
    words: tuple[str, ...]


def own(*more: str) -> functools.partial:
    """Rank 1 is started with `more`."""
    return functools.partial(add_arguments, 1, more)


def answer(function: str, value: str) -> functools.partial:
    """`compat.<function>` answers `value` on rank 1."""
    return functools.partial(change_answer, 1, function, value)


def disagreements(folder: Path) -> dict[str, Disagreement]:
    """Those that end a run at its start, by name; `folder` holds the data that rank 1 sees."""
    data = {name: own("--data-path", str(folder / name)) for name in ("train", "val", "none")}
    order = own("--opts", f"DATA.CLASS_LIST={folder / 'classes.txt'}")
    return {
        "seed": Disagreement(own("SEED=5"), CONFIG, ("SEED is 0 on rank 0 and 5 on rank 1",)),
        "learning rate": Disagreement(own("TRAIN.BASE_LR=0.1"), CONFIG, ("TRAIN.BASE_LR is",)),
        "unknown key": Disagreement(own("NO.KEY=1"), CONFIG, ("NO.KEY: unknown key",)),
        "evaluation": Disagreement(own("--eval"), CONFIG, ("train on rank 0 and eval on rank 1",)),
        "revision": Disagreement(answer("revision", "abc"), CONFIG, ("the code revision is",)),
        "sources": Disagreement(answer("hash_sources", "abc"), CONFIG, ("hash of the sources is",)),
        "train images": Disagreement(data["train"], DATA, ("train is 48 images", "47 images")),
        "val images": Disagreement(data["val"], DATA, ("val is 8 images", "7 images")),
        "no data": Disagreement(data["none"], DATA, ("rank 1: ", "no such folder")),
        "class order": Disagreement(order, DATA, ("class 0 is class_0 on rank 0",)),
    }


def prepare(sandbox: Sandbox) -> Path:
    """Make the folder with rank 1's data, and with the runs that trials start from and are compared with."""
    folder = sandbox.new_folder("agreement")
    for split in ("train", "val"):
        shutil.copytree(
            sandbox.folder / "images", folder / split, ignore=shutil.ignore_patterns(".*")
        )
        (folder / split / split / "class_3" / "000.jpg").unlink()
    (folder / "classes.txt").write_text("\n".join(f"class_{n}" for n in (3, 2, 1, 0)))
    for name, setting in (("unbroken", "SEED=0"), ("other", "SEED=5")):
        command = sandbox.arguments(folder / name, "CHECKPOINT.KEEP=9", setting)
        finish(*command, log=folder / f"{name}.log", processes=2)
    shutil.copytree(folder / "unbroken", folder / "stopped")
    steps = run_of(folder / "stopped") / "checkpoints"
    for path in checkpoint.list_checkpoints(steps):
        if checkpoint.read_metadata(path)["step"] > MIDDLE:
            shutil.rmtree(path)
    return folder


# --- Refused at the start -------------------------------------------------------------------------


def refusal_trial(sandbox: Sandbox, name: str) -> dict:
    """Start two processes that differ in one thing, in a folder without a run."""
    case = disagreements(sandbox.folder / "agreement")[name]
    folder = sandbox.new_folder("refusal", name.replace(" ", "-"))
    victim = launch(sandbox.arguments(folder), log=folder / "log", processes=2, hooks=[case.hook])
    codes = victim.wait()
    said = all(victim.output.count(word) for word in case.words)
    saved = list(folder.glob("*/*/checkpoints/step-*"))
    good = codes == [case.code] * 2 and said and not saved and "Traceback" not in victim.output
    return {"case": name, "exit_codes": codes, "good": good, "output": victim.output[-500:]}


# --- Resumed from rank 0 --------------------------------------------------------------------------

VIEWS = ("an empty folder", "an older listing", "another run", "ESTALE", "a fresh start")


def resume_trial(sandbox: Sandbox, name: str) -> dict:
    """Resume a run whose second process sees other checkpoints than the first; how its end differs."""
    prepared = sandbox.folder / "agreement"
    folder = sandbox.new_folder("resume-apart", name.replace(" ", "-"))
    mine, theirs = folder / "mine", folder / "theirs"
    hook = own("--output", str(theirs))
    if name != "a fresh start":
        shutil.copytree(prepared / "stopped", mine)
    if name == "an older listing":
        shutil.copytree(prepared / "stopped", theirs)
        shutil.rmtree(run_of(theirs) / "checkpoints" / f"step-{MIDDLE}")
    elif name == "another run":
        shutil.copytree(prepared / "other", theirs)
    elif name == "ESTALE":
        hook = functools.partial(lose_file_handle, 1, "model.safetensors")
    command = sandbox.arguments(mine, "CHECKPOINT.KEEP=9")
    codes = launch(command, log=folder / "log", processes=2, hooks=[hook]).wait()
    different = ["did not finish"]
    if codes == [0, 0]:
        different = differences(outcome(mine), outcome(prepared / "unbroken"))
    return {"case": name, "exit_codes": codes, "different": different, "good": not different}


# --- Flipped bits ---------------------------------------------------------------------------------


def flip_trial(sandbox: Sandbox, number: int) -> dict:
    """Flip a random bit of one process's state after a random step: the run ends, with nothing saved since."""
    random = sandbox.random("flip", number)
    part = PARTS[number % len(PARTS)]
    processes, step, bit = (
        2 + number // len(PARTS) % 2,
        random.randrange(1, 11),
        random.randrange(32),
    )
    hit = random.randrange(processes)
    folder = sandbox.new_folder("flip", number)
    settings = "CHECKPOINT.KEEP=9", "DATA.BATCH_SIZE=2", "TRAIN.GLOBAL_BATCH_SIZE=12"
    command = sandbox.arguments(folder, *settings, "SAVE_STEPS=1", "TRAIN.EPOCHS=3")
    hook = functools.partial(flip_bit, hit, part, step, bit)
    victim = launch(command, log=folder / "log", processes=processes, hooks=[hook])
    codes = victim.wait()
    saved = [checkpoint.read_metadata(p)["step"] for p in folder.glob("*/*/checkpoints/step-*")]
    accused = f"of rank {hit} are corrupt" if processes > 2 else f"on rank {hit} ("
    good = codes == [CHECKPOINT] * processes and accused in victim.output
    good = good and max(saved, default=0) < step and f"The {part} of" in victim.output
    found = {"part": part, "rank": hit, "step": step, "bit": bit, "processes": processes}
    return found | {"exit_codes": codes, "saved": sorted(saved), "good": good}


def check_agreement(sandbox: Sandbox) -> Result:
    """One process differs in what it was started with, in its data, in its checkpoints, or by one flipped bit."""
    prepared = prepare(sandbox)
    trials = {
        "refused": sandbox.map(refusal_trial, disagreements(prepared)),
        "resumed": sandbox.map(resume_trial, VIEWS),
        "flips": sandbox.map(flip_trial, range(sandbox.count(6, 120))),
    }
    count = {name: sum(t["good"] for t in found) for name, found in trials.items()}
    words = [f"{count[name]}/{len(found)} {name}" for name, found in trials.items()]
    good = all(trial["good"] for trial in itertools.chain(*trials.values()))
    return Result(", ".join(words), good, {"trials": trials})
