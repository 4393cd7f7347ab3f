"""Markdown of scores, comparisons and means over runs, for the console, scores.md and comparison.md."""

import string
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from analysis import statistics
from analysis.suite_table import format_table, markdown

Scores = dict[str, Any]

FOOT = "Intervals are 95 % intervals over images; other trainings differ by more. val also chose the checkpoint."


def format_scores(scores: Scores, details: bool) -> str:
    """What `score_evaluation` returns; `details` adds the worst classes and confusions of every set."""
    names = {row["set"] for row in scores["suite"]["rows"]}
    alone = {name: f"{name}, its classes alone" for name in scores["sets"]}  # where a row says so
    sets = {alone[n] if alone[n] in names else n: row for n, row in scores["sets"].items()}
    lines = [f"# {scores['suite']['model']}", "", *markdown([scores["suite"]]).splitlines()]
    if sets:
        lines += ["", "## Calibration and selective prediction", "", *_calibration(sets)]
    if scores["temperature"]:
        lines += ["", "## Temperature scaling", "", *_temperature(scores["temperature"])]
    if details:
        for name, row in sets.items():
            lines += ["", f"## {name}: worst classes", "", *_worst_classes(row["worst_classes"])]
            lines += [
                "",
                f"## {name}: most frequent confusions",
                "",
                *_confusions(row["confusions"]),
            ]
    return "\n".join(lines) + "\n"


def format_comparison(comparison: Scores) -> str:
    """What `compare_evaluations` returns."""
    models, rows = comparison["models"], comparison["rows"]
    letters = [*string.ascii_uppercase, *(f"M{index}" for index in range(26, len(models)))]
    lines = ["# Comparison", ""]
    lines += [
        f"- {letter}: {model['title']} ({model['evaluation']})"
        for letter, model in zip(letters, models, strict=False)
    ]
    with_q = any(row["q"] is not None for row in rows)
    header = ["set", "images", "models", "top-1 %", "only first", "only second"]
    header += ["difference, points [95 %]", "p", *["q"] * with_q]
    body = [
        [
            row["set"],
            f"{row['images']:,}",
            " − ".join(letters[index] for index in row["models"]),
            " − ".join(map(_number, row["top1"])),
            *(("", "") if row["only"] is None else (f"{count:,}" for count in row["only"])),
            f"{row['difference']:+.2f}{_brackets(row['interval'])}",
            *(_probability(row[key]) for key in ("p", *["q"] * with_q)),
        ]
        for row in rows
    ]
    lines += ["", *format_table(header, body), ""]
    lines += ["p is of the exact McNemar test on the images that only one of the two has right;"]
    lines += ["of ImageNet-C, of the paired t-test on each image's mean over the cells."]
    lines += ["q is p adjusted over all rows (Benjamini and Hochberg)."] * with_q
    lines += [FOOT]
    if comparison["notes"]:
        lines += ["", "Notes:", ""]
        lines += [f"- {note}" for note in comparison["notes"]]
    for row in rows:
        if row.get("differ"):
            first, second = (letters[index] for index in row["models"])
            lines += ["", f"## {row['set']}: where {first} and {second} differ most", ""]
            lines += _differing_images(row["differ"], first, second)
    return "\n".join(lines) + "\n"


def format_runs(values: Sequence[float]) -> str:
    """The mean of runs of different seeds ± half its 95 % interval, and the runs: "64.59 ± 0.87 (64.36 · …)"."""
    if len(values) < 2:
        return " · ".join(map(_number, values)) or "—"
    mean = statistics.mean_of_runs(values)
    spread = "" if mean.interval is None else f" ± {mean.interval.high - mean.value:.2f}"
    return f"{mean.value:.2f}{spread} ({' · '.join(map(_number, values))})"


def format_run_differences(runs: dict[str, Sequence[float]]) -> list[str]:
    """A table of every two groups of runs: difference of their means, Welch's interval and p, and q if several.

    Empty unless two groups have two runs or more.
    """
    names = [name for name, values in runs.items() if len(values) > 1]
    pairs = [(a, b, statistics.compare_runs(runs[a], runs[b])) for a, b in combinations(names, 2)]
    pairs = [pair for pair in pairs if pair[2].interval is not None]
    if not pairs:
        return []
    q_values = statistics.adjust([difference.p for *_, difference in pairs])
    header = ["first", "second", "difference, points [95 %]", "p", *["q"] * (len(pairs) > 1)]
    body = [
        [
            a,
            b,
            f"{difference.value:+.2f}{_brackets(difference.interval)}",
            _probability(difference.p),
            *[_probability(q)] * (len(pairs) > 1),
        ]
        for (a, b, difference), q in zip(pairs, q_values, strict=True)
    ]
    return format_table(header, body)


def _differing_images(images: list[Scores], first: str, second: str) -> list[str]:
    header = ["file", "label", first, second]
    if "p" in images[0]:
        header += [f"p of the label, {first}", second]
    body = [
        [
            image["file"],
            image["label"],
            *(guess or "unreadable" for guess in image["guess"]),
            *(_number(p, ".4f") for p in image.get("p", ())),
        ]
        for image in images
    ]
    return format_table(header, body)


def _calibration(sets: Scores) -> list[str]:
    header = ["set", "confidence %", "ECE % [95 %]", "adaptive ECE %", "Brier", "entropy"]
    header += ["AURC % [95 %]", "mean over classes % [95 %]"]
    coverages = next(iter(sets.values()))["risk"]
    header += [f"risk % at {coverage} % coverage" for coverage in coverages]
    body = [
        [
            name,
            _number(row["confidence"]),
            _with_interval(row["ece"]),
            _number(row["adaptive_ece"]),
            _number(row["brier"], ".4f"),
            _number(row["entropy"], ".4f"),
            _with_interval(row["aurc"]),
            _with_interval(row["class_accuracy"]),
            *map(_number, row["risk"].values()),
        ]
        for name, row in sets.items()
    ]
    return format_table(header, body)


def _temperature(temperature: Scores) -> list[str]:
    body = [
        [
            "val, other half" if name == "val" else name,
            f"{row['images']:,}",
            *(_number(row[when]["nll"], ".4f") for when in ("before", "after")),
            *(_number(row[when]["ece"]) for when in ("before", "after")),
        ]
        for name, row in temperature["sets"].items()
    ]
    fitted = (
        f"T = {temperature['value']:.4f}, fitted on {temperature['fitted_on']:,} images of val."
    )
    header = ["set", "images", "NLL", "NLL with T", "ECE %", "ECE % with T"]
    return [fitted, "", *format_table(header, body)]


def _worst_classes(classes: list[Scores]) -> list[str]:
    body = [
        [
            _title(one["class"], one["name"]),
            f"{one['right']} of {one['images']}",
            _brackets(one["interval"]).strip(),
        ]
        for one in classes
    ]
    return format_table(["class", "right", "% [95 %]"], body)


def _confusions(confusions: list[Scores]) -> list[str]:
    body = [
        [
            _title(one["label"], one["label_name"]),
            _title(one["guess"], one["guess_name"]),
            f"{one['images']} of {one['of']}",
        ]
        for one in confusions
    ]
    return format_table(["label", "guess", "images"], body) if body else ["None."]


def _title(folder: str, name: str) -> str:
    return folder if folder == name else f"{folder} ({name})"


def _number(value: float | None, style: str = ".2f") -> str:
    return "—" if value is None else format(value, style)


def _probability(value: float | None) -> str:
    return "—" if value is None else f"{value:.2g}"


def _brackets(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


def _with_interval(entry: Scores) -> str:
    return _number(entry["value"]) + _brackets(entry["interval"])
