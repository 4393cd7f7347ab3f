"""Scenes for detectors and segmenters: handwritten digits on photographs; boxes and masks are known by construction."""

import functools
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.decode import UNREADABLE, decode
from data.readers import open_split
from tools.datasets.digits import Digits
from utils.errors import DataError
from utils.rng import key

CLASSES = ("background", *Digits.classes)
MAX_DIGITS = 4
SHARE = (0.2, 0.5)  # of the scene's side, that a digit has
CROP = (0.6, 1.0)  # of the photograph's shorter side, that the background has
OPAQUE = 0.5  # ink from which a pixel belongs to its digit
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # of scikit-learn


class Scene(NamedTuple):
    """An image with N digits, whose boxes do not overlap.

    image: uint8 [3, size, size]
    boxes: float32 [N, 4]: left, top, right, bottom in pixels, the narrowest around the pixels of a digit
    labels: int64 [N], indices of `CLASSES`
    mask: int64 [size, size], the label of each pixel, 0 for the background
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor


@functools.cache
def read_digits(split: str) -> list[tuple[Image.Image, int]]:
    """The digits of `split` in shades of grey, with their labels."""
    (part,) = Digits().parts(split)
    return [(decode(image.data).convert("L"), 1 + int(image.class_name)) for image in part.images]


class Scenes(Dataset):
    """`count` scenes of `size` pixels a side; each is a function of `seed`, `split` and its index.

    split: "train" or "val": which digits of scikit-learn are drawn, and which photographs are behind them.
    data_path: images as main.py takes them, with the split `split`; None: two photographs of scikit-learn.

    Raises DataError where there are no images, and for one that cannot be read.
    """

    def __init__(self, split: str, size: int, count: int, *, data_path: Path | None, seed: int):
        self.split, self.size, self.count, self.seed = split, size, count, seed
        self.reader = None if data_path is None else open_split(data_path, split)
        self.digits = read_digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.default_rng(key(self.seed, "scene", self.split, index))
        pixels = self._background(rng)  # float32 [size, size, 3]
        mask = np.zeros((self.size, self.size), np.int64)
        taken = np.zeros_like(mask, bool)  # by a box
        boxes, labels = [], []
        for _ in range(rng.integers(1, MAX_DIGITS + 1)):
            ink, label = self._digit(rng)  # float32 [height, width]
            (height, width), colour = ink.shape, rng.integers(0, 2, 3) * np.float32(255)
            top, left = rng.integers(0, (self.size - height + 1, self.size - width + 1))
            place = slice(top, top + height), slice(left, left + width)
            if taken[place].any():
                continue
            taken[place] = True
            pixels[place] += ink[..., None] * (colour - pixels[place])
            mask[place][ink > OPAQUE] = label
            boxes.append((left, top, left + width, top + height))
            labels.append(label)
        image = torch.from_numpy(pixels.round().astype(np.uint8)).permute(2, 0, 1).contiguous()
        return Scene(
            image, torch.tensor(boxes).float(), torch.tensor(labels), torch.from_numpy(mask)
        )

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A random square of a random photograph, float32 [size, size, 3] from 0 to 255."""
        photo = self._photograph(rng)
        side = round(min(photo.size) * rng.uniform(*CROP))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        square = photo.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
        return np.array(square, np.float32)

    def _photograph(self, rng: np.random.Generator) -> Image.Image:
        if self.reader is None:
            name = PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]
            return decode((resources.files("sklearn.datasets.images") / name).read_bytes())
        number = int(rng.integers(len(self.reader.names)))
        try:
            return decode(self.reader.read(number))
        except UNREADABLE as error:
            name = self.reader.names[number].decode(errors="replace")
            raise DataError(
                f"{self.reader.path}: {name} cannot be read ({error}); restore or remove it"
            ) from error

    def _digit(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A digit's ink, from 0 to 1, cut to its opaque pixels, and its label."""
        picture, label = self.digits[rng.integers(len(self.digits))]
        side = round(self.size * rng.uniform(*SHARE))
        ink = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        rows, columns = (np.flatnonzero((ink > OPAQUE).any(axis)) for axis in (1, 0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], label
