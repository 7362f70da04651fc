"""Figures of agreement: against scikit-learn and SciPy, and by hand where these have none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundmap.errors import UsageError
from soundmap.products.evaluate import auc
from soundmap.products.scores import (
    area_and_precision,
    average_precision,
    calibration_error,
    chance_precision,
    estimate,
    mean_average_precision,
    rank_correlation,
    resampled,
    spearman,
)

# Few distinct numbers, so that ties are the rule.
small_numbers = st.lists(st.integers(0, 6), min_size=4, max_size=40)


def both_kinds(numbers: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    truth = np.random.default_rng(seed).random(len(numbers)) < 0.4
    truth[:2] = True, False
    return np.array(numbers, float) / 6, truth


@settings(max_examples=25)
@given(small_numbers, st.integers(0, 99))
def test_average_precision_and_area_are_scikit_learns(numbers: list[int], seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = both_kinds(numbers, seed)
    expected = metrics.average_precision_score(truth, scores)
    assert average_precision(scores, truth) == pytest.approx(expected, abs=1e-12)
    area = area_and_precision(scores, truth, np.ones((1, len(scores))))[0][0]
    assert area == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert area == pytest.approx(auc(scores, truth), abs=1e-12)


@given(small_numbers, st.integers(0, 99))
def test_spearman_is_scipys(numbers: list[int], seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    other = np.random.default_rng(seed).integers(0, 5, len(numbers))
    if len(set(numbers)) == 1 or len(set(other)) == 1:
        assert np.isnan(spearman(numbers, other))
    else:
        expected = stats.spearmanr(numbers, other).statistic
        assert spearman(numbers, other) == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    assert average_precision([3, 2, 1], [True, False, True]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([1, 1, 1, 1], [True, False, False, False]) == 0.25
    assert spearman([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(average_precision([1, 2], [False, False]))
    assert np.isnan(average_precision([], []))
    assert np.isnan(spearman([], []))


@given(small_numbers, st.integers(0, 99))
def test_counts_are_repeats(numbers: list[int], seed: int) -> None:
    scores, truth = both_kinds(numbers, seed)
    generator = np.random.default_rng(seed)
    other = generator.integers(0, 4, len(scores)).astype(float)
    counts = generator.integers(0, 4, (3, len(scores))).astype(float)
    counts[:, :2] = 1
    area, average = area_and_precision(scores, truth, counts)
    rho = rank_correlation(scores, other, counts)
    for row, n in enumerate(counts.astype(int)):
        repeated = np.repeat(scores, n), np.repeat(truth, n)
        assert area[row] == pytest.approx(auc(*repeated), abs=1e-12)
        assert average[row] == pytest.approx(average_precision(*repeated), abs=1e-12)
        expected = spearman(np.repeat(scores, n), np.repeat(other, n))
        assert rho[row] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_resample_without_both_kinds_has_no_area() -> None:
    area, average = area_and_precision(
        np.array([0.1, 0.9]), np.array([False, True]), np.array([[2.0, 0.0], [0.0, 2.0]])
    )
    assert np.isnan(area).all()
    assert np.isnan(average[0])
    assert average[1] == 1


def test_places_are_drawn_whole() -> None:
    places = np.array([7, 7, 7, -1, 4, 4])
    counts = np.concatenate(list(resampled(places, 500, seed=1)))
    assert counts.shape == (500, 6)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 4] == counts[:, 5]).all()
    # Three places are drawn three times, whatever the number of items.
    assert (counts[:, [0, 3, 4]].sum(axis=1) == 3).all()
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.15)


def test_resamples_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.arange(50)
    whole = np.concatenate(list(resampled(places, 30, seed=4)))
    monkeypatch.setattr("soundmap.products.scores._COUNTS_AT_ONCE", 100)
    parts = list(resampled(places, 30, seed=4))
    assert len(parts) == 15
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (np.concatenate(list(resampled(places, 30, seed=5))) != whole).any()
    assert not list(resampled(places, 0, seed=4))
    assert not list(resampled(places[:0], 10, seed=4))


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    means = [(counts @ values) / 400 for counts in resampled(np.arange(400), 4000, seed=0)]
    found = estimate(float(values.mean()), np.concatenate(means))
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(found.value - half, abs=0.015)
    assert found.high == pytest.approx(found.value + half, abs=0.015)


def test_an_interval_leaves_out_what_is_not_known() -> None:
    found = estimate(0.5, np.array([0.4, np.nan, 0.6]))
    assert (found.low, found.high) == pytest.approx((0.405, 0.595))
    none = estimate(0.5, np.array([np.nan]))
    assert none.value == 0.5
    assert np.isnan([none.low, none.high]).all()


def test_calibration_error() -> None:
    # Two bins: 0.1 is said where one in four is so, 1.0 where all are.
    assert calibration_error([0.1] * 4 + [1.0] * 4, [1, 0, 0, 0] + [1] * 4) == pytest.approx(0.075)
    # An edge belongs to the bin above it, 1 to the last.
    assert calibration_error([0.5, 0.45], [True, False], bins=2) == pytest.approx(0.475)
    assert calibration_error([[0.0, 1.0]], [[False, True]]) == 0
    generator = np.random.default_rng(2)
    said = generator.random(100_000)
    assert calibration_error(said, generator.random(100_000) < said) < 0.01
    assert calibration_error(said, generator.random(100_000) < said**2) > 0.1
    assert np.isnan(calibration_error([], []))


def test_mean_average_precision_by_class() -> None:
    classes = ["rain", "birds", "rain", "wind"]
    gallery = np.array(["birds", "rain", "rain", "birds"])
    similarity = [[0.1, 0.9, 0.8, 0.2], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.1, 0.7], [1, 2, 3, 4]]
    relevant = np.array(classes)[:, None] == gallery
    found = mean_average_precision(similarity, relevant, classes)
    # Nothing in the gallery is wind.
    assert list(found.by_class) == ["birds", "rain"]
    assert found.by_class["birds"] == pytest.approx((1 + 2 / 4) / 2)
    assert found.by_class["rain"] == pytest.approx((1 + (1 / 2 + 2 / 4) / 2) / 2)
    assert found.mean == pytest.approx(np.mean(list(found.by_class.values())))
    assert found.mean_chance == pytest.approx(chance_precision(2, 4))


@pytest.mark.parametrize(("relevant", "total"), [(1, 1), (1, 5), (3, 7), (6, 6), (2, 40)])
def test_chance_is_the_mean_over_random_orders(relevant: int, total: int) -> None:
    generator = np.random.default_rng(relevant)
    truth = np.arange(total) < relevant
    found = [average_precision(generator.permutation(total), truth) for _ in range(500)]
    spread = np.std(found) / np.sqrt(len(found))
    assert chance_precision(relevant, total) == pytest.approx(np.mean(found), abs=4 * spread + 1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_precision([1, 2], [True]), "one length"),
        (lambda: average_precision([1, np.nan], [True, False]), "finite"),
        (lambda: spearman([1, 2], [1, np.inf]), "finite"),
        (lambda: calibration_error([0.5, 1.2], [True, False]), "within 0 and 1"),
        (lambda: calibration_error([0.5], [[True]]), "differ in shape"),
        (lambda: calibration_error([0.5], [True], bins=0), "bins"),
        (lambda: chance_precision(0, 4), "at least 1"),
        (lambda: mean_average_precision([[1.0]], [[True, False]], ["a"]), r"\[Q, N\]"),
        (lambda: mean_average_precision([[1.0]], [[True]], ["a", "b"]), "2 classes"),
        (lambda: mean_average_precision([[1.0]], [[False]], ["a"]), "no query"),
    ],
)
def test_what_cannot_be_judged(call, message) -> None:
    with pytest.raises(UsageError, match=message):
        call()
