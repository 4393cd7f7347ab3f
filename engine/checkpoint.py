"""Checkpoints: written atomically in the background, found again, verified, restored.

A checkpoint is a directory `step-<n>` of safetensors and JSON files with a manifest of their sizes and SHA-256. It is
written under another name, synced and renamed: a directory of that name is complete, or its manifest shows the damage.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from engine.optim import OPTIMIZERS, STATE
from engine.state import TrainState
from utils import first_edition
from utils.errors import CheckpointError, StopRequested, StorageError
from utils.files import read_again, remove, storage_remedy, sync
from utils.logging import logger
from utils.text import join_some

MANIFEST = "manifest.json"
REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json"}
FILES = REQUIRED | {"ema.safetensors"}
# "replaced": an older one of the same step, until the newer is on the disk.
CHECKPOINT_NAME = re.compile(r"step-(\d+)(-replaced-\d+)?")
MAX_FAILURES = 3  # saves in a row that may fail before the run ends


# --- Write ----------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints into `folder` while training continues; keeps the latest `keep` and the best.

    A save that fails is logged, and the next one makes up for it; `failures` counts those in a row. A context manager,
    which ends when the last checkpoint is on the disk. Raises StorageError when MAX_FAILURES is reached, or
    when a run that ends or was asked to stop could not be saved.

    sync_records: called before a checkpoint is written, to bring the records of its steps to the disk.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self.failures = 0
        self.sync_records: Callable[[], None] = lambda: None
        self._error: StorageError | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        self.wait()
        if self.failures and kind in (None, StopRequested):
            raise self._error

    def save(self, state: TrainState, metadata: dict) -> None:
        """Copy `state` and `metadata` now; they are written while training continues."""
        self.wait()
        start = time.perf_counter()
        files = snapshot(state, metadata)
        copied = time.perf_counter() - start
        self._writing = self._thread.submit(
            self._write, f"step-{state.step}", files, f"step-{state.best['step']}", copied
        )
        if self.failures == MAX_FAILURES - 1:
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on the disk, or has failed to get there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
        if self.failures == MAX_FAILURES:
            raise self._error

    def _write(self, name: str, files: dict[str, bytes], best: str, copied: float) -> None:
        start = time.perf_counter()
        try:
            self.sync_records()
            path = write(self.folder, name, files)
        except StorageError as error:
            self.failures, self._error = self.failures + 1, error
            logger.warning(f"{error} Failed saves in a row: {self.failures} of {MAX_FAILURES}.")
            return
        self.failures = 0
        prune(path, self.keep, best)
        written = time.perf_counter() - start
        logger.info(f"{path} saved: copied in {copied:.2f} s, written in {written:.2f} s meanwhile")


def snapshot(state: TrainState, metadata: dict) -> dict[str, bytes]:
    """The files of a checkpoint of `state`, by name; `metadata` join the counters in state.json."""
    files = {
        "model.safetensors": _serialize(state.model.state_dict()),
        "optimizer.safetensors": _serialize(state.optimizer_tensors()),
        "state.json": json.dumps({**state.counters(), **metadata}, indent=1).encode(),
    }
    if state.ema is not None:
        files["ema.safetensors"] = _serialize(state.ema.module.state_dict())
    return files


def write(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Write `files` and their manifest as the checkpoint `folder`/`name`, completely or not at all.

    Raises StorageError, leaving the older checkpoints as they are.
    """
    target, temporary = folder / name, _temporary_name(folder, name)
    manifest = {
        file: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in files.items()
    }
    files = files | {MANIFEST: json.dumps(manifest, indent=1).encode()}
    try:
        temporary.mkdir(parents=True)
        for file_name, content in files.items():
            with (temporary / file_name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync(temporary)
        if os.path.lexists(target):  # damaged and skipped, or from before its epoch was validated
            os.rename(target, folder / f"{name}-replaced-{time.time_ns()}")
        os.rename(temporary, target)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"{target}: the checkpoint could not be written ({error.strerror or error}); the older ones are untouched. "
            f"{storage_remedy(error)} Then start the same command again: it resumes from the latest."
        ) from error
    return target


