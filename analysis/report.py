"""Report of a run, or of several: one HTML file from the run's own files, readable without network or scripts.

`make_report` gathers what templates/report.html shows: verdict, curves, speed, settings with where they come from, data
and faults, evaluations, environment, checkpoints; for several runs one row each, groups of equal settings with mean and
95 % interval, and the settings that differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from analysis import figures, pages
from analysis import statistics as st
from analysis.figures import Chart
from analysis.report_charts import (
    Group,
    comparison_charts,
    differing_keys,
    group_runs,
    run_charts,
    show,
)
from analysis.report_evaluations import Picture, describe_evaluation
from analysis.runs import EXIT_CODES, Run, name_apart
from analysis.tables import format_runs
from utils.bottleneck import PHASES, bottleneck
from utils.text import quantity

LISTED = 20
SEED_KEYS = {"SEED", "TAG", "OUTPUT"}  # in which runs of a group may differ


@dataclass(frozen=True)
class Recipes:
    """What the settings of a run are compared with.

    defaults: of every key. load: the settings of a configuration file by key, and its text; None if it is gone.
    ignored: keys that change no result, in which runs of one group may differ too.
    """

    defaults: Mapping[str, Any]
    load: Callable[[str], tuple[dict[str, Any], str] | None]
    ignored: frozenset[str]


@dataclass(frozen=True)
class Thumbnails:
    """Pictures for a report: those of misclassified files by name, and of what the model attends to.

    picture: of a file of a set, see analysis/report_evaluations.py.
    explored: (title, SVG) of each explored picture.
    """

    picture: Picture = lambda name, file: None
    explored: list[tuple[str, str]] = field(default_factory=list)


class Row(NamedTuple):
    """A row of a table of names and values; `kind` is "", "good", "warn" or "bad"."""

    name: str
    value: str
    note: str = ""
    kind: str = ""


def make_report(
    runs: Sequence[Run],
    recipes: Recipes,
    *,
    evaluations: Sequence[Path] = (),
    thumbnails: Thumbnails | None = None,
) -> str:
    """The HTML of `runs`; `evaluations` are folders beyond those of the runs themselves."""
    thumbnails = thumbnails or Thumbnails()
    runs = name_apart(runs)
    groups = group_runs(runs, SEED_KEYS | recipes.ignored)
    charts = run_charts(runs[0]) if len(runs) == 1 else comparison_charts(runs, groups)
    owners = {folder: run.name for run in runs for folder in run.evaluations}
    folders = [*evaluations, *owners]
    values: dict[str, Any] = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "charts": [_chart(chart, len(runs)) for chart in charts],
        "data": {"charts": [chart.describe() for chart in charts]},
        "evaluations": [
            describe_evaluation(
                folder,
                thumbnails.picture,
                number=number,
                run=owners.get(folder, "") if len(runs) > 1 else "",
            )
            for number, folder in enumerate(folders[:LISTED], start=1)
        ],
        "more_evaluations": max(0, len(folders) - LISTED),
        "explored": [(title, Markup(svg)) for title, svg in thumbnails.explored],
        "run": None,
        "comparison": None,
    }
    if len(runs) == 1:
        values["run"] = describe_run(runs[0], recipes)
    else:
        values["comparison"] = describe_comparison(runs, groups, recipes)
    has_pictures = any(
        one["picture"] for found in values["evaluations"] for one in found["mistakes"]
    )
    return pages.render(
        "report.html",
        scripts=["uPlot.iife.min.js", "report.js"],
        styles=["page.css", "uPlot.min.css", "report.css"],
        has_pictures=has_pictures,
        **values,
    )


def _chart(chart: Chart, runs: int) -> dict[str, Any]:
    points = figures.POINTS if runs <= 2 else max(12, figures.POINTS // runs)
    return {"title": chart.title, "svg": Markup(chart.svg(points))}


# --- One run --------------------------------------------------------------------------------------


def describe_run(run: Run, recipes: Recipes) -> dict[str, Any]:
    """Everything about one run but its curves and evaluations."""
    recipe_file, found = _recipe_of(run, recipes)
    recipe, text = found or ({}, "")
    return {
        "path": str(run.path),
        "verdict": verdict(run, text),
        "speed": describe_speed(run),
        "recipe_file": recipe_file,
        "recipe_read": found is not None,
        "settings": differing_settings(run, recipes, recipe),
        "data": describe_data(run),
        "faults": describe_faults(run),
        "environment": describe_environment(run),
        "checkpoints": [
            {
                "name": one.name,
                "size": f"{one.size / 2**20:.1f} MiB",
                "sha256": one.sha256,
                "note": one.damage or ("best" if _best_step(run) == one.step else ""),
                "kind": "bad" if one.damage else "",
            }
            for one in run.checkpoints
        ],
    }


def _best_step(run: Run) -> int | None:
    best = run.best()
    return None if best is None else best[1]


def verdict(run: Run, recipe_text: str = "") -> dict[str, Any]:
    """How the run ended, in words and rows; `recipe_text` is the configuration file, which says what to expect."""
    state, code = run.status.get("state", "unknown"), run.status.get("exit_code")
    total, step = run.total_steps, run.last_step
    words = {
        "done": "The run is complete.",
        "running": "The run was in progress when this was written.",
        "stopped": "The run was stopped and saved; the same command resumes it.",
        "interrupted": "The run was interrupted.",
        "failed": f"The run failed: {EXIT_CODES.get(code, 'the log says why')}.",
    }
    kinds = {
        "done": "good",
        "running": "",
        "stopped": "warn",
        "interrupted": "warn",
        "failed": "bad",
    }
    rows = [
        Row("progress", progress_words(step, total, run.steps_per_epoch)),
        Row("state", state if code is None else f"{state}, exit code {code}"),
    ]
    if error := run.status.get("error"):
        rows.append(Row("message", str(error), kind="bad" if state == "failed" else "warn"))
    if (best := run.best()) is not None:
        accuracy, at, which = best
        note = "chosen on these images, so it is optimistic"
        if (images := run.val_images) is not None:
            low, high = st.wilson(round(accuracy * images / 100), images)
            note = f"95 % interval {100 * low:.2f} to {100 * high:.2f}, {images:,} images; {note}"
        kind = "EMA" if which == "val_ema" else "weights"
        rows.append(Row("best top-1", f"{accuracy:.2f} % ({kind}, step {at:,})", note))
        if (last := run.last_accuracy()) is not None:
            rows.append(Row("last top-1", f"{last:.2f} %"))
    else:
        validated = run.last_accuracy() is not None
        rows.append(Row("accuracy", "never finite" if validated else "no validation yet"))
    if expected := expected_words(recipe_text):
        rows.append(Row("expected", expected))
    return {
        "words": words.get(state, "The run does not say how it ended."),
        "kind": kinds.get(state, "warn"),
        "rows": rows,
    }


def progress_words(step: int, total: int | None, per_epoch: float | None) -> str:
    """Steps and epochs in words."""
    if total is None:
        return f"step {step:,}"
    epochs = f", epoch {step / per_epoch:.1f} of {total / per_epoch:.0f}" if per_epoch else ""
    return f"step {step:,} of {total:,} ({100 * step / total:.0f} %){epochs}"


def expected_words(recipe_text: str) -> str:
    """What a configuration file says is to be expected, in the comment that opens it."""
    lines = [
        line.lstrip("# ").rstrip() for line in recipe_text.splitlines() if line.startswith("#")
    ]
    for number, line in enumerate(lines):
        if line.startswith("Expected:"):
            words = [line.removeprefix("Expected:").strip()]
            for more in lines[number + 1 :]:
                if not more or more.split(" ")[0].endswith(":"):
                    break
                words.append(more)
            return " ".join(words)
    return ""


def describe_speed(run: Run) -> dict[str, Any] | None:
    """Images per second, the shares of the phases, and what bounds the speed; None without records."""
    speed = run.timing.get("time/images_per_s")
    if speed is None:
        return None
    shares = {
        phase: float(np.nanmean(run.timing[f"time/{phase}"].values))
        for phase in PHASES
        if f"time/{phase}" in run.timing
    }
    return {
        "median": f"{np.nanmedian(speed.values):,.0f}",
        "range": f"{np.nanmin(speed.values):,.0f} to {np.nanmax(speed.values):,.0f}",
        "last": f"{speed.values[-1]:,.0f}",
        "phases": [
            {"name": name.replace("_", " "), "share": 100 * share, "words": f"{100 * share:.1f} %"}
            for name, share in shares.items()
        ],
        "bound": bottleneck(shares) if len(shares) == len(PHASES) and sum(shares.values()) else "",
    }


def _recipe_of(run: Run, recipes: Recipes) -> tuple[str, tuple[dict[str, Any], str] | None]:
    """The configuration file of the run, "" if it has none, and what `recipes` loads from it.

    Of files that build on each other, it is the one from whose settings the run differs least.
    """
    sources = [source.rpartition(":")[0] for source in run.sources.values() if ".y" in source]
    files = list(dict.fromkeys(sources))
    loaded = {file: found for file in files if (found := recipes.load(file)) is not None}
    if not loaded:
        return max(files, key=sources.count, default=""), None
    return min(loaded.items(), key=lambda item: len(_differing(run, recipes, item[1][0])))


def differing_settings(
    run: Run, recipes: Recipes, recipe: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The settings in which the run differs from its recipe, or without one from the defaults."""
    before = {**recipes.defaults, **recipe}
    return [
        {
            "key": key,
            "value": show(run.config[key]),
            "before": show(before[key]) if key in before else "—",
            "source": run.sources.get(key, "—"),
        }
        for key in _differing(run, recipes, recipe)
    ]


