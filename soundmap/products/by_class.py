"""Retrieval where every item of the right class counts, not one partner alone.

Average precision is that of `soundmap.products.scores`: equal similarities enter together. Figures
are means over the queries of a class, then over classes, so that a large class weighs no more than
a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import UsageError
from soundmap.products.retrieval import similarities, top_tenth
from soundmap.products.scores import (
    Estimate,
    average_precision,
    chance_precision,
    estimate,
    resampled,
)

RESAMPLES = 1000
"""Resamples behind an interval."""

FEW = 5
"""Independent items of a class, below which its own figure has no interval."""

Vectors = NDArray[np.floating]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClassFigure:
    """A figure by class of the query, and its mean over classes."""

    by_class: dict[str, Estimate]
    """Classes with a query and with something right in the gallery, in the order given."""
    mean: Estimate
    """Over classes, each weighing the same."""
    chance: float
    """What a gallery in random order would give, mean over classes."""
    share: float
    """Share of the gallery that is right, mean over classes."""
    ceiling: float = 1.0
    """What the best order would give, mean over classes."""


@dataclass(frozen=True)
class AudibleScore:
    """How well images find the recordings of what is audible in their class."""

    queries: int
    """Images of classes in which something of the gallery is audible."""
    gallery: int
    """Recordings."""
    recall: ClassFigure
    """R@10 %: the share of the right recordings before a tenth of the gallery. Of each image, it is
    what the paper's R@10 % would be on average, were one right recording drawn as its partner."""
    recall_alone: ClassFigure
    """The same, each right recording ranked among the wrong ones alone: right ones do not push
    each other out, so that 1 can be reached."""
    precision: ClassFigure
    """Mean average precision."""


