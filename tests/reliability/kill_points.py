"""Kill points of a checkpoint save: SIGKILL right after one of its operations on the disk, by replaced functions."""

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from engine import checkpoint

POINTS = (  # of a save, in this order; some are reached several times
    "snapshot",  # the state is copied, nothing is written
    "folder",  # the temporary folder exists
    "file",  # a file is written
    "file-synced",
    "folder-synced",
    "set-aside",  # the older checkpoint of the same step has another name
    "renamed",  # the new one has its name
    "committed",  # and is on the disk
    "hidden",  # one that is no longer kept has lost its name
    "deleted",
    "pruned",
)


def kill_at(point: str, nth: int, rank: int) -> None:
    """A hook: this process dies of SIGKILL when its saves reach `point` for the `nth` time, counted from 1."""
    times = itertools.count(1)

    def reach(reached: str) -> None:
        if reached == point and next(times) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        in_save = _is_temporary(path.parent)
        if in_save:
            reach("file")
        fsync(descriptor)
        if in_save:
            reach("file-synced")
        elif _is_temporary(path):
            reach("folder-synced")
        elif path in renamed_in:
            reach("committed")

    def rename(source: Path, target: Path) -> None:
        os_rename(source, target)
        if _is_temporary(source):
            renamed_in.add(Path(target).resolve().parent)
            reach("renamed")
        elif _is_temporary(target):
            reach("hidden")
        elif "-replaced-" in Path(target).name:
            reach("set-aside")

    def delete(path: Path, *args: object, **options: object) -> None:
        exists = Path(path).exists()  # a save first deletes a temporary folder that is rarely there
        rmtree(path, *args, **options)
        if exists and _is_temporary(path):
            reach("deleted")

    renamed_in: set[Path] = set()
    fsync, os_rename, rmtree = os.fsync, os.rename, shutil.rmtree
    os.fsync, os.rename, shutil.rmtree = sync, rename, delete
    _call_after(os, "mkdir", lambda path, *rest: _is_temporary(path) and reach("folder"))
    _call_after(checkpoint, "snapshot", lambda *arguments: reach("snapshot"))
    _call_after(checkpoint, "prune", lambda *arguments: reach("pruned"))


def _is_temporary(path: Path) -> bool:
    """Whether `path` is a folder in which a checkpoint is written, or about to be deleted."""
    return Path(path).name.startswith(".tmp-step-")


def _call_after(module: ModuleType, name: str, action: Callable) -> None:
    """Replace `module.name` by a function that does the same and then calls `action` with its positional arguments."""
    function = getattr(module, name)

    @functools.wraps(function)
    def replacement(*args: object, **options: object) -> object:
        value = function(*args, **options)
        action(*args)
        return value

    setattr(module, name, replacement)
