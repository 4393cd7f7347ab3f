"""Test sets of ImageNet and of own data: where they lie, which classes they have, and one evaluation of them all.

val, ReaL, V2, A, R, Sketch, C, ObjectNet and ImageNet-X, as `main.py --eval --sets DIR` runs them. Labels come from
folder names alone, never from a folder's position. docs/evaluation.md says what each set is.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from analysis import imagenet
from analysis.collector import Collector, View, extend_evaluation, write_evaluation, write_set
from analysis.predictions import Evaluation, SetRecord, escape_returns
from data import ImageDataset, RemotePath
from data.dataset import EvalSample, LoadedDataset
from data.readers import open_split
from utils.distributed import Process, on_main
from utils.errors import ConfigError, DataError, StorageError
from utils.logging import logger
from utils.text import join_some, nearest, quantity

SUFFIXES = (".pack", ".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CORRUPT_INFO = "corruptions.json"  # what tools/corrupt.py leaves beside what it made
FACTORS_FILE = "imagenet_x_val_multi_factor.jsonl"


@dataclass(frozen=True)
class TestSet:
    """A test set below --sets.

    name: of its predictions; for ImageNet-C of its cells, with corruption and severity behind it.
    group: its name for --only.
    folder: pattern of its folder's or archive's name, in small letters with "-" for " " and "_".
    letter: of its 200 classes, "a" or "r"; empty for all 1000.
    imagenet_only: whether its labels are ImageNet-1k's.
    """

    name: str
    title: str
    group: str
    folder: str
    letter: str = ""
    imagenet_only: bool = True


V2 = r"(imagenet-?v2|v2)-({})(-format-val)?"
SETS = (
    TestSet("val", "val", "val", "", imagenet_only=False),
    TestSet("v2-matched-frequency", "ImageNetV2, matched frequency", "v2", V2.format("matched-frequency|b-33")),
    TestSet("v2-threshold-0.7", "ImageNetV2, threshold 0.7", "v2", V2.format(r"threshold-?0\.7|a-44")),
    TestSet("v2-top-images", "ImageNetV2, top images", "v2", V2.format("top-images|c-12")),
    TestSet("a", "ImageNet-A", "a", "imagenet-a", "a"),
    TestSet("r", "ImageNet-R", "r", "imagenet-r", "r"),
    TestSet("sketch", "ImageNet-Sketch", "sketch", "(imagenet-)?sketch"),
    TestSet("c", "corruptions", "c", r"(.+-)?c", imagenet_only=False),
    TestSet("c", "further corruptions", "c-extra", r"(.+-)?c", imagenet_only=False),
    TestSet("objectnet", "ObjectNet", "objectnet", r"objectnet(-1\.0)?"),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(row.group for row in SETS))
FROM_VAL = {"real": "val", "x": "val"}  # scored from val's predictions, without a pass
CELLS = {"c": imagenet.CORRUPTIONS, "c-extra": imagenet.EXTRA_CORRUPTIONS}


# --- Find -----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A test set on the disk: `split` below `root` is what `open_split` opens; "" for a tree of several splits."""

    test_set: TestSet
    root: Path | RemotePath
    split: str


