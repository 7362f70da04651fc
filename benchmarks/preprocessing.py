"""How far the windows of a map are from those that the published model was trained on.

For the same ground, (a) the reference: crop of the imagery's own pixels, resized by
`soundmap.encoder.preprocess`; (b) a map: `Source.read` of 224 x 224 pixels by bicubic resampling.
For comparison, two ways in which a map might read instead: (c) by area; (d) Pillow's bicubic over
the whole scene at once. And as a measure of what a difference means, (e) the reference one imagery
pixel further east.

    python benchmarks/preprocessing.py [--data ../shared/data] [--model soundmap-small]

With --speed, reading 4000 x 4000 pixels by bicubic resampling and by area is timed instead.

--model may be a folder made by `soundmap models convert`. Who has no published weights gets random
ones of the same size by --stand-in ../shared/sat2sound; they take about ten minutes on two cores.

Differences are in grey levels, over all pixels and bands of all windows; similarities are cosines
between the embeddings of (a) and the others.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from PIL import Image as Picture

from soundmap.encoder import Encoder, load_encoder
from soundmap.encoder.convert import convert_checkpoint
from soundmap.encoder.preprocess import reference_window
from soundmap.sources import open_source
from soundmap.sources.base import Resampling, Source
from soundmap.sources.fake import FakeSource
from soundmap.sources.sample import SampleSource

WINDOW_PX = 224
KRIVOKLATSKO = "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif"
PYEONGCHANG = "pyeongchang_0p6m_epsg3857_cog.tif"
GORINCHEM = "gorinchem_nl_ortho_0p25m_epsg28992.tif"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """Imagery at the pixel size of the reference's own tiles."""

    name: str
    tile_px: int
    """Side of the reference's crop at scale 1."""
    gsd_m: float
    """What the reference would tell the model at scale 1."""
    scales: tuple[int, ...]
    pixels: Pixels
    grid: GeoBox
    source: Source
    """What the map reads."""


def scenes(data: Path) -> Iterator[Scene]:
    """The sample scene and those that are in the folder."""
    sample = SampleSource()
    yield _as_it_is("sample", sample, 256, 10.0, (1, 3))
    folder = data / "scenes"
    if (folder / KRIVOKLATSKO).is_file():
        source = open_source(str(folder / KRIVOKLATSKO))
        yield _as_it_is("krivoklatsko", source, 256, 10.0, (1, 3, 5))
    if (folder / PYEONGCHANG).is_file():
        # 0.6 m of Web Mercator are 0.48 m there. A tile is cut by pixels, and so is this one.
        source = open_source(str(folder / PYEONGCHANG))
        yield _as_it_is("pyeongchang", source, 300, 0.6, (1, 3))
    if (folder / GORINCHEM).is_file():
        source = open_source(str(folder / GORINCHEM))
        fine = source.info.native_grid
        assert fine is not None
        side = int(min(fine.shape) * fine.affine.a / 0.6)
        grid = GeoBox((side, side), fine.affine * Affine.scale(0.6 / fine.affine.a), fine.crs)
        pixels = source.read(grid).pixels
        yield Scene("gorinchem at 0.6 m", 300, 0.6, (1,), pixels, grid, FakeSource(pixels, grid))
        yield Scene("gorinchem, map from 0.25 m", 300, 0.6, (1,), pixels, grid, source)


def _as_it_is(
    name: str, source: Source, tile_px: int, gsd_m: float, scales: tuple[int, ...]
) -> Scene:
    grid = source.info.native_grid
    assert grid is not None
    return Scene(name, tile_px, gsd_m, scales, source.read(grid).pixels, grid, source)


@dataclass(frozen=True)
class Windows:
    """The same windows, made in different ways: uint8[N, 3, 224, 224] each."""

    reference: Pixels
    others: dict[str, Pixels]


def windows_of(scene: Scene, scale: int) -> Windows:
    """Cut a scene into windows side by side, or two that overlap where there is room for one."""
    crop = scene.tile_px * scale
    height, width = scene.grid.shape
    reference: list[Pixels] = []
    others: dict[str, list[Pixels]] = {}
    whole = _pillow_at_once(scene.pixels, WINDOW_PX / crop)

    def add(name: str, made: Pixels) -> None:
        others.setdefault(name, []).append(made)

    for row in _starts(height, crop):
        # One column is left for the window further east.
        for col in _starts(width - 1, crop):
            cut = scene.pixels[:, row : row + crop, col : col + crop + 1]
            ground = scene.grid.affine * Affine.translation(col, row) * Affine.scale(crop / 224)
            grid = GeoBox((WINDOW_PX, WINDOW_PX), ground, scene.grid.crs)
            reference.append(reference_window(cut[:, :, :crop], crop))
            add("map", scene.source.read(grid, "cubic").pixels)
            add("by area", scene.source.read(grid, "area").pixels)
            y, x = row * WINDOW_PX // crop, col * WINDOW_PX // crop
            add("Pillow at once", whole[:, y : y + WINDOW_PX, x : x + WINDOW_PX])
            add("one pixel east", reference_window(cut[:, :, 1:], crop))
    return Windows(np.stack(reference), {name: np.stack(made) for name, made in others.items()})


