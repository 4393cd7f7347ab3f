#!/usr/bin/env python
"""Which of several configurations is best, and what does each cost? A table of their models and their runs' accuracies.

    python tools/compare.py configs/mixers/*.yaml --runs output/seed0 output/seed1 output/seed2

Each of --runs is what runs were given as --output; those that are finished count. Speeds are medians of models that
take turns in this process, on random images: leave the machine alone. Memory is that of a step that drops nothing.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from yacs.config import CfgNode

import config
import models
from engine import checkpoint
from tools.benchmarks.macs import count_macs
from tools.benchmarks.model import Subject, at_least, in_turns
from utils.errors import as_exit_code

COLUMNS = (
    "configuration",
    "parameters",
    "GMACs",
    "images/s, training",
    "evaluation",
    "MiB kept per image",
    "top-1 in %, by run",
    "of the EMA",
)


def state(run: Path) -> str:
    """What the status of `run` says, "" where there is none."""
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else ""


def finished(cfg: CfgNode, outputs: list[Path]) -> list[Path]:
    """The runs of `cfg` below `outputs` that came to their end."""
    runs = [output / cfg.MODEL.NAME / cfg.TAG for output in outputs]
    return [run for run in runs if state(run) == "done"]


def accuracies(run: Path) -> dict[str, float]:
    """What the last validation of `run` found: val/acc1 and, with an EMA, val_ema/acc1."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "val/acc1" in record][-1]


def build(cfg: CfgNode, runs: list[Path]) -> torch.nn.Module:
    """The model of `cfg`, for the classes of its runs if there are any; it drops nothing."""
    classes = cfg.MODEL.NUM_CLASSES or 1000
    if runs:
        newest = checkpoint.list_checkpoints(runs[0] / "checkpoints")[0]
        classes = len(checkpoint.read_metadata(newest)["classes"])
    size, name = cfg.DATA.IMG_SIZE, cfg.MODEL.NAME
    return models.build(
        name, num_classes=classes, img_size=size, drop_path_rate=0.0, **cfg.MODEL.ARGS
    )


def compare(args: argparse.Namespace) -> list[list[str]]:
    """The rows of the table. Raises ConfigError for a configuration that cannot be read, or without the device."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cfgs = {path: config.parse(["--cfg", path, "--throughput"]).cfg for path in args.cfg}
    runs = {name: finished(cfg, args.runs) for name, cfg in cfgs.items()}
    subjects = {
        name: Subject(
            build(cfg, runs[name]),
            batch=args.batch,
            size=cfg.DATA.IMG_SIZE,
            dtype=cfg.AMP_DTYPE,
            device=args.device,
        )
        for name, cfg in cfgs.items()
    }
    speeds = {}
    for step in (Subject.train, Subject.evaluate):
        steps = {name: functools.partial(step, subject) for name, subject in subjects.items()}
        for name, seconds in in_turns(steps, args.rounds, device).items():
            speeds.setdefault(name, []).append(f"{args.batch / statistics.median(seconds):.0f}")
    rows = []
    for name, subject in subjects.items():
        found = [accuracies(run) for run in runs[name]]
        macs = count_macs(subject.net, *subject.images.shape[2:])
        rows.append(
            [
                name,
                f"{sum(p.numel() for p in subject.net.parameters()) / 1e6:.2f} M",
                f"{macs / 1e9:.4f}",
                *speeds[name],
                f"{subject.kept_mib():.2f}",
                *(
                    " · ".join(f"{one[key]:.2f}" for one in found if key in one) or "—"
                    for key in ("val/acc1", "val_ema/acc1")
                ),
            ]
        )
    return rows


@as_exit_code
def main(arguments: list[str]) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cfg", nargs="+", help="configurations, as main.py's --cfg")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], metavar="OUTPUT")
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="turns that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)
    rows = compare(args)
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
