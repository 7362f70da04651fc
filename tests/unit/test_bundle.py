"""The bundled model is made from start to end, on next to nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soundmap.encoder.bank_files import read_bank
from soundmap.encoder.card import read_card, verify_files
from soundmap.encoder.torch_encoder import TorchEncoder, model_config
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.vit import ViTConfig
from soundmap.products.labelled import LabelledImages, load_audibility
from soundmap.train import bundle
from soundmap.train.clips import ClipSet
from soundmap.train.loop import Phase

TINY = replace(
    bundle.SMALL,
    vit=ViTConfig(64, 8, 16, 1, 2, 2.0, stem=(4, 8, 8), stem_strides=(2, 2, 2)),
    token_dim=16,
    dim=16,
    codes=24,
    audio_tower=AudioConfig((4, 8, 8, 8), 16, 1, 2),
)
SIDES = {"eurosat": (64, 10.0), "ucmerced": (256, 0.3)}


@pytest.fixture
def tables(project: Path) -> Path:
    return project / "models" / "soundmap-small"


@pytest.fixture
def little(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two random images of each class, and a random clip of each."""
    chance = np.random.default_rng(0)
    names = tuple(c["name"] for c in json.loads((tables / "concepts.json").read_text())["concepts"])
    audibility = load_audibility(tables, names)

    def load(data: Path, split: str, *_: Any) -> list[LabelledImages]:
        sets = []
        for name, (side, gsd_m) in SIDES.items():
            classes = audibility.classes(name)
            labels = np.repeat(np.arange(len(classes)), 2)
            pixels = chance.integers(0, 256, (len(labels), 3, side, side), dtype=np.uint8)
            sets.append(LabelledImages(name, pixels, labels, classes, gsd_m))
        return sets

    def clips(data: Path, classes: tuple[str, ...]) -> ClipSet:
        mels = torch.randn(len(classes), 400, 64) * 10 - 50
        return ClipSet(mels, torch.arange(len(classes)), classes, mels[:2])

    def distil(tokenizer: Path, dims: int) -> Any:
        given = (tables / "tokenizer.json").read_bytes()
        tokenizer.write_bytes(given)
        return chance.normal(size=(len(json.loads(given)["model"]["vocab"]), dims)).astype("f2")

    monkeypatch.setattr(bundle, "_load", load)
    monkeypatch.setattr(bundle, "load_clips", clips)
    monkeypatch.setattr(bundle, "distil", distil)
    monkeypatch.setattr(bundle, "show_figures", lambda *_: {"eurosat test": {"top1": 0.5}})


@pytest.mark.usefixtures("little")
def test_make_model(tmp_path: Path, tables: Path) -> None:
    recipe = bundle.Recipe(TINY, eurosat_batch=8, ucmerced_batch=6, clip_pairs=4, other_clips=3)
    windows = ((64, 0.5), (32, 0.5))
    phases = (Phase(1, 1e-3, 1, windows, stem_only=True), Phase(2, 1e-3, 1, windows))
    recipe = replace(recipe, train=replace(recipe.train, phases=phases))
    folder = tmp_path / "tiny"
    bundle.make_model(tmp_path, folder, tmp_path / "work", recipe)
    card = read_card(folder)
    verify_files(card)
    assert card.name == "soundmap-small"
    assert model_config(dict(card.architecture)) == TINY
    assert card.data["training"]["settings"]["train"]["phases"][1]["steps"] == 2
    assert set(card.data["figures"]) == {"eurosat val", "ucmerced val"}
    assert card.data["figures_test"]["eurosat test"] == {"top1": 0.5}
    for name in ("concepts.json", "audibility.json", "free_text.json"):
        assert (folder / name).read_bytes() == (tables / name).read_bytes()
    encoder = TorchEncoder(card, device="cpu", precision="float32")
    assert encoder.encode_mel(np.zeros((1, 1, 1001, 64), np.float32)).shape == (1, 16)
    bank = read_bank(card, "patch")
    assert bank.vectors.shape == (48, 16)
    # Made again, it is the same: nothing is trained a second time.
    weights = (folder / "model.safetensors").read_bytes()
    bundle.make_model(tmp_path, folder, tmp_path / "work", recipe)
    assert (folder / "model.safetensors").read_bytes() == weights
