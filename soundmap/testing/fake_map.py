"""Maps without a store, in colours: what a source and an encoder come to in each cell.

The concepts of `axes_bank` are the axes of the space of `FakeEncoder`, so that a map of
similarities holds the embeddings, and `colours_of` tells which colour each cell was made from.
"""

from __future__ import annotations

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.encoder import Encoder
from soundmap.layout import choose_layout
from soundmap.pipeline import Job, encode_unit, read_unit, score_unit
from soundmap.plan import Unit, make_plan
from soundmap.region import Region
from soundmap.scoring import ConceptBank
from soundmap.sources.base import Source
from soundmap.stores.schema import MapSchema


def axes_bank() -> ConceptBank:
    """Make a bank for an encoder of four dimensions: one, red, green and blue."""
    return ConceptBank(
        names=("one", "red", "green", "blue"),
        groups=("geophony",) * 4,
        colours=("#000000", "#ff0000", "#00ff00", "#0000ff"),
        vectors=np.eye(4, dtype=np.float32),
        scale=np.array([9, 5, 5, 5], np.float32),
        bias=np.array([-6, 0, 1, -1], np.float32),
        calibration=("platt",) * 4,
        share_scale=3.0,
        encoder_id="fake",
    )


def fake_schema() -> MapSchema:
    """Describe a map of two sounds, 32 x 24 cells of 10 m; `dataclasses.replace` makes others."""
    return MapSchema(
        concepts=("birdsong", "road traffic"),
        groups=("biophony", "anthrophony"),
        colours=("#33a02c", "#e31a1c"),
        calibrations=("platt", "platt"),
        value="probability",
        formula="",
        detail="patch",
        dtype="float32",
        grid=GeoBox((24, 32), Affine(10, 0, 500_000, 0, -10, 5_500_000), "EPSG:32633"),
        chunk_cells=32,
        model="soundmap-small",
        model_hash="0123",
        imagery="town.tif",
        attribution="",
        licence="",
        gsd_m=10.0,
        software="soundmap",
        created="2026-01-02T03:04:05+00:00",
        fingerprint="f00d",
    )


def colours_of(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Tell colours from similarities, float32[4, ...] to float64[3, ...] in 0..255."""
    return 127.5 + 255 * (values[1:4].astype(np.float64) / values[0]) / 1.5


def make_job(
    source: Source,
    encoder: Encoder,
    *,
    unit_cells: int = 64,
    region: Region | None = None,
    value: str = "similarity",
    detail: str = "patch",
    crs: str = "auto",
    resolution_m: float | None = None,
) -> Job:
    """Plan a map as `soundmap predict` does, with units of a given size and no store."""
    layout = choose_layout(
        source.info, encoder.spec, region, detail=detail, crs=crs, resolution_m=resolution_m
    )
    return Job(
        plan=make_plan(layout.region, layout.grid, unit_cells),
        source=source,
        model="fake",
        bank=axes_bank(),
        value=value,
        detail=detail,
        lattice=layout.lattice,
        gsd_m=layout.reading.gsd_m,
        told_gsd_m=layout.reading.told_m,
        store="",
    )


def compute_unit(job: Job, unit: Unit, encoder: Encoder) -> NDArray[np.float32] | None:
    """Read, encode and score one unit: float32[C, h, w], or None where there is nothing."""
    data = read_unit(job, unit, encoder)
    return score_unit(job, unit, data, encode_unit(job, data, encoder))


def compute(job: Job, encoder: Encoder) -> NDArray[np.float32]:
    """Compute all units of a job, side by side: float32[C, H, W], NaN where there is nothing."""
    result = np.full((len(job.bank), *job.plan.grid.shape), np.nan, np.float32)
    for unit in job.plan.units:
        values = compute_unit(job, unit, encoder)
        if values is not None:
            result[:, unit.row0 : unit.row1, unit.col0 : unit.col1] = values
    return result