def _differing(run: Run, recipes: Recipes, recipe: Mapping[str, Any]) -> list[str]:
    before = {**recipes.defaults, **recipe}
    return [key for key, value in run.config.items() if key not in before or before[key] != value]


def describe_data(run: Run) -> list[Row]:
    """The data sets, as far as checkpoints know them."""
    metadata, rows = run.metadata, [Row("path", show(run.config.get("DATA.PATH", "—")))]
    images = metadata.get("images") if isinstance(metadata.get("images"), dict) else {}
    for split, key in (("train", "data"), ("val", "val_data")):
        if isinstance(digest := metadata.get(key), str):
            count = f"{images[split]:,} images, " if split in images else ""
            rows.append(Row(split, f"{count}fingerprint {digest[:16]}…"))
    if isinstance(classes := metadata.get("classes"), list):
        shown, more = classes[:8], len(classes) - 8
        rows.append(
            Row(
                "classes",
                f"{len(classes)}: {', '.join(map(str, shown))}"
                + (f" and {more} more" if more > 0 else ""),
            )
        )
    decoder = metadata.get("decoder")
    if isinstance(decoder, dict):
        rows.append(Row("decoder", ", ".join(f"{k} {v}" for k, v in decoder.items())))
    return rows


def describe_faults(run: Run) -> list[Row]:
    """Whatever went wrong, and what cannot be read."""
    rows = []
    if run.skipped:
        steps = ", ".join(f"{one['step']:,}" for one in run.skipped[:8])
        more = "…" if len(run.skipped) > 8 else ""
        rows.append(
            Row(
                "steps without a finite gradient",
                f"{len(run.skipped)}",
                f"skipped: {steps}{more}",
                "warn",
            )
        )
    files = sorted({str(one.get("path")) for one in run.bad})
    if files:
        shown = ", ".join(files[:8]) + ("…" if len(files) > 8 else "")
        rows.append(Row("unreadable training images", f"{len(files)}", shown, "warn"))
    for stage, share in run.lost_points().items():
        words = "offsets took them to the border or beyond; lower TRAIN.LR_SCALES of '*.positions'"
        rows.append(Row(f"sampled points of {stage} lost", f"{share:.0%}", words, "warn"))
    if failed := run.status.get("failed_saves"):
        rows.append(Row("failed saves in a row", str(failed), kind="bad"))
    rows += [Row("left behind", name, kind="bad") for name in run.faults[:LISTED]]
    rows += [Row("damaged", line, kind="warn") for line in run.damage[:LISTED]]
    if len(run.damage) > LISTED:
        rows.append(Row("damaged", f"{len(run.damage) - LISTED} more lines", kind="warn"))
    return rows


