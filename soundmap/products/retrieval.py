"""How well a model finds the recording that belongs to an image, and the image of a recording.

Sample i has an image, a recording and perhaps a caption of the recording. Every image is a query
against all recordings, and the other way round; what counts is the rank of its own partner. These
are the figures of the Sat2Sound paper (arXiv 2505.13777), computed as its code computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import UsageError

AddText = Literal["none", "audio", "query"]
"""Where the recording's caption is added: nowhere, to the recording, or to the query."""

Floats = NDArray[np.floating]

_SIMILARITIES_AT_ONCE = 4_000_000
"""Similarities held at once, whatever the size of the gallery: 32 MB and as much again."""


@dataclass(frozen=True)
class Direction:
    """How well one kind of sample finds the other."""

    ranks: NDArray[np.float64]
    """float64[N], rank of each query's own partner from 1; half ranks come from ties."""

    @property
    def k(self) -> float:
        """A tenth of the gallery, which need not be a whole number."""
        return top_tenth(len(self.ranks))

    @property
    def recall(self) -> float:
        """Share of queries whose partner ranks before `k`, as the paper's code counts."""
        return recall(self.ranks, self.k, within=False)

    @property
    def median_rank(self) -> float:
        """Median of the ranks."""
        return float(np.median(self.ranks))

    def recall_at(self, k: float) -> float:
        """Share of queries whose partner is among the first ``k``: the usual R@1, R@5, R@10."""
        return recall(self.ranks, k)

    def reported(self) -> dict[str, float]:
        """The figures as the paper's code prints them: recall to 3 digits, median rank cut.

        Examples
        --------
        >>> Direction(np.array([1.0, 2.5, 2.5, 4.0] * 5)).reported()
        {'R@2': 0.25, 'Median Rank': 2}
        """
        return {f"R@{self.k:g}": round(self.recall, 3), "Median Rank": int(self.median_rank)}


@dataclass(frozen=True)
class Retrieval:
    """Both directions over one set of samples."""

    image_to_sound: Direction
    """Images are the queries, recordings the gallery (I2S)."""
    sound_to_image: Direction
    """Recordings are the queries, images the gallery (S2I)."""


def top_tenth(n: int) -> float:
    """The paper's k: 10 / 100 of a gallery of ``n``, as a float."""
    return 10 / 100 * n


def recall(ranks: NDArray[np.float64], k: float, *, within: bool = True) -> float:
    """Share of queries whose partner is found early.

    Parameters
    ----------
    ranks
        float64[N] from `match_ranks`.
    k
        The rank that counts as early.
    within
        Whether rank k itself still counts. The paper's R@10% leaves it out: of 200 samples, the
        first 19 count.
    """
    return float(np.mean(ranks <= k if within else ranks < k))


def match_ranks(queries: Floats, gallery: Floats) -> NDArray[np.float64]:
    """Rank every query's own partner in the gallery by cosine.

    The rank is one more than the number of gallery items that fit better. Items that fit equally
    well share the mean of their ranks. Equal gallery items fit equally well to the last bit.

    Parameters
    ----------
    queries, gallery
        float[N, D], of any length above 0; the partner of query i is gallery item i.

    Returns
    -------
    float64[N]
        From 1 to N.

    Raises
    ------
    UsageError
        The two are not of one shape [N, D] with N at least 1, or hold a vector without direction.
    """
    queries, gallery = _checked(queries=queries, gallery=gallery)
    items = _Gallery(gallery)
    ranks = np.empty(len(queries), np.float64)
    for rows, similarity in items.compare(queries):
        own = np.take_along_axis(similarity, items.distinct[rows, None], axis=1)
        better = (similarity > own) @ items.copies
        equal = (similarity == own) @ items.copies
        ranks[rows] = 1 + better + (equal - 1) / 2
    return ranks


def nearest(queries: Floats, gallery: Floats, k: int) -> NDArray[np.int64]:
    """Find the ``k`` gallery items that fit each query best.

    Parameters
    ----------
    queries, gallery
        float[Q, D] and float[N, D], of any length above 0.
    k
        How many; all of the gallery if it holds fewer.

    Returns
    -------
    int64[Q, k]
        Indices into the gallery, best first; the lower index first among equals.

    Raises
    ------
    UsageError
        The two are not of one width D, or hold a vector without direction.
    """
    found = np.empty((len(queries), min(k, len(gallery))), np.int64)
    for rows, similarity in similarities(queries, gallery):
        found[rows] = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return found


