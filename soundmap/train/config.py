"""What a training run is told: its settings, and how they are read from a model.toml."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from soundmap.errors import InputError
from soundmap.nn.model import ModelConfig
from soundmap.products.samples.config import read_toml

KeepBest = Literal["loss", "i2s_recall", "s2i_recall", "i2st_recall", "i2c_recall"]
"""What tells the best model: the loss; images finding recordings, recordings finding images,
images finding recordings with their captions, images finding their own captions."""
Precision = Literal["auto", "float32", "bfloat16"]
T = TypeVar("T")


@dataclass(frozen=True)
class TextSettings:
    """The frozen encoder that turns texts into tokens."""

    encoder: str = ""
    """A model of soundmap with token vectors, by name or folder, whose tokeniser and vectors are
    taken; or a T5, by its name at the hub or its folder. Empty: that of ``start``."""
    cache_mb: int = 2048
    """Memory for token states of texts that come again."""


@dataclass(frozen=True)
class InputSettings:
    """What is made of a sample."""

    zooms: tuple[int, ...] = (1, 3, 5)
    """Crops are this many native tiles wide; drawn per sample."""
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.2
    flips: bool = False
    """Whether images are also turned and mirrored. The published model was trained without."""
    mask_frames: int = 0
    """Two stripes of the spectrogram, each less than this many frames long, are blotted out.
    The published model: 64."""
    mask_bands: int = 0
    """The same across frequencies. The published model: 8."""


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, as the published model was trained."""

    lr: float = 5e-5
    weight_decay: float = 0.2
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-8
    decay: Literal["all", "matrices"] = "all"
    """Which weights decay: all, or none of the norms, biases and scales."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this norm; 0: never."""


@dataclass(frozen=True)
class ScheduleSettings:
    """The course of the learning rate, set anew for every step."""

    warmup_steps: int = 0
    """Steps of a linear rise before the first cosine."""
    restart_steps: int = 0
    """Length of a cosine, after which the rate jumps back; 0: one cosine over the whole run."""
    lowest: float = 0.0
    """Where a cosine ends, as a part of the rate."""


@dataclass(frozen=True)
class LossSettings:
    """Weights of the objective's terms, see `soundmap.train.objective`."""

    alpha: float = 0.1
    """Of pseudo-matches, in every term."""
    fdt_weight: float = 1.0
    """Of image with image caption."""
    combined: bool = True
    """Whether image with recording and caption together counts."""
    largest_scale: float = 0.0
    """The learned scales are held at or below this; 0: not held, as in the published training."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how much at once, and how it is kept."""

    batch: int = 128
    """Samples that are contrasted with each other, per process."""
    accumulate: int = 1
    """A batch goes through the network in this many parts, one after the other; see
    `soundmap.train.objective.backward`. The gradients are those of the whole batch."""
    epochs: int = 20
    steps: int = 0
    """Ends after this many steps, whatever the epochs; needed where the length of the data is not
    known."""
    seed: int = 56
    metadata_dropout: float = 0.5
    """Share of a batch for which each field of metadata is hidden."""
    precision: Precision = "auto"
    device: str = "auto"
    threads: int = 0
    """Of torch; 0: as many as torch takes by itself."""
    workers: int = 4
    """Threads that read samples."""
    buffer: int = 1000
    """Samples of a stream that the next one is drawn from; all are held in memory."""
    save_every: int = 500
    """Steps from one checkpoint to the next."""
    most_bad: float = 0.2
    """The run ends if more than this share of rows cannot be read."""


@dataclass(frozen=True)
class ValidationSettings:
    """When and how a model is judged on the way."""

    every: int = 0
    """Steps from one validation to the next; 0: one at the end of every epoch."""
    batch: int = 100
    """Samples per batch, within which the loss contrasts."""
    limit: int = 0
    """Only this many samples, evenly spread; 0: all."""
    keep: KeepBest = "loss"
    patience: int = 0
    """The run ends after this many validations that are no better than the best; 0: never."""
    metadata_dropout: float = 0.0
    """The published training had its 0.5 here as well."""


@dataclass(frozen=True)
class Settings:
    """Everything that a model.toml says of a run."""

    name: str = "model"
    summary: str = ""
    licence: str = "not stated"
    start: str = ""
    """Model to go on from: a name, a folder, or a published checkpoint. Empty: from scratch."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that stay as they are, by the beginning of their weights' names."""
    concepts: str = ""
    """Concept file for the finished model's bank; empty: the default concepts."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The architecture as the file gives it, see `soundmap.train.start.build`."""
    text: TextSettings = TextSettings()
    input: InputSettings = InputSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    training: TrainingSettings = TrainingSettings()
    validation: ValidationSettings = ValidationSettings()


