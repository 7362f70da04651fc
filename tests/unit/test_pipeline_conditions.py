"""Place, month, hour and scale on their way to the model; windows of resized crops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.encoder import Conditions, Encoding, InputSpec
from soundmap.grid import pixel_lonlat, project_lonlat
from soundmap.layout import choose_layout
from soundmap.sources.fake import FakeSource
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import compute, make_job

SHAPE = (640, 900)
GRID = GeoBox(SHAPE, Affine(10, 0, 499_980, 0, -10, 5_600_040), "EPSG:32633")


class Listening(FakeEncoder):
    """Keeps what it was told of each window."""

    def __init__(self, **options: Any) -> None:
        super().__init__(4, **options)
        self.heard: list[tuple[tuple[float, float], int | None, int | None, int]] = []
        self.pixels: list[np.ndarray] = []

    @property
    def spec(self) -> InputSpec:
        return replace(super().spec, metadata=("lonlat", "month", "hour"), scales=(1, 3))

    def encode_images(
        self,
        pixels: Any,
        lonlat: Any = None,
        month: Any = None,
        hour: Any = None,
        scale: int = 1,
        **options: Any,
    ) -> Encoding:
        assert lonlat.shape == (len(pixels), 2)
        for place, window in zip(lonlat.tolist(), pixels, strict=True):
            self.heard.append((tuple(place), month, hour, scale))
            self.pixels.append(window)
        return super().encode_images(pixels, **options)


@pytest.fixture
def source() -> FakeSource:
    """Red tells the column, green the row: a window says itself where it lies."""
    pixels = np.zeros((3, *SHAPE), np.uint8)
    pixels[0] = np.arange(SHAPE[1]) // 4
    pixels[1] = (np.arange(SHAPE[0]) // 4)[:, None]
    return FakeSource(pixels, GRID)


@pytest.mark.parametrize("detail", ["patch", "image"])
@pytest.mark.parametrize("unit_cells", [4, 64])
def test_every_window_is_told_where_it_lies(
    source: FakeSource, detail: str, unit_cells: int
) -> None:
    encoder = Listening()
    job = make_job(source, encoder, unit_cells=unit_cells, detail=detail)
    compute(replace(job, conditions=Conditions(7, 22, 3)), encoder)
    assert encoder.heard
    seen = set()
    for (lon, lat), *rest in encoder.heard:
        assert rest == [7, 22, 3]
        seen.add((round(lon, 6), round(lat, 6)))
    for (place, *_), window in zip(encoder.heard, encoder.pixels, strict=True):
        x, y = project_lonlat(GRID.crs, np.array([place[0]]), np.array([place[1]]))[0]
        col, row = (x - GRID.affine.c) / 10, (GRID.affine.f - y) / 10
        if 32 <= col <= SHAPE[1] - 32 and 32 <= row <= SHAPE[0] - 32:
            assert window[0].mean() * 4 == pytest.approx(col, abs=4)
            assert window[1].mean() * 4 == pytest.approx(row, abs=4)
    if detail == "image":
        assert len(seen) == len(encoder.heard), "windows of a map by windows lie apart"


def test_places_do_not_depend_on_the_unit(source: FakeSource) -> None:
    places = []
    for unit_cells in (8, 64):
        encoder = Listening()
        compute(make_job(source, encoder, unit_cells=unit_cells), encoder)
        places.append({tuple(np.round(place, 9)) for place, *_ in encoder.heard})
    assert places[0] == places[1]


def test_places_in_a_map_of_degrees(source: FakeSource) -> None:
    """Windows lie in the local metric grid there; their places are degrees all the same."""
    encoder = Listening()
    compute(make_job(source, encoder, unit_cells=64, crs="EPSG:4326"), encoder)
    lon, lat = pixel_lonlat(GRID, np.array([0.0, SHAPE[1]]), np.array([SHAPE[0], 0.0]))
    found = np.array([place for place, *_ in encoder.heard])
    assert (found[:, 0] > lon[0] - 0.02).all()
    assert (found[:, 0] < lon[1] + 0.02).all()
    assert (found[:, 1] > lat[0] - 0.02).all()
    assert (found[:, 1] < lat[1] + 0.02).all()


@pytest.mark.parametrize("scale", [1, 3])
def test_cells_of_resized_crops(source: FakeSource, scale: int) -> None:
    """A window of 14 cells covers exactly the pixels of the crop that stood for it in training."""
    spec = InputSpec(224, 16, 256, ((10.0, 10.0),), scales=(1, 3, 5))
    layout = choose_layout(source.info, spec, None, scale=scale)
    assert layout.grid.affine.a * 14 == pytest.approx(2560 * scale)
    assert layout.lattice is not None
    assert layout.lattice.cell == pytest.approx((2560 * scale / 14,) * 2)
    assert layout.reading.told_m == pytest.approx(10 * scale)
    assert layout.unit_cells == 252


def test_units_of_overlapping_windows_are_large(source: FakeSource) -> None:
    """What windows that straddle unit borders cost on top stays below one half."""
    spec = InputSpec(224, 16, 256, ((10.0, 10.0),))
    layout = choose_layout(source.info, spec, None)
    assert layout.lattice is not None
    side = layout.unit_cells
    span = layout.lattice.span_of(layout.grid[:side, :side])
    assert span is not None
    whole = replace(span, row0=0, row1=side, col0=0, col1=side)
    assert len(layout.lattice.tiling(whole).corners) / (side / 14) ** 2 < 1.5
