"""Statistics of predictions: intervals, McNemar, calibration, risk-coverage, seeds, Benjamini-Hochberg.

Arrays have one entry per image. Accuracies, errors and probabilities are fractions. Intervals are of 95 %. What scipy
computes is scipy's; an interval that does not exist (one image, no spread) is None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.95  # of every interval
BINS = 15  # of reliability diagrams and calibration errors, as in Guo et al. 2017
RESAMPLES = 1000  # of every bootstrap
TEMPERATURES = (0.05, 20.0)  # between which one is looked for


class Interval(NamedTuple):
    """The lower and upper end of a 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    only_a, only_b: images that only one of them has right; McNemar's b and c.
    difference: accuracy of A minus that of B, with its interval.
    p: of the exact McNemar test.
    """

    images: int
    only_a: int
    only_b: int
    difference: float
    interval: Interval | None
    p: float


@dataclass(frozen=True)
class Mean:
    """The mean of several runs, or the difference of two such means, with its interval.

    p, degrees: of Welch's test; None for the mean of one group.
    """

    value: float
    interval: Interval | None
    p: float | None = None
    degrees: float | None = None


# --- Accuracy ---------------------------------------------------------------------------------------------------------


def wilson(right: int, images: int) -> Interval:
    """Wilson's interval of an accuracy; of no images: everything, 0 to 1."""
    if images == 0:
        return Interval(0.0, 1.0)
    return Interval(*stats.binomtest(right, images).proportion_ci(LEVEL, method="wilson"))


def compare_pairs(right_a: np.ndarray, right_b: np.ndarray) -> Paired:
    """The exact McNemar test and the paired difference of two models; bool [N] each, row by row the same image.

    The difference's interval is that of the paired t-test on 0/1 rows. It is None if the rows' differences are all
    equal, as then their spread is unknown.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    disagreements = only_a + only_b
    p = stats.binomtest(only_a, disagreements).pvalue if disagreements else 1.0
    difference = compare_means(right_a, right_b)
    return Paired(len(right_a), only_a, only_b, difference.value, difference.interval, float(p))


def compare_means(a: np.ndarray, b: np.ndarray) -> Mean:
    """The paired t-test of two models' values per image, [N] each: mean difference A - B, interval and p."""
    change = a.astype(float) - b
    value = float(change.mean()) if len(change) else 0.0
    if len(change) < 2 or np.ptp(change) == 0:
        return Mean(value, None)
    return _mean_of_test(value, stats.ttest_1samp(change, 0.0))


def adjust(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q-values: below 0.05, at most 5 % of what is called different is not."""
    return stats.false_discovery_control(p_values).tolist() if len(p_values) else []


def class_accuracies(
    label: np.ndarray, right: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many images each class has right and in all; int64 [classes] each."""
    return (
        np.bincount(label[right], minlength=classes),
        np.bincount(label, minlength=classes),
    )


def mean_class_accuracy(label: np.ndarray, right: np.ndarray) -> float:
    """The mean over the classes that have images, NaN if none has ("balanced accuracy")."""
    count = np.bincount(label)
    with np.errstate(invalid="ignore"):
        accuracies = (np.bincount(label, weights=right) / count)[count > 0]
    return float(accuracies.mean()) if len(accuracies) else float("nan")


def confusion_pairs(
    label: np.ndarray, guess: np.ndarray, classes: int, most: int
) -> list[tuple[int, int, int]]:
    """The `most` frequent mistakes as (label, guess, images), the most frequent first, then by label and guess."""
    wrong = label != guess
    pairs, images = np.unique(label[wrong] * classes + guess[wrong], return_counts=True)
    order = np.argsort(-images, kind="stable")[:most]
    return [(*divmod(int(pairs[i]), classes), int(images[i])) for i in order]


# --- Calibration ------------------------------------------------------------------------------------------------------


def bin_numbers(confidence: np.ndarray, *, adaptive: bool = False) -> np.ndarray:
    """Which of `BINS` bins each confidence is in: of equal width, or `adaptive`, of about equally many images.

    A bin holds its lower end and not its upper one, the last holds both. Equal confidences share a bin.
    """
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    if adaptive and len(confidence):
        inner = np.quantile(confidence, inner)
    return np.searchsorted(inner, confidence, side="right")


def calibration_error(right: np.ndarray, confidence: np.ndarray, bins: np.ndarray) -> float:
    """ECE: the mean over the bins of |accuracy - mean confidence|, weighted by their images (Guo et al. 2017, eq. 3).

    NaN for no images.
    """
    if not len(right):
        return float("nan")
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def reliability(
    right: np.ndarray, confidence: np.ndarray, bins: np.ndarray
) -> list[tuple[int, float, float]]:
    """Images, mean confidence and accuracy of every bin that has images."""
    count = np.bincount(bins)
    filled = count > 0
    sums = (np.bincount(bins, weights=values)[filled] for values in (confidence, right))
    mean_confidence, accuracy = (values / count[filled] for values in sums)
    return list(
        zip(count[filled].tolist(), mean_confidence.tolist(), accuracy.tolist(), strict=True)
    )


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) [N, classes]."""
    return special.softmax(logits / temperature, axis=1)


def negative_log_likelihood(
    logits: np.ndarray, label: np.ndarray, temperature: float = 1.0
) -> float:
    """The mean of -log softmax(logits / temperature)[label]; logits [N, classes], N > 0."""
    rows = special.log_softmax(logits / temperature, axis=1)
    return float(-rows[np.arange(len(label)), label].mean(dtype=np.float64))


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """The temperature that minimises the NLL of `logits` [N, classes], N > 0 (Guo et al. 2017, section 4.2).

    It is looked for between 0.05 and 20: where every image is right, the NLL falls with it without end.
    """
    found = optimize.minimize_scalar(
        lambda log: negative_log_likelihood(logits, label, np.exp(log)),
        bounds=np.log(TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))


# --- Selective prediction ---------------------------------------------------------------------------------------------


def risk_coverage(right: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The error among the k most confident images, for k = 1 … N; float64 [N] (Geifman and El-Yaniv 2017).

    Images of equal confidence count as if they came in random order, so that the order of the rows does not matter.
    """
    values, place = np.unique(-confidence, return_inverse=True)
    ends = np.cumsum(np.bincount(place, minlength=len(values)))
    wrong = np.cumsum(np.bincount(place, weights=~right, minlength=len(values)))
    count = np.arange(1, len(right) + 1)
    return np.interp(count, np.append(0, ends), np.append(0.0, wrong)) / count


