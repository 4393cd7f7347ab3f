"""Readers: the images of a split in a folder, pack, zip or tar, and their bytes by position; packs and zips on servers.

All hold the same tree `<class>/<file>`. An archive's directory is read once; its members are read in place, by
position, in any number of processes. Nothing is ever unpacked, and an archive that programs would unpack differently
is refused.
"""

import bisect
import contextlib
import copy
import functools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data.listing import (
    HEAD_BYTES,
    HIDDEN,
    LOOSE,
    find_indices,
    is_hidden,
    is_image,
    load_listing,
    require_target,
    save_listing,
    scan_folder,
    suffix_of,
)
from data.names import Names
from data.pack import INFO, read_index, shard_name
from data.ranges import File, LocalFile, open_files, status_of
from data.raw_forms import describe_raw_form
from data.remote import RemotePath
from utils.errors import DataError
from utils.text import join_some, quantity

Where = tuple[int, ...]  # a file's size and what else its reader needs to find it

MAX_BYTES = 64 * 2**20  # of a file that claims to be one image
LOCAL_HEADER = 256  # bytes in front of a zip member, about: 30, its name, extra fields
MAX_RATIO = 200  # of a zip member's size, unpacked and packed; photographs hardly shrink at all
PACK_ZIP = "pack the folder again with zip -0 -r"
PACK_TAR = "pack the folder again with tar --dereference --hard-dereference -c"

SPLITS = ("train", "val", "validation")
LAYOUT = "expected <root>/train and <root>/val (or validation), each a folder, .pack, .zip or .tar"


class Reader:
    """The images of one split, sorted by relative path; the base of those below.

    names: bytes [N], `<class>/<file>`, the same for the same tree in a folder or an archive.
    where: int64 [N, k], column 0 the size in bytes.
    folders: the class folders, empty ones included.
    ignored: how many files were ignored, by their suffix or another reason.
    beside: the split's other forms in the same folder, which are not read.

    Raises DataError if there is no class folder.
    """

    def __init__(
        self,
        path: Path | RemotePath,
        names: np.ndarray | Names,
        where: np.ndarray,
        folders: set[str],
        ignored: Counter[str],
    ):
        if not folders:
            loose = ignored[LOOSE]
            found = f"{quantity(loose, 'image')} and no class folder" if loose else "no image"
            remedy = describe_raw_form(path.parent) if isinstance(path, Path) else None
            if remedy is None and ignored[".tar"]:
                remedy = "tars of classes and shards are prepared with `python tools/prepare.py imagenet DOWNLOAD OUT`"
            raise DataError(
                f"{path}: holds {found}, expected <class>/<image>; "
                f"{remedy or 'sort the images into one folder per class'}"
            )
        self.path = str(path)
        self.names = names
        self.where = where
        self.folders = folders
        self.ignored = ignored
        self.beside: list[str] = []

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each image, int64 [N]."""
        return self.where[:, 0]

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError, EOFError, ValueError or zlib.error if damaged."""
        raise NotImplementedError

    def state(self, index: int) -> list[int | str]:
        """Of the file that image `index` is or lies in: size and times of change, or its server's version.

        Where it is the same as before, nobody has changed the image. Raises OSError.
        """
        raise NotImplementedError

    def prefetch(self, indices: Iterable[int]) -> None:
        """Request the bytes of images that are read soon from their server; does nothing for those on a disk."""

    def describe_unread(self) -> str:
        """A warning of the split's other forms, which are not read; empty without any."""
        if not self.beside:
            return ""
        verb = "is" if len(self.beside) == 1 else "are"
        return f"{self.path} is read; {' and '.join(self.beside)} beside it {verb} not"

    def subset(self, indices: range | np.ndarray) -> "Reader":
        """A reader of the images at `indices` alone, positions in order or a mask."""
        part = copy.copy(self)
        part.names, part.where = self.names[indices], self.where[indices]
        return part

    def class_ranges(self) -> dict[str, tuple[int, int]]:
        """The positions of each class's first image and of the one after its last, for classes that have any."""
        return _class_ranges(self.names)


class StaleListingError(ValueError):
    """A file has another size than when it was listed; `remedy` says what to do if that is meant."""

    def __init__(self, size: int, listed: int, remedy: str):
        super().__init__(f"has {size} bytes, had {listed} when it was listed; {remedy}")
        self.remedy = remedy


