"""Atomic writes: a reader, or a kill, finds the old content or the new, and nothing in between."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import StorageError


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place, synced to the disk, when the block ends without an error.

    Raises StorageError where it cannot be written; the old file stays.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. Make room there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text as UTF-8. Raises StorageError, leaving the old file."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Bring the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