def precision_by_query(
    queries: Vectors,
    classes: Ints,
    gallery: Vectors,
    right: Bools,
    names: Sequence[str],
    *,
    places: Ints | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClassFigure:
    """Mean average precision by class, with intervals from resampling the queries.

    Parameters
    ----------
    queries, gallery
        float[Q, D] and float[N, D], of any length above 0.
    classes
        int64[Q], class of each query.
    right
        bool[C, N], which gallery items are right for a query of the class.
    names
        Names of the C classes.
    places
        int64[Q], queries that are drawn together; by default each by itself.
    resamples, seed
        How often to draw, and from which seed.

    Raises
    ------
    UsageError
        No query has anything right in the gallery, or shapes do not fit.
    """
    every = _ranked(queries, classes, gallery, right, names)
    return _over_queries(every.precision, every, names, places, resamples, seed)


def precision_by_gallery(
    queries: Vectors,
    gallery: Vectors,
    labels: Ints,
    names: Sequence[str],
    *,
    places: Ints | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClassFigure:
    """Average precision of one query a class, with intervals from resampling what is found.

    The average precision of a class is the mean over its gallery items of the precision at the
    place of each. These are what is resampled, with the gallery as it is: were the gallery itself
    drawn anew, an item drawn thrice would stand thrice at its place and count as three found.

    Parameters
    ----------
    queries
        float[C, D], one a class.
    gallery
        float[N, D].
    labels
        int64[N], class of each gallery item.
    names
        Names of the C classes.
    places
        int64[N], gallery items that are drawn together; by default each by itself.
    resamples, seed
        How often to draw, and from which seed.

    Raises
    ------
    UsageError
        The shapes do not fit.
    """
    if len(queries) != len(names) or len(labels) != len(gallery):
        raise UsageError(
            f"{len(queries)} queries for {len(names)} classes, and {len(labels)} labels for "
            f"{len(gallery)} gallery items do not fit"
        )
    own = np.empty(len(gallery))
    for rows, part in similarities(queries, gallery):
        for c, values in enumerate(part, rows.start):
            right = labels == c
            better = [_at_least(values[right], np.sort(some)) for some in (values[right], values)]
            own[right] = better[0] / better[1]
    right = labels == np.arange(len(names))[:, None]
    every = _Ranked(np.arange(len(gallery)), labels, own, own, own, right.sum(axis=1), len(gallery))
    return _over_queries(own, every, names, places, resamples, seed)


def audible_score(
    images: Vectors,
    classes: Ints,
    sounds: Vectors,
    audible: Bools,
    names: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AudibleScore:
    """Judge how images find recordings of what is audible in their class.

    Parameters
    ----------
    images
        float[Q, D], the queries; they are what is resampled.
    classes
        int64[Q], class of each image.
    sounds
        float[N, D], the gallery.
    audible
        bool[C, N], which recordings are audible in which class of images.
    names
        Names of the C classes.
    resamples, seed
        How often to draw, and from which seed.

    Raises
    ------
    UsageError
        Nothing of the gallery is audible in any image, or shapes do not fit.
    """
    every = _ranked(images, classes, sounds, audible, names)
    shown = [
        _over_queries(values, every, names, None, resamples, seed, kind)
        for values, kind in (
            (every.recall, "recall"),
            (every.alone, "alone"),
            (every.precision, "precision"),
        )
    ]
    return AudibleScore(len(every.precision), len(sounds), *shown)


@dataclass(frozen=True)
class _Ranked:
    """What each query that has anything right finds."""

    kept: Ints
    """int64[q], which queries."""
    classes: Ints
    """int64[q]."""
    precision: Floats
    recall: Floats
    alone: Floats
    right: Ints
    """int64[C], how many gallery items are right for a class."""
    total: int
    """Gallery items."""


def _ranked(
    queries: Vectors, classes: Ints, gallery: Vectors, right: Bools, names: Sequence[str]
) -> _Ranked:
    if right.shape != (len(names), len(gallery)) or len(classes) != len(queries):
        raise UsageError(
            f"{len(queries)} queries, {len(classes)} classes of them, {len(gallery)} gallery items "
            f"and {len(names)} names do not fit a table of what is right {right.shape}"
        )
    count = right.sum(axis=1)
    kept = np.flatnonzero(count[classes] > 0)
    if not len(kept):
        raise UsageError("no query has anything in the gallery that is right for it")
    total = len(gallery)
    figures = np.empty((3, len(kept)))
    for rows, part in similarities(queries[kept], gallery):
        for i, values in enumerate(part, rows.start):
            known = right[classes[kept[i]]]
            figures[0, i] = average_precision(values, known)
            order = np.sort(values)
            wrong = np.sort(values[~known])
            own = values[known]
            figures[1, i] = np.mean(_places(own, order) - 0.5 < top_tenth(total))
            figures[2, i] = np.mean(_places(own, wrong) < top_tenth(len(wrong) + 1))
    return _Ranked(kept, classes[kept], figures[0], figures[1], figures[2], count, total)


def _at_least(values: Vectors, order: Vectors) -> Ints:
    """Count the items of ``order`` (ascending) that are as large as each value, or larger."""
    return len(order) - np.searchsorted(order, values, "left")


def _places(values: Vectors, order: Vectors) -> Floats:
    """Rank from 1 before which a value would enter ``order`` (ascending), ties counting half."""
    better = len(order) - np.searchsorted(order, values, "right")
    equal = len(order) - np.searchsorted(order, values, "left") - better
    placed: Floats = 1 + better + equal / 2
    return placed


def _over_queries(
    values: Floats,
    every: _Ranked,
    names: Sequence[str],
    places: Ints | None,
    resamples: int,
    seed: int,
    kind: str = "precision",
) -> ClassFigure:
    present = np.unique(every.classes)
    places = np.arange(len(values)) if places is None else places[every.kept]
    member = (every.classes[:, None] == present).astype(np.float64)
    own = (values @ member) / member.sum(axis=0)
    parts = [np.zeros((0, len(present)))]
    for counts in resampled(places, resamples, seed):
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(((counts * values) @ member) / (counts @ member))
    again = np.concatenate(parts).T
    found = {}
    for i, c in enumerate(present):
        many = len(np.unique(places[every.classes == c])) >= FEW
        found[names[c]] = estimate(float(own[i]), again[i] if many else np.zeros(0))
    bounds = [_bounds(kind, int(every.right[c]), every.total) for c in present]
    chance, ceiling = np.mean(bounds, axis=0)
    share = float((every.right[present] / every.total).mean())
    mean = estimate(float(own.mean()), _mean(again))
    return ClassFigure(found, mean, float(chance), share, float(ceiling))


def _bounds(kind: str, right: int, total: int) -> tuple[float, float]:
    """What a random order and the best one give where ``right`` of ``total`` items are right."""
    if kind == "precision":
        return chance_precision(right, total), 1.0
    size = total if kind == "recall" else total - right + 1
    within = int(np.ceil(top_tenth(size))) - 1
    return within / size, float(min(1.0, within / right)) if kind == "recall" else float(within > 0)


def _mean(again: Floats) -> Floats:
    """Mean over classes of each resample, over the classes that it holds: float64[B]."""
    known = np.isfinite(again)
    total = np.where(known, again, 0).sum(axis=0)
    nothing = np.full(again.shape[1], np.nan)
    mean: Floats = np.divide(total, known.sum(axis=0), out=nothing, where=known.any(axis=0))
    return mean
