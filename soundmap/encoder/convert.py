"""From a published checkpoint to a model folder: card, safetensors, concepts."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from soundmap.encoder import DEFAULT_MODEL
from soundmap.encoder.bank_files import PROMPTS_FILE
from soundmap.encoder.card import (
    CARD_FILE,
    ModelCard,
    file_sha256,
    installed_root,
    models_root,
    read_card,
)
from soundmap.encoder.checkpoint import SUFFIXES, Checkpoint, plain, read_checkpoint
from soundmap.encoder.mapping import FUSER, map_state
from soundmap.encoder.published import (
    CAVEAT,
    FIELDS,
    IMAGERY,
    LICENCE,
    PATCH_PX,
    TEXT_ENCODER,
    WINDOW_PX,
    Imagery,
    card_input,
    published_as,
    summary,
    training_data,
)
from soundmap.encoder.torch_encoder import WEIGHTS_FILE, model_config
from soundmap.errors import ModelError, OutputError, UsageError

_TEXT_DIM = 1024
_TEMPERATURE = 1000.0
# What a conversion that was killed has left is cleared by a later one.
_LEFTOVER_S = 3600.0
_LONGEST = 200

# Names that checkpoints may hold -> values that would make another network, and what it would be.
# Every other name is of the training alone, or unknown, and harmless.
_REFUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "metadata_fusion": (("late",), "metadata is fused after the codebook"),
    "text_qmap": (("0", "false"), "texts go to the codebook without a query map"),
    "use_combined_projectors": (("1", "true"), "sound and caption share a projector"),
    "shared_codebook": (("0", "false"), "each modality has a codebook of its own"),
}
# Names that checkpoints may hold -> the one value that this package's network stands for.
_REQUIRED: Mapping[str, str] = {
    "text_encoder_type": "flant5",
    "audio_encoder_type": "mgaclap",
    "sat_input_size": str(WINDOW_PX),
}


@dataclass(frozen=True)
class Settings:
    """What the hyper-parameters of a checkpoint say of the network."""

    imagery: Imagery
    dataset: str
    fields: tuple[str, ...]
    """Metadata, in the order of the tokens."""
    token_dim: int
    dim: int
    codes: int

    @property
    def architecture(self) -> dict[str, Any]:
        """The ``architecture`` of the card."""
        return {
            "vit": {
                "window_px": WINDOW_PX,
                "patch_px": PATCH_PX,
                "width": 768,
                "depth": 12,
                "heads": 12,
                "mlp_ratio": 4.0,
            },
            "token_dim": self.token_dim,
            "dim": self.dim,
            "codes": self.codes,
            "temperature": _TEMPERATURE,
            "text_dim": _TEXT_DIM,
            "metadata": list(self.fields),
            "audio": True,
        }


@dataclass(frozen=True)
class ConversionReport:
    """What became of a checkpoint."""

    card: ModelCard
    keys: int
    """Keys that the checkpoint has."""
    used: int
    """Of these, how many are weights of the model now."""
    checked: int
    """How many are constants that were found to be as computed here, and not kept."""
    unused: Mapping[str, tuple[str, ...]]
    """Reason -> keys that were left out for it, whole or in part."""


def convert_checkpoint(
    path: Path,
    out: Path,
    name: str | None = None,
    text_encoder: str = TEXT_ENCODER,
    overwrite: bool = False,
    repository: str | None = None,
) -> ConversionReport:
    """Turn a published checkpoint into a model folder.

    The folder is written beside its place and renamed when it is whole, so a failure leaves
    nothing behind. Weights stay float32, number for number.

    Parameters
    ----------
    path
        The checkpoint, a .ckpt file.
    out
        The folder to make.
    name
        What the model is to be called; by default as the published one that it is, by its file
        name and hyper-parameters, or as the file.
    text_encoder
        The Flan-T5-large that reads texts: its name at the hub, or a folder.
    overwrite
        Whether a model folder that is there may be replaced.
    repository
        Where the file was fetched from, for the card.

    Raises
    ------
    UsageError
        There is no such file, or the name or the text encoder cannot be one.
    ModelError
        The file is not a checkpoint of this architecture, whole and without code.
    OutputError
        The folder cannot be written, or is there already.

    Examples
    --------
    >>> report = convert_checkpoint(Path("bingmap_nometa.ckpt"), Path("bing"))  # doctest: +SKIP
    >>> report.card.name  # doctest: +SKIP
    'sat2sound-bingmap-nometa'
    """
    text_encoder = _check_text_encoder(text_encoder)
    if name is not None:
        _check_name(name)
    out = out.absolute()
    with _told(out):
        _check_target(out, path, overwrite)
    checkpoint = read_checkpoint(path)
    settings = read_settings(checkpoint)
    mapped = map_state(checkpoint, model_config(settings.architecture | {"audio": False}))
    size = sum(tensor.nbytes for tensor in mapped.weights.values())
    with _folder(out, size, overwrite) as folder:
        save_file(
            {key: _packed(tensor) for key, tensor in mapped.weights.items()},
            str(folder / WEIGHTS_FILE),
            metadata={"format": "pt"},
        )
        shutil.copyfile(models_root() / DEFAULT_MODEL / PROMPTS_FILE, folder / PROMPTS_FILE)
        # Its writer lets nobody else read the file; a model may be shared like any other file.
        shutil.copymode(folder / PROMPTS_FILE, folder / WEIGHTS_FILE)
        card = _card(checkpoint, settings, name, text_encoder, repository)
        card["files"] = {WEIGHTS_FILE: file_sha256(folder / WEIGHTS_FILE)}
        text = json.dumps(card, indent=1, ensure_ascii=False)
        (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    return ConversionReport(
        read_card(out), len(checkpoint.state), mapped.used, len(mapped.checked), mapped.unused
    )


def converted(path: Path) -> ModelCard:
    """Give the model of a checkpoint, converted when it is first asked for.

    It is kept among the installed models, under ``converted``, by the digest of the file.

    Raises
    ------
    UsageError
        The file is something else than a checkpoint, by its name.
    ModelError, OutputError
        See `convert_checkpoint`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} is a file: give the folder of a model, or a checkpoint (.ckpt)")
    folder = installed_root() / "converted" / file_sha256(path)[:16]
    if not (folder / CARD_FILE).is_file():
        with _told(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            convert_checkpoint(path, folder)
        except OutputError:
            # Another process may have been asked for the same, and have been faster.
            if not (folder / CARD_FILE).is_file():
                raise
    return read_card(folder)


def read_settings(checkpoint: Checkpoint) -> Settings:
    """Read the hyper-parameters of a checkpoint; numbers may be text.

    Raises
    ------
    ModelError
        One that is needed is missing or unknown, or they state a network that is not supported,
        or another than the weights are of.
    """
    path, given = checkpoint.path, checkpoint.hyper_parameters

    def refuse(key: str, why: str) -> ModelError:
        return ModelError(f"{path}: hyper-parameter {key} = {plain(given[key])}: {why}")

    def needed(key: str) -> str:
        if key not in given:
            raise ModelError(
                f"{path}: its hyper-parameters have no {key}: it is not a Sat2Sound checkpoint"
            )
        return str(given[key]).strip()

    for key, (values, what) in _REFUSED.items():
        if str(given.get(key, "")).strip().lower() in values:
            raise refuse(key, f"a variant that soundmap does not run ({what})")
    for key, value in _REQUIRED.items():
        if key in given and str(given[key]).strip().lower() != value:
            raise refuse(key, f"a variant that soundmap does not run (it runs {value})")

    def size(key: str) -> int:
        text = needed(key)
        if not re.fullmatch(r"\d{1,7}", text) or not int(text):
            raise refuse(key, "must be a positive whole number")
        return int(text)

    sat_type = needed("sat_type")
    if sat_type not in IMAGERY:
        raise refuse("sat_type", f"must be one of {', '.join(IMAGERY)}")
    token_dim = size("fc_dim")
    if token_dim % 8:
        raise refuse("fc_dim", "must be a multiple of 8, the heads of attention")
    settings = Settings(
        imagery=IMAGERY[sat_type],
        dataset=plain(given.get("dataset_type", "not stated")),
        fields=_fields(path, needed("metadata_type")),
        token_dim=token_dim,
        dim=size("codebook_dim"),
        codes=size("codebook_size"),
    )
    fuser = sum(key.startswith(FUSER) for key in checkpoint.state)
    if fuser and not settings.fields:
        raise refuse("metadata_type", f"but the weights hold a metadata fuser ({fuser} keys)")
    if settings.fields and not fuser:
        raise refuse("metadata_type", f"but the weights hold no metadata fuser ({FUSER}*)")
    return settings


def _fields(path: Path, text: str) -> tuple[str, ...]:
    """Read the fields of metadata, which the published code looks for as parts of the text."""
    if text.lower() == "none":
        return ()
    fields = tuple(field for field in FIELDS if field in text)
    if not fields:
        raise ModelError(
            f"{path}: hyper-parameter metadata_type = {plain(text)}: must be none, or name some of "
            f"{', '.join(FIELDS)}"
        )
    return fields


def _card(
    checkpoint: Checkpoint,
    settings: Settings,
    name: str | None,
    text_encoder: str,
    repository: str | None,
) -> dict[str, Any]:
    imagery, fields = settings.imagery, settings.fields
    known = published_as(checkpoint.path.name, imagery.sat_type, fields)
    data = training_data(imagery)
    if settings.dataset != imagery.dataset.name:
        data = [{"name": settings.dataset, "use": "training", "licence": "not known"}]
        known = None
    if name is None:
        name = known.name if known else plain(checkpoint.path.stem)
    card: dict[str, Any] = {
        "name": name,
        "summary": summary(imagery, fields),
        "licence": LICENCE,
        "architecture": settings.architecture,
        "input": card_input(imagery, fields),
        "text": {"encoder": text_encoder},
        "source": {
            "file": known.file if known else checkpoint.path.name,
            "sha256": checkpoint.sha256,
            "repository": repository,
            "hyper_parameters": {
                plain(key): _as_json(value) for key, value in checkpoint.hyper_parameters.items()
            },
        },
        "data": data,
    }
    if known:
        card["figures"], card["figures_note"] = known.figures, CAVEAT
    return card


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int) or _is_finite(value):
        return value
    return plain(value, _LONGEST)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _packed(tensor: Tensor) -> Tensor:
    """Make sure that a tensor is alone in its memory, as the file format asks; most are."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-][\w. -]{0,99}", name) or name.strip(". ") != name:
        raise UsageError(
            f"{plain(name)!r} cannot be a model's name: use letters, digits, dots and hyphens"
        )


def _check_text_encoder(name: str) -> str:
    if name and Path(name).is_dir():
        return str(Path(name).absolute())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise UsageError(
            f"--text-encoder {plain(name)}: no such folder, and not a name at the hub such as "
            f"{TEXT_ENCODER}"
        )
    return name


# --- the folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say in one line why a folder cannot be written."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or plain(error)
        raise OutputError(f"{out}: cannot be written ({reason}): choose another folder") from error


def _check_target(out: Path, path: Path, overwrite: bool) -> None:
    parent = out.parent
    if parent == installed_root():
        parent.mkdir(parents=True, exist_ok=True)
    if not parent.is_dir():
        raise OutputError(f"{out}: folder {parent} does not exist: make it or choose another")
    if not (out.exists() or out.is_symlink()) or _is_empty(out):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already: add --overwrite or choose another folder")
    if out.is_symlink() or not (out / CARD_FILE).is_file():
        raise OutputError(
            f"{out}: is not a model folder, so it is left alone: choose another folder"
        )
    if path.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out}: holds the checkpoint itself: choose another folder")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


@contextlib.contextmanager
def _folder(out: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside ``out`` that takes its place when it is whole, or goes."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        with _told(out):
            _clear_leftovers(out)
            free = shutil.disk_usage(out.parent).free
            if free < size:
                raise OutputError(
                    f"{out}: the model takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free "
                    "there: make room or choose another disk"
                )
            folder.mkdir()
            yield folder
            _put_in_place(folder, out, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, out: Path, overwrite: bool) -> None:
    if _is_empty(out):
        out.rmdir()
    if not out.exists():
        os.rename(folder, out)
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already: add --overwrite or choose another folder")
    # A folder cannot replace a folder in one step: the old one steps aside first.
    aside = folder.with_suffix(".old.part")
    os.rename(out, aside)
    try:
        os.rename(folder, out)
    except BaseException:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Remove what conversions have left that were killed."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        if time.time() - left.stat().st_mtime > _LEFTOVER_S:
            shutil.rmtree(left, ignore_errors=True)
