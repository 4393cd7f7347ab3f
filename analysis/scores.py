"""Scores of evaluations: calibration, selective prediction, worst classes, temperature, comparison of models.

All of it comes from the prediction store. `score_evaluation` gives what scores.json holds: the table of
analysis/suite_table.py and what follows here; `compare_evaluations` is about several evaluations. analysis/tables.py
makes Markdown of both. Accuracies, errors, calibration errors and their intervals [low, high] of 95 % are in per cent,
what does not exist is None.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import statistics as st
from analysis import suite_table, tables
from analysis.predictions import (
    Evaluation,
    Predictions,
    read_evaluation,
    read_logits,
    read_predictions,
)
from utils.errors import DataError, StorageError
from utils.files import write_atomically
from utils.text import join_some

LISTED = 20  # worst classes, confusions, and images on which two models differ
COVERAGES = (50, 80, 90)  # in per cent, at which the risk is given

Scores = dict[str, Any]


def write_scores(folder: str | Path, factors_file: Path | None = None) -> Scores:
    """Score the evaluation in `folder` and write scores.json and scores.md there.

    Raises DataError for a store that cannot be read, StorageError if the files cannot be written.
    """
    scores = score_evaluation(folder, factors_file)
    _write(Path(folder), "scores", scores, tables.format_scores(scores, details=True))
    return scores


def read_scores(folder: str | Path) -> Scores:
    """The scores.json in `folder`, or if it has none of these predictions, their scores. Raises DataError."""
    path = Path(folder) / "scores.json"
    if not path.exists():
        return score_evaluation(folder)
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        scored = scores.get("predictions")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); make it again with tools/score.py {folder}"
        ) from error
    return scores if scored == _digests(read_evaluation(folder)) else score_evaluation(folder)


def _digests(evaluation: Evaluation) -> dict[str, str]:
    return {name: record.sha256 for name, record in evaluation.sets.items()}


def write_comparison(folder: str | Path, comparison: Scores) -> None:
    """Write comparison.json and comparison.md to `folder`, which is made. Raises StorageError if that is impossible."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}.") from error
    _write(folder, "comparison", comparison, tables.format_comparison(comparison))


def _write(folder: Path, name: str, scores: Scores, text: str) -> None:
    content = json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / f"{name}.json", content + "\n")
    write_atomically(folder / f"{name}.md", text)


# --- One evaluation ---------------------------------------------------------------------------------------------------


def score_evaluation(folder: str | Path, factors_file: Path | None = None) -> Scores:
    """All scores of the evaluation in `folder`: "suite", "sets" by name, "temperature" (None without val's logits).

    "predictions": the SHA-256 of each set's CSV.
    factors_file: ImageNet-X's annotations of val, if any.
    """
    evaluation = read_evaluation(folder)
    sets = {
        name: read_predictions(evaluation.folder / f"{name}.csv")
        for name in evaluation.sets
        if not suite_table.cell_of(name)
    }
    return {
        "predictions": _digests(evaluation),
        "suite": suite_table.suite_results(evaluation, factors_file),
        "sets": {name: score_set(evaluation, name, rows) for name, rows in sets.items()},
        "temperature": score_temperature(evaluation, sets),
    }


def score_set(evaluation: Evaluation, name: str, rows: Predictions) -> Scores:
    """Calibration, losses, selective prediction, worst classes and confusions of one set.

    Calibration, losses and risk are of the readable images; accuracies count an unreadable image as wrong.
    """
    readable = rows.readable
    right, confidence = rows.right[readable], rows.top_p[readable, 0]
    bins = st.bin_numbers(confidence)
    adaptive = st.bin_numbers(confidence, adaptive=True)
    return {
        "images": len(rows),
        "unreadable": int((~readable).sum()),
        "confidence": _mean(100 * confidence),
        "brier": _mean(rows.brier[readable]),
        "entropy": _mean(rows.entropy[readable]),
        "ece": _with_interval(st.calibration_error, right, confidence, bins, method="basic"),
        "adaptive_ece": _percent(st.calibration_error(right, confidence, adaptive)),
        "reliability": [
            {"images": images, "confidence": 100 * mean, "accuracy": 100 * accuracy}
            for images, mean, accuracy in st.reliability(right, confidence, bins)
        ],
        "aurc": _with_interval(st.area_under_risk_coverage, right, confidence),
        "risk": _risks(right, confidence),
        "class_accuracy": _with_interval(st.mean_class_accuracy, rows.label, rows.right),
        "worst_classes": _worst_classes(evaluation, name, rows),
        "confusions": _confusions(evaluation, name, rows),
    }


