"""Pack format: a split as shards of image files end to end, and an index that is written last.

`tools/pack.py` writes such a folder, `data/readers.py` reads it by position.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.ranges import File, open_files
from data.remote import RemotePath
from utils.errors import DataError

INFO, INDEX = "pack.json", "index.npz"
FORMAT = 1  # raised when a reader of the one before would misread it


class PackIndex(NamedTuple):
    """What a pack holds.

    names: bytes [N], `<class>/<file>`, sorted.
    where: int64 [N, 4]: size, shard, offset in the shard, CRC-32.
    shards: the files that hold them.
    info: what it was made from and how: `source`, the fingerprint of the dataset that was packed,
    `shorter_side` and `quality` if it was encoded again, the shards' sizes, the index's SHA-256.
    """

    names: np.ndarray
    where: np.ndarray
    shards: list[File]
    info: dict


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.bin"


def write_index(folder: Path, names: np.ndarray, where: np.ndarray, info: dict) -> None:
    """Write the index of the shards in `folder`, which makes it a pack."""
    buffer = io.BytesIO()
    np.savez(buffer, names=names, where=where)
    sizes = np.bincount(where[:, 1], weights=where[:, 0]).astype(int).tolist()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    info = {"format": FORMAT, **info, "images": len(names), "shards": sizes, "index": digest}
    (folder / INDEX).write_bytes(buffer.getvalue())
    (folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")


def read_index(folder: Path | RemotePath) -> PackIndex:
    """The index of the pack `folder`, checked against its own checksum and the sizes of the shards.

    Raises DataError, naming the file, if anything is missing, cut or damaged.
    """
    remedy = "copy it again, or write it again with tools/pack.py"
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise DataError(
                f"{folder}: is a pack of format {info['format']}, expected {FORMAT}; "
                "write it again with tools/pack.py"
            )
        content = (folder / INDEX).read_bytes()
        if hashlib.sha256(content).hexdigest() != info["index"]:
            raise DataError(f"{folder / INDEX}: differs from its SHA-256 in {INFO}; {remedy}")
        with np.load(io.BytesIO(content)) as arrays:
            names, where = arrays["names"], arrays["where"]
        shards = open_files([folder / shard_name(n) for n in range(len(info["shards"]))])
        for shard, size in zip(shards, info["shards"], strict=True):
            if shard.size != size:
                raise DataError(
                    f"{shard.path}: holds {shard.size} bytes, expected {size}; {remedy}"
                )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder}: not a readable pack ({error}); {remedy}") from error
    return PackIndex(names, where, shards, info)
