#!/usr/bin/env python
"""Will a long run end well? Checks the data, the configuration and the machine, and says what to do.

python tools/doctor.py --cfg configs/dat_tiny.yaml --data-path /imagenet --processes 8 --pixels --sha

The flags are those of main.py, with --eval for an evaluation alone, and the ones below; without --cfg only the data and
the machine are looked at. What every image file is goes to an index, so that a second start goes on where the first was
stopped. Exit code: 0 ready, 3 something has to be mended first, 2 the command or the configuration is wrong.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from yacs.config import CfgNode

import config
import models
from data import ImageDataset, allowed_files, read_class_list, steps_per_epoch
from data.decode import EXIF_TRANSPOSES, UNREADABLE, decode, open_image, orientation
from data.readers import FolderReader
from utils.errors import ConfigError, DataError, UserError
from utils.files import write_atomically

CHUNK = 64  # files that are examined before they are noted
SHOWN = 5  # examples of a finding
TINY, HUGE, NARROW = 32, 50e6, 10  # pixels of a side, pixels in all, longer by shorter side
PREFETCH = 2  # batches in flight of each worker, torch's default


class Finding(NamedTuple):
    """One line of the report: "OK", "WARN" or "FAIL", about what, what to do, and what it is about one by one."""

    level: str
    topic: str
    text: str
    remedy: str = ""
    examples: Sequence[str] = ()


# --- The images' tree -----------------------------------------------------------------------------


def open_splits(
    root: Path, splits: list[str], cfg: CfgNode | None
) -> tuple[dict[str, ImageDataset], list[Finding]]:
    """The datasets that can be opened, by split, and what there is to say about their layout and classes."""
    opened: dict[str, ImageDataset] = {}
    findings = []
    subset = cfg is not None and cfg.DATA.VAL_SUBSET
    classes = None
    try:
        if cfg is not None and cfg.DATA.CLASS_LIST:
            classes = read_class_list(cfg.DATA.CLASS_LIST)
    except DataError as error:
        findings.append(Finding("FAIL", "class list", str(error)))
    for split in splits:
        try:
            dataset = ImageDataset(
                root, split, transform=np.asarray, train=False, classes=classes, seed=0,
                allow_missing=subset and split == "val", apply_exif=False, checksums=None,
                skip_bad=False, holdout=0.0,
            )  # fmt: skip
        except DataError as error:
            remedy = "an evaluation, main.py --eval, does without it" if split == "train" else ""
            findings.append(Finding("FAIL", split, str(error), remedy))
            continue
        opened[split] = dataset
        classes = dataset.classes
        total = dataset.reader.sizes.sum()
        findings.append(Finding("OK", split, f"{dataset}, {size(total)}"))
        counts = np.bincount(dataset.labels, minlength=len(classes))
        least, most = counts.min(), counts.max()
        spread = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        spread += f" images in each of {len(classes):,} classes"
        findings.append(Finding("OK", f"{split} classes", spread))
    if cfg is not None and classes and cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        text = f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, the data have {len(classes)} classes"
        findings.append(Finding("FAIL", "classes", text, "leave it 0 to follow the data"))
    return opened, findings


def check_links(root: Path, dataset: ImageDataset) -> Iterator[Finding]:
    """Links of a folder that lead nowhere, back, or out of the dataset's root."""
    if not isinstance(dataset.reader, FolderReader):
        return
    real_root = os.path.realpath(root)
    kinds: dict[str, list[str]] = {"nowhere": [], "back": [], "out": []}
    count = 0
    for path in links(dataset.reader.path):
        count += 1
        real = os.path.realpath(path)
        if not os.path.exists(path):
            kinds["nowhere"].append(path)
        elif path.startswith(real + os.sep):
            kinds["back"].append(path)
        elif not real.startswith(real_root + os.sep):
            kinds["out"].append(path)
    for kind, level, text, remedy in (
        ("nowhere", "FAIL", "links lead nowhere", "restore what they lead to, or remove them"),
        ("back", "WARN", "links lead back to a folder around them and are passed over", "remove them"),
        ("out", "WARN", f"links lead out of {root}", "see that every machine of the run has their targets"),
    ):  # fmt: skip
        if paths := kinds[kind]:
            yield Finding(level, "links", f"{len(paths):,} {text}", remedy, paths)
    if count and not any(kinds.values()):
        yield Finding("OK", "links", f"{count:,} in {dataset.reader.path}, all lead inside")


