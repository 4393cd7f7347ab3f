"""Layout checks: splits, classes, labels and symbolic links of a dataset."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from data import ImageDataset, RemotePath
from data.listing import HIDDEN
from data.readers import FolderReader
from engine import build
from tools.checks.report import Finding, format_bytes
from utils.errors import DataError
from utils.text import quantity

MANY_IGNORED = 0.05  # ignored files by image that are worth a warning


def open_splits(
    root: Path | RemotePath,
    splits: list[str],
    cfg: CfgNode | None,
    classes: list[str] | None = None,
) -> tuple[dict[str, ImageDataset], list[Finding]]:
    """The datasets that can be opened, by split, and findings about their layout and classes.

    classes: those of a checkpoint, which decides the labels; None: as DATA.CLASS_LIST or the folders have them.
    With DATA.HOLDOUT both splits are parts of train, as for the run.
    """
    opened: dict[str, ImageDataset] = {}
    findings = []
    subset = cfg is not None and cfg.DATA.VAL_SUBSET
    share = cfg.DATA.HOLDOUT if cfg is not None else 0.0
    try:
        if classes is None and cfg is not None:
            classes = build.class_list(cfg)
    except DataError as error:
        findings.append(Finding("FAIL", "class list", str(error)))
    for split in splits:
        try:
            dataset = ImageDataset(
                root, "train" if share else split, transform=np.asarray, train=False, classes=classes,
                seed=0, allow_missing=subset and split == "val" and not share, apply_exif=False,
                checksums=None, skip_bad=False, holdout=share, part="train" if split == "train" else "holdout",
            )  # fmt: skip
        except DataError as error:
            remedy = "main.py --eval does not need it" if split == "train" else ""
            findings.append(Finding("FAIL", split, str(error), remedy))
            continue
        opened[split] = dataset
        classes = dataset.classes
        total = dataset.reader.sizes.sum()
        findings.append(Finding("OK", split, f"{dataset}, {format_bytes(total)}"))
        if unread := dataset.reader.describe_unread():
            remedy = "remove or rename what is not meant"
            findings.append(Finding("WARN", split, unread, remedy))
        others = sum(n for reason, n in dataset.reader.ignored.items() if reason != HIDDEN)
        if others > MANY_IGNORED * len(dataset):
            text = f"{quantity(others, 'file')} beside {quantity(len(dataset), 'image')} ignored"
            remedy = "convert them, if they are pictures, or remove them; the line above has their suffixes"
            findings.append(Finding("WARN", split, text, remedy))
        counts = np.bincount(dataset.labels, minlength=len(classes))
        least, most = counts.min(), counts.max()
        spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        spread += f" images in each of {quantity(len(classes), 'class')}"
        findings.append(Finding("OK", f"{split} classes", spread))
    if cfg is not None and classes and cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        text = f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, the dataset has {quantity(len(classes), 'class')}"
        findings.append(Finding("FAIL", "classes", text, "set it to 0 to follow the dataset"))
    return opened, findings


def check_links(root: Path, dataset: ImageDataset) -> Iterator[Finding]:
    """Findings about symbolic links that are broken, lead back to a parent, or leave the dataset's root."""
    if not isinstance(dataset.reader, FolderReader):
        return
    real_root = os.path.realpath(root)
    kinds: dict[str, list[str]] = {"broken": [], "circular": [], "outside": []}
    count = 0
    for path in find_links(dataset.reader.path):
        count += 1
        real = os.path.realpath(path)
        if not os.path.exists(path):
            kinds["broken"].append(path)
        elif path.startswith(real + os.sep):
            kinds["circular"].append(path)
        elif not real.startswith(real_root + os.sep):
            kinds["outside"].append(path)
    for kind, level, text, remedy in (
        ("broken", "FAIL", "without a target", "restore their targets, or remove them"),
        ("circular", "WARN", "back to a parent folder, not followed", "remove them"),
        ("outside", "WARN", f"out of {root}", "make sure that every node of the run has their targets"),
    ):  # fmt: skip
        if paths := kinds[kind]:
            yield Finding(level, "links", f"{quantity(len(paths), 'link')} {text}", remedy, paths)
    if count and not any(kinds.values()):
        yield Finding(
            "OK",
            "links",
            f"{quantity(count, 'link')} in {dataset.reader.path}, all inside the dataset",
        )


def find_links(folder: str) -> Iterator[str]:
    """The paths of all symbolic links below `folder`; they are not followed."""
    for entry in os.scandir(folder):
        if entry.is_symlink():
            yield entry.path
        elif entry.is_dir(follow_symlinks=False) and os.access(entry.path, os.R_OK | os.X_OK):
            yield from find_links(entry.path)
