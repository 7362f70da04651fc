"""Small rasters for the tests of sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

TEN_METRES = Affine(10, 0, 500000, 0, -10, 5500000)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write bands to a GeoTIFF of a given name in the temporary folder."""
    return lambda name, bands, **options: write_raster(tmp_path / name, bands, **options)


def write_raster(
    path: Path,
    bands: NDArray[Any],
    *,
    transform: Affine | None = TEN_METRES,
    crs: str | None = "EPSG:32633",
    mask: NDArray[np.bool_] | None = None,
    internal_mask: bool = True,
    colours: tuple[ColorInterp, ...] | None = None,
    names: tuple[str, ...] = (),
    palette: dict[int, tuple[int, ...]] | None = None,
    tags: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """Write bands [C, H, W] or one band [H, W] to a GeoTIFF, by default of 10 m in UTM zone 33.

    Returns
    -------
    Path
        ``path``.
    """
    bands = bands if bands.ndim == 3 else bands[None]
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width}
    profile |= {"dtype": bands.dtype, "crs": crs, "transform": transform, **options}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal_mask),
        rasterio.open(path, "w", **profile) as dataset,
    ):
        if colours:
            dataset.colorinterp = colours
        if palette:
            dataset.write_colormap(1, palette)
        for i, text in enumerate(names, 1):
            dataset.set_band_description(i, text)
        dataset.update_tags(**(tags or {}))
        dataset.write(bands)
        if mask is not None:
            dataset.write_mask(mask)
    return path
