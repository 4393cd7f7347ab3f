"""Training loop benchmark: where the time of a step goes, measured on main.py in one process.

Evaluations and saves between epochs do not count. Without --data-path, images of noise as large as photographs of
ImageNet are written to a temporary folder.

example:
  python tools/benchmark.py loop --cfg configs/dat_tiny.yaml --data-path /imagenet --seconds 120
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import config
import main
from analysis.records import read_records
from tools.benchmarks.model import at_least
from utils.bottleneck import PHASES, bottleneck, shares
from utils.errors import ConfigError

IMAGES = 20_000  # a long epoch: what happens between epochs is not measured
OVERHEAD = ("transform", "save", "other")  # neither computing nor waiting for images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark.py loop`."""
    parser.add_argument("--cfg", required=True, help="configuration to train with")
    parser.add_argument("--data-path", default="", help="dataset (default: images of noise)")
    parser.add_argument("--seconds", type=float, default=60, help="duration, including the start")
    parser.add_argument("--print-freq", type=at_least(1), default=5, help="steps per record")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY=VALUE", help="as main.py's")


def run(args: argparse.Namespace) -> dict:
    """Train in a temporary folder; return the speed, the share of every phase and the bottleneck.

    Raises ConfigError if too few steps were made.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["--cfg", args.cfg, "--output", str(folder / "output"), "--tag", "benchmark"]
        command += ["--print-freq", str(args.print_freq)]
        options = ["--opts", *args.opts, f"TRAIN.MAX_SECONDS={args.seconds}"]
        path = args.data_path
        if not path:
            path = str(folder / "images")
            cfg = config.load(args.cfg, args.opts)
            write_images(Path(path), max(IMAGES, cfg.TRAIN.GLOBAL_BATCH_SIZE))
        code = main.main([*command, "--data-path", path, *options])
        if code not in (0, 75):  # 75: the time is up; for any other, main.py has printed the reason
            raise SystemExit(code)
        timing = folder.glob("output/*/benchmark/timing.jsonl")
        records = [record for file in timing for record in read_records(file)]
    return summarize(records)


def summarize(records: list[dict]) -> dict:
    """Summarize the records of a timing.jsonl without the first, which warms up."""
    if len(records) < 2:
        raise ConfigError(
            f"The loop made {len(records)} records, expected at least 2; raise --seconds, or lower --print-freq or "
            "TRAIN.GLOBAL_BATCH_SIZE"
        )
    seconds, slowness = Counter(), []
    for record in records[1:]:
        slowness.append(1 / record["time/images_per_s"])
        seconds.update({phase: record[f"time/{phase}"] * slowness[-1] for phase in PHASES})
    share = shares(seconds)
    return {
        "images_per_s": len(slowness) / sum(slowness),
        "shares": share,
        "overhead": sum(share[phase] for phase in OVERHEAD),
        "bottleneck": bottleneck(seconds),
        "records": len(slowness),
    }


def table(result: dict) -> str:
    """The result of `run` as text."""
    lines = [f"{phase:12}{share:>8.2%}" for phase, share in result["shares"].items()]
    lines.append(f"{'overhead':12}{result['overhead']:>8.2%}  ({', '.join(OVERHEAD)})")
    return "\n".join([*lines, f"{result['images_per_s']:.1f} images/s; {result['bottleneck']}"])


def write_images(root: Path, count: int) -> None:
    """Write a dataset of one JPEG of noise: `count` links to it for training, one for validation."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = (smooth + rng.integers(-16, 17, smooth.shape)).clip(0, 255).astype(np.uint8)
    for split, names in (("train", count), ("val", 1)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
        first = root / split / "0" / "0.jpg"
        Image.fromarray(noise).save(first, quality=92)
        for i in range(1, names + 1):
            os.link(first, root / split / str(i % 2) / f"{i}.jpg")
