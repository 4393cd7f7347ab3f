"""Output forms of a prepared split: a tree of files, a zip file or a pack, each resumable.

A form is written below a hidden folder. `position` is how far it is written, as (shard, byte); a
form opened again at a position drops whatever follows it.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from data.pack import shard_name, write_index
from tools.datasets.raw_dataset import Part
from tools.pack import SHARD_BYTES, open_dataset
from utils.errors import ConfigError, StorageError


class TreeOutput:
    """Files in class folders."""

    suffix = ""
    position = (0, 0)  # a file that is written again replaces the old one

    def __init__(self, path: Path, position: tuple[int, int]):
        self.path = path
        path.mkdir(exist_ok=True)

    def write(self, name: str, data: bytes, crc: int) -> tuple[int, int]:
        """Write `name`; its shard and offset."""
        file = self.path / name
        try:
            file.write_bytes(data)
        except FileNotFoundError:
            file.parent.mkdir()
            file.write_bytes(data)
        return self.position

    def sync(self) -> None:
        """Nothing: `verify` in tools/datasets/prepare.py compares the sizes of all files."""

    def close(self, names: np.ndarray, where: np.ndarray) -> None:
        """Complete the split; it has its files already."""


class _Appended:
    """Files end to end in a file."""

    file: IO[bytes]

    def open(self, path: Path, end: int) -> None:
        """Open `path` to be written on at byte `end`. Raises StorageError if it ends before."""
        self.file = path.open("r+b" if path.exists() else "w+b")
        if (size := os.fstat(self.file.fileno()).st_size) < end:
            raise StorageError(
                f"{path} holds {size:,} bytes, expected {end:,}; remove {path.parent} to start again"
            )
        self.file.truncate(end)
        self.file.seek(end)

    def sync(self) -> None:
        """Bring what is written to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


class ZipOutput(_Appended):
    """A zip file, its members stored without compression; its directory is written last."""

    suffix = ".zip"

    def __init__(self, path: Path, position: tuple[int, int]):
        self.open(path, position[1])

    @property
    def position(self) -> tuple[int, int]:
        """How far the file is written."""
        return 0, self.file.tell()

    def write(self, name: str, data: bytes, crc: int) -> tuple[int, int]:
        """Append `name`; its shard and the offset of its header."""
        place = self.position
        self.file.write(_member(name, len(data), crc).FileHeader())
        self.file.write(data)
        return place

    def close(self, names: np.ndarray, where: np.ndarray) -> None:
        """Write the directory."""
        # Opened at the end of the members, ZipFile adds the directory of what it is given.
        with zipfile.ZipFile(self.file, "w") as archive:
            for name, (size, _, offset, crc) in zip(names.tolist(), where.tolist(), strict=True):
                archive.infolist().append(_member(os.fsdecode(name), size, crc, offset))
        self.sync()
        self.file.close()


def _member(name: str, size: int, crc: int, offset: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # of 1980-01-01, so that the same images give the same file
    info.file_size = info.compress_size = size
    info.CRC, info.header_offset = crc, offset
    info.external_attr = 0o644 << 16
    return info


class PackOutput(_Appended):
    """Shards and their index, as of tools/pack.py."""

    suffix = ".pack"

    def __init__(self, path: Path, position: tuple[int, int]):
        self.path = path
        path.mkdir(exist_ok=True)
        self.shard, end = position
        for later in path.glob("shard-*.bin"):
            if later.name > shard_name(self.shard):
                later.unlink()
        self.open(path / shard_name(self.shard), end)

    @property
    def position(self) -> tuple[int, int]:
        """The last shard and how far it is written."""
        return self.shard, self.file.tell()

    def write(self, name: str, data: bytes, crc: int) -> tuple[int, int]:
        """Append `name` to the last shard, or to the next if that is full; its shard and offset."""
        end = self.file.tell()
        if end and end + len(data) > SHARD_BYTES:
            self.sync()
            self.file.close()
            self.shard += 1
            self.open(self.path / shard_name(self.shard), 0)
        place = self.position
        self.file.write(data)
        return place

    def close(self, names: np.ndarray, where: np.ndarray) -> None:
        """Write the index, with the fingerprint that the same files have in a folder."""
        self.sync()
        self.file.close()
        info: dict[str, int | str] = {"shorter_side": 0}
        write_index(self.path, names, where, info)
        info["source"] = fingerprint(self.path.parent, self.path.stem)
        write_index(self.path, names, where, info)


def fingerprint(root: Path, split: str) -> str:
    """The fingerprint of a split, the same for every form of output."""
    return open_dataset(root, split).fingerprint


OUTPUTS = {"tree": TreeOutput, "zip": ZipOutput, "pack": PackOutput}


class Progress:
    """The parts of a split that are written, and where their images lie: a line of JSON a part.

    names: bytes, `<class>/<file>` in the order of writing.
    where: int64 [N, 4]: size, shard, offset, CRC-32, as in a pack's index.
    unreadable: `<class>/<file>: <reason>` of files that cannot be opened as an image.
    position: of the output after the last part.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: list[bytes] = []
        self.unreadable: list[str] = []
        self.position = (0, 0)
        self._where = [np.empty((0, 4), np.int64)]
        self._sizes: dict[str, int] = {}
        complete = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # a kill may leave part of a line
                        self._take(json.loads(line))
                        complete += len(line)
            os.truncate(path, complete)

    @property
    def where(self) -> np.ndarray:
        """Where the images lie."""
        return np.concatenate(self._where)

    def has(self, part: Part) -> bool:
        """Whether `part` is written. Raises ConfigError if its size has changed since."""
        if (size := self._sizes.get(part.name, part.size)) != part.size:
            raise ConfigError(
                f"{part.name} has changed since it was written (size {size}, now {part.size}); "
                f"remove {self.path.parent} to start again"
            )
        return part.name in self._sizes

    def add(
        self, part: Part, images: list[tuple], unreadable: list[str], position: tuple[int, int]
    ) -> None:
        """Record that `part` is written; images: (name, size, shard, offset, CRC-32)."""
        record = {"part": part.name, "size": part.size, "position": position}
        record |= {"images": images, "unreadable": unreadable}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(record)

    def _take(self, record: dict) -> None:
        self._sizes[record["part"]] = record["size"]
        self.position = tuple(record["position"])
        self.names += [name.encode() for name, *_ in record["images"]]
        rows = [row for _, *row in record["images"]]
        self._where.append(np.array(rows, np.int64).reshape(-1, 4))
        self.unreadable += record["unreadable"]
