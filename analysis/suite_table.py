"""Results of the test sets: one table of several evaluations, ImageNet-C's mCE and ImageNet-X's factors.

Everything is computed from the prediction store; accuracies, errors and their intervals are in per cent.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis import imagenet, statistics
from analysis.predictions import Evaluation, Predictions, read_predictions

CLEAN = {"a": "a-clean", "r": "r-clean"}  # val with the same classes
FOOT = "Intervals are 95 % Wilson intervals over images; other trainings differ by more. val also chose the checkpoint."
MASKED_FOOT = " A and R: only their 200 classes compete; `all 1000` is without that mask, `clean` is val with it."
CORRUPTION_FOOT = (
    "Corruptions: error in % by severity, means in the last lines. CE is the error as a share of AlexNet's, mCE their "
    "mean (arXiv 1903.12261); the relative one counts what a corruption adds to the clean error. The four further "
    "corruptions are never part of them."
)


def suite_results(evaluation: Evaluation, factors_file: Path | None = None) -> dict:
    """The results of every set of `evaluation`: "rows", "corruptions" and "factors", None where there are none.

    factors_file: ImageNet-X's annotations of val, if any.
    """
    cells = [name for name in evaluation.sets if cell_of(name)]
    names = [n for n in evaluation.sets if n not in cells and n not in CLEAN.values()]
    rows = {
        n: read_predictions(evaluation.folder / f"{n}.csv")
        for n in evaluation.sets
        if n not in cells
    }
    results = []
    for name in names:
        results += _set_rows(evaluation, name, rows)
    clean = 1 - rows["val"].right.mean() if "val" in rows else None
    factors = None
    if factors_file is not None and "val" in rows:
        found = imagenet.read_factors(factors_file)
        factors = imagenet.factor_error_ratios(*found, rows["val"].file, rows["val"].right)
    return {
        "model": evaluation.title,
        "img_size": _common_size(evaluation),
        "rows": results,
        "corruptions": _corruptions(evaluation, cells, clean) if cells else None,
        "factors": factors,
    }


def cell_of(name: str) -> tuple[str, int] | None:
    """Corruption and severity of a set `c-<corruption>-<severity>`."""
    letter, _, rest = name.partition("-")
    corruption, _, severity = rest.rpartition("-")
    known = imagenet.CORRUPTIONS + imagenet.EXTRA_CORRUPTIONS
    return (corruption, int(severity)) if letter == "c" and corruption in known else None


def _common_size(evaluation: Evaluation) -> int | None:
    sizes = {record.pixels["img_size"] for record in evaluation.sets.values()}
    return sizes.pop() if len(sizes) == 1 else None


# --- One set --------------------------------------------------------------------------------------


def _set_rows(evaluation: Evaluation, name: str, rows: dict[str, Predictions]) -> list[dict]:
    """The rows of a set in the table: its own, ReaL after val, and ObjectNet by both of its conventions."""
    record, found = evaluation.sets[name], rows[name]
    seen = found.readable
    row = {
        "set": name,
        **_accuracy(found.right),
        "top5": 100 * float(found.right5.mean()),
        "ece": _ece(found.right[seen], found.top_p[seen, 0]) if seen.any() else None,
        "nll": float(found.nll[seen].mean()) if seen.any() else None,
        "unreadable": int((~seen).sum()),
        "crop": describe_crop(record.pixels),
        "note": record.note,
    }
    if found.full1 is None:
        more = []
        if name == "val" and (real := _real(evaluation, found)) is not None:
            more = [{"set": "real", **real, "crop": row["crop"], "note": "labels of val"}]
        return [row, *more]
    full = _accuracy(seen & (found.full1 == found.label))
    if record.classes is not None:
        # Without the knowledge which classes a set has: the convention without an oracle comes first.
        note = f"argmax of all {len(evaluation.classes)} classes"
        first = {"set": name, **full, "crop": row["crop"], "note": note}
        return [first, {**row, "set": f"{name}, its classes alone"}]
    row["all_classes"] = full["top1"]
    if CLEAN.get(name) in rows:
        clean = _accuracy(rows[CLEAN[name]].right)["top1"]
        row |= {"clean": clean, "gap": clean - row["top1"]}
    return [row]


def _accuracy(right: np.ndarray) -> dict:
    count, images = int(right.sum()), len(right)
    interval = statistics.wilson(count, images)
    return {
        "images": images,
        "right": count,
        "top1": 100 * count / images,
        "interval": [100 * end for end in interval],
    }


def _ece(right: np.ndarray, confidence: np.ndarray) -> float:
    return 100 * statistics.calibration_error(right, confidence, statistics.bin_numbers(confidence))


def _real(evaluation: Evaluation, val: Predictions) -> dict | None:
    """ReaL's accuracies; None where the classes or the file names are not ImageNet's."""
    hits = reassess(evaluation, val)
    if hits is None:
        return None
    return {**_accuracy(hits[:, 0]), "top5": 100 * float(hits[:, -1].mean())}


def reassess(evaluation: Evaluation, val: Predictions) -> np.ndarray | None:
    """bool [images of val that have ReaL's labels, K]: one of the first k + 1 predictions is among them.

    None where the classes or the file names are not ImageNet's, or no image has labels.
    """
    if not imagenet.are_imagenet(evaluation.classes):
        return None
    if any(imagenet.val_number(file) is None for file in val.file):
        return None
    labels = imagenet.real_labels(val.file, evaluation.classes)
    judged = np.array([bool(allowed) for allowed in labels])
    return imagenet.real_hits(labels, val.top)[judged] if judged.any() else None


def describe_crop(pixels: dict) -> str:
    """Crop mode, crop share and size in a few characters: "squash 0.875, 224 px"."""
    return f"{pixels['crop_mode']} {pixels['crop_pct']:g}, {pixels['img_size']} px"


# --- Corruptions ----------------------------------------------------------------------------------


def _corruptions(evaluation: Evaluation, cells: Sequence[str], clean: float | None) -> dict:
    """Errors of ImageNet-C's cells and their means; `clean` is the error on val, a share."""
    wrong: dict[str, dict[int, np.ndarray]] = {}
    files = set()
    for name in cells:
        corruption, severity = cell_of(name)
        found = read_predictions(evaluation.folder / f"{name}.csv")
        wrong.setdefault(corruption, {})[severity] = ~found.right
        if corruption in imagenet.CORRUPTIONS:
            files.add(tuple(found.file))
    errors = {
        corruption: [
            100 * float(by_severity[s].mean()) if s in by_severity else None
            for s in imagenet.SEVERITIES
        ]
        for corruption, by_severity in wrong.items()
    }
    known = {n: e for n, e in errors.items() if n in imagenet.CORRUPTIONS}
    further = {n: e for n, e in errors.items() if n not in imagenet.CORRUPTIONS}
    record = evaluation.sets[cells[0]]
    result = {
        "errors": known,
        "further": further,
        "mean_error": _mean(known),
        "further_mean_error": _mean(further),
        "crop": describe_crop(record.pixels),
        "note": record.note,
    }
    complete = [n for n in imagenet.CORRUPTIONS if n in known and None not in known[n]]
    if not imagenet.are_imagenet(evaluation.classes) or not complete:
        return result
    reference = np.array([imagenet.ALEXNET_ERRORS[n] for n in complete])
    table = np.array([known[n] for n in complete]) / 100
    ces = 100 * statistics.corruption_errors(table, reference)
    result["ce"] = dict(zip(complete, ces.tolist(), strict=True))
    if len(complete) < len(imagenet.CORRUPTIONS):
        return result
    result["mce"] = float(ces.mean())
    if len(files) == 1:
        # mCE is a mean over images, each with its weighted errors in all cells.
        weighted = [
            100
            * np.mean([wrong[n][s] for s in imagenet.SEVERITIES], axis=0)
            / imagenet.ALEXNET_ERRORS[n]
            for n in complete
        ]
        result["mce_interval"] = statistics.bootstrap(np.mean, np.mean(weighted, axis=0))
    if clean is not None:
        relative = 100 * statistics.relative_corruption_errors(
            table, clean, reference, imagenet.ALEXNET_CLEAN_ERROR
        )
        result["relative_ce"] = dict(zip(complete, relative.tolist(), strict=True))
        result["relative_mce"] = float(relative.mean())
    return result


def _mean(errors: dict[str, list[float | None]]) -> float | None:
    values = [value for row in errors.values() for value in row if value is not None]
    return float(np.mean(values)) if values else None


# --- Text -----------------------------------------------------------------------------------------


def markdown(results: Sequence[dict]) -> str:
    """The table of several evaluations, such as a model and its EMA or several sizes, and what follows from C and X."""
    several = len(results) > 1
    rows = [row for result in results for row in result["rows"]]
    masked = has_masked(rows)
    lines = []
    if rows:  # not of corruptions alone
        body = [
            [*[result["model"]] * several, *cells_of(row, masked)]
            for result in results
            for row in result["rows"]
        ]
        foot = FOOT + MASKED_FOOT if masked else FOOT
        lines = [*format_table([*["model"] * several, *columns(masked)], body), "", foot]
    for result in results:
        if result["corruptions"]:
            lines += ["", *_corruption_lines(result)]
    if any(result["corruptions"] for result in results):
        lines += ["", CORRUPTION_FOOT]
    for result in results:
        if result["factors"]:
            lines += [
                "",
                f"ImageNet-X, {result['model']}: error on the images of a factor / error on all",
                "",
            ]
            ordered = sorted(result["factors"].items(), key=lambda item: -item[1]["ratio"])
            body = [[n, str(v["images"]), f"{v['ratio']:.2f}"] for n, v in ordered]
            lines += format_table(["factor", "images", "error ratio"], body)
    return "\n".join(lines).lstrip("\n") + "\n"


def has_masked(rows: Sequence[dict]) -> bool:
    """Whether there is A or R among the rows of `suite_results`, whose masked accuracy is compared with others."""
    return any("all_classes" in row or "clean" in row for row in rows)


def columns(masked: bool) -> list[str]:
    """The names of `cells_of`."""
    names = ["set", "images", "top-1 [95 %]", "top-5", "ECE (%)", "NLL"]
    return [*names, *(["all 1000", "clean"] if masked else []), "crop mode", "note"]


def cells_of(row: dict, masked: bool) -> list[str]:
    """A row of `suite_results`; `masked`: with what compares A and R with all classes and with val."""

    def number(name: str, style: str = ".2f") -> str:
        return format(row[name], style) if row.get(name) is not None else "—"

    low, high = row["interval"]
    clean = number("clean") + (f" ({row['gap']:+.2f})" if "gap" in row else "")
    note = [row["note"]] if row["note"] else []
    if row.get("unreadable"):
        note.append(f"{row['unreadable']} unreadable, counted as wrong")
    return [
        row["set"],
        f"{row['images']:,}",
        f"{row['top1']:.3f} [{low:.2f}, {high:.2f}]",
        number("top5"),
        number("ece"),
        number("nll", ".4f"),
        *([number("all_classes"), clean] if masked else []),
        row["crop"],
        "; ".join(note),
    ]


def _corruption_lines(result: dict) -> list[str]:
    found = result["corruptions"]
    title = f"Corruptions, {result['model']}: {found['crop']}" + (
        f", {found['note']}" if found["note"] else ""
    )
    header = ["corruption", *map(str, imagenet.SEVERITIES), "mean", "CE", "relative CE"]
    body = []
    for name, errors in (found["errors"] | found["further"]).items():
        ratios = [found.get(key, {}).get(name) for key in ("ce", "relative_ce")]
        values = [*errors, _mean({name: errors}), *ratios]
        body.append([name, *("—" if value is None else f"{value:.2f}" for value in values)])
    lines = [title, "", *format_table(header, body), ""]
    if found["mean_error"] is not None:
        lines.append(f"Mean error {found['mean_error']:.2f} %.")
    if "mce" in found:
        ends = found.get("mce_interval")
        lines.append(
            f"mCE {found['mce']:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]." if ends else ".")
        )
    if "relative_mce" in found:
        lines.append(f"Relative mCE {found['relative_mce']:.2f}.")
    if found["further_mean_error"] is not None:
        lines.append(f"Mean error of the further corruptions {found['further_mean_error']:.2f} %.")
    return lines


def format_table(header: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table with aligned columns."""
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in (header, *body))
    table = [header, *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, rule, *body)
    ]
