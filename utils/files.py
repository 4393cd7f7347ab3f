"""Files: atomic writes, of which a reader, or a kill, finds the old content or the new; synced folders; read again."""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from utils.errors import StorageError

# What disks and servers may recover from, and how many seconds they are given before each retry.
TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
PAUSES = (0.1, 0.5, 2.5)
# A disk, a quota or the size that a file may have is at its limit.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

T = TypeVar("T")


def storage_remedy(error: OSError) -> str:
    """The end of a message: what to do where `error` says that a file cannot be written."""
    if error.errno in FULL:
        return "Make room there."
    return "Check that folder: it must exist, work, and let this user write."


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place, synced to the disk, when the block ends without an error.

    Raises StorageError where it cannot be written; the old file stays.
    """
    # Threads may replace one file too: a signal's and the watchdog's write status.json.
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_native_id()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. {storage_remedy(error)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text as UTF-8. Raises StorageError, leaving the old file."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def require_folder_of(out: Path) -> None:
    """Raise StorageError if there is no folder to write the file `out` to: before the work, which would be lost."""
    if not out.parent.is_dir():
        raise StorageError(f"{out.parent}: no such folder for --out")


def sync(path: Path) -> None:
    """Bring the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it that are missing, with their names on the disk. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # others may write into a folder and not list it
            sync(folder.parent)


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link and not what it leads to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_again(read: Callable[[], T]) -> T:
    """`read()`, after a few more tries if the disk or server did not answer. Raises OSError."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(pause)
    return read()
