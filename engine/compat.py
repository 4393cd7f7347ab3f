"""Resume compatibility: what differs between a checkpoint's metadata and this run's, and whether that was accepted.

The metadata of the checkpoint (state.json) are compared with those of the run that resumes, name by name; keys of the
configuration go by their own names. In a run of several processes the main one compares; the others agree with it
(engine/agreement.py).
"""

import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torchvision

from analysis.runs import flatten
from engine import checkpoint
from engine.state import NO_BEST, TrainState
from utils import first_edition
from utils.distributed import Process
from utils.errors import CheckpointError, ConfigError, DataError
from utils.logging import logger
from utils.text import compare_names
from utils.version import __version__

# A position counts steps of one model on one class list: with others it would mean something else.
REQUIRED = {
    "model": "set MODEL.NAME to it",
    "classes": "point --data-path to the data it was trained on",
    "steps_per_epoch": "restore the training images and TRAIN.GLOBAL_BATCH_SIZE",
}

# What may change the shapes of weights.
SHAPES = {"MODEL.ARGS", "DATA.IMG_SIZE", "DATA.IN_CHANS"}

# What changes no weight and no accuracy: paths, frequencies of printing, and settings whose effect another name shows.
# Everything else has to be accepted, new keys too.
IGNORED = {
    *("images.train", "images.val"),  # as the fingerprints do
    *("format", "revision", "versions.project", "versions.python", "reproducibility", "world_size"),
    *("OUTPUT", "TAG", "PRINT_FREQ", "EVAL_FREQ", "SAVE_FREQ", "SAVE_STEPS", "THREADS", "DEVICE"),
    *("DATA.PATH", "DATA.CACHE_DIR", "DATA.CACHE_SIZE", "DATA.CLASS_LIST", "DATA.VAL_SUBSET"),
    *("DATA.NUM_WORKERS", "DATA.VERIFY", "DATA.MAX_BAD_SAMPLES"),
    *(
        "MODEL.NUM_CLASSES",
        "DISTILL.TEACHER_PATH",
        "TRAIN.MAX_SECONDS",
        "TRAIN.HANG_SECONDS",
        "TRAIN.MAX_SKIPPED",
        "TRAIN.REPORT",
    ),
    *("CHECKPOINT.RESUME", "CHECKPOINT.AUTO_RESUME", "CHECKPOINT.PRETRAINED"),
    *("CHECKPOINT.ACCEPT", "CHECKPOINT.KEEP"),
    *("TEST.SETS", "TEST.ONLY", "TEST.SIZES", "TEST.OUT", "TEST.SAVE_LOGITS"),
}


SOURCES = "sources-"  # begins what stands for a revision without git
PACKAGES = ("analysis", "data", "engine", "models", "utils")  # of the code of a run

# What changes the pixels of an evaluation, and what changes the logits, beside the weights.
PIXELS = (
    *("DATA.MEAN", "DATA.STD", "DATA.IMG_SIZE", "DATA.IN_CHANS", "DATA.INTERPOLATION", "DATA.EXIF"),
    *("TEST.CROP_MODE", "TEST.CROP_PCT", "TEST.EXACT", "val_data", "decoder.pixels"),
)
EVALUATED = (*PIXELS, "MODEL.ARGS", "MODEL.COMPILE", "AMP_DTYPE")


# --- Resume ---------------------------------------------------------------------------------------


def check_resume(path: Path, metadata: dict, accept: str) -> None:
    """Compare the checkpoint at `path` with this run's `metadata`; log what differs, refuse what was not accepted.

    accept: names of what was changed on purpose, separated by commas.

    Raises CheckpointError, DataError if the images differ, and ConfigError for a name in `accept` that does not exist.
    """
    saved = checkpoint.read_metadata(path)
    for name, remedy in REQUIRED.items():
        if saved[name] != metadata[name]:
            before, now = saved[name], metadata[name]
            if name == "classes":
                difference = f"its classes differ from this run's; it {compare_names(before, now)}"
            else:
                difference = f"its {name} is {before}, this run's is {now}"
            raise CheckpointError(
                f"{path} cannot be resumed: {difference}. Either {remedy}, or start a new run from its weights: "
                f"--pretrained {path} --tag NAME."
            )
    before, now = first_edition.LATER_KEYS | _by_name(saved), _by_name(metadata)
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    accepted = set(filter(None, accept.split(",")))
    harmless = {name for name in changed if _same_kind(name, before, now)}
    refused = [name for name in changed if name not in IGNORED | accepted | harmless]
    if unknown := sorted(accepted - now.keys()):
        renamed = [
            f"{n} is {first_edition.KEYS[n]} now" for n in unknown if n in first_edition.KEYS
        ]
        raise ConfigError(
            f"--accept {','.join(unknown)}: a checkpoint has no such name{''.join(f'; {r}' for r in renamed)}; "
            f"expected names that differ here: {', '.join(refused) or 'none does'}"
        )
    for name in (n for n in changed if n not in refused and n != "CHECKPOINT.ACCEPT"):
        logger.warning(f"Changed since the checkpoint: {_describe_change(name, before, now)}")
    if refused:
        kind = DataError if {"data", "val_data"}.intersection(refused) else CheckpointError
        changes = "\n  ".join(_describe_change(name, before, now) for name in refused)
        remedy = f"Undo the change, or if it is intended add --accept {','.join(refused)}"
        if SHAPES.intersection(refused):
            remedy += f". If the weights do not fit then, start a new run from them: --pretrained {path} --tag NAME"
        raise kind(
            f"{path} was written with different settings; resuming would change the result:\n  {changes}\n"
            f"{remedy}"
        )


