"""Small downloads of published datasets, in exactly the forms in which people have them."""

import csv
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from helpers.images import encode

GREY = "n01440764", "n01443537", "n01484850"  # the first three of ImageNet


class Photo(NamedTuple):
    """An image of ImageNet: its class, its original name without extension, its bytes."""

    wnid: str
    name: str
    data: bytes


def photos(train: int = 3, val: int = 5, classes: tuple[str, ...] = GREY) -> dict[str, list[Photo]]:
    """`train` images a class and `val` in all, by split; the validation labels are in no order."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        pixels = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        return encode(Image.fromarray(pixels), "JPEG", quality=80)

    return {
        "train": [
            Photo(wnid, f"{wnid}_{10 * number}", picture())
            for wnid in classes
            for number in range(train)
        ],
        "val": [
            Photo(classes[-1 - number % 3], f"ILSVRC2012_val_{number + 1:08d}", picture())
            for number in range(val)
        ],
    }


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar_of(files: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar of `files`, compressed with mode "w:gz"."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files:
            add(archive, name, data)
    return buffer.getvalue()


# --- ImageNet -------------------------------------------------------------------------------------


def write_tree(images: dict[str, list[Photo]], root: Path) -> Path:
    """The layout that training reads."""
    for split, found in images.items():
        for photo in found:
            file = root / split / photo.wnid / f"{photo.name}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(photo.data)
    return root


def write_archives(images: dict[str, list[Photo]], root: Path) -> Path:
    """The original tar of tars, the flat validation tar and the development kit."""
    root.mkdir()
    classes = sorted({photo.wnid for photo in images["train"]})
    inner = [
        (
            f"{wnid}.tar",
            tar_of([(f"{p.name}.JPEG", p.data) for p in images["train"] if p.wnid == wnid]),
        )
        for wnid in classes
    ]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = tar_of([(f"{photo.name}.JPEG", photo.data) for photo in reversed(images["val"])])
    (root / "ILSVRC2012_img_val.tar").write_bytes(val)
    write_devkit(root, classes, [photo.wnid for photo in images["val"]])
    return root


def unpack_train(root: Path) -> Path:
    """`write_archives` after the first `tar xf`: a tar per class in `train`."""
    (root / "train").mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar") as archive:
        archive.extractall(root / "train", filter="data")
    (root / "ILSVRC2012_img_train.tar").unlink()
    return root


def unpack_classes(root: Path) -> Path:
    """`unpack_train` after the second: class folders in `train`."""
    for path in (root / "train").glob("*.tar"):
        with tarfile.open(path) as archive:
            archive.extractall(path.with_suffix(""), filter="data")
        path.unlink()
    return root


def unpack_val(root: Path) -> Path:
    """`write_archives` with flat images in `val`."""
    with tarfile.open(root / "ILSVRC2012_img_val.tar") as archive:
        archive.extractall(root / "val", filter="data")
    (root / "ILSVRC2012_img_val.tar").unlink()
    return root


def write_devkit(
    root: Path, classes: list[str], labels: list[str], name: str = "ILSVRC2012_devkit_t12"
) -> None:
    """The devkit: ids count from 1, against the order of the wnids; inner nodes of WordNet follow."""
    ids = {wnid: number for number, wnid in enumerate(reversed(classes), 1)}
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    rows = [(ids[w], w, "tench, Tinca", "a fish", 0, [], 0, 1300) for w in reversed(classes)]
    rows.append((len(rows) + 1, "n00001740", "entity", "what is", 2, [1, 2], 19, 0))
    synsets = np.array(rows, dtype=[(field, object) for field in fields])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{ids[wnid]}\n" for wnid in labels)
    files = [
        (f"{name}/data/meta.mat", meta.getvalue()),
        (f"{name}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    (root / f"{name}.tar.gz").write_bytes(tar_of(files, "w:gz"))


def write_kaggle(images: dict[str, list[Photo]], root: Path) -> Path:
    """ILSVRC/Data/CLS-LOC and the CSV file beside ILSVRC."""
    data = root / "ILSVRC/Data/CLS-LOC"
    write_tree({"train": images["train"]}, data)
    for folder in ("val", "test"):
        (data / folder).mkdir()
        for photo in images["val"]:
            (data / folder / f"{photo.name}.JPEG").write_bytes(photo.data)
    rows = [(p.name, f"{p.wnid} 85 1 499 272 {p.wnid} 3 4 5 6 ") for p in images["val"]]
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *reversed(rows)])
    return root


def write_shards(images: dict[str, list[Photo]], root: Path, a_shard: int = 4) -> Path:
    """timm's WebDataset shards: .cls, .jpg and .json of each key."""
    root.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        found = images[split]
        for number, start in enumerate(range(0, len(found), a_shard)):
            files = []
            for photo in found[start : start + a_shard]:
                info = {"filename": f"{photo.name}.JPEG", "label": GREY.index(photo.wnid)}
                files.append((f"{photo.name}.cls", str(info["label"]).encode()))
                files.append((f"{photo.name}.jpg", photo.data))
                files.append((f"{photo.name}.json", json.dumps(info).encode()))
            (root / f"imagenet1k-{name}-{number:04d}.tar").write_bytes(tar_of(files))
    return root


