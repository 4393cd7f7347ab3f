"""Folder listing: which files of a split are images, in which class folders; and its index, a cache of that.

The index is used as long as no folder has changed. A folder's change time moves when a file or folder in it is added,
removed or renamed, and unlike its modification time no copy keeps it. A file overwritten in place changes nothing but
itself: the index still has its old size. Its new content is read if it has that size, and refused otherwise.
"""

import contextlib
import errno
import hashlib
import os
import stat
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import features

from utils.errors import DataError, StorageError
from utils.files import replace_atomically

# The file names of the formats that data/decode.py decodes.
EXTENSIONS = (
    *(b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".apng", b".bmp", b".gif", b".webp"),
    *(b".ppm", b".pgm", b".pbm", b".pnm", b".tif", b".tiff"),
    *((b".avif",) if features.check("avif") else ()),
)
# What those files begin with: a file without a suffix is an image if it does, too.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
HEAD_BYTES = 16
# Raised when other files of these names are listed than before, so that older indices are ignored.
EDITION = b"2"

# What operating systems, file managers and disk stations leave beside data, in addition to names with a dot in front.
SYSTEM_NAMES = frozenset({
    b"__MACOSX", b"@eaDir", b"#recycle", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found",
    b"Thumbs.db", b"desktop.ini",
})  # fmt: skip
DOT = ord(".")
# Why a file is ignored, where it is not for its suffix.
HIDDEN, LOOSE = "hidden or system", "in no class folder"

# Two changes within the clock tick of a file system leave the same time: one in so many nanoseconds before the
# listing may not be the last.
SETTLED = 2_000_000_000


class Listing(NamedTuple):
    """A split's files, as `Reader` keeps them, and the folders that they were found in.

    names: bytes [N], sorted.
    sizes: int64 [N].
    classes: bytes, the class folders.
    reasons, ignored: bytes and int64, how many files were ignored for each reason.
    folders: bytes, every folder that was listed, relative to the split.
    times: int64, when each was last changed, in ns.
    rules: bytes, the names that decide which files are images, and the edition of the code that does.
    """

    names: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray
    reasons: np.ndarray
    ignored: np.ndarray
    folders: np.ndarray
    times: np.ndarray
    rules: np.ndarray

    def count_ignored(self) -> Counter[str]:
        """How many files were ignored, by reason."""
        reasons = map(os.fsdecode, self.reasons.tolist())
        return Counter(dict(zip(reasons, self.ignored.tolist(), strict=True)))


def is_image(name: bytes, read_head: Callable[..., bytes], *where: object) -> bool:
    """Whether a file of this name is an image; without a suffix, its first bytes decide, from `read_head(*where)`."""
    if name.lower().endswith(EXTENSIONS):
        return True
    return b"." not in name.rpartition(b"/")[2] and _begins_as_image(read_head(*where))


def _begins_as_image(head: bytes) -> bool:
    bitmap = head.startswith(b"BM") and head[6:10] == bytes(4)
    return head.startswith(SIGNATURES) or bitmap or head[4:12] == b"ftypavif"


def is_hidden(name: bytes) -> bool:
    """Whether a file or folder of this name, without its path, is never data."""
    return name[0] == DOT or name in SYSTEM_NAMES


def suffix_of(name: bytes) -> str:
    """What a name ends in, as the reason for which its file is ignored."""
    return os.path.splitext(os.fsdecode(name))[1].lower() or "no suffix"


def scan_folder(split: Path, *, loose: bool = False) -> Listing:
    """List `split`: links are followed, never into a folder seen before.

    loose: `split` is any folder of images: those in no class folder are listed, too, and links may lead anywhere.

    Raises DataError for a folder that cannot be listed and, unless `loose`, for two class folders that are the same and
    for a link without a target that may lead to a folder.
    """
    classes: list[bytes] = []
    ignored: Counter[str] = Counter()
    names, sizes, times = [], [], {}
    seen, pending = {_identity(os.fsencode(split)): os.fsencode(split.name)}, [b""]
    while pending:
        prefix = pending.pop()
        folder = os.path.join(os.fsencode(split), prefix)
        times[prefix] = change_time(split, prefix)  # before its content is listed
        subfolders, found_names, found_sizes = [], [], []
        with _opened(folder) as (found, descriptor):
            for name in found:
                try:
                    # Faster than the entries of os.scandir.
                    status = os.stat(name, dir_fd=descriptor)
                    mode, size = status.st_mode, status.st_size
                except OSError:  # a link to nowhere or in a circle
                    mode = size = 0
                    if not (loose or is_hidden(name)):
                        _refuse_lost_folder(folder, name, in_class=bool(prefix))
                regular = stat.S_ISREG(mode)
                if (
                    (prefix or loose)
                    and regular
                    and name[0] != DOT
                    and name.lower().endswith(EXTENSIONS)
                ):
                    found_names.append(prefix + name)  # of a million files, nearly all
                    found_sizes.append(size)
                elif is_hidden(name):
                    ignored[HIDDEN] += 1
                elif stat.S_ISDIR(mode):
                    subfolders.append(name)
                elif not is_image(name, _read_head, folder, name):
                    ignored[suffix_of(name)] += 1
                elif not (prefix or loose):
                    ignored[LOOSE] += 1
                else:  # a pipe, a device or a dangling link counts as a damaged image
                    found_names.append(prefix + name)
                    found_sizes.append(size if regular else 0)
        for name in subfolders:
            identity = _identity(os.path.join(folder, name))
            if not prefix:
                classes.append(name)
                if identity in seen and not loose:
                    twins = f"{os.fsdecode(seen[identity])} and {os.fsdecode(name)}"
                    raise DataError(
                        f"{split}: {twins} are the same folder; remove the one that is a link"
                    )
            if identity not in seen:
                seen[identity] = prefix + name
                pending.append(prefix + name + b"/")
        if found_names:  # an array takes a quarter of the memory of a list of names
            names.append(np.array(found_names, np.bytes_))
            sizes.append(np.array(found_sizes, np.int64))
    return Listing(
        *_sorted(names, sizes),
        np.array(classes, np.bytes_),
        np.array([reason.encode("utf-8", "surrogateescape") for reason in ignored], np.bytes_),
        np.array(list(ignored.values()), np.int64),
        np.array(list(times), np.bytes_),
        np.array(list(times.values()), np.int64),
        _rules(),
    )


