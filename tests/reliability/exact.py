"""Checks 15 to 19: equal bits whatever the workers, processes and features; equal counts; the recorded values.

After an intended change of numbers, in the folder tests: PYTHONPATH=.. python -m reliability.exact writes bits.json.
"""

import hashlib
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from helpers.images import write_image_folder
from helpers.pipeline import train_transform

from engine import compat
from reliability.harness import (
    STOPPED,
    Result,
    Sandbox,
    close_workers,
    differences,
    expect,
    finish,
    launch,
    outcome,
    read_records,
    run_in_fork,
    run_of,
    stop_at,
)
from utils.rng import key, permutation, reseed

RECORDED = Path(__file__).with_name("bits.json")


def stop_and_resume(
    sandbox: Sandbox,
    folder: Path,
    step: int,
    *settings: str,
    processes: int = 1,
    model: str = "dat",
) -> dict:
    """The outcome of a run that is asked to stop after `step` steps and then started again."""
    log, hook = folder / "log", stop_at(step)
    command = sandbox.arguments(folder, *settings, model=model)
    expect(launch(command, log=log, processes=processes, hooks=[hook]), STOPPED)
    finish(*command, log=log, processes=processes)
    return outcome(folder)


def summarize(trials: list[dict], what: str) -> Result:
    """An outcome of trials that are good if nothing is different."""
    equal = sum(not trial["different"] for trial in trials)
    return Result(f"{equal}/{len(trials)} {what} equal", equal == len(trials), {"trials": trials})


# --- 15: workers, processes, positions ------------------------------------------------------------

SIX_MICRO_BATCHES = ("DATA.BATCH_SIZE=2", "TRAIN.GLOBAL_BATCH_SIZE=12")  # four steps an epoch
POSITIONS = {"the start": 4, "the middle": 6, "the last step": 7}  # of the second epoch


def run_reference(sandbox: Sandbox, processes: int) -> None:
    """The run of six micro-batches without a stop, all images read by the process itself."""
    folder = sandbox.new_folder("grid", processes)
    finish(*sandbox.arguments(folder, *SIX_MICRO_BATCHES), log=folder / "log", processes=processes)


def grid_trial(sandbox: Sandbox, place: tuple[int, int, str]) -> dict:
    """Stop and resume at one position of the epoch with one number of loader workers and of processes."""
    workers, processes, position = place
    folder = sandbox.new_folder("grid", "-".join(map(str, place)))
    settings = *SIX_MICRO_BATCHES, f"DATA.NUM_WORKERS={workers}"
    found = stop_and_resume(sandbox, folder, POSITIONS[position], *settings, processes=processes)
    different = differences(found, outcome(sandbox.folder / "grid" / str(processes)))
    return {"workers": workers, "processes": processes, "at": position, "different": different}


def check_resume_grid(sandbox: Sandbox) -> Result:
    """Loader workers (persistent, as they always are) × processes × position in the epoch where the run resumed."""
    places = list(itertools.product((0, 1, 2, 4), (1, 2, 3), POSITIONS))
    if sandbox.short:  # every value of each, eight times of the 36
        places = places[::5]
    sandbox.map(run_reference, (3, 2, 1))
    return summarize(sandbox.map(grid_trial, places), "cells (CPU)")


# --- 16: other numbers of processes ---------------------------------------------------------------


def processes_trial(sandbox: Sandbox, sizes: tuple[int, ...]) -> dict:
    """Run in parts on so many processes each, two steps to a part but the last; TRAIN.EXACT_WORLD_SIZE throughout."""
    folder = sandbox.new_folder("moved", "-".join(map(str, sizes)))
    settings = "DATA.BATCH_SIZE=2", "TRAIN.GLOBAL_BATCH_SIZE=16", "TRAIN.EXACT_WORLD_SIZE=True"
    command = sandbox.arguments(folder, *settings)
    for part, processes in enumerate(sizes[:-1], start=1):
        hook = stop_at(2 * part)
        victim = launch(command, log=folder / "log", processes=processes, hooks=[hook])
        expect(victim, STOPPED)
    finish(*command, log=folder / "log", processes=sizes[-1])
    return {"processes": " → ".join(map(str, sizes)), "outcome": outcome(folder)}


