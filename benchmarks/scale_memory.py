"""Whether memory stays flat: peaks of every process of a run, on an area and on a larger one.

    python benchmarks/scale_memory.py [--side 3072] [--times 100] [--unit-px 1024] [--workers 0,2]

The raster is a VRT that repeats the sample scene. Of every batch of windows only the first ones
are encoded, and stand for the others: all arrays and all passes through the network have their
usual sizes, and a hundred times the area does not take a hundred times as long.

A peak is the process's own (VmHWM of Linux), looked at from outside. With --most it fails where
the larger area takes more than so many times the memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import rasterio

LOOK_SECONDS = 0.1

CLIENT = """
import sys
import numpy as np
import soundmap.layout
from soundmap.encoder.torch_encoder import _PASS_PX, TorchEncoder

def encode_some(self, pixels, lonlat=None, *args, **options):
    few = max(1, self.threads * _PASS_PX // (pixels.shape[2] * pixels.shape[3]))
    given = None if lonlat is None else lonlat[:few]
    found = encode(self, pixels[:few], given, *args, **options)
    index = np.arange(len(pixels)) % min(few, len(pixels))
    repeated = [None if a is None else a[index] for a in (found.image, found.patches)]
    return type(found)(*repeated)

# Dask may load the file twice.
if TorchEncoder.encode_images.__name__ != "encode_some":
    encode, TorchEncoder.encode_images = TorchEncoder.encode_images, encode_some
"""

RUN = """
if __name__ == "__main__":
    import dask
    from pathlib import Path
    from soundmap.api import Request, run
    imagery, out, unit_px, workers, detail, this = sys.argv[1:]
    soundmap.layout._UNIT_PX = int(unit_px)
    dask.config.set({"distributed.worker.preload": [this]})
    run(Request(Path(out), imagery, concepts=["birdsong", "road traffic"], detail=detail,
                workers=int(workers) or None))
"""


def make_imagery(folder: Path, side: int) -> Path:
    """Write the sample scene, and a VRT of side x side pixels that repeats it."""
    from soundmap.sources.sample import SampleSource

    source = SampleSource()
    grid = source.info.native_grid
    assert grid is not None
    height, width = grid.shape
    tile, path = folder / "tile.tif", folder / f"area{side}.vrt"
    if not tile.exists():
        profile = {"driver": "GTiff", "count": 3, "height": height, "width": width}
        profile |= {"dtype": "uint8", "crs": str(grid.crs), "transform": grid.affine}
        with rasterio.open(tile, "w", tiled=True, compress="deflate", **profile) as dataset:
            dataset.write(source.read(grid).pixels)
    with rasterio.open(tile) as dataset:
        wkt, transform = dataset.crs.to_wkt(), dataset.transform.to_gdal()
    bands = []
    for band, colour in enumerate(("Red", "Green", "Blue"), 1):
        parts = []
        for row in range(0, side, height):
            for col in range(0, side, width):
                h, w = min(height, side - row), min(width, side - col)
                parts.append(
                    f'<SimpleSource><SourceFilename relativeToVRT="1">{tile.name}'
                    f"</SourceFilename><SourceBand>{band}</SourceBand>"
                    f'<SourceProperties RasterXSize="{width}" RasterYSize="{height}" '
                    'DataType="Byte" BlockXSize="256" BlockYSize="256"/>'
                    f'<SrcRect xOff="0" yOff="0" xSize="{w}" ySize="{h}"/>'
                    f'<DstRect xOff="{col}" yOff="{row}" xSize="{w}" ySize="{h}"/>'
                    "</SimpleSource>"
                )
        bands.append(
            f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{colour}</ColorInterp>'
            f"{''.join(parts)}</VRTRasterBand>"
        )
    path.write_text(
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><SRS>{wkt}</SRS>'
        f"<GeoTransform>{', '.join(map(repr, transform))}</GeoTransform>{''.join(bands)}"
        "</VRTDataset>"
    )
    return path


def peak_mb(pid: int) -> float:
    """A process's own peak of resident memory; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0


def measure(imagery: Path, folder: Path, unit_px: int, workers: int, detail: str) -> list[float]:
    """Run a map; the peak in MB of its client and, after it, of each worker."""
    script, preload = folder / "client.py", folder / "preload.py"
    script.write_text(CLIENT + RUN)
    preload.write_text(CLIENT)
    out = folder / f"{imagery.stem}-{workers}.zarr"
    arguments = [imagery, out, unit_px, workers, detail, preload]
    peaks: dict[int, float] = {}
    with subprocess.Popen([sys.executable, script, *map(str, arguments)]) as client:
        while client.poll() is None:
            for pid in [client.pid, *_workers(client.pid)]:
                peaks[pid] = max(peaks.get(pid, 0.0), peak_mb(pid))
            time.sleep(LOOK_SECONDS)
    if client.returncode:
        raise SystemExit(f"the run failed with status {client.returncode}")
    return [peaks.pop(client.pid), *peaks.values()]


def _workers(pid: int) -> list[int]:
    try:
        children = psutil.Process(pid).children()
        return [c.pid for c in children if "spawn_main" in " ".join(c.cmdline())]
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=3072, help="pixels along the smaller area")
    parser.add_argument("--times", type=int, default=100, help="how much larger the other is")
    parser.add_argument("--unit-px", type=int, default=1024, help="pixels along a unit (2048)")
    parser.add_argument("--workers", default="0,2", help="0: in one process")
    parser.add_argument("--detail", default="patch", choices=["patch", "image"])
    parser.add_argument("--most", type=float, help="fail beyond this ratio")
    given = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = [given.side, round(given.side * np.sqrt(given.times))]
        areas = [make_imagery(folder, side) for side in sides]
        for workers in map(int, given.workers.split(",")):
            found = []
            for area, side in zip(areas, sides, strict=True):
                started = time.monotonic()
                peaks = measure(area, folder, given.unit_px, workers, given.detail)
                found.append((peaks[0], max(peaks[1:], default=0.0)))
                print(
                    f"{workers} workers, {(side // given.unit_px) ** 2} units: "
                    f"client {peaks[0]:.0f} MB, workers "
                    f"{', '.join(f'{p:.0f}' for p in peaks[1:]) or '-'} MB, "
                    f"{time.monotonic() - started:.0f} s",
                    flush=True,
                )
            (small, small_worker), (large, large_worker) = found
            ratios = [large / small] + ([large_worker / small_worker] if workers else [])
            print("  larger over smaller: " + ", ".join(f"{r:.3f}" for r in ratios), flush=True)
            worst = max(worst, *ratios)
    if given.most is not None and worst > given.most:
        raise SystemExit(f"memory grows {worst:.3f} times, more than {given.most}")


if __name__ == "__main__":
    main()
