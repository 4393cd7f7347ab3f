#!/usr/bin/env python
"""Corrupted copies of a test set: ImageNet-C's 15 corruptions and 4 further ones, in five severities.

Writes OUT/<corruption>/<severity>/<class>/<file> from the class folders in SRC, a folder, .zip, .tar or .pack. As
ImageNet-C was made: the shorter side is resized to 256 pixels, the centre of 224 is cropped, corrupted and saved as
JPEG of quality 85. The same command resumes where it was stopped. What an image becomes depends on --seed, its name,
the corruption and the severity alone, not on the order or --workers. main.py --eval refuses a cell that lacks images.

The corruptions are those of Hendrycks and Dietterich (arXiv 1903.12261) in the package imagecorruptions-imaug:
    pip install imagecorruptions-imaug
and on a machine without a display's libraries
    pip install --no-deps imagecorruptions-imaug && pip install opencv-python-headless numba scikit-image
Its motion blur and snow replace ImageMagick's, and frost draws from six pictures and not five. Numbers on ImageNet are
compared with papers on the published files only. OUT/corruptions.json says how the files were made.

examples:
  python tools/corrupt.py /data/imagenette/val.zip /data/imagenette-sets/imagenette-c
  python tools/corrupt.py /imagenet/val /data/sets/imagenet-c --per-class 5
  python tools/corrupt.py /data/cifar10/val /data/cifar10-sets/cifar10-c --size 0 --corruptions fog contrast
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from torchvision.transforms import functional
from tqdm import tqdm

from analysis.imagenet import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES
from data.decode import UNREADABLE, decode
from data.readers import Reader, open_split
from tools.benchmarks.model import at_least
from utils.errors import ConfigError, DataError, StorageError, as_exit_code
from utils.files import replace_atomically, write_atomically
from utils.machine import available_cores
from utils.rng import key, reseed
from utils.text import quantity

PACKAGE = "imagecorruptions-imaug"
LIBRARIES = (
    "numpy",
    "scipy",
    "skimage",
    "cv2",
    "numba",
    "PIL",
)  # whose versions may change the pixels
SEEDED = (
    "impulse_noise",
    "glass_blur",
)  # draw from generators of their own, so that they take a seed
RESIZE = 256 / 224  # shorter side before the crop, by that after it
QUALITY = 85  # of the JPEGs
SMALLEST = 32  # pixels that the corruptions need


class Corruptor:
    """Writes corrupted copies of a reader's images below `out`.

    size: pixels of a side after the crop; 0 leaves the pictures as they are.
    """

    def __init__(self, reader: Reader, out: Path, size: int, seed: int):
        self.reader = reader
        self.out = out
        self.size = size
        self.seed = seed

    def write(self, index: int, cells: Iterable[tuple[str, int]]) -> None:
        """Write image `index` in every one of `cells`, (corruption, severity), where it does not exist.

        Raises DataError for a file that cannot be read or is too small, StorageError where nothing can be written.
        """
        missing = [cell for cell in cells if not self.path(index, *cell).exists()]
        if not missing:
            return
        pixels = self.load(index)
        for corruption, severity in missing:
            path = self.path(index, corruption, severity)
            picture = Image.fromarray(self.corrupt(index, pixels, corruption, severity))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{path.parent} cannot be made: {error.strerror}.") from error
            with replace_atomically(path) as temporary:
                picture.save(temporary, "JPEG", quality=QUALITY)

    def path(self, index: int, corruption: str, severity: int) -> Path:
        """Where a copy goes: the name of the image, with .jpg behind it unless it is a JPEG's already."""
        name = os.fsdecode(self.reader.names[index])
        name += "" if name.lower().endswith((".jpg", ".jpeg")) else ".jpg"
        return self.out / corruption / str(severity) / name

    def load(self, index: int) -> np.ndarray:
        """The pixels of image `index` before they are corrupted, uint8 [height, width, 3]."""
        file = os.path.join(self.reader.path, os.fsdecode(self.reader.names[index]))
        try:
            picture = decode(self.reader.read(index))
        except UNREADABLE as error:
            raise DataError(f"{file}: {error}. Restore or remove it, then start again.") from error
        if self.size:
            picture = functional.resize(picture, round(self.size * RESIZE))
            picture = functional.center_crop(picture, self.size)
        if min(picture.size) < SMALLEST:
            raise DataError(
                f"{file} has {picture.width}x{picture.height} pixels; the corruptions need at least "
                f"{SMALLEST} a side. Choose a --size."
            )
        return np.asarray(picture)

    def corrupt(self, index: int, pixels: np.ndarray, corruption: str, severity: int) -> np.ndarray:
        """`pixels` after `corruption`, uint8 [height, width, 3]."""
        name = self.reader.names[index].decode(errors="backslashreplace")
        value = key(self.seed, "corrupt", corruption, severity, name)
        reseed(value)
        seed = {"seed": value % 2**32} if corruption in SEEDED else {}
        return import_package().corrupt(pixels, severity, corruption, **seed)