def prune(written: Path, keep: int, best: str) -> None:
    """Delete the checkpoints beside `written` that are older than the latest `keep` valid ones and not named `best`.

    Later steps than `written`'s are not counted and stay: this run resumed from before them.
    """
    kept = 0
    try:
        remove_partial(written.parent)
        found = list_checkpoints(written.parent)
    except (OSError, StorageError) as error:
        logger.warning(f"{written.parent}: what is not kept cannot be deleted ({error})")
        return
    for path in found:
        replaced = CHECKPOINT_NAME.fullmatch(path.name)[2]
        if _step_of(path) > _step_of(written):
            continue
        if (kept >= keep and path.name != best) or (kept and replaced):
            delete(path)
        else:
            with contextlib.suppress(OSError):  # what cannot be read does not count
                kept += _verify_known(path, _signature(path)) is None


def delete(path: Path) -> None:
    """Delete the checkpoint at `path`, of which no reader finds a part; a failure is reported."""
    try:
        hidden = _temporary_name(path.parent, path.name)
        os.rename(path, hidden)
        remove(hidden)
    except OSError as error:
        logger.warning(f"{path}: what is not kept cannot be deleted ({error.strerror or error})")


def remove_partial(folder: Path) -> None:
    """Delete what a kill left half-written in `folder`; what cannot be deleted is reported."""
    for path in folder.glob(".tmp-*"):
        try:
            remove(path)
        except OSError as error:
            logger.warning(f"{path}: a leftover cannot be deleted ({error.strerror or error})")


def _temporary_name(folder: Path, name: str) -> Path:
    """A free name that readers ignore for what will be, or was, the checkpoint `name`."""
    path = folder / f".tmp-{name}"
    with contextlib.suppress(OSError):
        remove(path)
    return path.with_name(f"{path.name}-{time.time_ns()}") if os.path.lexists(path) else path


def _signature(path: Path) -> tuple:
    """What changes when a file of the checkpoint at `path` is written: names, sizes, times. Raises OSError."""
    found = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


@functools.lru_cache(maxsize=1024)
def _verify_known(path: Path, signature: tuple) -> str | None:
    """`verify(path)`, read once as long as `signature` is the same: a save would read all that are kept."""
    return verify(path)


def _serialize(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )


# --- Find -----------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, latest first, valid or not."""
    try:
        found = [
            path
            for path in read_again(lambda: list(folder.iterdir()))
            if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{folder} cannot be listed: {error.strerror}") from error
    return sorted(found, key=lambda path: (-_step_of(path), path.name))


def _step_of(path: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(path.name)[1])


def verify(path: Path, files: Container[str] = FILES) -> str | None:
    """What is wrong with the checkpoint at `path`, None if it is valid: each file's size and SHA-256 are compared.

    files: the names of those that are compared.
    """
    try:
        return read_again(functools.partial(_find_damage, path, files))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def require_valid(file: Path) -> None:
    """Raise CheckpointError where `file` is one of a checkpoint and not what the manifest beside it says."""
    if file.name not in FILES or not (file.parent / MANIFEST).exists():
        return
    if is_checkpoint(file.parent) and (damage := verify(file.parent, {file.name})):
        raise CheckpointError(f"{file.parent}: {damage}. Take another checkpoint of its run.")


def _find_damage(path: Path, files: Container[str]) -> str | None:
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if not REQUIRED <= manifest.keys() <= FILES:
            return f"{MANIFEST} is damaged: it does not list the files of a checkpoint"
        for name, expected in manifest.items():
            if name not in files:
                continue
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected["bytes"]:
                    return f"{name} has {size} bytes instead of {expected['bytes']}"
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"the SHA-256 of {name} is not the one in {MANIFEST}"
    except OSError as error:
        error.filename = name
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def latest(folder: Path) -> Path | None:
    """The latest valid checkpoint in `folder`; damaged ones are reported and skipped. None if there is none at all.

    Raises CheckpointError where every checkpoint is damaged: starting afresh would be a silent loss.
    """
    candidates = list_checkpoints(folder)
    for path in candidates:
        damage = verify(path)
        if damage is None:
            return path
        logger.warning(f"{path} is damaged and skipped: {damage}")
    if candidates:
        raise CheckpointError(
            f"{folder}: none of its {len(candidates)} checkpoints is valid. "
            "Restore one from a copy, or choose another --tag to start afresh."
        )
    return None


def is_own(path: Path) -> bool:
    """Whether the folder `path` is a run or a checkpoint of ours, under whatever name: its manifest decides."""
    return (path / "checkpoints").is_dir() or is_checkpoint(path)


def is_checkpoint(path: Path) -> bool:
    """Whether the folder `path` is a checkpoint, under whatever name; step-<n> is one without its manifest, too."""
    if CHECKPOINT_NAME.fullmatch(path.name):
        return path.is_dir()
    try:
        return b'"state.json"' in (path / MANIFEST).read_bytes()
    except OSError:
        return False


def resolve(path: Path, *, best: bool = False) -> Path:
    """The checkpoint that `path` means: a checkpoint itself, or the newest (or the best) of a run's folder.

    Raises CheckpointError if there is none or if it is damaged.
    """
    if (path / "checkpoints").is_dir():
        found = latest(path / "checkpoints")
        if best and found is not None:
            step = read_metadata(found)["best"]["step"]
            at_best = found.parent / f"step-{step}"
            if step and not at_best.exists():
                logger.warning(
                    f"The best checkpoint, of step {step}, is not in {found.parent}: using {found.name}"
                )
            elif (damage := verify(at_best)) is None:
                found = at_best
            elif step:
                logger.warning(f"{at_best}, the best, is damaged ({damage}): using {found.name}")
    else:
        found = path if is_checkpoint(path) else None
        if found and (damage := verify(found)):
            raise CheckpointError(
                f"{found}: {damage}. Name the run instead to use its latest valid checkpoint."
            )
    if found is None:
        raise CheckpointError(
            f"{path} is neither a run (a folder with checkpoints/step-<n> in it) nor a checkpoint "
            f"(a folder with {MANIFEST} in it). Weights from elsewhere are given with --pretrained."
        )
    return found


def containing(path: Path) -> Path | None:
    """The checkpoint that weights at `path` are in: itself, a run's best, or the one that the file belongs to.

    None for weights from elsewhere.
    """
    if path.is_dir():
        return resolve(path, best=True) if is_own(path) else None
    belongs = path.name in FILES and is_checkpoint(path.parent)
    return path.parent if belongs else None


# --- Read -----------------------------------------------------------------------------------------


class JsonDict(dict):
    """An object in the JSON `file`; a key that is asked for and missing is a CheckpointError."""

    def __init__(self, file: Path, values: dict):
        super().__init__(values)
        self._file = file

    def __missing__(self, key: str) -> None:
        raise CheckpointError(
            f"{self._file} has no {key!r}: expected what this code writes. Take another checkpoint."
        )


def read_metadata(path: Path) -> JsonDict:
    """The state.json of the checkpoint at `path`. Raises CheckpointError, also for a key that is missing."""
    file = path / "state.json"
    try:
        content = read_again(file.read_bytes)
        metadata = json.loads(content, object_hook=functools.partial(JsonDict, file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if isinstance(metadata, dict) and "step" not in metadata:
        metadata = first_edition.translate_metadata(metadata, functools.partial(JsonDict, file))
    kinds = {"step": int, "epoch": int, "skipped": int, "best": dict, "scaler": dict}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file} holds {type(metadata).__name__}, expected an object")
    for key, kind in kinds.items():
        if not isinstance(metadata[key], kind):
            raise CheckpointError(f"{file}: {key} is {metadata[key]!r}, expected {kind.__name__}")
    return metadata


def read_manifest(path: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file of the checkpoint at `path`, which has been verified. Raises CheckpointError."""
    try:
        return json.loads(read_again((path / MANIFEST).read_bytes))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file. Raises CheckpointError."""
    try:
        return read_again(functools.partial(safetensors.torch.load_file, file))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error})") from error


def restore(path: Path, state: TrainState) -> None:
    """Load the checkpoint at `path`, which has been verified, into `state`: all of it or a CheckpointError.

    Hyper-parameters are not loaded: they come from the configuration. After another optimizer, this one starts without
    a state.
    """
    metadata = read_metadata(path)
    load_strictly(state.model, path / "model.safetensors")
    if state.ema is not None:
        file = path / "ema.safetensors"
        if not file.exists():
            logger.warning(f"{path} has no EMA: it starts from the checkpoint's weights")
        load_strictly(state.ema.module, file if file.exists() else path / "model.safetensors")
    settings = metadata.get("config", {}).get("TRAIN", {}).get("OPTIMIZER", {})
    name = settings.get("NAME", first_edition.LATER_KEYS["TRAIN.OPTIMIZER.NAME"])
    if OPTIMIZERS.get(name) is type(state.optimizer):
        _restore_optimizer(path / "optimizer.safetensors", state)
    else:
        optimizer = type(state.optimizer).__name__
        logger.warning(f"{path} has the optimizer state of {name}: {optimizer} starts without one")
        state.set_optimizer_tensors({})
    state.load_counters(metadata)


def load_strictly(model: nn.Module, file: Path) -> None:
    """Load `file` into `model`; other names, shapes or types are a CheckpointError that lists them."""
    load_tensors(model, read_tensors(file), file)


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Load the `tensors` of `file` into `model`; other names, shapes or types are a CheckpointError that lists them."""
    own = model.state_dict()
    tensors = first_edition.translate_tensors(tensors, own)
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {_kind(tensors[name])} instead of {_kind(own[name])}"
        for name in own
        if name in tensors and _kind(tensors[name]) != _kind(own[name])
    ]
    if problems:
        raise CheckpointError(
            f"{file} is of another model: {join_some(problems)}. "
            "Set MODEL.NAME, MODEL.ARGS, DATA.IMG_SIZE and DATA.IN_CHANS as in the checkpoint's state.json. To fit the "
            "weights to another size, evaluate with --sizes or start a new run with --pretrained."
        )
    model.load_state_dict(tensors)


def _restore_optimizer(file: Path, state: TrainState) -> None:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    parameters = dict(state.model.named_parameters())
    for full_name, tensor in read_tensors(file).items():
        name, _, key = full_name.rpartition(".")
        moments.setdefault(name, {})[key] = tensor
    moments = first_edition.translate_tensors(moments, parameters)
    kept = STATE[type(state.optimizer)]
    problems = [f"{name} is no parameter" for name in moments if name not in parameters]
    problems += [
        f"{name} has {', '.join(sorted(values))} instead of {' or '.join(', '.join(sorted(keys)) for keys in kept)}"
        for name, values in moments.items()
        if values.keys() not in kept
    ]
    problems += [
        f"{name}.{key} is {_kind(value)} instead of {_kind(parameters[name])}"
        for name, values in moments.items()
        for key, value in values.items()
        if name in parameters and value.ndim and _kind(value) != _kind(parameters[name])
    ]
    if problems:
        optimizer = type(state.optimizer).__name__
        raise CheckpointError(
            f"{file} does not hold the state of {optimizer} and this model: {join_some(problems)}"
        )
    state.set_optimizer_tensors(
        {
            f"{name}.{key}": value
            for name, values in moments.items()
            for key, value in values.items()
        }
    )


def _kind(tensor: torch.Tensor) -> str:
    """Shape and type of `tensor` as messages name them."""
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
