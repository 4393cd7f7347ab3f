#!/usr/bin/env python
"""Comparison of configurations: parameters, multiply-adds, speed, memory and the accuracies of their finished runs.

Prints a Markdown table with a row per configuration; with several seeds, means with 95 % intervals and their
differences. --runs takes what the runs were given as --output. Speeds are
medians; the models are timed in turns in this process, on random images and without stochastic depth, so leave the
machine idle.

examples:
  python tools/compare.py configs/mixers/*.yaml
  python tools/compare.py configs/mixers/*.yaml --runs output/seed0 output/seed1 output/seed2
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from yacs.config import CfgNode

import config
from analysis.records import read_records
from analysis.tables import format_run_differences, format_runs
from engine import build, checkpoint
from engine.build import build_model, prepare_device
from models.ops import use_kernels
from tools.benchmarks.macs import count_macs
from tools.benchmarks.model import Subject, at_least, time_in_turns
from utils.errors import CheckpointError, ConfigError, as_exit_code
from utils.logging import logger

COLUMNS = (
    "configuration",
    "parameters",
    "GMACs",
    "images/s, training",
    "evaluation",
    "MiB per training image",
    "top-1 in %, mean ± 95 % interval (per run)",
    "EMA",
)


def read_state(run: Path) -> str:
    """The state in the status.json of `run`; "" where there is none, or a damaged one, which is reported."""
    file = run / "status.json"
    if not file.exists():
        return ""
    try:
        return json.loads(file.read_bytes())["state"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning(f"{file} cannot be read, the run is left out: {error}")
        return ""


def find_finished(cfg: CfgNode, outputs: list[Path]) -> list[Path]:
    """The finished runs of `cfg` below `outputs`."""
    runs = [output / cfg.MODEL.NAME / cfg.TAG for output in outputs]
    return [run for run in runs if read_state(run) == "done"]


def check_runs(cfgs: dict[str, CfgNode], outputs: list[Path]) -> None:
    """Raise ConfigError where a run would count twice: for two configurations, or in two of `outputs`."""
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise ConfigError("--runs names a folder twice")
    owners: dict[tuple[str, str], str] = {}
    for name, cfg in cfgs.items() if outputs else ():
        owner = owners.setdefault((cfg.MODEL.NAME, cfg.TAG), name)
        if owner != name:
            raise ConfigError(
                f"{owner} and {name}: the runs of both are {cfg.MODEL.NAME}/{cfg.TAG}; "
                "give one of them a TAG of its own, or leave out --runs"
            )


def last_accuracies(run: Path) -> dict[str, float]:
    """The record of the last validation of `run`: val/acc1 and, with an EMA, val_ema/acc1; empty if there is none."""
    validations = [r for r in read_records(run / "metrics.jsonl") if "val/acc1" in r]
    return validations[-1] if validations else {}


def count_classes(cfg: CfgNode, runs: list[Path]) -> int:
    """The number of classes of the finished runs of `cfg`; without any, that of `cfg`."""
    if not runs:
        return cfg.MODEL.NUM_CLASSES or 1000
    checkpoints = checkpoint.list_checkpoints(runs[0] / "checkpoints")
    if not checkpoints:
        raise CheckpointError(
            f"{runs[0]} is finished but has no checkpoints; leave it out of --runs"
        )
    return len(checkpoint.read_metadata(checkpoints[0])["classes"])


def compare_runs(accuracies: dict[str, list[dict]]) -> list[str]:
    """The lines about what differs between the runs of the configurations, of the weights and of their EMA."""
    lines = []
    for title, key in (("top-1", "val/acc1"), ("top-1 of the EMA", "val_ema/acc1")):
        values = {
            name: [one[key] for one in runs if key in one] for name, runs in accuracies.items()
        }
        if table := format_run_differences(values):
            lines += [
                "",
                f"Differences in {title} between seeds' means (Welch's test):",
                "",
                *table,
            ]
    return lines


def with_kernels(kernels: str, step: Callable[[Subject], object], subject: Subject) -> None:
    """One `step` of `subject` with the kernels of its configuration; the choice is the process's."""
    use_kernels(kernels)
    step(subject)


def compare(args: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, and the lines about differences between runs.

    Raises ConfigError for an invalid configuration, where a run would count twice, or if the device is not available.
    """
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cfgs = {
        path: prepare_device(config.load(path, ["MODEL.DROP_PATH_RATE", "0"]), device)
        for path in args.cfg
    }
    check_runs(cfgs, args.runs)
    runs = {name: find_finished(cfg, args.runs) for name, cfg in cfgs.items()}
    for name, cfg in cfgs.items() if args.runs else ():
        found = " ".join(map(str, runs[name])) or f"none is called {cfg.MODEL.NAME}/{cfg.TAG}"
        print(f"{name}: finished runs: {found}", file=sys.stderr)
    subjects = {
        name: Subject(
            build_model(cfg, count_classes(cfg, runs[name]), torch.device("cpu")),
            batch=args.batch,
            shape=build.input_shape(cfg),
            dtype=cfg.AMP_DTYPE,
            device=args.device,
        )
        for name, cfg in cfgs.items()
    }
    accuracies = {name: [last_accuracies(run) for run in runs[name]] for name in cfgs}
    speeds = {}
    for step in (Subject.train, Subject.evaluate):
        steps = {
            name: functools.partial(with_kernels, cfgs[name].MODEL.KERNELS, step, subject)
            for name, subject in subjects.items()
        }
        for name, seconds in time_in_turns(steps, args.rounds, device).items():
            speeds.setdefault(name, []).append(f"{args.batch / statistics.median(seconds):.0f}")
    rows = []
    for name, subject in subjects.items():
        channels, *size = subject.images.shape[1:]
        macs = count_macs(subject.net, *size, in_chans=channels)
        rows.append(
            [
                name,
                f"{sum(p.numel() for p in subject.net.parameters()) / 1e6:.2f} M",
                f"{macs / 1e9:.4f}",
                *speeds[name],
                f"{subject.activation_mib():.2f}",
                *(
                    format_runs([one[key] for one in accuracies[name] if key in one])
                    for key in ("val/acc1", "val_ema/acc1")
                ),
            ]
        )
    return rows, compare_runs(accuracies)


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cfg", nargs="+", help="configurations, as main.py's --cfg")
    parser.add_argument(
        "--runs", nargs="*", type=Path, default=[], metavar="OUTPUT", help="output folders of runs"
    )
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="timed turns of each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)
    rows, differences = compare(args)
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")
    for line in differences:
        print(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
