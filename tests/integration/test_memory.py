"""Memory does not grow with the area: neither the client's nor a worker's.

benchmarks/scale_memory.py does the same with whole units and a hundred times the area.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rasterio

if TYPE_CHECKING:
    from tests.integration.conftest import Stage

MOST_GROWTH = 1.15
SMALL, TIMES = 12, 9


@pytest.fixture
def wide(town: Path, tmp_path: Path) -> Path:
    """The town three times along each side: 9 x 12 units of 8 cells."""
    path = tmp_path / "wide.tif"
    with rasterio.open(town) as dataset:
        pixels, profile = np.tile(dataset.read(), (1, 3, 3)), dataset.profile
    profile |= {"height": pixels.shape[1], "width": pixels.shape[2]}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels)
    return path


def peak_mb(pid: int | None) -> float:
    """A process's own peak of resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM in /proc")
def test_nine_times_the_area_takes_no_more_memory(stage: Stage, wide: Path) -> None:
    stage.imagery = wide
    # Units end when they are computed, not later.
    stage.UNIT_SECONDS = 0
    stage.start_cluster(1)
    worker = stage.workers[0]
    client = stage.client()
    small, large = (0.0, 0.0), (0.0, 0.0)
    while client.is_alive():
        done = stage.computed().total()
        try:
            peaks = peak_mb(client.pid), peak_mb(worker.pid)
        except (OSError, StopIteration):
            break
        if done <= SMALL:
            small = peaks
        large = peaks
        time.sleep(0.02)
    client.join()
    assert client.exitcode == 0, stage.log
    assert len(stage.computed()) == SMALL * TIMES
    print(f"client {small[0]:.0f} and {large[0]:.0f} MB, worker {small[1]:.0f} and {large[1]:.0f}")
    assert large[0] <= MOST_GROWTH * small[0]
    assert large[1] <= MOST_GROWTH * small[1]