def _starts(size: int, crop: int) -> list[int]:
    """Where windows start: at pixels of the imagery that are also pixels of the map."""
    count = size // crop
    if count > 1:
        return [k * crop for k in range(count)]
    step = crop // math.gcd(crop, WINDOW_PX)
    return sorted({0, (size - crop) // step * step})


def _pillow_at_once(pixels: Pixels, reduction: float) -> Pixels:
    _, height, width = pixels.shape
    rows, cols = int(height * reduction), int(width * reduction)
    picture = Picture.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    box = (0, 0, cols / reduction, rows / reduction)
    resized = picture.resize((cols, rows), Picture.Resampling.BICUBIC, box=box)
    return np.asarray(resized).transpose(2, 0, 1)


Embed = Callable[[Pixels, Scene, int], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Windows of a scene at a scale -> unit vectors of windows and of patches."""


def embed_with(
    encoder: Encoder, windows: Pixels, scene: Scene, scale: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embed windows, cut into the model's own if these are smaller."""
    spec = encoder.spec
    side, told_m = spec.window_px, scene.gsd_m * scale
    if spec.native_px == side:
        told_m = spec.reading(told_m * scene.tile_px / WINDOW_PX).told_m
    n = WINDOW_PX // side
    cut = windows[:, :, : n * side, : n * side].reshape(-1, 3, n, side, n, side)
    cut = cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, side, side)
    found = encoder.encode_images(np.ascontiguousarray(cut), gsd_m=told_m)
    assert found.image is not None
    assert found.patches is not None
    return found.image, found.patches


def stand_in(folder: Path) -> Encoder:
    """A model of the published size, without metadata, with weights drawn from their names."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint, model = Path(place) / "stand-in.ckpt", Path(place) / "model"
        keys, arguments = folder / "keys_nometa.json", folder / "hparams.json"
        paths = (folder / "fill.py", keys, arguments, checkpoint)
        subprocess.run([sys.executable, *map(str, paths), "metadata_type=none"], check=True)
        convert_checkpoint(checkpoint, model)
        checkpoint.unlink()
        return load_encoder(str(model), precision="float32")


def similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> str:
    cosine = (a * b).sum(axis=-1)
    return f"{cosine.mean():8.4f} {cosine.min():8.4f}"


def report(scene: Scene, scale: int, embed: Embed | None) -> None:
    windows = windows_of(scene, scale)
    count = len(windows.reference)
    many = "window" if count == 1 else "windows"
    print(f"{scene.name}, {scene.tile_px * scale} px -> {WINDOW_PX} px, {count} {many}")
    expected = embed(windows.reference, scene, scale) if embed else None
    for name, made in windows.others.items():
        error = np.abs(made.astype(np.int16) - windows.reference)
        line = f"  {name:15} {error.mean():6.3f} {np.percentile(error, 99):5.0f} {error.max():5d}"
        if embed and expected:
            found = embed(made, scene, scale)
            line += "".join("  " + similarity(e, f) for e, f in zip(expected, found, strict=True))
        print(line, flush=True)


def time_reading(side: int = 4000) -> None:
    """Time both ways on noise: solid, and with a hole, for which validity is resampled as well."""
    ways: tuple[Resampling, ...] = ("area", "cubic")
    print("processor s: solid: area, cubic   with a hole: area, cubic")
    for reduction in (256 / WINDOW_PX, 900 / WINDOW_PX):
        native = math.ceil(side * reduction)
        grid = GeoBox((native, native), Affine(10, 0, 500_000, 0, -10, 5_500_000), "EPSG:32633")
        ground = grid.affine * Affine.scale(reduction)
        pixels = np.random.default_rng(0).integers(0, 256, (native, native), dtype=np.uint8)
        line = f"{reduction:5.3f} -> 1"
        for hole in (0, native // 8):
            valid = np.ones((native, native), np.bool_)
            valid[:hole, :hole] = False
            source = FakeSource(pixels, grid, valid)
            for way in ways:
                start = process_time()
                source.read(GeoBox((side, side), ground, grid.crs), way)
                line += f"  {process_time() - start:6.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="soundmap-small", help="name or folder; none: no model")
    parser.add_argument("--stand-in", type=Path, help="folder of fill.py: take random weights")
    parser.add_argument("--speed", action="store_true", help="time reading instead")
    args = parser.parse_args()
    if args.speed:
        time_reading()
        return
    embed = None
    if args.stand_in:
        embed = partial(embed_with, stand_in(args.stand_in))
    elif args.model != "none":
        embed = partial(embed_with, load_encoder(args.model, precision="float32"))
    print(f"{'grey levels:':17} {'mean':>6} {'99 %':>5} {'most':>5}", end="")
    print("    window: mean, least    patch: mean, least" if embed else "")
    for scene in scenes(args.data):
        for scale in scene.scales:
            report(scene, scale, embed)


if __name__ == "__main__":
    main()
