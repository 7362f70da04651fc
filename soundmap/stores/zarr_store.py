"""Maps as Zarr: created once, written a unit at a time from many processes, then finished.

Layout of ``city.zarr`` (Zarr v2, the version that GDAL from 3.4 on reads)::

    probability     (concept, y, x), named by the map's value; chunks (1, n, n)
    concept, group  (concept,) text
    x, y            cell centres
    spatial_ref     CRS as CF writes it
    .soundmap/      only while the map is being made: status of units, statistics of chunks

GDAL opens the folder itself as a raster as long as one array alone has two dimensions or
more. The arrays of ``.soundmap`` therefore stand outside the store's hierarchy.
"""

from __future__ import annotations

import enum
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.common import JSON

from soundmap.errors import InputError, OutputError, UsageError
from soundmap.stores.schema import VALUE_NAMES, MapSchema, crs_text
from soundmap.stores.statistics import PARTIALS, Statistics, merged, partials

_PRIVATE = ".soundmap"
_STATUS_CHUNK = 64
# Bare Zstandard: GDAL is often built without Blosc, and zlib takes four times as long.
_COMPRESSOR: dict[str, JSON] = {"id": "zstd", "level": 1}


class Status(enum.IntEnum):
    """What became of a unit."""

    PENDING = 0
    DONE = 1
    EMPTY = 2
    FAILED = 3


@dataclass(frozen=True)
class ZarrStore:
    """A handle on a map in a Zarr store. It is plain data and pickles; arrays open on first use.

    Writing is safe from many processes at once as long as each chunk has one writer.
    """

    path: Path
    schema: MapSchema
    units_shape: tuple[int, int]
    """Rows and columns of units."""
    mode: Literal["r", "r+"] = "r"
    _arrays: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open arrays behind: the copy opens its own."""
        return {**self.__dict__, "_arrays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a frozen instance."""
        self.__dict__.update(state)

    def write(self, row0: int, col0: int, block: NDArray[np.float32]) -> None:
        """Write whole chunks of all concepts.

        Parameters
        ----------
        row0, col0
            Cell of the block's upper left corner; multiples of ``schema.chunk_cells``.
        block
            float32[C, h, w], NaN where there is no value. ``h`` and ``w`` are multiples of
            ``schema.chunk_cells`` unless the block ends with the grid.

        Raises
        ------
        UsageError
            The block does not cover whole chunks, or the store is open for reading only.
        OutputError
            It could not be written.
        """
        self._check_writable()
        self._check_block(row0, col0, block.shape)
        stored = self.schema.pack(block)
        size = self.schema.chunk_cells
        _, height, width = stored.shape
        try:
            values = self._array("values")
            values[:, row0 : row0 + height, col0 : col0 + width] = stored
            sums = self._array("partials")
            for row in range(0, height, size):
                for col in range(0, width, size):
                    chunk = self.schema.unpack(stored[:, row : row + size, col : col + size])
                    sums[(row0 + row) // size, (col0 + col) // size] = partials(chunk)
        except OSError as error:
            raise self._write_error(error) from error

    def read(
        self,
        rows: slice = slice(None),
        cols: slice = slice(None),
        concepts: slice | Sequence[int] = slice(None),
    ) -> NDArray[np.float32]:
        """Read values: float32[C, h, w], NaN where there are none or none yet."""
        values = self._array("values")
        if isinstance(concepts, slice):
            stored = values[concepts, rows, cols]
        else:
            stored = values.oindex[list(concepts), rows, cols]
        return self.schema.unpack(np.asarray(stored))

    def mark(self, index: tuple[int, int], status: Status) -> None:
        """Record what became of a unit. For one process alone, after the unit's data."""
        self._check_writable()
        try:
            self._array("status")[index] = int(status)
        except OSError as error:
            raise self._write_error(error) from error

    def status(self) -> NDArray[np.uint8]:
        """Status of every unit, uint8[rows, columns] of :class:`Status`; finished maps are DONE."""
        if not (self.path / _PRIVATE).is_dir():
            return np.full(self.units_shape, Status.DONE, dtype=np.uint8)
        return np.asarray(self._array("status")[...], dtype=np.uint8)

    def finish(self, keep_status: bool = False) -> tuple[Statistics, ...]:
        """Complete the map: statistics into its attributes, metadata in one file.

        May be repeated. ``keep_status`` keeps what a later run needs to compute the units that
        failed; without it the status goes, and the store holds nothing but the map.
        """
        self._check_writable()
        try:
            if (self.path / _PRIVATE).is_dir():
                group = zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
                results = merged(np.asarray(self._array("partials")[...]))
                group.attrs.update(_statistics_attrs(results))
            _consolidate(self.path)
            if not keep_status:
                shutil.rmtree(self.path / _PRIVATE, ignore_errors=True)
                self._arrays.clear()
        except OSError as error:
            raise self._write_error(error) from error
        return self.statistics()

    def statistics(self) -> tuple[Statistics, ...]:
        """Statistics of every concept, as :meth:`finish` left them; empty before it."""
        group = zarr.open_group(self.path, mode="r", zarr_format=2, use_consolidated=False)
        return _read_statistics(dict(group.attrs))

    def _array(self, name: Literal["values", "status", "partials"]) -> Any:
        if name not in self._arrays:
            inside = self.schema.value if name == "values" else f"{_PRIVATE}/{name}"
            self._arrays[name] = zarr.open_array(self.path / inside, mode=self.mode, zarr_format=2)
        return self._arrays[name]

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise UsageError(f"{self.path}: opened for reading: open it with mode 'r+' to write")

    def _check_block(self, row0: int, col0: int, shape: tuple[int, ...]) -> None:
        count, height, width = self.schema.shape
        size = self.schema.chunk_cells
        if len(shape) != 3 or shape[0] != count:
            raise UsageError(f"block of shape {shape} given: expected ({count}, rows, columns)")
        for axis, start, length, end in (
            ("rows", row0, shape[1], height),
            ("columns", col0, shape[2], width),
        ):
            stop = start + length
            if start < 0 or length < 1 or stop > end:
                raise UsageError(f"{axis} {start}:{stop} lie outside the map's {end}")
            if start % size or (stop % size and stop != end):
                raise UsageError(
                    f"{axis} {start}:{stop} cut through chunks of {size} cells: write whole chunks"
                )

    def _write_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: could not be written ({error.strerror or error}): "
            "make room or choose another output"
        )