def read_settings(path: Path) -> Settings:
    """Read and check a model.toml. Files and folders that it names may lie beside it.

    Raises
    ------
    InputError
        It cannot be read, has a key that nobody knows, or a value that cannot be used. The message
        names file and key.
    """
    settings = settings_from(read_toml(path), str(path))

    def beside(name: str) -> str:
        """A path that is there beside the file; else the name as it is."""
        return str(path.parent / name) if name and (path.parent / name).exists() else name

    text = dataclasses.replace(settings.text, encoder=beside(settings.text.encoder))
    return dataclasses.replace(
        settings, start=beside(settings.start), concepts=beside(settings.concepts), text=text
    )


def settings_from(table: Mapping[str, Any], where: str = "settings") -> Settings:
    """Make settings of a parsed table; ``where`` names it in errors.

    Raises
    ------
    InputError
        See `read_settings`.
    """
    settings = from_table(Settings, table, where)
    _check(settings, where)
    return settings


def model_table(table: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the architecture of a model from its table.

    Raises
    ------
    InputError
        A key is unknown or a value of another kind.
    """
    return from_table(ModelConfig, table, f"{where}, [model]")


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a dataclass of a table, by the types of its fields.

    Raises
    ------
    InputError
        A key is unknown or a value of another kind.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            raise InputError(f"{where}: unknown key {key!r}: {advice}")
        values[key] = _value(hints[key], value, f"{where}, {key}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: must be a table, not {value!r}")
        return from_table(hint, value, where)  # type: ignore[arg-type]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: must be a list, not {value!r}")
        return tuple(_value(parts[0], one, where) for one in value)
    if origin is Literal:
        if value not in parts:
            raise InputError(f"{where}: must be one of {', '.join(parts)}, not {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint in plain and (type(value) is not hint):
        raise InputError(f"{where}: must be {plain[hint]}, not {value!r}")
    if origin is not None and isinstance(value, Mapping):
        return dict(value)
    return value


def _check(settings: Settings, where: str) -> None:
    """Refuse numbers that make no sense."""
    s = settings
    t, v, o = s.training, s.validation, s.optimiser

    def need(fine: bool, key: str, what: str, value: Any) -> None:
        if not fine:
            raise InputError(f"{where}, {key}: must be {what}, not {value!r}")

    need(bool(s.input.zooms) and all(z >= 1 for z in s.input.zooms), "input, zooms", "a list of "
         "whole numbers from 1", list(s.input.zooms))  # fmt: skip
    jitter = (s.input.brightness, s.input.contrast, s.input.saturation)
    need(all(0 <= j <= 1 for j in jitter), "input, brightness, contrast, saturation",
         "from 0 to 1", jitter)  # fmt: skip
    need(0 <= s.input.hue <= 0.5, "input, hue", "from 0 to 0.5", s.input.hue)
    need(o.lr > 0, "optimiser, lr", "above 0", o.lr)
    need(len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "optimiser, betas",
         "two numbers from 0 to below 1", list(o.betas))  # fmt: skip
    need(t.batch >= 2, "training, batch", "at least 2, or nothing can be contrasted", t.batch)
    need(1 <= t.accumulate <= t.batch and t.batch % t.accumulate == 0, "training, accumulate",
         f"a divisor of the batch ({t.batch})", t.accumulate)  # fmt: skip
    need(t.epochs >= 1, "training, epochs", "at least 1", t.epochs)
    for key, number in (
        ("optimiser, weight_decay", o.weight_decay),
        ("optimiser, clip_norm", o.clip_norm),
        ("schedule, warmup_steps", s.schedule.warmup_steps),
        ("schedule, restart_steps", s.schedule.restart_steps),
        ("schedule, lowest", s.schedule.lowest),
        ("loss, alpha", s.loss.alpha),
        ("loss, fdt_weight", s.loss.fdt_weight),
        ("training, steps", t.steps),
        ("training, seed", t.seed),
        ("training, threads", t.threads),
        ("validation, every", v.every),
        ("validation, limit", v.limit),
        ("validation, patience", v.patience),
    ):
        need(number >= 0, key, "0 or more", number)
    need(t.workers >= 1, "training, workers", "at least 1", t.workers)
    need(t.buffer >= 1, "training, buffer", "at least 1", t.buffer)
    need(t.save_every >= 1, "training, save_every", "at least 1", t.save_every)
    need(v.batch >= 2, "validation, batch", "at least 2", v.batch)
    for key, share in (
        ("training, metadata_dropout", t.metadata_dropout),
        ("training, most_bad", t.most_bad),
        ("validation, metadata_dropout", v.metadata_dropout),
    ):
        need(0 <= share <= 1, key, "a share from 0 to 1", share)
