"""Every awkward raster is mapped rightly, or refused in one line that says what to do."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from rasterio.errors import NotGeoreferencedWarning
from rio_cogeo import cog_validate

import soundmap

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Map:
    """What the map of an awkward raster is like."""

    shape: tuple[int, int]
    per_cell: int | None
    """Pixels of the raster along a cell; None: no whole number, so that cells in degrees are square
    on the ground."""
    band: float = 0.1
    """How far from one half the share of imagery under a cell may be to go either way."""
    warns: str = ""
    """What the user is told besides."""


NO_CRS = "no coordinate reference system"
COARSE = "too coarse to tell what a place sounds like"

OUTCOMES: dict[str, Map | str] = {
    "all_nodata_uint16_utm28.tif": "no valid pixel",
    "colorado_rgb_internal_mask_0p15m_epsg26913.tif": Map((4, 6), 64),
    "colorado_rgba_0p15m_epsg26913.tif": Map((4, 6), 64),
    "corrupt_tiles_jpeg_epsg3857.tif": "cut short or damaged",
    "crosses_antimeridian_uint16_utm60.tif": Map((294, 291), 8, 0, "coarser"),
    "empty.tif": "the file is empty",
    "esri_wkt_crs.tif": "esri_wkt_crs.tif",
    "float_nan.tif": NO_CRS,
    "float_nodata_nan_epsg4326.tif": Map((55, 64), None, warns="coarser"),
    "geos_projection_rgb.tif": COARSE,
    "krivoklatsko_rgb_missing_crs.tif": NO_CRS,
    "mostly_transparent_rgba_jpeg_epsg3857.tif": Map((51, 51), 24),
    "neon_osbs_rgb_nodata255_0p1m_utm17.tif": Map((4, 4), 96),
    "not_a_tiff.tif": "not a raster",
    "rgba_uint16_utm12.tif": Map((51, 79), 8),
    "rotated_transform.tif": NO_CRS,
    "single_band_epsg3857.tif": Map((85, 85), 8, warns="coarser"),
    "south_up_positive_dy.tif": COARSE,
    "tiny_rgb_nodata_epsg4326.tif": COARSE,
    "truncated_cog_opens_then_read_fails.tif": "cut short or damaged",
    "whole_world_rgb_epsg4326.tif": COARSE,
}
MAPPED = {name: outcome for name, outcome in OUTCOMES.items() if isinstance(outcome, Map)}
REFUSED = {name: outcome for name, outcome in OUTCOMES.items() if isinstance(outcome, str)}
CONCEPTS = "birdsong,road traffic"


def test_the_table_is_complete(shared_data: Path) -> None:
    assert {p.name for p in (shared_data / "hostile").iterdir()} == set(OUTCOMES)


@pytest.mark.parametrize(("name", "about"), REFUSED.items())
def test_refused(
    command: Command, shared_data: Path, tmp_path: Path, name: str, about: str
) -> None:
    for out in ("map.tif", "map.zarr"):
        result = command(
            "predict",
            "--quiet",
            "--imagery",
            shared_data / "hostile" / name,
            "--out",
            tmp_path / out,
        )
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("Error: ")
        assert name in result.stderr
        assert about in result.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "expected"), MAPPED.items())
def test_mapped(
    command: Command, shared_data: Path, tmp_path: Path, name: str, expected: Map
) -> None:
    path = shared_data / "hostile" / name
    result = command(
        "predict", "--imagery", path, "--concepts", CONCEPTS, "--out", tmp_path / "map.tif"
    )
    assert (result.returncode, result.stdout.split()[0]) == (0, "Wrote")
    assert ("Warning" in result.stderr) == bool(expected.warns)
    assert expected.warns in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"map.tif", "map.qml"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cog_validate(tmp_path / "map.tif", strict=True)[0]

    with rasterio.open(tmp_path / "map.tif") as dataset:
        crs, cells, values = dataset.crs, dataset.transform, dataset.read()
        assert dataset.descriptions == tuple(CONCEPTS.split(","))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            assert crs == dataset.crs
            pixel, mask = dataset.transform, dataset.dataset_mask() > 0
    n = expected.per_cell
    assert values.shape[1:] == expected.shape
    if n is None:
        # As much of the map as of the raster has values, but for cells that the edge runs through.
        assert np.isfinite(values[0]).mean() == pytest.approx(mask.mean(), abs=0.05)
        return
    assert cells[:6] == pytest.approx(
        (n * pixel.a, 0, pixel.c, 0, n * pixel.e, pixel.f), rel=1e-9, abs=1e-6
    )

    # Where there is imagery, and only there, is a value.
    rows, cols = expected.shape
    whole = np.zeros((rows * n, cols * n), bool)
    part = mask[: rows * n, : cols * n]
    whole[: part.shape[0], : part.shape[1]] = part
    share = whole.reshape(rows, n, cols, n).mean(axis=(1, 3))
    known = np.isfinite(values[0])
    assert known[share >= 0.5 + expected.band].all()
    assert not known[share < 0.5 - expected.band].any()
    assert known.any()
    found = values[:, known]
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_box_across_the_180th_meridian_is_one_map(shared_data: Path) -> None:
    path = shared_data / "hostile" / "crosses_antimeridian_uint16_utm60.tif"

    def part(west: float, east: float) -> xr.DataArray:
        return soundmap.predict(path, bbox=(west, 51.6, east, 52.0), concepts=["birdsong"])

    both = part(179.5, -179.5)
    assert np.isfinite(both.to_numpy()).all()
    for side in (part(179.5, 179.9), part(-179.9, -179.5)):
        same = both.sel(x=side["x"], y=side["y"], method="nearest", tolerance=1)
        np.testing.assert_allclose(side.to_numpy(), same.to_numpy(), atol=1e-3)


def test_a_white_roof_is_not_lost_to_a_nodata_of_255(shared_data: Path) -> None:
    # The file's nodata is 255 in each band, and some real pixels are white: they are too few to
    # take a cell away.
    path = shared_data / "hostile" / "neon_osbs_rgb_nodata255_0p1m_utm17.tif"
    assert np.isfinite(soundmap.predict(path, concepts=["birdsong"]).to_numpy()).all()