def restore(path: Path, state: TrainState, metadata: dict) -> None:
    """Restore the checkpoint at `path`; its best accuracy counts only if the run's validation is still the same."""
    checkpoint.restore(path, state)
    saved = checkpoint.read_metadata(path)
    if changes := list_evaluation_changes(saved, metadata, PIXELS):
        best = f"{state.best['acc1']:.2f}% was of another validation ({'; '.join(changes)})"
        logger.warning(f"The best accuracy so far counts no more: {best}")
        state.best = dict(NO_BEST)


def list_evaluation_changes(saved: dict, now: dict, names: Iterable[str] = EVALUATED) -> list[str]:
    """Which of `names` an evaluation has otherwise than the run that wrote the metadata `saved`: "… was …, is …".

    now: "config", "decoder" and, where val is evaluated, "val_data", as metadata have them.
    """
    before, after = _by_name(saved), _by_name(now)
    both = [name for name in names if name in before and name in after]
    return [_describe_change(name, before, after) for name in both if before[name] != after[name]]


def _same_kind(name: str, before: dict, now: dict) -> bool:
    """Whether a changed device or version is of the same kind, and the run guarantees no bits: it is on CUDA.

    GPUs of one model with more memory or in another form, A100-SXM4-40GB and A100 80GB PCIe, and releases of torch that
    differ in the last number.
    """
    if {before.get("reproducibility"), now.get("reproducibility")} != {"same samples"}:
        return False
    if name == "device":
        models = [
            re.findall(r"\b(?:[A-Z]{1,3}\d{1,5}|\d{3,5})\w?\b", str(x[name]))[:1]
            for x in (before, now)
        ]
        return models[0] == models[1] != []
    if name in ("versions.torch", "versions.torchvision"):
        releases = [re.match(r"\d+\.\d+", str(x[name])) for x in (before, now)]
        return None not in releases and releases[0][0] == releases[1][0]
    return False


def _by_name(metadata: dict) -> dict[str, object]:
    rest = {name: value for name, value in metadata.items() if name != "config"}
    return flatten(rest) | flatten(metadata["config"])


def _describe_change(name: str, before: dict, now: dict) -> str:
    return f"{name} was {_shorten(before[name])}, is {_shorten(now[name])}"


def _shorten(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    text = str(value) or "''"
    return text if len(text) <= 60 else f"{text[:57]}…"


def list_hparams(config: dict) -> dict[str, bool | int | float | str]:
    """The settings of the nested `config` that change the result, by name, for TensorBoard's table."""
    kept = {name: value for name, value in flatten(config).items() if name not in IGNORED}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in kept.items()
    }


# --- What is compared -----------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The processor or GPU, in words that are equal where its bits are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    kind = names[0] if names else platform.machine()
    return f"{kind}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products; without them they take longer than float32's."""
    cpu_info = Path("/proc/cpuinfo")
    words = set(cpu_info.read_text(encoding="utf-8").split()) if cpu_info.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def revision() -> str:
    """The commit of this code, marked "-dirty" if files were changed; outside a repository the hash of its sources."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"{SOURCES}{hash_sources()}"


def hash_sources() -> str:
    """A hash of the Python files that a run is made of, the same for the same files in any folder."""
    root = Path(__file__).parents[1]
    files = [
        *root.glob("*.py"),
        *(file for name in PACKAGES for file in root.glob(f"{name}/**/*.py")),
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def describe_environment(process: Process) -> dict[str, object]:
    """Code, versions and hardware, for checkpoints and evaluations."""
    return {
        "world_size": process.world_size,
        "versions": {
            "project": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "revision": revision(),
        "device": device_name(process.device),
        # What a GPU computes does not depend on the threads beside it.
        "threads": torch.get_num_threads() if process.device.type == "cpu" else None,
    }


# --- Reproducibility ------------------------------------------------------------------------------

EXPLANATIONS = {
    "bitwise": "repeated, killed and resumed at any step, or with another number of workers, this run ends in the same "
    "bits; another number of processes sees the same samples, augmented and mixed the same way",
    "bitwise on any number of processes": "repeated, killed and resumed at any step, with another number of workers or "
    "on 1, 2, 4 … processes, this run ends in the same bits",
    "same samples": "repeated, resumed or on another number of processes, this run sees the same samples, augmented "
    "and mixed the same way; the bits differ, because some of CUDA's kernels add in no fixed order "
    "(TRAIN.DETERMINISTIC True avoids them)",
}


def reproducibility(device: torch.device, *, exact_world_size: bool, deterministic: bool) -> str:
    """What a run on `device` repeats, a key of `EXPLANATIONS`.

    Nothing is guaranteed for another processor, number of threads or version of torch.
    """
    if device.type == "cuda":
        return "bitwise" if deterministic else "same samples"
    return "bitwise on any number of processes" if exact_world_size else "bitwise"


def explain_reproducibility(metadata: dict) -> str:
    """A run's reproducibility, in a sentence for its log."""
    return f"{metadata['reproducibility']}: {EXPLANATIONS[metadata['reproducibility']]}"
