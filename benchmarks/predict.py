"""How much of the bare encoder's speed is left in `predict`, and whether memory stays flat.

In one run: (a) the encoder alone on preloaded windows, before and after, and (b) `predict` end to
end from a GeoTIFF to a GeoTIFF, both in windows per second of the size that maps are cut into;
then the peak memory of `predict` on a small and on a large raster, each in its own process.

    python benchmarks/predict.py [--side 10000] [--small-side 3000] [--scene FILE]

Everything is printed as a ratio, too: on a shared machine only these say something.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from soundmap.api import Request, run
from soundmap.encoder import find_model, load_encoder
from soundmap.lattice import Span
from soundmap.layout import choose_layout, lattice_of
from soundmap.sources import open_source
from soundmap.sources.sample import SampleSource


def make_raster(path: Path, side: int, scene: str | None) -> None:
    """Tile a scene to a square raster, mirrored at every seam so that edges meet."""
    source = open_source(scene) if scene else SampleSource()
    native = source.info.native_grid
    assert native is not None
    tile = source.read(native).pixels
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    tile = np.concatenate([tile, tile[:, :, ::-1]], axis=2)
    _, height, width = tile.shape
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 3,
        "dtype": "uint8",
        "crs": native.crs.to_wkt(),
        "transform": native.affine,
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "photometric": "rgb",
    }
    with rasterio.open(path, "w", **profile) as out:
        for row in range(0, side, height):
            for col in range(0, side, width):
                rows, cols = min(height, side - row), min(width, side - col)
                out.write(tile[:, :rows, :cols], window=Window(col, row, cols, rows))


@dataclass(frozen=True)
class WindowShape:
    """The windows that `predict` cuts for a raster of this size."""

    rows_px: int
    cols_px: int
    count: int
    """Windows of the whole map."""
    bare: int
    """Windows of the model's own size that would cover it side by side."""
    overlap_cost: float
    """Pixels encoded over pixels mapped."""


def window_shape(raster: Path, model: str) -> WindowShape:
    spec = find_model(model).spec
    layout = choose_layout(open_source(str(raster)).info, spec, None)
    assert layout.lattice is not None
    lattice = lattice_of(spec, "patch", layout.lattice.crs, (1.0, 1.0), (0.0, 0.0))
    height, width = layout.grid.shape
    side = layout.unit_cells
    pixels = count = 0
    shape = (0, 0)
    for row in range(0, height, side):
        for col in range(0, width, side):
            span = Span(row, min(row + side, height), col, min(col + side, width))
            tiling = lattice.tiling(span)
            shape = max(shape, tiling.shape)
            count += len(tiling.corners)
            pixels += len(tiling.corners) * tiling.shape[0] * tiling.shape[1]
    bare = -(-height // spec.patches) * -(-width // spec.patches)
    px = lattice.cell_px
    return WindowShape(shape[0] * px, shape[1] * px, count, bare, pixels / (height * width))


def bare_rate(model: str, shape: WindowShape, seconds: float) -> float:
    """Pixels per second of the encoder alone, windows in memory."""
    encoder = load_encoder(model)
    image = SampleSource()
    native = image.info.native_grid
    assert native is not None
    scene = image.read(native).pixels
    rng = np.random.default_rng(0)
    corners = rng.integers(0, (1024 - shape.rows_px, 1024 - shape.cols_px), (8, 2))
    windows = np.stack([scene[:, y : y + shape.rows_px, x : x + shape.cols_px] for y, x in corners])
    encoder.encode_images(windows, details=("patch",))
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        encoder.encode_images(windows, details=("patch",))
        passes += 1
    return (
        passes * windows.shape[0] * shape.rows_px * shape.cols_px / (time.perf_counter() - started)
    )


def predict_once(raster: Path, out: Path, model: str) -> dict[str, float]:
    """Map a raster in this process; report wall time and peak memory."""
    started = time.perf_counter()
    run(Request(out=out, imagery=str(raster), model=model))
    wall = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall_s": wall, "peak_mb": peak}


def in_own_process(raster: Path, out: Path, model: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", str(raster), str(out), "--model", model]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=10_000, help="px of the large raster")
    parser.add_argument("--small-side", type=int, default=3_000, help="px of the small raster")
    parser.add_argument("--scene", help="raster to tile; default: the sample scene")
    parser.add_argument("--model", default="soundmap-small")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each bare measurement")
    parser.add_argument("--once", nargs=2, metavar=("RASTER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(predict_once(Path(args.once[0]), Path(args.once[1]), args.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.tif", Path(folder) / "small.tif"
        make_raster(large, args.side, args.scene)
        make_raster(small, args.small_side, args.scene)
        shape = window_shape(large, args.model)
        window_px = shape.rows_px * shape.cols_px
        before = bare_rate(args.model, shape, args.seconds)
        big = in_own_process(large, Path(folder) / "large_map.tif", args.model)
        after = bare_rate(args.model, shape, args.seconds)
        little = in_own_process(small, Path(folder) / "small_map.tif", args.model)
    bare = (before + after) / 2
    encoded_px = shape.overlap_cost * args.side**2
    end_to_end = encoded_px / big["wall_s"]
    print(f"windows of {shape.rows_px} x {shape.cols_px} px; {shape.count} for the large raster")
    print(f"overlap: {shape.overlap_cost:.3f} pixels encoded per pixel mapped")
    print(f"(a) bare encoder   {bare / window_px:8.2f} windows/s  ({bare / 4096:.0f} of 64 px)")
    print(f"    before, after  {before / window_px:8.2f}, {after / window_px:.2f}")
    print(f"(b) predict        {end_to_end / window_px:8.2f} windows/s  ({big['wall_s']:.1f} s)")
    print(f"b/a                {end_to_end / bare:8.3f}")
    print(f"peak memory        {big['peak_mb']:8.0f} MB at {args.side} px")
    print(f"                   {little['peak_mb']:8.0f} MB at {args.small_side} px")
    print(f"large over small   {big['peak_mb'] / little['peak_mb']:8.3f}")


if __name__ == "__main__":
    main()
