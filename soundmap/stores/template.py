"""The arrays of an empty map, in Zarr v2 or, with shards, in v3.

Layout of ``city.zarr``::

    probability     (concept, y, x), named by the map's value
    concept, group  (concept,) text
    x, y            cell centres
    spatial_ref     CRS as CF writes it
    .soundmap/      only while the map is being made, see `soundmap.stores.ledger`

Zarr v2 is the version that GDAL from 3.4 on reads; its chunks are (1, n, n), n cells being the side
of a unit. In v3 a unit is one shard (C, n, n), a file or object, with chunks inside it that readers
fetch one by one; GDAL 3.10 reads neither shards nor text in v3.

GDAL opens a v2 folder itself as a raster as long as one array alone has two dimensions or
more. The arrays of ``.soundmap`` therefore stand outside the store's hierarchy.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.common import JSON

from soundmap.stores.ledger import FAILED, PRIVATE
from soundmap.stores.schema import VALUE_NAMES, MapSchema, crs_text
from soundmap.stores.statistics import PARTIALS

Format = Literal[2, 3]
"""Version of Zarr; 3 is written with shards."""

_STATUS_CHUNK = 64
# Bare Zstandard: GDAL is often built without Blosc, and zlib takes four times as long.
_COMPRESSOR: dict[str, JSON] = {"id": "zstd", "level": 1}
# Cells along the side of a chunk in a shard: 256 kB as float32, a piece that is worth a request.
_MOST_INNER = 256
_LEAST_INNER = 64


def write_template(
    path: Path,
    schema: MapSchema,
    units_shape: tuple[int, int],
    *,
    zarr_format: Format,
    scratch: bool,
) -> None:
    """Write the metadata and coordinates of an empty map into a new folder.

    Parameters
    ----------
    path
        The folder.
    schema
        What the map will hold.
    units_shape
        Rows and columns of units.
    zarr_format
        2, or 3 for a map with shards.
    scratch
        Leave the values uncompressed, which is faster.
    """
    group = zarr.create_group(path, zarr_format=zarr_format)
    group.attrs.update(
        {
            "Conventions": "CF-1.10",
            "title": f"Soundscape map: {VALUE_NAMES[schema.value]}",
            **schema.attrs(),
            "units_shape": list(units_shape),
        }
    )
    fill = schema.nodata if schema.dtype == "float32" else int(schema.nodata)
    _values(group, schema, fill, scratch)
    _put(group, "concept", np.array(schema.concepts), ["concept"], {"long_name": "sound"})
    _put(group, "group", np.array(schema.groups), ["concept"], {"long_name": "group of the sound"})
    _put_axes(group, schema)
    _put_private(path / PRIVATE, schema, units_shape)
    consolidate(path, zarr_format)


def inner_chunk(side: int) -> int:
    """Choose the side of chunks inside a shard, in cells: a whole part of the shard's side."""
    fitting = [n for n in range(_LEAST_INNER, min(side, _MOST_INNER) + 1) if side % n == 0]
    return max(fitting, default=side)


def consolidate(location: Any, zarr_format: Format) -> None:
    """Gather all metadata of a store in one file."""
    with warnings.catch_warnings():
        # Zarr remarks on the private folder, which is no part of the hierarchy on purpose, and on
        # v3 having no word on this yet; xarray and Zarr write and read it all the same.
        warnings.filterwarnings("ignore", message="Object at .soundmap")
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(location, zarr_format=zarr_format)


def _values(group: zarr.Group, schema: MapSchema, fill: float, scratch: bool) -> None:
    size = schema.chunk_cells
    count, height, width = schema.shape
    if group.metadata.zarr_format == 2:
        values = group.create_array(
            schema.value,
            shape=schema.shape,
            chunks=(1, min(size, height), min(size, width)),
            dtype=schema.dtype,
            fill_value=fill,
            compressors=None if scratch else _COMPRESSOR,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
    else:
        side = inner_chunk(size)
        values = group.create_array(
            schema.value,
            shape=schema.shape,
            chunks=(1, side, side),
            shards=(count, size, size),
            dtype=schema.dtype,
            fill_value=fill,
            compressors=None if scratch else ZstdCodec(level=1),
            dimension_names=("concept", "y", "x"),
        )
    values.attrs.update(_values_attrs(schema))
    if group.metadata.zarr_format == 2:
        values.attrs["_ARRAY_DIMENSIONS"] = ["concept", "y", "x"]
    elif schema.dtype == "uint8":
        # In version 3 xarray takes the array's own fill value for a number like any other.
        values.attrs["_FillValue"] = int(schema.nodata)


def _put_private(path: Path, schema: MapSchema, units_shape: tuple[int, int]) -> None:
    size = schema.chunk_cells
    count, height, width = schema.shape
    (path / FAILED).mkdir(parents=True)
    zarr.create_array(
        path / "status",
        shape=units_shape,
        chunks=(_STATUS_CHUNK, _STATUS_CHUNK),
        dtype="uint8",
        fill_value=0,
        zarr_format=2,
    )
    zarr.create_array(
        path / "partials",
        shape=(-(-height // size), -(-width // size), len(PARTIALS), count),
        chunks=(1, 1, len(PARTIALS), count),
        dtype="float64",
        fill_value=0.0,
        compressors=None,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        zarr_format=2,
    )


def _values_attrs(schema: MapSchema) -> dict[str, Any]:
    crs = schema.grid.crs
    assert crs is not None
    # GDAL up to 3.8 knows the CRS by its own attribute alone.
    own: dict[str, Any] = {"wkt": crs.to_wkt(), "projjson": crs.proj.to_json_dict()}
    text = crs_text(crs)
    if text.startswith("EPSG:"):
        own["url"] = f"http://www.opengis.net/def/crs/EPSG/0/{text[5:]}"
    attrs: dict[str, Any] = {
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
    shape: dict[str, Any] = {"shape": data.shape, "chunks": data.shape, "compressors": None}
    if group.metadata.zarr_format == 2:
        # No fill value: xarray would take coordinates that equal it for missing.
        array = group.create_array(
            name,
            dtype=data.dtype,
            fill_value=None,
            config={"write_empty_chunks": True},
            **shape,
        )
        attrs = {"_ARRAY_DIMENSIONS": dims, **attrs}
    else:
        # Version 3 has a word for text of any length alone, and needs a fill value, which xarray
        # leaves alone there.
        text = data.dtype.kind == "U"
        array = group.create_array(
            name,
            dtype=np.dtypes.StringDType() if text else data.dtype,
            fill_value="" if text else 0,
            dimension_names=dims,
            config={"write_empty_chunks": True},
            **shape,
        )
        data = data.astype(np.dtypes.StringDType()) if text else data
    array[...] = data
    array.attrs.update(attrs)
