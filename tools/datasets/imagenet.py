"""ImageNet (ILSVRC2012) as people have it: original archives, what is in them, Kaggle's folders, shards, parquet files.

Every form gives the same files `<wnid>/<file>`, named as in the original archives, so that a
prepared split has the same fingerprint whichever form it came from. Labels that are integers count
the wnids in sorted order, except in the development kit, which has ids of its own.
"""

import csv
import io
import itertools
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from timm.data import ImageNetInfo

from data.raw_forms import (
    ARCHIVES,
    CLASS_TAR,
    CLASS_TARS,
    FLAT_VAL,
    KAGGLE,
    PARQUET,
    PARQUET_FILES,
    SHARDS,
    find_raw_form,
)
from tools.datasets.raw_dataset import (
    Part,
    RawDataset,
    RawImage,
    folder_files,
    folder_parts,
    is_image,
    open_file,
    read_file,
    require_source,
    tar_files,
    tar_members,
)
from utils.errors import ConfigError, DataError
from utils.text import join_some

CLASSES = tuple(ImageNetInfo().label_names())
COUNTS = {"train": 1_281_167, "val": 50_000}

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = f"{DEVKIT}/data/meta.mat", f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    f"{DEVKIT}.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
SOLUTION = "LOC_val_solution.csv"
WNID = re.compile(r"(?:^|_)(n\d{8})(?=_|$)")  # in a file name without extension
ROWS = 32  # of a parquet file in memory


class ImageNet(RawDataset):
    """A form of ImageNet; the base of those below."""

    def __init__(self):
        self.classes, self.counts = CLASSES, COUNTS


def open_imagenet(folder: Path) -> ImageNet:
    """The download in `folder`, whichever form it has. Raises DataError if it has none."""
    require_source(folder)
    if folder.is_file():
        raise DataError(f"{folder}: is a file; name the folder that it is in")
    form = find_raw_form(folder)
    if form is None or form.name not in FORMS:
        raise DataError(
            f"{folder}: found no form of ImageNet; expected {TRAIN} or {VAL}, train/n01440764.tar, "
            "val/ILSVRC2012_val_*.JPEG, Kaggle's ILSVRC/Data/CLS-LOC, imagenet1k-train-*.tar or "
            "Hugging Face's *.parquet"
        )
    raw = FORMS[form.name](folder)
    if not raw.splits:
        raise DataError(f"{folder}: holds {form.name} but neither training nor validation images")
    print(f"{folder}: {form.name}, {' and '.join(raw.splits)}")
    return raw


# --- The original archives, and what is in them ---------------------------------------------------

TARS = "tars of the classes, n01440764.tar and 999 more"
CLASS_FOLDER = CLASS_TAR.removesuffix(".tar")
FOLDERS = "class folders, n01440764 and 999 more"
FLAT = "images ILSVRC2012_val_*.JPEG"


class Images(NamedTuple):
    """Where the images of a split lie.

    place: the archive or folder.
    layout: how they lie in there, in words.
    parts: they, from `place`.
    """

    place: Path
    layout: str
    parts: Callable[[Path], Iterator[Part]]


class Archives(ImageNet):
    """The original archives, or as much of them as is unpacked; Kaggle's CLS-LOC, which is all of it.

    train: a tar of one tar per class, those tars, or class folders.
    val: a flat tar or folder, whose labels Kaggle's CSV file or the devkit has; or class folders.
    """

    def __init__(self, folder: Path):
        super().__init__()
        found = [folder / "ILSVRC/Data/CLS-LOC", folder / "Data/CLS-LOC"]
        root = next((root for root in found if root.is_dir()), folder)
        images = {"train": _train_images(root), "val": _val_images(root, folder)}
        self._images = {split: found for split, found in images.items() if found is not None}
        self.splits = list(self._images)
        if [found.layout for found in self._images.values()] == [FOLDERS, FOLDERS]:
            raise DataError(
                f"{root}: train and val are sorted into class folders already and need no "
                f"preparation: name {root} with --data-path"
            )
        if any(found.place.is_file() for found in self._images.values()):
            self.hint = f"The MD5 is {', '.join(f'{md5} of {file}' for file, md5 in MD5.items())}."

    def place(self, split: str) -> Path:
        """The archive or the folder."""
        return self._images[split].place

    def layout(self, split: str) -> str:
        """In words."""
        return self._images[split].layout

    def parts(self, split: str) -> Iterator[Part]:
        """The tars or folders of the classes; all validation images without any."""
        place, _, parts = self._images[split]
        return parts(place)


