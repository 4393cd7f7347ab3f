"""Is this the world that a checkpoint was made in, and where it is not, was that accepted?

The metadata that a checkpoint keeps (state.json) are compared with those of the run that goes on from it, name by name;
the keys of the configuration go by their own names. A run of several processes compares on each of them.
"""

import platform
import subprocess
from pathlib import Path

import torch

from engine import checkpoint
from utils.errors import CheckpointError, ConfigError, DataError
from utils.logging import logger

# A position counts steps of one model on one class list: with others it would mean something else.
POSITION = {
    "model": "set MODEL.NAME to it",
    "classes": "point --data-path to the data it was trained on",
    "steps_per_epoch": "restore the training images and TRAIN.GLOBAL_BATCH_SIZE",
}

# What changes no weight and no value: where things lie, how often they are told, and settings of which another fact
# says what came of them. Any name that does not stand here has to be accepted, a new key too.
HARMLESS = {
    *("revision", "versions.python", "promise", "processes"),
    *("OUTPUT", "TAG", "PRINT_FREQ", "THREADS", "DEVICE"),
    *("DATA.PATH", "DATA.CLASS_LIST", "DATA.VAL_SUBSET"),
    *("DATA.NUM_WORKERS", "DATA.VERIFY", "DATA.MAX_BAD_SAMPLES"),
    *("MODEL.NUM_CLASSES", "TRAIN.MAX_SECONDS", "EVAL_FREQ"),
    *("TRAIN.HANG_SECONDS", "TRAIN.MAX_SKIPPED"),
    *("CHECKPOINT.RESUME", "CHECKPOINT.AUTO_RESUME", "CHECKPOINT.PRETRAINED", "CHECKPOINT.ACCEPT"),
    *("SAVE_FREQ", "SAVE_STEPS", "CHECKPOINT.KEEP"),
}


def check(path: Path, metadata: dict, accept: str) -> None:
    """Compare the checkpoint at `path` with this run's `metadata`; log what differs, refuse what was not accepted.

    accept: the names of what changed on purpose, separated by commas.

    Raises CheckpointError, DataError where the images are others, and ConfigError for a name in `accept` that is none.
    """
    saved = checkpoint.read_metadata(path)
    for name, remedy in POSITION.items():
        if saved[name] != metadata[name]:
            raise CheckpointError(
                f"{path} cannot be resumed: its {name} is {_short(saved[name])} and here it is {_short(metadata[name])}. "
                f"Either {remedy}, or start a new run from its weights: --pretrained {path} --tag NAME."
            )
    before, now = _by_name(saved), _by_name(metadata)
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    accepted = set(filter(None, accept.split(",")))
    refused = [name for name in changed if name not in HARMLESS | accepted]
    if unknown := accepted - now.keys():
        raise ConfigError(
            f"--accept {','.join(sorted(unknown))}: a checkpoint has no such name; expected some of those that "
            f"differ here, {', '.join(refused) or 'which are none'}"
        )
    for name in (name for name in changed if name not in refused):
        logger.warning(f"Changed since the checkpoint: {_change(name, before, now)}")
    if refused:
        kind = DataError if {"data", "val_data"}.intersection(refused) else CheckpointError
        changes = "\n  ".join(_change(name, before, now) for name in refused)
        raise kind(
            f"{path} is from another world. Resumed here, the run would not end in the bits of one that was never "
            f"stopped:\n  {changes}\nUndo this, or if it is meant, add --accept {','.join(refused)}"
        )


def device_name(device: torch.device) -> str:
    """The hardware that computes, in words that are equal where its bits are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    kind = names[0] if names else platform.machine()
    return f"{kind}, {torch.backends.cpu.get_cpu_capability()}"


def revision() -> str:
    """The commit of this code, marked where files differ from it; "unknown" outside of a repository."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _by_name(metadata: dict) -> dict[str, object]:
    return _flat({name: value for name, value in metadata.items() if name != "config"}) | _flat(
        metadata["config"]
    )


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested values by dotted names; MODEL.ARGS is one value, because an argument may come and go."""
    flat = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and full != "MODEL.ARGS":
            flat |= _flat(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def _change(name: str, before: dict, now: dict) -> str:
    return f"{name} was {_short(before[name])}, is {_short(now[name])}"


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    text = str(value) or "''"
    return text if len(text) <= 60 else f"{text[:57]}…"


# --- Reproducibility ---
TEXTS = {
    "L2 without bits": "repeated, resumed or on another number of processes, this run sees the same samples, augmented "
    "and mixed the same way; its bits differ, because CUDA's kernels add in any order",
    "L2": "repeated, killed and resumed at any step or with other loader workers, this run ends in the same bits; "
    "another number of processes sees the same samples, augmented and mixed the same way",
    "L3": "repeated, killed and resumed at any step, with other loader workers or on 1, 2, 4 … processes, this "
    "run ends in the same bits",
}


def level(device: torch.device, *, exact_world_size: bool) -> str:
    """The level of a run on `device`, a key of `TEXTS`."""
    if device.type == "cuda":
        return "L2 without bits"
    return "L3" if exact_world_size else "L2"
