"""Files of weights: opened by what they hold, whatever their name says, without running code that is in them.

A pickle is read by torch's reader for weights. Of the other classes that trainers put beside weights, those that are
known to be harmless become inert data: `Inert`, a dict or a list. All others are refused by their name.
"""

import hashlib
import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from engine import checkpoint
from models.convert import ANCHORS
from models.state_dicts import Cleaned, choose, clean, find_state_dicts, strip_prefix
from utils import file_kinds
from utils.errors import CheckpointError
from utils.file_kinds import INDEX, LEGACY_TORCH, SAFETENSORS, TORCH, kind_of, printable
from utils.logging import logger
from utils.text import join_some, quantity

# --- Classes beside weights -----------------------------------------------------------------------

# Configurations, paths, dates, numbers and records of trainers. None of it is imported or called. Of these modules and
# packages the classes, whose names begin with a capital:
MODULES = (
    *("argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "random"),
    *("typing", "uuid", "zoneinfo", "yacs", "fvcore.common.config", "detectron2.config"),
    *("omegaconf", "ml_collections", "addict", "easydict", "munch", "box", "attrdict"),
    *("mmengine", "mmcv", "lightning", "lightning_fabric", "pytorch_lightning"),
    *("accelerate.utils", "transformers.training_args", "transformers.trainer_utils"),
    *("torchvision.transforms.functional", "torch.torch_version", "numpy.random"),
)
# And these.
NAMES = (
    r"argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor",
    r"builtins\.(bool|bytes|dict|float|frozenset|getattr|int|list|object|range|slice|str|tuple|type)",
    r"collections\.(defaultdict|deque)|datetime\.(datetime|date|time|timedelta|timezone)",
    r"numpy\.(_?core\.)?(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)",
    r"numpy\.(ndarray|dtype|bool_?|(u?int|float|complex)\d+|str_|bytes_|datetime64|timedelta64)",
    r"numpy\.dtypes\.\w+|numpy\.random\._pickle\.\w+_ctor|numpy\.random\.\w+\.__pyx_unpickle_\w+",
)
HARMLESS = re.compile(
    "|".join([rf"({'|'.join(map(re.escape, MODULES))})\.([\w.]+\.)?[A-Z]\w*", *NAMES])
)
# Classes of these names are dicts or lists, which pickles fill after their construction.
DICTS = re.compile(r"(\w*Dict|AttrDict|DotMap|CfgNode|Munch|Box|defaultdict)")
LISTS = re.compile(r"(deque|BoxList|UserList)")


class Inert:
    """In place of an object of a harmless class: its arguments and state are data, nothing is done with them."""

    def __init__(self, *args: object):
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


class InertDict:
    """In place of a subclass of dict: makes plain ones."""

    def __new__(cls, *args: object) -> OrderedDict:
        """The items of the arguments that are dicts; a defaultdict's factory is not."""
        return OrderedDict(next((a for a in args if isinstance(a, dict)), ()))


class InertList(list):
    """In place of a subclass of list, or a deque."""

    def __init__(self, items: object = (), *_: object):
        super().__init__(items if isinstance(items, list | tuple) else ())

    def __setstate__(self, state: object) -> None:
        self.state = state


def stand_in(name: str) -> type:
    """What is read in place of the harmless class `name`."""
    last = name.rpartition(".")[2]
    # OmegaConf's and ml_collections' keep their entries in an attribute, as any object does.
    if DICTS.fullmatch(last) and not name.startswith(("omegaconf", "ml_collections")):
        return InertDict
    return InertList if LISTS.fullmatch(last) else Inert


def class_names(path: Path) -> set[str]:
    """The full names of the classes and functions in the torch file at `path`; those before its first damage."""
    names: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
                for record in pickles:
                    # Stored as torch.save does: what is compressed could be of any size.
                    if archive.getinfo(record).compress_type == zipfile.ZIP_STORED:
                        names.update(_globals_in(io.BytesIO(archive.read(record))))
        else:
            with path.open("rb") as file:
                # Mapped, because a read of more than there is takes no memory then.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                for _ in range(4):  # magic number, version, machine, content
                    names.update(_globals_in(content))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        pass  # torch's reader has more to say about it
    return names


def _globals_in(file: BinaryIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            # Protocol 2 writes the names that Python 2 had.
            module, name = NAME_MAPPING.get((module, name), (module, name))
            yield f"{IMPORT_MAPPING.get(module, module)}.{name}"


# --- Open -----------------------------------------------------------------------------------------

# How torch's reader fails on files with missing and flipped bytes, as tried on thousands of them.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


def open_file(path: Path) -> object:
    """What the file at `path` holds: tensors by name, or the content of a pickle, with inert data in it.

    Raises CheckpointError, which says what a file without weights is and what to do about it.
    """
    try:
        kind = kind_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if kind == SAFETENSORS:
        return checkpoint.read_tensors(path)
    if kind == INDEX:
        return _read_shards(path)
    if kind not in (TORCH, LEGACY_TORCH):
        raise CheckpointError(f"{path} holds no weights: it is {kind.name}. {kind.remedy}")
    stand_ins = [(stand_in(name), name) for name in class_names(path) if HARMLESS.fullmatch(name)]
    try:
        # An open file, because torch takes a path that ends in .safetensors for what it says.
        with torch.serialization.safe_globals(stand_ins), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} was not executed: {_refusal(str(error))}") from error
    except DAMAGE as error:
        reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])
        raise CheckpointError(
            f"{path} is truncated or damaged ({reason}). {file_kinds.AGAIN}"
        ) from error