def parse_only(text: str) -> list[str]:
    """The groups of `--only`, names with commas between; all for "". Raises ConfigError for an unknown one."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    known = [*GROUPS, *FROM_VAL]
    for word in words:
        if word not in known:
            raise ConfigError(
                f"TEST.ONLY: there is no test set {word!r}, only {', '.join(known)}{nearest(word, known)}"
            )
    return [FROM_VAL.get(word, word) for word in words] or list(GROUPS)


def find_sets(
    folder: Path | None, data_path: Path | RemotePath | None, groups: Sequence[str]
) -> list[Found]:
    """The test sets of `groups` below `folder`, and val below `data_path`; logs what is found and what is missing.

    Raises DataError for a folder that is missing, a set that lies there twice, and where there is nothing.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; name the one that holds the test sets with --sets"
        )
    names = sorted(path.name for path in folder.iterdir()) if folder is not None else []
    found, missing = [], []
    for test_set in (row for row in SETS if row.group in groups):
        if test_set.group == "val":
            if data_path is not None:
                found.append(Found(test_set, data_path, "val"))
            else:
                missing.append("val, and what is scored from it: add --data-path")
            continue
        splits = {_stem(n) for n in names if re.fullmatch(test_set.folder, _plain_name(_stem(n)))}
        if len(splits) > 1:
            raise DataError(
                f"{folder}: {' and '.join(sorted(splits))} are both {test_set.title}; leave one there"
            )
        if test_set.group in CELLS:
            trees = [folder / split for split in splits if (folder / split).is_dir()]
            if trees and any(_cells(trees[0], test_set.group)):
                found.append(Found(test_set, trees[0], ""))
                continue
        elif splits:
            split = splits.pop()
            nested = test_set.group == "objectnet"
            found.append(
                Found(test_set, folder / split, "images")
                if nested
                else Found(test_set, folder, split)
            )
            continue
        missing.append(f"{test_set.title}{_hint(test_set, names)}")
    for test_set, root, split in found:
        logger.info(f"Found {test_set.title}: {root / split}")
    for line in missing:
        logger.info(f"Missing {line}")
    if not found and folder is None:
        raise DataError("There are no validation images: add --data-path FOLDER, or --sets DIR")
    if not found:
        raise DataError(
            f"{folder}: holds none of the test sets {', '.join(groups)}; docs/evaluation.md lists their folders"
        )
    return found


def _stem(name: str) -> str:
    """The name of what `open_split` finds as folder, pack, zip or tar."""
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)


