"""Maps whose cells are not the model's: other CRSs, other sizes, imagery in degrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.grid import cell_lonlat, project_lonlat
from soundmap.pipeline import Job
from soundmap.sources.fake import FakeSource
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import colours_of, compute, make_job

# Imagery is a ramp in x and y: a cell's colour tells from where its imagery came.
SIDE = 240
# Grey levels per pixel, so that one cell of 8 px is 6.4 levels.
SLOPE = 0.8
GRID = GeoBox((SIDE, SIDE), Affine(10, 0, 499_980, 0, -10, 5_600_040), "EPSG:32633")

both = pytest.mark.parametrize("context_px", [None, 11], ids=["whole windows", "local patches"])


def ramp() -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return np.rint(np.stack([20 + SLOPE * x, 20 + SLOPE * y, 0 * x + 90])).astype(np.uint8)


def check(source: FakeSource, encoder: FakeEncoder, job: Job, grid: GeoBox) -> None:
    found = compute(job, encoder)
    lon, lat = cell_lonlat(job.plan.grid)
    if grid.crs.geographic:
        lon = np.where(lon < grid.affine.c - 1, lon + 360, lon)
    x, y = project_lonlat(grid.crs, lon, lat).T.reshape(2, *lon.shape)
    col, row = ~grid.affine * (x, y)
    red, green, blue = colours_of(found)
    # How many pixels off the place lies from which a cell's colour came.
    off = np.maximum(np.abs((red - 20) / SLOPE - col), np.abs((green - 20) / SLOPE - row))
    outside = np.minimum(np.minimum(col, row), np.minimum(SIDE - col, SIDE - row))
    hole = np.maximum.reduce([100 - row, row - 150, 120 - col, col - 170])
    cell_px = max(8.0, float(np.abs(np.diff(col, axis=1)).max()))
    there = np.isfinite(found[0])
    inner = there & (np.minimum(outside, hole) > 8 + cell_px)
    assert inner.sum() > 20
    assert off[inner].max() < 0.75
    # Where half of a cell's imagery is missing, the other half stands for it.
    assert off[there].max() < 16
    assert np.abs(blue[there] - 90).max() < 8
    check_nodata(source, job, there)


def check_nodata(source: FakeSource, job: Job, there: NDArray[np.bool_]) -> None:
    """A cell has a value if, and only if, half of it has imagery."""
    grid, fine = job.plan.grid, 16
    rows, cols = grid.shape
    samples = GeoBox((rows * fine, cols * fine), grid.affine * Affine.scale(1 / fine), grid.crs)
    lon, lat = cell_lonlat(samples)
    native = source.info.native_grid
    assert native is not None
    if native.crs.geographic:
        lon = np.where(lon < native.affine.c - 1, lon + 360, lon)
    x, y = project_lonlat(native.crs, lon, lat).T.reshape(2, *lon.shape)
    col, row = (np.floor(v).astype(int) for v in ~native.affine * (x, y))
    inside = (col >= 0) & (row >= 0) & (col < SIDE) & (row < SIDE)
    seen = np.zeros(lon.shape, bool)
    seen[inside] = source._valid[row[inside], col[inside]]
    share = seen.reshape(rows, fine, cols, fine).mean(axis=(1, 3))
    # Half is told by four samples a side: an eighth more or less may fall on either side.
    assert there[share > 0.65].all()
    assert not there[share < 0.35].any()
    assert ((share > 0.65) | (share < 0.35)).mean() > 0.8


def make_source(grid: GeoBox) -> FakeSource:
    valid = np.ones((SIDE, SIDE), bool)
    valid[100:150, 120:170] = False
    return FakeSource(ramp(), grid, valid)


@both
@pytest.mark.parametrize(
    "options",
    [
        {"crs": "EPSG:4326"},
        {"crs": "EPSG:3857"},
        {"crs": "EPSG:3035"},
        {"crs": "EPSG:32632"},
        {"crs": "EPSG:4326", "resolution_m": 40.0},
        {"resolution_m": 33.0},
        {"resolution_m": 80.0},
        {"resolution_m": 100.0},
        {"resolution_m": 250.0},
    ],
    ids=lambda o: " ".join(str(v) for v in o.values()),
)
def test_ramp(context_px: int | None, options: dict[str, Any]) -> None:
    # No mixing in of surroundings, which at an edge would shift the colour by itself.
    encoder = FakeEncoder(4, context_px=context_px)
    grid = GRID
    source = make_source(grid)
    job = make_job(source, encoder, unit_cells=16, **options)
    check(source, encoder, job, grid)


@both
@pytest.mark.parametrize(("lon", "lat"), [(12.0, 50.0), (180.0, -17.0), (15.0, 0.0)])
def test_across_zones(context_px: int | None, lon: float, lat: float) -> None:
    """Imagery in degrees over the border of two UTM zones, the date line, the equator."""
    encoder = FakeEncoder(4, context_px=context_px, gsd_m=((7.0, 12.0),))
    px, half = 1e-4, SIDE / 2
    affine = Affine(px, 0, lon - half * px, 0, -px, lat + half * px)
    grid = GeoBox((SIDE, SIDE), affine, "EPSG:4326")
    source = make_source(grid)
    job = make_job(source, encoder, unit_cells=16)
    assert job.lattice is None
    check(source, encoder, job, grid)


@both
def test_units_change_little(context_px: int | None) -> None:
    """Warped cells depend on a grid that is laid anew in each unit, by rounding alone."""
    found = []
    for unit_cells in (7, 64):
        encoder = FakeEncoder(4, context=0.4, context_px=context_px)
        grid = GRID
        source = make_source(grid)
        job = make_job(source, encoder, unit_cells=unit_cells, crs="EPSG:4326")
        found.append(compute(job, encoder))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-3)


def test_imagery_finer_than_the_model() -> None:
    """Cells are whole blocks of pixels, which are averaged before the model sees them."""
    encoder = FakeEncoder(4, context_px=11, gsd_m=((7.0, 10.0),))
    affine = Affine(2.5, 0, 500_000, 0, -2.5, 5_600_000)
    grid = GeoBox((SIDE, SIDE), affine, GRID.crs)
    source = FakeSource(ramp(), grid)
    job = make_job(source, encoder)
    assert job.gsd_m == pytest.approx(10, rel=1e-3)
    assert job.plan.grid.affine.a == 80
    red, green, _ = colours_of(compute(job, encoder)[:, :7, :7])
    centres = 20 + SLOPE * (np.arange(7) * 32 + 16)
    np.testing.assert_allclose(red, np.broadcast_to(centres, (7, 7)), atol=0.6)
    np.testing.assert_allclose(green.T, red, atol=0.6)
