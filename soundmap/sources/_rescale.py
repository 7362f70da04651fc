"""Stored numbers of any type to 0..255, by one scale for a whole source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import UsageError
from soundmap.sources._resample import to_uint8

PERCENTILES = (2.0, 98.0)
"""What imagery viewers stretch to by default, QGIS among them."""


@dataclass(frozen=True)
class Rescale:
    """A linear stretch, the same for all bands so that colours keep their hue."""

    low: float
    """This value becomes 0."""
    high: float
    """This value becomes 255."""
    how: str
    """Where the two come from: "given", "percentiles 2-98", ..."""

    def __str__(self) -> str:
        return f"{self.low:.9g},{self.high:.9g} ({self.how})"

    def apply(self, values: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Stretch, round and clip numbers of any real type. NaN gives an arbitrary number."""
        kind = values.dtype
        if kind.kind in "ui" and kind.itemsize <= 2:
            # One look-up per pixel is several times faster than arithmetic on 16-bit numbers.
            every = np.arange(2 ** (8 * kind.itemsize)).astype(kind)
            return self._stretch(every.astype(np.float64))[values.view(f"u{kind.itemsize}")]
        real = np.float32 if kind == np.float32 else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            return self._stretch(values.astype(real))

    def _stretch(self, values: NDArray[np.floating]) -> NDArray[np.uint8]:
        span = self.high - self.low
        # From end to end of their type numbers are further apart than it can tell.
        per_unit = 255 / span if math.isfinite(span) else 1 / (self.high / 255 - self.low / 255)
        values -= np.asarray(self.low, values.dtype)
        values *= np.asarray(per_unit, values.dtype)
        return to_uint8(values)


def given(rescale: tuple[float, float]) -> Rescale:
    """Check a stretch that the user asked for."""
    low, high = map(float, rescale)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(
            f"--rescale {low:g},{high:g} cannot be used: give two numbers, the lower one first, "
            "e.g. 0,3000"
        )
    return Rescale(low, high, "given")


def from_sample(values: NDArray[Any]) -> Rescale:
    """Stretch between the 2nd and the 98th percentile of a sample of valid numbers."""
    if not values.size:
        return Rescale(0.0, 1.0, "no valid pixels")
    how = "percentiles {:g}-{:g}".format(*PERCENTILES)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = _short(np.percentile(values, PERCENTILES))
    if low >= high or not (math.isfinite(low) and math.isfinite(high)):
        # Nearly everything is one value (a masked sea): the rest is what there is to see.
        how = "minimum and maximum"
        low, high = _short([values.min(), values.max()])
    if low >= high:
        how, high = "one value", low + max(1.0, abs(low) * 1e-3)
    return Rescale(low, high, how)


def _short(pair: NDArray[np.floating] | list[Any]) -> tuple[float, float]:
    # What is recorded is what is used: typing the recorded numbers gives the same pixels.
    low, high = (float(f"{float(v):.6g}") for v in pair)
    return low, high