def _risks(right: np.ndarray, confidence: np.ndarray) -> dict[str, float | None]:
    """The error among the most confident images, by the share of images in per cent."""
    risk = st.risk_coverage(right, confidence)
    last = {coverage: math.ceil(coverage * len(risk) / 100) - 1 for coverage in COVERAGES}
    return {
        str(coverage): _percent(risk[place]) if len(risk) else None
        for coverage, place in last.items()
    }


def _worst_classes(evaluation: Evaluation, name: str, rows: Predictions) -> list[Scores]:
    folders, words = evaluation.classes_of(name), evaluation.names_of(name)
    hits, count = st.class_accuracies(rows.label, rows.right, len(folders))
    worst = sorted(np.flatnonzero(count).tolist(), key=lambda c: hits[c] / count[c])[:LISTED]
    return [
        {
            "class": folders[c],
            "name": words[c],
            "right": int(hits[c]),
            "images": int(count[c]),
            "interval": _percents(st.wilson(int(hits[c]), int(count[c]))),
        }
        for c in worst
    ]


def _confusions(evaluation: Evaluation, name: str, rows: Predictions) -> list[Scores]:
    folders, words = evaluation.classes_of(name), evaluation.names_of(name)
    count = np.bincount(rows.label, minlength=len(folders))
    label, guess = rows.label[rows.readable], rows.top[rows.readable, 0]
    return [
        {
            "label": folders[a],
            "label_name": words[a],
            "guess": folders[b],
            "guess_name": words[b],
            "images": images,
            "of": int(count[a]),
        }
        for a, b, images in st.confusion_pairs(label, guess, len(folders), LISTED)
    ]


# --- Temperature ------------------------------------------------------------------------------------------------------


def score_temperature(evaluation: Evaluation, sets: dict[str, Predictions]) -> Scores | None:
    """Temperature scaling: fitted on half of val, reported on its other half and on all other sets with logits.

    The half of an image depends on nothing but its base name. None without logits of val. Sets of own classes are
    left out, as their logits are pooled.
    """
    names = [
        name
        for name in sets
        if (evaluation.folder / f"{name}.logits.npy").exists()
        and evaluation.sets[name].classes is None
    ]
    if "val" not in names:
        return None
    fitted = np.array([_is_fitted_on(file) for file in sets["val"].file], dtype=bool)
    logits, label = _competing_logits(evaluation, "val", sets["val"], fitted)
    if not len(label):
        return None
    temperature = st.fit_temperature(logits, label)
    scores: Scores = {"value": temperature, "fitted_on": len(label), "sets": {}}
    for name in names:
        chosen = ~fitted if name == "val" else np.ones(len(sets[name]), dtype=bool)
        logits, label = _competing_logits(evaluation, name, sets[name], chosen)
        if len(label):
            scores["sets"][name] = {
                "images": len(label),
                "before": _calibration_at(1.0, logits, label),
                "after": _calibration_at(temperature, logits, label),
            }
    return scores


def _is_fitted_on(file: str) -> bool:
    name = file.rpartition("/")[2].encode()
    return hashlib.blake2b(name, digest_size=1).digest()[0] % 2 == 0


