"""Windows leave no trace in a map: no seam, no dependence on what else was mapped, little cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from numpy.typing import NDArray
from rasterio.warp import transform_bounds

import soundmap
from soundmap.encoder import DEFAULT_MODEL, find_model
from soundmap.encoder.torch_encoder import TorchEncoder
from soundmap.layout import choose_layout
from soundmap.sources import open_source

SCENE = "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif"
# Greatest step into or out of the cells where windows meet, over that elsewhere.
MOST_STEP = 1.05
# Greatest number of pixels that the encoder sees, over those of the map.
MOST_COST = 1.5
# Cells along a window, where it is free: small, so that there are many borders to look at.
NARROW = 8


@dataclass(frozen=True)
class Counted:
    """A map, and how many pixels were encoded for it."""

    values: xr.DataArray
    pixels: int


@pytest.fixture(scope="module")
def whole(shared_data: Path) -> Counted:
    seen: list[int] = []
    encode = TorchEncoder.encode_images

    def counting(self: TorchEncoder, pixels: NDArray[np.uint8], *args: Any, **options: Any) -> Any:
        seen.append(pixels[:, 0].size)
        return encode(self, pixels, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEncoder, "encode_images", counting)
        values = soundmap.predict(shared_data / "scenes" / SCENE)
    return Counted(values, sum(seen))


@dataclass(frozen=True)
class Bordered:
    """A map of narrow windows, and the cells where each window begins and ends."""

    values: xr.DataArray
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    """int64[N, 2], first cell and cell after the last, of those that a window gives a share to."""


@pytest.fixture(scope="module")
def narrow(shared_data: Path) -> Bordered:
    scene = shared_data / "scenes" / SCENE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soundmap.layout._TILE_CELLS", NARROW)
        values = soundmap.predict(scene)
        layout = choose_layout(open_source(str(scene)).info, find_model(DEFAULT_MODEL).spec, None)
    assert layout.lattice is not None
    span = layout.lattice.span_of(layout.grid)
    assert span is not None
    assert max(span.shape) <= layout.unit_cells
    tiling = layout.lattice.tiling(span)
    first = np.array([tiling.covered.row0 - span.row0, tiling.covered.col0 - span.col0])
    counted = np.argwhere(tiling.weights > 0)
    starts = tiling.corners + first + counted.min(axis=0)
    ends = tiling.corners + first + counted.max(axis=0) + 1
    both = np.stack([starts, ends], axis=2)
    return Bordered(values, np.unique(both[:, 0], axis=0), np.unique(both[:, 1], axis=0))


@pytest.mark.parametrize("axis", ["x", "y"])
def test_no_seam_where_windows_meet(narrow: Bordered, axis: str) -> None:
    values = narrow.values.transpose("concept", ..., axis).to_numpy()
    steps = np.abs(np.diff(values, axis=-1))
    count = steps.shape[-1]
    spans = narrow.cols if axis == "x" else narrow.rows
    # Step i leads from cell i to cell i + 1: into a window's first cell and out of its last.
    at = np.unique(spans.ravel() - 1)
    border = np.zeros(count, bool)
    border[at[(at >= 0) & (at < count)]] = True
    assert 0.9 / NARROW < border.mean() < 0.5
    at_borders = np.nanmean(steps[..., border], axis=(1, 2))
    elsewhere = np.nanmean(steps[..., ~border], axis=(1, 2))
    assert at_borders.mean() <= MOST_STEP * elsewhere.mean()
    # Each concept alike, however faint. One by itself may have its few steps anywhere.
    assert (at_borders / elsewhere).mean() <= MOST_STEP


def test_how_wide_windows_are_leaves_no_trace(whole: Counted, narrow: Bordered) -> None:
    np.testing.assert_allclose(whole.values.to_numpy(), narrow.values.to_numpy(), atol=1e-3)


def test_overlap_costs_little(whole: Counted) -> None:
    _, rows, cols = whole.values.shape
    bare = rows * cols * find_model(DEFAULT_MODEL).spec.patch_px ** 2
    assert bare <= whole.pixels <= MOST_COST * bare


def test_a_part_equals_the_same_cells_of_the_whole(whole: Counted, shared_data: Path) -> None:
    check_part(shared_data / "scenes" / SCENE, whole.values, ((0.31, 0.42), (0.63, 0.77)))


@pytest.mark.parametrize(
    "name",
    [
        "gorinchem_nl_ortho_0p25m_epsg28992.tif",  # pixels are averaged first
        "s2_fishbourne_isle_of_wight_bgrn_float_10m_utm30.tif",  # stretched by the whole raster
        "s2_demmin_germany_rgbn_uint16_10m_epsg4326.tif",  # scores are warped from a metric CRS
        "pyeongchang_0p6m_epsg3857_cog.tif",  # both
        "bali_drone_rgba_0p35m_utm50s.tif",  # windows lie partly beyond the imagery
        "s2_tci_libya_egypt_coast_100m_utm34_cog.tif",
    ],
)
def test_so_does_a_part_of_scenes_that_are_resampled(shared_data: Path, name: str) -> None:
    scene = shared_data / "scenes" / name
    check_part(scene, soundmap.predict(scene), ((0.2, 0.35), (0.7, 0.8)))


def test_units_leave_no_trace(
    shared_data: Path, whole: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same map again in many units: each cell must come out the same.
    monkeypatch.setattr("soundmap.layout._MOST_UNIT_CELLS", 64)
    again = soundmap.predict(shared_data / "scenes" / SCENE)
    np.testing.assert_allclose(again.to_numpy(), whole.values.to_numpy(), atol=1e-3)


def test_units_leave_no_trace_where_cells_are_warped(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = shared_data / "scenes" / "s2_demmin_germany_rgbn_uint16_10m_epsg4326.tif"
    once = soundmap.predict(scene).to_numpy()
    monkeypatch.setattr("soundmap.layout._MOST_UNIT_CELLS", 16)
    np.testing.assert_allclose(soundmap.predict(scene).to_numpy(), once, atol=1e-3)


def check_part(
    scene: Path, whole: xr.DataArray, inside: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    """Map a part, given by two corners as shares of width and height, and compare the cells."""
    with rasterio.open(scene) as dataset:
        crs, edges = dataset.crs, dataset.bounds
    (west, east), (north, south) = inside
    left, right = (edges.left + share * (edges.right - edges.left) for share in (west, east))
    top, bottom = (edges.top - share * (edges.top - edges.bottom) for share in (north, south))
    bbox = transform_bounds(crs, "EPSG:4326", left, bottom, right, top)
    part = soundmap.predict(scene, bbox=bbox)
    cell = whole.rio.transform().a
    same = whole.sel(x=part["x"], y=part["y"], method="nearest")
    np.testing.assert_allclose(same["x"], part["x"], atol=1e-6 * cell)
    np.testing.assert_allclose(same["y"], part["y"], atol=1e-6 * cell)
    assert part.sizes["x"] < whole.sizes["x"]
    assert part.sizes["y"] < whole.sizes["y"]
    # The part holds every cell that the box touches.
    assert part["x"].min() - cell / 2 <= left + 1e-6 * cell
    assert part["x"].max() + cell / 2 >= right - 1e-6 * cell
    np.testing.assert_allclose(part.to_numpy(), same.to_numpy(), atol=1e-3)
