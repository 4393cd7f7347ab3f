"""What does a step of the training loop spend its time on? The real program, for a while, in one process."""

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import config
import main
from tools.benchmarks.model import at_least
from utils.errors import ConfigError
from utils.step_timer import PHASES, bottleneck, shares

IMAGES = 20_000  # a long epoch: what happens between epochs is not measured
OVERHEAD = ("transform", "save", "other")  # neither computing nor waiting for images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `benchmark.py loop` is told."""
    parser.add_argument("--cfg", required=True, help="configuration to train with")
    parser.add_argument(
        "--data-path", default="", help="images; without, noise as large as ImageNet's photographs"
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long, start included")
    parser.add_argument("--print-freq", type=at_least(1), default=5, help="steps of a record")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY=VALUE", help="as main.py's")


def run(args: argparse.Namespace) -> dict:
    """Train into a folder that is deleted; the phases and the bottleneck.

    Saves and evaluations between epochs do not count. Raises ConfigError where too few steps were made.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["--cfg", args.cfg, "--output", str(folder / "output"), "--tag", "benchmark"]
        command += ["--print-freq", str(args.print_freq)]
        options = ["--opts", *args.opts, f"TRAIN.MAX_SECONDS={args.seconds}"]
        path = args.data_path
        if not path:
            path = str(folder / "images")
            cfg = config.parse([*command, "--data-path", path, *options]).cfg
            write_images(Path(path), max(IMAGES, cfg.TRAIN.GLOBAL_BATCH_SIZE))
        code = main.main([*command, "--data-path", path, *options])
        if code not in (0, 75):  # 75: the time was up; of any other, main has said the reason
            raise SystemExit(code)
        (timing,) = (folder / "output").glob("*/benchmark/timing.jsonl")
        records = [json.loads(line) for line in timing.read_text().splitlines()]
    return summarize(records)


def summarize(records: list[dict]) -> dict:
    """The phases of all records of a timing.jsonl but the first, which warms up."""
    if len(records) < 2:
        raise ConfigError(
            f"the loop made {len(records)} records, expected 2 or more: raise --seconds, or lower --print-freq "
            "or TRAIN.GLOBAL_BATCH_SIZE"
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
    """The numbers of `run` for people."""
    lines = [f"{phase:12}{share:>8.2%}" for phase, share in result["shares"].items()]
    lines.append(f"{'overhead':12}{result['overhead']:>8.2%}  ({', '.join(OVERHEAD)})")
    return "\n".join([*lines, f"{result['images_per_s']:.1f} images/s; {result['bottleneck']}"])


def write_images(root: Path, count: int) -> None:
    """An image tree of one JPEG of noise under `count` names for training and one for validation."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
    picture = (smooth + rng.integers(-16, 17, smooth.shape)).clip(0, 255).astype(np.uint8)
    for split, names in (("train", count), ("val", 1)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
        first = root / split / "0" / "0.jpg"
        Image.fromarray(picture).save(first, quality=92)
        for i in range(1, names + 1):
            os.link(first, root / split / str(i % 2) / f"{i}.jpg")
