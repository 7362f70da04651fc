"""Plan a map of all land, a cell for each window of 2.56 km: seconds, memory, units, windows.

    python benchmarks/plan_land.py ne_110m_countries.geojson

The imagery is what a mosaic of the globe would be: degrees, pixels of 10 m at the equator. A
window covers 256 of them, as those of the published Sat2Sound models for Sentinel-2 do. Nothing is
read or encoded.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.estimate import estimate
from soundmap.layout import choose_layout
from soundmap.pipeline import Job
from soundmap.plan import make_plan
from soundmap.region import region_from_file, region_of_globe
from soundmap.sources.base import Image, Resampling, SourceInfo
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import axes_bank

PIXEL_M = 10.0
WINDOW_PX = 256


@dataclass(frozen=True)
class Globe:
    """A source of which only the extent is ever asked."""

    info: SourceInfo

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Refuse: planning reads nothing."""
        raise AssertionError("planning read imagery")


def globe() -> Globe:
    """Imagery of the whole globe in degrees."""
    shape = (round(180 * 111_320 / PIXEL_M), round(360 * 111_320 / PIXEL_M))
    affine = Affine(360 / shape[1], 0, -180, 0, -180 / shape[0], 90)
    grid = GeoBox(shape, affine, "EPSG:4326")
    return Globe(SourceInfo("globe", grid, PIXEL_M, "", "", {}))


def peak_mb() -> int:
    """Most memory that this process held; `getrusage` may tell its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("land", help="polygons of all land, FILE[:layer]")
    land = parser.parse_args().land

    started = time.perf_counter()
    source = globe()
    encoder = FakeEncoder(1024, window_px=WINDOW_PX, patch_px=16, gsd_m=((PIXEL_M, PIXEL_M),))
    mask = region_from_file(land)
    read = time.perf_counter()
    layout = choose_layout(source.info, encoder.spec, region_of_globe(), detail="image")
    plan = make_plan(layout.region, layout.grid, layout.unit_cells, {}, mask)
    job = Job(
        plan=plan,
        source=source,
        model="",
        bank=axes_bank(),
        value="similarity",
        detail="image",
        lattice=layout.lattice,
        gsd_m=layout.reading.gsd_m,
        told_gsd_m=layout.reading.told_m,
        store="",
    )
    cost = estimate(job, encoder, "float32")
    planned = time.perf_counter()
    for unit in plan.units:
        assert unit.cells.shape[0] <= plan.unit_cells
    walked = time.perf_counter()
    status = np.zeros(-(-np.array(plan.grid.shape) // plan.unit_cells), np.uint8)
    print(
        json.dumps(
            {
                "seconds": round(planned - started, 2),
                "of which reading the land": round(read - started, 2),
                "peak MB": peak_mb(),
                "units": cost.units,
                "windows": cost.windows,
                "cells along a unit": plan.unit_cells,
                "seconds to build each unit once": round(walked - planned, 2),
                "MB of the status array": round(status.nbytes / 1e6, 2),
                "MB of a job that travels": round(len(pickle.dumps(job)) / 1e6, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
