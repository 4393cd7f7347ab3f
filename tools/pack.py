#!/usr/bin/env python
"""Packing of a dataset: the images of a split in a few large files, which training reads by position.

Writes OUT/train.pack; pass OUT as --data-path. By default the files are packed unchanged, and the dataset keeps its
fingerprint. With --shorter-side, larger images are resized and encoded as JPEG: that makes a different dataset with
another fingerprint. If interrupted, the same command continues. --verify compares the checksum of every packed file,
and the list of files with those in ROOT.

examples:
  python tools/pack.py /imagenet /imagenet-packed
  python tools/pack.py /imagenet /imagenet-packed --shorter-side 288 --quality 90
  python tools/pack.py /imagenet /imagenet-packed --verify
"""

import argparse
import io
import itertools
import json
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data import ImageDataset
from data.decode import EXIF_TRANSPOSES, UNREADABLE, decode, orientation
from data.pack import shard_name, write_index
from data.readers import PackReader, Reader, open_split
from utils.errors import ConfigError, DataError, StorageError, as_exit_code
from utils.files import replace_atomically, write_atomically
from utils.machine import available_cores

SHARD_BYTES = 64 * 2**20


def split_into_shards(sizes: np.ndarray) -> list[range]:
    """The positions of the files of each shard: in order, up to `SHARD_BYTES`, at least one."""
    ends = np.cumsum(sizes)
    starts = [0]
    while (last := starts[-1]) < len(sizes):
        full = np.searchsorted(ends, ends[last] - sizes[last] + SHARD_BYTES, side="right")
        starts.append(max(last + 1, int(full)))
    return [range(*pair) for pair in itertools.pairwise(starts)]


def shrink(data: bytes, shorter_side: int, quality: int) -> bytes:
    """An image file as a JPEG with `shorter_side` pixels along its shorter side; unchanged if it is not larger."""
    image = decode(data)
    shorter = min(image.size)
    if shorter <= shorter_side:
        return data
    size = tuple(round(length * shorter_side / shorter) for length in image.size)
    exif = Image.Exif()
    if (turned := orientation(image)) in EXIF_TRANSPOSES:  # DATA.EXIF may apply it
        exif[ExifTags.Base.Orientation] = turned
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def open_dataset(root: Path, split: str) -> ImageDataset:
    """The files of a split and their classes; nothing is decoded. Raises DataError."""
    return ImageDataset(
        root,
        split,
        transform=None,
        train=False,
        allow_missing=False,
        seed=0,
        apply_exif=False,
        checksums=None,
        skip_bad=False,
        holdout=0.0,
    )


def write_shard(source: Reader, folder: Path, number: int, shorter_side: int, quality: int) -> int:
    """Write all files of `source` as shard `number`, then its part of the index; return the number of files.

    Raises DataError for a file that cannot be read.
    """
    part = folder / f"part-{number:05d}.npy"
    if part.exists():
        return len(source.names)
    rows, offset = [], 0
    with open(folder / shard_name(number), "wb") as shard:
        for index in range(len(source.names)):
            try:
                data = source.read(index)
                if shorter_side:
                    data = shrink(data, shorter_side, quality)
            except UNREADABLE as error:
                name = os.path.join(source.path, os.fsdecode(source.names[index]))
                raise DataError(
                    f"{name}: cannot be packed ({error}); restore or remove it, then run the same command"
                ) from error
            rows.append((len(data), number, offset, zlib.crc32(data)))
            offset += shard.write(data)
        shard.flush()
        os.fsync(shard.fileno())
    with replace_atomically(part) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(rows, np.int64))
    return len(source.names)


