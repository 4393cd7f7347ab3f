"""A pack in a bucket of object storage, for the tests of each kind of server."""

from collections.abc import Callable, Iterator
from pathlib import Path

from data import ImageDataset
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset
from tools import pack

SHARD = "train.pack/shard-00000.bin"


def make_pack(folder: Path) -> Path:
    """A pack of the training images of a small data set below `folder`."""
    root = write_image_folder(folder / "set", train=16, val=1, size=96)
    assert pack.main([str(root), str(folder / "packed"), "--workers", "1"]) == 0
    return folder / "packed"


def objects_of(packed: Path) -> Iterator[tuple[str, bytes]]:
    """The names, below `set/`, and contents of the objects that a bucket has of a pack."""
    for file in packed.rglob("*.*"):
        if file.is_file():
            yield f"set/{file.relative_to(packed)}", file.read_bytes()


def require_equal(packed: Path, open_set: Callable[[], ImageDataset]) -> None:
    """Compare the pack with what `open_set` opens on a server, twice: a cache may answer the second time."""
    here = image_dataset(packed)
    for _ in range(2):
        there = open_set()
        assert there.fingerprint == here.fingerprint
        assert all(there.read(i) == here.read(i) for i in range(len(here)))
