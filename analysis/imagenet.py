"""ImageNet-1k's class lists and what its test sets need: ReaL's labels, ImageNet-C's references, ObjectNet, ImageNet-X.

Lists and ReaL's labels come with timm, ObjectNet's mapping with its images. An index without further words is a
position in sorted WordNet ids (wnids), the order in which nearly every ImageNet-1k classifier has its outputs.
"""

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import DataError

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")  # in the name of a validation image

# ImageNet-C, in the order of its paper (Hendrycks & Dietterich 2019, arXiv 1903.12261).
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # never part of mCE
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's error, a share, mean over the severities (google-research/augmix, imagenet.py) and on clean images (the
# paper, table 1): what a model's errors are divided by.
ALEXNET_ERRORS = dict(
    zip(
        CORRUPTIONS,
        (
            *(0.886428, 0.894468, 0.922640),
            *(0.819880, 0.826268, 0.785948, 0.798360),
            *(0.866816, 0.826572, 0.819324, 0.564592),
            *(0.853204, 0.646056, 0.717840, 0.606500),
        ),
        strict=True,
    )
)
ALEXNET_CLEAN_ERROR = 0.435


# --- Class lists ----------------------------------------------------------------------------------


def wnids() -> list[str]:
    """The 1000 wnids, sorted."""
    return pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split()


def are_imagenet(classes: Sequence[str]) -> bool:
    """Whether `classes` are ImageNet-1k's, in any order."""
    return len(classes) == 1000 and set(classes) == set(wnids())


def subset_wnids(letter: str) -> list[str]:
    """The 200 wnids of ImageNet-A ("a") or ImageNet-R ("r"), sorted."""
    content = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_synsets.txt")
    return content.decode().split()


def describe(classes: Sequence[str]) -> list[str] | None:
    """The classes in words where all of them are wnids that timm knows, "tench, Tinca tinca"; else None."""
    # A report of scores that are there needs no timm, which brings torch and takes seconds.
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    try:
        return [info.label_name_to_description(name) for name in classes]
    except KeyError:
        return None


def val_number(file: str) -> int | None:
    """The number, from 1 to 50,000, of the validation image with this file name; None for another name."""
    match = VAL_NAME.search(file.rsplit("/", 1)[-1])
    return int(match[1]) if match and 1 <= int(match[1]) <= 50_000 else None


# --- ReaL -----------------------------------------------------------------------------------------


def real_labels(files: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """ReaL's labels of validation images, as indices of `classes`; an empty list for an image without labels.

    Joined by the number in the file's name. Raises DataError for a name without one. Beyer et al. 2020, arXiv
    2006.07159.
    """
    numbers = [val_number(file) for file in files]
    if None in numbers:
        file = files[numbers.index(None)]
        raise DataError(
            f"ReaL has no labels for {numbers.count(None)} of {len(files)} images, such as {file}; "
            "expected file names with ILSVRC2012_val_<8 digits>"
        )
    content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    labels, position = json.loads(content), {name: i for i, name in enumerate(classes)}
    own = [position[name] for name in wnids()]
    return [[own[label] for label in labels[number - 1]] for number in numbers]


def real_hits(labels: Sequence[Sequence[int]], top: np.ndarray) -> np.ndarray:
    """bool [N, K]: one of the first k + 1 predictions in `top` [N, K] is among an image's labels."""
    hits = np.zeros(top.shape, dtype=bool)
    for row, allowed in enumerate(labels):
        hits[row] = np.isin(top[row], allowed)
    return np.maximum.accumulate(hits, axis=1)


# --- ObjectNet ------------------------------------------------------------------------------------


def objectnet_mapping(folder: Path) -> dict[str, list[int]]:
    """ObjectNet's folders that share classes with ImageNet-1k, sorted, each with its ImageNet indices.

    Read from `folder`, the `mappings` beside its images. Raises DataError.
    """
    try:
        labels = json.loads((folder / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
        shared = json.loads((folder / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
        numbers = json.loads(
            (folder / "pytorch_to_imagenet_2012_id.json").read_text(encoding="utf-8")
        )
        lines = (folder / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        order = {int(number): int(index) for index, number in numbers.items()}
        index_of = {line.strip(): order[i] for i, line in enumerate(lines)}
        return {
            name: [index_of[words.strip()] for words in shared[label].split(";")]
            for name, label in sorted(labels.items())
            if label in shared
        }
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise DataError(
            f"{folder}: cannot be read as ObjectNet's mappings ({type(error).__name__}: {error}); "
            "copy the folder `mappings` of its release there"
        ) from error


# --- ImageNet-X -----------------------------------------------------------------------------------


def read_factors(path: Path) -> tuple[list[str], dict[int, np.ndarray]]:
    """ImageNet-X's factors and, by the number of a validation image, bool [factors]: which apply to it.

    Raises DataError. Idrissi et al. 2022, arXiv 2211.01866.
    """
    factors, found = [], {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if not factors:
                values = {
                    name: record[name] for name in record if name not in ("file_name", "class")
                }
                factors = [name for name, value in values.items() if value in (0, 1)]
            found[val_number(record["file_name"])] = np.array([record[n] == 1 for n in factors])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as ImageNet-X's annotations ({type(error).__name__}: {error})"
        ) from error
    if not factors or None in found:
        raise DataError(f"{path}: holds no factors of validation images, a JSON object per line")
    return factors, found


def factor_error_ratios(
    factors: list[str], found: dict[int, np.ndarray], files: Sequence[str], right: np.ndarray
) -> dict[str, dict[str, float]]:
    """Of each factor: "images" to which it applies, and "ratio", their error divided by that of all images.

    Of the images in `files` that ImageNet-X annotates; `right` bool [N]. A factor without images is left out.
    """
    rows = [
        (found[val_number(file)], ok)
        for file, ok in zip(files, right, strict=True)
        if val_number(file) in found
    ]
    if not rows:
        return {}
    applies, wrong = np.array([row[0] for row in rows]), ~np.array([row[1] for row in rows])
    ratios = {}
    for column, name in enumerate(factors):
        chosen = applies[:, column]
        if chosen.any() and wrong.any():
            ratio = float(wrong[chosen].mean() / wrong.mean())
            ratios[name] = {"images": int(chosen.sum()), "ratio": ratio}
    return ratios
