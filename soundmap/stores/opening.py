"""Maps as xarray data sets."""

from __future__ import annotations

from pathlib import Path

import rioxarray
import xarray as xr

from soundmap.errors import InputError
from soundmap.stores.info import describe
from soundmap.stores.ledger import PRIVATE
from soundmap.stores.place import located, names_in, zarr_location
from soundmap.stores.work import is_unfinished, target_of


def open_map(path: str | Path) -> xr.Dataset:
    """Open a map that soundmap wrote.

    Parameters
    ----------
    path
        A ``.zarr`` or ``.tif``, or the ``s3://`` address of a ``.zarr``.

    Returns
    -------
    xarray.Dataset
        One variable, named by its value ("probability", "share" or "similarity"), with dims
        (concept, y, x), float32 and NaN where there is no imagery; read when it is used. The CRS
        is at ``.rio.crs``.

    Raises
    ------
    InputError
        There is no such file, soundmap did not write it, or its run has not ended.
    """
    location = located(path)
    begun = isinstance(location, Path) and not location.exists() and is_unfinished(location)
    if begun or PRIVATE in names_in(location):
        name = target_of(location)
        raise InputError(
            f"{path}: not finished: `soundmap predict {name}` goes on with it, `soundmap status "
            f"{name}` tells how far it is"
        )
    info = describe(location)
    if info.kind == "Zarr":
        source = zarr_location(location, read_only=True)
        data = xr.open_zarr(source, consolidated=True, decode_coords="all")
        return data.rio.write_crs(info.crs)
    raster = rioxarray.open_rasterio(Path(path), masked=True, mask_and_scale=True, chunks={})
    if not isinstance(raster, xr.DataArray):
        raise InputError(f"{path} holds several rasters: it is not a map of soundmap")
    names = [concept.name for concept in info.concepts]
    named = raster.rename(band="concept").assign_coords(concept=names)
    return named.astype("float32").to_dataset(name=info.value)
