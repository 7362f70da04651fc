"""Whether phrases that a model never met find the land cover that they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soundmap.encoder import Encoder
from soundmap.errors import InputError
from soundmap.products.evaluate import as_windows
from soundmap.products.labelled import LabelledImages

FILE = "free_text.json"
"""Name of the list of phrases in a model's folder."""


@dataclass(frozen=True)
class FreePhrase:
    """A phrase and where it belongs."""

    text: str
    dataset: str
    right: tuple[str, ...]
    """Classes of the data set, any of which is right."""


@dataclass(frozen=True)
class PhraseResult:
    """Where a phrase led."""

    phrase: FreePhrase
    found: str
    """Class whose images are the most similar on average."""
    place: int
    """Place of the first right class among all, 1 for the first."""

    @property
    def hit(self) -> bool:
        """Whether a right class comes first."""
        return self.place == 1


def read_free_text(path: Path) -> tuple[FreePhrase, ...]:
    """Read a list of phrases.

    Raises
    ------
    InputError
        The file is missing or is no such list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["phrases"]
        return tuple(FreePhrase(e["text"], e["set"], tuple(e["right"])) for e in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} is no list of phrases: it needs {{"phrases": [{{"text", "set", "right"}}]}} '
            f"({error!r})"
        ) from error


def evaluate_free_text(
    encoder: Encoder, sets: Sequence[LabelledImages], phrases: Sequence[FreePhrase]
) -> tuple[PhraseResult, ...]:
    """Rank the classes of each phrase's data set by their images' mean similarity to it.

    Raises
    ------
    InputError
        A phrase names a data set or a class that there is not.
    """
    results: dict[FreePhrase, PhraseResult] = {}
    for data in sets:
        own = [p for p in phrases if p.dataset == data.name]
        strange = {c for p in own for c in p.right} - set(data.classes)
        if strange:
            raise InputError(f"{data.name} has no class {', '.join(sorted(strange))}")
        if not own:
            continue
        pixels, told_m = as_windows(data, encoder)
        image = encoder.encode_images(pixels, gsd_m=told_m, details=("image",)).image
        assert image is not None
        similarity = image @ encoder.encode_text([p.text for p in own]).T
        there = np.unique(data.labels)
        means = np.stack([similarity[data.labels == k].mean(axis=0) for k in there])
        for phrase, column in zip(own, means.T, strict=True):
            order = [data.classes[there[k]] for k in np.argsort(-column, kind="stable")]
            place = 1 + min(order.index(c) for c in phrase.right if c in order)
            results[phrase] = PhraseResult(phrase, order[0], place)
    lost = [p.dataset for p in phrases if p not in results]
    if lost:
        raise InputError(f"there are no images of {lost[0]!r} to judge phrases on")
    return tuple(results[p] for p in phrases)
