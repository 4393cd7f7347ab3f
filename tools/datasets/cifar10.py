"""CIFAR-10 from its python version: 50,000 training and 10,000 test images of 32×32 pixels.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. The test images become
the `val` split, as is usual.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from tools.datasets.download import download
from tools.datasets.raw_dataset import Part, RawDataset, RawImage, require_source
from utils.errors import DataError

BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
FOLDER = CIFAR10.base_folder

# What a NumPy array in a pickle refers to; bytes, dicts, lists and integers need no name.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),  # before NumPy 2
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class Cifar10(RawDataset):
    """The pickled batches in an archive or folder.

    path: cifar-10-python.tar.gz, the extracted folder or the folder that holds either; None
    downloads the archive to `downloads`.
    quality: of JPEGs; None writes lossless PNGs, which take longer to decode.
    """

    classes = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    counts: Mapping[str, int] = {"train": 50_000, "val": 10_000}
    hint = f"The MD5 of {CIFAR10.filename} is {CIFAR10.tgz_md5}."

    def __init__(self, path: Path | None, downloads: Path, quality: int | None = None):
        self._path = None if path is None else _locate(path)
        self._downloads = downloads
        self._quality = quality
        self.settings = {"quality": quality or "lossless"}

    def parts(self, split: str) -> Iterator[Part]:
        """The batches of a split."""
        if self._path is None:
            self._path = download(CIFAR10.url, CIFAR10.tgz_md5, self._downloads)
        first = 0
        for name in BATCHES[split]:
            content = _read(self._path, name)
            pixels, labels = load_batch(content, self._path / name)
            yield Part(name, len(content), self._images(pixels, labels, first))
            first += len(labels)

    def _images(self, pixels: np.ndarray, labels: list[int], first: int) -> Iterator[RawImage]:
        for number, (array, label) in enumerate(zip(pixels, labels, strict=True), first):
            buffer = io.BytesIO()
            picture = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
            if self._quality is None:
                picture.save(buffer, "PNG")
            else:
                picture.save(buffer, "JPEG", quality=self._quality)
            extension = "png" if self._quality is None else "jpg"
            yield RawImage(self.classes[label], f"{number:05d}.{extension}", buffer.getvalue())


def _locate(path: Path) -> Path:
    """The archive or the folder of batches that `path` is or holds. Raises DataError."""
    require_source(path, "; leave SOURCE out to download it")
    for candidate in (path, path / FOLDER, path / CIFAR10.filename):
        if candidate.is_file() or (candidate / "data_batch_1").is_file():
            return candidate
    raise DataError(f"{path}: expected {CIFAR10.filename}, {FOLDER} or a folder that holds either")


def _read(path: Path, name: str) -> bytes:
    """The bytes of a batch. Raises DataError."""
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        with tarfile.open(path, "r:gz") as archive:
            return archive.extractfile(f"{FOLDER}/{name}").read()
    except PermissionError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check access") from error
    except (OSError, EOFError, KeyError, AttributeError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: {name} cannot be read ({error}); download it again") from error


class _Unpickler(pickle.Unpickler):
    """Loads plain values and NumPy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_batch(content: bytes, path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [N, 3, 32, 32] and labels of a pickled batch. Raises DataError, naming `path`."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[b"labels"]
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"it holds pixels {pixels.dtype} {pixels.shape}")
        if not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("its labels are not integers from 0 to 9")
    except (
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError),
        *(AttributeError, ImportError, OverflowError, MemoryError),
    ) as error:
        raise DataError(
            f"{path}: not a batch of CIFAR-10's python version ({error}); download it again"
        ) from error
    return pixels.reshape(-1, 3, 32, 32), labels