def _competing_logits(
    evaluation: Evaluation, name: str, rows: Predictions, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the readable among the `chosen` images: logits of the classes that compete, and labels as their columns."""
    path = evaluation.folder / f"{name}.logits.npy"
    chosen = chosen & rows.readable
    logits, label = read_logits(path, rows, len(evaluation.classes))[chosen], rows.label[chosen]
    if (kept := evaluation.sets[name].kept) is None:
        return logits, label
    column = {index: place for place, index in enumerate(kept)}
    return logits[:, kept], np.array([column[index] for index in label.tolist()], dtype=np.int64)


def _calibration_at(temperature: float, logits: np.ndarray, label: np.ndarray) -> Scores:
    p = st.probabilities(logits, temperature)
    right, confidence = p.argmax(axis=1) == label, p.max(axis=1)
    return {
        "nll": st.negative_log_likelihood(logits, label, temperature),
        "ece": _percent(st.calibration_error(right, confidence, st.bin_numbers(confidence))),
    }


# --- Several evaluations ----------------------------------------------------------------------------------------------


def compare_evaluations(folders: Sequence[str | Path]) -> Scores:
    """Every two of the evaluations on every set that all have: McNemar, difference, Benjamini and Hochberg's q.

    ImageNet-C's cells are one row: the mean over them, image by image. Raises DataError, naming the two and what
    differs, for other classes, other images, another crop mode or mask, and where no set is shared.
    """
    evaluations = [read_evaluation(folder) for folder in folders]
    pairs = list(itertools.combinations(range(len(evaluations)), 2))
    shared = [
        name for name in evaluations[0].sets if all(name in one.sets for one in evaluations[1:])
    ]
    if not shared:
        sets = "; ".join(f"{one.folder}: {', '.join(one.sets)}" for one in evaluations)
        raise DataError(f"The evaluations share no set ({sets}). Evaluate them on the same sets.")
    for a, b in pairs:
        check_comparable(evaluations[a], evaluations[b], shared)
    read = [
        {name: read_predictions(one.folder / f"{name}.csv") for name in shared}
        for one in evaluations
    ]
    rows = [
        {"models": [a, b], **row}
        for a, b in pairs
        for row in _compare_two(evaluations[a], shared, read[a], read[b])
    ]
    tested = [row for row in rows if row["p"] is not None]
    if len(tested) > 1:
        for row, q in zip(tested, st.adjust([row["p"] for row in tested]), strict=True):
            row["q"] = q
    notes = [
        note for a, b in pairs for note in _differences(evaluations[a], evaluations[b], shared)
    ]
    cells = _cells(shared)
    if not _have_equal_images(cells, read[0]):
        notes.append(f"c: its {len(cells)} cells list different images, so they have no mean here")
    return {
        "models": [{"evaluation": str(one.folder), "title": one.title} for one in evaluations],
        "rows": rows,
        "notes": list(dict.fromkeys(notes)),
    }


def check_comparable(a: Evaluation, b: Evaluation, sets: Iterable[str]) -> None:
    """Raise DataError, naming both, unless A and B have equal classes, images, masks and crop modes on `sets`."""
    for name in sets:
        between = f"{a.folder} and {b.folder} cannot be compared on {name}"
        classes, others = a.classes_of(name), b.classes_of(name)
        if classes != others:
            different = sorted(set(classes) ^ set(others))
            what = join_some(different, 5) if different else "the same in another order"
            raise DataError(
                f"{between}: their {len(classes)} and {len(others)} classes differ ({what}). "
                "Compare models of the same classes."
            )
        one, other = a.sets[name], b.sets[name]
        if one.fingerprint != other.fingerprint:
            raise DataError(
                f"{between}: their images or labels differ (fingerprints {one.fingerprint[:12]}… and "
                f"{other.fingerprint[:12]}…, from {one.source or 'an unnamed folder'} and "
                f"{other.source or 'an unnamed folder'}). Evaluate both on the same data."
            )
        if one.kept != other.kept:
            raise DataError(
                f"{between}: their logits are masked to different classes. Evaluate again."
            )
        modes = [record.pixels.get("crop_mode") for record in (one, other)]
        if modes[0] != modes[1]:
            raise DataError(
                f"{between}: TEST.CROP_MODE was {modes[0]} and {modes[1]}. Evaluate both with the same."
            )


def _compare_two(
    evaluation: Evaluation, shared: list[str], a: dict[str, Predictions], b: dict[str, Predictions]
) -> list[Scores]:
    """The rows of two models' comparison; `evaluation` is the first one's."""
    for name in shared:
        if a[name].file != b[name].file or (a[name].label != b[name].label).any():
            raise DataError(
                f"{evaluation.folder / name}.csv lists other images than the other evaluation. Evaluate again."
            )
    rows = []
    for name in shared:
        if suite_table.cell_of(name):
            continue
        own = evaluation.sets[name].classes is not None
        outcomes = [one.full1 == one.label if own else one.right for one in (a[name], b[name])]
        rows.append(_paired_row(name, *outcomes))
        words = evaluation.names_of(name)
        rows[-1]["differ"] = _most_different(words, own, a[name], b[name], *outcomes)
        if name == "val" and (hits := suite_table.reassess(evaluation, a[name])) is not None:
            others = suite_table.reassess(evaluation, b[name])
            rows.append(_paired_row("real", hits[:, 0], others[:, 0]))
    cells = _cells(shared)
    if cells and _have_equal_images(cells, a):
        rows.append(_mean_row(cells, a, b))
    return rows


def _cells(sets: list[str]) -> list[str]:
    return [name for name in sets if suite_table.cell_of(name)]


def _have_equal_images(cells: list[str], predictions: dict[str, Predictions]) -> bool:
    """Whether all `cells` list the same images: only then has each image a mean over them."""
    return all(predictions[name].file == predictions[cells[0]].file for name in cells)


def _paired_row(name: str, a: np.ndarray, b: np.ndarray) -> Scores:
    pair = st.compare_pairs(a, b)
    return {
        "set": name,
        "images": pair.images,
        "top1": [_mean(100 * a), _mean(100 * b)],
        "only": [pair.only_a, pair.only_b],
        "difference": 100 * pair.difference,
        "interval": _percents(pair.interval),
        "p": pair.p,
        "q": None,
    }


def _mean_row(cells: list[str], a: dict[str, Predictions], b: dict[str, Predictions]) -> Scores:
    shares = [np.mean([100.0 * one[name].right for name in cells], axis=0) for one in (a, b)]
    difference = st.compare_means(*shares)
    return {
        "set": f"c, mean of {len(cells)} cells",
        "images": len(shares[0]),
        "top1": [_mean(share) for share in shares],
        "only": None,
        "difference": difference.value,
        "interval": difference.interval,
        "p": difference.p,
        "q": None,
    }


def _most_different(
    words: list[str],
    own_classes: bool,
    a: Predictions,
    b: Predictions,
    right_a: np.ndarray,
    right_b: np.ndarray,
) -> list[Scores]:
    """The images that only one has right, those first on whose label the probabilities differ most.

    words: of the set's classes. own_classes: they are its own, so the guesses are among all classes and have no "p".
    """
    words = [*words, "a class outside the set"]  # that of -1
    both = [(one, one.full1 if own_classes else one.top[:, 0]) for one in (a, b)]
    disagree = np.flatnonzero(right_a != right_b)
    gap = np.abs(np.nan_to_num(a.p) - np.nan_to_num(b.p))
    chosen = disagree[np.argsort(-gap[disagree], kind="stable")][:LISTED]
    rows = [
        {
            "file": a.file[i],
            "label": words[a.label[i]],
            "guess": [words[guess[i]] if one.readable[i] else None for one, guess in both],
        }
        for i in chosen.tolist()
    ]
    for row, i in zip(rows, chosen.tolist(), strict=True) if not own_classes else ():
        row["p"] = [float(one.p[i]) if one.readable[i] else None for one in (a, b)]
    return rows


def _differences(a: Evaluation, b: Evaluation, sets: list[str]) -> list[str]:
    """What changes pixels or logits and is not the same in A and B, in words."""
    settings = [("", a.pixels | a.logits, b.pixels | b.logits)]
    settings += [(f"{name}: ", a.sets[name].pixels, b.sets[name].pixels) for name in sets]
    return [
        f"{where}{key} is {one.get(key)} in {a.folder} and {other.get(key)} in {b.folder}"
        for where, one, other in settings
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else 100 * float(share)


def _percents(interval: st.Interval | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _with_interval(
    statistic: Callable[..., float], *columns: np.ndarray, method: str = "percentile"
) -> Scores:
    """A share and its interval, in per cent; the basic bootstrap's may begin below 0."""
    interval = _percents(st.bootstrap(statistic, *columns, method=method))
    return {
        "value": _percent(statistic(*columns)),
        "interval": interval and [max(0.0, end) for end in interval],
    }