def similarities(queries: Floats, gallery: Floats) -> Iterator[tuple[slice, Floats]]:
    """Compare queries with a gallery, some queries at a time.

    Parameters
    ----------
    queries, gallery
        float[Q, D] and float[N, D], of any length above 0.

    Yields
    ------
    tuple
        Which queries, and their cosines float[q, N]; equal gallery items have equal ones.

    Raises
    ------
    UsageError
        The two are not of one width D, or hold a vector without direction.
    """
    items = _Gallery(_unit(gallery, "gallery"))
    queries = _unit(queries, "queries")
    if queries.shape[1] != items.width:
        raise UsageError(
            f"queries of {queries.shape[1]} and a gallery of {items.width} numbers an item "
            "are not of one model"
        )
    for rows, similarity in items.compare(queries):
        yield rows, similarity[:, items.distinct]


def retrieval(
    images: Floats, sounds: Floats, captions: Floats | None = None, add_text: AddText = "none"
) -> Retrieval:
    """Judge retrieval in both directions over a whole set.

    ======== ========================== ==========================
    add_text image to sound             sound to image
    ======== ========================== ==========================
    none     image -> sound             sound -> image
    audio    image -> sound + caption   sound + caption -> image
    query    image + caption -> sound   sound + caption -> image
    ======== ========================== ==========================

    Vectors are added as unit vectors, and made unit vectors again.

    Parameters
    ----------
    images, sounds
        float[N, D], of any length above 0; sample i is row i of both.
    captions
        float[N, D], captions of the recordings; not needed for "none".
    add_text
        "none", "audio" or "query".

    Raises
    ------
    UsageError
        Shapes that do not fit, a vector without direction, an unknown ``add_text``, or no captions
        where they are to be added.

    Examples
    --------
    >>> image = np.eye(4, 8)
    >>> retrieval(image, image + 0.1).image_to_sound.recall_at(1)
    1.0
    """
    if add_text not in ("none", "audio", "query"):
        raise UsageError(f"add_text is none, audio or query, not {add_text!r}")
    images, sounds = _checked(images=images, sounds=sounds)
    if add_text == "none":
        return Retrieval(
            Direction(match_ranks(images, sounds)), Direction(match_ranks(sounds, images))
        )
    if captions is None:
        raise UsageError(f"add_text={add_text!r} needs captions, and none were given")
    images, captions = _checked(images=images, captions=captions)
    told = sounds + captions
    if add_text == "audio":
        forth = match_ranks(images, told)
    else:
        forth = match_ranks(images + captions, sounds)
    return Retrieval(Direction(forth), Direction(match_ranks(told, images)))


class _Gallery:
    """Distinct items, so that equal ones get one similarity.

    A matrix product may round equal columns differently, by where they stand in its blocks; then
    ties would be told apart by chance.
    """

    def __init__(self, unit: Floats) -> None:
        first: dict[bytes, int] = {}
        self.distinct = np.array([first.setdefault(row.tobytes(), len(first)) for row in unit])
        """int64[N], which distinct item each item is."""
        self.copies = np.bincount(self.distinct)
        """int64[M], how often each distinct item occurs."""
        kept = np.unique(self.distinct, return_index=True)[1]
        self._items = unit[kept]
        self.width = unit.shape[1]

    def compare(self, unit: Floats) -> Iterator[tuple[slice, Floats]]:
        """Similarities of some queries at a time with the distinct items: float[q, M]."""
        step = max(1, _SIMILARITIES_AT_ONCE // len(self._items))
        for start in range(0, len(unit), step):
            rows = slice(start, min(start + step, len(unit)))
            yield rows, unit[rows] @ self._items.T


def _unit(vectors: Floats, name: str) -> Floats:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not len(vectors):
        raise UsageError(f"{name} must be float[N, D] with N at least 1, not {vectors.shape}")
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(norm[:, 0]) & (norm[:, 0] > 0)))
    if len(wrong):
        raise UsageError(
            f"{name}: {len(wrong)} of {len(vectors)} vectors are zero or not finite, "
            f"the first is number {wrong[0]}; leave these samples out"
        )
    unit: Floats = vectors / norm
    return unit


def _checked(**sets: Floats) -> list[Floats]:
    """Unit vectors of two sets whose rows belong together."""
    unit = [_unit(vectors, name) for name, vectors in sets.items()]
    if unit[0].shape != unit[1].shape:
        told = " and ".join(f"{name} {u.shape}" for name, u in zip(sets, unit, strict=True))
        raise UsageError(f"pairs must be of one shape [N, D]: {told}")
    return unit
