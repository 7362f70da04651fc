"""Every awkward raster either reads rightly or is refused in words; so does every real scene."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling, transform_bounds

from soundmap.errors import InputError, SoundmapError
from soundmap.grid import local_metric_crs
from soundmap.sources import open_source

NO_CRS = "no coordinate reference system.*rio edit-info --crs"
NO_RASTER = "not a raster that GDAL can read"

# Pixels that are valid, or what the refusal says.
HOSTILE: dict[str, int | str] = {
    "all_nodata_uint16_utm28.tif": 0,
    "colorado_rgb_internal_mask_0p15m_epsg26913.tif": 86_117,
    "colorado_rgba_0p15m_epsg26913.tif": 78_812,
    "corrupt_tiles_jpeg_epsg3857.tif": "cut short or damaged",
    "crosses_antimeridian_uint16_utm60.tif": 5_475_375,
    "empty.tif": "empty .0 bytes.",
    "esri_wkt_crs.tif": 4,
    "float_nan.tif": NO_CRS,
    "float_nodata_nan_epsg4326.tif": 79_201,
    "geos_projection_rgb.tif": 846_946,
    "krivoklatsko_rgb_missing_crs.tif": NO_CRS,
    "mostly_transparent_rgba_jpeg_epsg3857.tif": 23_188,
    "neon_osbs_rgb_nodata255_0p1m_utm17.tif": 159_539,
    "not_a_tiff.tif": NO_RASTER,
    "rgba_uint16_utm12.tif": 127_316,
    "rotated_transform.tif": NO_CRS,
    "single_band_epsg3857.tif": 299_434,
    "south_up_positive_dy.tif": 0,
    "tiny_rgb_nodata_epsg4326.tif": 49_152,
    "truncated_cog_opens_then_read_fails.tif": "cut short or damaged",
    "whole_world_rgb_epsg4326.tif": 131_072,
}

SCENES = [
    "bali_drone_rgba_0p35m_utm50s.tif",
    "eurosat_mosaic_beziers_languedoc_utm31.tif",
    "eurosat_mosaic_mainz_rhine_utm32.tif",
    "eurosat_mosaic_thames_estuary_utm31.tif",
    "gorinchem_nl_ortho_0p25m_epsg28992.tif",
    "idaho_aerial_rgb_10m_epsg26912.tif",
    "l7_bahamas_rgb_300m_utm18.tif",
    "landsat_pucallpa_peru_2020_swirnirredgreen_90m_epsg4326.tif",
    "pyeongchang_0p6m_epsg3857_cog.tif",
    "s2_demmin_germany_rgbn_uint16_10m_epsg4326.tif",
    "s2_fishbourne_isle_of_wight_bgrn_float_10m_utm30.tif",
    "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif",
    "s2_krivoklatsko_rgb_21m_utm33.tif",
    "s2_tci_libya_egypt_coast_100m_utm34_cog.tif",
]


def test_the_tables_are_complete(shared_data: Path) -> None:
    assert {p.name for p in (shared_data / "hostile").iterdir()} == set(HOSTILE)
    assert {p.name for p in (shared_data / "scenes").glob("*.tif")} == set(SCENES)


@pytest.mark.parametrize(("name", "outcome"), HOSTILE.items())
def test_hostile(
    shared_data: Path, name: str, outcome: int | str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_data / "hostile" / name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        if isinstance(outcome, str):
            with pytest.raises(InputError, match=outcome) as caught:
                open_source(str(path))
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
        else:
            source = open_source(str(path))
            image = source.read(source.info.native_grid)
            assert image.valid.sum() == outcome
            assert not image.pixels[:, ~image.valid].any()
    assert capfd.readouterr() == ("", "")
    if isinstance(outcome, int):
        assert np.array_equal(image.valid, gdal_mask(path))


@pytest.mark.parametrize("name", SCENES)
def test_scenes_read_as_gdal_reads_them(shared_data: Path, name: str) -> None:
    path = shared_data / "scenes" / name
    source = open_source(str(path))
    image = source.read(source.info.native_grid)
    assert np.array_equal(image.valid, gdal_mask(path))
    with rasterio.open(path) as dataset:
        if dataset.dtypes[0] == "uint8":
            stored = dataset.read([1, 2, 3])
            assert np.array_equal(image.pixels, stored * image.valid)
        assert source.info.native_grid.affine == dataset.transform
        assert source.info.native_grid.shape == dataset.shape


@pytest.mark.parametrize(
    "name",
    [
        "hostile/colorado_rgba_0p15m_epsg26913.tif",
        "hostile/geos_projection_rgb.tif",
        "hostile/single_band_epsg3857.tif",
        "scenes/bali_drone_rgba_0p35m_utm50s.tif",
        "scenes/gorinchem_nl_ortho_0p25m_epsg28992.tif",
        "scenes/l7_bahamas_rgb_300m_utm18.tif",
        "scenes/landsat_pucallpa_peru_2020_swirnirredgreen_90m_epsg4326.tif",
        "scenes/s2_krivoklatsko_rgb_21m_utm33.tif",
        "scenes/s2_tci_libya_egypt_coast_100m_utm34_cog.tif",
    ],
)
@pytest.mark.parametrize("finer", [1.3, 0.4])
def test_other_grids_look_as_gdal_warps_them(shared_data: Path, name: str, finer: float) -> None:
    path = shared_data / name
    source = open_source(str(path))
    with rasterio.open(path) as dataset:
        x, y = dataset.transform * (dataset.width / 2, dataset.height / 2)
        lon, lat, _, _ = transform_bounds(dataset.crs, "EPSG:4326", x, y, x, y)
        crs = local_metric_crs(lon, lat)
        middle = transform_bounds("EPSG:4326", str(crs), lon, lat, lon, lat)
        pixel = source.info.native_gsd_m / finer
        half = 150 * pixel
        edges = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
        grid = GeoBox.from_bbox(edges, str(crs), shape=(300, 300))
        image = source.read(grid)
        bands = [1, 2, 3] if dataset.count >= 3 else [1, 1, 1]
        with WarpedVRT(
            dataset,
            crs=str(crs),
            transform=grid.affine,
            width=300,
            height=300,
            resampling=Resampling.bilinear if finer > 1 else Resampling.average,
            add_alpha=dataset.nodata is None and dataset.count == 3,
        ) as warped:
            expected = warped.read(bands).astype(float)
            there = warped.dataset_mask() > 0
    # GDAL keeps a pixel that is valid in the least part, here half of it must be. On the other hand
    # it takes a pixel that comes out black for nodata if that is 0.
    assert np.mean(image.valid & ~there) < 0.001
    assert np.mean(there & ~image.valid) < 0.03
    inner = image.valid & there
    inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    assert inner.mean() > 0.1
    assert np.abs(image.pixels - expected)[:, inner].mean() < 1.0


def test_a_folder_of_unlike_scenes_is_one_mosaic(shared_data: Path) -> None:
    source = open_source(str(shared_data / "scenes" / "s2_krivoklatsko_*.tif"))
    alone = open_source(str(shared_data / "scenes" / SCENES[11]))
    grid = source.info.native_grid
    assert grid.affine.a == alone.info.native_grid.affine.a
    part = alone.info.native_grid[300:500, 700:900]
    assert np.array_equal(source.read(part).pixels, alone.read(part).pixels)


def test_a_folder_with_one_bad_raster_is_refused_by_its_name(shared_data: Path) -> None:
    with pytest.raises(SoundmapError, match=r"corrupt_tiles_jpeg_epsg3857\.tif"):
        open_source(str(shared_data / "hostile"))


def gdal_mask(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path) as dataset:
            return dataset.dataset_mask() > 0