def check_numbers_of_processes(sandbox: Sandbox) -> Result:
    """TRAIN.EXACT_WORLD_SIZE on 1, 2, 4 (and 8) processes and moved between them: one outcome."""
    ways = [(1,), (2,), (4,), (4, 1, 2)] + ([] if sandbox.short else [(8,), (1, 8), (4, 1, 2, 8)])
    trials = sandbox.map(processes_trial, ways)
    first = trials[0]["outcome"]
    trials = [
        {"processes": t["processes"], "different": differences(t["outcome"], first)} for t in trials
    ]
    return summarize(trials, "ways")


# --- 17: features ---------------------------------------------------------------------------------

ONE_EPOCH = ("TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0")
FEATURES = {
    "everything, DAT": ("dat", ()),
    "no Mixup": ("dat", ("AUG.MIXUP=0",)),
    "no CutMix": ("dat", ("AUG.CUTMIX=0",)),
    "no mixing": ("dat", ("AUG.MIXUP=0", "AUG.CUTMIX=0")),
    "no RandAugment": ("dat", ("AUG.AUTO_AUGMENT=",)),
    "no erasing": ("dat", ("AUG.REPROB=0",)),
    "no drop path": ("dat", ("MODEL.DROP_PATH_RATE=0",)),
    "no EMA": ("dat", ("TRAIN.EMA_DECAY=0",)),
    "float32": ("dat", ("AMP_DTYPE=float32",)),
    "float16, loss scaling": ("dat", ("AMP_DTYPE=float16",)),
    "no accumulation": ("dat", ("TRAIN.GLOBAL_BATCH_SIZE=4",)),
    "no clipping": ("dat", ("TRAIN.CLIP_GRAD=0",)),
    "recomputed activations": ("dat", ("MODEL.GRAD_CHECKPOINTING=True",)),
    "Swin": ("swin", ()),
    "batch norm, ResNet": ("batch_norm", ()),
}


def feature_trial(sandbox: Sandbox, name: str) -> dict:
    """A run with one feature off, or another model: stopped at a random step and resumed, against unbroken."""
    model, settings = FEATURES[name]
    step = sandbox.random("feature", name).randrange(1, 6)
    number = list(FEATURES).index(name)
    unbroken = sandbox.new_folder("features", number, "unbroken")
    command = sandbox.arguments(unbroken, *ONE_EPOCH, *settings, model=model)
    finish(*command, log=unbroken / "log")
    folder = sandbox.new_folder("features", number, "resumed")
    found = stop_and_resume(sandbox, folder, step, *ONE_EPOCH, *settings, model=model)
    return {"feature": name, "at": step, "different": differences(found, outcome(unbroken))}


def check_features(sandbox: Sandbox) -> Result:
    """Every feature on, each of them off, other models: stopped and resumed against unbroken."""
    return summarize(sandbox.map(feature_trial, FEATURES), "settings")


# --- 18: evaluation -------------------------------------------------------------------------------

SIZES = (1, 7, 257)  # validation images
BATCHES = (1, 7, 64)


