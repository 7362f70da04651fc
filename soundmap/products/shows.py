"""All figures of a bundled model, by one call: what its card states of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from soundmap.encoder import find_model, load_encoder
from soundmap.encoder.bank_files import read_bank
from soundmap.products.calibration import evaluate_calibration
from soundmap.products.evaluate import evaluate_cells, evaluate_mosaics, evaluate_windows
from soundmap.products.evaluate_clips import encode_clips, evaluate_audible, score_clips
from soundmap.products.free_text import FILE as FREE_TEXT
from soundmap.products.free_text import evaluate_free_text, read_free_text
from soundmap.products.labelled import load_audibility, load_eurosat, load_ucmerced
from soundmap.products.robustness import evaluate_robustness

ROBUST_SCENES = (
    "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif",
    "s2_krivoklatsko_rgb_21m_utm33.tif",
    "eurosat_mosaic_thames_estuary_utm31.tif",
    "eurosat_mosaic_mainz_rhine_utm32.tif",
    "eurosat_mosaic_beziers_languedoc_utm31.tif",
    "gorinchem_nl_ortho_0p25m_epsg28992.tif",
    "pyeongchang_0p6m_epsg3857_cog.tif",
    "idaho_aerial_rgb_10m_epsg26912.tif",
)
"""Scenes of uint8 colour that altered copies are made of."""


def show_figures(model: str, data: Path, split: str = "test") -> dict[str, Any]:
    """Judge a model that sees and hears on the shared data.

    Parameters
    ----------
    model
        Name or folder of a model with a bank, a table of what is audible, and a list of phrases.
    data
        Folder that holds ``eurosat_rgb/``, ``ucmerced_jpg/``, ``audio/`` and ``scenes/``.
    split
        "val" or "test". Clips have no "val": with it they are left out, and so are scenes.

    Returns
    -------
    dict
        Figures by name, as JSON holds them.

    Raises
    ------
    InputError
        Something is not in the folder.
    UsageError
        The model has no tower for sound.
    """
    card = find_model(model)
    encoder = load_encoder(model)
    bank = read_bank(card, "image")
    audibility = load_audibility(card.folder, bank.names)
    sets = [
        load_eurosat(data, split, audibility.classes("eurosat")),
        load_ucmerced(data, split, audibility.classes("ucmerced")),
    ]
    found: dict[str, Any] = {}
    for one in sets:
        judged = evaluate_windows(encoder, bank, audibility, one, split)
        found[f"{one.name} {split}"] = {
            "mean_concept_auc": round(judged.mean_auc, 4),
            "top1": round(judged.top1 or 0, 4),
        }
    cell_bank = read_bank(card, "patch")
    for one in sets:
        cells = evaluate_cells(encoder, cell_bank, audibility, one, split)
        found[cells.name] = {"mean_concept_auc": round(cells.mean_auc, 4)}
    errors = evaluate_calibration(encoder, bank, audibility, sets)
    found[f"calibration error, {split}"] = {k: round(v, 4) for k, v in errors.items()}
    phrases = evaluate_free_text(encoder, sets, read_free_text(card.folder / FREE_TEXT))
    found[f"free text, {split}"] = {
        "right": sum(p.hit for p in phrases),
        "of": len(phrases),
        "phrases": {p.phrase.text: {"found": p.found, "place": p.place} for p in phrases},
    }
    if split == "val":
        return found
    clips = encode_clips(encoder, data, split)
    prompts = {
        name: clip["captions"]
        for name, clip in audibility.clips.items()
        if name in clips.categories
    }
    for name, categories in {"ESC-10": clips.esc10, "all": None}.items():
        heard = score_clips(encoder, clips, categories=categories, prompts=prompts)
        found[f"clips {split}, {name}"] = {
            "classes": len(heard.categories),
            "text_to_audio_map": _rounded(heard.text_to_audio),
            "audio_to_text_map": _rounded(heard.audio_to_text),
            "top1": round(heard.top1.value, 4),
        }
    for one in sets:
        audible = {
            place: tuple(name for name in names if name in clips.categories)
            for place, names in audibility.audible_clips(one.name).items()
        }
        result = evaluate_audible(encoder, one, clips, audible)
        found[f"image to audio, {one.name} {split}"] = {
            "recall_at_tenth": _rounded(result.recall),
            "recall_at_tenth_alone": _rounded(result.recall_alone),
            "map": _rounded(result.precision),
        }
    found["mosaics, mean_concept_auc"] = {
        s.name: round(s.mean_auc, 4) for s in evaluate_mosaics(model, data)
    }
    means = list(found["mosaics, mean_concept_auc"].values())
    found["mosaics, mean_concept_auc"]["mean"] = round(float(np.mean(means)), 4)
    scenes = [data / "scenes" / name for name in ROBUST_SCENES]
    changes = evaluate_robustness(model, [s for s in scenes if s.exists()])
    worst = max(changes, key=lambda c: abs(c.change))
    found["altered scenes"] = {
        "largest_change": _plain(asdict(worst)),
        "by_scene": {
            scene: round(max(abs(c.change) for c in changes if c.scene == scene), 4)
            for scene in dict.fromkeys(c.scene for c in changes)
        },
    }
    return found


def _rounded(figure: Any) -> dict[str, float]:
    return {"mean": round(figure.mean.value, 4), "chance": round(figure.chance, 4)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