def _refusal(message: str) -> str:
    """Why a pickle was refused, in place of torch's `message`, which advises to trust it."""
    remedy = (
        "Save the state_dict() alone with the program that wrote it, or write a .safetensors file."
    )
    if named := re.search(r"GLOBAL ((?!was not|whose)\S+)", message):
        return f"it holds a {printable(named[1])}, which is code and no plain data. {remedy}"
    if "Unsupported operand" in message:
        return f"it is damaged, or of a pickle protocol above 2. {remedy}"
    return f"it holds objects that are no plain data. {remedy}"


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in file_kinds.read_index(index):
        if not file.exists():
            raise CheckpointError(f"{index} lists {file.name}, which is missing: download it too")
        content = open_file(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds no state dict")
        tensors |= content
    return tensors


# --- Weights --------------------------------------------------------------------------------------


def read_weights(path: Path, *, ema: bool = False, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint or run of ours (the best), of a file of any trainer, of a folder with one.

    With `ema` their average over the training. Of several state dicts in a file the one under `key`. What is removed
    from names is logged. Code in a file never runs. Raises CheckpointError naming the file.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: expected a file of weights, a run or a checkpoint"
        )
    if path.is_dir() and checkpoint.is_own(path):
        if key is not None:
            raise CheckpointError(
                f"{path} is a run or checkpoint, which has no --key; use --ema or none"
            )
        step = checkpoint.resolve(path, best=True)
        file = step / ("ema.safetensors" if ema else "model.safetensors")
        if not file.exists():
            raise CheckpointError(f"{step} has no EMA: its run had TRAIN.EMA_DECAY 0")
        if not ema:
            warn_if_average_is_better(step)
        return checkpoint.read_tensors(file)
    if path.is_dir():
        path = find_file(path)
    checkpoint.require_valid(path)
    tensors, removed = select(path, find_state_dicts(open_file(path)), ema=ema, key=key)
    if removed:
        logger.info(f"{path}: removed {', '.join(removed)}")
    return tensors


def warn_if_average_is_better(path: Path, remedy: str = "") -> None:
    """Warn who takes the weights of the checkpoint at `path` where its average made it the run's best.

    remedy: how to take the average; without one, how to write it to a file.
    """
    remedy = remedy or f"`tools/checkpoint.py strip {path} FILE.safetensors --ema` writes it"
    metadata = checkpoint.read_metadata(path)
    best = metadata["best"]
    if best.get("ema") and best["step"] == metadata["step"]:
        logger.warning(
            f"{path} is its run's best by the average (EMA) of its weights, {best['acc1']:.2f} % top-1. That average "
            f"is not taken: {remedy}"
        )


def hash_weights(path: Path) -> str:
    """SHA-256 of a file of weights, alone or in a folder; of weights in several files that of their hashes."""
    file = find_file(path) if path.is_dir() else path
    if not file.name.endswith(".index.json"):
        return _hash_file(file)
    hashes = [_hash_file(part) for part in (file, *file_kinds.read_index(file))]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def find_file(folder: Path) -> Path:
    """The file of weights in a `folder`, as the Hugging Face hub and people have them. Raises CheckpointError."""
    for name in HUB_FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
    weights = [f for f in files if f.suffix.lower() in file_kinds.WEIGHT_SUFFIXES]
    if len(weights) == 1:
        return weights[0]
    if weights:
        names = join_some(file.name for file in weights)
        raise CheckpointError(f"{folder} holds {len(weights)} files: name one of {names}")
    if (folder / "data.pkl").exists():
        raise CheckpointError(f"{folder} is an unpacked .pth file. {file_kinds.AGAIN}")
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is a distributed checkpoint of torch: write one file of it with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected a run (a folder with checkpoints/step-<n> in it), a checkpoint "
        "(a folder with manifest.json) or a folder with one .safetensors, .pth or .bin file"
    )


def select(
    path: Path, found: dict[str, dict[str, Tensor]], *, ema: bool = False, key: str | None = None
) -> Cleaned:
    """The state dict of the file `path` that is meant among those `found` in it, with clean names."""
    keys = choose(found, ema=ema) if key is None else [k for k in found if k == key]
    listed = join_some(f"{printable(k)} ({quantity(len(v), 'tensor')})" for k, v in found.items())
    if not keys:
        wanted = "average of weights" if ema else "such weights"
        held = f"it holds {listed.lstrip()}" if found else "expected a state dict: tensors by name"
        raise CheckpointError(f"{path} holds no {wanted}{f' under {key!r}' * bool(key)}: {held}")
    if len(keys) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts: {listed}. Write the one that you mean to a file with "
            f"`tools/checkpoint.py strip {path.name} OUT.safetensors --key {keys[0]}`."
        )
    cleaned = clean(found[keys[0]])
    stripped = strip_prefix(cleaned.tensors, ANCHORS)
    others = [f"the state dict {k!r} beside {keys[0]!r}" for k in found if k != keys[0]]
    return Cleaned(stripped.tensors, [*others, *cleaned.removed, *stripped.removed])