def write_parquet(images: dict[str, list[Photo]], root: Path, rows: int = 4) -> Path:
    """Hugging Face's files: names with the class at the end, a test set without labels."""
    import pyarrow
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    splits = {"train": images["train"], "validation": images["val"], "test": images["val"]}
    for split, found in splits.items():
        chunks = [found[start : start + rows] for start in range(0, len(found), rows)]
        for number, chunk in enumerate(chunks):
            columns = {
                "image": [
                    {"bytes": p.data, "path": f"{p.name}_{p.wnid}.JPEG"}
                    if split != "test"
                    else {"bytes": p.data, "path": f"{p.name}.JPEG"}
                    for p in chunk
                ],
                "label": [-1 if split == "test" else GREY.index(p.wnid) for p in chunk],
            }
            name = f"{split}-{number:05d}-of-{len(chunks):05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(columns), root / "data" / name)
    return root


# --- CIFAR-10 and Imagenette ----------------------------------------------------------------------


class _Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings, also for text, in protocol 2."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _save_string


def python2_pickle(value: object) -> bytes:
    """`value` as Python 2 and NumPy 1 have pickled it."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_batches(images: int = 10) -> dict[str, dict]:
    """The content of CIFAR-10's batches, `images` in each."""
    rng = np.random.default_rng(1)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {
        name: {
            "batch_label": f"batch {name}",
            "labels": [(3 * place + number) % 10 for number in range(images)],
            "data": rng.integers(0, 256, (images, 3072)).astype(np.uint8),
            "filenames": [f"image_s_{number:06d}.png" for number in range(images)],
        }
        for place, name in enumerate(names)
    }


def write_cifar(batches: dict[str, dict], path: Path) -> Path:
    """cifar-10-python.tar.gz with pickles of Python 2."""
    files = [(f"cifar-10-batches-py/{name}", python2_pickle(b)) for name, b in batches.items()]
    meta = {"num_cases_per_batch": 10, "label_names": ["airplane"], "num_vis": 3072}
    files.append(("cifar-10-batches-py/batches.meta", python2_pickle(meta)))
    path.write_bytes(tar_of(files, "w:gz"))
    return path


def write_imagenette(images: dict[str, list[Photo]], path: Path) -> Path:
    """imagenette2-160.tgz with its CSV file of noisy labels."""
    files = [
        (f"imagenette2-160/{split}/{photo.wnid}/{photo.name}.JPEG", photo.data)
        for split, found in images.items()
        for photo in found
    ]
    files.append(("imagenette2-160/noisy_imagenette.csv", b"path,noisy_labels_0\n"))
    path.write_bytes(tar_of(files, "w:gz"))
    return path