def area_under_risk_coverage(right: np.ndarray, confidence: np.ndarray) -> float:
    """AURC, the mean of `risk_coverage`; NaN for no images."""
    return float(risk_coverage(right, confidence).mean()) if len(right) else float("nan")


# --- Robustness -------------------------------------------------------------------------------------------------------


def corruption_errors(errors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """CE [corruptions]: the mean over the severities of `errors` [corruptions, severities], as a share of `reference`.

    reference: [corruptions], AlexNet's mean error over the severities (Hendrycks and Dietterich 2019, section 3).
    """
    return errors.mean(axis=1) / reference


def relative_corruption_errors(
    errors: np.ndarray, clean: float, reference: np.ndarray, reference_clean: float
) -> np.ndarray:
    """Relative CE: as `corruption_errors`, of what every severity adds to the clean error."""
    return corruption_errors(errors - clean, reference - reference_clean)


# --- Resampling and seeds ---------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[..., float], *columns: np.ndarray, method: str = "percentile"
) -> Interval | None:
    """The bootstrap over images of `statistic(*columns)`; None for fewer than two images.

    method: "percentile", or "basic" for a statistic that chance alone makes larger, in resamples even more.
    Not scipy's default BCa, whose jackknife takes N² steps. The seed is fixed: the same rows give the same interval.
    """
    images = len(columns[0])
    if images < 2:
        return None

    def of_resamples(rows: np.ndarray, axis: int) -> np.ndarray:
        values = [
            statistic(*(column[chosen] for column in columns))
            for chosen in rows.reshape(-1, images)
        ]
        return np.reshape(values, rows.shape[:-1])

    result = stats.bootstrap(
        (np.arange(images),),
        of_resamples,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**20 // images),  # 8 MiB of row numbers at a time
        confidence_level=LEVEL,
        method=method,
        rng=0,
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def mean_of_runs(values: Sequence[float]) -> Mean:
    """The mean over runs of different seeds and its t-interval, None for one run. Raises ValueError for none."""
    if not len(values):
        raise ValueError("no runs to average")
    if len(values) < 2 or np.ptp(values) == 0:
        return Mean(float(np.mean(values)), None)
    low, high = stats.t.interval(
        LEVEL, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    return Mean(float(np.mean(values)), Interval(float(low), float(high)))


def compare_runs(a: Sequence[float], b: Sequence[float]) -> Mean:
    """Welch's test of two groups of runs: the difference of their means, A - B, interval, p and degrees of freedom.

    Without interval and p where a group has one run, or neither has any spread.
    """
    value = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return Mean(value, None)
    return _mean_of_test(value, stats.ttest_ind(a, b, equal_var=False))


def _mean_of_test(value: float, test) -> Mean:
    """`value` with interval, p and degrees of freedom of scipy's t-test."""
    interval = test.confidence_interval(LEVEL)
    return Mean(
        value,
        Interval(float(interval.low), float(interval.high)),
        float(test.pvalue),
        float(test.df),
    )
