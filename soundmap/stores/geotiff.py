"""Export of a finished Zarr map as a cloud-optimised GeoTIFF.

GDAL does the work, fed by a virtual raster (VRT) that adds to the store's numbers what a
GeoTIFF says about them::

    city.zarr -> map.vrt (names, tags, statistics) -> map.vrt.ovr (averaged overviews)
                     '------------- copied together ------------> map.tif -> city.tif

Bands are interleaved whole, so that showing one of 45 decodes one. GDAL's own COG driver cannot
do that before 3.11 and takes three times the time and six times the memory; its GTiff driver
writes the same cloud-optimised layout when it copies a raster that has overviews.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Literal

import rasterio
import rasterio.shutil

# Building overviews raises GDAL's errors as they are; no public module names their class.
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError

from soundmap.errors import OutputError
from soundmap.stores import place
from soundmap.stores.libtiff_noise import without_libtiff_noise
from soundmap.stores.qml import style_xml
from soundmap.stores.schema import FORMAT_VERSION, VALUE_NAMES, MapSchema, crs_text
from soundmap.stores.statistics import Statistics
from soundmap.stores.target import publish
from soundmap.stores.zarr_store import ZarrStore

Compression = Literal["deflate", "zstd"]

# Rasterio hands this number to GDAL as bytes, whatever GDAL's own option means by it. The copy
# reads and writes every block once, so that a larger cache costs memory and saves no time.
_CACHE_BYTES = 16 << 20
_BLOCK = 512
# GDAL writes in pieces of up to a megabyte for each thread: less than these does not hold one.
_FULL_BYTES = 4 << 20
_STYLE = "map.qml"
_STALE_SIDECARS = (".aux.xml", ".ovr", ".msk")


def export_cog(
    store: ZarrStore,
    target: str | Path,
    *,
    overwrite: bool = False,
    compression: Compression = "deflate",
    threads: int | None = None,
    style: bool = True,
) -> Path:
    """Write a finished map as a GeoTIFF, with a QGIS style beside it.

    Streams block by block; needs room beside the target for the file and, meanwhile, for about
    a third to four fifths of the uncompressed map.

    Parameters
    ----------
    store
        A map after ``finish``.
    target
        The file to write; it appears whole or not at all.
    overwrite
        Whether an older file of that name may be replaced.
    compression
        "deflate" is read everywhere; "zstd" writes in three quarters of the time, and is read by
        GDAL and QGIS.
    threads
        Threads that compress; by default one for each processor.
    style
        Whether to write ``city.qml`` beside ``city.tif``.

    Raises
    ------
    OutputError
        The target exists, or it could not be written.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already: add --overwrite or choose another name")
    scratch = scratch_path(target)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with without_libtiff_noise():
            made = _export(store, scratch, compression, threads)
        if style:
            # Before the map is in place: room for it is not to be missing afterwards.
            (scratch / _STYLE).write_text(style_xml(store.schema), encoding="utf-8")
        publish(made, target, overwrite)
        for suffix in _STALE_SIDECARS:
            target.with_name(target.name + suffix).unlink(missing_ok=True)
        publish_style(target)
    except OutputError:
        raise
    except (OSError, RasterioError, CPLE_BaseError) as error:
        raise OutputError(
            f"{target}: could not be written ({_reason(error, scratch)}): make room or choose "
            "another output"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _reason(error: Exception, folder: Path) -> str:
    # GDAL names the call that failed, not why: of a full disk it says that it "cannot read".
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return os.strerror(errno.ENOSPC)
    return str(getattr(error, "strerror", None) or getattr(error, "errmsg", None) or error)


def publish_style(target: Path) -> None:
    """Put the style beside a map that is in place, if it is still waiting for that."""
    made = scratch_path(target) / _STYLE
    if made.exists():
        os.replace(made, target.with_suffix(".qml"))


def scratch_path(target: Path) -> Path:
    """Where a file is made before it is put in place.

    A fixed name, so that the next export clears what a killed one left.
    """
    return target.with_name(f".{target.name}.new")


def _export(store: ZarrStore, folder: Path, compression: Compression, threads: int | None) -> Path:
    schema = store.schema
    vrt, made = folder / "map.vrt", folder / "map.tif"
    ET.ElementTree(_vrt(store)).write(vrt, encoding="utf-8")
    workers = threads or _processors()
    options: dict[str, object] = {
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "interleave": "BAND",
        "compress": compression.upper(),
        "zlevel" if compression == "deflate" else "zstd_level": 1,
        # Floating-point values lie close to their neighbours; bytes of few levels do not gain.
        "predictor": 3 if schema.dtype == "float32" else 2,
        "bigtiff": "IF_SAFER",
        "num_threads": workers,
        # Without it three bytes would become red, green, blue, and four would gain an alpha.
        "photometric": "MINISBLACK",
        "alpha": "NO",
    }
    with rasterio.Env(
        GDAL_CACHEMAX=_CACHE_BYTES,
        GDAL_NUM_THREADS=workers,
        GDAL_PAM_ENABLED=False,
        GDAL_TIFF_OVR_BLOCKSIZE=_BLOCK,
    ):
        factors = overview_factors(schema)
        if factors:
            # Options of this step alone: the copy would leave its overviews uncompressed, too.
            with (
                rasterio.Env(
                    COMPRESS_OVERVIEW="NONE",
                    INTERLEAVE_OVERVIEW="BAND",
                    BIGTIFF_OVERVIEW="IF_SAFER",
                ),
                rasterio.open(vrt, "r+") as dataset,
            ):
                dataset.build_overviews(factors, Resampling.average)
        rasterio.shutil.copy(
            str(vrt), str(made), driver="GTiff", copy_src_overviews=True, **options
        )
    return made


def _processors() -> int:
    # The processors that this process may use, where the system tells them from those it has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def overview_factors(schema: MapSchema) -> list[int]:
    """Overview factors down to where the map fits into one block."""
    _, height, width = schema.shape
    levels = max(0, math.ceil(math.log2(max(height, width) / _BLOCK)))
    return [2**level for level in range(1, levels + 1)]


def _vrt(store: ZarrStore) -> ET.Element:
    schema = store.schema
    count, height, width = schema.shape
    crs = schema.grid.crs
    assert crs is not None
    root = ET.Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
    srs = ET.SubElement(root, "SRS")
    text = crs_text(crs)
    srs.text = text if text.startswith("EPSG:") else crs.to_wkt()
    transform = ET.SubElement(root, "GeoTransform")
    transform.text = ", ".join(repr(float(number)) for number in schema.grid.affine.to_gdal())
    _metadata(root, _map_tags(schema))
    statistics = store.statistics() or (None,) * count
    for index, (name, one) in enumerate(zip(schema.concepts, statistics, strict=True)):
        kind = "Float32" if schema.dtype == "float32" else "Byte"
        band = ET.SubElement(root, "VRTRasterBand", dataType=kind, band=str(index + 1))
        _metadata(band, _band_tags(schema, index, one))
        ET.SubElement(band, "Description").text = name
        ET.SubElement(band, "NoDataValue").text = "nan" if kind == "Float32" else "255"
        if schema.dtype == "uint8":
            ET.SubElement(band, "Offset").text = repr(schema.offset)
            ET.SubElement(band, "Scale").text = repr(schema.scale)
        ET.SubElement(band, "ColorInterp").text = "Gray" if index == 0 else "Undefined"
        source = ET.SubElement(band, "SimpleSource")
        ET.SubElement(source, "SourceFilename", relativeToVRT="0").text = place.absolute(store.path)
        ET.SubElement(source, "SourceBand").text = str(index + 1)
    return root


def _metadata(parent: ET.Element, tags: dict[str, str]) -> None:
    block = ET.SubElement(parent, "Metadata")
    for key, text in tags.items():
        ET.SubElement(block, "MDI", key=key).text = text


def _map_tags(schema: MapSchema) -> dict[str, str]:
    tags = {
        "TIFFTAG_SOFTWARE": schema.software,
        "TIFFTAG_IMAGEDESCRIPTION": f"Soundscape map: {VALUE_NAMES[schema.value]}",
        "TIFFTAG_COPYRIGHT": schema.attribution,
        "AREA_OR_POINT": "Area",
        "SOUNDMAP_FORMAT": str(FORMAT_VERSION),
        "VALUE": schema.value,
        "FORMULA": schema.formula,
        "DETAIL": schema.detail,
        "MODEL": schema.model,
        "MODEL_HASH": schema.model_hash,
        "IMAGERY": schema.imagery,
        "ATTRIBUTION": schema.attribution,
        "LICENCE": schema.licence,
        "GSD_M": repr(float(schema.gsd_m)),
        "SOFTWARE": schema.software,
        "CREATED": schema.created,
        "FINGERPRINT": schema.fingerprint,
        "SOUNDMAP": json.dumps(schema.attrs(), ensure_ascii=False),
    }
    own = {key.upper(): text for key, text in schema.extra.items()}
    return {key: text for key, text in {**own, **tags}.items() if text}


def _band_tags(schema: MapSchema, index: int, one: Statistics | None) -> dict[str, str]:
    tags = {
        "GROUP": schema.groups[index],
        "COLOUR": schema.colours[index],
        "CALIBRATION": schema.calibrations[index],
    }
    if one is None:
        return tags
    _, height, width = schema.shape
    tags["VALID_CELLS"] = str(one.valid)
    tags["STATISTICS_VALID_PERCENT"] = f"{100 * one.valid / (height * width):.6g}"
    if one.valid:
        # GDAL's statistics are of the stored numbers, before scale and offset.
        tags |= {
            "STATISTICS_MINIMUM": repr((one.minimum - schema.offset) / schema.scale),
            "STATISTICS_MAXIMUM": repr((one.maximum - schema.offset) / schema.scale),
            "STATISTICS_MEAN": repr((one.mean - schema.offset) / schema.scale),
            "STATISTICS_STDDEV": repr(one.stddev / schema.scale),
        }
    return tags
