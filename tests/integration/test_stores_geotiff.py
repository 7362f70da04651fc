from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp
from rio_cogeo import cog_validate

from soundmap.errors import InputError, OutputError
from soundmap.stores import geotiff
from soundmap.stores.geotiff import export_cog
from soundmap.stores.info import describe
from soundmap.stores.schema import MapSchema
from soundmap.stores.zarr_store import create

CONCEPTS = ("birdsong", "road <traffic> & 'horns'", "église", "wind")


def schema_of(shape=(600, 1300), count=3, crs="EPSG:32629", cell=140.0, **changes):
    origin = (-0.3, 40.0) if cell < 1 else (500_000.0, 4_300_000.0)
    return MapSchema(
        concepts=CONCEPTS[:count],
        groups=("biophony", "anthrophony", "anthrophony", "geophony")[:count],
        colours=("#33a02c", "#e31a1c", "#6a3d9a", "#a6cee3")[:count],
        calibrations=("platt", "generic", "none", "platt")[:count],
        grid=GeoBox(shape, Affine(cell, 0, origin[0], 0, -cell, origin[1]), crs),
        **{
            "value": "probability",
            "formula": "sigmoid(a (s . e) + b)",
            "detail": "patch",
            "dtype": "float32",
            "chunk_cells": 256,
            "model": "soundmap-small",
            "model_hash": "0123abcd",
            "imagery": "scène.tif",
            "attribution": "Contains modified Copernicus Sentinel data 2024",
            "licence": "CC BY-SA 3.0 IGO",
            "gsd_m": 10.0,
            "software": "soundmap 0.1.0",
            "created": "2026-01-02T03:04:05Z",
            "extra": {"month": "7", "hour": "6"},
            "fingerprint": "f00d",
            **changes,
        },
    )


