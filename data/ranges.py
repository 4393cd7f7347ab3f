"""Files by range: any part of a file on a disk or on a server, read by any number of processes.

This is the one place that tells an address from a path.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from data.remote import RemoteFile, RemotePath, open_remote_files


class LocalFile:
    """A file on a disk, with its size in bytes."""

    def __init__(self, path: Path):
        self.path = str(path)
        self.size = os.path.getsize(path)

    def read(self, length: int, offset: int, *, fresh: bool = False) -> bytes:
        """`length` bytes from `offset`, `fresh` or not. Raises OSError, or EOFError if the file ends before."""
        with _opened(self.path) as descriptor:
            data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise EOFError(f"the archive ends inside the file: {len(data)} of {length} bytes")
        return data

    def state(self) -> list[int]:
        """Of the file that is read: what `status_of` says. Raises OSError."""
        with _opened(self.path) as descriptor:
            return status_of(descriptor)

    def prefetch(self, length: int, offset: int) -> None:
        """Do nothing: disks read ahead by themselves."""

    def stream(self) -> BinaryIO:
        """The file from its beginning, to be closed."""
        return open(self.path, "rb")


File = LocalFile | RemoteFile


def open_files(paths: Sequence[Path | RemotePath]) -> list[File]:
    """Files of one folder. Raises OSError, or DataError for files of a server."""
    if any(isinstance(path, RemotePath) for path in paths):
        return open_remote_files(paths)
    return [LocalFile(path) for path in paths]


def status_of(file: str | int) -> list[int]:
    """Size of a file, and when its content and anything of it was last changed, in ns. Raises OSError."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """The descriptor of an archive, which stays open."""
    try:
        yield _handle(path, os.getpid()).fileno()
    except OSError:
        _handle.cache_clear()  # what a server has forgotten (ESTALE) has to be opened again
        raise


@functools.lru_cache(maxsize=16)
def _handle(path: str, pid: int) -> io.FileIO:
    """An open file per archive and process: a forked worker does not share its parent's."""
    return open(path, "rb", buffering=0)
