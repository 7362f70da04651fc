"""Model cards, and the sampling distance at which a model reads imagery."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from soundmap.encoder import InputSpec, ModelCard, bundled_models, find_model
from soundmap.encoder.card import file_sha256, read_card, verify_files
from soundmap.errors import ModelError, UsageError
from tests.unit.messages import one_line

CARD: dict[str, Any] = {
    "name": "fake",
    "summary": "A model for tests.",
    "licence": "Apache-2.0",
    "architecture": {"dim": 16},
    "input": {
        "window_px": 64,
        "patch_px": 8,
        "native_px": 64,
        "gsd_m": [[1.0, 1.2], [7.03, 10.0]],
    },
    "files": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with nothing but a card."""
    made = tmp_path / "fake"
    made.mkdir()
    (made / "model.json").write_text(json.dumps(CARD))
    return made


@pytest.fixture
def card(folder: Path) -> ModelCard:
    return read_card(folder)


class TestCard:
    def test_reads(self, card: ModelCard, folder: Path) -> None:
        assert (card.name, card.folder, card.licence) == ("fake", folder, "Apache-2.0")
        assert card.spec == InputSpec(64, 8, 64, ((1.0, 1.2), (7.03, 10.0)))
        assert card.spec.patches == 8
        assert card.data["summary"] == card.summary

    def test_reads_all_of_the_input(self, folder: Path) -> None:
        given = CARD["input"] | {
            "scales": [1, 3, 5],
            "metadata": ["month", "hour"],
            "context_px": 19,
            "fill_rgb": [1, 2, 3],
        }
        (folder / "model.json").write_text(json.dumps(CARD | {"input": given}))
        spec = read_card(folder).spec
        assert spec.scales == (1, 3, 5)
        assert spec.metadata == ("month", "hour")
        assert spec.context_px == 19
        assert spec.fill_rgb == (1, 2, 3)

    def test_hash_follows_what_decides_the_embeddings(self, card: ModelCard, folder: Path) -> None:
        hashes = {card.hash}
        for key, value in {
            "files": {"model.safetensors": "00"},
            "architecture": {"dim": 17},
            "input": CARD["input"] | {"gsd_m": [[1.0, 1.3]]},
        }.items():
            (folder / "model.json").write_text(json.dumps(CARD | {key: value}))
            hashes.add(read_card(folder).hash)
        assert len(hashes) == 4
        (folder / "model.json").write_text(json.dumps(CARD | {"summary": "Other words."}))
        assert read_card(folder).hash == card.hash

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            '"model"',
            json.dumps({k: v for k, v in CARD.items() if k != "name"}),
            json.dumps({k: v for k, v in CARD.items() if k != "files"}),
            json.dumps({k: v for k, v in CARD.items() if k != "architecture"}),
            json.dumps(CARD | {"input": {}}),
            json.dumps(CARD | {"input": 5}),
            json.dumps(CARD | {"input": CARD["input"] | {"window_px": "wide"}}),
            json.dumps(CARD | {"input": CARD["input"] | {"gsd_m": [1.0, 2.0]}}),
            json.dumps(CARD | {"input": CARD["input"] | {"gsd_m": []}}),
            json.dumps(CARD | {"files": ["model.safetensors"]}),
        ],
    )
    def test_malformed(self, folder: Path, text: str) -> None:
        (folder / "model.json").write_text(text)
        with pytest.raises(ModelError) as caught:
            read_card(folder)
        assert "model.json" in one_line(caught)

    def test_not_text(self, folder: Path) -> None:
        (folder / "model.json").write_bytes(b"\x80\x81{}")
        with pytest.raises(ModelError) as caught:
            read_card(folder)
        one_line(caught)

    def test_no_card(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="is not a model folder") as caught:
            read_card(tmp_path)
        one_line(caught)

    def test_files(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(b"weights")
        files = {"model.safetensors": file_sha256(weights)}
        (folder / "model.json").write_text(json.dumps(CARD | {"files": files}))
        card = read_card(folder)
        verify_files(card)
        weights.write_bytes(b"wejghts")
        with pytest.raises(ModelError, match="does not match the checksum") as caught:
            verify_files(card)
        assert "model.safetensors" in one_line(caught)
        weights.unlink()
        with pytest.raises(ModelError, match="is missing") as caught:
            verify_files(card)
        one_line(caught)

    def test_bundled_models_are_found_by_name(self) -> None:
        cards = bundled_models()
        assert "soundmap-small" in [c.name for c in cards]
        for card in cards:
            assert find_model(card.name).folder == card.folder
            assert card.name == card.folder.name
            assert card.licence

    def test_folder(self, folder: Path) -> None:
        assert find_model(str(folder)).name == "fake"

    @pytest.mark.parametrize("name", ["soundmap-huge", "no/such/folder", "soundmap-small/..x", "*"])
    def test_unknown(self, name: str) -> None:
        with pytest.raises(UsageError) as caught:
            find_model(name)
        message = one_line(caught)
        assert repr(name) in message
        assert "soundmap-small" in message


RANGES = ((1.0, 1.2), (7.03, 10.0))
SPEC = InputSpec(64, 8, 64, RANGES)
TOLERANCE = 1.02


def within(gsd_m: float, ranges: tuple[tuple[float, float], ...]) -> bool:
    return any(low / 1.0201 <= gsd_m <= high * 1.0201 for low, high in ranges)


@st.composite
def specs(draw: st.DrawFn) -> InputSpec:
    edges = sorted(draw(st.lists(st.floats(0.05, 100), min_size=1, max_size=3, unique=True)))
    ranges = []
    for low, following in zip(edges, [*edges[1:], 200.0], strict=True):
        high = low * draw(st.sampled_from([1.0, 1.1, 1.5, 4.0]))
        ranges.append((low, min(high, following)))
    return InputSpec(64, draw(st.sampled_from([4, 8, 16])), 64, tuple(ranges))


class TestReading:
    @pytest.mark.parametrize(
        ("native", "gsd_m", "told"),
        [
            # Within a range, or by no more than the tolerance beside it: as it is.
            (10.0, 10.0, 10.0),
            (7.03, 7.03, 7.03),
            (8.3, 8.3, 8.3),
            (10.15, 10.15, 10.0),
            (6.95, 6.95, 7.03),
            (1.1, 1.1, 1.1),
            # Finer than a range: the most whole pixels that fit it.
            (0.3, 1.2, 1.2),
            (0.6, 1.2, 1.2),
            (0.5, 1.0, 1.0),
            (0.05, 1.2, 1.2),
            (2.5, 10.0, 10.0),
            (3.0, 9.0, 9.0),
            (4.0, 8.0, 8.0),
            # Finer, but no whole number of pixels fits: eighths of them, a patch of 8 px whole.
            (0.7, 1.1375, 1.1375),
            (6.0, 9.75, 9.75),
        ],
    )
    def test_table(self, native: float, gsd_m: float, told: float) -> None:
        reading = SPEC.reading(native)
        assert reading.gsd_m == pytest.approx(gsd_m, rel=1e-9)
        assert reading.told_m == pytest.approx(told, rel=1e-9)
        assert not reading.warning

    @pytest.mark.parametrize("native", [10.3, 15.0, 30.0, 250.0])
    def test_coarser(self, native: float) -> None:
        reading = SPEC.reading(native)
        assert reading.gsd_m == native
        assert reading.told_m == 10.0
        assert "coarser" in reading.warning
        assert "1-1.2 m and 7.03-10 m" in reading.warning
        assert "\n" not in reading.warning

    @pytest.mark.parametrize(
        ("native", "asked", "told", "kind"),
        [
            (10.0, 10.0, 10.0, ""),
            (0.3, 8.0, 8.0, ""),
            (10.0, 5.0, 7.03, "finer"),
            (0.3, 0.5, 1.0, "finer"),
            (0.3, 2.0, 1.2, "coarser"),
            (0.3, 5.5, 7.03, "finer"),
            (10.0, 20.0, 10.0, "coarser"),
        ],
    )
    def test_requested(self, native: float, asked: float, told: float, kind: str) -> None:
        reading = SPEC.reading(native, asked)
        assert reading.gsd_m == asked
        assert reading.told_m == pytest.approx(told)
        assert kind in reading.warning
        assert bool(reading.warning) == bool(kind)

    @pytest.mark.parametrize("asked", [0.0, -1.0, math.nan, -math.inf, math.inf])
    def test_request_that_is_no_length(self, asked: float) -> None:
        with pytest.raises(UsageError, match="--gsd") as caught:
            SPEC.reading(10.0, asked)
        one_line(caught)

    def test_request_finer_than_the_imagery(self) -> None:
        with pytest.raises(UsageError, match="finer pixels than the imagery has") as caught:
            SPEC.reading(10.0, 4.9)
        assert "10 or more" in one_line(caught)

    @given(specs(), st.floats(0.01, 1000))
    def test_within_a_trained_range_or_with_a_warning(self, spec: InputSpec, native: float) -> None:
        reading = spec.reading(native)
        assert any(low <= reading.told_m <= high for low, high in spec.gsd_m)
        assert within(reading.gsd_m, spec.gsd_m) or reading.warning
        if not reading.warning:
            assert reading.told_m == pytest.approx(reading.gsd_m, rel=0.0201)
        # Never finer than the imagery: that would be interpolated.
        assert reading.gsd_m >= native * (1 - 1e-12)

    @given(specs(), st.floats(0.01, 1000))
    def test_no_coarser_than_it_must(self, spec: InputSpec, native: float) -> None:
        """It is the finest range that the imagery fills."""
        reading = spec.reading(native)
        fitting = [high for _, high in spec.gsd_m if native <= high]
        if fitting:
            assert reading.gsd_m <= fitting[0] * 1.0201
            assert not reading.warning
        else:
            assert reading.gsd_m == native

    @given(specs(), st.floats(0.01, 1000), st.floats(0.01, 2000))
    def test_a_request_is_granted_or_refused(
        self, spec: InputSpec, native: float, asked: float
    ) -> None:
        if asked < native / 2:
            with pytest.raises(UsageError):
                spec.reading(native, asked)
            return
        reading = spec.reading(native, asked)
        assert reading.gsd_m == asked
        assert any(low <= reading.told_m <= high for low, high in spec.gsd_m)
        assert bool(reading.warning) == (
            max(asked / reading.told_m, reading.told_m / asked) > TOLERANCE
        )

    @given(specs(), st.floats(0.01, 1000))
    def test_finer_imagery_is_read_in_whole_patches(self, spec: InputSpec, native: float) -> None:
        """A cell of a patch is a whole number of the imagery's pixels, where one fits the range."""
        reading = spec.reading(native)
        pixels = spec.patch_px * reading.gsd_m / native
        low, high = next(((a, b) for a, b in spec.gsd_m if native <= b * TOLERANCE), (0.0, 0.0))
        assume(high)
        room = spec.patch_px * np.array([low, high]) / native
        if math.ceil(room[0]) <= math.floor(room[1]):
            assert pixels == pytest.approx(round(pixels), abs=1e-6)

    def test_describe(self) -> None:
        assert SPEC.describe_gsd() == "1-1.2 m and 7.03-10 m"
        one = replace(SPEC, gsd_m=((10.0, 10.0),))
        assert "10" in one.describe_gsd()


BING = InputSpec(224, 16, 300, ((0.6, 0.6),), scales=(1, 3, 5))
SENTINEL = InputSpec(224, 16, 256, ((10.0, 10.0),), scales=(1, 3, 5))


class TestReadingResizedCrops:
    """Models that were trained on crops of another size, resized to their window."""

    @pytest.mark.parametrize(
        ("spec", "native", "scale", "crop_m", "told"),
        [
            (SENTINEL, 10.0, 1, 2560.0, 10.0),
            (SENTINEL, 10.0, 3, 7680.0, 30.0),
            (SENTINEL, 10.0, 5, 12800.0, 50.0),
            # A pixel on the ground is a little more or less than the map's: still the same crop.
            (SENTINEL, 10.004, 1, 2561.024, 10.0),
            (BING, 0.6, 1, 180.0, 0.6),
            (BING, 0.25, 1, 180.0, 0.6),
            (BING, 0.25, 5, 900.0, 3.0),
            (BING, 0.75, 1, 180.0, 0.6),
            (BING, 3.5, 5, 900.0, 3.0),
        ],
    )
    def test_window_covers_the_ground_of_the_crop(
        self, spec: InputSpec, native: float, scale: int, crop_m: float, told: float
    ) -> None:
        reading = spec.reading(native, scale=scale)
        assert reading.gsd_m * spec.window_px == pytest.approx(crop_m)
        assert reading.told_m == pytest.approx(told)
        assert not reading.warning

    @pytest.mark.parametrize(("scale", "told"), [(1, 0.6), (5, 3.0)])
    def test_coarser_imagery_is_read_as_it_is(self, scale: int, told: float) -> None:
        reading = BING.reading(10.0, scale=scale)
        assert reading.gsd_m == 10.0
        assert reading.told_m == pytest.approx(told)
        assert "coarser" in reading.warning
        assert "0.6 m" in reading.warning

    def test_request(self) -> None:
        reading = SENTINEL.reading(10.0, 20.0)
        assert (reading.gsd_m, reading.told_m) == (20.0, 10.0)
        assert "coarser" in reading.warning

    @pytest.mark.parametrize("scale", [0, 2, 7, -1])
    def test_other_scales(self, scale: int) -> None:
        with pytest.raises(UsageError) as caught:
            BING.reading(0.6, scale=scale)
        assert "1, 3, 5" in one_line(caught)
