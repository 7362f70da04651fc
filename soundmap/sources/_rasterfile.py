"""One raster file: what its header says, which errors it earns, how its pixels become colours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.windows import Window

from soundmap.errors import InputError, SourceError, UsageError
from soundmap.grid import ground_gsd_m
from soundmap.sources._checks import check_parts, check_readable
from soundmap.sources._gdal import alone, may_pass, open_dataset, reason, settings
from soundmap.sources._references import References, check_file, find_references
from soundmap.sources._rescale import Rescale
from soundmap.sources._retry import PassingError

_HASHED_PIECES, _PIECE_BYTES = 16, 16 * 1024
_LEAST_GSD_M = 1e-4

# Zero-padded, as Sentinel-2 names its bands: "B4" is red to Landsat 8 but infrared to Landsat 7.
_NAMES = (("red", "b04"), ("green", "b03"), ("blue", "b02"))


@dataclass(frozen=True, eq=False)
class RasterFile:
    """A raster's header, as far as reading it needs it."""

    path: Path
    grid: GeoBox
    """Its pixel grid as stored: may be rotated or south-up."""
    bands: tuple[int, ...]
    """Three bands for red, green and blue, or one for grey or a palette; counted from 1."""
    bands_how: str
    """Why those bands."""
    dtype: str
    mask: Literal["none", "mask", "band masks", "alpha", "nodata"]
    """What says which pixels are valid."""
    alpha: int | None
    nodata: tuple[float | None, ...]
    """One per chosen band."""
    palette: NDArray[np.uint8] | None
    """uint8[N, 4], red, green, blue, alpha per stored number."""
    overviews: tuple[int, ...]
    block_px: tuple[int, int]
    attribution: str
    licence: str
    parts: tuple[Path, ...]
    """Local rasters that a VRT is made of."""
    vrt: bool
    """Whether it is a VRT, to be handled `alone`."""
    remote: bool
    """Whether its pixels come over a network."""

    @property
    def scaled(self) -> bool:
        """Whether the stored numbers are quantities that a stretch applies to."""
        return self.palette is None

    def window(
        self,
        dataset: rasterio.DatasetReader,
        rescale: Rescale | None,
        row0: int,
        row1: int,
        col0: int,
        col1: int,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Colours uint8[3, h, w] (0 where not valid) and validity bool[h, w] of a window."""
        values, valid = self.values(dataset, Window.from_slices((row0, row1), (col0, col1)))
        if self.palette is not None:
            colours = self.palette[values[0]]
            valid &= colours[..., 3] > 0
            pixels = np.ascontiguousarray(np.moveaxis(colours[..., :3], -1, 0))
        else:
            pixels = rescale.apply(values) if rescale else values.astype(np.uint8, copy=False)
            if len(pixels) == 1:
                pixels = np.repeat(pixels, 3, axis=0)
        if not valid.all():
            pixels *= valid
        return pixels, valid

    def values(
        self,
        dataset: rasterio.DatasetReader,
        window: Window,
        shape: tuple[int, int] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Stored numbers [1 or 3, h, w] and validity bool[h, w], thinned to ``shape`` if given.

        A pixel is not valid where the raster says so, as GDAL's dataset mask has it, but for the
        chosen bands: mask band 0; alpha 0; or all of the bands at their nodata value, so that a
        dark pixel with one band at 0 is kept. Neither is one where a number is not finite.
        """
        bands = [*self.bands, self.alpha] if self.mask == "alpha" and self.alpha else self.bands
        args: dict[str, Any] = {"window": window}
        if shape is not None:
            args["out_shape"] = shape
        masks = {"mask": [1], "band masks": list(self.bands)}.get(self.mask)
        try:
            with np.errstate(over="ignore"):
                stored = _read_bands(dataset, bands, args)
            given = None if masks is None else dataset.read_masks(masks, **args)
        except RasterioError as error:
            raise self.failure("read", error) from error
        if given is not None:
            valid = (given > 0).any(axis=0)
        elif self.mask == "alpha":
            # As in GDAL's mask, any opacity counts: 16-bit alpha of 0 and 1 exists.
            stored, valid = stored[:-1], stored[-1] > 0
        elif self.mask == "nodata":
            with np.errstate(over="ignore"):
                valid = _differs(stored, self.nodata)
        else:
            valid = np.ones(stored.shape[1:], np.bool_)
        if stored.dtype.kind == "f":
            finite = np.isfinite(stored).all(axis=0)
            if not finite.all():
                valid &= finite
        return stored, valid

    def failure(self, what: str, error: RasterioError) -> SourceError:
        """Put a failure of GDAL into words, and tell whether it may pass by what it is."""
        text = f"{self.path}: could not be {what} ({reason(error)})"
        if may_pass(error, self.path, self.remote):
            return PassingError(text)
        if what == "read" and not self.remote:
            text += "; if it is cut short or damaged, copy or download it again"
        return SourceError(text)

    def _files(self) -> list[Path]:
        try:
            with settings(), open_dataset(self.path) as dataset:
                return sorted(map(Path, dataset.files))
        except RasterioError as error:
            raise self.failure("opened again", error) from error

    def digest(self) -> str:
        """Digest of the sizes of the raster's local files and of pieces spread over them.

        Raises
        ------
        SourceError
            It could not be opened.
        """
        # To list a VRT's files GDAL would ask for those on the network.
        files = sorted({self.path, *self.parts}) if self.vrt else self._files()
        summary = hashlib.sha256()
        for file in files:
            if not file.is_file():
                continue
            size = file.stat().st_size
            summary.update(f"{file.name}:{size};".encode())
            with file.open("rb") as stream:
                for offset in np.linspace(0, max(0, size - _PIECE_BYTES), _HASHED_PIECES):
                    stream.seek(int(offset))
                    summary.update(stream.read(_PIECE_BYTES))
        return summary.hexdigest()[:16]


def inspect(path: Path, bands: tuple[int, ...] | None, within: Path | None = None) -> RasterFile:
    """Read a raster's header.

    Parameters
    ----------
    path
        The file.
    bands
        Those asked for, counted from 1.
    within
        The folder that it must not refer out of; None: it may refer anywhere.

    Raises
    ------
    InputError
        It is missing, not a raster, has no place on the ground, holds no usable numbers, cannot be
        read in bounded memory, or refers to what must not be read.
    UsageError
        It does not have the bands asked for.
    SourceError
        It, or what it refers to, does not answer for the moment.
    """
    check_file(path)
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); copy or download it again")
    parts = find_references(path, within)
    check_parts(path, parts.files)
    try:
        with (
            np.errstate(over="ignore"),
            alone(parts.vrt),
            settings(),
            open_dataset(path) as dataset,
        ):
            return _describe(path, dataset, bands, parts)
    except RasterioError as error:
        if parts.remote and may_pass(error, path, remote=True):
            raise PassingError(f"{path}: could not be opened ({reason(error)})") from error
        raise InputError(f"{path}: not a raster that GDAL can read ({reason(error)})") from error