def write_validation(sandbox: Sandbox, number: int) -> Path:
    """A data set with exactly `number` validation images, of as many of the four classes as they fill."""
    root = sandbox.new_folder("evaluation", f"images-{number}")
    write_image_folder(root, train=1, val=-(-number // 4))
    files = sorted((root / "val").rglob("*.jpg"), key=lambda file: (file.name, file.parent.name))
    for file in files[number:]:
        file.unlink()
    for folder in (root / "val").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    return root


def evaluation_trial(sandbox: Sandbox, processes: int) -> dict:
    """Counts by (images, batch) of a group of so many processes, which evaluates them all one after the other."""
    log = sandbox.folder / "evaluation" / f"log-{processes}"
    cases = list(itertools.product(SIZES, BATCHES))
    commands = []
    for number, batch in cases:
        images = sandbox.folder / "evaluation" / f"images-{number}"
        settings = f"TEST.BATCH_SIZE={batch}", "DATA.VAL_SUBSET=True", "AMP_DTYPE=float32"
        run = run_of(sandbox.folder / "evaluation" / "run")
        command = sandbox.arguments(sandbox.folder / "evaluation" / "run", *settings, images=images)
        commands.append([*command, "--eval", "--resume", str(run)])
    victim = launch(*commands, log=log, processes=processes)
    expect(victim, 0)
    found = [
        json.loads(line) for line in victim.output.splitlines() if line.startswith('{"weights')
    ]
    names = ("images", "top1", "top5")
    counts = [{kind: [r[kind][n] for n in names] for kind in ("model", "ema")} for r in found]
    keys = [f"{number} images, batch {batch}" for number, batch in cases]
    return dict(zip(keys, counts, strict=True))


def check_evaluation(sandbox: Sandbox) -> Result:
    """Every image counted once, whatever the processes and the batch."""
    folder = sandbox.new_folder("evaluation", "run")
    finish(*sandbox.arguments(folder, *ONE_EPOCH), log=folder / "log")
    for number in SIZES:
        write_validation(sandbox, number)
    groups = range(8, 0, -1)
    found = dict(zip(groups, sandbox.map(evaluation_trial, groups), strict=True))
    wrong = []
    for number, batch in itertools.product(SIZES, BATCHES):
        expected = found[1][f"{number} images, batch 1"]
        assert expected["model"][0] == expected["ema"][0] == number
        name = f"{number} images, batch {batch}"
        wrong += [
            f"{name}, {group} processes" for group in groups if found[group][name] != expected
        ]
    cells = len(groups) * len(SIZES) * len(BATCHES)
    details = {"counts (images, top-1, top-5)": found[1], "wrong": wrong}
    return Result(f"{cells - len(wrong)}/{cells} equal", not wrong, details)


# --- 19: recorded values --------------------------------------------------------------------------


def train_losses(sandbox: Sandbox, model: str) -> list[float]:
    """The training losses of 50 steps."""
    folder = sandbox.new_folder("losses", model)
    settings = "TRAIN.EPOCHS=9", "EVAL_FREQ=9", "SAVE_STEPS=0", "SAVE_FREQ=9"
    command = sandbox.arguments(folder, *settings, "AMP_DTYPE=float32", model=model)
    victim = launch(command, log=folder / "log", hooks=[stop_at(50)])
    expect(victim, STOPPED)
    return [record["train/loss"] for record in read_records(run_of(folder) / "metrics.jsonl")]


def hash_order() -> str:
    """SHA-256 of the order of 1,000 images in epochs 0 to 2."""
    orders = [permutation(1000, key(0, "order", epoch)) for epoch in range(3)]
    return hashlib.sha256(np.stack(orders).astype("<i8").tobytes()).hexdigest()


def hash_augmented() -> str:
    """SHA-256 of 16 augmented images of a drawn picture, which no decoder has touched."""
    transform = train_transform(32)
    picture = torch.arange(48 * 64 * 3).remainder(251).to(torch.uint8).view(48, 64, 3)
    digest = hashlib.sha256()
    for index in range(16):
        reseed(key(0, "sample", 0, index))
        digest.update(transform(picture).numpy().tobytes())
    return digest.hexdigest()


def current_values(sandbox: Sandbox) -> dict:
    """What bits.json holds, computed by this code on this machine."""
    names = ("dat", "swin", "batch_norm")
    return {
        "environment": {
            "device": compat.device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "order": hash_order(),
        "augmented": run_in_fork(hash_augmented),
        "losses": dict(zip(names, sandbox.map(train_losses, names), strict=True)),
    }


def check_recorded_values(sandbox: Sandbox) -> Result:
    """Losses, order and augmentation against bits.json."""
    found, expected = current_values(sandbox), json.loads(RECORDED.read_text())
    wrong = [name for name in ("order", "augmented") if found[name] != expected[name]]
    same = found["environment"] == expected["environment"]
    distance = 0.0
    for name, values in found["losses"].items():
        ratio = np.array(values) / np.array(expected["losses"][name])
        distance = max(distance, float(np.abs(ratio - 1).max()))
    if distance > (0 if same else 1e-3):
        wrong.append("losses")
    where = "equal bits" if same else "another processor or library: within 1e-3"
    measured = f"{', '.join(wrong)} differ" if wrong else where
    details = {"wrong": wrong, "largest relative distance": distance, "found": found}
    return Result(measured, not wrong, details)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        current = current_values(Sandbox.create(Path(scratch), seed=0, short=True))
        close_workers()
    RECORDED.write_text(json.dumps(current, indent=1) + "\n")
    print(f"{RECORDED} holds what this code computes now")
