"""What every store of maps must keep, as a test class to inherit.

::

    class TestMyStore(StoreContract):
        def make_store(self, folder, schema, units_shape):
            return MyStore.create(folder / "map", schema, units_shape)
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.errors import UsageError
from soundmap.stores.schema import MapSchema
from soundmap.stores.statistics import Statistics
from soundmap.stores.zarr_store import Status

_CHUNK = 16
# Neither side is a whole number of chunks, and they differ.
_SHAPE = (40, 56)
_UNITS = (3, 4)


class Store(Protocol):
    """What a run asks of a store."""

    @property
    def schema(self) -> MapSchema:
        """What the map holds."""
        ...

    def write(self, row0: int, col0: int, block: NDArray[np.float32]) -> None:
        """Write whole chunks of all concepts, float32[C, h, w]."""
        ...

    def read(
        self,
        rows: slice = ...,
        cols: slice = ...,
        concepts: slice | Sequence[int] = ...,
    ) -> NDArray[np.float32]:
        """Read values, NaN where there are none."""
        ...

    def mark(self, index: tuple[int, int], status: Status) -> None:
        """Record what became of a unit."""
        ...

    def status(self) -> NDArray[np.uint8]:
        """Status of every unit."""
        ...

    def finish(self) -> tuple[Statistics, ...]:
        """Complete the map."""
        ...


class StoreContract:
    """Tests of what a run relies on in a store.

    Subclasses give ``make_store``.
    """

    def make_store(self, folder: Path, schema: MapSchema, units_shape: tuple[int, int]) -> Store:
        """Return a new store, open for writing, in an empty folder."""
        raise NotImplementedError

    @pytest.fixture(params=["float32", "uint8"])
    def schema(self, request: pytest.FixtureRequest) -> MapSchema:
        """Return what the map holds, once for each type of number."""
        return MapSchema(
            concepts=("birdsong", "road traffic", "waves"),
            groups=("biophony", "anthrophony", "geophony"),
            colours=("#33a02c", "#e31a1c", "#1f78b4"),
            calibrations=("platt", "platt", "generic"),
            value="probability",
            formula="sigmoid(a s + b)",
            detail="patch",
            dtype=request.param,
            grid=GeoBox(_SHAPE, Affine(80, 0, 500_000, 0, -80, 5_500_000), "EPSG:32633"),
            chunk_cells=_CHUNK,
            model="fake",
            model_hash="0123",
            imagery="fake",
            attribution="",
            licence="",
            gsd_m=10.0,
            software="soundmap",
            created="2026-01-02T03:04:05+00:00",
        )

    @pytest.fixture
    def store(self, tmp_path: Path, schema: MapSchema) -> Store:
        """Return the store under test, new and empty."""
        return self.make_store(tmp_path, schema, _UNITS)

    def test_begins_empty(self, store: Store, schema: MapSchema) -> None:
        """No cell has a value and no unit is done."""
        assert store.schema == schema
        values = store.read()
        assert values.dtype == np.float32
        assert values.shape == schema.shape
        assert np.isnan(values).all()
        assert store.status().shape == _UNITS
        assert (store.status() == Status.PENDING).all()

    def test_keeps_what_is_written(self, store: Store) -> None:
        """Every number comes back as precisely as the schema says, nodata as NaN."""
        values = _numbers(store)
        _fill(store, values)
        expected = store.schema.unpack(store.schema.pack(values))
        np.testing.assert_array_equal(store.read(), expected)
        np.testing.assert_allclose(store.read(), values, rtol=0, atol=0.0021)
        part = store.read(slice(10, 40), slice(50, 56), [2, 0])
        np.testing.assert_array_equal(part, expected[[2, 0], 10:40, 50:56])

    def test_extremes_are_kept(self, store: Store) -> None:
        """Zero and one, the fill value's neighbours, are values and not nodata."""
        block = np.zeros((3, _CHUNK, _CHUNK), np.float32)
        block[1] = 1
        store.write(0, 0, block)
        np.testing.assert_array_equal(store.read(slice(0, _CHUNK), slice(0, _CHUNK)), block)

    def test_units_do_not_touch_each_other(self, store: Store) -> None:
        """Writing a unit leaves all other cells as they were."""
        values = _numbers(store)
        expected = np.full_like(values, np.nan)
        for row, col in ((1, 2), (2, 3), (0, 0)):
            place = _place(row, col)
            _write(store, values, row, col)
            expected[place] = store.schema.unpack(store.schema.pack(values[place]))
            np.testing.assert_array_equal(store.read(), expected)

    def test_writing_again_replaces(self, store: Store) -> None:
        """A unit that is computed twice holds its last values, also where they are nodata."""
        values = _numbers(store)
        _fill(store, 1 - values)
        empty = values.copy()
        empty[:, :_CHUNK, :_CHUNK] = np.nan
        _fill(store, empty)
        np.testing.assert_array_equal(store.read(), store.schema.unpack(store.schema.pack(empty)))

    def test_several_chunks_at_once(self, store: Store) -> None:
        """A block may be many whole chunks, up to the whole map."""
        values = _numbers(store)
        store.write(0, 0, values)
        np.testing.assert_array_equal(store.read(), store.schema.unpack(store.schema.pack(values)))

    def test_many_writers(self, store: Store) -> None:
        """Units written at the same time, through copies of the store, all arrive."""
        values = _numbers(store)
        places = [(row, col) for row in range(_UNITS[0]) for col in range(_UNITS[1])]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda place: _write(_copy(store), values, *place), places))
        np.testing.assert_array_equal(store.read(), store.schema.unpack(store.schema.pack(values)))

    def test_refuses_what_is_not_whole_chunks(self, store: Store) -> None:
        """Two writers of one chunk would lose data: a block that cuts one is refused, unwritten."""
        for row0, col0, shape in (
            (3, 0, (3, _CHUNK, _CHUNK)),
            (0, 3, (3, _CHUNK, _CHUNK)),
            (0, 0, (3, _CHUNK - 1, _CHUNK)),
            (0, 0, (3, _CHUNK, _CHUNK + 1)),
            (-_CHUNK, 0, (3, _CHUNK, _CHUNK)),
            (32, 0, (3, _CHUNK, _CHUNK)),
            (0, 48, (3, _CHUNK, _CHUNK)),
            (48, 0, (3, _CHUNK, _CHUNK)),
            (0, 0, (3, 0, _CHUNK)),
            (0, 0, (2, _CHUNK, _CHUNK)),
            (0, 0, (_CHUNK, _CHUNK)),
        ):
            with pytest.raises(UsageError) as caught:
                store.write(row0, col0, np.zeros(shape, np.float32))
            assert "\n" not in str(caught.value)
            assert np.isnan(store.read()).all(), (row0, col0, shape)

    def test_status(self, store: Store) -> None:
        """Marks are kept, apart from each other and from the values."""
        expected = np.full(_UNITS, Status.PENDING, np.uint8)
        marks = {(0, 0): Status.DONE, (2, 3): Status.FAILED, (1, 1): Status.EMPTY}
        for index, status in (marks | {(2, 3): Status.DONE}).items():
            store.mark(index, status)
            expected[index] = status
            np.testing.assert_array_equal(store.status(), expected)
        assert np.isnan(store.read()).all()

    def test_pickles(self, store: Store) -> None:
        """A copy on a worker writes to the same map, and sees what others wrote."""
        values = _numbers(store)
        _write(store, values, 0, 0)
        copy = _copy(store)
        assert copy.schema == store.schema
        np.testing.assert_array_equal(copy.read(), store.read())
        _write(copy, values, 1, 1)
        copy.mark((1, 1), Status.DONE)
        np.testing.assert_array_equal(copy.read(), store.read())
        np.testing.assert_array_equal(copy.status(), store.status())

    def test_finishing_keeps_the_values(self, store: Store) -> None:
        """A finished map holds the same numbers, and knows their statistics."""
        values = _numbers(store)
        _fill(store, values)
        before = store.read()
        results = store.finish()
        np.testing.assert_array_equal(store.read(), before)
        assert len(results) == len(before)
        for one, plane in zip(results, before.astype(np.float64), strict=True):
            known = plane[np.isfinite(plane)]
            found = (one.minimum, one.maximum, one.mean, one.stddev, one.valid)
            expected = (known.min(), known.max(), known.mean(), known.std(), known.size)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def _numbers(store: Store) -> NDArray[np.float32]:
    values = np.random.default_rng(0).random(store.schema.shape, dtype=np.float32)
    values[:, 5:20, 12:30] = np.nan
    values[1, 30:, :5] = np.nan
    return values


def _place(row: int, col: int) -> Any:
    rows = slice(row * _CHUNK, min((row + 1) * _CHUNK, _SHAPE[0]))
    return slice(None), rows, slice(col * _CHUNK, min((col + 1) * _CHUNK, _SHAPE[1]))


def _write(store: Store, values: NDArray[np.float32], row: int, col: int) -> None:
    store.write(row * _CHUNK, col * _CHUNK, values[_place(row, col)])


def _fill(store: Store, values: NDArray[np.float32]) -> None:
    for row in range(_UNITS[0]):
        for col in range(_UNITS[1]):
            _write(store, values, row, col)


def _copy(store: Store) -> Store:
    copy: Store = pickle.loads(pickle.dumps(store))
    return copy
