"""Grids laid over rasters: copied, averaged, interpolated, and over the edges of the map."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from soundmap.grid import cell_lonlat
from soundmap.sources import _resample
from soundmap.sources.base import Resampling
from soundmap.sources.fake import FakeSource

UTM = "EPSG:32633"
NATIVE = Affine(10, 0, 500000, 0, -10, 5500000)

in_both_ways = pytest.mark.parametrize("resampling", ["area", "cubic"])


def reference(
    stored: np.ndarray, valid: np.ndarray, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and shares by weights over native rows and columns: the plain definition."""
    shares = rows @ valid @ cols.T
    sums = rows @ (stored * valid) @ cols.T
    return sums / np.where(shares > 0, shares, 1), shares


def box_weights(n: int, native: int, offset: float, step: float) -> np.ndarray:
    """Share of each output pixel that lies on each native one."""
    left = offset + step * np.arange(n)[:, None]
    edge = np.arange(native)[None]
    overlap = np.minimum(left + step, edge + 1) - np.maximum(left, edge)
    return np.clip(overlap, 0, None) / step


def tent_weights(n: int, native: int, offset: float, step: float) -> np.ndarray:
    """Bilinear weights of native pixels at output pixels' centres."""
    centre = offset + step * (np.arange(n)[:, None] + 0.5)
    return np.clip(1 - np.abs(np.arange(native)[None] + 0.5 - centre), 0, None)


def agrees(pixels: np.ndarray, valid: np.ndarray, colour: np.ndarray, shares: np.ndarray) -> None:
    sure = np.abs(shares - 0.5) > 2e-3
    assert np.array_equal(valid[sure], (shares >= 0.5)[sure])
    assert np.abs(pixels - colour)[:, valid].max(initial=0) <= 0.51 + 0.05
    assert not pixels[:, ~valid].any()


SCENE = np.random.default_rng(5).integers(1, 256, (3, 37, 41)).astype(np.uint8)
HOLES = np.random.default_rng(6).random((37, 41)) > 0.3
SOURCE = FakeSource(SCENE, GeoBox((37, 41), NATIVE, UTM), HOLES)


@given(
    k=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    offset=st.tuples(st.integers(-30, 50), st.integers(-30, 50)),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    flip=st.tuples(st.booleans(), st.booleans()),
)
def test_blocks_of_native_pixels_are_averaged(
    k: tuple[int, int], offset: tuple[int, int], shape: tuple[int, int], flip: tuple[bool, bool]
) -> None:
    affine = NATIVE * Affine.translation(offset[1], offset[0]) * Affine.scale(k[1], k[0])
    if flip[0]:
        affine = affine * Affine.translation(0, shape[0]) * Affine.scale(1, -1)
    if flip[1]:
        affine = affine * Affine.translation(shape[1], 0) * Affine.scale(-1, 1)
    image = SOURCE.read(GeoBox(shape, affine, UTM))
    rows = box_weights(shape[0], 37, offset[0], k[0])[:: -1 if flip[0] else 1]
    cols = box_weights(shape[1], 41, offset[1], k[1])[:: -1 if flip[1] else 1]
    colour, shares = reference(SCENE, HOLES, rows, cols)
    assert np.array_equal(image.valid, shares >= 0.5 - 1e-9)
    agrees(image.pixels, image.valid, colour, shares)