def describe_environment(run: Run) -> list[Row]:
    """Machine and versions of the latest checkpoint."""
    metadata, rows = run.metadata, []
    for name, key in (
        ("device", "device"),
        ("processes", "world_size"),
        ("CPU threads", "threads"),
        ("code", "revision"),
        ("reproducibility", "reproducibility"),
    ):
        if metadata.get(key) is not None:
            rows.append(Row(name, str(metadata[key])))
    if isinstance(versions := metadata.get("versions"), dict):
        rows += [Row(str(name), str(version)) for name, version in versions.items()]
    return rows


# --- Several runs ---------------------------------------------------------------------------------


def describe_comparison(
    runs: Sequence[Run], groups: list[Group], recipes: Recipes
) -> dict[str, Any]:
    """Groups, rows and settings of several runs."""
    colour = {id(run): k for k, group in enumerate(groups) for run in group.runs}
    rows = []
    for run in runs:
        best, speed = run.best(), run.timing.get("time/images_per_s")
        rows.append(
            {
                "name": run.name,
                "path": str(run.path),
                "colour": figures.COLOURS[colour[id(run)] % len(figures.COLOURS)],
                "state": run.status.get("state", "unknown"),
                "progress": progress_words(run.last_step, run.total_steps, run.steps_per_epoch),
                "best": "—" if best is None else f"{best[0]:.2f}",
                "last": "—" if run.last_accuracy() is None else f"{run.last_accuracy():.2f}",
                "speed": "—" if speed is None else f"{np.nanmedian(speed.values):,.0f}",
                "faults": len(run.skipped) + len(run.bad) + len(run.faults) + len(run.damage),
            }
        )
    keys = differing_keys(runs, SEED_KEYS | recipes.ignored)
    return {
        "groups": [
            {
                "title": group.title,
                "colour": figures.COLOURS[k % len(figures.COLOURS)],
                "count": len(group.runs),
                "accuracy": _final_accuracy(group),
            }
            for k, group in enumerate(groups)
        ],
        "rows": rows,
        "settings": [
            {"key": key, "values": [show(group.runs[0].config.get(key, "—")) for group in groups]}
            for key in keys
        ]
        if len(groups) <= 8
        else [],
        "damage": [f"{run.name}: {line}" for run in runs for line in run.damage][:LISTED],
    }


def _final_accuracy(group: Group) -> str:
    """The mean of the finished runs, and how many others are left out of it."""
    finished = [run for run in group.runs if run.is_finished]
    values = [v for run in finished if (v := run.last_accuracy()) is not None]
    words = format_runs(values) if len(values) <= 12 else _short_mean(values)
    left_out = len(group.runs) - len(finished)
    return f"{words}, without {quantity(left_out, 'unfinished run')}" if left_out else words


def _short_mean(values: Sequence[float]) -> str:
    mean = st.mean_of_runs(values)
    spread = "" if mean.interval is None else f" ± {mean.interval.high - mean.value:.2f}"
    return f"{mean.value:.2f}{spread} ({len(values)} runs, {min(values):.2f} to {max(values):.2f})"
