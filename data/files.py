"""Where do the images of a split lie, and how are their bytes read?

A split is a folder, a pack, a zip or a tar with the same tree `<class>/<file>` inside. An archive's
directory is read once; its members are read in place, by position, in any number of processes.
"""

import functools
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.index import Listing, change_time, load_listing, save_listing
from data.pack import read_index, shard_name
from utils.errors import DataError

Where = tuple[int, ...]  # a file's size and what else its source needs to find it

LAYOUT = "expected <root>/train and <root>/val (or validation), each a folder, .pack, .zip or .tar"


class Source:
    """The images of one split, sorted by relative path; the base of those below.

    names: bytes [N], `<class>/<file>`, the same for the same tree in a folder or an archive.
    where: int64 [N, k], column 0 the size in bytes.
    folders: the class folders, empty ones included.
    ignored: how many files were passed over because they are hidden, not images or in no class.
    """

    def __init__(self, path: Path, images: dict[str, Where], folders: set[str], ignored: int):
        loose = [name for name in images if "/" not in name]
        if not folders:
            found = f"{len(loose)} images and no class folder" if loose else "no image"
            raise DataError(
                f"{path}: holds {found}, expected <class>/<image>; "
                "sort the images into one folder per class"
            )
        names = sorted(os.fsencode(name) for name in images if "/" in name)
        where = np.array([images[os.fsdecode(name)] for name in names], dtype=np.int64)
        self._keep(path, np.array(names, dtype=np.bytes_), where, folders, ignored + len(loose))

    def _keep(
        self, path: Path, names: np.ndarray, where: np.ndarray, folders: set[str], ignored: int
    ) -> None:
        self.path = str(path)
        self.names = names
        self.where = where
        self.folders = folders
        self.ignored = ignored

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError, EOFError, ValueError or zlib.error if damaged."""
        raise NotImplementedError


class Folder(Source):
    """A split of files in class folders; links are followed, never into a folder seen before.

    What was found is kept for the next time (`data/index.py`).
    """

    def __init__(self, path: Path):
        if (known := load_listing(path)) is not None:
            classes = {os.fsdecode(name) for name in known.classes.tolist()}
            self._keep(path, known.names, known.sizes[:, None], classes, int(known.ignored))
            return
        images: dict[str, Where] = {}
        folders, ignored = set(), 0
        seen, pending, times = {_identity(path)}, [("", path)], {}
        while pending:
            prefix, folder = pending.pop()
            times[os.fsencode(prefix)] = change_time(path, prefix)  # before its content is listed
            for entry in sorted(_list(folder), key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.name.startswith("."):
                    ignored += 1
                elif entry.is_dir():
                    if not prefix:
                        folders.add(name)
                    if (identity := _identity(entry.path)) not in seen:
                        seen.add(identity)
                        pending.append((f"{name}/", entry.path))
                elif name.lower().endswith(IMG_EXTENSIONS):
                    # A dangling link counts as a damaged image: dropping it would hide a loss.
                    images[name] = (entry.stat().st_size if entry.is_file() else 0,)
                else:
                    ignored += 1
        super().__init__(path, images, folders, ignored)
        listing = Listing(
            self.names,
            self.where[:, 0],
            classes=np.array([os.fsencode(name) for name in folders], np.bytes_),
            ignored=np.array(self.ignored),
            folders=np.array(list(times), np.bytes_),
            times=np.array(list(times.values()), np.int64),
        )
        save_listing(path, listing)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError if the file cannot be read."""
        with open(os.path.join(self.path, os.fsdecode(self.names[index])), "rb") as file:
            return file.read()