class FolderReader(Reader):
    """A split of files in class folders; links are followed, never into a folder seen before.

    What was found is kept for the next time (`data/listing.py`).
    """

    def __init__(self, path: Path):
        known = load_listing(path)
        listing = known or scan_folder(path)
        super().__init__(
            path,
            listing.names,
            listing.sizes[:, None],
            set(map(os.fsdecode, listing.classes.tolist())),
            listing.count_ignored(),
        )
        if known is None:
            save_listing(path, listing)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError or ValueError if it is no file that can be read.

        The ValueError is a StaleListingError for a file that was overwritten by one of another size.
        """
        path = self._file(index)
        # Without O_NONBLOCK, to open a named pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status, listed = os.fstat(descriptor), self.where[index, 0]
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("a pipe or device instead of a file")
            if status.st_size != listed:
                deletions = [f"delete {path}" for path in find_indices(Path(self.path))]
                remedy = f"if that is meant, {' and '.join([*deletions, 'start again'])}"
                raise StaleListingError(status.st_size, listed, remedy)
            if status.st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
            return file.read(status.st_size)

    def state(self, index: int) -> list[int | str]:
        """What `status_of` says of the file. Raises OSError."""
        return status_of(self._file(index))

    def _file(self, index: int) -> str:
        return os.path.join(self.path, os.fsdecode(self.names[index]))


class CheckedReader(Reader):
    """A split of files whose index has their CRC-32, on a disk or on a server; the base of the two below."""

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; OSError, EOFError, ValueError or zlib.error if they are damaged.

        Damaged bytes are read a second time, past the cache of a server's files. Raises DataError if the server does
        not give them, or has another file by now.
        """
        try:
            return self.read_checked(index, fresh=False)
        except (EOFError, ValueError, zlib.error):
            return self.read_checked(index, fresh=True)

    def read_checked(self, index: int, *, fresh: bool) -> bytes:
        """The bytes of image `index`, `fresh` as in `RemoteFile.read`."""
        raise NotImplementedError


class PackReader(CheckedReader):
    """A split that tools/pack.py has written."""

    def __init__(self, path: Path | RemotePath):
        names, where, self.shards, self.info = read_index(path)
        super().__init__(path, names, where, set(_class_ranges(names)), Counter())

    def prefetch(self, indices: Iterable[int]) -> None:
        """Request the bytes of images that are read soon from their server."""
        for index in indices:
            size, shard, offset, _ = self.where[index].tolist()
            self.shards[shard].prefetch(size, offset)

    def state(self, index: int) -> list[int | str]:
        """The state of the shard. Raises OSError."""
        return self.shards[self.where[index, 1]].state()

    def read_checked(self, index: int, *, fresh: bool) -> bytes:
        """The bytes of image `index`, `fresh` as in `RemoteFile.read`."""
        size, shard, offset, crc = self.where[index].tolist()
        data = self.shards[shard].read(size, offset, fresh=fresh)
        if zlib.crc32(data) != crc:
            raise ValueError(
                f"record {index}, at byte {offset} of {shard_name(shard)}: "
                "CRC-32 differs from the index"
            )
        return data


class ZipReader(CheckedReader):
    """A split inside a zip file, members stored or deflated."""

    def __init__(self, path: Path | RemotePath):
        try:
            (self.file,) = open_files([path])
            with self.file.stream() as content, zipfile.ZipFile(content) as archive:
                members = archive.infolist()
        except (
            OSError,
            ValueError,
            struct.error,
            NotImplementedError,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(f"{path}: not a readable zip file ({error}); {PACK_ZIP}") from error
        files, folders, end = [], [], self.file.size
        if not any("/" in member.filename for member in members):
            for member in members:  # packed by a program of Windows that took its own separator
                member.filename = member.filename.replace("\\", "/")
        for member in members:
            name, packed, method = member.filename, member.compress_size, member.compress_type
            if member.is_dir():
                folders.append(name)
            elif member.flag_bits & 1:
                raise _refused(path, name, "is encrypted", PACK_ZIP)
            elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refused(path, name, f"is compressed by method {method}", PACK_ZIP)
            elif stat.S_ISLNK(member.external_attr >> 16):
                raise _refused(path, name, "is a link", PACK_ZIP)
            elif member.file_size > MAX_RATIO * packed:
                bomb = f"unpacks to more than {MAX_RATIO} times its size"
                raise _refused(path, name, bomb, PACK_ZIP)
            else:
                _check_size(path, name, max(packed, member.file_size))
                _check_place(path, name, member.header_offset, packed, end)
                where = member.file_size, member.header_offset, packed, method, member.CRC
                files.append((name, where))
        read_member = functools.partial(_read_zip_member, self.file)
        super().__init__(path, *_tree(path, files, folders, read_member))

    def prefetch(self, indices: Iterable[int]) -> None:
        """Request the bytes of images that are read soon from their server."""
        for index in indices:
            _, header, packed, *_ = self.where[index].tolist()
            self.file.prefetch(packed + LOCAL_HEADER, header)

    def state(self, index: int) -> list[int | str]:
        """The state of the archive. Raises OSError."""
        return self.file.state()

    def read_checked(self, index: int, *, fresh: bool) -> bytes:
        """The bytes of member `index`, `fresh` as in `RemoteFile.read`."""
        size, *_, crc = where = self.where[index].tolist()
        data = _read_zip_member(self.file, where, size, fresh=fresh)
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("CRC-32 differs from the zip file's directory")
        return data


def _read_zip_member(file: File, where: Sequence[int], count: int, *, fresh: bool = False) -> bytes:
    """The first `count` bytes of a member, unpacked, and one more of one that is larger than its directory says."""
    size, header, packed, method, _ = where
    # The local header's extra fields are its own: only it knows its length.
    name_length, extra_length = struct.unpack("<26x2H", file.read(30, header, fresh=fresh))
    data = file.read(packed, header + 30 + name_length + extra_length, fresh=fresh)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, count + (count == size))
    return data