def import_package() -> ModuleType:
    """The module of `PACKAGE`. Raises ConfigError if it is not installed or cannot be imported."""
    try:
        importlib.metadata.version(PACKAGE)
        module = importlib.import_module("imagecorruptions")
        importlib.import_module("cv2").setNumThreads(0)  # the workers share the cores already
    except ImportError as error:  # PackageNotFoundError among them
        raise ConfigError(
            f"tools/corrupt.py needs the package {PACKAGE} ({error}); pip install {PACKAGE}"
        ) from error
    return module


def list_versions() -> dict[str, str]:
    """What may change the pixels beside the settings."""
    versions = {name: importlib.import_module(name).__version__ for name in LIBRARIES}
    return {PACKAGE: importlib.metadata.version(PACKAGE), **versions}


# --- Processes --------------------------------------------------------------------------------------------------------

_corruptor: Corruptor | None = None  # of this worker


def _start_worker(corruptor: Corruptor) -> None:
    global _corruptor
    _corruptor = corruptor


def _write(index: int, cells: list[tuple[str, int]]) -> None:
    _corruptor.write(index, cells)


# --- The command ------------------------------------------------------------------------------------------------------


def open_source(path: Path) -> Reader:
    """The images of SRC: a folder of class folders, or such a tree as .zip, .tar or .pack."""
    path = path.absolute()
    return open_split(path.parent, path.name)


def choose(reader: Reader, per_class: int) -> list[int]:
    """The positions of `per_class` images of each class, of all for 0.

    They are picked by a hash of their names: the same in every cell, and spread over the class.
    """
    names = reader.names.tolist()
    if not per_class:
        return list(range(len(names)))
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    classes = itertools.groupby(range(len(names)), key=lambda i: names[i].split(b"/", 1)[0])
    picked = (sorted(group, key=digests.__getitem__)[:per_class] for _, group in classes)
    return sorted(itertools.chain.from_iterable(picked))


def begin(out: Path, plan: dict) -> None:
    """Record in `out` how its files are made. Raises ConfigError if it holds files that were made in another way."""
    path = out / "corruptions.json"
    if path.exists():
        # Older versions did not record how many images a cell has.
        before = {"images": plan["images"], **json.loads(path.read_text(encoding="utf-8"))}
        if changed := sorted(
            k for k in before.keys() | plan.keys() if before.get(k) != plan.get(k)
        ):
            details = ", ".join(f"{k} was {before.get(k)} and is {plan.get(k)}" for k in changed)
            raise ConfigError(
                f"{out} holds files that were made differently: {details}. Name another folder, or remove it."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be made: {error.strerror}.") from error
    write_atomically(path, json.dumps(plan, indent=1) + "\n")


def list_digest(reader: Reader) -> str:
    """SHA-256 of the names and sizes of all images."""
    digest = hashlib.sha256()
    for name, size in zip(reader.names.tolist(), reader.sizes.tolist(), strict=True):
        digest.update(b"%s\t%d\n" % (name, size))
    return digest.hexdigest()


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="class folders, .zip, .tar or .pack"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument(
        "--corruptions",
        nargs="+",
        choices=known,
        default=CORRUPTIONS,
        metavar="NAME",
        help=f"default: {', '.join(CORRUPTIONS)}; further ones: {', '.join(EXTRA_CORRUPTIONS)}",
    )
    parser.add_argument(
        "--severities", nargs="+", type=int, choices=SEVERITIES, default=SEVERITIES, metavar="1…5"
    )
    parser.add_argument(
        "--size",
        type=at_least(0),
        default=224,
        metavar="PIXELS",
        help="side after the crop (default: 224); 0: pictures as they are",
    )
    parser.add_argument(
        "--per-class",
        type=at_least(1),
        default=0,
        metavar="N",
        help="images of each class, the same in every cell (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=available_cores(),
        metavar="N",
        help="processes (default: one per core)",
    )
    args = parser.parse_args(arguments)
    import_package()
    reader = open_source(args.source)
    indices = choose(reader, args.per_class)
    cells = list(itertools.product(args.corruptions, args.severities))
    corruptor = Corruptor(reader, args.out, args.size, args.seed)
    begin(
        args.out,
        {
            "versions": list_versions(),
            "seed": args.seed,
            "size": args.size,
            "quality": QUALITY,
            "per_class": args.per_class,
            "images": len({corruptor.path(index, *cells[0]) for index in indices}),
            "files": list_digest(reader),
        },
    )
    with (
        ProcessPoolExecutor(
            args.workers,
            initializer=_start_worker,
            initargs=(corruptor,),
        ) as pool,
        tqdm(total=len(indices), unit=" images", desc=str(args.out), disable=None) as bar,
    ):
        for _ in pool.map(_write, indices, itertools.repeat(cells)):
            bar.update()
    print(f"{args.out}: {quantity(len(indices), 'image')} in {quantity(len(cells), 'cell')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
