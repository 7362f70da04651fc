"""Figures of how well numbers tell what is so: ranks, precision, calibration, and their doubt.

Everything here is arrays in, numbers out. Equal scores are told apart by nothing: they count as
one step. Figures over resamples take ``counts``, how often each item counts in each resample, so
that a thousand of them cost one sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soundmap.errors import UsageError

CALIBRATION_BINS = 10
"""Bins of equal width in :func:`calibration_error`."""

LEVEL = 0.95
"""Share of resamples within an interval."""

_COUNTS_AT_ONCE = 2_000_000
"""Numbers held at once while resampling: 16 MB, and a few times as much while they are used."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that 95 % of its resamples lie in (NaN where there is none)."""

    value: float
    low: float
    high: float


# --- one set of items ------------------------------------------------------------------------


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """Mean over what is so of the share of right ones among all that score as high or higher.

    Items of equal score enter together: each step of recall takes the precision at its end, without
    interpolation.

    Parameters
    ----------
    scores
        float[N].
    truth
        bool[N].

    Returns
    -------
    float
        0 to 1; for chance see :func:`chance_precision`. NaN if nothing is so.

    Raises
    ------
    UsageError
        The two are not of one length, or a score is not finite.

    Examples
    --------
    >>> round(average_precision([0.1, 0.4, 0.35, 0.8], [False, False, True, True]), 4)
    0.8333
    """
    values, known = _pair(scores, truth, bool)
    return float(area_and_precision(values, known, np.ones((1, len(values))))[1][0])


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rho: the correlation of ranks, equal numbers sharing their mean rank.

    Parameters
    ----------
    a, b
        float[N].

    Returns
    -------
    float
        -1 to 1; NaN where one of them is the same everywhere.

    Raises
    ------
    UsageError
        The two are not of one length, or a number is not finite.

    Examples
    --------
    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 6)
    0.8
    """
    values, other = _pair(a, b, float)
    return float(rank_correlation(values, other, np.ones((1, len(values))))[0])


# --- many resamples --------------------------------------------------------------------------


def area_and_precision(scores: Floats, truth: Bools, counts: Floats) -> tuple[Floats, Floats]:
    """Area under the ROC curve and average precision, where items count several times or not.

    Parameters
    ----------
    scores
        float64[N], finite.
    truth
        bool[N].
    counts
        float64[B, N], how often each item counts.

    Returns
    -------
    tuple of float64[B]
        Of the items repeated. The area is the chance that what is so scores higher than what is
        not, ties counting half (Mann and Whitney 1947); NaN unless there are both kinds. The other
        is :func:`average_precision`.
    """
    if not len(scores):
        nothing = np.full(len(counts), np.nan)
        return nothing, nothing
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = counts[:, order]
    every = np.cumsum(weights, axis=1)[:, ends]
    right = np.cumsum(weights * truth[order], axis=1)[:, ends]
    wrong = every - right
    gained = np.diff(right, axis=1, prepend=0.0)
    passed = np.diff(wrong, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        area = (passed * (right - gained / 2)).sum(axis=1) / (right[:, -1] * wrong[:, -1])
        precision = np.divide(right, every, out=np.zeros_like(right), where=every > 0)
        average = (gained * precision).sum(axis=1) / right[:, -1]
    return area, average


def rank_correlation(a: Floats, b: Floats, counts: Floats) -> Floats:
    """Spearman's rho, where items count several times or not.

    Parameters
    ----------
    a, b
        float64[N], finite.
    counts
        float64[B, N], how often each item counts.

    Returns
    -------
    float64[B]
        As :func:`spearman` of the items repeated.
    """
    total = counts.sum(axis=1, keepdims=True)
    centred = []
    with np.errstate(invalid="ignore"):
        for numbers in (a, b):
            ranks = _mean_ranks(numbers, counts)
            centred.append(ranks - (ranks * counts).sum(axis=1, keepdims=True) / total)
        first, second = centred
        spread = (first**2 * counts).sum(axis=1) * (second**2 * counts).sum(axis=1)
        together = (first * second * counts).sum(axis=1)
        return np.divide(
            together, np.sqrt(spread), out=np.full(len(counts), np.nan), where=spread > 1e-12
        )


def _mean_ranks(values: Floats, counts: Floats) -> Floats:
    """Ranks float64[B, N] of repeated items; equal ones share their mean rank (less one half)."""
    if not len(values):
        return np.zeros(counts.shape)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
    totals = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(totals, axis=1) - totals / 2
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    result = np.empty(counts.shape)
    result[:, order] = ranks[:, group]
    return result


def resampled(places: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """Draw places with replacement, as many as there are, again and again (Efron 1979).

    Items of one place are drawn together: they are not independent of each other.

    Parameters
    ----------
    places
        int64[N], which place each item belongs to.
    resamples
        How often to draw.
    seed
        The same seed draws the same.

    Yields
    ------
    float64[b, N]
        How often each item counts, some resamples at a time.
    """
    if not len(places):
        return
    generator = np.random.default_rng(seed)
    names, index = np.unique(places, return_inverse=True)
    count = len(names)
    step = max(1, _COUNTS_AT_ONCE // len(places))
    for start in range(0, resamples, step):
        drawn = [
            np.bincount(generator.integers(count, size=count), minlength=count)
            for _ in range(min(step, resamples - start))
        ]
        yield np.stack(drawn)[:, index].astype(np.float64)


def estimate(value: float, replicates: Floats) -> Estimate:
    """Put the percentile interval of its resamples around a figure.

    Parameters
    ----------
    value
        The figure of the items as they are.
    replicates
        float64[B], the figure of each resample; those that have none (NaN) are left out.
    """
    known = replicates[np.isfinite(replicates)]
    if not len(known):
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))


# --- probabilities ---------------------------------------------------------------------------


def calibration_error(
    probabilities: ArrayLike, truth: ArrayLike, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error: how far probabilities lie from what comes true, on average.

    Probabilities are sorted into bins of equal width: bin k of n holds those from k/n up to, but
    without, (k+1)/n, and the last one holds 1, too. The error is the mean over the bins, weighted
    by how many they hold, of the distance between the mean probability and the share that is so
    (Naeini, Cooper and Hauskrecht 2015).

    Parameters
    ----------
    probabilities
        float of any shape, 0 to 1.
    truth
        bool of the same shape.
    bins
        Number of bins.

    Returns
    -------
    float
        0 to 1, 0 is best; NaN of nothing.

    Raises
    ------
    UsageError
        The two are not of one shape, or a probability is not within 0 and 1.

    Examples
    --------
    >>> round(calibration_error([0.1, 0.1, 0.9, 0.9], [False, False, True, False]), 6)
    0.25
    """
    given, known = np.asarray(probabilities), np.asarray(truth)
    if given.shape != known.shape:
        raise UsageError(f"probabilities {given.shape} and truth {known.shape} differ in shape")
    values, known = _pair(given.ravel(), known.ravel(), bool)
    if bins < 1:
        raise UsageError(f"bins must be at least 1, not {bins}")
    if not len(values):
        return float("nan")
    if values.min() < 0 or values.max() > 1:
        raise UsageError(
            f"probabilities must lie within 0 and 1, not {values.min():.4g} to {values.max():.4g}"
        )
    number = np.minimum((values * bins).astype(np.int64), bins - 1)
    gap = np.bincount(number, weights=values - known, minlength=bins)
    return float(np.abs(gap).sum() / len(values))