def create(
    path: str | Path,
    schema: MapSchema,
    units_shape: tuple[int, int],
    *,
    scratch: bool = False,
) -> ZarrStore:
    """Create an empty map, all cells without value and all units pending.

    Parameters
    ----------
    path
        A folder that does not exist yet. It appears whole or not at all.
    schema
        What the map will hold.
    units_shape
        Rows and columns of units, for the status.
    scratch
        For a store that only feeds a GeoTIFF: nothing is compressed, which is faster.

    Raises
    ------
    OutputError
        It exists already, or cannot be made.
    """
    path = Path(path)
    if path.exists():
        raise OutputError(f"{path}: exists already: remove it or choose another name")
    # A fixed name, so that the next run clears what a killed one left.
    made = path.with_name(f".{path.name}.new")
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            _write_template(made, schema, units_shape, scratch)
            os.rename(made, path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: could not be made ({reason}): choose another output") from error
    return ZarrStore(path, schema, units_shape, "r+")


def open_store(path: str | Path, mode: Literal["r", "r+"] = "r") -> ZarrStore:
    """Open a map that :func:`create` made, finished or not.

    Raises
    ------
    InputError
        There is none, or it is not one of soundmap's.
    """
    path = Path(path)
    attrs = read_attrs(path)
    try:
        schema = MapSchema.from_attrs(attrs)
        rows, cols = attrs["units_shape"]
    except InputError as error:
        raise InputError(f"{path}: not a soundmap map: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a soundmap map: its description is damaged") from error
    return ZarrStore(path, schema, (int(rows), int(cols)), mode)


def read_attrs(path: Path) -> dict[str, Any]:
    """Return the attributes of a Zarr group; InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file: check the path")
    try:
        group = zarr.open_group(path, mode="r", zarr_format=2, use_consolidated=False)
        return dict(group.attrs)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a Zarr store that soundmap can read") from error


def read_statistics(path: Path) -> tuple[Statistics, ...]:
    """Return the statistics in a finished store; empty if it is not finished."""
    return _read_statistics(read_attrs(path))


def _write_template(
    path: Path, schema: MapSchema, units_shape: tuple[int, int], scratch: bool
) -> None:
    group = zarr.create_group(path, zarr_format=2)
    group.attrs.update(
        {
            "Conventions": "CF-1.10",
            "title": f"Soundscape map: {VALUE_NAMES[schema.value]}",
            **schema.attrs(),
            "units_shape": list(units_shape),
        }
    )
    size = schema.chunk_cells
    count, height, width = schema.shape
    values = group.create_array(
        schema.value,
        shape=schema.shape,
        chunks=(1, min(size, height), min(size, width)),
        dtype=schema.dtype,
        fill_value=schema.nodata if schema.dtype == "float32" else int(schema.nodata),
        compressors=None if scratch else _COMPRESSOR,
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )
    values.attrs.update(_values_attrs(schema))
    _put(group, "concept", np.array(schema.concepts), ["concept"], {"long_name": "sound"})
    _put(group, "group", np.array(schema.groups), ["concept"], {"long_name": "group of the sound"})
    _put_axes(group, schema)

    private = path / _PRIVATE
    zarr.create_array(
        private / "status",
        shape=units_shape,
        chunks=(_STATUS_CHUNK, _STATUS_CHUNK),
        dtype="uint8",
        fill_value=int(Status.PENDING),
        zarr_format=2,
    )
    zarr.create_array(
        private / "partials",
        shape=(-(-height // size), -(-width // size), len(PARTIALS), count),
        chunks=(1, 1, len(PARTIALS), count),
        dtype="float64",
        fill_value=0.0,
        compressors=None,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        zarr_format=2,
    )
    _consolidate(path)


def _values_attrs(schema: MapSchema) -> dict[str, Any]:
    crs = schema.grid.crs
    assert crs is not None
    # GDAL up to 3.8 knows the CRS by its own attribute alone.
    own: dict[str, Any] = {"wkt": crs.to_wkt(), "projjson": crs.proj.to_json_dict()}
    text = crs_text(crs)
    if text.startswith("EPSG:"):
        own["url"] = f"http://www.opengis.net/def/crs/EPSG/0/{text[5:]}"
    attrs: dict[str, Any] = {
        "_ARRAY_DIMENSIONS": ["concept", "y", "x"],
        "_CRS": own,
        "grid_mapping": "spatial_ref",
        "coordinates": "spatial_ref group",
        "long_name": VALUE_NAMES[schema.value],
        "units": "1",
    }
    if schema.dtype == "uint8":
        attrs |= {"scale_factor": schema.scale, "add_offset": schema.offset}
    return attrs


def _put_axes(group: zarr.Group, schema: MapSchema) -> None:
    crs = schema.grid.crs
    assert crs is not None
    described = {axis.get("axis"): axis for axis in crs.proj.cs_to_cf()}
    for name, dimension in zip(("y", "x"), schema.grid.dimensions, strict=True):
        centres = schema.grid.coords[dimension].values
        _put(
            group, name, centres, [name], {"axis": name.upper(), **described.get(name.upper(), {})}
        )
    mapping = crs.proj.to_cf()
    mapping["spatial_ref"] = mapping.get("crs_wkt", crs.to_wkt())
    mapping["GeoTransform"] = " ".join(repr(float(n)) for n in schema.grid.affine.to_gdal())
    _put(group, "spatial_ref", np.array(0, dtype=np.int32), [], mapping)


def _put(
    group: zarr.Group, name: str, data: NDArray[Any], dims: list[str], attrs: dict[str, Any]
) -> None:
    # No fill value: xarray would take coordinates that equal it for missing.
    array = group.create_array(
        name,
        shape=data.shape,
        chunks=data.shape,
        dtype=data.dtype,
        fill_value=None,
        compressors=None,
        config={"write_empty_chunks": True},
    )
    array[...] = data
    array.attrs.update({"_ARRAY_DIMENSIONS": dims, **attrs})


def _consolidate(path: Path) -> None:
    with warnings.catch_warnings():
        # Zarr remarks on the private folder, which is no part of the hierarchy on purpose.
        warnings.filterwarnings("ignore", message="Object at .soundmap")
        zarr.consolidate_metadata(path, zarr_format=2)


def _statistics_attrs(results: Sequence[Statistics]) -> dict[str, list[Any]]:
    def known(number: float) -> float | None:
        return None if np.isnan(number) else float(number)

    return {
        "statistics_minimum": [known(one.minimum) for one in results],
        "statistics_maximum": [known(one.maximum) for one in results],
        "statistics_mean": [known(one.mean) for one in results],
        "statistics_stddev": [known(one.stddev) for one in results],
        "statistics_valid": [one.valid for one in results],
    }


def _read_statistics(attrs: dict[str, Any]) -> tuple[Statistics, ...]:
    def number(value: float | None) -> float:
        return float("nan") if value is None else float(value)

    names = ("minimum", "maximum", "mean", "stddev", "valid")
    columns = [attrs.get(f"statistics_{name}", []) for name in names]
    return tuple(
        Statistics(number(low), number(high), number(mean), number(deviation), int(valid))
        for low, high, mean, deviation, valid in zip(*columns, strict=True)
    )
