"""Labelled images: what is audible in them, how a model is judged and calibrated on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from soundmap.errors import InputError
from soundmap.products.evaluate import as_windows, auc, concept_scores
from soundmap.products.labelled import Audibility, LabelledImages, load_audibility
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.train.calibrate import calibrate
from tests.unit.little import AUDIBLE, CLASSES, CONCEPTS, pixels, places


class TestAuc:
    def brute(self, scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[truth] for b in scores[~truth]
        ]
        return sum(wins) / len(wins)

    @given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
    def test_equals_counting_pairs(self, rows: list[tuple[int, bool]]) -> None:
        scores = np.array([score for score, _ in rows], np.float64) / 7
        truth = np.array([kind for _, kind in rows])
        truth[:2] = True, False
        assert auc(scores, truth) == pytest.approx(self.brute(scores, truth), abs=1e-12)
        assert auc(scores.astype(np.float32), truth) == pytest.approx(
            self.brute(scores, truth), abs=1e-12
        )

    def test_extremes(self) -> None:
        truth = np.array([False, False, True, True])
        assert auc(np.array([1.0, 2, 3, 4]), truth) == 1
        assert auc(np.array([4.0, 3, 2, 1]), truth) == 0
        assert auc(np.zeros(4), truth) == 0.5

    def test_concepts_with_one_kind_are_left_out(self) -> None:
        values = np.arange(12.0).reshape(4, 3)
        audible = np.array([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 1]], bool)
        found = concept_scores(values, audible, ("none", "all", "some"))
        assert [(c.concept, c.audible) for c in found] == [("some", 2)]
        assert found[0].auc == 0.75


class TestAsWindows:
    def data(self, side: int, gsd_m: float) -> LabelledImages:
        images = pixels(3, side).numpy()
        return LabelledImages("places", images, np.arange(3), CLASSES, gsd_m)

    def test_imagery_of_the_models_own_sampling_is_cut(self) -> None:
        data = self.data(70, 8.0)
        found, told_m = as_windows(data, FakeEncoder())
        np.testing.assert_array_equal(found, data.pixels[:, :, 3:67, 3:67])
        assert told_m == 8.0
        assert found.flags.c_contiguous

    def test_finer_imagery_is_averaged_by_blocks(self) -> None:
        data = self.data(200, 3.0)
        found, told_m = as_windows(data, FakeEncoder())
        assert told_m == 9.0
        assert found.shape == (3, 3, 64, 64)
        assert found.dtype == np.uint8
        for y, x in ((0, 0), (63, 63), (10, 40)):
            block = data.pixels[:, :, 4 + 3 * y :, 4 + 3 * x :][:, :, :3, :3].astype(float)
            np.testing.assert_array_equal(found[:, :, y, x], np.rint(block.mean(axis=(2, 3))))

    def test_images_too_small_for_a_window(self) -> None:
        with pytest.raises(InputError, match="do not fill a window of 64 px"):
            as_windows(self.data(63, 10.0), FakeEncoder())
        with pytest.raises(InputError, match="do not fill a window of 256 px"):
            as_windows(self.data(200, 2.5), FakeEncoder())


def audibility() -> Audibility:
    tables = {
        "places": {
            name: {
                "captions": [name],
                "audible": {c: "" for c, a in zip(CONCEPTS, row, strict=True) if a},
            }
            for name, row in zip(CLASSES, AUDIBLE.tolist(), strict=True)
        }
    }
    return Audibility(CONCEPTS, tables, {"wood": ("forest",), "port": ("sea", "town")})


class TestCalibrate:
    def test_fits_each_concept_and_one_for_all(self) -> None:
        encoder = FakeEncoder(4)
        data = places(60, 64)
        vectors = encoder.embed([[0, 255, 0], [0, 0, 255], [255, 255, 255], [60, 120, 255]])
        found = calibrate(encoder, vectors, audibility(), [data])
        assert set(found) == {
            f"{detail}.{kind}"
            for detail in ("image", "patch")
            for kind in ("scale", "bias", "generic")
        }
        for key, value in found.items():
            assert value.dtype == np.float32
            assert value.shape == ((2,) if key.endswith("generic") else (4,))
            assert np.isfinite(value).all()
        assert (found["image.scale"] > 0).all()
        # Towns alone are bright: traffic is told from colour, on both details.
        image = encoder.encode_images(data.pixels).image
        assert image is not None
        p = 1 / (
            1 + np.exp(-(image @ vectors[2] * found["image.scale"][2] + found["image.bias"][2]))
        )
        assert p[data.labels == 2].min() > 0.8
        assert p[data.labels != 2].max() < 0.2
        again = calibrate(encoder, vectors, audibility(), [data])
        for key, value in found.items():
            np.testing.assert_array_equal(value, again[key])


class TestAudibility:
    def test_matrices(self) -> None:
        table = audibility()
        assert table.classes("places") == CLASSES
        np.testing.assert_array_equal(table.matrix("places"), AUDIBLE.bool().numpy())

    def test_load(self, tmp_path: Path) -> None:
        data = {
            "classes": {"eurosat": audibility().tables["places"]},
            "sample_areas": {"port": ["sea", "town"]},
        }
        (tmp_path / "audibility.json").write_text(json.dumps(data))
        table = load_audibility(tmp_path, CONCEPTS)
        assert table.area_matrix("port").tolist() == [True, True, True, True]
        with pytest.raises(InputError, match="forest lists") as caught:
            load_audibility(tmp_path, ("waves", "traffic", "wind"))
        assert "'birds'" in str(caught.value)

    def test_clips_that_share_a_concept_are_audible(self, tmp_path: Path) -> None:
        clips = {
            "esc": {
                "wren": {"captions": ["a wren"], "concepts": ["birds"]},
                "lorry": {"captions": ["a lorry"], "concepts": ["traffic"]},
                "fire": {"captions": ["fire"], "concepts": []},
            }
        }
        data = {"classes": audibility().tables, "sample_areas": {}, "clips": clips}
        path = tmp_path / "audibility.json"
        path.write_text(json.dumps(data))
        table = load_audibility(tmp_path, CONCEPTS)
        assert table.clip_matrix().tolist() == [
            [True, False, False, False],
            [False, False, True, False],
            [False, False, False, False],
        ]
        found = table.audible_clips("places")
        assert found == {"forest": ("wren",), "sea": (), "town": ("wren", "lorry")}
        clips["esc"]["fire"]["concepts"].append("flames")
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="clips of fire list"):
            load_audibility(tmp_path, CONCEPTS)

    def test_bundled_table_fits_the_bundled_concepts(self, project: Path) -> None:
        folder = project / "models" / "soundmap-small"
        concepts = json.loads((folder / "concepts.json").read_text())["concepts"]
        names = tuple(c["name"] for c in concepts)
        table = load_audibility(folder, names)
        for name, classes in table.tables.items():
            # Every class sounds of something, and is described.
            assert table.matrix(name).any(axis=1).all()
            assert all(len(entry["captions"]) > 1 for entry in classes.values())
        # Every concept can be heard somewhere and not elsewhere, or nothing could be fitted.
        both = np.concatenate([table.matrix(name) for name in table.tables])
        assert both.any(axis=0).all()
        assert not both.all(axis=0).any()
        for clip in table.clips.values():
            assert len(clip["captions"]) > 1
        for name in table.tables:
            # Something that was recorded is audible in every class of EuroSAT.
            audible = table.audible_clips(name).values()
            assert all(audible) if name == "eurosat" else any(audible)
        for area in table.sample_areas:
            assert table.area_matrix(area).any()