# --- retrieval of what is of one class -------------------------------------------------------


@dataclass(frozen=True)
class ClassPrecision:
    """Mean average precision of queries, class by class."""

    by_class: dict[str, float]
    """Class -> mean over its queries, in order of name."""
    chance: dict[str, float]
    """Class -> what a gallery in random order would give."""

    @property
    def mean(self) -> float:
        """Mean over classes, each weighing the same."""
        return float(np.mean(list(self.by_class.values())))

    @property
    def mean_chance(self) -> float:
        """Mean of chance over classes."""
        return float(np.mean(list(self.chance.values())))


def mean_average_precision(
    similarity: ArrayLike, relevant: ArrayLike, classes: Sequence[str]
) -> ClassPrecision:
    """Judge how early queries find what is right for them.

    Parameters
    ----------
    similarity
        float[Q, N], how well gallery item n fits query q.
    relevant
        bool[Q, N], whether it is right.
    classes
        Class of each of the Q queries.

    Returns
    -------
    ClassPrecision
        Queries for which nothing in the gallery is right are left out.

    Raises
    ------
    UsageError
        Shapes that do not fit, a similarity that is not finite, or no query with anything right.

    Examples
    --------
    >>> found = mean_average_precision([[0.9, 0.2], [0.8, 0.1]], [[1, 0], [0, 1]], ["a", "b"])
    >>> found.by_class, found.mean_chance
    ({'a': 1.0, 'b': 0.5}, 0.75)
    """
    scores, right = np.asarray(similarity, np.float64), np.asarray(relevant).astype(bool)
    if scores.ndim != 2 or scores.shape != right.shape or len(scores) != len(classes):
        raise UsageError(
            f"similarity {scores.shape} and relevant {right.shape} must be [Q, N], with a class "
            f"for each of the Q queries; {len(classes)} classes are given"
        )
    found: dict[str, list[tuple[float, float]]] = {}
    for row, known, name in zip(scores, right, classes, strict=True):
        if known.any():
            by_chance = chance_precision(int(known.sum()), len(known))
            found.setdefault(name, []).append((average_precision(row, known), by_chance))
    if not found:
        raise UsageError("no query has anything in the gallery that is right for it")
    means = {name: np.mean(found[name], axis=0) for name in sorted(found)}
    return ClassPrecision(
        {name: float(mean[0]) for name, mean in means.items()},
        {name: float(mean[1]) for name, mean in means.items()},
    )


def chance_precision(relevant: int, total: int) -> float:
    """Expected average precision of a random order without ties.

    An item at place k is right with chance r/n, and then (r-1)/(n-1) of those before it are, too;
    the mean over k of (1 + (k-1) (r-1)/(n-1)) / k is what comes out.

    Parameters
    ----------
    relevant
        How many items are right, at least 1.
    total
        How many there are.
    """
    if not 1 <= relevant <= total:
        raise UsageError(f"of {total} items at least 1 must be right, and at most all: {relevant}")
    first = float(np.mean(1 / np.arange(1, total + 1)))
    others = (relevant - 1) / max(1, total - 1)
    return first + (1 - first) * others


def _pair(a: ArrayLike, b: ArrayLike, kind: type) -> tuple[Floats, NDArray[Any]]:
    values: Floats = np.asarray(a, np.float64)
    other: NDArray[Any] = np.asarray(b).astype(kind)
    if values.ndim != 1 or values.shape != other.shape:
        raise UsageError(f"two rows of one length are compared, not {values.shape}, {other.shape}")
    if not (np.isfinite(values).all() and np.isfinite(other).all()):
        raise UsageError("figures need finite numbers: leave out what is not known")
    return values, other