def _refuse_lost_folder(folder: bytes, name: bytes, *, in_class: bool) -> None:
    """Raise DataError for the link `name` without a target, unless its name is that of a file.

    In a class folder, that is any name with a suffix; beside them, a class may have one, too.
    """
    if not (b"." in name if in_class else name.lower().endswith(EXTENSIONS)):
        require_target(Path(os.fsdecode(os.path.join(folder, name))))


def require_target(path: Path) -> None:
    """Raise DataError for a link to what does not exist, and for what cannot be opened; not where there is nothing."""
    try:
        path.stat()
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        problem = "does not exist" if absent else f"cannot be opened ({error.strerror})"
        if path.is_symlink():
            raise DataError(
                f"{path}: is a link to {os.readlink(path)}, which {problem}; restore that, or remove the link"
            ) from error
        if not absent:
            raise DataError(f"{path}: {problem}; check access") from error


def change_time(split: Path, folder: bytes) -> int:
    """When anything was last added to, removed from or renamed in `folder`, in ns."""
    return os.stat(os.path.join(os.fsencode(split), folder)).st_ctime_ns


def load_listing(split: Path) -> Listing | None:
    """The last listing of `split`, if there is a valid one and no folder has changed since."""
    for path in _index_paths(split):
        try:
            with np.load(path) as arrays:
                listing = Listing(**arrays)
            times = [change_time(split, folder) for folder in listing.folders.tolist()]
        except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
            continue  # absent, or damaged: zipfile takes a flipped bit for an encryption's flag
        if times == listing.times.tolist() and np.array_equal(listing.rules, _rules()):
            return listing
    return None


def save_listing(split: Path, listing: Listing) -> None:
    """Keep `listing` beside `split`, else under the user's cache folder, else nowhere.

    It is not kept where a folder changed a moment ago, nor where folders have no time, as of some network drives.
    """
    if listing.times.max() > time.time_ns() - SETTLED or listing.times.min() <= 0:
        return
    for path in _index_paths(split):
        with contextlib.suppress(OSError, StorageError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **listing._asdict())
            return


def find_indices(split: Path) -> list[Path]:
    """The files that keep a listing of `split`."""
    return [path for path in _index_paths(split) if path.exists()]


def _sorted(names: list[np.ndarray], sizes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The files of all folders, sorted by name."""
    if not names:
        return np.empty(0, np.bytes_), np.empty(0, np.int64)
    order = sorted(range(len(names)), key=lambda number: names[number][0])
    all_names = np.concatenate([names[number] for number in order])
    all_sizes = np.concatenate([sizes[number] for number in order])
    if (all_names[:-1] > all_names[1:]).any():  # files beside folders that hold further files
        by_name = all_names.argsort()
        return all_names[by_name], all_sizes[by_name]
    return all_names, all_sizes


def _rules() -> np.ndarray:
    return np.array([EDITION, *EXTENSIONS, *SIGNATURES, *sorted(SYSTEM_NAMES)], np.bytes_)


def _identity(path: bytes) -> tuple[int, int]:
    """Device and inode: equal for all the paths that lead to one folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _opened(folder: bytes) -> Iterator[tuple[list[bytes], int]]:
    """The sorted names in `folder`, and a descriptor of it for `dir_fd`."""
    try:
        names = sorted(os.listdir(folder))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(
            f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}); check access"
        ) from error
    try:
        yield names, descriptor
    finally:
        os.close(descriptor)


def _read_head(folder: bytes, name: bytes) -> bytes:
    """The first bytes of a file; none of one that cannot be read, of a pipe or a device."""
    try:
        path = os.path.join(folder, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return file.read(HEAD_BYTES) if regular else b""
    except OSError:
        return b""


def _index_paths(split: Path) -> list[Path]:
    """Beside the split, for everyone who reads it; in the user's cache, where that is read-only."""
    paths = [split.parent / f".{split.name}.index.npz"]
    home = os.environ.get("HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
    if cache:
        digest = hashlib.sha256(os.fsencode(split.resolve())).hexdigest()[:16]
        paths.append(Path(cache, "dat", f"{digest}.index.npz"))
    return paths