def _plain_name(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _hint(test_set: TestSet, names: list[str]) -> str:
    """What to do where only something unreadable of the set is there."""
    for name in names:
        stem = next((name.removesuffix(s) for s in COMPRESSED if name.endswith(s)), None)
        if stem is not None and re.fullmatch(test_set.folder, _plain_name(stem)):
            return f": {name} is compressed, unpack it"
        if test_set.group in CELLS and re.fullmatch(test_set.folder, _plain_name(_stem(name))):
            return f": {name} holds no <corruption>/<1 … 5>; unpack its archives there"
    return ""


def _cells(tree: Path, group: str) -> Iterator[tuple[str, int]]:
    """(corruption, severity) of what is there of ImageNet-C's layout, in its order."""
    for corruption in CELLS[group]:
        for severity in imagenet.SEVERITIES:
            if any((tree / corruption / f"{severity}{s}").exists() for s in ("", *SUFFIXES)):
                yield corruption, severity


# --- Open -----------------------------------------------------------------------------------------


# How pictures of a set are cropped: as the evaluation says; not at all (resized only if they have another size, as
# ImageNet-C was cropped when it was made); or without ObjectNet's red border, then as the evaluation says.
CROPS = {"own": {}, "none": {"crop_mode": "center", "crop_pct": 1.0}, "border": {}}
BORDER = 2  # pixels


class WithoutBorder:
    """`transform` after `border` pixels were cut off at every side of a picture that is larger."""

    def __init__(self, transform: Callable[[Tensor], Tensor], border: int):
        self.transform = transform
        self.border = border

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [height, width, 3] to [3, H, W]."""
        inside = slice(self.border, -self.border)
        large = min(pixels.shape[:2]) > 2 * self.border
        return self.transform(pixels[inside, inside] if large else pixels)


class OpenDataset(NamedTuple):
    """How to open a split with an evaluation's settings.

    dataset: (root, split, classes, crop, allow_missing) to ImageDataset; `crop` is a key of CROPS.
    val: classes to the ImageDataset of val, or of what is held out of train.
    pixels: `crop` to what changes pixels, for the record.
    val_subset: whether sets of own classes may lack some.
    holdout: the share that is held out of train in the place of val; 0: none.
    """

    dataset: Callable[..., ImageDataset]
    val: Callable[[list[str]], ImageDataset]
    pixels: Callable[[str], dict]
    val_subset: bool
    holdout: float


@dataclass(frozen=True)
class Pass:
    """One pass over images, from which one or several sets of predictions come."""

    title: str
    group: str
    dataset: ImageDataset
    views: tuple[View, ...]
    pixels: dict
    note: str = ""


def open_sets(found: list[Found], classes: list[str], opener: OpenDataset) -> list[Pass]:
    """The passes over the sets in `found` for a model of `classes`.

    Raises DataError where folders do not have a set's classes, and for ImageNet's sets with other classes.
    """
    if not imagenet.are_imagenet(classes):
        refused = [row.test_set for row in found if row.test_set.imagenet_only]
        if refused:
            raise DataError(
                f"{', '.join(row.title for row in refused)}: labelled by ImageNet-1k's 1000 classes, the weights know "
                f"{len(classes)} others ({join_some(classes, 3)}). Leave them out with --only val,c"
            )
    return [one for row in found for one in _open(row, classes, opener)]


def _open(found: Found, classes: list[str], opener: OpenDataset) -> Iterator[Pass]:
    test_set, root, split = found
    title, group = test_set.title, test_set.group
    if group in CELLS:
        yield from _open_cells(found, classes, opener)
        return
    if group == "objectnet":
        yield _open_objectnet(found, classes, opener)
        return
    if group == "val":
        yield _open_val(found, classes, opener)
        return
    folders = classes
    if group == "v2":
        folders = _numbered_folders(open_split(root, split).folders, classes, root / split)
    dataset = opener.dataset(root, split, folders, "own", bool(test_set.letter))
    view = View(test_set.name)
    if test_set.letter:
        own = imagenet.subset_wnids(test_set.letter)
        if (folders := dataset.reader.folders) != set(own):
            missing = join_some(sorted(set(own) - folders)) or "none"
            others = join_some(sorted(folders - set(own))) or "none"
            raise DataError(
                f"{root / split}: {len(folders)} class folders, expected {title}'s 200 "
                f"(missing {missing}; others {others})"
            )
        view = replace(view, kept=_indices(own, classes))
    yield Pass(title, group, dataset, (view,), opener.pixels("own"))


def _open_val(found: Found, classes: list[str], opener: OpenDataset) -> Pass:
    """val, and with ImageNet's classes the clean partners of A and R: their classes in val, masked like them."""
    dataset = opener.val(classes)
    note = f"held out of train, DATA.HOLDOUT {opener.holdout:g}" if opener.holdout else ""
    views = [View(found.test_set.name)]
    if imagenet.are_imagenet(classes):
        _check_names(dataset, opener.val_subset)
        for letter in "ar":
            kept = _indices(imagenet.subset_wnids(letter), classes)
            images = np.flatnonzero(np.isin(dataset.labels, kept))
            if len(images):
                views.append(View(f"{letter}-clean", images, kept))
    pixels = opener.pixels("own")
    return Pass(found.test_set.title, "val", dataset, tuple(views), pixels, note)


def _check_names(dataset: ImageDataset, val_subset: bool) -> None:
    """Log whether ReaL's labels can be found by val's file names; names of some images alone are a DataError."""
    names = [file_name(dataset, index) for index in range(len(dataset))]
    known = sum(imagenet.val_number(name) is not None for name in names)
    logger.info(f"ReaL: labels for {known} of {len(names)} images of val, by their file names")
    if 0 < known < len(names) and not val_subset:
        raise DataError(
            f"{dataset.reader.path}: {len(names) - known} of {len(names)} files are not named "
            "ILSVRC2012_val_<8 digits>; restore their names for ReaL, or leave ReaL out with DATA.VAL_SUBSET True"
        )


def _indices(names: list[str], classes: list[str]) -> list[int]:
    position = {name: index for index, name in enumerate(classes)}
    return sorted(position[name] for name in names)


def _numbered_folders(folders: set[str], classes: list[str], path: Path) -> list[str]:
    """The folder of each class where V2's are numbers, positions in sorted wnids; else the classes themselves.

    Sorted as text, "100" would come after "10", and nearly every label would be another.
    """
    if not all(name.isdecimal() for name in folders):
        return classes
    numbers = [str(number) for number in range(1000)]
    if folders != set(numbers):
        missing = join_some(sorted(set(numbers) - folders, key=int), 5) or "none"
        raise DataError(
            f"{path}: {len(folders)} numbered class folders, expected 0 to 999 (missing {missing}); copy the set again"
        )
    position = dict(zip(imagenet.wnids(), numbers, strict=True))
    return [position[name] for name in classes]


def _open_cells(found: Found, classes: list[str], opener: OpenDataset) -> Iterator[Pass]:
    test_set, tree, _ = found
    cells = list(_cells(tree, test_set.group))
    wanted = len(CELLS[test_set.group]) * len(imagenet.SEVERITIES)
    logger.info(f"{tree}: {len(cells)} of the {wanted} cells of {test_set.title}")
    info = tree / CORRUPT_INFO
    note = "generated by tools/corrupt.py" if info.exists() else ""
    images = json.loads(info.read_bytes()).get("images") if note else None  # of each cell
    for corruption, severity in cells:
        split = str(severity)
        dataset = opener.dataset(tree / corruption, split, classes, "none", opener.val_subset)
        if images not in (None, len(dataset)):
            raise DataError(
                f"{tree / corruption / split}: {len(dataset):,} of {images:,} images; run the same tools/corrupt.py "
                "command: it resumes"
            )
        view = View(f"c-{corruption}-{severity}")
        title = f"{corruption} {severity}"
        yield Pass(title, test_set.group, dataset, (view,), opener.pixels("none"), note)


def _open_objectnet(found: Found, classes: list[str], opener: OpenDataset) -> Pass:
    test_set, root, split = found
    mapping = imagenet.objectnet_mapping(root / "mappings")
    names = list(mapping)
    folders = sorted(open_split(root, split).folders)
    if missing := set(names) - set(folders):
        raise DataError(f"{root / split}: no folder {join_some(sorted(missing), 5)}; copy it again")
    dataset = KeptImages(opener.dataset(root, split, folders, "border", False), names)
    wnids, position = imagenet.wnids(), {name: i for i, name in enumerate(classes)}
    pooled = [[position[wnids[index]] for index in mapping[name]] for name in names]
    view = View(test_set.name, pooled=pooled, classes=names)
    note = f"{len(names)} classes shared with ImageNet"
    return Pass(test_set.title, test_set.group, dataset, (view,), opener.pixels("border"), note)


class KeptImages(LoadedDataset):
    """The images of the class folders `names` of an ImageDataset, labelled by their position in `names`."""

    def __init__(self, dataset: ImageDataset, names: list[str]):
        position = {name: index for index, name in enumerate(names)}
        labels = np.array([position.get(name, -1) for name in dataset.classes])[dataset.labels]
        self.dataset = dataset
        self.reader = dataset.reader
        self.classes = names
        self.indices = np.flatnonzero(labels >= 0)
        self.labels = labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> EvalSample:
        sample = self.dataset[int(self.indices[index])]
        label = sample.label if sample.bad else int(self.labels[index])
        return sample._replace(label=label, index=index)

    def prefetch(self, items: Iterable[int]) -> None:
        """Request the files of images that are read soon, if they are on a server."""
        self.dataset.prefetch(int(self.indices[index]) for index in items)

    def __str__(self) -> str:
        return f"{self.reader.path}: {quantity(len(self), 'image')} of {quantity(len(self.classes), 'class')}"

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return self.dataset.path(int(self.indices[index]))

    def file(self, index: int) -> str:
        """The file name of image `index` below the set's folder."""
        return file_name(self.dataset, int(self.indices[index]))

    @property
    def fingerprint(self) -> str:
        """Of all images of the folder."""
        return self.dataset.fingerprint


def file_name(dataset: ImageDataset | KeptImages, index: int) -> str:
    """The path of image `index` below the set's folder, as predictions have it."""
    if isinstance(dataset, KeptImages):
        return dataset.file(index)
    return escape_returns(dataset.reader.names[index].decode(errors="backslashreplace"))


# --- Evaluate -------------------------------------------------------------------------------------


def evaluate_passes(
    passes: list[Pass],
    evaluation: Evaluation,
    *,
    score: Callable[[Dataset, list[Collector]], None],
    process: Process,
    keep_logits: bool,
) -> Evaluation:
    """Evaluate one model on the sets of `passes` and write what it says about every image.

    score: run the model over a dataset and fill the collectors.

    `evaluation` says whose predictions they are; returned with the sets, also those that its folder had before.
    Raises DataError where that folder holds predictions of other weights or settings, StorageError where it cannot be
    written, DivergedError for logits that are not finite.
    """
    evaluation = on_main(lambda: _begin(evaluation))
    val_accuracy = 0.0
    for one in passes:
        collectors = [
            Collector(
                view,
                one.dataset.labels,
                len(evaluation.classes),
                process.device,
                keep_logits=keep_logits,
            )
            for view in one.views
        ]
        score(one.dataset, collectors)
        files = np.array([file_name(one.dataset, i) for i in range(len(one.dataset))], object)
        for collector in collectors:
            view = collector.view
            own = files if view.images is None else files[view.images]
            predictions, logits = collector.gather(own)
            record = SetRecord(
                images=len(predictions),
                sha256="",
                fingerprint=one.dataset.fingerprint,
                pixels=one.pixels,
                kept=view.kept,
                classes=view.classes,
                source=str(one.dataset.reader.path),
                note=one.note,
            )
            if process.is_main:
                record = write_set(evaluation.folder, collector, predictions, logits, record)
            evaluation = replace(evaluation, sets={**evaluation.sets, view.name: record})
            accuracy = 100 * predictions.right.mean()
            logger.info(
                f"{view.name}: {quantity(len(predictions), 'image')}, top-1 {accuracy:.3f} %"
            )
            if view.name == "val":
                val_accuracy = accuracy
            elif one.group not in ("a", *CELLS) and accuracy < 1 and val_accuracy > 20:
                logger.warning(permuted_labels(view.name, accuracy, val_accuracy))
        evaluation = on_main(functools.partial(_record, evaluation))
    return evaluation


def _begin(evaluation: Evaluation) -> Evaluation:
    """`evaluation` with the sets that its folder has already; written there before hours of work: can it be?"""
    evaluation = extend_evaluation(evaluation)
    try:
        evaluation.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{evaluation.folder} cannot be written: {error.strerror}. Choose another folder with --out."
        ) from error
    return _record(evaluation)


def _record(evaluation: Evaluation) -> Evaluation:
    """Write `evaluation` with the sets that another evaluation of these weights has put into its folder meanwhile."""
    evaluation = extend_evaluation(evaluation)
    write_evaluation(evaluation)
    return evaluation


def permuted_labels(name: str, accuracy: float, val_accuracy: float) -> str:
    """What to say of a set whose accuracy is that of guessing, beside a model that is right on val."""
    return (
        f"{name}: top-1 {accuracy:.2f} %, val {val_accuracy:.2f} %: its labels are probably permuted. Known causes: "
        "folders named 0 … 999 that were sorted as text before they were renamed; the 200 folders of a subset taken "
        "for classes 0 … 199; a flat folder of images sorted into classes by the ids of the ILSVRC devkit."
    )