def pack(root: Path, out: Path, split: str, shorter_side: int, quality: int, workers: int) -> None:
    """Write `out`/<split>.pack from the `split` of `root`, under a temporary name until it is complete.

    Raises ConfigError if it exists, StorageError if it cannot be written.
    """
    target = out / f"{split}.pack"
    if target.exists():
        raise ConfigError(f"{target} exists; remove it, or name another folder")
    dataset = open_dataset(root, split)
    shards = split_into_shards(dataset.reader.sizes)
    info = {"source": dataset.fingerprint, "shorter_side": shorter_side}
    info |= {"quality": quality} if shorter_side else {}
    folder = out / f".{split}.pack"
    try:
        _begin(folder, info)
        tasks = len(shards)
        with (
            ProcessPoolExecutor(workers) as pool,
            tqdm(total=len(dataset), unit=" images", desc=str(target), disable=None) as bar,
        ):
            parts = (dataset.reader.subset(indices) for indices in shards)
            same = ([value] * tasks for value in (shorter_side, quality))
            for count in pool.map(write_shard, parts, [folder] * tasks, range(tasks), *same):
                bar.update(count)
        rows = [folder / f"part-{number:05d}.npy" for number in range(tasks)]
        where = np.concatenate([_load_rows(path) for path in rows])
        write_index(folder, dataset.reader.names, where, info)
        for path in (*rows, folder / "plan.json", *folder.glob(".tmp-*")):
            path.unlink()
        os.replace(folder, target)
    except OSError as error:
        raise StorageError(
            f"{error.filename or out} cannot be written: {error.strerror}"
        ) from error
    except BrokenProcessPool as error:
        raise StorageError(
            f"{target}: a process that packs was killed, probably for want of memory. Lower --workers and run the same "
            "command: it continues."
        ) from error
    before, after = dataset.reader.sizes.sum(), where[:, 0].sum()
    how = f"shorter side {shorter_side}, JPEG quality {quality}" if shorter_side else "unchanged"
    print(
        f"{target}: {len(dataset)} images, {how}, in {tasks} shards, {after:,} bytes, "
        f"{after / before:.1%} of {dataset.reader.path}"
    )


def _begin(folder: Path, info: dict) -> None:
    """Make `folder`; raise ConfigError if it holds a part of a pack of other files or with other settings."""
    plan = folder / "plan.json"
    if plan.exists() and plan.read_bytes() != json.dumps(info).encode():
        raise ConfigError(
            f"{folder} holds part of a pack of other files or with other settings; remove it to start again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(plan, json.dumps(info))


def _load_rows(path: Path) -> np.ndarray:
    """The rows of the index that `write_shard` has written to `path`. Raises DataError where it is damaged."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged; remove it and run the same command") from error


def verify(root: Path, out: Path, split: str) -> None:
    """Check every file in `out`/<split>.pack, and that `root` still holds the same files; DataError if not."""
    source = open_split(out, split)
    if not isinstance(source, PackReader):
        raise ConfigError(f"{source.path} is not a pack; name the folder that holds {split}.pack")
    for index in tqdm(range(len(source.names)), unit=" images", desc=source.path, disable=None):
        try:
            source.read(index)
        except UNREADABLE as error:
            name = os.fsdecode(source.names[index])
            raise DataError(f"{source.path}: {name}: {error}; copy or write it again") from error
    original = open_dataset(root, split)
    if original.fingerprint != source.info["source"]:
        raise DataError(
            f"{source.path} was packed from other files than those now in {original.reader.path} "
            f"(fingerprint {source.info['source'][:12]}…, there {original.fingerprint[:12]}…); "
            "write it again, or restore them"
        )
    print(
        f"{source.path}: {len(source.names)} images are valid and the same as in {original.reader.path}"
    )


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="dataset, as --data-path takes it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the packs into")
    parser.add_argument("--split", nargs="+", default=["train"], choices=("train", "val"))
    parser.add_argument(
        "--shorter-side",
        type=int,
        default=0,
        choices=range(32, 4097),
        metavar="PIXELS",
        help="resize larger images to it",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=90,
        choices=range(1, 101),
        metavar="1…100",
        help="JPEG quality of resized images",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        choices=range(1, 257),
        metavar="N",
        help="processes (default: the cores)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check the packs in OUT instead of writing them"
    )
    args = parser.parse_args(arguments)
    for split in args.split:
        if args.verify:
            verify(args.root, args.out, split)
        else:
            pack(args.root, args.out, split, args.shorter_side, args.quality, args.workers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
