"""The model that a run begins with: fresh, or one that is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from soundmap.encoder.card import CARD_FILE, ModelCard, find_model, models_root
from soundmap.encoder.flan import FlanText
from soundmap.encoder.text import StaticText, TextTokens
from soundmap.encoder.torch_encoder import (
    TEXT_TABLE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    model_config,
    read_weights,
)
from soundmap.errors import InputError, MissingExtra, ModelError
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.train.config import Settings, model_table

# Parts that a model may gain or lose when training goes on from it.
_PARTS = ("audio.", "scales.", "fuser.")
_CHANGEABLE = ("audio", "audio_tower", "metadata")


@dataclass(frozen=True)
class TextSide:
    """The frozen encoder of texts, and what of it goes into the finished model's folder."""

    tokens: TextTokens
    name: str
    """As the card names it."""
    tokenizer: Path | None = None
    """The tokeniser's file, for token vectors."""
    table: NDArray[np.float16] | None = None
    """The token vectors themselves; None: texts are left to another model."""


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    model: SoundModel
    text: TextSide
    card: ModelCard | None
    """Of the model that training goes on from."""


def build(settings: Settings, where: str = "model.toml") -> Start:
    """Make the model of a run, on the processor.

    From scratch the architecture is the ``[model]`` table: the fields of
    `soundmap.nn.model.ModelConfig`. Going on from a model, the table may only say which of its
    audio tower and metadata to add or leave out; what is added has fresh weights.

    Raises
    ------
    InputError
        The settings cannot be used together.
    UsageError, ModelError
        The model to start from is unknown or damaged.
    MissingExtra
        The published audio tower is asked for, and its library is not installed.
    """
    card = find_model(settings.start) if settings.start else None
    config = _config(settings, card, where)
    text = _text_side(settings, card, config, where)
    torch.manual_seed(settings.training.seed)
    try:
        model = SoundModel(config)
    except ImportError as error:
        raise MissingExtra("transformers", "sat2sound", "the published audio tower") from error
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{where}, [model]: no such network can be made: {error}") from error
    if card is not None:
        _load(model, card)
    freeze(model, settings.freeze, where)
    return Start(model, text, card)


def _config(settings: Settings, card: ModelCard | None, where: str) -> ModelConfig:
    if card is None:
        if not settings.model:
            raise InputError(
                f"{where}: needs a table [model] with the architecture, or start = 'NAME' to go "
                "on from a model"
            )
        return model_table(settings.model, where)
    other = [key for key in settings.model if key not in _CHANGEABLE]
    if other:
        raise InputError(
            f"{where}, [model]: {other[0]} is settled by start = {settings.start!r}: only "
            f"{', '.join(_CHANGEABLE)} can be given beside it"
        )
    given = model_table(settings.model, where)
    changes = {key: getattr(given, key) for key in settings.model}
    return replace(model_config(dict(card.architecture)), **changes)


def _load(model: SoundModel, card: ModelCard) -> None:
    state = read_weights(card.folder / WEIGHTS_FILE, lambda name: name != TEXT_TABLE)
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state and not k.startswith(_PARTS)]
    extra = [k for k in state if k not in wanted and not k.startswith(_PARTS)]
    other = [k for k, v in state.items() if k in wanted and v.shape != wanted[k].shape]
    if missing or extra or other:
        raise ModelError(
            f"{card.folder / WEIGHTS_FILE} does not fit its card: {(missing + extra + other)[0]}"
        )
    kept: dict[str, Tensor] = {k: v for k, v in state.items() if k in wanted}
    model.load_state_dict(kept, strict=False)


def _text_side(
    settings: Settings, card: ModelCard | None, config: ModelConfig, where: str
) -> TextSide:
    name = settings.text.encoder
    source = card if not name else _model_called(name)
    if source is not None:
        static = _static(source)
        if static is not None:
            width = static.table.shape[1] if static.table is not None else 0
            if width != config.text_dim:
                raise InputError(
                    f"{where}: the token vectors of {source.name} have {width} numbers and "
                    f"model.text_dim is {config.text_dim}: they must be the same"
                )
            return static
        name = str(source.data.get("text", {}).get("encoder", ""))
    if not name:
        raise InputError(
            f"{where}: needs [text] encoder = a model with token vectors (soundmap-small), or a "
            "T5 (google/flan-t5-large)"
        )
    return TextSide(FlanText(name, config.text_dim), name)


def _model_called(name: str) -> ModelCard | None:
    """The model of soundmap of a name or folder; None if it must be a T5."""
    if (Path(name) / CARD_FILE).is_file() or (models_root() / name / CARD_FILE).is_file():
        return find_model(name)
    return None


def _static(card: ModelCard) -> TextSide | None:
    found = read_weights(card.folder / WEIGHTS_FILE, lambda name: name == TEXT_TABLE)
    if TEXT_TABLE not in found:
        return None
    table = found[TEXT_TABLE].numpy()
    path = card.folder / TOKENIZER_FILE
    return TextSide(StaticText.load(path, table), card.name, path, table)


def freeze(model: nn.Module, parts: tuple[str, ...], where: str = "model.toml") -> None:
    """Exclude parts of a model from training, by the beginning of their weights' names.

    Raises
    ------
    InputError
        No weight begins like that, or none is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(_is_in(name, part) for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise InputError(f"{where}, freeze: the model has no part {part!r} (it has {known})")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(_is_in(name, part) for part in parts))
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"{where}, freeze: nothing is left to train")


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def set_training(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Put a model into training mode, but for what is frozen: its norms keep their statistics."""
    model.train()
    for name, module in model.named_modules():
        if name and any(_is_in(name, part) for part in parts):
            module.eval()
