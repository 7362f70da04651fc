"""The bundled model: small, needs nothing else, and tells land from sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soundmap.encoder import DEFAULT_MODEL, find_model, load_encoder
from soundmap.encoder.card import verify_files
from soundmap.encoder.torch_encoder import WEIGHTS_FILE, model_config, read_weights
from soundmap.nn.vit import ConvStem
from soundmap.products.evaluate import (
    SetScore,
    evaluate_model,
    evaluate_mosaics,
    evaluate_sample,
)
from soundmap.products.robustness import evaluate_robustness

MOST_BYTES = 30_000_000


def test_it_is_small() -> None:
    folder = find_model(DEFAULT_MODEL).folder
    sizes = {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= MOST_BYTES, sizes
    # Data alone, and nothing that runs code when it is loaded.
    assert {Path(name).suffix for name in sizes} <= {".json", ".safetensors", ".md"}


def test_its_card_is_whole() -> None:
    card = find_model(DEFAULT_MODEL)
    verify_files(card)
    assert card.licence
    assert card.data["limits"]
    assert {"EuroSAT", "Merced"} <= {w for d in card.data["data"] for w in d["name"].split()}
    assert card.data["figures"]


def test_it_needs_no_network_and_no_training_packages(project: Path) -> None:
    # Everything that a map asks of a model, in a program that cannot connect to anything.
    script = """
import socket, sys

def refuse(*args, **options):
    raise AssertionError(f"the network was asked for: {args}")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refuse)

import numpy as np
import soundmap

enc = soundmap.load_encoder("soundmap-small")
side = enc.spec.window_px
found = enc.encode_images(np.zeros((2, 3, side, side), np.uint8))
text = enc.encode_text(["church bells", "a stream in the wood"])
print(found.image.shape == text.shape, np.linalg.norm(text, axis=1).round(5).tolist())
print(*[n for n in ("transformers", "sentence_transformers", "model2vec") if n in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["True [1.0, 1.0]", ""]


@pytest.fixture(scope="module")
def sets(shared_data: Path) -> dict[str, SetScore]:
    card = find_model(DEFAULT_MODEL)
    windows = evaluate_model(load_encoder(DEFAULT_MODEL), card, shared_data)
    mosaics = evaluate_mosaics(DEFAULT_MODEL, shared_data)
    return {one.name: one for one in (*windows, *mosaics)}


def described(one: SetScore) -> str:
    lowest = sorted(one.concepts, key=lambda c: c.auc)[:5]
    figures = ", ".join(f"{c.concept} {c.auc:.3f}" for c in lowest)
    return f"{one.name}: mean AUC {one.mean_auc:.4f} over {one.places} places; lowest: {figures}"


def test_eurosat(sets: dict[str, SetScore]) -> None:
    one = sets["eurosat test"]
    assert one.places > 1000
    assert one.mean_auc >= 0.93, described(one)
    assert one.top1 is not None
    assert one.top1 >= 0.80


def test_uc_merced(sets: dict[str, SetScore]) -> None:
    one = sets["ucmerced test"]
    assert one.places > 100
    assert one.mean_auc >= 0.90, described(one)


@pytest.mark.parametrize(
    "name",
    [
        "eurosat_mosaic_beziers_languedoc_utm31",
        "eurosat_mosaic_mainz_rhine_utm32",
        "eurosat_mosaic_thames_estuary_utm31",
    ],
)
def test_maps_of_labelled_mosaics(sets: dict[str, SetScore], name: str) -> None:
    one = sets[name]
    assert one.places > 10
    assert len(one.concepts) > 10
    assert one.mean_auc >= 0.85, described(one)


def test_its_convolutions_see_turned_images_alike() -> None:
    card = find_model(DEFAULT_MODEL)
    config = model_config(dict(card.data["architecture"])).vit
    place = "vit.patch_embed."
    weights = read_weights(card.folder / WEIGHTS_FILE, lambda name: name.startswith(place))
    # Layers that pass over every second pixel begin with the first, so that a turned image is seen
    # from the pixel beside. Without that the same weights compare exactly.
    stem = ConvStem(config.stem, (1,) * len(config.stem), config.width)
    stem.load_state_dict({name.removeprefix(place): value for name, value in weights.items()})
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, turned = (stem.eval()(x) for x in (images, torch.rot90(images, 1, (2, 3))))
    assert seen.std() > 0.01
    torch.testing.assert_close(torch.rot90(seen, 1, (2, 3)), turned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "scene",
    [
        "eurosat_mosaic_thames_estuary_utm31.tif",
        "idaho_aerial_rgb_10m_epsg26912.tif",
        "pyeongchang_0p6m_epsg3857_cog.tif",
    ],
)
def test_altered_copies_of_a_scene_sound_alike(shared_data: Path, scene: str) -> None:
    changes = evaluate_robustness(DEFAULT_MODEL, [shared_data / "scenes" / scene])
    assert len(changes) == 7
    for one in changes:
        assert abs(one.change) <= 0.05, one
    # Where pixels lie on the ground changes, so numbers do.
    assert all(one.change for one in changes)


def test_the_strongest_sound_of_the_sample_fits_its_area() -> None:
    areas = evaluate_sample(DEFAULT_MODEL)
    assert set(areas) == {
        "sea",
        "river",
        "forest",
        "fields",
        "town",
        "industry",
        "motorway",
        "all",
    }
    assert all(cells > 0 for cells, _ in areas.values()), areas
    assert areas["all"][1] >= 0.85, areas
