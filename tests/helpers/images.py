"""Small image trees and damaged files for the tests."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def write_image_folder(
    root: Path, classes: int = 4, train: int = 8, val: int = 4, size: int = 40
) -> Path:
    """`train` and `val` JPEGs per class below `root`, in ImageNet's layout; returns `root`.

    Each class has its own colour under the noise, so that a small model can learn them.
    """
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (classes, 3))
    for split, count in (("train", train), ("val", val)):
        for label, colour in enumerate(colours):
            folder = Path(root) / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = colour + rng.integers(-40, 41, (size, size, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(folder / f"{number:03d}.jpg", quality=90)
    return Path(root)


def as_they_are(pixels: torch.Tensor) -> torch.Tensor:
    """The transform that changes nothing: [height, width, 3] to [3, height, width]."""
    return pixels.permute(2, 0, 1)


def write_zip(folder: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> None:
    """The tree below `folder` as a zip file, every name starting with `prefix`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            member = zipfile.ZipInfo.from_file(file, prefix + str(file.relative_to(folder)))
            if file.is_dir():
                archive.writestr(member, b"")
                continue
            member.compress_type = method
            # Gives the local header an extra field that the directory does not have, as zip does.
            with archive.open(member, "w", force_zip64=True) as target:
                target.write(file.read_bytes())


def write_tar(folder: Path, path: Path, prefix: str = "") -> None:
    """The tree below `folder` as an uncompressed tar file."""
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=prefix or ".")


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    """`picture` as the bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