def _describe(
    path: Path,
    dataset: rasterio.DatasetReader,
    asked: tuple[int, ...] | None,
    parts: References,
) -> RasterFile:
    if dataset.count == 0:
        raise InputError(
            f"{path}: holds several datasets and no bands of its own; extract one of them first, "
            "e.g. with gdal_translate"
        )
    grid = _native_grid(path, dataset)
    colours = dataset.colorinterp
    alphas = [i for i, c in enumerate(colours, 1) if c == ColorInterp.alpha]
    alpha = alphas[-1] if alphas else None
    data = [i for i in range(1, dataset.count + 1) if i not in alphas]
    bands, how = _choose_bands(path, dataset, data, asked)
    dtypes = {dataset.dtypes[b - 1] for b in bands}
    if any(d.startswith("complex") for d in dtypes):
        raise InputError(f"{path}: holds complex numbers, which are not imagery")
    check_readable(path, dataset)
    tags = {key.lower(): value.strip() for key, value in dataset.tags().items()}
    return RasterFile(
        path=path,
        grid=grid,
        bands=bands,
        bands_how=how,
        dtype=str(np.result_type(*dtypes)),
        mask=_mask_kind(dataset, bands, alpha),
        alpha=alpha,
        nodata=tuple(dataset.nodatavals[b - 1] for b in bands),
        palette=_palette(dataset, bands),
        # A VRT's are those of the file within, which would be asked for.
        overviews=() if parts.remote else tuple(dataset.overviews(bands[0])),
        block_px=dataset.block_shapes[bands[0] - 1],
        attribution=tags.get("attribution") or tags.get("tifftag_copyright", ""),
        licence=tags.get("licence") or tags.get("license", ""),
        parts=parts.files,
        vrt=parts.vrt,
        remote=parts.remote,
    )


