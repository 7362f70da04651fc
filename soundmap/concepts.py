"""From names, files and free phrases to a concept bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder import Encoder, ModelCard
from soundmap.encoder.bank_files import (
    PROMPTS_FILE,
    Calibration,
    Concept,
    has_bank,
    read_bank,
    read_concepts,
    read_generic,
)
from soundmap.errors import UsageError
from soundmap.scoring import GENERIC, NONE, ConceptBank, find_name, join_banks

FREE_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#d6616b", "#8c6d31", "#17becf")


def concept_vectors(encoder: Encoder, concepts: Sequence[Concept]) -> NDArray[np.float32]:
    """Embed concepts: the mean over a concept's prompts, and that over its clips, unit vectors.

    A concept that has both is their sum, made a unit vector again: so the published model's
    evaluation adds a text to a sound (arXiv 2505.13777).

    Returns
    -------
    ndarray
        float32[C, D].
    """
    total = np.zeros((len(concepts), encoder.dim), np.float32)
    kinds: tuple[tuple[list[tuple[str, ...]], Callable[[list[str]], NDArray[np.float32]]], ...] = (
        ([c.prompts for c in concepts], encoder.encode_text),
        ([c.clips for c in concepts], lambda clips: encoder.encode_audio(clips)),
    )
    for parts, encode in kinds:
        every = [one for part in parts for one in part]
        if not every:
            continue
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for row, vectors in zip(total, np.split(encode(every), ends), strict=True):
            if len(vectors):
                row += _unit(vectors.mean(axis=0))
    return _unit(total)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
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
    audio: Sequence[str] = (),
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
        file, or None: the whole default bank, unless ``text`` or ``audio`` is given.
    text
        Free phrases; each is named by itself and takes the bank's generic calibration.
    audio
        Sound files, each ``FILE`` or ``NAME=FILE``; a file without a name has its own. One that has
        the name of a phrase is added to it.

    Raises
    ------
    UsageError
        A name is unknown, a phrase is empty or given twice.
    InputError
        The concept file or a sound file cannot be used.
    """
    parts: list[ConceptBank] = []
    if concepts is not None:
        parts.append(_named(encoder, card, detail, concepts))
    elif not text and not audio:
        parts.append(_default(encoder, card, detail, None))
    if text or audio:
        free = _free_concepts(text, audio)
        parts.append(bank_of(encoder, free, read_generic(card, detail)))
    bank = parts[0]
    for other in parts[1:]:
        bank = join_banks(bank, other)
    return bank


def _free_concepts(text: Sequence[str], audio: Sequence[str]) -> list[Concept]:
    phrases = [" ".join(phrase.split()) for phrase in text]
    if not all(phrases):
        raise UsageError("--text is empty: give a phrase, for example --text 'church bells'")
    if len({c.casefold() for c in phrases}) < len(phrases):
        raise UsageError("--text gives the same phrase twice")
    names = {phrase.casefold(): phrase for phrase in phrases}
    prompts: dict[str, tuple[str, ...]] = {phrase: (phrase,) for phrase in phrases}
    clips: dict[str, tuple[str, ...]] = {}
    for given in audio:
        name, path = _named_clip(given)
        name = names.setdefault(name.casefold(), name)
        clips[name] = (*clips.get(name, ()), path)
    return [
        Concept(
            name,
            "text" if name in prompts else "audio",
            FREE_COLOURS[i % len(FREE_COLOURS)],
            prompts.get(name, ()),
            clips.get(name, ()),
        )
        for i, name in enumerate(names.values())
    ]


def _named_clip(given: str) -> tuple[str, str]:
    """Take NAME=FILE apart; a file that is there may have the sign in its own name."""
    name, sign, path = given.partition("=")
    if not sign or Path(given).exists():
        name, path = Path(given).stem, given
    name = " ".join(name.split())
    if not name or not path.strip():
        raise UsageError(f"--audio {given!r}: give a sound file, or NAME=FILE")
    return name, path


def _default(
    encoder: Encoder, card: ModelCard, detail: str, names: Sequence[str] | None
) -> ConceptBank:
    """Take the model's bank or some of it; made now, without calibration, if there is none."""
    if has_bank(card):
        bank = read_bank(card, detail)
        return bank if names is None else bank.select(names)
    known = read_concepts(card.folder / PROMPTS_FILE)
    if names is not None:
        rows = [find_name([c.name for c in known], name) for name in names]
        known = tuple(known[i] for i in rows)
    return bank_of(encoder, known, None)


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
    return _default(encoder, card, detail, names)