class TarReader(Reader):
    """A split inside an uncompressed tar file."""

    def __init__(self, path: Path):
        self.file = LocalFile(path)
        files, folders, end = [], [], self.file.size
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    # Checked at once: a negative size would send tarfile round in a circle.
                    _check_place(path, member.name, member.offset_data, member.size, end)
                    if member.isdir():
                        folders.append(member.name)
                    elif not member.isfile() or member.issparse():
                        kind = "is a link, a device or sparse"
                        raise _refused(path, member.name, kind, PACK_TAR)
                    else:
                        _check_size(path, member.name, member.size)
                        files.append((member.name, (member.size, member.offset_data)))
                archive.fileobj.seek(archive.offset)
                # tarfile takes a damaged header for the end, which is a block of zeros.
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
        except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
            raise DataError(
                f"{path}: not a readable uncompressed tar file ({error}); {PACK_TAR}"
            ) from error
        read_member = functools.partial(_read_tar_member, self.file)
        super().__init__(path, *_tree(path, files, folders, read_member))

    def read(self, index: int) -> bytes:
        """The bytes of member `index`; EOFError if the archive ends before it does."""
        where = self.where[index].tolist()
        return _read_tar_member(self.file, where, where[0])

    def state(self, index: int) -> list[int | str]:
        """The state of the archive. Raises OSError."""
        return self.file.state()


def _read_tar_member(file: File, where: Sequence[int], count: int) -> bytes:
    """The first `count` bytes of a member."""
    size, offset = where
    return file.read(min(count, size), offset)


def open_split(root: str | Path | RemotePath, split: str) -> Reader:
    """The reader of `split` below `root`: a pack, else a folder, a zip or a tar; on a server a pack, else a zip.

    With its suffix, such as "val.zip", `split` is that file. `val` may also be called `validation`, which is read if
    there is no `val` in any form. The forms that are left unread on a disk are the reader's `beside`. Raises DataError
    when there is none, when it cannot be listed or when it has no class folders.
    """
    if isinstance(root, RemotePath):
        return _open_remote_split(root, split)
    root = Path(root)
    if root.is_file():
        remedy = describe_raw_form(root.parent) or LAYOUT
        raise DataError(f"{root}: is a file, not a folder; {remedy}")
    if not root.is_dir():
        require_target(root)
        raise DataError(
            f"{root}: no such folder. Name yours with --data-path, link it here (ln -s FOLDER {root}), or make one "
            f"from downloaded files with tools/prepare.py (docs/data.md); {LAYOUT}"
        )
    kinds = (
        (".pack", PackReader, Path.is_dir),
        ("", FolderReader, Path.is_dir),
        (".zip", ZipReader, Path.is_file),
        (".tar", TarReader, Path.is_file),
    )
    forms: list[tuple[Path, type[Reader]]] = []
    for name in _split_names(split):
        for suffix, kind, exists in kinds:
            path = root / (name.removesuffix(suffix) + suffix)
            # Of two forms the first is read; the other does no harm.
            with contextlib.suppress(*([OSError] if forms else [])):
                if exists(path):
                    forms.append((path, kind))
                elif not forms:
                    require_target(path)
    if forms:
        (path, kind), *others = forms
        reader = kind(path)
        reader.beside = [other.name for other, _ in others]
        return reader
    names = [path.name for path in root.iterdir() if not is_hidden(os.fsencode(path.name))]
    found = join_some(sorted(names), 8) or "nothing"
    remedy = describe_raw_form(root) or LAYOUT
    if split == "val" and any(exists(root / f"train{suffix}") for suffix, _, exists in kinds):
        remedy += "; or validate on a tenth of train with DATA.HOLDOUT=0.1"
    raise DataError(f"{root}: has no {split} split, found {found}; {remedy}")


