"""Make a model folder: train, calibrate, judge, and write the card."""

from __future__ import annotations

import difflib
import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from soundmap.concepts import concept_vectors
from soundmap.encoder.bank_files import PROMPTS_FILE, read_bank, read_concepts, write_bank
from soundmap.encoder.card import CARD_FILE, file_sha256, models_root, read_card
from soundmap.encoder.text import StaticText
from soundmap.encoder.torch_encoder import TEXT_TABLE, TOKENIZER_FILE, WEIGHTS_FILE, TorchEncoder
from soundmap.errors import InputError
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.products.audibility import FILE as TABLE_FILE
from soundmap.products.evaluate import as_windows, evaluate_windows
from soundmap.products.free_text import FILE as FREE_TEXT_FILE
from soundmap.products.labelled import (
    Audibility,
    LabelledImages,
    load_audibility,
    load_eurosat,
    load_ucmerced,
)
from soundmap.products.shows import show_figures
from soundmap.scoring import score
from soundmap.train.calibrate import calibrate
from soundmap.train.card_texts import DATA, LIMITS
from soundmap.train.clips import ClipSet, load_clips
from soundmap.train.feed import Clips, Crops, Diet
from soundmap.train.loop import Phase, Spent, TrainConfig, fit
from soundmap.train.phrases import clip_phrases, make_phrases
from soundmap.train.terms import Shares
from soundmap.train.text_vectors import distil

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
        mlp_ratio=2.0,
        stem=(24, 48, 64, 64, 128, 128),
        stem_strides=(2, 2, 1, 1, 2, 1),
    ),
    token_dim=128,
    dim=128,
    codes=256,
    temperature=20.0,
    text_dim=256,
    local_patches=True,
    audio=True,
    audio_tower=AudioConfig(),
)

# The lowest hundredth of each band.
EUROSAT_DARK_RGB = (25, 45, 67)
UCMERCED_DARK_RGB = (8, 14, 15)

# Side of the window -> sides of the crop, and how often. At 10 m: whole pixels mostly, which cost
# nothing to resize; finer by up to 1.4, coarser up to 20 m. At 0.3 m: mostly 1 to 1.2 m, where the
# card has maps read; from 0.3 to 2.4 m else.
EUROSAT_CROPS: dict[int, Crops] = {
    64: ((64, 64, 0.6), (45, 63, 0.4)),
    48: ((48, 48, 0.6), (36, 64, 0.4)),
    40: ((40, 40, 0.6), (30, 64, 0.4)),
    32: ((32, 32, 0.4), (40, 64, 0.6)),
}
UCMERCED_CROPS: dict[int, Crops] = {
    64: ((214, 256, 0.75), (64, 214, 0.25)),
    48: ((160, 192, 0.5), (192, 256, 0.25), (48, 160, 0.25)),
    40: ((133, 160, 0.5), (160, 256, 0.25), (40, 133, 0.25)),
    32: ((107, 128, 0.4), (128, 256, 0.6)),
}
_SMALL_WINDOWS = ((40, 0.6), (48, 0.25), (32, 0.15))
_ALL_WINDOWS = ((64, 0.2), (48, 0.4), (40, 0.25), (32, 0.15))
_LARGE_WINDOWS = ((64, 0.7), (48, 0.3))

# Single cells are what a map shows: once the codes are found, they count more.
_CELLS = {"patch": 0.4, "patch_phrase": 0.8}
_MORE_CELLS = {"patch": 0.6, "patch_phrase": 1.2}

PHASES = (
    Phase(7000, 3e-3, warmup=150, windows=_SMALL_WINDOWS, stem_only=True),
    Phase(3000, 1.5e-3, warmup=150, windows=_ALL_WINDOWS),
    Phase(3200, 1.2e-3, warmup=100, windows=_ALL_WINDOWS, weights={**_CELLS, "steady": 40.0}),
    Phase(
        1800,
        5e-4,
        warmup=50,
        windows=_LARGE_WINDOWS,
        fixed_norms=True,
        weights={**_CELLS, "steady": 250.0, "sharp": 50.0},
    ),
    Phase(
        1000,
        4e-4,
        warmup=40,
        windows=_LARGE_WINDOWS,
        fixed_norms=True,
        weights={**_MORE_CELLS, "caption": 2.5, "steady": 350.0, "sharp": 20.0},
    ),
    Phase(
        700,
        3e-4,
        warmup=40,
        windows=_LARGE_WINDOWS,
        fixed_norms=True,
        weights={**_MORE_CELLS, "steady": 700.0, "sharp": 20.0},
    ),
)
"""Small windows are seen faster, so more of them in the same time; maps are made of large ones."""


