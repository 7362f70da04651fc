from __future__ import annotations

import os
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox

import soundmap
from soundmap.errors import InputError, OutputError, UsageError
from soundmap.stores.info import describe
from soundmap.stores.schema import MapSchema
from soundmap.stores.statistics import partials
from soundmap.stores.template import inner_chunk
from soundmap.stores.zarr_store import Status, create, open_store

GRID = GeoBox((70, 90), Affine(140, 0, 500_000, 0, -140, 4_300_000), "EPSG:32629")
SCHEMA = MapSchema(
    concepts=("birdsong", "road traffic", "église"),
    groups=("biophony", "anthrophony", "anthrophony"),
    colours=("#33a02c", "#e31a1c", "#6a3d9a"),
    calibrations=("platt", "platt", "generic"),
    value="probability",
    formula="sigmoid(a (s . e) + b)",
    detail="patch",
    dtype="float32",
    grid=GRID,
    chunk_cells=32,
    model="soundmap-small",
    model_hash="0123abcd",
    imagery="scene.tif",
    attribution="Contains modified Copernicus Sentinel data",
    licence="CC BY-SA 3.0 IGO",
    gsd_m=10.0,
    software="soundmap 0.1.0",
    created="2026-01-02T03:04:05Z",
    extra={"month": "7"},
    fingerprint="f00d",
)
UNITS = (3, 3)


def numbers(schema=SCHEMA):
    values = np.random.default_rng(0).random(schema.shape, dtype=np.float32)
    low, high = schema.value_range
    values = values * (high - low) + low
    values[:, :40, :35] = np.nan
    return values.astype(np.float32)


def fill(store, values):
    size = store.schema.chunk_cells
    _, height, width = values.shape
    for row in range(0, height, size):
        for col in range(0, width, size):
            store.write(row, col, values[:, row : row + size, col : col + size])
            store.mark((row // size, col // size), Status.DONE)


def finished(path, schema=SCHEMA, **options):
    store = create(path, schema, UNITS, **options)
    fill(store, numbers(schema))
    store.finish()
    return store


def other_grid(crs, cell=0.01):
    return GeoBox((70, 90), Affine(cell, 0, -0.3, 0, -cell, 40), crs)


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("value", ["probability", "similarity"])
def test_round_trip(tmp_path, value, dtype, scratch):
    schema = replace(SCHEMA, value=value, dtype=dtype)
    finished(tmp_path / "a.zarr", schema, scratch=scratch)
    store = open_store(tmp_path / "a.zarr")
    assert store.schema == schema
    expected = schema.unpack(schema.pack(numbers(schema)))
    np.testing.assert_array_equal(store.read(), expected)
    part = store.read(slice(30, 50), slice(60, 90), [2, 0])
    np.testing.assert_array_equal(part, expected[[2, 0], 30:50, 60:90])
    for one, plane in zip(store.statistics(), expected.astype(np.float64), strict=True):
        found = (one.minimum, one.maximum, one.mean, one.stddev, one.valid)
        low, high, mean = np.nanmin(plane), np.nanmax(plane), np.nanmean(plane)
        valid = np.isfinite(plane).sum()
        np.testing.assert_allclose(found, (low, high, mean, np.nanstd(plane), valid), atol=1e-9)


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        other_grid("EPSG:4326"),
        other_grid("EPSG:3857", 100),
        other_grid("EPSG:28992", 100),
        other_grid("EPSG:32661", 100),
        other_grid("EPSG:2263", 100),
        other_grid("+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84", 100),
    ],
    ids=["utm", "lonlat", "mercator", "rd", "ups", "feet", "custom"],
)
def test_gdal_opens_the_folder_itself(tmp_path, grid):
    store = finished(tmp_path / "a.zarr", replace(SCHEMA, grid=grid))
    for name in (str(store.path), f'ZARR:"{store.path}":/probability'):
        with rasterio.open(name) as dataset:
            assert dataset.count == 3
            assert dataset.crs == rasterio.crs.CRS.from_wkt(grid.crs.to_wkt())
            assert dataset.transform.almost_equals(grid.affine, 1e-9)
            assert np.isnan(dataset.nodata)
            assert dataset.tags(2)["DIM_concept_VALUE"] == "road traffic"
            np.testing.assert_array_equal(dataset.read(), store.read())
    with rasterio.open(f'ZARR:"{store.path}":/probability:1') as dataset:
        assert dataset.transform.almost_equals(grid.affine, 1e-9)
        np.testing.assert_array_equal(dataset.read(1), store.read()[1])


def test_gdal_opens_an_unfinished_map(tmp_path):
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    with rasterio.open(store.path) as dataset:
        assert dataset.crs.to_epsg() == 32629
        assert np.isnan(dataset.read()).all()


