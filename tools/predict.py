#!/usr/bin/env python
"""Predictions for pictures: classes and probabilities on the console, as CSV or as JSON lines.

    python tools/predict.py cat.jpg photos/ 'more/**/*.png' --resume output/dat_tiny/default
    find . -name '*.jpg' | python tools/predict.py - --pretrained dat_tiny_in1k_224.pth --out predictions.csv

Pictures are prepared as for an evaluation, whose predictions these are to the digit. Unreadable ones are named and
counted; the exit code is 3 only if all are. Columns are those of an evaluation's CSV without the label's: c1 and p1
are the most probable class and its probability, name1 says what it is.
"""

import argparse
import csv
import glob
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import data
from analysis.collector import Collector, View
from analysis.predictions import TOP, Predictions, escape_returns
from data.classes import describe_ignored
from data.dataset import EvalSample, LoadedDataset
from data.decode import (
    EXIF_TRANSPOSES,
    SAMPLE,
    UNREADABLE,
    decode_pixels,
    open_image,
    orientation,
)
from data.listing import EXTENSIONS, scan_folder
from engine import build
from tools.common.classifier import (
    Classifier,
    add_arguments,
    add_loader_arguments,
    load_classifier,
    log_to_stderr,
)
from utils.distributed import Process
from utils.errors import ConfigError, DataError, as_exit_code
from utils.files import replace_atomically, require_folder_of
from utils.logging import logger
from utils.text import quantity

SUFFIXES = (".csv", ".jsonl")


class Pictures(LoadedDataset):
    """Image files in the order of `files`; one that cannot be read is black and `bad`.

    unturned: bool [N], whether the EXIF data of a picture asks for a rotation that is ignored; complete when all
    pictures are read, in any process.
    """

    def __init__(self, files: list[str], classifier: Classifier):
        self.files = files
        self.transform = classifier.transform
        self.apply_exif = classifier.apply_exif
        self.unturned = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> EvalSample:
        path = Path(self.files[index])
        try:
            if path.exists() and not path.is_file():
                raise ValueError("not a file")  # reading a pipe could wait for ever
            content = path.read_bytes()
            pixels = decode_pixels(content, apply_exif=self.apply_exif)
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error)
            black = torch.zeros_like(self.transform(decode_pixels(SAMPLE)))
            bad = data.BadFile(str(path), reason, None, index)
            return EvalSample(black, data.NO_LABEL, index, [bad])
        if not self.apply_exif:
            self.unturned[index] = orientation(open_image(content)) in EXIF_TRANSPOSES
        return EvalSample(self.transform(pixels), 0, index, [])

    def path(self, index: int) -> str:
        """Where picture `index` lies."""
        return self.files[index]


def list_pictures(paths: Iterable[str]) -> list[str]:
    """The image files that `paths` mean: files, folders with all below them, globs, and "-" for a list on stdin.

    Folders are listed as those of a training set are, and what is ignored in them is logged. In the order of `paths`,
    sorted inside each, none twice. Raises ConfigError where there is none, DataError if a folder cannot be listed or a
    glob matches nothing.
    """
    found: dict[str, None] = {}
    for path in paths:
        if path == "-":
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer if line.strip())
            found |= dict.fromkeys(map(os.fsdecode, lines))
            continue
        matches = [path]
        if glob.has_magic(path) and not Path(path).exists():
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise DataError(f"{path}: matches no file; correct the pattern or leave it out")
        for match in matches:
            if not Path(match).is_dir():
                found[match] = None
                continue
            listing = scan_folder(Path(match), loose=True)
            names = map(os.fsdecode, listing.names.tolist())
            found |= dict.fromkeys(str(Path(match, name)) for name in names)
            if ignored := listing.count_ignored():
                pictures = quantity(len(listing.names), "picture")
                logger.info(f"{match}: {pictures}{describe_ignored(ignored)}")
    if not found:
        raise ConfigError(
            f"no picture in {' '.join(map(str, paths))}; expected {', '.join(map(os.fsdecode, EXTENSIONS))}"
        )
    return list(found)


