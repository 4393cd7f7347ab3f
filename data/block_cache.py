"""Block cache: parts of remote files in a folder of limited size, shared by processes and runs.

A block is a file of its own: its bytes and their SHA-256. It appears by a rename, so that readers find all of it or
nothing, and a damaged one is deleted and read from the server again. The blocks that were used least recently are
deleted. Where nothing can be written, nothing is kept, and reading continues.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.logging import logger

BLOCK = 256 * 2**10  # bytes; a photograph of ImageNet, 110 KB on average, is in one or two
DIGEST = hashlib.sha256().digest_size
FOLDER = "blocks"  # below the cache folder: nothing outside it is ever deleted
FULL, REDUCED = 1.0, 0.9  # of the limit: at which blocks are deleted, and what is left then
COUNTER, LOCK = "count", "lock"
# A folder is a version of a file, a block its number; a block that a kill left unfinished is deleted like the others.
OWN_FOLDER = re.compile(r"[0-9a-f]{32}")
OWN_BLOCK = re.compile(r"\d+(\.\d+-\d+)?")


class BlockCache(NamedTuple):
    """The blocks in `folder`, at most `limit` bytes of them; 0: none are kept.

    The size of the file `count` is the number of blocks. To append a byte to it needs no lock, and what a kill leaves
    wrong in it is corrected when blocks are deleted or another run starts.
    """

    folder: Path
    limit: int

    @property
    def most(self) -> int:
        """How many blocks fit into the limit."""
        return self.limit // (BLOCK + DIGEST)

    def has(self, file: str, number: int) -> bool:
        """Whether block `number` of `file` is kept, valid or not."""
        return os.path.exists(self._path(file, number))

    def load(self, file: str, number: int, length: int) -> bytes | None:
        """The `length` bytes of a block, marked as used; None if it is not kept or damaged."""
        path = self._path(file, number)
        try:
            with open(path, "rb") as content:
                data, digest = content.read(length), content.read()
            if hashlib.sha256(data).digest() == digest:
                os.utime(path)
                return data
            os.unlink(path)
        except OSError:  # another process has deleted it, or the disk cannot read it
            pass
        return None

    def store(self, file: str, number: int, data: bytes) -> None:
        """Keep a block, and delete others where there are too many. Warns once where it cannot be written."""
        if not self.most:
            return
        path = self._path(file, number)
        temporary = f"{path}.{os.getpid()}-{threading.get_native_id()}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as content:
                content.write(data + hashlib.sha256(data).digest())
            os.replace(temporary, path)
            with open(self._root / COUNTER, "ab") as counter:
                counter.write(b"\0")
                count = os.fstat(counter.fileno()).st_size + 1
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            _warn(f"{self.folder} keeps no more of the data: {error.strerror or error}")
            return
        if count > FULL * self.most:
            self.trim()

    def remove(self, file: str, number: int) -> None:
        """Delete a block, if it is kept."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(file, number))

    def trim(self) -> None:
        """Delete the blocks used least recently where there are too many, and correct their count.

        One process at a time does it; others continue meanwhile.
        """
        try:
            with open(self._root / LOCK, "w", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                blocks = sorted(self._blocks())
                excess = 0
                if len(blocks) > FULL * self.most:
                    excess = len(blocks) - int(REDUCED * self.most)
                for _, path in blocks[:excess]:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                with open(self._root / COUNTER, "ab") as counter:
                    counter.truncate(len(blocks) - excess)
        except BlockingIOError:
            pass  # another process is at it
        except OSError as error:
            _warn(f"{self.folder}: blocks of data cannot be deleted: {error.strerror or error}")

    def prepare(self) -> None:
        """Make the folder and bring it below the limit. Warns where it cannot be written."""
        if self.most:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                _warn(f"{self.folder} keeps none of the data: {error.strerror or error}")
            else:
                self.trim()

    @property
    def _root(self) -> Path:
        return self.folder / FOLDER

    def _path(self, file: str, number: int) -> str:
        return f"{self.folder}/{FOLDER}/{file}/{number}"

    def _blocks(self) -> Iterator[tuple[int, str]]:
        """When each block was last used, in ns, and its path."""
        for folder in os.scandir(self._root):
            if not OWN_FOLDER.fullmatch(folder.name):
                continue
            for entry in os.scandir(folder):
                if OWN_BLOCK.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.stat().st_mtime_ns, entry.path


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once in each process, not for every block."""
    logger.warning(f"{text}. It is read from the server each time.")
