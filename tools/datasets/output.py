"""Output forms of a prepared split: a tree of files, a zip file or a pack, each resumable.

A form is written below a hidden folder. `position` is how far it is written, as (shard, byte); a
form opened again at a position drops whatever follows it.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data.pack import shard_name, write_index
from tools.datasets.raw_dataset import Part
from tools.pack import SHARD_BYTES, open_dataset
from utils.errors import StorageError


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

    def remove(self, names: list[str]) -> None:
        """Remove files that are written."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for folder in {(self.path / name).parent for name in names}:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

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

    def remove(self, names: list[str]) -> None:
        """Nothing: an output that is opened at an earlier position is cut off there."""

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


FORGOTTEN = -1  # the size in the record of a part that counts no more


class _Written(NamedTuple):
    """What `Progress` knows of a part."""

    size: int
    position: tuple[int, int]
    names: list[bytes]
    where: np.ndarray
    unreadable: list[str]


class Progress:
    """The parts of a split that are written, and where their images lie: a line of JSON a part.

    Where a part is to be written again, so are those that follow it in the output, which has no gaps.
    """

    def __init__(self, path: Path):
        self.path = path
        self._parts: dict[str, _Written] = {}
        complete = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # a kill may leave part of a line
                        self._take(json.loads(line))
                        complete += len(line)
            os.truncate(path, complete)

    @property
    def position(self) -> tuple[int, int]:
        """The end of the last part in the output."""
        return next(reversed(self._parts.values())).position if self._parts else (0, 0)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each part that is written, by name."""
        return {name: part.size for name, part in self._parts.items()}

    @property
    def names(self) -> list[bytes]:
        """`<class>/<file>` of every image, in the order of writing."""
        return [name for part in self._parts.values() for name in part.names]

    @property
    def where(self) -> np.ndarray:
        """Where the images lie, int64 [N, 4]: size, shard, offset, CRC-32, as in a pack's index."""
        return np.concatenate(
            [np.empty((0, 4), np.int64), *(p.where for p in self._parts.values())]
        )

    @property
    def unreadable(self) -> list[str]:
        """`<class>/<file>: <reason>` of files that cannot be opened as an image."""
        return [line for part in self._parts.values() for line in part.unreadable]

    def has(self, part: Part) -> bool:
        """Whether `part` is written, from what it is read from now."""
        return part.name in self._parts and self._parts[part.name].size == part.size

    def first_stale(self, sizes: dict[str, int]) -> str | None:
        """The first part in the output that the download has no more or in another size; None if all are as they were.

        sizes: of the parts of the download, by name.
        """
        return next((name for name, size in self.sizes.items() if sizes.get(name) != size), None)

    def names_from(self, part: str) -> list[str]:
        """The names of the images of the part `part` and of those written after it."""
        parts = list(self._parts)
        later = parts[parts.index(part) :]
        return [name.decode() for one in later for name in self._parts[one].names]

    def forget(self, part: str) -> None:
        """Record that the part `part` and those written after it are to be written again, if the download has them."""
        self.add(Part(part, FORGOTTEN, iter(())), [], [], self.position)

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
        if record["size"] == FORGOTTEN:
            while record["part"] in self._parts:
                self._parts.popitem()
            return
        rows = [row for _, *row in record["images"]]
        self._parts[record["part"]] = _Written(
            size=record["size"],
            position=tuple(record["position"]),
            names=[name.encode() for name, *_ in record["images"]],
            where=np.array(rows, np.int64).reshape(-1, 4),
            unreadable=record["unreadable"],
        )
