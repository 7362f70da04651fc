"""What a map holds: its concepts, grid, value and provenance, and how numbers are packed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.errors import InputError, UsageError

Value = Literal["probability", "share", "similarity"]
Detail = Literal["patch", "image"]
DType = Literal["float32", "uint8"]

FORMAT_VERSION = 1
"""Raised when a reader of older files would misread newer ones."""

VALUE_NAMES: Mapping[Value, str] = MappingProxyType(
    {
        "probability": "probability that the sound is audible",
        "share": "share of the sound among the mapped concepts",
        "similarity": "cosine similarity of place and sound",
    }
)

KEPT_MANTISSA_BITS = 12
"""Explicit mantissa bits that a stored float32 keeps: one part in 8,192, a tenth of what
bfloat16 inference blurs. The bits below are noise that no codec can shrink: without them a
compressed map is a third smaller."""

_UINT8_STEPS = 250
_UINT8_NODATA = 255
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class MapSchema:
    """Everything a map says about itself, apart from its numbers.

    Raises
    ------
    UsageError
        The fields do not fit each other, or a field holds a value that is not offered.
    """

    concepts: tuple[str, ...]
    """Names, in band order; no two alike."""
    groups: tuple[str, ...]
    """Group of each concept, e.g. "biophony"."""
    colours: tuple[str, ...]
    """Colour of each concept as "#rrggbb"."""
    calibrations: tuple[str, ...]
    """Per concept: "platt" (its own fit), "generic" (the bank's) or "none"."""
    value: Value
    """What the numbers mean."""
    formula: str
    """The value's formula, for people."""
    detail: Detail
    """Whether a cell is a patch or a whole window of the model."""
    dtype: DType
    """How numbers are stored; uint8 is packed, see :attr:`scale`."""
    grid: GeoBox
    """Cells: CRS, transform and shape (H, W), north up."""
    chunk_cells: int
    """Edge of a chunk in cells; one unit of work owns whole chunks, all concepts of them."""
    model: str
    """Model name."""
    model_hash: str
    """Hash of the model's weights."""
    imagery: str
    """Where the pixels came from."""
    attribution: str
    """Who must be credited for the imagery."""
    licence: str
    """Licence of the imagery."""
    gsd_m: float
    """True ground metres per imagery pixel, as the model saw it."""
    software: str
    """Name and version of what wrote the map."""
    created: str
    """ISO 8601 time at which the run was started."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """More facts for the file's tags (month, hour, rescaling, ...)."""
    fingerprint: str = ""
    """Hash of everything that decides the numbers."""

    def __post_init__(self) -> None:
        count = len(self.concepts)
        if not count:
            raise UsageError("a map needs at least one concept")
        if len(set(self.concepts)) != count:
            twice = next(name for name in self.concepts if self.concepts.count(name) > 1)
            raise UsageError(f"concept {twice!r} is named twice: name each concept once")
        for name in ("groups", "colours", "calibrations"):
            if len(getattr(self, name)) != count:
                raise UsageError(f"{name}: {len(getattr(self, name))} given for {count} concepts")
        for name, offered in (("value", Value), ("detail", Detail), ("dtype", DType)):
            if getattr(self, name) not in get_args(offered):
                choices = ", ".join(get_args(offered))
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown: use {choices}")
        for colour in self.colours:
            if not _COLOUR.fullmatch(colour):
                raise UsageError(f"colour {colour!r} is not of the form '#rrggbb'")
        if self.chunk_cells < 1:
            raise UsageError(f"chunk_cells must be at least 1, not {self.chunk_cells}")
        if self.grid.crs is None:
            raise UsageError("the map's grid has no CRS")
        affine = self.grid.affine
        if affine.b or affine.d or affine.a <= 0 or affine.e >= 0:
            raise UsageError("the map's grid must be north-up, neither rotated nor mirrored")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Concepts, rows, columns."""
        height, width = self.grid.shape
        return len(self.concepts), int(height), int(width)

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value that can occur."""
        return (-1.0, 1.0) if self.value == "similarity" else (0.0, 1.0)

    @property
    def scale(self) -> float:
        """Value of one stored step: value = stored * scale + offset."""
        low, high = self.value_range
        return 1.0 if self.dtype == "float32" else (high - low) / _UINT8_STEPS

    @property
    def offset(self) -> float:
        """Value of a stored zero."""
        return 0.0 if self.dtype == "float32" else self.value_range[0]

    @property
    def nodata(self) -> float:
        """Stored number of a cell without a value."""
        return math.nan if self.dtype == "float32" else float(_UINT8_NODATA)

    def pack(self, block: NDArray[np.float32]) -> NDArray[Any]:
        """Turn values into what is stored.

        Parameters
        ----------
        block
            float32 of any shape, NaN where there is no value.

        Returns
        -------
        stored
            float32 rounded to :data:`KEPT_MANTISSA_BITS`, or uint8 with 255 for no value. Values
            out of range are clipped to it in uint8.
        """
        block = np.asarray(block, dtype=np.float32)
        planes = block if block.ndim > 2 else block[None]
        stored = np.empty(planes.shape, dtype=self.dtype)
        # Plane by plane, since a plane stays in the processor's cache.
        for plane, kept in zip(planes, stored, strict=True):
            if self.dtype == "float32":
                _round(plane, kept)
            else:
                _quantise(plane, kept, 1 / self.scale, self.offset)
        return stored.reshape(block.shape)

    def unpack(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Turn stored numbers back into values: float32, NaN where there is none."""
        if self.dtype == "float32":
            return np.asarray(stored, dtype=np.float32)
        values = stored.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)
        values[stored == _UINT8_NODATA] = np.nan
        return values

    def attrs(self) -> dict[str, Any]:
        """All fields as what JSON and netCDF attributes can hold."""
        result: dict[str, Any] = {"soundmap_format": FORMAT_VERSION}
        for item in fields(self):
            held = getattr(self, item.name)
            if item.name == "grid":
                result["crs"] = crs_text(self.grid.crs)
                result["transform"] = [float(number) for number in self.grid.affine[:6]]
                result["shape"] = [int(number) for number in self.grid.shape]
            elif item.name == "extra":
                result["extra"] = json.dumps(dict(held), sort_keys=True, ensure_ascii=False)
            else:
                result[item.name] = list(held) if isinstance(held, tuple) else held
        return result

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> MapSchema:
        """Read back what :meth:`attrs` wrote.

        Raises
        ------
        InputError
            The attributes are not those of a soundmap map, or a newer soundmap wrote them.
        """
        version = attrs.get("soundmap_format")
        if version is None:
            raise InputError("it was not written by soundmap")
        if int(version) > FORMAT_VERSION:
            raise InputError("a newer soundmap wrote it: install that version to read it")
        try:
            held: dict[str, Any] = {}
            for item in fields(cls):
                if item.name == "grid":
                    shape = cast("tuple[int, int]", tuple(int(n) for n in attrs["shape"]))
                    held["grid"] = GeoBox(shape, Affine(*attrs["transform"]), attrs["crs"])
                elif item.name == "extra":
                    held["extra"] = json.loads(attrs["extra"])
                else:
                    one = attrs[item.name]
                    held[item.name] = tuple(one) if isinstance(one, list) else one
            return cls(**held)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"its description is damaged ({error})") from error


def crs_text(crs: CRS | None) -> str:
    """Name a CRS as "EPSG:n" where that says it all, else as WKT."""
    if crs is None:
        return ""
    code = crs.to_epsg()
    if code is not None and CRS(f"EPSG:{code}") == crs:
        return f"EPSG:{code}"
    return str(crs.to_wkt())


def _round(plane: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    # Veltkamp's splitting: the sum pushes the low bits out at the rounding unit, the difference
    # brings the high part back.
    scaled = plane * np.float32(2 ** (23 - KEPT_MANTISSA_BITS) + 1)
    np.subtract(scaled, plane, out=out)
    np.subtract(scaled, out, out=out)


def _quantise(
    plane: NDArray[np.float32], out: NDArray[np.uint8], per_value: float, offset: float
) -> None:
    steps = plane - np.float32(offset)
    steps *= np.float32(per_value)
    np.rint(steps, out=steps)
    np.clip(steps, 0, _UINT8_STEPS, out=steps)
    steps[np.isnan(steps)] = _UINT8_NODATA
    out[...] = steps
