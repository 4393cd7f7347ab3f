"""analysis/statistics.py against statsmodels, torchmetrics, scikit-learn, closed forms and published numbers."""

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW
from torchmetrics.functional.classification import binary_calibration_error

from analysis import statistics as st
from analysis import tables


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def outcomes(only_a, only_b, both, neither):
    """Two models' right images, of which so many are only A's, only B's, both's and neither's."""
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return np.array(a, bool), np.array(b, bool)


# --- Accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [
        (41_017, 50_000, 81.695, 82.368),
        (3_942, 5_000, 77.686, 79.950),
        (21, 7_500, 0.183, 0.428),
        (0, 50, 0, 7.13),
    ],
)
def test_wilson_gives_the_published_intervals(right, images, low, high):
    interval = st.wilson(right, images)
    assert 100 * np.array(interval) == pytest.approx([low, high], abs=0.005)
    assert interval == pytest.approx(proportion_confint(right, images, method="wilson"))


def test_wilson_stays_within_0_and_1():
    assert st.wilson(0, 0) == (0, 1)
    assert st.wilson(1, 1) == pytest.approx((1 / (1 + 1.959964**2), 1), abs=1e-6)
    assert st.wilson(50, 50).high == 1
    assert st.wilson(0, 50).low == 0


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(270, 320, 0.0436), (10, 20, 0.0987)])
def test_mcnemar_gives_the_published_p(only_a, only_b, p):
    result = st.compare_pairs(*outcomes(only_a, only_b, 500, 100))
    table = [[500, only_a], [only_b, 100]]
    assert result.p == pytest.approx(p, abs=5e-5)
    assert result.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (result.only_a, result.only_b, result.images) == (only_a, only_b, sum(map(sum, table)))


def test_the_paired_difference_has_the_t_interval():
    a, b = outcomes(27, 32, 50, 10)
    result = st.compare_pairs(a, b)
    change = DescrStatsW(a.astype(float) - b)
    assert result.difference == pytest.approx((27 - 32) / 119)
    assert result.interval == pytest.approx(change.tconfint_mean())


@pytest.mark.parametrize(
    "rows", [(0, 0, 5, 5), (0, 0, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0), (3, 0, 0, 0)]
)
def test_models_that_do_not_vary_have_no_interval(rows):
    result = st.compare_pairs(*outcomes(*rows))
    assert result.interval is None
    assert result.difference == (1.0 if rows[0] else 0.0)
    assert result.p == pytest.approx(min(1, 2 * 0.5 ** rows[0]))


def test_q_values_are_those_of_benjamini_and_hochberg():
    assert st.adjust([0.01, 0.02, 0.03, 0.5]) == pytest.approx([0.04, 0.04, 0.04, 0.5])
    ps = [0.2, 0.001, 0.04, 0.03, 1.0]
    assert st.adjust(ps) == pytest.approx(multipletests(ps, method="fdr_bh")[1])
    assert st.adjust([]) == []


def test_accuracy_by_class(rng):
    label, right = rng.integers(0, 5, 200), rng.random(200) < 0.7
    label[label == 3] = 2
    hits, count = st.class_accuracies(label, right, 6)
    assert count.tolist() == [int((label == c).sum()) for c in range(6)]
    assert hits.tolist() == [int((right & (label == c)).sum()) for c in range(6)]
    guess = np.where(right, label, 5)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(label, guess)
    assert st.mean_class_accuracy(label, right) == pytest.approx(expected)


def test_confusion_pairs_come_in_a_fixed_order():
    label = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    guess = np.array([1, 1, 0, 0, 2, 0, 0, 2])
    assert st.confusion_pairs(label, guess, 3, 3) == [(0, 1, 2), (2, 0, 2), (1, 0, 1)]
    assert st.confusion_pairs(label, label, 3, 3) == [], "a mistake that never happened"
    assert st.confusion_pairs(label[:0], guess[:0], 3, 3) == []
    last = np.array([999_999, 0])
    assert st.confusion_pairs(last, last[::-1], 10**6, 1) == [(0, 999_999, 1)], "of many classes"


# --- Calibration ------------------------------------------------------------------------------------------------------


def calibration(right, confidence, **kwargs):
    return st.calibration_error(right, confidence, st.bin_numbers(confidence, **kwargs))