def _train_images(root: Path) -> Images | None:
    if (root / TRAIN).exists():
        return Images(root / TRAIN, TARS, _tar_of_tars)
    for folder in (root / "train", root):
        if tars := {path.stem for path in folder.glob(CLASS_TAR)}:
            if unpacked := {path.name for path in folder.glob(CLASS_FOLDER)} - tars:
                raise DataError(
                    f"{folder}: holds the tars of some classes and the folders of others "
                    f"({join_some(sorted(unpacked), 3)}); unpack the other tars, and remove them"
                )
            return Images(folder, TARS, _class_tars)
    if next((root / "train").glob(CLASS_FOLDER), None) is not None:
        return Images(root / "train", FOLDERS, folder_parts)
    return None


def _val_images(root: Path, download: Path) -> Images | None:
    folder = root / "val"
    if (root / VAL).exists():
        labels = read_labels(root, download)
        return Images(root / VAL, FLAT, lambda tar: _flat_tar(tar, labels))
    if next(folder.glob(CLASS_FOLDER), None) is not None:
        return Images(folder, FOLDERS, folder_parts)
    names = folder_files(folder) if folder.is_dir() else []
    if not names:
        return None
    labels = read_labels(root, download)
    missing = [name for name in names if name not in labels.wnids]
    if missing:
        raise labels.error(folder, missing)
    return Images(folder, FLAT, lambda folder: _flat_folder(folder, names, labels))


def _tar_of_tars(path: Path) -> Iterator[Part]:
    with open_file(path) as file:
        for member, content in tar_members(file, path):
            name = PurePosixPath(member.name)
            if name.suffix == ".tar":
                images = tar_files(content, path, member.offset_data)
                yield Part(name.name, member.size, _class_images(name.stem, images))


def _class_tars(folder: Path) -> Iterator[Part]:
    for path in sorted(folder.glob(CLASS_TAR)):
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            yield Part(path.name, size, _class_images(path.stem, tar_files(file, path)))


def _class_images(class_name: str, files: Iterator[tuple[str, bytes]]) -> Iterator[RawImage]:
    for name, data in files:
        if is_image(name):
            yield RawImage(class_name, name, data)


def _flat_tar(path: Path, labels: "Labels") -> Iterator[Part]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        yield Part(path.name, size, _labelled_images(tar_files(file, path), path, labels))


def _flat_folder(folder: Path, names: list[str], labels: "Labels") -> Iterator[Part]:
    files = ((name, read_file(folder / name)) for name in names)
    yield Part(folder.name, len(names), _labelled_images(files, folder, labels))


def _labelled_images(
    files: Iterator[tuple[str, bytes]], place: Path, labels: "Labels"
) -> Iterator[RawImage]:
    for name, data in files:
        if name not in labels.wnids:
            raise labels.error(place, [name])
        yield RawImage(labels.wnids[name], name, data)


# --- Labels of the validation images --------------------------------------------------------------


class Labels(NamedTuple):
    """The wnids of the validation images by their file names, and the file that has them."""

    path: Path
    wnids: dict[str, str]

    def error(self, place: Path, names: list[str]) -> DataError:
        """The error of the images `names` in `place`, which have no label."""
        return DataError(
            f"{self.path}: has no label for {join_some(names, 5)} of {place}; remove what is no "
            "image of the validation set, or download the labels again"
        )


def read_labels(root: Path, download: Path) -> Labels:
    """The labels, from Kaggle's CSV file or the devkit, in `download` or above the folder `root` of the images.

    Raises DataError.
    """
    places = [download, *root.absolute().parents[:3]]
    for place in places:
        if (place / SOLUTION).is_file():
            return Labels(place / SOLUTION, read_solution(place / SOLUTION))
    for place in places:
        devkit = place / (DEVKIT if (place / META).exists() else f"{DEVKIT}.tar.gz")
        if devkit.exists():
            wnids = enumerate(read_devkit(place), 1)
            return Labels(devkit, {f"ILSVRC2012_val_{n:08d}.JPEG": wnid for n, wnid in wnids})
    others = sorted(path.name for path in download.glob("*devkit*"))
    found = f", found {join_some(others)}" if others else ""
    raise DataError(
        f"{download}: the labels of the validation images are missing, {DEVKIT}.tar.gz or Kaggle's "
        f"{SOLUTION}{found}; download one of the two to this folder"
    )