def test_gdal_knows_the_scale_of_bytes(tmp_path):
    store = finished(tmp_path / "a.zarr", replace(SCHEMA, dtype="uint8", value="similarity"))
    with rasterio.open(store.path) as dataset:
        assert (dataset.nodata, dataset.scales[0], dataset.offsets[0]) == (255, 2 / 250, -1)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_xarray_gets_names_and_coordinates(tmp_path, dtype):
    store = finished(tmp_path / "a.zarr", replace(SCHEMA, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xr.open_zarr(store.path)
    array = dataset["probability"]
    assert list(dataset.data_vars) == ["probability"]
    assert array.dims == ("concept", "y", "x")
    assert array["concept"].values.tolist() == list(SCHEMA.concepts)
    assert array["group"].values.tolist() == list(SCHEMA.groups)
    np.testing.assert_allclose(array["x"], 500_070 + 140 * np.arange(90))
    np.testing.assert_allclose(array["y"], 4_299_930 - 140 * np.arange(70))
    assert array["x"].attrs["standard_name"] == "projection_x_coordinate"
    assert array["x"].attrs["units"] == "metre"
    birdsong = array.sel(concept="birdsong")
    np.testing.assert_allclose(birdsong, store.read()[0], atol=1e-6)
    assert dataset.attrs["attribution"] == SCHEMA.attribution


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_shards_open_in_xarray_as_chunks_do(tmp_path, dtype):
    schema = replace(SCHEMA, dtype=dtype)
    chunks, shards = (
        finished(tmp_path / name, schema, shards=name == "b.zarr") for name in ("a.zarr", "b.zarr")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, dataset = (xr.open_zarr(store.path) for store in (chunks, shards))
    xr.testing.assert_equal(dataset, expected)
    assert list(dataset["probability"].coords) == list(expected["probability"].coords)
    array = dataset["probability"]
    assert array.dims == ("concept", "y", "x")
    assert array.attrs["_CRS"] == expected["probability"].attrs["_CRS"]
    assert dataset["spatial_ref"].attrs == expected["spatial_ref"].attrs
    for dataset in (soundmap.open(shards.path), xr.open_zarr(shards.path, decode_coords="all")):
        assert dataset.rio.crs.to_epsg() == 32629
    assert describe(shards.path).concepts == describe(chunks.path).concepts
    assert open_store(shards.path) == replace(shards, mode="r")
    np.testing.assert_array_equal(shards.read(), chunks.read())


def test_a_unit_is_one_shard_with_chunks_inside(tmp_path):
    schema = replace(SCHEMA, grid=other_grid("EPSG:3857", 100), chunk_cells=512)
    grid = GeoBox((700, 600), schema.grid.affine, "EPSG:3857")
    schema = replace(schema, grid=grid)
    store = create(tmp_path / "a.zarr", schema, (2, 2), shards=True)
    before = contents(store.path)
    values = np.random.default_rng(0).random(schema.shape, dtype=np.float32)
    store.write(0, 512, values[:, :512, 512:])
    added = {name for name in contents(store.path) if name not in before}
    assert {name for name in added if name.startswith("probability")} == {"probability/c/0/0/1"}
    array = zarr.open_array(store.path / "probability", mode="r")
    assert (array.shards, array.chunks) == ((3, 512, 512), (1, 256, 256))
    np.testing.assert_array_equal(store.read()[:, :512, 512:], schema.pack(values[:, :512, 512:]))
    assert np.isnan(store.read()[:, :, :512]).all()


@pytest.mark.parametrize(
    ("side", "inner"),
    [(512, 256), (16, 16), (64, 64), (203, 203), (384, 192), (509, 509), (510, 255), (300, 150)],
)
def test_chunks_inside_a_shard_fill_it(side, inner):
    assert inner_chunk(side) == inner
    assert side % inner == 0


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_gdal_of_today_says_no_to_shards(tmp_path):
    # What docs and help say; a GDAL that learns it is a reason to say otherwise.
    store = finished(tmp_path / "a.zarr", shards=True)
    with rasterio.open(store.path) as dataset:
        assert dataset.count == 0
    with pytest.raises(rasterio.errors.RasterioError, match=r"sharding|codec|not recognized"):
        rasterio.open(f'ZARR:"{store.path}":/probability')


def test_a_centre_at_zero_is_a_coordinate(tmp_path):
    grid = GeoBox((4, 4), Affine(1, 0, -0.5, 0, -1, 0.5), "EPSG:32629")
    create(tmp_path / "a.zarr", replace(SCHEMA, grid=grid), (1, 1))
    dataset = xr.open_zarr(tmp_path / "a.zarr")
    assert dataset["x"].values.tolist() == [0, 1, 2, 3]
    assert dataset["y"].values.tolist() == [0, -1, -2, -3]


def test_a_finished_map_holds_nothing_private(tmp_path):
    store = finished(tmp_path / "a.zarr")
    names = {entry.name for entry in store.path.iterdir()}
    assert names == {
        *(".zattrs", ".zgroup", ".zmetadata"),
        *("concept", "group", "probability", "spatial_ref", "x", "y"),
    }
    assert zarr.open_consolidated(store.path).attrs["statistics_valid"] == [70 * 90 - 40 * 35] * 3
    assert (store.status() == Status.DONE).all()
    assert store.finish() == store.statistics()


def test_statistics_of_an_empty_map_are_valid_json(tmp_path):
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    assert store.statistics() == ()
    store.finish()
    assert "NaN" not in (store.path / ".zattrs").read_text()
    assert [one.valid for one in store.statistics()] == [0, 0, 0]


def test_status_outlives_the_run_that_failed(tmp_path):
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    assert store.status().tolist() == np.zeros(UNITS).tolist()
    store.mark((0, 1), Status.DONE)
    store.mark((2, 2), Status.FAILED)
    store.finish(keep_status=True)
    again = open_store(store.path, "r+")
    assert again.status().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 3]]
    fill(again, numbers())
    again.finish()
    whole = finished(tmp_path / "b.zarr")
    assert contents(again.path) == contents(whole.path)


def contents(path):
    files = (entry for entry in path.rglob("*") if entry.is_file())
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in files}


