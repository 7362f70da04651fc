"""Refuse, before hours are spent on them, rasters that lack pixels or cannot be read bit by bit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import rasterio
from rasterio.enums import Interleaving
from rasterio.errors import RasterioError

from soundmap.errors import InputError
from soundmap.sources._gdal import open_dataset, reason, settings

T = TypeVar("T")

_LARGEST_BLOCK = 256 * 1024 * 1024
"""Bytes of a block once decoded: it is held as a whole, however little of it is wanted."""

_CHECKED_BLOCKS = 512
_CHECKED_PARTS = 200
"""Files of a VRT that are looked at; of more, so many spread over them."""
_DIRECTORIES = 64
"""Overviews and masks in a TIFF that are looked at."""


def check_readable(path: Path, dataset: rasterio.DatasetReader) -> None:
    """Look at where a raster's pixels are stored.

    Raises
    ------
    InputError
        It is cut short, or stored in blocks that are too large; one line that names the file.
    """
    _check_complete(path, dataset)
    _check_blocks(path, dataset)
    if dataset.driver == "GTiff":
        _check_inner(path, dataset)


def check_parts(whole: Path, parts: Sequence[Path]) -> None:
    """Look so at the rasters that a VRT is made of.

    Raises
    ------
    InputError
        As above, or one is no raster.
    """
    for part in _spread(parts, _CHECKED_PARTS):
        _check_part(whole, part)


def _check_complete(path: Path, dataset: rasterio.DatasetReader) -> None:
    if dataset.driver != "GTiff" or not path.is_file():
        return
    size = os.path.getsize(path)
    height, width = dataset.block_shapes[0]
    down, across = -(-dataset.height // height), -(-dataset.width // width)
    n = down * across
    for k in np.unique(np.linspace(0, n - 1, min(n, _CHECKED_BLOCKS)).astype(int))[::-1]:
        block = f"{k % across}_{k // across}"
        # Where bands are stored one after another, the last one is cut first.
        band = dataset.count
        offset = dataset.get_tag_item(f"BLOCK_OFFSET_{block}", "TIFF", bidx=band)
        length = dataset.get_tag_item(f"BLOCK_SIZE_{block}", "TIFF", bidx=band)
        if offset and length and int(offset) + int(length) > size:
            raise InputError(
                f"{path}: is cut short or damaged (it has {size} bytes, but pixels up to byte "
                f"{int(offset) + int(length)}); copy or download it again"
            )


def _check_blocks(path: Path, dataset: rasterio.DatasetReader) -> None:
    """Blocks are decoded as a whole: gigabytes of one, from a file of kilobytes, for one pixel."""
    if not dataset.count:
        return
    shape = max(dataset.block_shapes, key=math.prod)
    # All bands of such a block are decoded together.
    together = dataset.driver == "GTiff" and dataset.interleaving == Interleaving.pixel
    size = math.prod(shape) * max(map(_bytes, dataset.dtypes)) * (dataset.count if together else 1)
    if size > _LARGEST_BLOCK:
        raise InputError(
            f"{path}: is stored in blocks of {shape[1]} x {shape[0]} pixels, {size / 1e9:.2g} GB "
            "each, which can only be read whole; rewrite it in tiles: gdal_translate "
            f"-co TILED=YES -co COMPRESS=DEFLATE {path.name} tiled.tif"
        )


def _bytes(dtype: str) -> int:
    # Complex integers are GDAL's own.
    return 8 if dtype.startswith("complex_int") else np.dtype(dtype).itemsize


def _check_inner(path: Path, dataset: rasterio.DatasetReader) -> None:
    """Look at overviews and masks, which are rasters of their own, in a TIFF or beside it."""
    for file in map(Path, dataset.files):
        first = 2 if file == path else 1
        if first == 1 and file.suffix not in (".ovr", ".msk"):
            continue
        for directory in range(first, _DIRECTORIES):
            try:
                with open_dataset(f"GTIFF_DIR:{directory}:{file}") as inner:
                    _check_blocks(file, inner)
            except RasterioError:
                break


def _check_part(whole: Path, part: Path) -> None:
    try:
        with np.errstate(over="ignore"), settings(), open_dataset(part) as dataset:
            check_readable(part, dataset)
    except InputError as error:
        raise InputError(f"{whole}: refers to {error}") from error
    except RasterioError as error:
        raise InputError(
            f"{whole}: refers to {part}, which is not a raster that GDAL can read ({reason(error)})"
        ) from error


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]