def read_solution(path: Path) -> dict[str, str]:
    """The wnid of every validation image by its file name, from Kaggle's CSV file. Raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
    if header != ["ImageId", "PredictionString"]:
        raise DataError(
            f"{path}: begins with {','.join(header)!r}, expected ImageId,PredictionString; "
            "download it again"
        )
    labels: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        image, prediction = row if len(row) == 2 else ("", "")
        wnid = prediction.partition(" ")[0]  # of `wnid x y x y wnid x y x y …`
        if wnid not in CLASSES or f"{image}.JPEG" in labels:
            raise DataError(
                f"{path}: line {line}, {','.join(row)!r}, names no class or repeats an image; "
                "download it again"
            )
        labels[f"{image}.JPEG"] = wnid
    return labels


def read_devkit(folder: Path) -> list[str]:
    """The wnid of every validation image, by number, from the devkit's archive or folder in `folder`.

    Raises DataError if it is damaged, or of another year.
    """
    # It takes a second to import, which the other forms do without.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    archive = folder / f"{DEVKIT}.tar.gz"
    try:
        if (folder / META).exists():
            meta, truth = (folder / META).read_bytes(), (folder / TRUTH).read_bytes()
        else:
            with tarfile.open(archive, "r:gz") as files:
                meta, truth = (files.extractfile(name).read() for name in (META, TRUTH))
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Fields: 0 id, 1 wnid, 2 words, 3 gloss, 4 number of children: a class has none.
        wnids = {int(row[0]): str(row[1]) for row in rows if row[4] == 0}
        ids = [int(line) for line in truth.split()]
    except PermissionError as error:
        raise DataError(
            f"{error.filename}: cannot be opened ({error.strerror}); check access"
        ) from error
    except (
        *(OSError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError),
        *(NotImplementedError, struct.error, zlib.error, tarfile.TarError, MatReadError),
    ) as error:
        raise DataError(
            f"{archive}: not the development kit of ILSVRC2012 ({error}); download it again"
        ) from error
    if set(wnids.values()) != set(CLASSES) or not set(ids) <= set(wnids):
        strange = sorted(set(wnids.values()) - set(CLASSES))
        why = f"it has the classes {join_some(strange, 3)}" if strange else "its classes differ"
        raise DataError(
            f"{archive}: the development kit of another year ({why}); "
            f"expected {archive.name} with MD5 {MD5[archive.name]}"
        )
    if len(ids) != COUNTS["val"]:
        raise DataError(
            f"{archive}: {PurePosixPath(TRUTH).name} has {len(ids):,} lines, expected "
            f"{COUNTS['val']:,}; download it again"
        )
    return [wnids[number] for number in ids]


# --- Labels that are integers ---------------------------------------------------------------------


def image_with_label(label: object, name: str, data: bytes, where: str) -> RawImage:
    """An image by its integer label and the name it was stored under, with its original name.

    name: without folders and extension, perhaps with its class at the end (Hugging Face).
    Raises DataError for a label that is none or contradicts the wnid in the name.
    """
    if type(label) is not int or not 0 <= label < len(CLASSES):
        raise DataError(
            f"{where}: label {label!r} of {name}, expected an integer from 0 to {len(CLASSES) - 1}; "
            "download it again"
        )
    wnid = CLASSES[label]
    if any(found != wnid for found in WNID.findall(name)):
        raise DataError(
            f"{where}: {name} has label {label}, which is {wnid}; expected labels that count the "
            "wnids in sorted order"
        )
    return RawImage(wnid, name.removesuffix(f"_{wnid}") + ".JPEG", data)


# --- timm's WebDataset shards ---------------------------------------------------------------------


class Shards(ImageNet):
    """Tars of samples: members of one key after another, `<key>.jpg` and `<key>.cls`."""

    hint = "Look for a shard that is missing: their numbers have no gap."

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder
        patterns = {"train": "imagenet1k-train-*.tar", "val": "imagenet1k-validation-*.tar"}
        self._shards = {split: sorted(folder.glob(glob)) for split, glob in patterns.items()}
        self.splits = [split for split, shards in self._shards.items() if shards]

    def place(self, split: str) -> Path:
        """The folder of the shards."""
        return self._folder

    def layout(self, split: str) -> str:
        """In words."""
        return "shards of <key>.jpg and <key>.cls"

    def parts(self, split: str) -> Iterator[Part]:
        """The shards."""
        for path in self._shards[split]:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                yield Part(path.name, size, _samples(tar_files(file, path), path))


def _samples(files: Iterator[tuple[str, bytes]], path: Path) -> Iterator[RawImage]:
    for key, members in itertools.groupby(files, key=lambda file: _key(file[0])):
        fields: dict[str, bytes] = {}
        for name, data in members:
            field = "image" if is_image(name) else name[len(key) + 1 :]
            if field in fields:
                raise DataError(f"{path}: key {key!r} has two members {field}; download it again")
            fields[field] = data
        if "image" not in fields or not fields.get("cls", b"").strip().isdigit():
            raise DataError(
                f"{path}: key {key!r} has members {', '.join(fields)}; expected an image and a .cls "
                "with an integer; download it again"
            )
        yield image_with_label(
            int(fields["cls"]), key.rpartition("/")[2], fields["image"], path.name
        )


def _key(name: str) -> str:
    """A member's name up to the first dot of its last component, as WebDataset splits it."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