class Pack(Source):
    """A split that tools/pack.py has written, every file checked against its CRC-32."""

    def __init__(self, path: Path):
        names, where, self.info = read_index(path)
        classes = {os.fsdecode(name.split(b"/", 1)[0]) for name in names.tolist()}
        self._keep(path, names, where, classes, 0)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError, EOFError or ValueError if they are damaged."""
        size, shard, offset, crc = self.where[index].tolist()
        data = _pread(os.path.join(self.path, shard_name(shard)), size, offset)
        if zlib.crc32(data) != crc:
            raise ValueError(
                f"record {index}, at byte {offset} of {shard_name(shard)}: "
                "CRC-32 differs from the index"
            )
        return data


class Zip(Source):
    """A split inside a zip file, members stored or deflated, each checked against its CRC-32."""

    def __init__(self, path: Path):
        files: dict[str, Where] = {}
        directories = []
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: not a readable zip file ({error}); copy or pack it again"
            ) from error
        for member in members:
            if member.is_dir():
                directories.append(member.filename)
                continue
            method, encrypted = member.compress_type, member.flag_bits & 1
            if encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{path}: member {member.filename} is encrypted or compressed by method "
                    f"{method}, expected stored or deflated; pack it again with zip -0 -r"
                )
            sizes = member.file_size, member.header_offset, member.compress_size
            files[member.filename] = (*sizes, method, member.CRC)
        super().__init__(path, *_tree(files, directories))

    def read(self, index: int) -> bytes:
        """The bytes of member `index`; EOFError, ValueError or zlib.error if it is damaged."""
        size, header, packed, method, crc = self.where[index].tolist()
        # The local header's extra fields are its own: only it knows its length.
        name_length, extra_length = struct.unpack("<26x2H", _pread(self.path, 30, header))
        data = _pread(self.path, packed, header + 30 + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("CRC-32 differs from the zip file's directory")
        return data


class Tar(Source):
    """A split inside an uncompressed tar file."""

    def __init__(self, path: Path):
        try:
            with tarfile.open(path, "r:") as archive:
                members = archive.getmembers()
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f"{path}: not a readable uncompressed tar file ({error}); copy or pack it again"
            ) from error
        files = {m.name: (m.size, m.offset_data) for m in members if m.isfile()}
        super().__init__(path, *_tree(files, [m.name for m in members if m.isdir()]))

    def read(self, index: int) -> bytes:
        """The bytes of member `index`; EOFError if the archive ends before it does."""
        size, offset = self.where[index].tolist()
        return _pread(self.path, size, offset)


def open_split(root: str | Path, split: str) -> Source:
    """The source of `split` below `root`: a pack, else a folder, a zip or a tar.

    `val` may also be called `validation`. Raises DataError when there is none, when it cannot be
    listed or when it has no class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}")
    for name in (split, "validation") if split == "val" else (split,):
        for suffix, kind, exists in (
            (".pack", Pack, Path.is_dir),
            ("", Folder, Path.is_dir),
            (".zip", Zip, Path.is_file),
            (".tar", Tar, Path.is_file),
        ):
            path = root / (name + suffix)
            if exists(path):
                return kind(path)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise DataError(f"{root}: has no {split} split, found {found}; {LAYOUT}")


def _identity(path: str | Path) -> tuple[int, int]:
    """Device and inode: equal for all the paths that lead to one folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _list(folder: str | Path) -> Iterable[os.DirEntry]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check access") from error


def _tree(
    files: dict[str, Where], directories: list[str]
) -> tuple[dict[str, Where], set[str], int]:
    """Images, class folders and number of ignored files of an archive.

    A single folder around all the classes (`train/<class>/<file>`) is dropped.
    """
    visible = {_clean(name): where for name, where in files.items() if not _is_hidden(name)}
    images = {n: where for n, where in visible.items() if n.lower().endswith(IMG_EXTENSIONS)}
    folders = [f"{_clean(name)}/" for name in directories if not _is_hidden(name)]
    ignored = len(files) - len(images)
    tops = {name.split("/")[0] for name in images}
    if len(tops) == 1 and all(name.count("/") > 1 for name in images):
        top = f"{tops.pop()}/"
        images = {name.removeprefix(top): where for name, where in images.items()}
        folders = [name.removeprefix(top) for name in folders if name.startswith(top)]
    classes = {name.split("/")[0] for name in (*folders, *images) if "/" in name}
    return images, classes - {""}, ignored


def _clean(name: str) -> str:
    """A member's name without what tar and zip may put before, between and after its parts."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _is_hidden(name: str) -> bool:
    """Whether a part of the path starts with a dot, as `..` does, which has no place here."""
    return any(part.startswith(".") for part in _clean(name).split("/"))


@functools.lru_cache(maxsize=16)
def _handle(path: str, pid: int) -> io.FileIO:
    """An open file per archive and process: a forked worker does not share its parent's."""
    return open(path, "rb", buffering=0)


def _pread(path: str, length: int, offset: int) -> bytes:
    data = os.pread(_handle(path, os.getpid()).fileno(), length, offset)
    if len(data) != length:
        raise EOFError(f"the archive ends inside the file: {len(data)} of {length} bytes")
    return data
