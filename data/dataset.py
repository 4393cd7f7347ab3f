"""Image dataset: images with labels, addressed by position, and what happens to bad files.

An evaluation sample is addressed by its index. A training sample is addressed by
(epoch, index, repeat), which fixes every random number of its augmentation and, if its file is damaged, its substitute.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.classes import describe_ignored, match_folders, sort_classes
from data.decode import SAMPLE, UNREADABLE, decode_pixels
from data.readers import Reader, open_split
from data.remote import RemotePath
from utils.errors import DataError, StorageError
from utils.files import read_again
from utils.machine import find_shortage
from utils.rng import key, reseed
from utils.text import quantity

SUBSTITUTES = 10  # tried before a class is given up
LINES = 1 << 16  # of the fingerprint, hashed at once
NO_LABEL = -1  # of an image that cannot be read, where an evaluation continues without it


class BadFile(NamedTuple):
    """A file that could not be read, why, and for which sample; an evaluation has no epoch."""

    path: str
    reason: str
    epoch: int | None
    index: int


class TrainSample(NamedTuple):
    """An augmented image uint8 [3, H, W]; `bad` are the files it had to be substituted for."""

    image: torch.Tensor
    label: int
    bad: list[BadFile]
    ops: torch.Tensor  # [layers, 2]: of RandAugment, what is left to the device


class EvalSample(NamedTuple):
    """An image uint8 [3, H, W] with its position in the dataset; black if its file is `bad`."""

    image: torch.Tensor
    label: int
    index: int
    bad: list[BadFile]


class UnreadableError(Exception):
    """One image is damaged; stays inside this module."""


class LoadedDataset(Dataset):
    """What a loader reads: samples by index, and what it needs besides."""

    def path(self, index: int) -> str:
        """Where sample `index` lies, for people."""
        raise NotImplementedError

    def prefetch(self, items: Iterable[int | tuple[int, int, int]]) -> None:
        """Request the files of samples that are read soon; nothing where they are on a disk."""


class ImageDataset(LoadedDataset):
    """The images of `<root>/<split>`, a folder, .zip, .tar or .pack of `<class>/<file>`; on a server .zip or .pack.

    transform: an image's pixels, uint8 [height, width, 3], to uint8 [3, H, W].
    train: whether samples are `TrainSample`s, addressed by (epoch, index, repeat), or `EvalSample`s.
    classes: the class list that decides the labels, in order; None: the folder names, sorted.
    allow_missing: declares the split a subset, so that classes may have no images.
    seed: of the augmentation and of substitutes; only training uses it.
    apply_exif: rotate images as their EXIF data asks for.
    checksums: index of tools/doctor.py --sha with which the bytes of each image are compared; None or empty: not.
    skip_bad: in evaluation, an image that cannot be read is black and its label is `NO_LABEL`.
    holdout: share of each class that is set apart, by a hash of the file's path; 0: none.
    later_transforms: (first epoch, transform), in order: what replaces `transform` of training samples from then on.
    part: with `holdout`, which images are kept: `train` all others, `holdout` those set apart.

    Raises DataError for a split that is not there, has no class folders, an empty class, a class
    that `classes` does not have, or lacks one that it has; for fewer than two classes; and for a class
    that `holdout` leaves without an image in one of its parts.
    """

    def __init__(
        self,
        root: str | Path | RemotePath,
        split: str,
        *,
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
        train: bool,
        classes: Sequence[str] | None = None,
        allow_missing: bool,
        seed: int,
        apply_exif: bool,
        checksums: str | Path | None,
        skip_bad: bool,
        holdout: float,
        part: str = "train",
        later_transforms: Sequence[tuple[int, Callable]] = (),
    ):
        self.reader = open_split(root, split)
        self.transform = transform
        self.later_transforms = later_transforms
        self.train = train
        self.seed = seed
        self.apply_exif = apply_exif
        self.skip_bad = skip_bad
        self.classes = sort_classes(self.reader.folders) if classes is None else list(classes)
        class_of = match_folders(self.reader, self.classes, allow_missing)
        self._part = ""
        if holdout:
            self._part = f" ({part} part, {holdout:g} of each class held out)"
            self.reader = _split_by_hash(self.reader, holdout, part)
        self.labels = np.empty(len(self.reader.names), np.int32)
        position = {name: label for label, name in enumerate(self.classes)}
        for name, (start, end) in self.reader.class_ranges().items():
            self.labels[start:end] = position[class_of[name]]
        self.checksums = None
        if checksums:
            self.checksums = read_checksums(checksums, split, self.reader.names.tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, int, int]) -> TrainSample | EvalSample:
        return self._train_sample(*item) if self.train else self._eval_sample(item)

    def __str__(self) -> str:
        text = f"{self.reader.path}: {quantity(len(self), 'image')}, {quantity(len(self.classes), 'class')}{self._part}"
        return text + describe_ignored(self.reader.ignored)

    def prefetch(self, items: Iterable[int | tuple[int, int, int]]) -> None:
        """Request the files of samples that are read soon, if they are on a server."""
        self.reader.prefetch(image_index(item) for item in items)

    def path(self, index: int) -> str:
        """Where image `index` lies; inside an archive, as if that were a folder."""
        name = self.reader.names[index].decode(errors="backslashreplace")
        return os.path.join(self.reader.path, name)

    def read(self, index: int) -> bytes:
        """The bytes of an image, after a few more tries if the disk or server did not answer."""
        return read_again(functools.partial(self.reader.read, index))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the lines `path<TAB>size<TAB>class`, the same for folder, zip, tar and pack."""
        digest = hashlib.sha256()
        for start in range(0, len(self), LINES):
            names = self.reader.names[start : start + LINES].tolist()
            sizes = self.reader.sizes[start : start + LINES].tolist()
            lines = (
                b"%s\t%d\t%s\n" % (name, size, name.split(b"/", 1)[0])
                for name, size in zip(names, sizes, strict=True)
            )
            digest.update(b"".join(lines))
        return digest.hexdigest()

    def _train_sample(self, epoch: int, index: int, repeat: int = 0) -> TrainSample:
        bad = []
        for candidate in self._candidates(epoch, index):
            try:
                image = self._image(candidate)
            except UnreadableError as error:
                bad.append(BadFile(self.path(candidate), str(error), epoch, index))
                continue
            # Without the repeat where it is the first, as for images that are not repeated.
            reseed(key(self.seed, "sample", epoch, index, *([repeat] if repeat else [])))
            image = self._transform_at(epoch)(image)
            image, ops = image if isinstance(image, tuple) else (image, torch.empty(0, 2))
            return TrainSample(image, int(self.labels[index]), bad, ops)
        raise DataError(
            f"{bad[0].path}: {bad[0].reason}; of {len(bad)} images tried in class "
            f"{self.classes[self.labels[index]]} none can be read; repair the class"
        )

    def _transform_at(self, epoch: int) -> Callable[[torch.Tensor], torch.Tensor]:
        begun = [transform for first, transform in self.later_transforms if first <= epoch]
        return begun[-1] if begun else self.transform

    def _eval_sample(self, index: int) -> EvalSample:
        try:
            image = self._image(index)
        except UnreadableError as error:
            if not self.skip_bad:
                raise DataError(
                    f"{self.path(index)}: {error}; evaluation never substitutes an image: restore "
                    "the file, or let it count as wrong with TEST.SKIP_BAD=True"
                ) from error
            black = torch.zeros_like(self.transform(decode_pixels(SAMPLE)))
            bad = BadFile(self.path(index), str(error), None, index)
            return EvalSample(black, NO_LABEL, index, [bad])
        return EvalSample(self.transform(image), int(self.labels[index]), index, [])

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """`index`, then others of its class in an order that is a function of seed and position."""
        yield index
        others = np.flatnonzero(self.labels == self.labels[index]).tolist()
        others.remove(index)
        for attempt in range(min(SUBSTITUTES, len(others))):
            word = key(self.seed, "substitute", epoch, index, attempt)
            yield others.pop(word % len(others))

    def _image(self, index: int) -> torch.Tensor:
        data = b""
        try:
            data = self.read(index)
            if self.checksums is not None:
                digest = hashlib.sha256(data).digest()
                if digest != self.checksums[index].tobytes():
                    raise ValueError("its SHA-256 differs from that in the index of DATA.VERIFY")
            return decode_pixels(data, apply_exif=self.apply_exif)
        except UNREADABLE as error:
            if (
                shortage := find_shortage(error)
            ) is not None:  # the machine's fault, not the file's
                raise StorageError(str(shortage)) from error
            reason = getattr(error, "strerror", None) or str(error)
            size = len(data) or self.reader.sizes[index]
            raise UnreadableError(
                f"cannot be read as an image ({type(error).__name__}: {reason}), "
                f"{size} bytes, the first are {data[:16]!r}"
            ) from error