def links(folder: str) -> Iterator[str]:
    """The paths of all symbolic links below `folder`, which are not followed."""
    for entry in os.scandir(folder):
        if entry.is_symlink():
            yield entry.path
        elif entry.is_dir(follow_symlinks=False) and os.access(entry.path, os.R_OK | os.X_OK):
            yield from links(entry.path)


# --- Every image file -----------------------------------------------------------------------------


class Examination(Dataset):
    """The index's record of each file in `todo`, pairs of split and position."""

    def __init__(
        self,
        datasets: dict[str, ImageDataset],
        todo: list[tuple[str, int]],
        pixels: bool,
        sha: bool,
    ):
        self.datasets = datasets
        self.todo = todo
        self.pixels = pixels
        self.sha = sha

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, item: int) -> dict:
        split, index = self.todo[item]
        dataset = self.datasets[split]
        name = os.fsdecode(dataset.reader.names[index])
        record = {"split": split, "name": name, "size": int(dataset.reader.sizes[index])}
        try:
            data = dataset.read(index)
            if self.sha:
                record["sha256"] = hashlib.sha256(data).hexdigest()
            image = open_image(data)
            record |= {"format": image.format, "mode": image.mode, "pixels": image.size}
            record["turned"] = orientation(image) in EXIF_TRANSPOSES
            record["animated"] = _is_animated(image)
            if self.pixels:
                decode(data)
                record["decoded"] = True
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error)
            record["problem"] = f"{type(error).__name__}: {reason}, {record['size']} bytes"
        return record


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except UNREADABLE:  # there is a second frame, and it is damaged
        return True


@dataclass
class Tally:
    """What the examined files have in common, and which stand out."""

    count: Counter = field(default_factory=Counter)  # by split
    kinds: Counter = field(default_factory=Counter)  # by format and mode
    misnamed: int = 0
    turned: int = 0
    animated: int = 0
    odd: list[str] = field(default_factory=list)
    huge: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)  # by split
    owners: dict[str, list[str]] = field(default_factory=dict)  # by SHA-256, "split/name"

    def add(self, record: dict) -> None:
        """Count one record of the index."""
        split, path = record["split"], f"{record['split']}/{record['name']}"
        self.count[split] += 1
        if "sha256" in record:
            self.owners.setdefault(record["sha256"], []).append(path)
        if "problem" in record:
            self.problems.setdefault(split, []).append(f"{path} ({record['problem']})")
            return
        self.kinds[f"{record['format']} {record['mode']}"] += 1
        suffix = Path(record["name"]).suffix[1:].upper()
        usual = Image.registered_extensions().get(f".{suffix.lower()}", suffix)
        self.misnamed += usual != record["format"].replace("MPO", "JPEG")
        self.turned += record["turned"]
        self.animated += record["animated"]
        width, height = record["pixels"]
        shown = f"{path} ({width}×{height})"
        if min(width, height) < TINY or max(width, height) > NARROW * min(width, height):
            self.odd.append(shown)
        if width * height > HUGE:
            self.huge.append(shown)


