"""Reading and writing concept banks, and the concept files that users bring."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from soundmap.encoder.card import ModelCard
from soundmap.errors import InputError, ModelError
from soundmap.scoring import GENERIC, NONE, PLATT, ConceptBank

PROMPTS_FILE = "concepts.json"
BANK_FILE = "concepts.safetensors"
DEFAULT_COLOUR = "#8c8c8c"


@dataclass(frozen=True)
class Concept:
    """A named sound with the phrases and recordings that stand for it."""

    name: str
    group: str
    colour: str
    prompts: tuple[str, ...]
    clips: tuple[str, ...] = ()
    """Paths of sound files."""


@dataclass(frozen=True)
class Calibration:
    """Slope and offset of a phrase without its own calibration."""

    scale: float
    bias: float


def read_concepts(path: Path) -> tuple[Concept, ...]:
    """Read a concept file.

    JSON: ``{"concepts": [{"name", "prompts", "clips", "group", "colour"}, ...]}`` or the bare list,
    where ``prompts`` defaults to the name unless there are ``clips``, sound files beside the
    concept file. Any other file is text, one concept a line:
    ``name`` or ``name: prompt; prompt``; ``#`` starts a comment.

    Raises
    ------
    InputError
        The file cannot be read, or holds no concept, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a concept file: {error}") from error
    if path.suffix.lower() == ".json":
        concepts = _from_json(path, text)
    else:
        concepts = []
        for line in text.splitlines():
            name, _, rest = line.split("#", 1)[0].partition(":")
            prompts = tuple(p.strip() for p in rest.split(";") if p.strip())
            if name.strip():
                name = name.strip()
                concepts.append(Concept(name, "text", DEFAULT_COLOUR, prompts or (name,)))
    if not concepts:
        raise InputError(f"{path} holds no concept: write one name a line, or JSON (see the docs)")
    seen: set[str] = set()
    for concept in concepts:
        if concept.name.casefold() in seen:
            raise InputError(f"{path} names the concept {concept.name!r} twice")
        seen.add(concept.name.casefold())
    return tuple(concepts)


def _from_json(path: Path, text: str) -> list[Concept]:
    try:
        data: Any = json.loads(text)
        entries = data["concepts"] if isinstance(data, dict) else data
        return [_from_entry(entry, path.parent) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{path} is not a concept file: it needs {{"concepts": [{{"name": ..., '
            f'"prompts": [...]}}]}} ({error!r})'
        ) from error


def _from_entry(entry: dict[str, Any], folder: Path) -> Concept:
    name, clips = str(entry["name"]).strip(), entry.get("clips", [])
    prompts = entry.get("prompts", [] if clips else [entry["name"]])
    # A text is a sequence, too: its letters would become the prompts.
    if not isinstance(prompts, list) or not isinstance(clips, list):
        raise TypeError(f"the prompts or clips of {name!r} are not a list")
    prompts = tuple(str(p).strip() for p in prompts)
    if not name or not (prompts or clips) or not all((*prompts, *clips)):
        raise ValueError(f"{name!r} has an empty name, or no prompts, or an empty one")
    colour = str(entry.get("colour", DEFAULT_COLOUR))
    files = tuple(str(folder / str(clip)) for clip in clips)
    return Concept(name, str(entry.get("group", "text")), colour, prompts, files)


def read_bank(card: ModelCard, detail: str) -> ConceptBank:
    """Read the default bank of a model, calibrated for one detail.

    Raises
    ------
    ModelError
        The model has no bank, or it was made for other weights.
    """
    path = card.folder / BANK_FILE
    if not path.is_file():
        raise ModelError(f"the model {card.name} has no concept bank ({BANK_FILE}): use --text")
    concepts = read_concepts(card.folder / PROMPTS_FILE)
    made_for, arrays = _read_arrays(path)
    if made_for != card.hash:
        raise ModelError(
            f"{path} was made for other weights than those beside it: make the bank again"
        )
    if len(concepts) != len(arrays["vectors"]):
        raise ModelError(
            f"{path} holds {len(arrays['vectors'])} concepts but {PROMPTS_FILE} names "
            f"{len(concepts)}: make the bank again"
        )
    has_own = np.isfinite(arrays[f"{detail}.scale"])
    return ConceptBank(
        names=tuple(c.name for c in concepts),
        groups=tuple(c.group for c in concepts),
        colours=tuple(c.colour for c in concepts),
        vectors=arrays["vectors"],
        scale=arrays[f"{detail}.scale"],
        bias=arrays[f"{detail}.bias"],
        calibration=tuple(PLATT if own else NONE for own in has_own),
        share_scale=float(arrays["share_scale"][0]),
        encoder_id=card.hash,
    )


def has_bank(card: ModelCard) -> bool:
    """Tell whether a model has a bank of its own, with vectors and calibration."""
    return (card.folder / BANK_FILE).is_file()


def read_generic(card: ModelCard, detail: str) -> Calibration | None:
    """Read the calibration for phrases without their own; None if the model has none."""
    path = card.folder / BANK_FILE
    if not has_bank(card):
        return None
    scale, bias = _read_arrays(path)[1][f"{detail}.generic"]
    return Calibration(float(scale), float(bias))


def _read_arrays(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            made_for = (file.metadata() or {}).get("encoder_id", "")
            return made_for, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}): install the model again") from error


def write_bank(folder: Path, encoder_id: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a bank's arrays: vectors, share_scale, and per detail scale, bias and generic."""
    save_file(arrays, str(folder / BANK_FILE), metadata={"encoder_id": encoder_id})


__all__ = [
    "BANK_FILE",
    "GENERIC",
    "PROMPTS_FILE",
    "Calibration",
    "Concept",
    "has_bank",
    "read_bank",
    "read_concepts",
    "read_generic",
    "write_bank",
]
