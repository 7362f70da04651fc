"""What a map holds, read from a GeoTIFF or Zarr store that soundmap wrote."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rasterio
from pyproj import Transformer
from pyproj.exceptions import ProjError
from rasterio.errors import RasterioError

from soundmap.errors import InputError
from soundmap.stores.place import Location, located
from soundmap.stores.schema import MapSchema, crs_text
from soundmap.stores.statistics import Statistics
from soundmap.stores.zarr_store import open_store


@dataclass(frozen=True)
class ConceptInfo:
    """One concept of a map."""

    name: str
    group: str
    colour: str
    calibration: str
    statistics: Statistics | None
    """None in a map that was not finished."""


@dataclass(frozen=True)
class MapInfo:
    """What a map says about itself."""

    path: Location
    kind: str
    """"GeoTIFF" or "Zarr"."""
    concepts: tuple[ConceptInfo, ...]
    value: str
    formula: str
    detail: str
    dtype: str
    model: str
    model_hash: str
    imagery: str
    attribution: str
    licence: str
    gsd_m: float
    crs: str
    """"EPSG:n", or WKT."""
    cell_size: tuple[float, float]
    """Width and height of a cell, in units of the CRS."""
    shape: tuple[int, int]
    """Rows and columns."""
    bounds_lonlat: tuple[float, float, float, float] | None
    """West, south, east, north in degrees; west > east across the 180th meridian. None where
    the map's edge has no longitude and latitude."""
    software: str
    created: str
    fingerprint: str
    extra: Mapping[str, str]

    @property
    def finished(self) -> bool:
        """Whether the run that made the map reached its end."""
        return all(one.statistics is not None for one in self.concepts)


def describe(path: str | Path) -> MapInfo:
    """Read what a map holds, without reading its cells.

    Raises
    ------
    InputError
        There is no such file, or soundmap did not write it.
    """
    location = located(path)
    if not isinstance(location, Path) or location.is_dir():
        store = open_store(location)
        return _info(location, "Zarr", store.schema, store.statistics())
    if not location.exists():
        raise InputError(f"{path}: no such file: check the path")
    schema, statistics = _read_geotiff(location)
    return _info(location, "GeoTIFF", schema, statistics)


def _read_geotiff(path: Path) -> tuple[MapSchema, tuple[Statistics, ...]]:
    try:
        with rasterio.open(path) as dataset:
            text = dataset.tags().get("SOUNDMAP")
            bands = [dataset.tags(band) for band in dataset.indexes]
            # Bands and grid as they are now: GIS tools keep the tags of what they cut and warp.
            present = {
                "concepts": list(dataset.descriptions),
                "groups": [tags.get("GROUP", "") for tags in bands],
                "colours": [tags.get("COLOUR", "#808080") for tags in bands],
                "calibrations": [tags.get("CALIBRATION", "none") for tags in bands],
                "crs": dataset.crs.to_wkt() if dataset.crs else "",
                "transform": list(dataset.transform[:6]),
                "shape": list(dataset.shape),
            }
    except RasterioError as error:
        raise InputError(f"{path}: cannot be read as a raster: is it a map?") from error
    if text is None:
        raise InputError(f"{path}: not a soundmap map: it was not written by soundmap")
    try:
        schema = MapSchema.from_attrs({**json.loads(text), **present})
        found = tuple(_statistics(tags, schema) for tags in bands)
    except InputError as error:
        raise InputError(f"{path}: not a soundmap map: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a soundmap map: its description is damaged") from error
    return schema, tuple(one for one in found if one is not None)


def _statistics(tags: Mapping[str, str], schema: MapSchema) -> Statistics | None:
    if "VALID_CELLS" not in tags:
        return None
    valid = int(tags["VALID_CELLS"])
    if not valid:
        return Statistics(math.nan, math.nan, math.nan, math.nan, 0)
    low, high, mean, deviation = (
        float(tags[f"STATISTICS_{name}"]) * schema.scale
        for name in ("MINIMUM", "MAXIMUM", "MEAN", "STDDEV")
    )
    shift = schema.offset
    return Statistics(low + shift, high + shift, mean + shift, deviation, valid)


def _info(
    path: Location, kind: str, schema: MapSchema, statistics: tuple[Statistics, ...]
) -> MapInfo:
    found = (
        statistics if len(statistics) == len(schema.concepts) else (None,) * len(schema.concepts)
    )
    affine = schema.grid.affine
    height, width = schema.grid.shape
    return MapInfo(
        path=path,
        kind=kind,
        concepts=tuple(
            ConceptInfo(*row)
            for row in zip(
                schema.concepts,
                schema.groups,
                schema.colours,
                schema.calibrations,
                found,
                strict=True,
            )
        ),
        value=schema.value,
        formula=schema.formula,
        detail=schema.detail,
        dtype=schema.dtype,
        model=schema.model,
        model_hash=schema.model_hash,
        imagery=schema.imagery,
        attribution=schema.attribution,
        licence=schema.licence,
        gsd_m=schema.gsd_m,
        crs=crs_text(schema.grid.crs),
        cell_size=(abs(float(affine.a)), abs(float(affine.e))),
        shape=(int(height), int(width)),
        bounds_lonlat=_bounds_lonlat(schema),
        software=schema.software,
        created=schema.created,
        fingerprint=schema.fingerprint,
        extra=dict(schema.extra),
    )


def _bounds_lonlat(schema: MapSchema) -> tuple[float, float, float, float] | None:
    crs = schema.grid.crs
    assert crs is not None
    box = schema.grid.boundingbox
    try:
        to_lonlat = Transformer.from_crs(crs.proj, "EPSG:4326", always_xy=True)
        bounds = to_lonlat.transform_bounds(box.left, box.bottom, box.right, box.top)
    except ProjError:
        return None
    west, south, east, north = (float(number) for number in bounds)
    if not all(math.isfinite(number) for number in (west, south, east, north)):
        return None
    return west, south, east, north


def to_json(info: MapInfo) -> str:
    """Write what a map holds as JSON, with all settings of its run."""
    facts = dataclasses.asdict(info) | {"path": str(info.path), "extra": dict(info.extra)}
    if "settings" in info.extra:
        facts["extra"]["settings"] = json.loads(info.extra["settings"])
    return json.dumps(facts, indent=2, ensure_ascii=False)
