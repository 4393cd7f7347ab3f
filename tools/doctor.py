#!/usr/bin/env python
"""Checks before a long run: the dataset, every image file, the configuration and the machine.

Takes the flags of main.py, --eval included, and those below; without --cfg, only the dataset and the machine are
checked. What is learned about each image file is kept in an index, so an interrupted check continues. Exit code: 0
ready, 3 something needs repair, 2 the command or the configuration is invalid.

examples:
  python tools/doctor.py --cfg configs/dat_tiny.yaml --data-path /imagenet --processes 8
  python tools/doctor.py --cfg configs/dat_tiny.yaml --data-path /imagenet --processes 8 --pixels --sha
  python tools/doctor.py --data-path my_images --pixels
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from yacs.config import CfgNode

import config
from analysis import imagenet
from data import ImageDataset, RemotePath, allowed_files, steps_per_epoch
from engine import build
from tools.checks.forecast import check_cost
from tools.checks.images import examine, judge_images
from tools.checks.layout import check_links, open_splits
from tools.checks.machine import check_machine
from tools.checks.report import Report
from tools.checks.settings import check_batches, check_learning_rate, check_model
from tools.checks.weights import check_evaluated, check_start, find_evaluated
from utils.errors import ConfigError, UserError
from utils.machine import available_cores
from utils.streams import protect_streams


def parse(arguments: list[str]) -> tuple[argparse.Namespace, config.Command | None]:
    """The flags of this tool, and the command that main.py would run, if any. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="doctor.py [--cfg FILE] [--data-path FOLDER] [--pixels] [--sha] [-j N] [flags of main.py]",
    )
    parser.add_argument("--cfg", metavar="FILE", help="configuration of the run")
    parser.add_argument("--data-path", metavar="FOLDER", help="dataset, instead of that of --cfg")
    parser.add_argument("--pixels", action="store_true", help="decode every image")
    parser.add_argument("--sha", action="store_true", help="find identical files by their SHA-256")
    parser.add_argument("-j", "--jobs", type=int, default=available_cores(),
                        metavar="N", help="processes that examine files (default: the cores; 0: none)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 1,
                        metavar="N", help="processes of the run, on all nodes (default: the GPUs here)")  # fmt: skip
    parser.add_argument("--index", type=Path, metavar="FILE",
                        help="index of the files (default: in <output>/doctor)")  # fmt: skip
    args, rest = parser.parse_known_args(arguments)
    if args.jobs < 0 or args.processes < 1:
        raise ConfigError("expected -j of at least 0 and --processes of at least 1")
    if args.cfg is None:
        if rest or args.data_path is None:
            problem = f"{rest[0]} needs --cfg" if rest else "nothing to check"
            raise ConfigError(
                f"{problem}; name a configuration with --cfg, or only a dataset with --data-path"
            )
        return args, None
    path = [] if args.data_path is None else ["--data-path", args.data_path]
    command = config.parse(["--cfg", args.cfg, *path, *rest])
    if not command.cfg.DATA.PATH:
        raise ConfigError("DATA.PATH is empty; name the dataset with --data-path")
    return args, command


def run_checks(args: argparse.Namespace, command: config.Command | None, report: Report) -> None:
    """Run all checks, in the order in which a run would fail."""
    cfg = command.cfg if command else None
    root = build.data_root(cfg) if cfg else Path(args.data_path)
    splits = ["val"] if command and command.mode == "eval" else ["train", "val"]

    report.section(f"Data in {root}")
    evaluated, findings = (
        find_evaluated(command) if command and command.mode == "eval" else (None, [])
    )
    report.show(findings)
    datasets, findings = open_splits(root, splits, cfg, evaluated and evaluated.classes)
    report.show(findings)
    if isinstance(root, Path):
        for dataset in datasets.values():
            report.show(check_links(root, dataset))
    if datasets:
        index = args.index or default_index(cfg, root)
        files = datasets
        if cfg and cfg.DATA.HOLDOUT:  # both are parts of train
            files, _ = open_splits(root, ["train"], None, next(iter(datasets.values())).classes)
        tally = examine(files, index, args.pixels, args.sha, args.jobs)
        limit = cfg.DATA.MAX_BAD_SAMPLES if cfg else config.KEYS["DATA.MAX_BAD_SAMPLES"].default
        allowed = allowed_files(limit, len(datasets.get("train", ())))
        skip_bad = bool(cfg and cfg.TEST.SKIP_BAD)
        report.show(judge_images(tally, index, args.pixels, args.sha, allowed, skip_bad=skip_bad))

    if cfg:
        report.section(f"Configuration {args.cfg}")
        classes = next(iter(datasets.values())).classes if datasets else imagenet.wnids()
        training = command.mode == "train"
        if training:
            report.show(check_batches(cfg, datasets.get("train"), args.processes))
            report.show([check_learning_rate(cfg)])
        report.show(check_model(cfg, len(classes), training))
        if training and not report.count["FAIL"]:
            images = steps_images(cfg, datasets.get("train"))
            report.show(check_cost(cfg, len(classes), images, args.processes))
        if not report.count["FAIL"]:
            weights = (
                check_evaluated(cfg, evaluated, classes) if evaluated else check_start(cfg, classes)
            )
            report.show(weights)
    report.section("Machine")
    report.show(check_machine(cfg, args.processes))


def default_index(cfg: CfgNode | None, root: Path | RemotePath) -> Path:
    """Where the records of the files below `root` are kept; folders of one name have different ones."""
    place = root.resolve() if isinstance(root, Path) else root
    digest = hashlib.sha256(str(place).encode(errors="surrogateescape")).hexdigest()[:8]
    output = Path(cfg.OUTPUT if cfg else config.KEYS["OUTPUT"].default)
    return output / "doctor" / f"{place.name}-{digest}.jsonl"


def steps_images(cfg: CfgNode, train: ImageDataset | None) -> int | None:
    """Images of all steps of the run; None without its training images."""
    if train is None:
        return None
    steps = steps_per_epoch(len(train), cfg.TRAIN.GLOBAL_BATCH_SIZE)
    return cfg.TRAIN.EPOCHS * steps * cfg.TRAIN.GLOBAL_BATCH_SIZE


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    protect_streams()
    report = Report()
    try:
        args, command = parse(arguments)
        run_checks(args, command, report)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped. The same command continues from here.", file=sys.stderr)
        return 130
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
