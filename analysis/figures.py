"""Figures of the report as inline SVG: curves, reliability, risk and coverage, confidence; equal for equal inputs.

Text and axes have the page's own colour, so that they are readable in dark and light. Colours are Okabe and Ito's.
"""

import html
import io
import re
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import statistics as st
from analysis.predictions import Predictions

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
TEXT = "#010203"  # replaced by the page's text colour when the SVG is written
POINTS = 300  # of a line in an SVG, which has no zoom


@dataclass(frozen=True)
class Line:
    """A line of a chart; `faint` ones are drawn thin, behind the others."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """An interval around a line."""

    label: str
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over steps or epochs. `log`: the values' axis is logarithmic."""

    title: str
    x_label: str
    lines: list[Line]
    bands: list[Band] = field(default_factory=list)
    log: bool = False

    def describe(self) -> dict[str, Any]:
        """What the report's script draws."""
        return {
            "title": self.title,
            "xLabel": self.x_label,
            "log": self.log,
            "lines": [
                {
                    "label": line.label,
                    "x": _numbers(line.x),
                    "y": _numbers(line.y),
                    "colour": COLOURS[line.colour % len(COLOURS)],
                    "faint": line.faint,
                }
                for line in self.lines
            ],
            "bands": [
                {
                    "label": band.label,
                    "x": _numbers(band.x),
                    "low": _numbers(band.low),
                    "high": _numbers(band.high),
                    "colour": COLOURS[band.colour % len(COLOURS)],
                }
                for band in self.bands
            ],
        }

    def svg(self, points: int = POINTS) -> str:
        """The chart as a still picture, with at most about `points` points a line."""
        figure, ax = _axes(5.6, 2.7)
        for band in self.bands:
            colour = COLOURS[band.colour % len(COLOURS)]
            ax.fill_between(band.x, band.low, band.high, color=colour, alpha=0.25, linewidth=0)
        labels = 0
        for line in self.lines:
            step = max(1, len(line.x) // points)
            ax.plot(
                line.x[::step],
                line.y[::step],
                color=COLOURS[line.colour % len(COLOURS)],
                alpha=0.35 if line.faint else 1,
                linewidth=0.7 if line.faint else 1.7,
                marker="o" if np.isfinite(line.y).sum() == 1 else None,
                label=plain_label(line.label) if labels < len(COLOURS) and not line.faint else None,
            )
            labels += not line.faint
        if self.log:
            ax.set_yscale("log")
            ax.tick_params(axis="y", which="minor", labelsize=7)
        ax.set_xlabel(self.x_label)
        _finish(ax, legend=labels > 1)
        return to_svg(figure, self.title)


def _numbers(values: np.ndarray) -> list[float | None]:
    """JSON's numbers, with six digits; None for what is not finite."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


# --- Evaluations ----------------------------------------------------------------------------------


def reliability_svg(rows: Predictions) -> str:
    """Accuracy by confidence, with the share of images below."""
    right, confidence = rows.right[rows.readable], rows.top_p[rows.readable, 0]
    bins = st.reliability(right, confidence, st.bin_numbers(confidence))
    figure, ax = _axes(3.4, 3.1)
    ax.plot(
        [0, 1], [0, 1], color=TEXT, linewidth=0.8, linestyle="--", label="as confident as right"
    )
    counts = np.array([count for count, _, _ in bins])
    means, accuracies = (np.array([one[k] for one in bins]) for k in (1, 2))
    ends = np.array([st.wilson(round(a * n), n) for n, a in zip(counts, accuracies, strict=True)])
    ax.errorbar(
        means, accuracies, yerr=np.abs(ends.T - accuracies), color=COLOURS[0], marker="o",
        markersize=4, linewidth=1.5, elinewidth=0.9, label="measured, 95 %",
    )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    _finish(ax, legend=True, place="lower right")
    return to_svg(figure, "Reliability")


def confidence_svg(rows: Predictions) -> str:
    """How many images have which confidence, right and wrong."""
    right, confidence = rows.right[rows.readable], rows.top_p[rows.readable, 0]
    figure, ax = _axes(3.4, 3.1)
    edges = np.linspace(0, 1, 21)
    both = [confidence[right], confidence[~right]]
    ax.hist(both, edges, stacked=True, color=COLOURS[:2], label=["right", "wrong"])
    ax.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    _finish(ax, legend=True)
    return to_svg(figure, "Confidence")


def risk_coverage_svg(rows: Predictions) -> str:
    """The error among the most confident images, by their share."""
    right, confidence = rows.right[rows.readable], rows.top_p[rows.readable, 0]
    risk = 100 * st.risk_coverage(right, confidence)
    figure, ax = _axes(3.4, 3.1)
    chosen = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), POINTS)).astype(int))
    ax.plot(100 * (chosen + 1) / len(risk), risk[chosen], color=COLOURS[0], linewidth=1.7)
    ax.set(xlim=(0, 100), xlabel="most confident images, %", ylabel="error, %")
    ax.set_ylim(bottom=0)
    _finish(ax, legend=False)
    return to_svg(figure, "Risk and coverage")


# --- SVG ------------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.add_subplot()
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(TEXT)
    ax.tick_params(colors=TEXT, labelsize=9, which="both")
    ax.xaxis.label.set(color=TEXT, fontsize=9)
    ax.yaxis.label.set(color=TEXT, fontsize=9)
    return figure, ax


def plain_label(text: str) -> str:
    """A name as matplotlib's label: no mathematics between dollars, and not hidden by a leading underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _finish(ax: Axes, legend: bool, place: str = "best") -> None:
    ax.grid(color="#888888", alpha=0.25, linewidth=0.6)
    if legend:
        ax.legend(frameon=False, fontsize=8.5, labelcolor=TEXT, loc=place)


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that scales with the page and is called `title` for readers who do not see it."""
    file = io.StringIO()
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "svg.id": None,
        "font.family": ["sans-serif"],
    }
    with matplotlib.rc_context(settings):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    # Identifiers are unique in the page, and the size is that of the page's layout.
    prefix = re.sub(r"\W+", "-", title).lower()
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bd="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"\s+", " ", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
