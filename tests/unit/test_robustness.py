"""Altered copies of a scene, phrases that were never met, and how far probabilities are off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from soundmap.errors import InputError
from soundmap.products import robustness
from soundmap.products.calibration import evaluate_calibration
from soundmap.products.free_text import FreePhrase, evaluate_free_text, read_free_text
from soundmap.products.labelled import Audibility, LabelledImages
from soundmap.products.robustness import altered_copies, haze
from soundmap.scoring import PLATT, ConceptBank
from soundmap.testing.fake_encoder import FakeEncoder


def write(path: Path, pixels: np.ndarray, nodata: int | None = 0) -> Path:
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width}
    with rasterio.open(path, "w", **profile, dtype=pixels.dtype, nodata=nodata) as out:
        out.write(pixels)
    return path


def scene(path: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 5, 7), dtype=np.uint8)
    pixels[:, 2:4, 1:3] = 0
    write(path, pixels)
    return pixels


class TestCopies:
    def test_all_are_the_scene_again(self, tmp_path: Path) -> None:
        pixels = scene(tmp_path / "a.tif")
        found = {}
        for name, path in altered_copies(tmp_path / "a.tif", tmp_path):
            with rasterio.open(path) as copy:
                found[name] = copy.read()
                assert copy.nodata == 0
        assert {p.name for p in tmp_path.iterdir()} == {"a.tif"}
        np.testing.assert_array_equal(found["turned by 90 degrees"], np.rot90(pixels, 1, (1, 2)))
        np.testing.assert_array_equal(found["turned by 270 degrees"], np.rot90(pixels, 3, (1, 2)))
        np.testing.assert_array_equal(found["mirrored left to right"], pixels[..., ::-1])
        np.testing.assert_array_equal(found["mirrored top to bottom"], pixels[:, ::-1])
        hazy = found["haze 15 %"]
        np.testing.assert_array_equal(hazy == 0, pixels == 0)
        seen = pixels[0] > 0
        np.testing.assert_allclose(hazy[0][seen], pixels[0][seen] * 0.85 + 28.5, atol=0.51)

    def test_haze_keeps_away_from_no_imagery(self) -> None:
        pixels = np.zeros((3, 2, 2), np.uint8)
        found = haze(pixels, np.ones((2, 2), bool), 0.001)
        assert found.min() == 1

    def test_other_rasters(self, tmp_path: Path) -> None:
        path = write(tmp_path / "b.tif", np.zeros((2, 4, 4), np.uint8))
        with pytest.raises(InputError, match="needs red, green and blue"):
            next(altered_copies(path, tmp_path))

    def test_the_largest_change_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene(tmp_path / "a.tif")

        def means(model: str, path: Path) -> tuple[list[str], np.ndarray]:
            with rasterio.open(path) as raster:
                return ["bright", "corner"], np.array(
                    [raster.read().mean() / 255, raster.read(1)[0, 0] / 2550]
                )

        monkeypatch.setattr(robustness, "_means", means)
        changes = {c.copy: c for c in robustness.evaluate_robustness("any", [tmp_path / "a.tif"])}
        assert changes["haze 20 %, 4 % brighter"].concept == "bright"
        assert changes["haze 20 %, 4 % brighter"].change > 0.03
        assert changes["turned by 180 degrees"].concept == "corner"


def places() -> LabelledImages:
    pixels = np.zeros((6, 3, 64, 64), np.uint8)
    pixels[:3, 1] = 200
    pixels[3:, 2] = 200
    return LabelledImages("places", pixels, np.array([0, 0, 0, 1, 1, 1]), ("wood", "sea"), 8.0)


class TestFreeText:
    def test_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        entry = {"text": "waves", "set": "places", "right": ["sea"]}
        path.write_text(json.dumps({"phrases": [entry]}))
        assert read_free_text(path) == (FreePhrase("waves", "places", ("sea",)),)
        path.write_text("[]")
        with pytest.raises(InputError, match="no list of phrases"):
            read_free_text(path)

    def test_bundled_list(self, project: Path) -> None:
        phrases = read_free_text(project / "models" / "soundmap-small" / "free_text.json")
        assert len(phrases) == len({p.text for p in phrases}) == 20

    def test_places(self) -> None:
        phrases = [FreePhrase(t, "places", (r,)) for t in ("x", "y z") for r in ("wood", "sea")]
        found = evaluate_free_text(FakeEncoder(), [places()], phrases)
        assert [r.phrase for r in found] == phrases
        for wood, sea in (found[:2], found[2:]):
            assert {wood.place, sea.place} == {1, 2}
            assert wood.found == sea.found
            assert [wood.hit, sea.hit] == [wood.found == "wood", sea.found == "sea"]

    def test_mistakes(self) -> None:
        with pytest.raises(InputError, match="places has no class desert"):
            evaluate_free_text(FakeEncoder(), [places()], [FreePhrase("x", "places", ("desert",))])
        with pytest.raises(InputError, match="no images of 'moon'"):
            evaluate_free_text(FakeEncoder(), [places()], [FreePhrase("x", "moon", ("sea",))])


def test_calibration() -> None:
    encoder = FakeEncoder()
    vectors = encoder.embed([[0, 200, 0], [0, 0, 200]])
    count = len(vectors)
    tables = {
        "places": {
            "wood": {"captions": ["a"], "audible": {"birds": ""}},
            "sea": {"captions": ["b"], "audible": {"waves": ""}},
        }
    }
    audibility = Audibility(("birds", "waves"), tables, {})

    def bank(scale: float, bias: float) -> ConceptBank:
        return ConceptBank(
            names=("birds", "waves"),
            groups=("biophony", "geophony"),
            colours=("#000000", "#000000"),
            vectors=vectors,
            scale=np.full(count, scale, np.float32),
            bias=np.full(count, bias, np.float32),
            calibration=(PLATT, PLATT),
            share_scale=1.0,
            encoder_id=encoder.id,
        )

    sure = evaluate_calibration(encoder, bank(200.0, -199.0), audibility, [places()])
    assert set(sure) == {"places", "all"}
    assert sure["all"] == sure["places"] < 0.3
    # Always one half, and half of it is so.
    even = evaluate_calibration(encoder, bank(0.0, 0.0), audibility, [places()])
    assert even["all"] == pytest.approx(0, abs=1e-6)
    wrong = evaluate_calibration(encoder, bank(0.0, 20.0), audibility, [places()])
    assert wrong["all"] == pytest.approx(0.5, abs=1e-3)
