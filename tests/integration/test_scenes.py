"""Every real scene becomes a GeoTIFF and a Zarr that say the same, in the right place."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from rasterio.coords import BoundingBox
from rasterio.enums import Resampling
from rasterio.transform import array_bounds
from rasterio.warp import reproject
from rio_cogeo import cog_validate

import soundmap
from soundmap.encoder import DEFAULT_MODEL, find_model
from soundmap.encoder.bank_files import PROMPTS_FILE, read_concepts
from soundmap.grid import metres_per_unit

# How far from one half the share of imagery under a cell may be for the cell to go either way.
# Where the model sees the file's own pixels the rule is exact; where these are averaged first (each
# of them valid from one half on) or cells are warped, shares near one half may be rounded.
EXACT, AVERAGED, WARPED = 0.0, 0.05, 0.1

SCENES = {
    "bali_drone_rgba_0p35m_utm50s.tif": AVERAGED,
    "eurosat_mosaic_beziers_languedoc_utm31.tif": EXACT,
    "eurosat_mosaic_mainz_rhine_utm32.tif": EXACT,
    "eurosat_mosaic_thames_estuary_utm31.tif": EXACT,
    "gorinchem_nl_ortho_0p25m_epsg28992.tif": AVERAGED,
    "idaho_aerial_rgb_10m_epsg26912.tif": EXACT,
    "l7_bahamas_rgb_300m_utm18.tif": EXACT,
    "landsat_pucallpa_peru_2020_swirnirredgreen_90m_epsg4326.tif": WARPED,
    "pyeongchang_0p6m_epsg3857_cog.tif": WARPED,
    "s2_demmin_germany_rgbn_uint16_10m_epsg4326.tif": WARPED,
    "s2_fishbourne_isle_of_wight_bgrn_float_10m_utm30.tif": EXACT,
    "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif": EXACT,
    "s2_krivoklatsko_rgb_21m_utm33.tif": EXACT,
    "s2_tci_libya_egypt_coast_100m_utm34_cog.tif": EXACT,
}

# In degrees at 54° north, where a pixel of equal sides is 6 x 10 m.
SQUARE_ON_THE_GROUND = {"s2_demmin_germany_rgbn_uint16_10m_epsg4326.tif"}


@dataclass(frozen=True)
class Mapped:
    """A scene and its two maps."""

    scene: Path
    tif: Path
    zarr: Path
    band: float
    crs: rasterio.crs.CRS
    transform: Affine
    """Of the scene."""
    mask: NDArray[np.bool_]
    """bool[H, W], valid pixels of the scene, as GDAL tells them."""


@pytest.fixture(scope="module", params=SCENES)
def mapped(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapped:
    scene = shared_data / "scenes" / request.param
    folder = tmp_path_factory.mktemp(scene.stem)
    for name in ("map.tif", "map.zarr"):
        soundmap.predict(scene, out=folder / name)
    assert sorted(p.name for p in folder.iterdir()) == ["map.qml", "map.tif", "map.zarr"]
    with rasterio.open(scene) as dataset:
        return Mapped(
            scene,
            folder / "map.tif",
            folder / "map.zarr",
            SCENES[request.param],
            dataset.crs,
            dataset.transform,
            dataset.dataset_mask() > 0,
        )


def read_tif(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as dataset:
        values: NDArray[np.float32] = dataset.read()
    return values


def bank_names() -> list[str]:
    return [c.name for c in read_concepts(find_model(DEFAULT_MODEL).folder / PROMPTS_FILE)]


def valid_share(mapped: Mapped) -> NDArray[np.float64]:
    """Share of valid imagery under every cell, counted in the scene's own pixels."""
    with rasterio.open(mapped.tif) as dataset:
        rows, cols = dataset.shape
        transform = dataset.transform
    per_cell = round(transform.a / mapped.transform.a)
    if mapped.scene.name in SQUARE_ON_THE_GROUND:
        averaged, _ = reproject(
            mapped.mask.astype(np.float64),
            np.zeros((rows, cols)),
            src_transform=mapped.transform,
            src_crs=mapped.crs,
            dst_transform=transform,
            dst_crs=mapped.crs,
            resampling=Resampling.average,
        )
        # What lies beyond the scene's edge is no imagery either.
        right, bottom = ~transform * (mapped.transform * mapped.mask.shape[::-1])
        within = np.clip(bottom - np.arange(rows), 0, 1)[:, None] * np.clip(
            right - np.arange(cols), 0, 1
        )
        return np.asarray(averaged * within)
    pixels = np.zeros((rows * per_cell, cols * per_cell))
    part = mapped.mask[: pixels.shape[0], : pixels.shape[1]]
    pixels[: part.shape[0], : part.shape[1]] = part
    share: NDArray[np.float64] = pixels.reshape(rows, per_cell, cols, per_cell).mean(axis=(1, 3))
    return share


def test_both_kinds_hold_the_same_numbers(mapped: Mapped) -> None:
    values = read_tif(mapped.tif)
    stored = xr.open_zarr(mapped.zarr)["probability"]
    np.testing.assert_array_equal(values, stored.to_numpy())
    known = values[np.isfinite(values)]
    assert known.size
    assert known.min() >= 0
    assert known.max() <= 1
    assert np.ptp(known) > 0.05


