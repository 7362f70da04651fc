"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder of two files, written under another name and renamed when it is whole, so
that the last one by name is always good. The order of samples and all that is drawn at random
follow from the seed and the step, so no state of a random generator is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soundmap.errors import ModelError, OutputError

CHECKPOINTS = "checkpoints"
BEST_FILE = "best.safetensors"
_WEIGHTS = "weights.safetensors"
_STATE = "state.pt"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Steps that are done."""
    best: float | None = None
    """Best figure of validation so far; the lower the better."""
    best_step: int = 0
    waited: int = 0
    """Validations since then."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Term -> steps without it, for want of rows."""
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, reason and detail of rows that could not be used."""


def save_checkpoint(
    out: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint and clear older ones.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    folder = out / CHECKPOINTS / f"step-{progress.step:09d}"
    part = folder.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _save_weights(model, part / _WEIGHTS)
        torch.save(
            {"optimiser": optimiser.state_dict(), "progress": asdict(progress)}, part / _STATE
        )
        for name in (_WEIGHTS, _STATE):
            _flush(part / name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}): make room") from error


def last_checkpoint(out: Path) -> Path | None:
    """Find the last whole checkpoint of a run."""
    found = sorted((out / CHECKPOINTS).glob("step-?????????"))
    return found[-1] if found else None


def load_checkpoint(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> Progress:
    """Put weights and the optimiser's state back.

    Raises
    ------
    ModelError
        The checkpoint is damaged.
    """
    try:
        load_weights(model, folder / _WEIGHTS, device)
        state = torch.load(folder / _STATE, map_location=device, weights_only=True)
        optimiser.load_state_dict(state["optimiser"])
        return Progress(**state["progress"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{folder} is damaged ({reason}): start anew with --overwrite") from error


def _save_weights(model: nn.Module, path: Path, facts: Mapping[str, str] | None = None) -> None:
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt", **(facts or {})})


def load_weights(model: nn.Module, path: Path, device: torch.device) -> None:
    """Fill a model from a file of weights."""
    model.load_state_dict(load_file(str(path), device=str(device)))


def save_best(
    out: Path, model: nn.Module, progress: Progress, figures: Mapping[str, float]
) -> None:
    """Keep the weights of the best validation so far, and its figures, whole or not at all."""
    path = out / BEST_FILE
    part = path.with_suffix(".part")
    try:
        _save_weights(
            model, part, {"step": str(progress.step), "figures": json.dumps(dict(figures))}
        )
        _flush(part)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): make room") from error


def read_best(out: Path) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """Weights and figures of the best validation; None if nothing was ever validated.

    Raises
    ------
    ModelError
        The file is damaged.
    """
    path = out / BEST_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return state, json.loads(file.metadata()["figures"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}): start anew with --overwrite") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what two tables of settings differ in: "optimiser.lr was 0.01, now 0.1"."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key} was {_shown(old.get(key))}, now {_shown(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