def examine(
    datasets: dict[str, ImageDataset], index: Path, pixels: bool, sha: bool, jobs: int
) -> Tally:
    """Examine every image that `index` does not know yet, and add it there.

    Files that had a problem or another size are examined again. Raises ConfigError if `index` cannot be written.
    """
    tally = Tally()
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        known = _keep_valid(index, datasets, pixels, sha, tally)
        file = index.open("a")
    except OSError as error:
        raise ConfigError(f"{index}: {error.strerror}; name another file with --index") from error
    todo = [
        (split, position)
        for split, dataset in datasets.items()
        for position, name in enumerate(dataset.reader.names.tolist())
        if (split, os.fsdecode(name)) not in known
    ]
    examination = Examination(datasets, todo, pixels, sha)
    loader = DataLoader(examination, CHUNK, num_workers=jobs, collate_fn=list)
    with (
        file,
        warnings.catch_warnings(action="ignore"),  # Pillow's, of odd headers
        tqdm(total=len(known) + len(todo), initial=len(known), unit=" files", leave=False,
             dynamic_ncols=True, disable=None) as progress,
    ):  # fmt: skip
        for records in loader:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            for record in records:
                tally.add(record)
            progress.update(len(records))
    return tally


def _keep_valid(
    index: Path, datasets: dict[str, ImageDataset], pixels: bool, sha: bool, tally: Tally
) -> set[tuple[str, str]]:
    """Drop from `index` the records that have to be made anew; count the others and return their names."""
    known: set[tuple[str, str]] = set()
    if not index.exists():
        return known
    sizes = {
        (split, os.fsdecode(name)): file_size
        for split, dataset in datasets.items()
        for name, file_size in zip(
            dataset.reader.names.tolist(), dataset.reader.sizes.tolist(), strict=True
        )
    }
    lines = []
    try:
        for line in index.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # cut off by a kill
                break
            record = json.loads(line)
            name = record["split"], record["name"]
            deep = ("decoded" in record or not pixels) and ("sha256" in record or not sha)
            if deep and "problem" not in record and sizes.get(name) == record["size"]:
                known.add(name)
                tally.add(record)
                lines.append(line)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index}: no index of images; name another with --index") from error
    write_atomically(index, "".join(lines))
    return known


def judge(tally: Tally, index: Path, pixels: bool, sha: bool, allowed: int) -> Iterator[Finding]:
    """What the examined files mean for a run in which `allowed` training files may be unreadable."""
    read = f"{sum(tally.count.values()):,} files, {'decoded' if pixels else 'headers read'}"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in tally.kinds.most_common())
    advice = "" if pixels else "--pixels decodes them too, which finds images that are cut off"
    yield Finding("OK", "files", f"{read}: {kinds or 'none sound'}; index {index}", advice)
    for split, problems in tally.problems.items():
        harmless = split == "train" and len(problems) <= allowed
        text = f"{len(problems):,} of {tally.count[split]:,} {split} images cannot be read"
        remedy = "restore them from the source of the data"
        if harmless:
            remedy += f", or let others of their class stand in (at most {allowed} files)"
        elif split == "val":
            remedy += ", or count them as wrong with TEST.SKIP_BAD=True"
        else:
            remedy += ", or remove them"
        level = "WARN" if harmless else "FAIL"
        yield Finding(level, "unreadable", text, remedy, problems)
    if tally.misnamed:
        text = f"{tally.misnamed:,} files have another format than their name says"
        yield Finding("OK", "names", text, "nothing to do: the content decides")
    if tally.turned:
        text = f"EXIF asks to turn {tally.turned:,} images"
        remedy = "published results ignore it; DATA.EXIF=apply turns them"
        yield Finding("OK", "rotation", text, remedy)
    if tally.animated:
        text = f"{tally.animated:,} images have several frames: the first one is used"
        yield Finding("OK", "animation", text)
    if tally.odd:
        text = f"{len(tally.odd):,} images are below {TINY} pixels or over {NARROW} times as long as wide"
        remedy = "look at them; they are used as they are"
        yield Finding("WARN", "odd shapes", text, remedy, tally.odd)
    if tally.huge:
        text = f"{len(tally.huge):,} images have over {HUGE / 1e6:.0f} million pixels"
        remedy = "a worker needs 3 bytes for each: make them smaller if memory is short"
        yield Finding("WARN", "huge images", text, remedy, tally.huge)
    if sha:
        yield from _duplicates(tally)