def store_of(path, schema):
    _, height, width = schema.shape
    size = schema.chunk_cells
    units = (-(-height // size), -(-width // size))
    store = create(path, schema, units, scratch=True)
    low, high = schema.value_range
    values = np.random.default_rng(0).random(schema.shape, dtype=np.float32) * (high - low) + low
    values[:, : height // 3, : width // 3] = np.nan
    for row in range(0, height, size):
        store.write(row, 0, values[:, row : row + size])
    store.finish()
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store") / "a.zarr", schema_of())


@pytest.fixture(scope="module")
def city(store, tmp_path_factory):
    return export_cog(store, tmp_path_factory.mktemp("map") / "city.tif")


def test_it_is_a_valid_cog_and_leaves_nothing_else(city):
    valid, errors, remarks = cog_validate(city, strict=True)
    assert (valid, errors, remarks) == (True, [], [])
    assert sorted(entry.name for entry in city.parent.iterdir()) == ["city.qml", "city.tif"]


def test_numbers_and_place_are_those_of_the_store(city, store):
    with rasterio.open(city) as dataset:
        np.testing.assert_array_equal(dataset.read(), store.read())
        assert dataset.crs.to_epsg() == 32629
        assert dataset.transform == store.schema.grid.affine
        assert dataset.dtypes == ("float32",) * 3
        assert np.isnan(dataset.nodata)
        assert dataset.interleaving.value == "BAND"


def test_overviews_are_averages_of_valid_cells(city, store):
    with rasterio.open(city) as dataset:
        assert dataset.overviews(1) == [2, 4]
    with rasterio.open(city, overview_level=0) as dataset:
        half = dataset.read(1)
    cells = store.read()[0].reshape(300, 2, 650, 2).transpose(0, 2, 1, 3).reshape(300, 650, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(half, np.nanmean(cells, axis=2), atol=1e-6)


def test_tags_say_what_the_numbers_mean(city):
    with rasterio.open(city) as dataset:
        tags = dataset.tags()
        assert dataset.descriptions == CONCEPTS[:3]
        assert dataset.tags(2)["GROUP"] == "anthrophony"
        assert dataset.tags(2)["COLOUR"] == "#e31a1c"
        assert dataset.tags(2)["CALIBRATION"] == "generic"
    expected = {
        "VALUE": "probability",
        "FORMULA": "sigmoid(a (s . e) + b)",
        "MODEL": "soundmap-small",
        "MODEL_HASH": "0123abcd",
        "IMAGERY": "scène.tif",
        "ATTRIBUTION": "Contains modified Copernicus Sentinel data 2024",
        "LICENCE": "CC BY-SA 3.0 IGO",
        "SOFTWARE": "soundmap 0.1.0",
        "MONTH": "7",
        "HOUR": "6",
    }
    assert {key: tags[key] for key in expected} == expected


def test_statistics_are_those_of_all_cells(city, store):
    with rasterio.open(city) as dataset:
        for band, plane in enumerate(store.read().astype(np.float64), start=1):
            tags = dataset.tags(band)
            names = ("MINIMUM", "MAXIMUM", "MEAN", "STDDEV")
            found = [float(tags[f"STATISTICS_{name}"]) for name in names]
            low, high, mean = np.nanmin(plane), np.nanmax(plane), np.nanmean(plane)
            np.testing.assert_allclose(found, (low, high, mean, np.nanstd(plane)), atol=1e-9)
            share = 100 * np.isfinite(plane).mean()
            assert float(tags["STATISTICS_VALID_PERCENT"]) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("value", ["probability", "similarity"])
def test_bytes_carry_scale_and_nodata_and_are_no_colours(tmp_path, value, count):
    schema = schema_of((40, 50), count, dtype="uint8", value=value)
    store = store_of(tmp_path / "a.zarr", schema)
    path = export_cog(store, tmp_path / "a.tif", compression="zstd")
    assert cog_validate(path, strict=True)[0]
    with rasterio.open(path) as dataset:
        assert dataset.dtypes == ("uint8",) * count
        assert dataset.nodata == 255
        assert dataset.scales == (schema.scale,) * count
        assert dataset.offsets == (schema.offset,) * count
        assert ColorInterp.red not in dataset.colorinterp
        assert ColorInterp.alpha not in dataset.colorinterp
        np.testing.assert_array_equal(schema.unpack(dataset.read()), store.read())
        mean = float(dataset.tags(1)["STATISTICS_MEAN"])
        raw = dataset.read(1)
        assert mean == pytest.approx(raw[raw != 255].mean(), abs=1e-4)
    mean = describe(path).concepts[0].statistics.mean
    assert mean == pytest.approx(np.nanmean(store.read()[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("crs", "cell"),
    [("EPSG:4326", 0.01), ("EPSG:28992", 10.0), ("EPSG:32661", 100.0), ("EPSG:3857", 100.0)],
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (513, 2)])
def test_any_crs_and_shape(tmp_path, crs, cell, shape):
    store = store_of(tmp_path / "a.zarr", schema_of(shape, 1, crs, cell))
    path = export_cog(store, tmp_path / "a.tif", style=False)
    assert cog_validate(path, strict=True)[0]
    with rasterio.open(path) as dataset:
        assert dataset.crs.to_epsg() == int(crs[5:])
        assert dataset.transform.almost_equals(store.schema.grid.affine, 1e-12)
        np.testing.assert_array_equal(dataset.read(), store.read())


def test_an_older_map_gives_way_whole(tmp_path):
    store = store_of(tmp_path / "a.zarr", schema_of((30, 40)))
    path = tmp_path / "a.tif"
    path.write_text("older")
    (tmp_path / "a.tif.aux.xml").write_text("<older statistics/>")
    with pytest.raises(OutputError, match="exists already"):
        export_cog(store, path)
    assert path.read_text() == "older"
    (tmp_path / ".a.tif.new").mkdir()
    export_cog(store, path, overwrite=True)
    assert describe(path).shape == (30, 40)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["a.qml", "a.tif", "a.zarr"]


def test_a_failed_export_keeps_the_older_map(tmp_path, monkeypatch):
    store = store_of(tmp_path / "a.zarr", schema_of((30, 40)))
    path = tmp_path / "a.tif"
    path.write_text("older")

    def fail(*_, **__):
        raise rasterio.errors.RasterioIOError("no space")

    monkeypatch.setattr(geotiff.rasterio.shutil, "copy", fail)
    with pytest.raises(OutputError, match=r"a\.tif: could not be written \(no space\)"):
        export_cog(store, path, overwrite=True)
    assert path.read_text() == "older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tif", "a.zarr"]


def test_both_kinds_describe_themselves_alike(city, store):
    tif, zarr = describe(city), describe(store.path)
    assert (tif.kind, zarr.kind) == ("GeoTIFF", "Zarr")
    assert replace(tif, path=zarr.path, kind="Zarr", concepts=()) == replace(zarr, concepts=())
    assert tif.finished
    for one, other in zip(tif.concepts, zarr.concepts, strict=True):
        assert replace(one, statistics=None) == replace(other, statistics=None)
        assert one.statistics.valid == other.statistics.valid
        assert one.statistics.mean == pytest.approx(other.statistics.mean)
    assert tif.crs == "EPSG:32629"
    assert tif.cell_size == (140, 140)
    assert tif.shape == (600, 1300)
    assert tif.extra == {"month": "7", "hour": "6"}
    west, south, east, north = tif.bounds_lonlat
    assert -9.1 < west < east < -6.5
    assert 38 < south < north < 39


def test_describe_follows_what_gis_tools_cut_out(city, tmp_path):
    with rasterio.open(city) as dataset:
        profile = {**dataset.profile, "count": 1, "width": 100, "height": 50}
        with rasterio.open(tmp_path / "cut.tif", "w", **profile) as cut:
            cut.write(dataset.read(2)[:50, :100], 1)
            cut.update_tags(**dataset.tags())
            cut.update_tags(1, **dataset.tags(2))
            cut.set_band_description(1, dataset.descriptions[1])
    info = describe(tmp_path / "cut.tif")
    assert [one.name for one in info.concepts] == [CONCEPTS[1]]
    assert info.shape == (50, 100)


def test_describe_names_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        describe(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_text("not a raster")
    with pytest.raises(InputError, match="cannot be read as a raster"):
        describe(tmp_path / "b.tif")
    profile = {"driver": "GTiff", "count": 1, "height": 2, "width": 2, "dtype": "uint8"}
    profile |= {"crs": "EPSG:32629", "transform": Affine(10, 0, 5, 0, -10, 5)}
    with rasterio.open(tmp_path / "c.tif", "w", **profile) as dataset:
        dataset.write(np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(InputError, match="not written by soundmap"):
        describe(tmp_path / "c.tif")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="not a Zarr store"):
        describe(tmp_path / "folder")
