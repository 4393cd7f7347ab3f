"""Imagenette, ten classes of ImageNet: 9,469 training and 3,925 validation photographs.

https://github.com/fastai/imagenette, its second version. Most photographs are from ImageNet's
training set: a model trained on ImageNet must not be judged on them.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from tools.datasets.download import download
from tools.datasets.raw_dataset import (
    Part,
    RawDataset,
    RawImage,
    folder_parts,
    is_image,
    open_file,
    require_source,
    tar_files,
)
from utils.errors import DataError

URL = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {  # size: file, MD5
    "full": ("imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    "320px": ("imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    "160px": ("imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
}


class Imagenette(RawDataset):
    """An archive of any size, or its extracted folder.

    path: the archive, the folder of `train` and `val`, or the folder that holds either; None
    downloads the archive of `size` to `downloads`.
    """

    classes = (
        *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
        *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
    )
    counts: Mapping[str, int] = {"train": 9_469, "val": 3_925}
    hint = "The MD5 is " + ", ".join(f"{md5} of {file}" for file, md5 in ARCHIVES.values()) + "."

    def __init__(self, path: Path | None, downloads: Path, size: str = "160px"):
        self._path = None if path is None else _locate(path)
        self._downloads = downloads
        self._size = size
        self.settings = {} if path else {"size": size}

    def place(self, split: str) -> Path:
        """The archive or the folder of the split."""
        path = self._path or self._downloads
        return path / split if path.is_dir() else path

    def layout(self, split: str) -> str:
        """In words."""
        return f"{split}/<class>/<image>"

    def parts(self, split: str) -> Iterator[Part]:
        """The class folders of a split; all of an archive's as one."""
        if self._path is None:
            file, md5 = ARCHIVES[self._size]
            self._path = download(URL + file, md5, self._downloads)
        if self._path.is_dir():
            yield from folder_parts(self._path / split)
        else:
            with open_file(self._path) as file:
                size = os.fstat(file.fileno()).st_size
                yield Part(self._path.name, size, self._archived(file, split))

    def _archived(self, file: IO[bytes], split: str) -> Iterator[RawImage]:
        for name, data in tar_files(file, self._path):
            match name.split("/"):
                case [*_, found, class_name, file_name] if found == split and is_image(name):
                    yield RawImage(class_name, file_name, data)


def _locate(path: Path) -> Path:
    """The archive or the folder of splits that `path` is or holds. Raises DataError."""
    require_source(path, "; leave SOURCE out to download it")
    if path.is_file() or (path / "train").is_dir():
        return path
    found = [folder.parent for folder in path.glob("imagenette2*/train")]
    found = found or sorted(path.glob("imagenette2*.tgz"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{path}: expected one of {', '.join(file for file, _ in ARCHIVES.values())} or its "
            f"folder, found {names}; name the one to read"
        )
    return found[0]