def write_row(store, row, values):
    store.write(row, 0, values)


def test_handles_pickle_and_write_from_other_processes(tmp_path):
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    store.read(slice(0, 1), slice(0, 1))
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    values = numbers()
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        rows = range(0, 70, 32)
        list(pool.map(write_row, [copy] * 3, rows, [values[:, row : row + 32] for row in rows]))
    store.finish()
    np.testing.assert_array_equal(store.read(), SCHEMA.pack(values))
    assert store.statistics() == finished(tmp_path / "b.zarr").statistics()


@pytest.mark.parametrize(
    ("row", "col", "shape", "message"),
    [
        (1, 0, (3, 31, 32), "cut through chunks"),
        (0, 0, (3, 32, 31), "cut through chunks"),
        (0, 0, (2, 32, 32), "expected"),
        (64, 64, (3, 32, 26), "outside"),
        (-32, 0, (3, 32, 32), "outside"),
        (0, 0, (3, 0, 32), "outside"),
    ],
)
def test_parts_of_chunks_are_refused(tmp_path, row, col, shape, message):
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    with pytest.raises(UsageError, match=message):
        store.write(row, col, np.zeros(shape, np.float32))
    store.write(64, 64, np.zeros((3, 6, 26), np.float32))


def test_reading_handles_do_not_write(tmp_path):
    store = open_store(finished(tmp_path / "a.zarr").path)
    with pytest.raises(UsageError, match="mode 'r\\+'"):
        store.write(0, 0, np.zeros((3, 32, 32), np.float32))
    with pytest.raises(UsageError, match="mode 'r\\+'"):
        store.finish()


def test_create_refuses_what_exists_or_cannot_be_made(tmp_path):
    create(tmp_path / "a.zarr", SCHEMA, UNITS)
    with pytest.raises(OutputError, match="exists already"):
        create(tmp_path / "a.zarr", SCHEMA, UNITS)
    with pytest.raises(OutputError, match="could not be made"):
        create(tmp_path / "missing" / "a.zarr", SCHEMA, UNITS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zarr"]


def test_open_refuses_what_is_not_ours(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_store(tmp_path / "a.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="not a Zarr store"):
        open_store(tmp_path / "folder")
    zarr.create_group(tmp_path / "b.zarr", zarr_format=2)
    with pytest.raises(InputError, match="not written by soundmap"):
        open_store(tmp_path / "b.zarr")


def test_what_is_being_written_when_the_disk_goes_leaves_nothing_in_its_place(
    tmp_path, monkeypatch
):
    store = create(tmp_path / "map.zarr", SCHEMA, UNITS)
    values = numbers()
    fill(store, values)

    def goes_meanwhile(chunk):
        # Values are written, the chunk's statistics are not yet.
        os.rename(store.path, tmp_path / "kept.zarr")
        return partials(chunk)

    monkeypatch.setattr("soundmap.stores.zarr_store.partials", goes_meanwhile)
    with pytest.raises(OutputError, match="put it back"):
        store.write(0, 0, values[:, :32, :32])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.zarr"]
    monkeypatch.undo()
    os.rename(tmp_path / "kept.zarr", store.path)
    np.testing.assert_array_equal(store.read(), SCHEMA.unpack(SCHEMA.pack(values)))


def test_two_units_that_miss_the_disk_at_once_say_the_same(tmp_path, monkeypatch):
    store = create(tmp_path / "map.zarr", SCHEMA, UNITS)
    fill(store, numbers())
    os.rename(store.path, tmp_path / "kept.zarr")
    # What the other unit's write had made in its place; it is removed as this one looks.
    (tmp_path / "map.zarr").mkdir()

    def gone(location):
        os.rmdir(location)
        raise FileNotFoundError(2, "No such file or directory", str(location))

    monkeypatch.setattr("soundmap.stores.zarr_store.place.names_in", gone)
    with pytest.raises(OutputError, match="put it back"):
        store.write(0, 0, numbers()[:, :32, :32])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.zarr"]
