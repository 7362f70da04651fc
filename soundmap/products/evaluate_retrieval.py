"""How well a model finds what belongs together in a set of samples.

Each direction of a pair (image and recording, image and caption) is judged over the samples that
have both, with all of these as the gallery, as `soundmap.products.retrieval` counts. Where samples
have classes, every item of the right class counts, see `soundmap.products.by_class`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import InputError, UsageError
from soundmap.products.by_class import (
    RESAMPLES,
    AudibleScore,
    ClassFigure,
    audible_score,
    precision_by_gallery,
    precision_by_query,
)
from soundmap.products.embed_samples import KINDS, Embeddings
from soundmap.products.retrieval import AddText, Direction, match_ranks, retrieval, top_tenth
from soundmap.products.scores import Estimate, estimate, resampled

RANKS = (1, 5, 10)
"""First ranks of which recall is told, beside a tenth of the gallery."""

Floats = NDArray[np.float64]

_NAMES = {
    "image": "image",
    "audio": "audio",
    "audio_caption": "audio caption",
    "image_caption": "image caption",
}


@dataclass(frozen=True)
class DirectionScore:
    """How well queries find their own partners."""

    query: str
    """What is asked with, e.g. "image + audio caption"."""
    gallery: str
    """What is searched."""
    add_text: AddText | None
    """How the recording's caption is added; None where captions themselves are searched."""
    samples: int
    """Samples that have all that the direction needs: queries, and gallery."""
    k: float
    """A tenth of the gallery."""
    recall_tenth: Estimate
    """Share of queries whose partner ranks before ``k``: the paper's R@10 %."""
    median_rank: Estimate
    recall_at: Mapping[int, Estimate]
    """1, 5, 10 -> share of queries whose partner is among the first so many."""
    chance: float
    """``recall_tenth`` of a gallery in random order."""
    reported: Mapping[str, float]
    """As the paper's code prints them: recall to three digits, median rank cut."""

    @property
    def name(self) -> str:
        """Name both sides, e.g. "image -> audio"."""
        return f"{self.query} -> {self.gallery}"


@dataclass(frozen=True)
class ClassScore:
    """Retrieval where every item of the right class counts."""

    query: str
    gallery: str
    queries: int
    items: int
    """In the gallery."""
    precision: ClassFigure
    """Mean average precision by class."""

    @property
    def name(self) -> str:
        """Name both sides, e.g. "class -> audio"."""
        return f"{self.query} -> {self.gallery}"


@dataclass(frozen=True)
class RetrievalScore:
    """All that a set of samples tells of a model's retrieval."""

    facts: Mapping[str, Any]
    """Model, data, how samples were read, what was left out."""
    samples: int
    """Samples that could be read."""
    having: Mapping[str, int]
    """image, audio, audio_caption, image_caption -> samples that have it."""
    directions: tuple[DirectionScore, ...]
    classes: tuple[ClassScore, ...]
    """Where samples have labels."""
    audible: AudibleScore | None
    """Where a table says which classes of recordings are audible in which class of images."""
    skipped: Mapping[str, str]
    """What could not be judged -> why."""
    resamples: int
    seed: int