def middle_of(bounds: BoundingBox) -> tuple[float, float]:
    return (bounds.left + bounds.right) / 2, (bounds.bottom + bounds.top) / 2


def test_a_map_lies_where_its_scene_does(mapped: Mapped) -> None:
    with rasterio.open(mapped.tif) as dataset:
        assert dataset.crs == mapped.crs
        cells, bounds = dataset.transform, dataset.bounds
    pixel = mapped.transform
    # Cells are whole blocks of the scene's pixels, counted from its corner, but where these are far
    # from square on the ground: there the cells are square.
    assert (cells.b, cells.d) == (0, 0)
    assert (cells.c, cells.f) == pytest.approx((pixel.c, pixel.f), abs=0.01 * pixel.a)
    if mapped.scene.name in SQUARE_ON_THE_GROUND:
        across, along = metres_per_unit(str(mapped.crs), *middle_of(bounds))
        assert cells.a * across == pytest.approx(-cells.e * along, rel=0.002)
    else:
        per_cell = round(cells.a / pixel.a)
        assert per_cell >= 8
        whole = (per_cell * pixel.a, per_cell * pixel.e)
        assert (cells.a, cells.e) == pytest.approx(whole, rel=1e-9)
    _, bottom, right, _ = array_bounds(*mapped.mask.shape, pixel)
    half = 0.5 + 1e-6
    assert abs(bounds.right - right) <= half * cells.a
    assert abs(bounds.bottom - bottom) <= half * -cells.e


def test_a_cell_is_nodata_exactly_where_the_imagery_is(mapped: Mapped) -> None:
    values = read_tif(mapped.tif)
    known = np.isfinite(values)
    assert (known == known[0]).all()
    share = valid_share(mapped)
    data = known[0]
    assert data[share == 1].all()
    assert not data[share == 0].any()
    assert data[share >= 0.5 + mapped.band].all()
    assert not data[share < 0.5 - mapped.band].any()
    either_way = np.abs(share - 0.5) < mapped.band
    assert either_way.mean() < 0.02


def test_the_geotiff_is_a_cog_with_the_concepts_as_bands(mapped: Mapped) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cog_validate(mapped.tif, strict=True) == (True, [], [])
    with rasterio.open(mapped.tif) as dataset:
        assert list(dataset.descriptions) == bank_names()
        assert set(dataset.dtypes) == {"float32"}
        assert np.isnan(dataset.nodata)
        assert dataset.tags()["IMAGERY"] == mapped.scene.name


def test_a_style_with_a_fixed_scale_lies_beside(mapped: Mapped) -> None:
    root = ET.parse(mapped.tif.with_suffix(".qml")).getroot()
    renderer = root.find("pipe/rasterrenderer")
    assert renderer is not None
    assert renderer.get("type") == "singlebandpseudocolor"
    assert renderer.get("band") == "1"
    low, high = (float(renderer.get(f"classification{end}", "nan")) for end in ("Min", "Max"))
    assert (low, high) == (0, 1)
    stops = [float(item.get("value", "nan")) for item in root.iter("item")]
    assert (min(stops), max(stops)) == (0, 1)
    assert stops == sorted(stops)
    limits = renderer.find("minMaxOrigin/limits")
    assert limits is not None
    assert limits.text == "None"


def test_gdal_opens_the_zarr_as_a_raster(mapped: Mapped) -> None:
    with rasterio.open(mapped.tif) as tif, rasterio.open(mapped.zarr) as zarr:
        assert zarr.crs == mapped.crs
        assert zarr.transform.almost_equals(tif.transform, 1e-9 * tif.transform.a)
        assert zarr.shape == tif.shape
        assert zarr.count == tif.count
        np.testing.assert_array_equal(zarr.read(1), tif.read(1))


def test_xarray_opens_the_zarr_with_names_and_coordinates(mapped: Mapped) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = xr.open_zarr(mapped.zarr)["probability"]
    assert values.dims == ("concept", "y", "x")
    assert values["concept"].to_numpy().tolist() == bank_names()
    with rasterio.open(mapped.tif) as dataset:
        cells, (rows, cols) = dataset.transform, dataset.shape
    np.testing.assert_allclose(values["x"], cells.c + (np.arange(cols) + 0.5) * cells.a, rtol=1e-12)
    np.testing.assert_allclose(values["y"], cells.f + (np.arange(rows) + 0.5) * cells.e, rtol=1e-12)


def test_soundmap_opens_both_alike(mapped: Mapped) -> None:
    one, other = (soundmap.open(path) for path in (mapped.tif, mapped.zarr))
    for opened in (one, other):
        assert list(opened.data_vars) == ["probability"]
        assert opened["probability"].dims == ("concept", "y", "x")
        assert opened["probability"].dtype == np.float32
        assert opened.rio.crs == mapped.crs
    xr.testing.assert_allclose(
        one["probability"].reset_coords(drop=True),
        other["probability"].reset_coords(drop=True),
        rtol=1e-12,
    )
