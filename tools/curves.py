#!/usr/bin/env python
"""Curves of a run in one picture: loss, accuracy, learning rate and offset length, from its metrics.jsonl.

Works while the run is training. Damaged records are reported and left out.

examples:
  python tools/curves.py output/dat_pp_micro/cifar10
  python tools/curves.py output/dat_tiny/default --out curves.svg
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.figures import plain_label
from analysis.records import read_records
from utils.errors import ConfigError, StorageError, as_exit_code
from utils.files import replace_atomically
from utils.text import quantity

SMOOTHING = (
    0.02  # window of the running mean, as a share of all records: the loss of one step is noisy
)


def read_series(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The steps and values of every tag in the metrics.jsonl of `run`. Raises ConfigError where there are none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(
            f"{run} has no metrics.jsonl; expected the folder of a run, <output>/<model>/<tag>"
        )
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(file):
        for tag, value in record.items():
            if tag != "step" and isinstance(value, int | float):
                points.setdefault(tag, []).append((record["step"], value))
    if not points:
        raise ConfigError(
            f"{file} has no valid records yet; wait until the run has logged some steps"
        )
    return {tag: tuple(np.array(values).T) for tag, values in points.items()}


def smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a window of `SMOOTHING` of all values, narrower at the ends."""
    width = max(1, int(len(values) * SMOOTHING))
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def draw(run: Path, out: Path) -> None:
    """Draw the curves of `run` into the file `out`."""
    series = read_series(run)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    figure.suptitle(plain_label(f"{run.parent.name} / {run.name}"))
    unit, per_unit = "step", 1.0
    if "epoch" in series:  # recorded with every validation
        steps, epochs = series["epoch"]
        unit, per_unit = "epoch", max(1.0, steps[-1] / epochs[-1])

    def plot(ax: Axes, tag: str, label: str, **style: object) -> None:
        if tag in series:
            marker = "o" if len(series[tag][0]) == 1 else None  # one point has no line
            ax.plot(series[tag][0] / per_unit, series[tag][1], label=label, marker=marker, **style)

    ax = axes[0, 0]
    plot(ax, "train/loss", "single steps", color="C0", alpha=0.2, linewidth=0.6)
    if "train/loss" in series:
        series["train/loss, smooth"] = (series["train/loss"][0], smooth(series["train/loss"][1]))
    plot(ax, "train/loss, smooth", "training", color="C0")
    plot(ax, "val/loss", "validation", color="C1")
    plot(ax, "val_ema/loss", "validation, EMA", color="C2")
    ax.set_title("Loss")

    ax = axes[0, 1]
    plot(ax, "val/acc1", "top-1", color="C1")
    plot(ax, "val_ema/acc1", "top-1, EMA", color="C2")
    accuracies = [series[tag][1].max() for tag in ("val/acc1", "val_ema/acc1") if tag in series]
    if accuracies:
        best = max(accuracies)
        ax.axhline(best, color="0.6", linewidth=0.8, linestyle=":")
        place = ("axes fraction", "data")
        ax.annotate(f"{best:.2f}", (0.01, best), xycoords=place, va="bottom", color="0.4")
    ax.set_title("Validation accuracy (%)")

    ax = axes[1, 0]
    plot(ax, "train/lr", "learning rate", color="C3")
    ax.set_title("Learning rate")

    ax = axes[1, 1]
    for tag in sorted(tag for tag in series if tag.startswith("offsets/stage")):
        if tag.endswith("_pixels"):
            plot(ax, tag, f"stage {tag.removeprefix('offsets/stage').removesuffix('_pixels')}")
    ax.set_title("Mean offset length (pixels of the input)")

    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    for ax in axes[1]:
        ax.set_xlabel(unit)
    try:
        with replace_atomically(out) as temporary:
            figure.savefig(temporary, format=out.suffix[1:] or "png", dpi=110)
    except ValueError as error:  # lists the known formats
        raise StorageError(f"--out {out} cannot be written: {error}") from error
    finally:
        plt.close(figure)
    last_step = int(max(steps[-1] for steps, _ in series.values()))
    result = f"best top-1 {max(accuracies):.2f} %" if accuracies else "no validation yet"
    print(f"{out}: {quantity(last_step, 'step')}, {result}")


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, with metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    args = parser.parse_args(arguments)
    draw(args.run, args.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
