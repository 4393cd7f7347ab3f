"""Raw datasets: the images of a published dataset, read part by part from its download.

Downloads are streamed: at most one image, batch or row group is in memory.
"""

import functools
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.readers import MAX_BYTES
from utils.errors import DataError
from utils.text import join_some

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # stays inside its folder, is not hidden

DAMAGED = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError)


class RawImage(NamedTuple):
    """An image file to be written as `<class_name>/<file_name>`."""

    class_name: str
    file_name: str
    data: bytes


class Part(NamedTuple):
    """The unit of progress: written completely, or written again by the next run.

    name: unique in its split.
    size: of what it is read from, in bytes or files; another size means another content.
    images: to be read before the next part is asked for, or not at all.
    """

    name: str
    size: int
    images: Iterator[RawImage]


class RawDataset:
    """The download of a dataset; the base of those in this package.

    splits: those that the download holds, of "train" and "val".
    classes: every class name.
    counts: the published number of images by split.
    hint: how to recognise an intact download, for messages.
    settings: what decides the bytes of the images, besides the download.
    """

    splits: Sequence[str] = ("train", "val")
    classes: Sequence[str]
    counts: Mapping[str, int]
    hint = ""
    settings: Mapping[str, int | str] = {}

    def parts(self, split: str) -> Iterator[Part]:
        """The parts of a split, always in the same order. Raises DataError."""
        raise NotImplementedError

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The class names, to look one up."""
        return frozenset(self.classes)

    def place(self, split: str) -> Path:
        """The file or folder with the images of a split, for messages."""
        return Path(split)

    def layout(self, split: str) -> str:
        """How the images lie in there, for messages."""
        return f"images of {join_some(self.classes, 3)}"


def is_image(name: str) -> bool:
    """Whether a file name has an image's extension and is not hidden."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.lower().endswith(IMG_EXTENSIONS)


def require_source(path: Path, remedy: str = "") -> None:
    """Raise DataError unless there is something at `path` that may be read; `remedy` is for where there is nothing."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            os.listdir(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist{remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check access") from error


# --- Folders --------------------------------------------------------------------------------------


def folder_files(folder: Path) -> list[str]:
    """The names of the image files in `folder`, sorted. Raises DataError."""
    try:
        return sorted(name for name in os.listdir(folder) if is_image(name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check access") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file of the download. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from error


def folder_parts(folder: Path) -> Iterator[Part]:
    """The class folders in `folder`, one a part."""
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check access") from error
    for name in classes:
        files = folder_files(folder / name)
        yield Part(name, len(files), _folder_images(folder / name, files))


def _folder_images(folder: Path, files: list[str]) -> Iterator[RawImage]:
    for file in files:
        yield RawImage(folder.name, file, read_file(folder / file))


# --- Tar files ------------------------------------------------------------------------------------


def open_file(path: Path) -> IO[bytes]:
    """An open file of the download. Raises DataError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check access") from error


def tar_members(
    file: IO[bytes], path: Path, start: int = 0
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Every file in a tar, with its open content, which has to be read before the next.

    file: the archive, which begins at byte `start` of `path`; .tgz and .gz are unpacked.
    Raises DataError, naming the byte, where it is cut off or damaged.
    """
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:gz" if _is_gzip(path) else "r:") as archive:
            for member in archive:
                offset = member.offset
                if member.isdir():
                    continue
                # A negative size would send tarfile round in a circle.
                if not member.isfile() or member.issparse() or member.size < 0:
                    raise tarfile.ReadError(f"{member.name} is a link, a device or sparse")
                yield member, archive.extractfile(member)
                archive.members.clear()  # which tarfile keeps for access by name
            offset = archive.offset
            archive.fileobj.seek(offset)
            # tarfile takes a damaged header for the end, which is a block of zeros.
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except DAMAGED as error:
        raise damaged(path, start + offset, error) from error


def tar_files(file: IO[bytes], path: Path, start: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a tar; like `tar_members`."""
    for member, content in tar_members(file, path, start):
        if member.size > MAX_BYTES:
            raise DataError(
                f"{path}: {member.name} has {member.size:,} bytes, more than {MAX_BYTES >> 20} MiB; "
                "expected images"
            )
        try:
            yield member.name.removeprefix("./"), content.read()
        except DAMAGED as error:
            raise damaged(path, start + member.offset, error) from error


def damaged(path: Path, offset: int, error: Exception) -> DataError:
    """The error of an archive that ends too early or holds other bytes than it should."""
    where = f"byte {offset:,} of its unpacked content" if _is_gzip(path) else f"byte {offset:,}"
    return DataError(
        f"{path}: cut off or damaged at {where} ({error}). "
        "Download it again and run the same command: it resumes."
    )


def _is_gzip(path: Path) -> bool:
    return path.suffix in (".gz", ".tgz")