def _duplicates(tally: Tally) -> Iterator[Finding]:
    """Files of the same bytes: between the splits, and under two labels."""
    leaked, contrary, repeated = [], [], 0
    for paths in tally.owners.values():
        if len(paths) > 1:
            repeated += len(paths) - 1
            parts = [path.split("/")[:2] for path in paths]
            if len({split for split, _ in parts}) > 1:
                leaked.append(" = ".join(paths[:2]))
            if len({label for _, label in parts}) > 1:
                contrary.append(" = ".join(paths[:2]))
    if leaked:
        text = f"{len(leaked):,} images are in train and in val"
        remedy = "remove them from train, or the accuracy will be too good"
        yield Finding("FAIL", "duplicates", text, remedy, leaked)
    if contrary:
        text = f"{len(contrary):,} images have two labels"
        yield Finding("WARN", "duplicates", text, "keep the right one", contrary)
    if not leaked and not contrary:
        text = f"{repeated:,} repeated files, none across splits or classes"
        yield Finding("OK", "duplicates", text)


# --- The configuration ----------------------------------------------------------------------------


def check_batches(cfg: CfgNode, train: ImageDataset | None, processes: int) -> Iterator[Finding]:
    """What a step and an epoch are."""
    total, micro_batch = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE
    try:
        config.check_world_size(cfg, processes)
        text = (
            f"{total:,} images a step = {total // micro_batch} micro-batches of {micro_batch}, "
            f"{total // micro_batch // processes} on each of {processes} processes"
        )
        yield Finding("OK", "step", text)
    except ConfigError as error:
        yield Finding("FAIL", "step", str(error))
    if train is not None:
        try:
            steps = steps_per_epoch(len(train), total)
        except DataError as error:
            yield Finding("FAIL", "epoch", str(error))
        else:
            dropped = len(train) - steps * total
            text = (
                f"{steps:,} steps, {steps * cfg.TRAIN.EPOCHS:,} in {cfg.TRAIN.EPOCHS} epochs; "
                f"{dropped:,} images ({dropped / len(train):.1%}), others each time, are left out of each epoch"
            )
            remedy = "a smaller TRAIN.GLOBAL_BATCH_SIZE leaves out less"
            if dropped < 0.05 * len(train):
                yield Finding("OK", "epoch", text)
            else:
                yield Finding("WARN", "epoch", text, remedy)
    scale = total / cfg.TRAIN.LR_BASE_SIZE
    rates = (cfg.TRAIN.WARMUP_LR, cfg.TRAIN.BASE_LR, cfg.TRAIN.MIN_LR)
    shown = " → ".join(f"{rate * scale:.3g}" for rate in rates)
    text = (
        f"{shown} (warm-up, highest, last) after scaling by {total} / {cfg.TRAIN.LR_BASE_SIZE}; "
        f"{cfg.TRAIN.WARMUP_EPOCHS} of {cfg.TRAIN.EPOCHS} epochs warm up"
    )
    yield Finding("OK", "learning rate", text)


def check_model(cfg: CfgNode, classes: int, training: bool) -> Iterator[Finding]:
    """Whether the model can be built and, for a training, its checkpoints find room."""
    try:
        with torch.device("meta"):
            model = models.build(
                cfg.MODEL.NAME,
                num_classes=classes,
                img_size=cfg.DATA.IMG_SIZE,
                drop_path_rate=cfg.MODEL.DROP_PATH_RATE,
                **cfg.MODEL.ARGS,
            )
    except ConfigError as error:
        yield Finding("FAIL", "model", str(error))
        return
    parameters = sum(p.numel() for p in model.parameters())
    text = f"{cfg.MODEL.NAME}, {parameters / 1e6:.2f} M parameters, {classes:,} classes"
    yield Finding("OK", "model", text)
    if training:
        yield from _check_disk(cfg, parameters)


