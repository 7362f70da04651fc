"""Maps as xarray data sets."""

from __future__ import annotations

from pathlib import Path

import rioxarray
import xarray as xr

from soundmap.errors import InputError
from soundmap.stores.info import describe


def open_map(path: str | Path) -> xr.Dataset:
    """Open a map that soundmap wrote.

    Parameters
    ----------
    path
        A ``.zarr`` or ``.tif``.

    Returns
    -------
    xarray.Dataset
        One variable, named by its value ("probability", "share" or "similarity"), with dims
        (concept, y, x), float32 and NaN where there is no imagery; read when it is used. The CRS
        is at ``.rio.crs``.

    Raises
    ------
    InputError
        There is no such file, or soundmap did not write it.
    """
    info = describe(path)
    if info.kind == "Zarr":
        data = xr.open_zarr(str(path), consolidated=True, decode_coords="all", zarr_format=2)
        return data.rio.write_crs(info.crs)
    raster = rioxarray.open_rasterio(Path(path), masked=True, mask_and_scale=True, chunks={})
    if not isinstance(raster, xr.DataArray):
        raise InputError(f"{path} holds several rasters: it is not a map of soundmap")
    names = [concept.name for concept in info.concepts]
    named = raster.rename(band="concept").assign_coords(concept=names)
    return named.astype("float32").to_dataset(name=info.value)