def test_ece_equals_torchmetrics_and_its_definition(rng):
    confidence = rng.random(2000)
    confidence[:20] = 1.0
    confidence[20:60] = np.tile([0.2, 0.4, 0.6, 0.8], 10)  # ends of bins
    confidence[60:80] = 0.0
    confidence = confidence.round(3)
    right = rng.random(2000) < confidence**2
    oracle = binary_calibration_error(
        torch.tensor(confidence), torch.tensor(right).int(), n_bins=st.BINS, norm="l1"
    )
    assert calibration(right, confidence) == pytest.approx(oracle.item(), abs=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_bins_are_those_of_scikit_learn(rng, adaptive):
    confidence = rng.random(3000) ** 2
    right = rng.random(3000) < confidence
    accuracy, mean = calibration_curve(
        right, confidence, n_bins=st.BINS, strategy="quantile" if adaptive else "uniform"
    )
    rows = st.reliability(right, confidence, st.bin_numbers(confidence, adaptive=adaptive))
    assert np.array(rows)[:, 1:] == pytest.approx(np.stack([mean, accuracy], axis=1))
    assert sum(count for count, _, _ in rows) == 3000
    if adaptive:
        assert {count for count, _, _ in rows} == {200}


def test_ece_of_extremes():
    n = 10
    sure = np.full(n, 1.0)
    assert calibration(np.ones(n, bool), sure) == 0, "all right and sure of it"
    assert calibration(np.zeros(n, bool), sure) == 1, "all wrong and sure of the opposite"
    assert calibration(np.zeros(n, bool), sure, adaptive=True) == 1
    assert calibration(np.array([True]), np.array([0.3])) == pytest.approx(0.7)
    assert np.isnan(calibration(np.zeros(0, bool), np.zeros(0)))
    assert np.isnan(calibration(np.zeros(0, bool), np.zeros(0), adaptive=True))


def test_the_temperature_that_made_the_logits_is_found(rng):
    logits = rng.normal(size=(20_000, 5)) * 2
    thresholds = special.softmax(logits, axis=1).cumsum(axis=1)
    label = (rng.random((len(logits), 1)) > thresholds).sum(axis=1).clip(max=4)
    assert st.fit_temperature(logits * 3, label) == pytest.approx(3, rel=0.05)
    oracle = torch.nn.functional.cross_entropy(torch.tensor(logits) / 1.7, torch.tensor(label))
    assert st.negative_log_likelihood(logits, label, 1.7) == pytest.approx(oracle.item())


def test_the_temperature_has_limits():
    logits = np.eye(4) / 10
    assert st.fit_temperature(logits, np.arange(4)) == pytest.approx(0.05, rel=0.2)
    assert st.fit_temperature(-logits, np.arange(4)) == pytest.approx(20, rel=0.2)
    assert 0.05 <= st.fit_temperature(logits[:1], np.array([0])) <= 20


# --- Selective prediction ---------------------------------------------------------------------------------------------


def test_risk_coverage_by_hand():
    right = np.array([False, True, True, False])
    confidence = np.array([0.1, 0.9, 0.4, 0.6])
    assert st.risk_coverage(right, confidence) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert st.area_under_risk_coverage(right, confidence) == pytest.approx(1 / 3)


def test_risk_coverage_does_not_depend_on_the_order_of_ties(rng):
    right, confidence = rng.random(500) < 0.7, rng.integers(0, 7, 500) / 7
    order = rng.permutation(500)
    curve = st.risk_coverage(right, confidence)
    assert st.risk_coverage(right[order], confidence[order]) == pytest.approx(curve)
    random_orders = [
        np.cumsum(~right[o]) / np.arange(1, 501)
        for o in (np.lexsort((rng.random(500), -confidence)) for _ in range(2000))
    ]
    assert np.mean(random_orders, axis=0) == pytest.approx(curve, abs=0.03)


def test_risk_coverage_of_extremes():
    confidence = np.array([0.5, 0.7, 0.7])
    assert st.area_under_risk_coverage(np.ones(3, bool), confidence) == 0
    assert st.area_under_risk_coverage(np.zeros(3, bool), confidence) == 1
    assert st.area_under_risk_coverage(np.array([True]), confidence[:1]) == 0
    assert np.isnan(st.area_under_risk_coverage(np.ones(0, bool), confidence[:0]))


# --- Robustness -------------------------------------------------------------------------------------------------------


def test_corruption_errors_by_hand():
    errors = np.array([[0.2, 0.4], [0.5, 0.7]])
    alexnet = np.array([0.6, 0.8])
    assert st.corruption_errors(errors, alexnet) == pytest.approx([0.5, 0.75])
    # Per severity: (0.1 + 0.3) / (2 · 0.2) and (0.4 + 0.6) / (2 · 0.4).
    relative = st.relative_corruption_errors(errors, 0.1, alexnet, 0.4)
    assert relative == pytest.approx([1.0, 1.25])


# --- Resampling and seeds ---------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_near_wilson_and_repeats_itself():
    right = np.arange(400) < 300
    interval = st.bootstrap(lambda rows: rows.mean(), right)
    assert interval == pytest.approx(st.wilson(300, 400), abs=0.01)
    assert interval == st.bootstrap(lambda rows: rows.mean(), right)
    assert st.bootstrap(lambda rows: rows.mean(), right[:1]) is None


def test_the_interval_of_a_calibration_error_reaches_that_of_a_calibrated_model():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 1, 2000)
    right = generator.random(2000) < confidence
    columns = right, confidence, st.bin_numbers(confidence)
    error = st.calibration_error(*columns)
    basic, percentile = (
        st.bootstrap(st.calibration_error, *columns, method=method)
        for method in ("basic", "percentile")
    )
    assert basic.low < error / 2 < percentile.low  # it is 0
    assert basic.high < percentile.high