@dataclass(frozen=True)
class Recipe:
    """How the bundled model is made."""

    model: ModelConfig = SMALL
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            PHASES, shares=Shares(beyond_rgb=EUROSAT_MEAN_RGB), turned_alike=True
        )
    )
    eurosat_batch: int = 52
    ucmerced_batch: int = 14
    clip_pairs: int = 10
    other_clips: int = 6
    cleared: float = 0.4
    """Part of the images that are seen as if corrected for the atmosphere."""

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Recipe:
        """Read a recipe from the table of a model.toml.

        Parameters
        ----------
        table
            Any of ``seed``, ``threads``, ``save_every``, ``weight_decay``, ``clip_norm``,
            ``average``, ``turned_alike``, ``eurosat_batch``, ``ucmerced_batch``, ``clip_pairs``,
            ``other_clips``, ``cleared``, and ``steps``: a list of numbers, one a phase.

        Raises
        ------
        InputError
            A key is unknown, or its value is of another kind.
        """
        own = {f.name for f in fields(cls)} - {"model", "train"}
        training = {f.name for f in fields(TrainConfig)} - {"phases", "shares"}
        recipe = cls()
        for key, value in table.items():
            if key == "recipe":
                continue
            if key == "steps":
                recipe = replace(recipe, train=_with_steps(recipe.train, value))
                continue
            place: Any = recipe if key in own else recipe.train
            if key not in own | training:
                near = difflib.get_close_matches(key, sorted(own | training | {"steps"}), 1)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out"
                raise InputError(f"the recipe has no setting {key!r}: {hint}")
            kind = type(getattr(place, key))
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
                raise InputError(f"{key} = {value!r} of the recipe is no {kind.__name__}")
            changed = replace(place, **{key: kind(value)})
            recipe = changed if key in own else replace(recipe, train=changed)
        return recipe


def _with_steps(train: TrainConfig, steps: Any) -> TrainConfig:
    count = len(train.phases)
    fits = isinstance(steps, list) and len(steps) == count
    if not fits or not all(isinstance(n, int) and n > 0 for n in steps):
        raise InputError(f"steps = {steps!r} of the recipe: give {count} numbers, one a phase")
    phases = [replace(p, steps=n) for p, n in zip(train.phases, steps, strict=True)]
    return replace(train, phases=tuple(phases))


GSD_M = [[1.0, 1.2], [1.2, 2.4], [7.0, 10.0], [10.0, 20.0]]
"""Ranges of metres per pixel that maps are read at, finest first. The model has also seen 0.3 to 1
m, but a window of it shows too little of a place."""


NAME = "soundmap-small"
COMMAND = (
    "soundmap train --data examples/training/places.toml --model examples/training/small.toml "
    "--out runs/small"
)


def make_model(data: Path, folder: Path, work: Path, recipe: Recipe | None = None) -> None:
    """Train the bundled model and write its folder, or go on with a run that was stopped.

    Parameters
    ----------
    data
        Folder that holds ``eurosat_rgb/``, ``ucmerced_jpg/`` and ``audio/``.
    folder
        Model folder. Its ``concepts.json``, ``audibility.json`` and ``free_text.json`` are read,
        those of the bundled model where it has none; the rest is written.
    work
        Folder for the checkpoint and the log.
    recipe
        How to train; by default as the bundled model was.

    Raises
    ------
    InputError
        Data or tables are missing, or ``work`` holds a run of other settings.
    MissingExtra
        The extra ``train`` is not installed.
    """
    recipe = recipe or Recipe()
    work.mkdir(parents=True, exist_ok=True)
    _take_tables(folder)
    concepts = read_concepts(folder / PROMPTS_FILE)
    audibility = load_audibility(folder, tuple(c.name for c in concepts))
    table = _token_vectors(folder, work, recipe.model.text_dim)
    text = StaticText.load(folder / TOKENIZER_FILE, table)
    prompts = [list(c.prompts) for c in concepts]
    diets = make_diets(_load(data, "train", audibility), recipe, text, audibility, prompts)
    clips = make_clips(load_clips(data, tuple(audibility.clips)), recipe, text, audibility, prompts)
    model, spent = fit(recipe.model, recipe.train, diets, clips, work)
    write_model(folder, model, table, recipe, spent)
    finish_model(folder, _load(data, "val", audibility))
    judge_model(folder, data)


