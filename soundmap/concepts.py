"""From names, files and free phrases to a concept bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder import Encoder, ModelCard
from soundmap.encoder.bank_files import (
    Calibration,
    Concept,
    read_bank,
    read_concepts,
    read_generic,
)
from soundmap.errors import UsageError
from soundmap.scoring import GENERIC, NONE, ConceptBank, join_banks

FREE_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#d6616b", "#8c6d31", "#17becf")


def concept_vectors(encoder: Encoder, concepts: Sequence[Concept]) -> NDArray[np.float32]:
    """Embed concepts: the mean over a concept's prompts, made a unit vector again.

    Returns
    -------
    ndarray
        float32[C, D].
    """
    prompts = [p for c in concepts for p in c.prompts]
    every = encoder.encode_text(prompts)
    ends = np.cumsum([len(c.prompts) for c in concepts])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(every, ends)])
    unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit.astype(np.float32)


def bank_of(
    encoder: Encoder, concepts: Sequence[Concept], generic: Calibration | None
) -> ConceptBank:
    """Make a bank of concepts that have no calibration of their own."""
    count = len(concepts)
    scale, bias = (generic.scale, generic.bias) if generic else (np.nan, np.nan)
    return ConceptBank(
        names=tuple(c.name for c in concepts),
        groups=tuple(c.group for c in concepts),
        colours=tuple(c.colour for c in concepts),
        vectors=concept_vectors(encoder, concepts),
        scale=np.full(count, scale, np.float32),
        bias=np.full(count, bias, np.float32),
        calibration=(GENERIC if generic else NONE,) * count,
        share_scale=encoder.share_scale,
        encoder_id=encoder.id,
    )


def choose_concepts(
    encoder: Encoder,
    card: ModelCard,
    detail: str,
    concepts: str | Sequence[str] | None,
    text: Sequence[str],
) -> ConceptBank:
    """Make the bank of a map.

    Parameters
    ----------
    encoder, card
        The model.
    detail
        "patch" or "image": which calibration.
    concepts
        Names of the model's bank (a sequence, or one string with commas), the path of a concept
        file, or None: the whole default bank, unless ``text`` is given.
    text
        Free phrases; each is named by itself and takes the bank's generic calibration.

    Raises
    ------
    UsageError
        A name is unknown, a phrase is empty or given twice.
    InputError
        The concept file cannot be used.
    """
    parts: list[ConceptBank] = []
    if concepts is not None:
        parts.append(_named(encoder, card, detail, concepts))
    elif not text:
        parts.append(read_bank(card, detail))
    if text:
        cleaned = [" ".join(phrase.split()) for phrase in text]
        if not all(cleaned):
            raise UsageError("--text is empty: give a phrase, for example --text 'church bells'")
        if len({c.casefold() for c in cleaned}) < len(cleaned):
            raise UsageError("--text gives the same phrase twice")
        free = [
            Concept(phrase, "text", FREE_COLOURS[i % len(FREE_COLOURS)], (phrase,))
            for i, phrase in enumerate(cleaned)
        ]
        parts.append(bank_of(encoder, free, read_generic(card, detail)))
    bank = parts[0]
    for other in parts[1:]:
        bank = join_banks(bank, other)
    return bank


def _named(
    encoder: Encoder, card: ModelCard, detail: str, concepts: str | Sequence[str]
) -> ConceptBank:
    if isinstance(concepts, str):
        path = Path(concepts)
        if path.is_file():
            own = read_concepts(path)
            return bank_of(encoder, own, read_generic(card, detail))
        if path.suffix.lower() in (".json", ".txt", ".csv"):
            raise UsageError(f"the concept file {concepts} does not exist")
        names = [name.strip() for name in concepts.split(",") if name.strip()]
    else:
        names = list(concepts)
    if not names:
        raise UsageError("--concepts names no concept: give names with commas between, or a file")
    twice = {n for n in names if [m.casefold() for m in names].count(n.casefold()) > 1}
    if twice:
        raise UsageError(f"--concepts names {sorted(twice)[0]!r} twice")
    return read_bank(card, detail).select(names)
