"""The finished model's folder: weights, card, tokeniser, concepts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from soundmap.encoder import DEFAULT_MODEL
from soundmap.encoder.bank_files import PROMPTS_FILE, Concept, read_concepts
from soundmap.encoder.card import CARD_FILE, file_sha256, models_root
from soundmap.encoder.torch_encoder import TEXT_TABLE, TOKENIZER_FILE, WEIGHTS_FILE
from soundmap.errors import InputError, OutputError
from soundmap.nn.model import ModelConfig
from soundmap.products.samples import Samples, StreamedSamples
from soundmap.train.config import Settings
from soundmap.train.start import TextSide

MODEL = "model"
_INPUTS = {"latlong": "lonlat", "month": "month", "time": "hour"}


def concepts_of(settings: Settings) -> tuple[Concept, ...]:
    """Read the concepts that the finished model is to have.

    Raises
    ------
    InputError
        The file cannot be used, or a concept has no prompt.
    """
    path = Path(settings.concepts or models_root() / DEFAULT_MODEL / PROMPTS_FILE)
    concepts = read_concepts(path)
    for concept in concepts:
        if not concept.prompts:
            raise InputError(
                f"{path}: the concept {concept.name!r} has recordings and no prompt, and a model's "
                "own concepts are phrases: add a prompt"
            )
    return concepts


def write_result(
    out: Path,
    settings: Settings,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    text: TextSide,
    samples: Samples | StreamedSamples,
    about: Mapping[str, Any],
) -> Path:
    """Write the model folder of a run, whole or not at all.

    Its concepts have no calibration: `soundmap predict` tells similarities and shares by it.

    Parameters
    ----------
    out
        Folder of the run; the model becomes ``out/model``.
    settings
        Of the run.
    config, state
        Architecture and weights.
    text
        Encoder of texts; token vectors go along.
    samples
        What the model was trained on: its pixels are those that the model reads.
    about
        "training", "figures" and "data" of the card.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    folder = out / MODEL
    part = out / f".{MODEL}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        files = [WEIGHTS_FILE]
        if text.table is not None and text.tokenizer is not None:
            weights[TEXT_TABLE] = torch.from_numpy(text.table.copy())
            shutil.copyfile(text.tokenizer, part / TOKENIZER_FILE)
            files.append(TOKENIZER_FILE)
        save_file(weights, str(part / WEIGHTS_FILE), metadata={"format": "pt"})
        (part / WEIGHTS_FILE).chmod(0o644)
        entries = [
            {"name": c.name, "group": c.group, "colour": c.colour, "prompts": list(c.prompts)}
            for c in concepts_of(settings)
        ]
        _write(part / PROMPTS_FILE, {"concepts": entries})
        card = _card(settings, config, text, samples, about)
        card["files"] = {name: file_sha256(part / name) for name in files}
        _write(part / CARD_FILE, card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(
    settings: Settings,
    config: ModelConfig,
    text: TextSide,
    samples: Samples | StreamedSamples,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    vit = config.vit
    card: dict[str, Any] = {
        "name": settings.name,
        "summary": settings.summary or f"Trained with soundmap train on {samples.name}.",
        "licence": settings.licence,
        "architecture": asdict(config),
        "input": {
            "window_px": vit.window_px,
            "patch_px": vit.patch_px,
            "native_px": samples.native_px,
            "gsd_m": [[samples.gsd_m, samples.gsd_m]],
            "scales": list(settings.input.zooms),
            "metadata": [name for key, name in _INPUTS.items() if key in config.metadata],
            "context_px": vit.stem_reach_px if config.local_patches else None,
            "bands": "red, green, blue as uint8, as in a true-colour picture",
        },
        **about,
        "files": {},
    }
    if text.table is None:
        card["text"] = {"encoder": text.name}
    return card