def test_the_readmes_seeds():
    dat, swin = [64.36, 65.00, 64.42], [62.10, 62.32, 63.08]
    mean = st.mean_of_runs(dat)
    assert mean.interval == pytest.approx((63.72, 65.47), abs=0.005)
    assert mean.interval == pytest.approx(DescrStatsW(dat).tconfint_mean())
    welch = st.compare_runs(dat, swin)
    assert welch.value == pytest.approx(2.09, abs=0.005)
    assert welch.interval == pytest.approx((1.04, 3.15), abs=0.005)
    assert welch.p == pytest.approx(0.0063, abs=5e-5)
    assert welch.degrees == pytest.approx(3.55, abs=0.005)
    oracle = CompareMeans(DescrStatsW(dat), DescrStatsW(swin)).tconfint_diff(usevar="unequal")
    assert welch.interval == pytest.approx(oracle)


def test_runs_without_spread_have_no_interval():
    assert st.mean_of_runs([64.0]) == st.Mean(64.0, None)
    assert st.mean_of_runs([64.0, 64.0]) == st.Mean(64.0, None)
    assert st.compare_runs([64.0], [62.0, 63.0]) == st.Mean(1.5, None)
    assert st.compare_runs([64.0, 64.0], [62.0, 62.0]) == st.Mean(2.0, None)
    with pytest.raises(ValueError, match="no runs"):
        st.mean_of_runs([])


# --- Their tables -----------------------------------------------------------------------------------------------------


def test_runs_are_shown_with_their_mean_and_interval():
    assert tables.format_runs([64.36, 65.0, 64.42]) == "64.59 ± 0.88 (64.36 · 65.00 · 64.42)"
    assert tables.format_runs([64.36, 64.36]) == "64.36 (64.36 · 64.36)"
    assert tables.format_runs([64.36]) == "64.36"
    assert tables.format_runs([]) == "—"


def test_configurations_are_compared_by_welch():
    dat, swin, one = [64.36, 65.00, 64.42], [62.10, 62.32, 63.08], [60.0]
    [header, _, row] = tables.format_run_differences({"dat": dat, "swin": swin, "pvt": one})
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["dat", "swin", "+2.09 [1.04, 3.15]", "0.0063"]
    assert " q " not in header
    lines = tables.format_run_differences({"dat": dat, "swin": swin, "vit": [60.0, 60.5]})
    assert len(lines) == 5
    assert " q " in lines[0]
    assert tables.format_run_differences({"dat": dat, "pvt": one}) == []
    assert tables.format_run_differences({}) == []
