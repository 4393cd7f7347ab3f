"""What is saved, how is it written so that a kill cannot hurt it, and how does a run find its way back?

A checkpoint is a folder `step-<update>` of safetensors and JSON files with a manifest of their sizes and SHA-256. It is
written under another name, synced and renamed: a folder of that name is whole, or its manifest says what is wrong.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from timm.utils import ModelEmaV3
from torch import nn

from utils.errors import CheckpointError, StorageError
from utils.logging import logger

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Exactly what the loop changes, what is saved, and what is restored."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    update: int = 0  # updates done: the position in the run
    epoch: int = 0  # epochs closed: trained and, where due, validated
    skipped: int = 0  # updates in a row whose gradient was not finite
    best: dict = field(default_factory=lambda: {"acc1": 0.0, "update": 0})

    def counters(self) -> dict:
        """The state that is not tensors."""
        return {
            "update": self.update,
            "epoch": self.epoch,
            "skipped": self.skipped,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
        }


# --- Write ----------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints into `folder`, of which the newest `keep` and the best stay, while training goes on.

    A context manager, which ends when the last checkpoint is on the disk. A write that failed raises its StorageError
    at the next save or at the end.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self.wait()

    def save(self, state: TrainState, facts: dict) -> None:
        """Copy `state` and `facts` now; they are written while training goes on."""
        self.wait()
        start = time.perf_counter()
        files = snapshot(state, facts)
        copied = time.perf_counter() - start
        self._writing = self._thread.submit(
            self._write, f"step-{state.update}", files, f"step-{state.best['update']}", copied
        )

    def wait(self) -> None:
        """Wait until what was saved is on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, name: str, files: dict[str, bytes], best: str, copied: float) -> None:
        start = time.perf_counter()
        path = write(self.folder, name, files)
        prune(self.folder, self.keep, best)
        written = time.perf_counter() - start
        logger.info(f"{path} saved: copied in {copied:.2f} s, written in {written:.2f} s meanwhile")


def snapshot(state: TrainState, facts: dict) -> dict[str, bytes]:
    """The files of a checkpoint of `state`, by name; `facts` stand beside the counters in state.json."""
    files = {
        "model.safetensors": _serialize(state.model.state_dict()),
        "optimizer.safetensors": _serialize(_optimizer_tensors(state)),
        "state.json": json.dumps({**state.counters(), **facts}, indent=1).encode(),
    }
    if state.ema is not None:
        files["ema.safetensors"] = _serialize(state.ema.module.state_dict())
    return files


def write(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Write `files` and their manifest as the checkpoint `folder`/`name`, whole or not at all.

    Raises StorageError, leaving the older checkpoints as they are.
    """
    target, temporary = folder / name, folder / f".tmp-{name}"
    manifest = {
        file: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in files.items()
    }
    files = files | {MANIFEST: json.dumps(manifest, indent=1).encode()}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file_name, content in files.items():
            with (temporary / file_name).open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
        _sync_folder(temporary)
        if target.exists():  # damaged and passed over, or from before its epoch was closed
            os.rename(target, folder / f".tmp-replaced-{name}")
        os.rename(temporary, target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"{target}: the checkpoint could not be written ({error.strerror}); the older ones are untouched. "
            "Make room or choose another --output, then start the same command again."
        ) from error
    return target


def prune(folder: Path, keep: int, best: str) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`, and what a kill left half-written."""
    for path in steps(folder)[keep:]:
        if path.name != best:
            shutil.rmtree(path)
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def _serialize(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )


def _optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Find -----------------------------------------------------------------------------------------


def steps(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first, whole or not."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, None if it is whole: every file's size and SHA-256 are compared."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"]:
                return f"{name} has {len(content)} bytes instead of {expected['bytes']}"
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                return f"the SHA-256 of {name} is not the one in {MANIFEST}"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, naming the damaged ones passed over; None if there is none at all.

    Raises CheckpointError where every checkpoint is damaged: starting afresh would be a silent loss.
    """
    candidates = steps(folder)
    for path in candidates:
        damage = verify(path)
        if damage is None:
            return path
        logger.warning(f"{path} is damaged and passed over: {damage}")
    if candidates:
        raise CheckpointError(
            f"{folder}: none of its {len(candidates)} checkpoints is whole. "
            "Restore one from a copy, or choose another --tag to start afresh."
        )
    return None


def locate(path: Path, *, best: bool = False) -> Path:
    """The checkpoint that `path` means: a checkpoint itself, or the newest (or the best) of a run's folder.

    Raises CheckpointError if there is none or if it is damaged.
    """
    if (path / "checkpoints").is_dir():
        found = newest(path / "checkpoints")
        if best and found is not None:
            at_best = found.parent / f"step-{read_facts(found)['best']['update']}"
            found = at_best if at_best.exists() and verify(at_best) is None else found
    else:
        found = path if path.name.startswith("step-") and path.is_dir() else None
        if found and (damage := verify(found)):
            raise CheckpointError(
                f"{found}: {damage}. Name the run's folder instead to use its newest whole checkpoint."
            )
    if found is None:
        raise CheckpointError(
            f"{path} is neither a run (a folder with checkpoints/step-<update> in it) nor a checkpoint. "
            "Weights from elsewhere are given with --pretrained."
        )
    return found


# --- Read -----------------------------------------------------------------------------------------


def read_facts(path: Path) -> dict:
    """The state.json of the checkpoint at `path`."""
    return json.loads((path / "state.json").read_text())


def restore(path: Path, state: TrainState) -> None:
    """Load the checkpoint at `path`, which has been verified, into `state`: all of it or a CheckpointError.

    Hyper-parameters are not loaded: they come from the configuration.
    """
    load_strictly(state.model, path / "model.safetensors")
    if state.ema is not None:
        file = path / "ema.safetensors"
        if not file.exists():
            logger.warning(f"{path} has no EMA: it starts from the checkpoint's weights")
        load_strictly(state.ema.module, file if file.exists() else path / "model.safetensors")
    _restore_optimizer(path / "optimizer.safetensors", state)
    facts = read_facts(path)
    if state.scaler.is_enabled() and facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])
    state.update, state.epoch = facts["update"], facts["epoch"]
    state.skipped, state.best = facts["skipped"], facts["best"]


def load_strictly(model: nn.Module, file: Path) -> None:
    """Load `file` into `model`; other names or shapes are a CheckpointError that lists them."""
    tensors = safetensors.torch.load_file(file)
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{file} is of another model: {some(problems)}. "
            "Set MODEL.NAME and MODEL.ARGS as in the checkpoint's state.json."
        )
    model.load_state_dict(tensors)


def _restore_optimizer(file: Path, state: TrainState) -> None:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in safetensors.torch.load_file(file).items():
        name, _, key = full_name.rpartition(".")
        moments.setdefault(name, {})[key] = tensor
    parameters = dict(state.model.named_parameters())
    if unknown := moments.keys() - parameters.keys():
        raise CheckpointError(
            f"{file} holds moments of parameters that are not the model's: {some(unknown)}"
        )
    state.optimizer.state.clear()
    for name, values in moments.items():
        parameter = parameters[name]
        state.optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in values.items()
        }


def some(items: Iterable[str], count: int = 10) -> str:
    """The first `count` of `items` for a message, and how many there are beyond."""
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