@torch.inference_mode()
def predict(classifier: Classifier, files: list[str]) -> Predictions:
    """What `classifier` says about the pictures `files`: no labels, and rank 0 where one is unreadable."""
    cfg, device = classifier.cfg, classifier.device
    pictures = Pictures(files, classifier)
    loader = build.val_loader(cfg, pictures, Process(0, 1, device))
    normalize = build.normalize(cfg, device)
    labels = np.zeros(len(files), np.int64)
    collector = Collector(
        View("predictions"), labels, len(classifier.classes), device, keep_logits=False
    )
    with tqdm(total=len(files), desc="predict", unit="img", leave=False, disable=None) as progress:
        for images, marks, indices, bad in loader:
            for file in bad:
                logger.warning(f"{file.path} cannot be read: {file.reason}")
            with classifier.autocast():
                logits = classifier.model(normalize(images)).float()
            collector.add(logits, (marks != data.NO_LABEL).to(device), indices.to(device))
            progress.update(len(images))
    if unturned := int(pictures.unturned.sum()):
        logger.info(
            f"EXIF rotations are ignored, as in training, in {unturned} of {quantity(len(files), 'picture')}: "
            "`--opts DATA.EXIF apply` turns them"
        )
    return collector.gather(files)[0]


# --- Output ---------------------------------------------------------------------------------------


def records(predictions: Predictions, names: list[str], topk: int) -> Iterable[dict]:
    """An object for each readable picture, with numbers as an evaluation's CSV has them."""
    places = range(min(topk, predictions.top.shape[1]))
    for row in np.flatnonzero(predictions.readable):
        record = {"file": predictions.file[row]}
        for k in places:
            record[f"c{k + 1}"] = int(predictions.top[row, k])
            record[f"p{k + 1}"] = float(f"{predictions.top_p[row, k]:.6g}")
        record["entropy"] = float(f"{predictions.entropy[row]:.6g}")
        record |= {f"name{k + 1}": names[predictions.top[row, k]] for k in places}
        yield record


def write(path: Path, rows: Iterable[dict]) -> None:
    """Write `rows`, at least one, as .csv or .jsonl, each as it comes. Raises StorageError."""
    with (
        replace_atomically(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        rows = iter(rows)
        first = next(rows)
        writer = csv.DictWriter(file, list(first), lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            numbers = {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | numbers | {"file": escape_returns(row["file"])})


def line_of(record: dict, topk: int) -> str:
    """A picture's predictions for the console: "cat.jpg  tabby 0.81  tiger cat 0.11"."""
    pairs = [
        f"{record[f'name{k}'].split(', ')[0]} {record[f'p{k}']:.2f}"
        for k in range(1, topk + 1)
        if f"c{k}" in record
    ]
    return "  ".join([record["file"], *pairs])


@as_exit_code
def main(arguments: list[str]) -> None:
    """Predict and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="file, folder, glob, or - for stdin"
    )
    add_arguments(parser)
    add_loader_arguments(parser)
    parser.add_argument("--topk", type=int, choices=range(1, TOP + 1), default=TOP)
    parser.add_argument(
        "--names",
        default="lemma",
        help="words for ImageNet's classes: lemma, definition, wnid, or a FILE with a name a line",
    )
    parser.add_argument("--out", type=Path, help="write .csv or .jsonl instead of printing")
    args = parser.parse_args(arguments)
    if args.out is not None:
        if args.out.suffix not in SUFFIXES:
            raise ConfigError(f"--out {args.out}: expected a name that ends in .csv or .jsonl")
        require_folder_of(args.out)
    log_to_stderr()
    files = list_pictures(args.paths)
    classifier = load_classifier(args, args.names)
    predictions = predict(classifier, files)
    rows = records(predictions, classifier.names, args.topk)
    readable = int(predictions.readable.sum())
    if not readable:
        raise DataError(f"none of the {len(files)} pictures can be read")
    if args.out is not None:
        write(args.out, rows)
        logger.info(f"{args.out}: {readable} pictures")
    else:
        for row in rows:
            print(line_of(row, args.topk))
    if unreadable := len(files) - readable:
        logger.warning(f"{unreadable} of {len(files)} pictures cannot be read and are left out")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
