"""The sample scene as imagery: a place drawn by code, for first runs and tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError

from soundmap.errors import SourceError
from soundmap.grid import ground_gsd_m
from soundmap.sources._resample import Canvas, fill
from soundmap.sources._scene import SIZE, VERSION, scene_layout, scene_pixels
from soundmap.sources._tiles import read_in_tiles
from soundmap.sources.base import Image, Resampling, SourceInfo

__all__ = ["SAMPLE_GRID", "SampleSource", "scene_layout"]

# The shallows of the Dogger Bank, in the middle of the North Sea: a coast there is plausible, and
# nobody can take it for a real one. Corners at multiples of 640 m, so that cells fit.
SAMPLE_GRID = GeoBox(
    (SIZE, SIZE), Affine(10.0, 0.0, 499_200.0, 0.0, -10.0, 6_039_040.0), "EPSG:32631"
)
"""The scene's pixels: 10 m, UTM zone 31 north."""


@dataclass(frozen=True)
class SampleSource:
    """A 10 m true-colour scene with sea, river, forest, fields, town, industry and motorway.

    Drawing takes a few seconds and happens once per process, at the first read. The object itself
    holds no pixels, so it pickles to almost nothing. What lies where is told by `scene_layout`.

    Examples
    --------
    >>> source = SampleSource()
    >>> source.read(source.info.native_grid[:64, :64]).pixels.shape
    (3, 64, 64)
    """

    @property
    def info(self) -> SourceInfo:
        """Facts known without drawing the scene."""
        return SourceInfo(
            name="sample",
            native_grid=SAMPLE_GRID,
            native_gsd_m=ground_gsd_m(SAMPLE_GRID),
            attribution="soundmap sample scene (synthetic)",
            licence="CC0-1.0",
            facts={"scene": f"sample {VERSION}"},
        )

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Fill ``grid`` with pixels of the scene; beyond its edges they are not valid.

        Parameters
        ----------
        grid
            The pixels wanted, in any CRS. The scene's own are copied.
        resampling
            How others are made.

        Returns
        -------
        Image
            uint8[3, H, W] and validity bool[H, W].

        Raises
        ------
        SourceError
            The scene could not be warped to this grid.
        """
        a = grid.affine
        if not (a.b or a.d) and grid.crs != SAMPLE_GRID.crs:
            return read_in_tiles(grid, lambda tile: self._read(tile, resampling))
        return self._read(grid, resampling)

    def _read(self, grid: GeoBox, resampling: Resampling) -> Image:
        canvas = Canvas(grid)
        try:
            with rasterio.Env():
                fill(canvas, SAMPLE_GRID, _window, resampling)
        except RasterioError as error:
            raise SourceError(
                f"the sample scene could not be warped to {grid.crs}: {error}"
            ) from error
        return canvas.image()


def _window(
    row0: int, row1: int, col0: int, col1: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    pixels = scene_pixels()[:, row0:row1, col0:col1]
    return pixels, np.ones(pixels.shape[1:], np.bool_)
