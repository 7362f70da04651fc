"""Statistics of a map, gathered chunk by chunk so that no one has to read it again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PARTIALS = ("count", "mean", "squares", "minimum", "maximum")
"""What is kept of each chunk and concept; ``squares`` is the sum of squared deviations."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of one concept over a map; NaN where it has no valid cell."""

    minimum: float
    maximum: float
    mean: float
    stddev: float
    """Population standard deviation, as GDAL writes it."""
    valid: int
    """Cells that have a value."""


def partials(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """Summarise a chunk: float32[C, h, w] with NaN for no value -> float64[5, C]."""
    result = np.zeros((len(PARTIALS), block.shape[0]), dtype=np.float64)
    for index, plane in enumerate(block):
        low = plane.min()
        if np.isnan(low):
            plane = plane[~np.isnan(plane)]
            if not plane.size:
                continue
            low = plane.min()
        values = plane.astype(np.float64).ravel()
        mean = values.mean()
        high = values.max()
        values -= mean
        # Not a dot product: linear algebra libraries start threads for it, at many times the cost.
        values *= values
        result[:, index] = values.size, mean, values.sum(), low, high
    return result


def combined(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Merge summaries of chunks, float64[..., 5, C], into one of the same kind, float64[5, C]."""
    flat = parts.reshape(-1, *parts.shape[-2:])
    count, mean, squares, low, high = (flat[:, index] for index in range(len(PARTIALS)))
    total = count.sum(axis=0)
    seen = count > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        overall = np.where(total > 0, (count * mean).sum(axis=0) / total, 0.0)
    spread = (squares + count * (mean - overall) ** 2).sum(axis=0)
    lowest = np.where(seen, low, np.inf).min(axis=0)
    highest = np.where(seen, high, -np.inf).max(axis=0)
    return np.stack([total, overall, spread, lowest, highest])


def merged(parts: NDArray[np.float64]) -> tuple[Statistics, ...]:
    """Merge summaries of chunks, float64[..., 5, C], into statistics of each concept."""
    return tuple(
        Statistics(float(low), float(high), float(mean), math.sqrt(squares / count), int(count))
        if count
        else Statistics(math.nan, math.nan, math.nan, math.nan, 0)
        for count, mean, squares, low, high in combined(parts).T
    )
