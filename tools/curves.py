#!/usr/bin/env python
"""How did a run go? Its loss, accuracy, learning rate and offsets as one picture, from metrics.jsonl.

python tools/curves.py output/dat_micro/cifar10 --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

SMOOTHING = 0.02  # of the records; a single step's loss is noisy, and mixing makes it more so


def read_series(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For every tag of the run's metrics.jsonl the steps and the values."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for tag, value in record.items():
            points.setdefault(tag, []).append((step, value))
    return {tag: tuple(np.array(values).T) for tag, values in points.items()}


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a window of `SMOOTHING` of all values, narrower at the ends."""
    width = max(1, int(len(values) * SMOOTHING))
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def draw(run: Path, out: Path) -> None:
    """Write the picture of `run` to `out`."""
    series = read_series(run)
    steps, epochs = series["val/loss"][0], series["epoch"][1]
    per_epoch = steps[-1] / epochs[-1]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    figure.suptitle(f"{run.parent.name} / {run.name}")

    def plot(ax: Axes, tag: str, label: str, **style: object) -> None:
        if tag in series:
            ax.plot(series[tag][0] / per_epoch, series[tag][1], label=label, **style)

    ax = axes[0, 0]
    plot(ax, "train/loss", "of single steps", color="C0", alpha=0.2, linewidth=0.6)
    series["smooth"] = (series["train/loss"][0], smooth(series["train/loss"][1]))
    plot(ax, "smooth", "training", color="C0")
    plot(ax, "val/loss", "validation", color="C1")
    plot(ax, "val_ema/loss", "validation, EMA", color="C2")
    ax.set_title("Loss")

    ax = axes[0, 1]
    plot(ax, "val/acc1", "top-1", color="C1")
    plot(ax, "val_ema/acc1", "top-1, EMA", color="C2")
    best = max(series[tag][1].max() for tag in ("val/acc1", "val_ema/acc1") if tag in series)
    ax.axhline(best, color="0.6", linewidth=0.8, linestyle=":")
    ax.annotate(f"{best:.2f}", (0, best), va="bottom", color="0.4")
    ax.set_title("Validation accuracy (%)")

    ax = axes[1, 0]
    plot(ax, "train/lr", "learning rate", color="C3")
    ax.set_title("Learning rate")

    ax = axes[1, 1]
    for tag in sorted(tag for tag in series if tag.startswith("offsets/")):
        plot(
            ax, tag, tag.removeprefix("offsets/").removesuffix("_pixels").replace("stage", "stage ")
        )
    ax.set_title("Mean offset length (pixels of the input)")

    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    figure.savefig(out, dpi=110)
    print(f"{out}: {len(epochs)} epochs, best top-1 {best:.2f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, with metrics.jsonl in it")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    args = parser.parse_args()
    if not (args.run / "metrics.jsonl").is_file():
        sys.exit(f"{args.run} has no metrics.jsonl: name a run's folder, <output>/<model>/<tag>")
    draw(args.run, args.out)