def _take_tables(folder: Path) -> None:
    """Copy what a model is made from, but for the weights, from the bundled one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PROMPTS_FILE, TABLE_FILE, FREE_TEXT_FILE):
        if not (folder / name).exists():
            shutil.copyfile(models_root() / NAME / name, folder / name)


def make_diets(
    sets: list[LabelledImages],
    recipe: Recipe,
    text: StaticText,
    audibility: Audibility,
    prompts: list[list[str]],
) -> list[Diet]:
    """Say how EuroSAT and UC Merced are fed."""
    ways = (
        (recipe.eurosat_batch, EUROSAT_CROPS, EUROSAT_DARK_RGB),
        (recipe.ucmerced_batch, UCMERCED_CROPS, UCMERCED_DARK_RGB),
    )
    return [
        Diet(
            data,
            batch,
            crops,
            make_phrases(text, audibility, prompts, data.name),
            dark_rgb,
            recipe.cleared,
        )
        for data, (batch, crops, dark_rgb) in zip(sets, ways, strict=True)
    ]


def make_clips(
    clips: ClipSet,
    recipe: Recipe,
    text: StaticText,
    audibility: Audibility,
    prompts: list[list[str]],
) -> Clips:
    """Say how clips are fed, and where they are audible."""
    heard = {}
    for dataset in audibility.tables:
        audible = audibility.audible_clips(dataset)
        rows = [[c in audible[place] for c in clips.classes] for place in audible]
        heard[dataset] = torch.tensor(rows)
    phrases = clip_phrases(text, audibility, prompts)
    return Clips(clips, phrases, heard, recipe.clip_pairs, recipe.other_clips)


def _token_vectors(folder: Path, work: Path, dims: int) -> NDArray[np.float16]:
    """Token vectors of the text side; those of a run that was stopped are taken up again."""
    kept, tokenizer = work / "tokens.npy", folder / TOKENIZER_FILE
    if kept.exists() and tokenizer.exists():
        table: NDArray[np.float16] = np.load(kept)
        return table
    table = distil(tokenizer, dims)
    np.save(kept, table)
    return table


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
    spent: Spent,
) -> None:
    """Write weights and card, as yet without a bank or figures."""
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    state[TEXT_TABLE] = torch.from_numpy(table)
    save_file(state, str(folder / WEIGHTS_FILE))
    vit = recipe.model.vit
    card: dict[str, Any] = {
        "name": NAME,
        "summary": "Small image-text-sound model of soundscapes for satellite and aerial imagery: "
        "convolutional stems and transformer blocks for image and sound, shared codebook, static "
        "token vectors.",
        "licence": "Apache-2.0",
        "architecture": asdict(recipe.model),
        "input": {
            "window_px": vit.window_px,
            "patch_px": vit.patch_px,
            "native_px": vit.window_px,
            "gsd_m": GSD_M,
            "context_px": vit.stem_reach_px if recipe.model.local_patches else None,
            "fill_rgb": list(EUROSAT_MEAN_RGB),
            "bands": "red, green, blue as uint8, as in a true-colour picture",
        },
        "training": {
            "command": COMMAND,
            "seed": recipe.train.seed,
            "settings": asdict(recipe),
            "minutes": round(spent.wall_s / 60, 1),
            "cpu_minutes": round(spent.cpu_s / 60, 1),
            "when": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": f"{recipe.train.threads} CPU thread, {platform.machine()}; "
            f"torch {torch.__version__}",
            "objective": "four embeddings over one codebook (image, sound, caption of the sound, "
            "caption of the place): image with caption of the sound, sound with its caption, image "
            "with sound, image with both, image with its own caption, where all that is audible in "
            "a class counts as its match; one phrase per concept (sigmoid) for images and sounds; "
            "the same for single patches, with patchwork consistency between different light; all "
            "images of a batch with all clips that are audible in them; in later phases, the "
            "same similarities with and without haze, against how much a concept differs from "
            "place to place, in the last three of images stretched and made grainy, too; "
            "class heads during training alone; the convolutions first learn alone, with weights "
            "tied so that an image turned by 90 degrees is seen alike",
            "augmentation": "turns and mirrors; gain, contrast, saturation, colour cast, mixed "
            "bands (season), haze; light of the air taken away and the rest stretched, as products "
            "corrected for the atmosphere are; windows cut off, as at the edge of imagery; "
            "0.3 to 20 m per pixel, the true one told; clips: stretches, "
            "mixing within a class and with the forest day, tilt and shift along frequency, masks",
        },
        "data": DATA,
        "limits": LIMITS,
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


def judge_model(folder: Path, data: Path) -> None:
    """Put all figures on the ``test`` split, and how altered scenes fare, into the card."""
    figures = show_figures(str(folder), data)
    card = dict(read_card(folder).data)
    card["figures_test"] = {**figures, "command": "soundmap evaluate model --data DATA --json -"}
    _write_card(folder, card)


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
