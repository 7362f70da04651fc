"""Make a model folder: train, calibrate, judge, and write the card."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from soundmap.concepts import concept_vectors
from soundmap.encoder.bank_files import PROMPTS_FILE, read_bank, read_concepts, write_bank
from soundmap.encoder.card import CARD_FILE, file_sha256, read_card
from soundmap.encoder.text import StaticText
from soundmap.encoder.torch_encoder import TEXT_TABLE, TOKENIZER_FILE, WEIGHTS_FILE, TorchEncoder
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.products.evaluate import as_windows, evaluate_windows
from soundmap.products.labelled import (
    EUROSAT_GSD_M,
    UCM_GSD_M,
    Audibility,
    LabelledImages,
    load_audibility,
    load_eurosat,
    load_ucmerced,
)
from soundmap.scoring import score
from soundmap.train.calibrate import calibrate
from soundmap.train.loop import Diet, TrainConfig, fit, make_phrases
from soundmap.train.text_vectors import SENTENCE_MODEL, distil

log = logging.getLogger(__name__)

# Mean colour of EuroSAT; stands for what lies beyond the imagery.
EUROSAT_MEAN_RGB = (88, 97, 103)

SMALL = ModelConfig(
    vit=ViTConfig(
        window_px=64,
        patch_px=8,
        width=128,
        depth=2,
        heads=4,
        mlp_ratio=3.0,
        stem=(24, 48, 64, 128, 128),
        stem_strides=(2, 2, 1, 2, 1),
    ),
    token_dim=128,
    dim=128,
    codes=256,
    temperature=20.0,
    text_dim=256,
    local_patches=True,
)


@dataclass(frozen=True)
class Recipe:
    """How the bundled model is made."""

    model: ModelConfig = SMALL
    train: TrainConfig = field(default_factory=TrainConfig)
    eurosat_batch: int = 52
    eurosat_crop_px: tuple[int, int] = (45, 64)
    ucmerced_batch: int = 14
    ucmerced_crop_px: tuple[int, int] = (214, 256)

    def gsd_m(self) -> list[list[float]]:
        """Ranges of metres per pixel that the crops span, finest first."""
        window = self.model.vit.window_px
        pairs = ((UCM_GSD_M, self.ucmerced_crop_px), (EUROSAT_GSD_M, self.eurosat_crop_px))
        return [[round(gsd * px / window, 2) for px in crop] for gsd, crop in pairs]


def make_model(data: Path, folder: Path, work: Path, recipe: Recipe | None = None) -> None:
    """Train the bundled model and write its folder.

    Parameters
    ----------
    data
        Folder that holds ``eurosat_rgb/`` and ``ucmerced_jpg/``.
    folder
        Model folder; must hold ``concepts.json`` and ``audibility.json``, the rest is written.
    work
        Folder for checkpoints and the log.
    """
    recipe = recipe or Recipe()
    work.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(folder / PROMPTS_FILE)
    audibility = load_audibility(folder, tuple(c.name for c in concepts))
    table = distil(folder / TOKENIZER_FILE, recipe.model.text_dim)
    text = StaticText.load(folder / TOKENIZER_FILE, table)
    train_sets = _load(data, "train", audibility)
    diets = [
        Diet(train_sets[0], recipe.eurosat_batch, recipe.eurosat_crop_px),
        Diet(train_sets[1], recipe.ucmerced_batch, recipe.ucmerced_crop_px),
    ]
    prompts = [list(c.prompts) for c in concepts]
    phrases = [make_phrases(text, audibility, prompts, d.data.name) for d in diets]
    started = time.monotonic()
    model = fit(recipe.model, recipe.train, diets, phrases, work)
    minutes = (time.monotonic() - started) / 60
    write_model(folder, model, table, recipe, minutes)
    finish_model(folder, _load(data, "val", audibility))


def _load(data: Path, split: str, audibility: Audibility) -> list[LabelledImages]:
    return [
        load_eurosat(data, split, audibility.classes("eurosat")),
        load_ucmerced(data, split, audibility.classes("ucmerced")),
    ]


def write_model(
    folder: Path,
    model: SoundModel,
    table: NDArray[np.float16],
    recipe: Recipe,
    minutes: float,
) -> None:
    """Write weights and card, as yet without a bank or figures."""
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    state[TEXT_TABLE] = torch.from_numpy(table)
    save_file(state, str(folder / WEIGHTS_FILE))
    vit = recipe.model.vit
    card: dict[str, Any] = {
        "name": folder.name,
        "summary": "Small image-text model of soundscapes for satellite and aerial imagery: "
        "convolutional stem, transformer blocks, shared codebook, static token vectors.",
        "licence": "Apache-2.0",
        "architecture": asdict(recipe.model),
        "input": {
            "window_px": vit.window_px,
            "patch_px": vit.patch_px,
            "native_px": vit.window_px,
            "gsd_m": recipe.gsd_m(),
            "context_px": vit.stem_reach_px if recipe.model.local_patches else None,
            "fill_rgb": list(EUROSAT_MEAN_RGB),
            "bands": "red, green, blue as uint8, as in a true-colour picture",
        },
        "training": {
            "command": f"soundmap train --data DATA --out models/{folder.name} --work WORK",
            "settings": asdict(recipe),
            "minutes": round(minutes, 1),
            "hardware": f"{recipe.train.threads} CPU thread, {platform.machine()}; "
            f"torch {torch.__version__}",
            "objective": "images against one caption per class (InfoNCE) and one phrase per "
            "concept (sigmoid), for whole windows and for single patches, with patchwork "
            "consistency; class heads on the tokens during training alone",
        },
        "data": [
            {
                "name": "EuroSAT RGB, split `train` (by 1-degree cell)",
                "use": "training; `val` for calibration",
                "licence": "MIT; contains modified Copernicus Sentinel data",
                "cite": "Helber et al. 2019",
            },
            {
                "name": "UC Merced Land Use, split `train`, every eighth image held out as `val`",
                "use": "training; `val` for calibration",
                "licence": "public domain (USGS National Map Urban Area Imagery)",
                "cite": "Yang and Newsam 2010",
            },
            {
                "name": f"token vectors distilled from {SENTENCE_MODEL} with model2vec",
                "use": "text side, frozen",
                "licence": "Apache-2.0",
                "cite": "Reimers and Gurevych 2019",
            },
            {
                "name": "captions, prompts and the table of what is audible where",
                "use": "training and calibration; written for this project, a judgement and not "
                "a measurement",
                "licence": "Apache-2.0",
            },
        ],
        "limits": "Hears nothing: it was trained on written expectations of what each land-cover "
        "class sounds like, not on recordings. Europe at 10 m and US cities at 0.3 m, by day, "
        "without snow or cloud. Other places, sensors and resolutions are extrapolation.",
        "files": {},
    }
    _write_card(folder, card)


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    card["files"] = {n: file_sha256(folder / n) for n in (WEIGHTS_FILE, TOKENIZER_FILE)}
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def finish_model(folder: Path, held_out: list[LabelledImages]) -> None:
    """Make the bank of a model folder, calibrate it, and complete the card.

    Parameters
    ----------
    folder
        Model folder with weights and card.
    held_out
        Images that the model was not trained on.
    """
    card = read_card(folder)
    concepts = read_concepts(folder / PROMPTS_FILE)
    audibility = load_audibility(folder, tuple(c.name for c in concepts))
    encoder = TorchEncoder(card, device="cpu", precision="float32")
    vectors = concept_vectors(encoder, concepts)
    arrays = calibrate(encoder, vectors, audibility, held_out)
    arrays["vectors"] = vectors
    arrays["share_scale"] = np.array([encoder.share_scale], np.float32)
    write_bank(folder, encoder.id, arrays)
    bank = read_bank(card, "image")
    data = dict(card.data)
    data["figures"] = {
        s.name: {"mean_concept_auc": round(s.mean_auc, 4), "top1": round(s.top1 or 0, 4)}
        for s in (evaluate_windows(encoder, bank, audibility, d, "val") for d in held_out)
    }
    data["precision"] = {"bfloat16_max_probability_change": bfloat16_change(folder, held_out)}
    _write_card(folder, data)


def bfloat16_change(folder: Path, held_out: list[LabelledImages]) -> float:
    """Measure the largest change of any probability between float32 and bfloat16."""
    card = read_card(folder)
    bank = read_bank(card, "patch")
    worst = 0.0
    for data in held_out:
        results = []
        for precision in ("float32", "bfloat16"):
            encoder = TorchEncoder(card, device="cpu", precision=precision)
            pixels, told_m = as_windows(data, encoder)
            found = encoder.encode_images(pixels[:200], gsd_m=told_m, details=("patch",)).patches
            assert found is not None
            results.append(score(found, bank, "probability"))
        worst = max(worst, float(np.abs(results[0] - results[1]).max()))
    return round(worst, 5)
