"""What is sample i? Images with labels, addressed by position, and what happens to bad files.

An evaluation sample is addressed by its index. A training sample is addressed by (epoch, index),
which fixes every random number of its augmentation and, if its file is damaged, its substitute.
"""

import errno
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.checksums import read_checksums
from data.decode import SAMPLE, UNREADABLE, decode_pixels
from data.readers import open_split
from utils.errors import DataError
from utils.rng import key, reseed

SUBSTITUTES = 10  # tried before a class is given up
NO_LABEL = -1  # of an image that cannot be read, where an evaluation may go on without it

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


class EvalSample(NamedTuple):
    """An image uint8 [3, H, W] with its position in the dataset; black if its file is `bad`."""

    image: torch.Tensor
    label: int
    index: int
    bad: list[BadFile]


class UnreadableError(Exception):
    """One image is damaged; stays inside this module."""


class ImageDataset(Dataset):
    """The images of `<root>/<split>`, a folder, .zip or .tar of `<class>/<file>`.

    classes: the class list that decides the labels, in order; by default the sorted folder names.
    allow_missing: declares the split a subset, so that classes may have no images.
    transform: an image's pixels, uint8 [height, width, 3], to uint8 [3, H, W].
    seed: of the augmentation and of substitutes; only training uses it.
    upright: turn images as their EXIF data asks for.
    checksums: index of tools/doctor.py --sha with which the bytes of each image are compared.
    skip_bad: in evaluation, an image that cannot be read is black and its label is `NO_LABEL`.

    Raises DataError for a split that is not there, has no class folders, an empty class, a class
    that `classes` does not have, or lacks one that it has.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        transform: Callable[[torch.Tensor], torch.Tensor],
        train: bool = False,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        allow_missing: bool = False,
        upright: bool = False,
        checksums: str | Path | None = None,
        skip_bad: bool = False,
    ):
        self.source = open_split(root, split)
        self.transform = transform
        self.train = train
        self.seed = seed
        self.upright = upright
        self.skip_bad = skip_bad
        self.classes = sorted(self.source.folders) if classes is None else list(classes)
        owners = [os.fsdecode(name.split(b"/", 1)[0]) for name in self.source.names.tolist()]
        self._check_classes(set(owners), allow_missing)
        position = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([position[owner] for owner in owners], dtype=np.int32)
        self.checksums = None
        if checksums is not None:
            self.checksums = read_checksums(checksums, split, self.source.names.tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, int]) -> TrainSample | EvalSample:
        return self._train_sample(*item) if self.train else self._eval_sample(item)

    def __str__(self) -> str:
        return (
            f"{self.source.path}: {len(self)} images, {len(self.classes)} classes, "
            f"{self.source.ignored} other files ignored"
        )

    def path(self, index: int) -> str:
        """Where image `index` lies, for people; inside an archive, as if that were a folder."""
        name = self.source.names[index].decode(errors="backslashreplace")
        return os.path.join(self.source.path, name)

    def read(self, index: int) -> bytes:
        """The bytes of an image, after a few more tries if the disk or server did not answer."""
        for pause in PAUSES:
            try:
                return self.source.read(index)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                time.sleep(pause)
        return self.source.read(index)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the lines `path<TAB>size<TAB>class`, the same for folder, zip and tar."""
        digest = hashlib.sha256()
        sizes = self.source.where[:, 0].tolist()
        for name, size, label in zip(
            self.source.names.tolist(), sizes, self.labels.tolist(), strict=True
        ):
            digest.update(b"%s\t%d\t%s\n" % (name, size, os.fsencode(self.classes[label])))
        return digest.hexdigest()

    def _check_classes(self, filled: set[str], allow_missing: bool) -> None:
        path, folders, known = self.source.path, self.source.folders, set(self.classes)
        if unknown := folders - known:
            raise DataError(
                f"{path}: {_some(unknown)} not in the class list of {len(known)} "
                f"({_some(known)}); use the data that the list is from, or remove the folders"
            )
        if empty := folders - filled:
            raise DataError(
                f"{path}: no image in {_some(empty)}; expected at least one per class folder, "
                "fill or remove it"
            )
        if (missing := known - folders) and not allow_missing:
            raise DataError(
                f"{path}: no folder for {_some(missing)} of the {len(known)} classes; "
                "complete the data, or declare it a subset"
            )

    def _train_sample(self, epoch: int, index: int) -> TrainSample:
        bad = []
        for candidate in self._candidates(epoch, index):
            try:
                image = self._image(candidate)
            except UnreadableError as error:
                bad.append(BadFile(self.path(candidate), str(error), epoch, index))
                continue
            reseed(key(self.seed, "sample", epoch, index))
            return TrainSample(self.transform(image), int(self.labels[index]), bad)
        raise DataError(
            f"{bad[0].path}: {bad[0].reason}; of {len(bad)} images tried in class "
            f"{self.classes[self.labels[index]]} none can be read; repair the class"
        )

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
        others = np.flatnonzero(self.labels == self.labels[index])
        others = others[others != index]
        for attempt in range(min(SUBSTITUTES, len(others))):
            word = key(self.seed, "substitute", epoch, index, attempt)
            yield int(others[word % len(others)])

    def _image(self, index: int) -> torch.Tensor:
        data = b""
        try:
            data = self.read(index)
            if self.checksums is not None:
                digest = hashlib.sha256(data).digest()
                if digest != self.checksums[index].tobytes():
                    raise ValueError("its SHA-256 is another than in the index of DATA.VERIFY")
            return decode_pixels(data, upright=self.upright)
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error)
            size = len(data) or self.source.where[index, 0]
            raise UnreadableError(
                f"cannot be read as an image ({type(error).__name__}: {reason}), "
                f"{size} bytes, the first are {data[:16]!r}"
            ) from error


def read_class_list(path: str | Path) -> list[str]:
    """Class names from a text file, one folder name per line; the line's number is the label.

    Raises DataError if the file cannot be read, is empty or names a class twice.
    """
    try:
        classes = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a class list ({error})") from error
    classes = [name.strip() for name in classes if name.strip()]
    if not classes:
        raise DataError(f"{path}: names no class, expected one folder name per line")
    if twice := {name for name in classes if classes.count(name) > 1}:
        raise DataError(f"{path}: names {_some(twice)} more than once; remove the repeated lines")
    return classes


def _some(names: set[str]) -> str:
    """The first few of `names`, for a message."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
