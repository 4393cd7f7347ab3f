#!/usr/bin/env python
"""Features of images by any classifier, and how well k-NN and a linear probe classify by them.

    python tools/features.py extract /imagenet/train --resume output/dat_tiny/default --out train.npz
    python tools/features.py extract /imagenet/val --resume output/dat_tiny/default --out val.npz
    python tools/features.py knn train.npz val.npz
    python tools/features.py probe train.npz val.npz

Features are what the classifier's last layer reads, float32. A .npz holds `features` [images, width], `labels`,
`classes`, `files` and `model`; a .parquet (needs pyarrow) has a row per image. A folder without class folders has
features and no labels.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from analysis.statistics import wilson
from engine import build
from engine.suite import file_name
from tools.common.classifier import (
    Classifier,
    add_arguments,
    add_loader_arguments,
    load_classifier,
    log_to_stderr,
)
from tools.predict import Pictures, list_pictures
from utils.distributed import Process
from utils.errors import ConfigError, DataError, DivergedError, as_exit_code
from utils.files import replace_atomically, require_folder_of
from utils.logging import logger
from utils.text import join_some, quantity

TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO (Caron et al. 2021)
ARCHIVES = (".zip", ".tar", ".pack")


@dataclass(frozen=True)
class Features:
    """Features float32 [N, width] of N images; labels int64 [N] are indices of `classes`, -1 for none."""

    features: np.ndarray
    labels: np.ndarray
    classes: list[str]
    files: list[str]
    model: str

    def __len__(self) -> int:
        return len(self.features)


# --- Extract --------------------------------------------------------------------------------------


@torch.inference_mode()
def extract(classifier: Classifier, path: Path) -> Features:
    """The features of the images below `path`: class folders, also in an archive, or images without classes.

    Unreadable images are named and left out. Raises DataError where there is none, DivergedError for features that are
    not finite.
    """
    images, labels, classes, files = open_images(classifier, path)
    head = pooled_head(classifier.model)
    normalize = build.normalize(classifier.cfg, classifier.device)
    loader = build.val_loader(classifier.cfg, images, Process(0, 1, classifier.device))
    features: list[np.ndarray] = []
    kept: list[int] = []
    with tqdm(total=len(images), desc="features", unit="img", leave=False, disable=None) as bar:
        for pictures, marks, indices, bad in loader:
            for file in bad:
                logger.warning(f"{file.path} cannot be read: {file.reason}")
            with classifier.autocast():
                found = head(normalize(pictures)).float().cpu()
            readable = marks != data.NO_LABEL
            features.append(found[readable].numpy())
            kept += indices[readable].tolist()
            bar.update(len(pictures))
    if not kept:
        raise DataError(f"{path}: none of the {len(images)} images can be read")
    if len(kept) < len(images):
        logger.warning(f"{len(images) - len(kept)} of {len(images)} images are left out")
    names = [files[index] for index in kept]
    values = np.concatenate(features)
    if len(broken := np.flatnonzero(~np.isfinite(values).all(1))):
        raise DivergedError(
            f"{path}: the features of {len(broken)} of {len(kept)} images are not finite, first "
            f"{names[broken[0]]}. Try --amp-dtype bfloat16 or float32; if it stays, the weights are damaged."
        )
    return Features(values, labels[kept], classes, names, classifier.title)


def open_images(
    classifier: Classifier, path: Path
) -> tuple[Dataset, np.ndarray, list[str], list[str]]:
    """Images, their labels, the classes and the files' names."""
    subfolders = path.is_dir() and any(
        p.is_dir() and not p.name.startswith(".") for p in path.iterdir()
    )
    if not subfolders and path.suffix not in ARCHIVES:
        files = list_pictures([str(path)])
        labels = np.full(len(files), -1)
        return Pictures(files, classifier), labels, [], [str(Path(f).name) for f in files]
    dataset = data.ImageDataset(
        path.parent,
        path.name,
        transform=classifier.transform,
        train=False,
        allow_missing=False,
        seed=0,
        apply_exif=classifier.apply_exif,
        checksums=None,
        skip_bad=True,
        holdout=0.0,
    )
    files = [file_name(dataset, index) for index in range(len(dataset))]
    return dataset, dataset.labels.astype(np.int64), dataset.classes, files


def pooled_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """From images to the features [B, width] that the model's last layer reads."""
    if not hasattr(model, "forward_features"):
        raise ConfigError(f"{type(model).__name__} has no forward_features, as timm's models have")
    return lambda x: model.forward_head(model.forward_features(x), pre_logits=True)


# --- Files ----------------------------------------------------------------------------------------


def write(found: Features, path: Path) -> None:
    """Write .npz or .parquet. Raises StorageError, ConfigError without pyarrow."""
    if path.suffix == ".parquet":
        pyarrow, parquet = import_pyarrow()
        names = [found.classes[label] if label >= 0 else None for label in found.labels]
        table = pyarrow.table(
            {
                "file": found.files,
                "label": found.labels,
                "class": pyarrow.array(names, pyarrow.string()),
                "features": list(found.features),
            },
            metadata={"model": found.model, "classes": "\n".join(found.classes)},
        )
        with replace_atomically(path) as temporary:
            parquet.write_table(table, temporary)
        return
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            features=found.features,
            labels=found.labels,
            classes=np.array(found.classes, np.str_),
            files=np.array(found.files, np.str_),
            model=np.array(found.model),
        )


