"""Evaluations in the report: tables, diagrams, worst classes, confusions, the most confident mistakes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from analysis import figures
from analysis.predictions import Predictions, read_evaluation, read_predictions
from analysis.scores import read_scores
from analysis.suite_table import cells_of, columns, has_masked
from utils.errors import DataError

LISTED = 12  # classes and confusions
MISTAKES = 24

# (path that was evaluated, file of val) → the image as a data URI, None if it cannot be had
Picture = Callable[[str, str], str | None]


def describe_evaluation(
    folder: Path, picture: Picture, *, number: int, run: str = ""
) -> dict[str, Any]:
    """Tables, diagrams and mistakes of an evaluation; what is wrong with it in "problem".

    number: of the evaluation on the page. run: whose it is, for a page with several.
    """
    described: dict[str, Any] = {
        "title": f"{run} {folder.name}".strip(), "folder": str(folder), "problem": "", "header": [], "rows": [],
        "figures": [], "confusions": [], "classes": [], "mistakes": [], "set": "", "corruptions": None,
    }  # fmt: skip
    try:
        evaluation, scores = read_evaluation(folder), read_scores(folder)
        described["title"] = f"{run}: {evaluation.title}" if run else evaluation.title
        described["title"] += f" ({folder.name})"
        masked = has_masked(scores["suite"]["rows"])
        described["header"] = columns(masked)
        described["rows"] = [cells_of(row, masked) for row in scores["suite"]["rows"]]
        described["corruptions"] = _corruption_rows(scores["suite"].get("corruptions"))
        if not scores["sets"]:
            return described
        name = "val" if "val" in scores["sets"] else next(iter(scores["sets"]))
        rows = read_predictions(folder / f"{name}.csv")
        described["set"] = name
        described["confusions"] = scores["sets"][name]["confusions"][:LISTED]
        described["classes"] = scores["sets"][name]["worst_classes"][:LISTED]
        if rows.readable.any():
            described["figures"] = [
                Markup(_prefixed(draw(rows), number))
                for draw in (
                    figures.reliability_svg,
                    figures.confidence_svg,
                    figures.risk_coverage_svg,
                )
            ]
        described["mistakes"] = _mistakes(evaluation.names_of(name), rows)
        for mistake in described["mistakes"] if name == "val" else ():
            mistake["picture"] = picture(evaluation.sets[name].source, mistake["file"])
    except (DataError, KeyError, TypeError, ValueError) as error:
        described["problem"] = f"cannot be read: {error}"
    return described


def _prefixed(svg: str, number: int) -> str:
    """An SVG whose identifiers are those of this evaluation alone."""
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}evaluation{number}-")
    return svg


def _corruption_rows(found: dict | None) -> dict[str, Any] | None:
    """The heat table of corruptions: (name, five errors); None without any."""
    if not found:
        return None
    errors = found["errors"] | found["further"]
    known = [value for row in errors.values() for value in row if value is not None]
    largest = max(known, default=1) or 1
    return {
        "rows": [
            (name, [("—", 0) if v is None else (f"{v:.1f}", round(100 * v / largest)) for v in row])
            for name, row in errors.items()
        ],
        "mce": found.get("mce"),
    }


def _mistakes(names: Sequence[str], rows: Predictions) -> list[dict[str, Any]]:
    """The wrong predictions with most confidence, without pictures."""
    wrong = np.flatnonzero(rows.readable & ~rows.right)
    order = wrong[np.argsort(-rows.top_p[wrong, 0], kind="stable")][:MISTAKES]
    return [
        {
            "file": rows.file[i],
            "label": names[rows.label[i]],
            "guess": names[rows.top[i, 0]],
            "p": f"{100 * rows.top_p[i, 0]:.1f} %",
            "picture": None,
        }
        for i in order.tolist()
    ]