def _check_disk(cfg: CfgNode, parameters: int) -> Iterator[Finding]:
    one = 4 * parameters * (3 + bool(cfg.TRAIN.EMA_DECAY))  # weights, two moments, the average
    kept = cfg.CHECKPOINT.KEEP + 2  # the best, and the one being written
    folder = Path(cfg.OUTPUT).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = (
        f"{size(free)} free in {folder}; {kept} checkpoints of {size(one)} need {size(kept * one)}"
    )
    if not os.access(folder, os.W_OK):
        yield Finding("FAIL", "disk", f"{folder} cannot be written", "choose another --output")
    elif free < 2 * one:
        yield Finding("FAIL", "disk", text, "make room there, or choose another --output")
    elif free < kept * one:
        yield Finding("WARN", "disk", text, "make room there, or lower CHECKPOINT.KEEP")
    else:
        yield Finding("OK", "disk", text)


# --- The machine ----------------------------------------------------------------------------------


def check_machine(cfg: CfgNode | None, processes: int) -> Iterator[Finding]:
    """Devices, cores, shared memory and open files, for the processes that would run here."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    local = min(processes, gpus) if gpus else processes
    if gpus >= processes:
        yield Finding("OK", "devices", f"{gpus} GPUs for {processes} processes")
    elif gpus:
        text = f"{gpus} GPUs for {processes} processes"
        remedy = f"use {-(-processes // gpus)} machines like this one, or start {gpus} processes"
        yield Finding("WARN", "devices", text, remedy)
    else:
        remedy = "that is for small models: check the driver if there is a GPU"
        yield Finding("WARN", "devices", "no GPU: everything would be computed on the CPU", remedy)
    if cfg is None:
        yield Finding(
            "OK", "processors", f"{cores} cores", "--cfg compares them with a configuration"
        )
        return
    workers = cfg.DATA.NUM_WORKERS * local
    text = f"{cores} cores, {workers} loader workers ({cfg.DATA.NUM_WORKERS} for each of {local} processes here)"
    if workers > cores:
        remedy = f"--workers {max(1, cores // local)}: more only take turns"
        yield Finding("WARN", "processors", text, remedy)
    else:
        yield Finding("OK", "processors", text)

    micro_batches = cfg.DATA.BATCH_SIZE + (cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE)
    need = workers * PREFETCH * micro_batches * 3 * cfg.DATA.IMG_SIZE**2
    free = shutil.disk_usage("/dev/shm").free
    text = f"{size(free)} free in /dev/shm; batches on their way take up to {size(need)}"
    if need > free:
        remedy = "give more (docker run --shm-size=…), or lower --workers or --batch-size"
        yield Finding("FAIL", "shared memory", text, remedy)
    else:
        yield Finding("OK", "shared memory", text)

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    need = 256 + 2 * 3 * PREFETCH * cfg.DATA.NUM_WORKERS  # two loaders, three tensors of a batch
    text = f"{limit:,} may be open in a process, about {need:,} will be"
    if need > limit:
        yield Finding("FAIL", "open files", text, f"ulimit -n {max(4096, need)}")
    else:
        yield Finding("OK", "open files", text)


# --- The report -----------------------------------------------------------------------------------


COLOURS = {"OK": "32", "WARN": "33", "FAIL": "31"}  # green, yellow, red


class Report:
    """Prints findings as they come and counts them."""

    def __init__(self):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
        self.count: Counter = Counter()
        self._coloured = sys.stdout.isatty()
        self._width = max(80, min(120, shutil.get_terminal_size((110, 24)).columns))

    def section(self, title: str) -> None:
        """Begin a part of the report."""
        print(f"\n{self._paint(title, '1')}")

    def show(self, findings: Iterator[Finding] | list[Finding]) -> None:
        """Print each finding and what to do about it."""
        for level, topic, text, remedy, examples in findings:
            self.count[level] += 1
            head = f"  {self._paint(f'{level:<4}', COLOURS[level])}  {topic:<15} "
            print(head + f"\n{'':24}".join(self._wrap(text)))
            for example in examples[:SHOWN]:
                short = textwrap.shorten(example, self._width - 26, placeholder=" …")
                print(f"{'':24}· {short}")
            if len(examples) > SHOWN:
                print(f"{'':24}  and {len(examples) - SHOWN:,} more")
            for number, line in enumerate(self._wrap(remedy)):
                print(f"{'':24}{'  ' if number else '→ '}{line}")

    def verdict(self) -> int:
        """Print the last line; returns the exit code."""
        ok, warn, fail = (self.count[level] for level in COLOURS)
        level = "FAIL" if fail else "WARN" if warn else "OK"
        words = {
            "FAIL": "Not ready: mend what FAIL says, then look again.",
            "WARN": "Ready, but read what WARN says first.",
            "OK": "Ready.",
        }
        print(f"\n{self._paint(words[level], COLOURS[level])} {ok} OK, {warn} WARN, {fail} FAIL")
        return DataError.exit_code if fail else 0

    def _wrap(self, text: str) -> list[str]:
        # A path that is broken at its hyphens could not be copied.
        width = self._width - 26
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._coloured else text


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


# --- The command ----------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[argparse.Namespace, config.Command | None]:
    """The doctor's own flags, and the command that main.py would be given; ConfigError as main.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="doctor.py [--cfg FILE] [--data-path FOLDER] [--pixels] [--sha] [-j N] [flags of main.py]",
    )
    parser.add_argument("--cfg", metavar="FILE", help="the run's configuration")
    parser.add_argument("--data-path", metavar="FOLDER", help="the dataset, if --cfg does not say")
    parser.add_argument("--pixels", action="store_true", help="decode every image")
    parser.add_argument("--sha", action="store_true", help="compare all files by their SHA-256")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        metavar="N", help="processes that examine files (default: the cores; 0: none)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 1,
                        metavar="N", help="of the run, on all machines (default: the GPUs here)")  # fmt: skip
    parser.add_argument("--index", type=Path, metavar="FILE",
                        help="where to note the files (default: <output>/doctor/<dataset>.jsonl)")  # fmt: skip
    args, rest = parser.parse_known_args(arguments)
    if args.jobs < 0 or args.processes < 1:
        raise ConfigError("expected -j of at least 0 and --processes of at least 1")
    if args.cfg is None:
        if rest or args.data_path is None:
            raise ConfigError(
                f"{rest[0] if rest else 'nothing to check'}: name a configuration with --cfg, "
                "or a dataset alone with --data-path"
            )
        return args, None
    path = [] if args.data_path is None else ["--data-path", args.data_path]
    return args, config.parse(["--cfg", args.cfg, *path, *rest])