# --- Hugging Face's parquet files -----------------------------------------------------------------


class Parquet(ImageNet):
    """Files of rows with a struct `image` of `bytes` and `path`, and an integer `label`."""

    def __init__(self, folder: Path):
        super().__init__()
        if find_spec("pyarrow") is None:
            raise ConfigError(
                "Parquet files are read by the package pyarrow, which is not installed: "
                "pip install pyarrow"
            )
        self._folder = folder
        files = sorted(file for pattern in PARQUET_FILES for file in folder.glob(pattern))
        parts = {
            file: file.relative_to(folder).parts for file in files
        }  # the names of folders count, too
        self._files = {
            split: [file for file in files if any(part.startswith(split) for part in parts[file])]
            for split in ("train", "val")
        }
        self.splits = [split for split, found in self._files.items() if found]
        if not self.splits:
            raise DataError(
                f"{folder}: holds {join_some((str(f.relative_to(folder)) for f in files), 3)}; expected names of "
                "files or their folders that begin with train or val, as the hub has them"
            )

    def place(self, split: str) -> Path:
        """The folder of the files."""
        return self._folder

    def layout(self, split: str) -> str:
        """In words."""
        return "rows of an image and a label"

    def parts(self, split: str) -> Iterator[Part]:
        """The files of a split."""
        for path in self._files[split]:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
            yield Part(str(path.relative_to(self._folder)), size, _rows(path))


def _rows(path: Path) -> Iterator[RawImage]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_file(path) as opened, ParquetFile(opened) as file:
            _check_schema({field.name: field.type for field in file.schema_arrow}, path)
            batches = file.iter_batches(ROWS, columns=["image", "label"])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                image = row["image"] or {}  # missing, as its bytes may be: an empty file
                name = PurePosixPath(image.get("path") or f"{path.stem}-{number:06d}").stem
                where = f"{path.name}, row {number}"
                yield image_with_label(row["label"], name, image.get("bytes") or b"", where)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: cut off or damaged ({error}). Download it again and run the same command: "
            "it resumes."
        ) from error


def _check_schema(types: dict[str, Any], path: Path) -> None:
    """Raise DataError unless the columns are those of an image dataset."""
    from pyarrow import null
    from pyarrow.types import is_binary, is_integer, is_large_binary, is_struct

    image, label = types.get("image", null()), types.get("label", null())
    kinds = [field.type for field in image if field.name == "bytes"] if is_struct(image) else []
    has_bytes = any(is_binary(kind) or is_large_binary(kind) for kind in kinds)
    if not has_bytes or not is_integer(label):
        columns = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise DataError(
            f"{path}: has columns {columns}; expected `image` with `bytes` and an integer `label`"
        )


FORMS: dict[str, Callable[[Path], ImageNet]] = {
    ARCHIVES: Archives,
    CLASS_TARS: Archives,
    KAGGLE: Archives,
    FLAT_VAL: Archives,
    SHARDS: Shards,
    PARQUET: Parquet,
}