def evaluate_retrieval(
    embeddings: Embeddings,
    *,
    audible: Mapping[str, frozenset[str]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RetrievalScore:
    """Judge a model by the vectors of a set of samples.

    What is resampled, with replacement, are the queries: the gallery stays as it is.

    Parameters
    ----------
    embeddings
        From `soundmap.products.embed_samples.embed_samples`.
    audible
        Label of images -> labels of recordings that are audible there.
    resamples
        How often to resample for the intervals; 0 for none.
    seed
        The same seed gives the same intervals.

    Raises
    ------
    InputError
        Nothing can be judged.
    UsageError
        ``resamples`` is negative, or the table names classes that no sample has.

    Examples
    --------
    >>> kept = load_embeddings("vectors.npz")  # doctest: +SKIP
    >>> evaluate_retrieval(kept).directions[0].recall_tenth.value  # doctest: +SKIP
    0.871
    """
    if resamples < 0:
        raise UsageError(f"resamples must be 0 or more, not {resamples}")
    skipped: dict[str, str] = {}
    directions = _directions(embeddings, skipped, resamples, seed)
    classes = _classes(embeddings, skipped, resamples, seed)
    heard = _audible(embeddings, audible, skipped, resamples, seed) if audible else None
    having = {kind: int(embeddings.known[kind].sum()) for kind in KINDS}
    if not directions and not classes and heard is None:
        there = ", ".join(f"{n:,} {_NAMES[kind]}s" for kind, n in having.items() if n)
        raise InputError(
            f"{embeddings.facts.get('data', 'the set')}: nothing can be judged: no two kinds are "
            f"known of the same sample; of {len(embeddings.keys):,} there are {there or 'none'}"
        )
    return RetrievalScore(
        embeddings.facts,
        len(embeddings.keys),
        having,
        tuple(directions),
        tuple(classes),
        heard,
        skipped,
        resamples,
        seed,
    )


def direction_score(
    ranks: Floats, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Estimate, Estimate, dict[int, Estimate]]:
    """Put intervals around the figures of one direction by resampling its queries.

    Parameters
    ----------
    ranks
        float64[N] from `soundmap.products.retrieval.match_ranks`.
    resamples, seed
        How often to draw, and from which seed.

    Returns
    -------
    tuple
        R@10 %, the median rank, and recall at `RANKS`.
    """
    own = Direction(ranks)
    limits = [ranks < own.k, *(ranks <= k for k in RANKS)]
    values = [own.recall, *(own.recall_at(k) for k in RANKS)]
    hits = np.stack(limits).astype(np.float64)
    order = np.argsort(ranks, kind="stable")
    shares: list[Floats] = [np.zeros((0, len(hits)))]
    medians: list[Floats] = [np.zeros(0)]
    for counts in resampled(np.arange(len(ranks)), resamples, seed):
        shares.append(counts @ hits.T / len(ranks))
        medians.append(_medians(ranks[order], counts[:, order]))
    drawn = np.concatenate(shares).T
    found = [estimate(value, again) for value, again in zip(values, drawn, strict=True)]
    median = estimate(own.median_rank, np.concatenate(medians))
    return found[0], median, dict(zip(RANKS, found[1:], strict=True))


def _medians(ordered: Floats, counts: Floats) -> Floats:
    """Medians of repeated numbers: float64[N] ascending, float64[B, N] to float64[B]."""
    ends = np.cumsum(counts, axis=1)
    total = len(ordered)
    middle = [(ends > place).argmax(axis=1) for place in ((total - 1) // 2, total // 2)]
    medians: Floats = (ordered[middle[0]] + ordered[middle[1]]) / 2
    return medians


# --- pairs -----------------------------------------------------------------------------------


def _directions(
    held: Embeddings, skipped: dict[str, str], resamples: int, seed: int
) -> list[DirectionScore]:
    found: list[DirectionScore] = []

    def add(query: str, gallery: str, add_text: AddText | None, ranks: Floats) -> None:
        recall, median, at = direction_score(ranks, resamples, seed)
        direction = Direction(ranks)
        found.append(
            DirectionScore(
                query,
                gallery,
                add_text,
                len(ranks),
                direction.k,
                recall,
                median,
                at,
                _chance(len(ranks)),
                direction.reported(),
            )
        )

    modes: tuple[AddText, ...] = ("none", "audio", "query")
    for mode in modes:
        needs = ("image", "audio") if mode == "none" else ("image", "audio", "audio_caption")
        rows = _rows(held, needs, skipped, f"image and audio, text added to {mode}")
        if rows is None:
            continue
        images, sounds = (held.vectors[kind][rows] for kind in ("image", "audio"))
        captions = held.vectors["audio_caption"][rows] if mode != "none" else None
        both = retrieval(images, sounds, captions, mode)
        told = "audio + audio caption"
        forth = {"none": ("image", "audio"), "audio": ("image", told)}
        query, gallery = forth.get(mode, ("image + audio caption", "audio"))
        add(query, gallery, mode, both.image_to_sound.ranks)
        add("audio" if mode == "none" else told, "image", mode, both.sound_to_image.ranks)
    for caption in ("image_caption", "audio_caption"):
        rows = _rows(held, ("image", caption), skipped, f"image and {_NAMES[caption]}")
        if rows is None:
            continue
        images, texts = (held.vectors[kind][rows] for kind in ("image", caption))
        add("image", _NAMES[caption], None, match_ranks(images, texts))
        add(_NAMES[caption], "image", None, match_ranks(texts, images))
    return found


def _rows(
    held: Embeddings, needs: Sequence[str], skipped: dict[str, str], name: str
) -> NDArray[np.int64] | None:
    """Samples that have all of it; None, and the reason, where there are none."""
    every = np.all([held.known[kind] for kind in needs], axis=0)
    if every.any():
        return np.flatnonzero(every)
    lacking = [_NAMES[kind] for kind in needs if not held.known[kind].any()]
    if lacking:
        skipped[name] = f"no sample has {' or '.join(lacking)}"
    else:
        skipped[name] = f"no sample has {' and '.join(_NAMES[kind] for kind in needs)} together"
    return None


def _chance(samples: int) -> float:
    return (math.ceil(top_tenth(samples)) - 1) / samples


# --- classes ---------------------------------------------------------------------------------


def _classes(
    held: Embeddings, skipped: dict[str, str], resamples: int, seed: int
) -> list[ClassScore]:
    names = tuple(sorted(set(held.labels) - {""}))
    if not names:
        return []
    number = {name: c for c, name in enumerate(names)}
    labels = np.array([number.get(label, -1) for label in held.labels], np.int64)
    judge = partial(precision_by_query, names=names, resamples=resamples, seed=seed)
    found: list[ClassScore] = []

    def of(kind: str) -> NDArray[np.int64]:
        return np.flatnonzero(held.known[kind] & (labels >= 0))

    for query, gallery in (("image", "audio"), ("audio", "image")):
        rows, items = of(query), of(gallery)
        right = labels[items] == np.arange(len(names))[:, None]
        if not right.any(axis=1)[labels[rows]].any():
            skipped[f"{query} to {gallery} by class"] = f"no class has both {query} and {gallery}"
            continue
        queries, found_in = held.vectors[query][rows], held.vectors[gallery][items]
        figure = judge(queries, labels[rows], found_in, right)
        found.append(ClassScore(query, gallery, len(rows), len(items), figure))
    silent = [name for name in names if name not in held.classes]
    if silent:
        skipped["class names"] = f"{len(silent)} classes have no vector, e.g. {silent[0]}"
        return found
    prompts = np.stack([held.classes[name] for name in names])
    own = np.eye(len(names), dtype=bool)
    for kind in ("audio", "image"):
        rows = of(kind)
        if not len(rows):
            continue
        vectors = held.vectors[kind][rows]
        forth = precision_by_gallery(
            prompts, vectors, labels[rows], names, resamples=resamples, seed=seed
        )
        back = judge(vectors, labels[rows], prompts, own)
        found.append(ClassScore("class", kind, len(names), len(rows), forth))
        found.append(ClassScore(kind, "class", len(rows), len(names), back))
    return found


def _audible(
    held: Embeddings,
    table: Mapping[str, frozenset[str]],
    skipped: dict[str, str],
    resamples: int,
    seed: int,
) -> AudibleScore | None:
    labels = np.array(held.labels)
    names = tuple(sorted(table))
    number = {name: c for c, name in enumerate(names)}
    images = np.flatnonzero(held.known["image"] & np.isin(labels, names))
    sounds = np.flatnonzero(held.known["audio"] & (labels != ""))
    heard = np.array([[label in table[name] for label in labels[sounds]] for name in names], bool)
    classes = np.array([number[label] for label in labels[images]], np.int64)
    if not len(images) or not len(sounds) or not heard[classes].any():
        skipped["image to audio by what is audible"] = (
            "no image has a class of the table in which one of the labelled recordings is audible"
        )
        return None
    return audible_score(
        held.vectors["image"][images],
        classes,
        held.vectors["audio"][sounds],
        heard,
        names,
        resamples=resamples,
        seed=seed,
    )