@given(
    step=st.tuples(st.floats(0.2, 6), st.floats(0.2, 6)),
    offset=st.tuples(st.floats(-20, 45), st.floats(-20, 45)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_other_grids_by_area_or_bilinear(
    step: tuple[float, float], offset: tuple[float, float], shape: tuple[int, int]
) -> None:
    affine = NATIVE * Affine.translation(offset[1], offset[0]) * Affine.scale(step[1], step[0])
    image = SOURCE.read(GeoBox(shape, affine, UTM))
    weights = box_weights if max(step) > 1.001 else tent_weights
    rows = weights(shape[0], 37, offset[0], step[0])
    cols = weights(shape[1], 41, offset[1], step[1])
    agrees(image.pixels, image.valid, *reference(SCENE, HOLES, rows, cols))


@in_both_ways
def test_large_requests_are_read_in_pieces(
    monkeypatch: pytest.MonkeyPatch, resampling: Resampling
) -> None:
    grids = [
        GeoBox((7, 8), NATIVE * Affine.scale(5), UTM),
        GeoBox((30, 30), NATIVE * Affine.translation(-3.3, 2.2) * Affine.scale(1.7), UTM),
        SOURCE.info.native_grid.to_crs("EPSG:4326"),
    ]
    before = [SOURCE.read(g, resampling) for g in grids]
    monkeypatch.setattr(_resample, "_MAX_SOURCE_PX", 200)
    for image, grid in zip(before, grids, strict=True):
        pieces = SOURCE.read(grid, resampling)
        assert np.mean(pieces.valid != image.valid) < 0.005
        both = pieces.valid & image.valid
        step = pieces.pixels.astype(int) - image.pixels
        assert np.abs(step[:, both]).max() <= 1


# --------------------------------------------------------------------------- places


def globe(grid: GeoBox) -> np.ndarray:
    """Colours that are a smooth function of the place on the sphere."""
    lon, lat = np.radians(cell_lonlat(grid))
    xyz = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    return 127 + 100 * xyz


@cache
def painted(world: str) -> FakeSource:
    native = WORLDS[world]
    return FakeSource(np.rint(globe(native)).astype(np.uint8), native)


WORLDS = {
    "-180..180": GeoBox((360, 720), Affine(0.5, 0, -180, 0, -0.5, 90), "EPSG:4326"),
    "0..360": GeoBox((360, 720), Affine(0.5, 0, 0, 0, -0.5, 90), "EPSG:4326"),
    "south-up": GeoBox((360, 720), Affine(0.5, 0, -180, 0, 0.5, -90), "EPSG:4326"),
    "utm over the dateline": GeoBox((600, 700), Affine(6e3, 0, -1e6, 0, -6e3, 7e6), "EPSG:32660"),
    "rotated": GeoBox(
        (600, 600),
        Affine.translation(-1e6, 6e6) * Affine.rotation(30) * Affine.scale(6e3, -6e3),
        "EPSG:32660",
    ),
    "mercator": GeoBox(
        (900, 900), Affine(44527.8, 0, -20037508.34, 0, -44527.8, 20037508.34), "EPSG:3857"
    ),
}
PLACES = {
    "utm 60, over the dateline": GeoBox((90, 90), Affine(9e3, 0, 2e5, 0, -9e3, 5e6), "EPSG:32660"),
    "utm 1, over the dateline": GeoBox((90, 90), Affine(9e3, 0, 1e4, 0, -9e3, 5e6), "EPSG:32601"),
    "degrees past 180": GeoBox((90, 90), Affine(0.09, 0, 176, 0, -0.09, 45), "EPSG:4326"),
    "degrees before -180": GeoBox((90, 90), Affine(0.09, 0, -184, 0, -0.09, 45), "EPSG:4326"),
    "mercator past the edge": GeoBox((90, 90), Affine(9e3, 0, 19.7e6, 0, -9e3, 5.4e6), "EPSG:3857"),
}


@in_both_ways
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world", WORLDS)
def test_places_over_the_dateline(world: str, place: str, resampling: Resampling) -> None:
    grid = PLACES[place]
    image = painted(world).read(grid, resampling)
    assert image.valid.all()
    assert np.abs(image.pixels - globe(grid)).max() < 1.2


@in_both_ways
@pytest.mark.parametrize("world", ["-180..180", "0..360", "south-up"])
def test_pole(world: str, resampling: Resampling) -> None:
    grid = GeoBox((100, 100), Affine(2e4, 0, 1e6, 0, -2e4, 3e6), "EPSG:32661")
    image = painted(world).read(grid, resampling)
    assert image.valid.mean() > 0.999, "only the pixel around the pole itself may be lost"
    assert np.abs(image.pixels - globe(grid))[:, image.valid].max() < 1.2