def image_index(item: int | tuple[int, int, int]) -> int:
    """The image of a sample's address: of an evaluation, or of training."""
    return item if isinstance(item, int) else item[1]


def read_checksums(path: str | Path, split: str, names: list[bytes]) -> np.ndarray:
    """SHA-256 of each image of `split` in `names`, uint8 [N, 32], from an index of tools/doctor.py --sha.

    Raises DataError if the index cannot be read or lacks an image.
    """
    remedy = "make it with tools/doctor.py --sha, or leave DATA.VERIFY empty"
    position = {os.fsdecode(name): index for index, name in enumerate(names)}
    checksums = np.zeros((len(names), 32), dtype=np.uint8)
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                if record["split"] == split and "sha256" in record:
                    index = position.pop(record["name"], None)
                    if index is not None:
                        checksums[index] = np.frombuffer(bytes.fromhex(record["sha256"]), np.uint8)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read as an index ({error.strerror}); {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of images ({error}); {remedy}") from error
    if position:
        raise DataError(
            f"{path}: has no SHA-256 of {len(position)} of the {len(names)} {split} images, such as "
            f"{next(iter(position))}; {remedy}"
        )
    return checksums


def _split_by_hash(reader: Reader, share: float, part: str) -> Reader:
    """The images of `part`: a file is held out if the hash of its path is among the lowest `share`.

    So the files of both parts stay there when others are added or removed.
    """
    limit = round(share * 2**64)
    hashes = (hashlib.blake2b(name, digest_size=8).digest() for name in reader.names.tolist())
    held_out = np.fromiter((int.from_bytes(h, "little") < limit for h in hashes), bool)
    for name, (start, end) in reader.class_ranges().items():
        if held_out[start:end].all() or not held_out[start:end].any():
            raise DataError(
                f"{reader.path}: DATA.HOLDOUT {share:g} holds {held_out[start:end].sum()} of the {end - start} "
                f"images of class {name} out, expected at least one in each part; "
                "add images, change the share, or make a val split"
            )
    return reader.subset(held_out if part == "holdout" else ~held_out)
