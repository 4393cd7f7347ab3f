"""Which files did a folder hold when it was last listed? A cache of that, believed while no folder has changed.

A folder's change time moves when a file or folder in it is added, removed or renamed, and unlike
its modification time no copy keeps it. A file overwritten in place changes nothing but itself: its
size in the cache is then the old one, its new content is read all the same.
"""

import contextlib
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Two changes within the clock tick of a file system leave the same time: one in so many
# nanoseconds before the listing may not be the last.
SETTLED = 2_000_000_000


class Listing(NamedTuple):
    """A split's files, as `Reader` keeps them, and the folders that they were found in.

    names: bytes [N], sorted.
    sizes: int64 [N].
    classes: bytes, the class folders.
    ignored: int64, how many files were passed over.
    folders: bytes, every folder that was listed, relative to the split.
    times: int64, when each was last changed, in ns.
    """

    names: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    folders: np.ndarray
    times: np.ndarray


def change_time(split: Path, folder: str) -> int:
    """When anything was last added to, removed from or renamed in `folder`, in ns."""
    return os.stat(os.path.join(split, folder)).st_ctime_ns


def load_listing(split: Path) -> Listing | None:
    """The last listing of `split`, if there is a whole one and no folder has changed since."""
    for path in _places(split):
        try:
            with np.load(path) as arrays:
                listing = Listing(**arrays)
            times = [change_time(split, os.fsdecode(folder)) for folder in listing.folders.tolist()]
        except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
            continue  # not there, or damaged: zipfile takes a flipped bit for an encryption's flag
        if times == listing.times.tolist():
            return listing
    return None


def save_listing(split: Path, listing: Listing) -> None:
    """Keep `listing` beside `split`, else under the user's cache folder, else nowhere."""
    if listing.times.max() > time.time_ns() - SETTLED:
        return
    buffer = io.BytesIO()
    np.savez(buffer, **listing._asdict())
    for path in _places(split):
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(buffer.getvalue())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            continue
        return


def _places(split: Path) -> list[Path]:
    """Beside the split, for everyone who reads it; in the user's cache, where that is read-only."""
    places = [split.parent / f".{split.name}.index.npz"]
    home = os.environ.get("HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
    if cache:
        digest = hashlib.sha256(os.fsencode(split.resolve())).hexdigest()[:16]
        places.append(Path(cache, "dat", f"{digest}.index.npz"))
    return places