def _native_grid(path: Path, dataset: rasterio.DatasetReader) -> GeoBox:
    transform, crs = dataset.transform, dataset.crs
    if transform.is_identity and (dataset.gcps[0] or dataset.rpcs):
        raise InputError(
            f"{path}: is placed by ground control points or a camera model only; warp it first: "
            f"gdalwarp -t_srs EPSG:4326 {path.name} warped.tif"
        )
    if not crs:
        raise InputError(
            f"{path}: has no coordinate reference system; if you know it, assign it, e.g.: "
            f"rio edit-info --crs EPSG:32633 {path.name}"
        )
    placed = all(map(math.isfinite, transform[:6])) and transform.determinant
    if transform.is_identity or not placed or not math.isfinite(transform.determinant):
        raise InputError(
            f"{path}: does not say where its pixels lie (no geotransform); assign the corners: "
            f"gdal_edit.py -a_ullr WEST NORTH EAST SOUTH {path.name}"
        )
    if not (crs.is_geographic or crs.is_projected):
        raise InputError(
            f"{path}: its coordinate reference system is not tied to the Earth's surface; "
            f"warp it to one that is, or assign the right one: rio edit-info --crs ... {path.name}"
        )
    code = crs.to_epsg()
    grid = GeoBox(dataset.shape, transform, CRS(f"EPSG:{code}" if code else crs.to_wkt()))
    try:
        gsd_m = ground_gsd_m(grid)
    except InputError as error:
        raise InputError(f"{path}: {error}; check its CRS and its geotransform") from error
    if gsd_m < _LEAST_GSD_M:
        raise InputError(
            f"{path}: has pixels of {gsd_m:.2g} m on the ground, which cannot be: check its CRS "
            "and its geotransform"
        )
    return grid


def _choose_bands(
    path: Path,
    dataset: rasterio.DatasetReader,
    data: Sequence[int],
    asked: tuple[int, ...] | None,
) -> tuple[tuple[int, ...], str]:
    if asked is not None:
        if len(asked) not in (1, 3):
            raise UsageError(
                f"--bands takes three bands (red, green, blue) or one, not {len(asked)}"
            )
        wrong = [b for b in asked if not 1 <= b <= dataset.count]
        if wrong:
            has = "1 band" if dataset.count == 1 else f"{dataset.count} bands (1 to the last)"
            raise UsageError(f"--bands: {path} has {has}, so there is no band {wrong[0]}")
        return tuple(asked), "given"
    if not data:
        raise InputError(f"{path}: has an alpha band but no imagery")
    colours = {c: i for i, c in reversed(list(enumerate(dataset.colorinterp, 1)))}
    rgb = [colours.get(c) for c in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
    if all(rgb):
        return tuple(b for b in rgb if b), "by colour interpretation"
    described = {(d or "").strip().lower(): i for i, d in enumerate(dataset.descriptions, 1)}
    rgb = [next((described[n] for n in names if n in described), None) for names in _NAMES]
    if all(rgb):
        return tuple(b for b in rgb if b), "by band names"
    if len(data) >= 3:
        return tuple(data[:3]), "the first three"
    return (data[0],), "the only one" if len(data) == 1 else "the first of two"


def _mask_kind(
    dataset: rasterio.DatasetReader, bands: tuple[int, ...], alpha: int | None
) -> Literal["none", "mask", "band masks", "alpha", "nodata"]:
    flags = [set(dataset.mask_flag_enums[b - 1]) for b in bands]
    if all(MaskFlags.per_dataset in f and MaskFlags.alpha not in f for f in flags):
        return "mask"
    if alpha is not None:
        return "alpha"
    if any(MaskFlags.all_valid in f for f in flags):
        return "none"
    if all(MaskFlags.nodata in f and MaskFlags.per_dataset not in f for f in flags):
        return "nodata"
    return "band masks"


def _palette(dataset: rasterio.DatasetReader, bands: tuple[int, ...]) -> NDArray[np.uint8] | None:
    band, dtype = bands[0], dataset.dtypes[bands[0] - 1]
    if len(set(bands)) > 1 or dataset.colorinterp[band - 1] != ColorInterp.palette:
        return None
    if dtype not in ("uint8", "uint16"):
        return None
    try:
        entries = dataset.colormap(band)
    except ValueError:
        return None
    # Numbers that the table does not list stay transparent.
    table = np.zeros((2 ** (8 * np.dtype(dtype).itemsize), 4), np.uint8)
    for number, colour in entries.items():
        table[number] = colour
    return table


def _read_bands(
    dataset: rasterio.DatasetReader, bands: Sequence[int], args: dict[str, Any]
) -> NDArray[Any]:
    if len({dataset.dtypes[b - 1] for b in bands}) == 1:
        # All at once: where pixels are interleaved, each block is decoded but once.
        if "out_shape" in args:
            args = {**args, "out_shape": (len(bands), *args["out_shape"])}
        return dataset.read(list(bands), **args)
    return np.stack([dataset.read(b, **args) for b in bands])


def _differs(stored: NDArray[Any], nodata: Sequence[float | None]) -> NDArray[np.bool_]:
    """Where at least one band is not at its nodata value."""
    valid = np.zeros(stored.shape[1:], np.bool_)
    for band, value in zip(stored, nodata, strict=True):
        if value is None:
            valid[:] = True
        elif np.isnan(value):
            valid |= ~np.isnan(band) if band.dtype.kind == "f" else True
        else:
            # The number in the header may carry more digits than the band's type can hold.
            valid |= band != (band.dtype.type(value) if band.dtype.kind == "f" else value)
    return valid
