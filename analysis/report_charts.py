"""Curves of the report: of one run, or of several, grouped by settings, with the mean of seeds and its interval."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from analysis import statistics as st
from analysis.figures import Band, Chart, Line
from analysis.runs import Run, Series, smooth, thin

POINTS = 1000  # of a curve, at most
ALL_POINTS = 40_000  # of all curves of a page
SMOOTHED = 50  # points of a curve from which its running mean is drawn too

# --- Groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed and what changes no result."""

    title: str
    runs: list[Run]


def group_runs(runs: Sequence[Run], left_out: Set[str]) -> list[Group]:
    """`runs` by equal settings but those `left_out`, in the order of the first of each.

    A run of unknown settings is a group of its own. A group's title says what it has of its own.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in run.config.items() if k not in left_out}
        key = repr(sorted(settings.items())) if run.config else str(run.path)
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    models = {members[0].config.get("MODEL.NAME") for members in groups}
    own = [key for key in differing_keys(runs, left_out) if not key.startswith("MODEL.N")][:3]
    titles = []
    for members in groups:
        words = [str(members[0].config.get("MODEL.NAME", members[0].name))]
        if members[0].config and len(models) < len(groups):  # the model's name does not say which
            words += [f"{key.rpartition('.')[2]} {show(members[0].config.get(key))}" for key in own]
        titles.append(", ".join(words)[:80])
    return [Group(title, members) for title, members in zip(titles, groups, strict=True)]


def differing_keys(runs: Sequence[Run], left_out: Set[str]) -> list[str]:
    """The settings that are not the same in all `runs`, but those `left_out`."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in left_out)
    return [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]


def show(value: object) -> str:
    """A setting as a reader writes it."""
    return repr(value) if value == "" or value is None else str(value)


# --- Curves ---------------------------------------------------------------------------------------


def run_charts(run: Run) -> list[Chart]:
    """The curves of one run."""
    per_epoch = run.steps_per_epoch
    unit, scale = ("epoch", per_epoch) if per_epoch else ("step", 1.0)

    def line(tag: str, label: str, colour: int, *, faint: bool = False, smoothed: bool = False):
        series = {**run.timing, **run.metrics}.get(tag)
        if series is None:
            return []
        series = smooth(series) if smoothed else series
        series = thin(series, POINTS if not smoothed else POINTS // 2)
        return [Line(label, series.steps / scale, series.values, colour, faint)]

    def noisy(tag: str, label: str) -> list[Line]:
        many = len({**run.timing, **run.metrics}.get(tag, Series([], [])).steps) >= SMOOTHED
        if not many:
            return line(tag, label, 0)
        single = line(tag, f"{label}, single steps", 0, faint=True)
        return single + line(tag, label, 0, smoothed=True)

    stages = sorted({tag.partition("_")[0] for tag in run.metrics if tag.startswith("offsets/")})

    def by_stage(quantity: str) -> list[Line]:
        return [
            one
            for k, stage in enumerate(stages)
            for one in line(
                f"{stage}_{quantity}", stage.removeprefix("offsets/stage").join(["stage ", ""]), k
            )
        ]

    validation = line("val/loss", "validation", 1) + line("val_ema/loss", "validation, EMA", 2)
    accuracy = line("val/acc1", "weights", 1) + line("val_ema/acc1", "EMA", 2)
    charts = [
        Chart("Loss", unit, noisy("train/loss", "training") + validation),
        Chart("Validation top-1 in %", unit, accuracy),
        Chart("Learning rate", unit, line("train/lr", "learning rate", 5)),
        Chart("Gradient norm", unit, noisy("train/grad_norm", "gradient norm"), log=True),
        Chart("Mean length of the offsets in pixels", unit, by_stage("pixels")),
        Chart("Share of sampled points outside or clamped", unit, by_stage("outside")),
        Chart("Images per second", unit, noisy("time/images_per_s", "images per second")),
    ]
    return [chart for chart in charts if chart.lines]


def comparison_charts(runs: Sequence[Run], groups: Sequence[Group]) -> list[Chart]:
    """The curves of several runs, coloured by group; two and more finished runs of a group have mean and interval."""
    points = max(16, min(POINTS, ALL_POINTS // (4 * len(runs))))
    by_epoch = all(run.steps_per_epoch for run in runs)  # known from the first checkpoint on
    unit = "epoch" if by_epoch else "step"
    kinds = (
        ("Validation top-1 in %", "val/acc1", False),
        ("Validation top-1 of the EMA in %", "val_ema/acc1", False),
        ("Training loss, smoothed", "train/loss", True),
        ("Validation loss", "val/loss", False),
    )
    charts = []
    for title, tag, smoothed in kinds:
        lines, bands = [], []
        for k, group in enumerate(groups):
            found = [(run, run.metrics[tag]) for run in group.runs if tag in run.metrics]
            for run, series in found:
                drawn = thin(smooth(series) if smoothed else series, points)
                scale = run.steps_per_epoch if by_epoch else 1
                faint = len(found) > 1 and not smoothed
                lines.append(Line(run.name, drawn.steps / scale, drawn.values, k, faint))
            finished = [series for run, series in found if run.is_finished]
            if len(finished) > 1 and not smoothed and (mean := _mean_of(finished)):
                x, middle, low, high = mean
                x = x / (found[0][0].steps_per_epoch if by_epoch else 1)
                lines.append(Line(f"{group.title}, mean", x, middle, k))
                bands.append(Band(f"{group.title}, 95 %", x, low, high, k))
        charts.append(Chart(title, unit, lines, bands))
    return [chart for chart in charts if chart.lines]


def _mean_of(series: Sequence[Series]) -> tuple[np.ndarray, ...] | None:
    """At the steps that all have: steps, mean, and the ends of its 95 % t interval."""
    shared = sorted(set.intersection(*(set(one.steps.tolist()) for one in series)))
    if not shared:
        return None
    rows = []
    for step in shared[:: max(1, len(shared) // 200)]:
        values = [float(one.values[np.flatnonzero(one.steps == step)[-1]]) for one in series]
        mean = st.mean_of_runs(values)
        low, high = mean.interval or (mean.value, mean.value)
        rows.append((step, mean.value, low, high))
    return tuple(np.array(column) for column in zip(*rows, strict=True))