def examine_all(args: argparse.Namespace, command: config.Command | None, report: Report) -> None:
    """All checks, in the order in which their failing would be noticed."""
    cfg = command.cfg if command else None
    root = Path(cfg.DATA.PATH if cfg else args.data_path)
    splits = ["val"] if command and command.mode == "eval" else ["train", "val"]

    report.section(f"Data in {root}")
    datasets, findings = open_splits(root, splits, cfg)
    report.show(findings)
    for dataset in datasets.values():
        report.show(check_links(root, dataset))
    if datasets:
        output = Path(cfg.OUTPUT if cfg else config.KEYS["OUTPUT"].default)
        index = args.index or output / "doctor" / f"{root.resolve().name}.jsonl"
        tally = examine(datasets, index, args.pixels, args.sha, args.jobs)
        limit = cfg.DATA.MAX_BAD_SAMPLES if cfg else config.KEYS["DATA.MAX_BAD_SAMPLES"].default
        allowed = allowed_files(limit, len(datasets.get("train", ())))
        report.show(judge(tally, index, args.pixels, args.sha, allowed))

    if cfg:
        report.section(f"Configuration {args.cfg}")
        classes = len(next(iter(datasets.values())).classes) if datasets else 1000
        training = command.mode == "train"
        if training:
            report.show(check_batches(cfg, datasets.get("train"), args.processes))
        report.show(check_model(cfg, classes, training))
    report.section("Machine")
    report.show(check_machine(cfg, args.processes))


def main(arguments: list[str]) -> int:
    """Examine and report; returns the exit code."""
    report = Report()
    try:
        args, command = parse(arguments)
        examine_all(args, command, report)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return report.verdict()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