def _open_remote_split(root: RemotePath, split: str) -> Reader:
    absent = []
    for name in _split_names(split):
        for suffix, kind, probe in ((".pack", PackReader, f"/{INFO}"), (".zip", ZipReader, "")):
            path = root / (name + suffix)
            if not (absence := (root / (name + suffix + probe)).absence()):
                return kind(path)
            absent.append(f"{path.name}: {absence}")
    raise DataError(
        f"{root}: no {split} split can be read there ({', '.join(absent)}). Make packs of your folders with "
        "tools/pack.py and upload them; folders and tars are read from disks alone"
    )


def _split_names(split: str) -> tuple[str, ...]:
    return (split, "validation") if split == "val" else (split,)


def _class_ranges(names: np.ndarray | Names) -> dict[str, tuple[int, int]]:
    ranges, start = {}, 0
    while start < len(names):
        folder = names[start].split(b"/", 1)[0]
        end = bisect.bisect_left(names, folder + b"0")  # "0" comes after "/"
        ranges[os.fsdecode(folder)] = start, end
        start = end
    return ranges


def _refused(path: Path | RemotePath, name: str, problem: str, remedy: str) -> DataError:
    return DataError(f"{path}: member {name!r} {problem}; {remedy}")


def _check_size(path: Path | RemotePath, name: str, size: int) -> None:
    if size > MAX_BYTES:
        problem = f"has {size} bytes, more than {MAX_BYTES >> 20} MiB"
        raise _refused(path, name, problem, "pack nothing but images")


def _check_place(path: Path | RemotePath, name: str, offset: int, size: int, end: int) -> None:
    if offset < 0 or size < 0 or offset + size > end:
        problem = f"would lie in bytes {offset} to {offset + size} of {end}"
        raise _refused(path, name, problem, "the archive is cut off or damaged, copy it again")


def _tree(
    path: Path | RemotePath,
    files: list[tuple[str, Where]],
    directories: list[str],
    read_member: Callable,
) -> tuple[Names, np.ndarray, set[str], Counter[str]]:
    """The arguments of `Reader`, from the members of an archive; `read_member` reads the first bytes of one.

    A single folder around all the classes is dropped if it is named as the archive or as a split: `train/<class>/…`.
    Raises DataError for a name that leads out of the archive and for one that appears twice.
    """
    for name in (*directories, *(name for name, _ in files)):
        if name.startswith("/") or ".." in name.split("/"):
            raise _refused(path, name, "leads out of the archive", "pack the folder from inside")
    seen: set[bytes] = set()
    images: dict[bytes, Where] = {}
    ignored: Counter[str] = Counter()
    for name, where in files:
        parts = _parts(name)
        member = b"/".join(parts)
        if member in seen:
            raise _refused(path, name, "appears twice", "pack the folder into a new file")
        seen.add(member)
        if any(map(is_hidden, parts)):
            ignored[HIDDEN] += 1
        elif not is_image(member, _read_head, read_member, where):
            ignored[suffix_of(member)] += 1
        else:
            images[member] = where
    folders = [parts for parts in map(_parts, directories) if not any(map(is_hidden, parts))]
    tops = {name.split(b"/", 1)[0] for name in images} | {parts[0] for parts in folders if parts}
    nested = len(tops) == 1 and any(name.count(b"/") > 1 for name in images)
    if nested and os.fsdecode(*tops) in (path.stem, *SPLITS):
        images = {name.partition(b"/")[2]: where for name, where in images.items()}
        folders = [parts[1:] for parts in folders]
    names = sorted(name for name in images if b"/" in name)
    if loose := len(images) - len(names):
        ignored[LOOSE] = loose
    classes = {name.split(b"/", 1)[0] for name in names} | {parts[0] for parts in folders if parts}
    where = np.array([images[name] for name in names], np.int64)
    return Names(names), where, set(map(os.fsdecode, classes)), ignored


def _read_head(read_member: Callable, where: Where) -> bytes:
    try:
        return read_member(where, HEAD_BYTES)
    except (OSError, EOFError, ValueError, struct.error, zlib.error):
        return b""  # damaged


def _parts(name: str) -> list[bytes]:
    """A member's path without what tar and zip may put before, between and after its parts."""
    return [os.fsencode(part) for part in name.split("/") if part not in ("", ".")]