def read(path: Path) -> Features:
    """The features in a .npz or .parquet file of `write`. Raises DataError."""
    try:
        if path.suffix == ".parquet":
            table = import_pyarrow()[1].read_table(path)
            metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
            return Features(
                np.stack(table["features"].to_pylist()).astype(np.float32),
                table["label"].to_numpy(),
                metadata["classes"].split("\n") if metadata["classes"] else [],
                table["file"].to_pylist(),
                metadata["model"],
            )
        with np.load(path, allow_pickle=False) as arrays:
            return Features(
                arrays["features"],
                arrays["labels"],
                arrays["classes"].tolist(),
                arrays["files"].tolist(),
                str(arrays["model"]),
            )
    except (
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"{path}: not a file of features ({error}); write it with extract"
        ) from error


def import_pyarrow() -> tuple:
    """The optional package pyarrow, and its parquet. Raises ConfigError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "a .parquet file needs pyarrow: pip install pyarrow, or use .npz"
        ) from error
    return pyarrow, pyarrow.parquet


# --- Classify -------------------------------------------------------------------------------------


def read_pair(train: Path, test: Path) -> tuple[Features, Features]:
    """Training and test features of one model, the test labels by the training set's classes. Raises DataError."""
    a, b = read(train), read(test)
    for path, found in ((train, a), (test, b)):
        if (found.labels < 0).any():
            raise DataError(
                f"{path}: has images without a class; extract a folder of class folders"
            )
        if not np.isfinite(found.features).all():
            raise DataError(f"{path}: has features that are not finite; extract them again")
    if a.features.shape[1] != b.features.shape[1] or a.model != b.model:
        raise DataError(
            f"{train} is of {a.model}, {test} of {b.model}; extract both with one model"
        )
    if unknown := set(b.classes) - set(a.classes):
        raise DataError(
            f"{test}: classes that {train} does not have: {join_some(sorted(unknown), 5)}"
        )
    position = {name: index for index, name in enumerate(a.classes)}
    labels = np.array([position[name] for name in b.classes])[b.labels]
    return a, Features(b.features, labels, a.classes, b.files, b.model)


def classify_by_neighbours(train: Features, test: Features, k: int) -> np.ndarray:
    """bool [N]: right by the weighted vote of the `k` nearest by cosine, as DINO does (Caron et al. 2021, 4.1)."""
    model = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    )
    model.fit(train.features, train.labels)
    return model.predict(test.features) == test.labels


def classify_by_probe(train: Features, test: Features, c: float) -> np.ndarray:
    """bool [N]: right by logistic regression on standardised features; `c` is the inverse of its L2 penalty."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    model.fit(train.features, train.labels)
    return model.predict(test.features) == test.labels


def describe(right: np.ndarray) -> str:
    """Accuracy with its 95 % interval."""
    low, high = wilson(int(right.sum()), len(right))
    return f"top-1 {100 * right.mean():.2f} % [{100 * low:.2f}, {100 * high:.2f}] of {len(right)} images"


# --- Command line ---------------------------------------------------------------------------------


def run_extract(args: argparse.Namespace) -> None:
    """Write the features of a folder."""
    if args.out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"--out {args.out}: expected a name that ends in .npz or .parquet")
    if args.out.suffix == ".parquet":
        import_pyarrow()
    require_folder_of(args.out)
    if not args.path.exists():
        raise DataError(f"{args.path}: no such folder or archive")
    found = extract(load_classifier(args), args.path)
    write(found, args.out)
    print(f"{args.out}: {quantity(len(found), 'image')}, {found.features.shape[1]} features each")


def run_knn(args: argparse.Namespace) -> None:
    """Print the accuracy of k nearest neighbours."""
    train, test = read_pair(args.train, args.test)
    if not 1 <= args.k <= len(train):
        raise ConfigError(f"-k {args.k}: expected 1 to {len(train)}, the images of {args.train}")
    print(f"k-NN, k {args.k}: {describe(classify_by_neighbours(train, test, args.k))}")


def run_probe(args: argparse.Namespace) -> None:
    """Print the accuracy of a linear probe."""
    train, test = read_pair(args.train, args.test)
    if args.c <= 0:
        raise ConfigError(f"-c {args.c:g}: expected a number above 0")
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{args.train}: has images of one class, expected at least two")
    print(f"linear probe, C {args.c:g}: {describe(classify_by_probe(train, test, args.c))}")


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run one sub-command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("extract", help="write the features of a folder")
    sub.add_argument("path", type=Path, metavar="FOLDER", help="or .zip, .tar, .pack")
    sub.add_argument("--out", type=Path, required=True, help=".npz or .parquet")
    add_arguments(sub)
    add_loader_arguments(sub)
    sub.set_defaults(run=run_extract)
    for name, run, text in (
        ("knn", run_knn, "accuracy of k nearest neighbours"),
        ("probe", run_probe, "accuracy of logistic regression"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("train", type=Path, help="features that are learned from")
        sub.add_argument("test", type=Path, help="features that are classified")
        sub.set_defaults(run=run)
        if name == "knn":
            sub.add_argument("-k", type=int, default=20, help="neighbours, default 20")
        else:
            sub.add_argument("-c", type=float, default=1.0, help="inverse of the L2 penalty")
    args = parser.parse_args(arguments)
    log_to_stderr()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
