"""How much a map changes when its scene is turned, mirrored, or seen through haze.

None of these changes what one would hear on the ground, so none should change what a map says of
it. A copy of the scene is made, mapped as the scene is, and the mean probability of each concept
over the map is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from soundmap.api import predict
from soundmap.errors import InputError

HAZE_RGB = (190, 190, 195)
"""Colour of the veil."""
_HAZES = {"haze 15 %": (0.15, 1.0), "haze 20 %, 4 % brighter": (0.20, 1.04)}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SceneChange:
    """The concept whose mean probability changes most from a scene to a copy."""

    scene: str
    copy: str
    concept: str
    change: float
    """Mean probability over the copy's map less that over the scene's."""


def evaluate_robustness(model: str, scenes: list[Path]) -> tuple[SceneChange, ...]:
    """Map scenes and altered copies of them.

    Parameters
    ----------
    model
        Name or folder of a model with a bank.
    scenes
        Rasters of uint8 with red, green and blue as their first bands.

    Returns
    -------
    tuple of SceneChange
        One for every scene and copy, in order.

    Raises
    ------
    InputError
        A raster is of another kind.
    """
    changes = []
    for scene in scenes:
        names, before = _means(model, scene)
        with tempfile.TemporaryDirectory() as folder:
            for name, path in altered_copies(scene, Path(folder)):
                change = _means(model, path)[1] - before
                most = int(np.abs(change).argmax())
                changes.append(SceneChange(scene.stem, name, names[most], float(change[most])))
    return tuple(changes)


def _means(model: str, scene: Path) -> tuple[list[str], NDArray[np.float64]]:
    values = predict(scene, model=model, value="probability")
    means = np.nanmean(values.to_numpy().astype(np.float64), axis=(1, 2))
    return [str(name) for name in values.concept.values], means


def altered_copies(scene: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write turned, mirrored and hazy copies of a scene, one after the other.

    A turned copy keeps the place of its upper left corner; what has no imagery stays so.

    Parameters
    ----------
    scene
        A raster of uint8.
    folder
        Where copies are written.

    Yields
    ------
    tuple
        What was done, and the copy, which is gone after the next is asked for.

    Raises
    ------
    InputError
        The raster has fewer than three bands, or is of another kind.
    """
    with rasterio.open(scene) as source:
        if source.count < 3 or source.dtypes[0] != "uint8":
            raise InputError(f"{scene}: needs red, green and blue as uint8 to be altered")
        pixels: Pixels = source.read()
        seen = source.dataset_mask() > 0
        profile = {**source.profile, "driver": "GTiff"}
        colours = source.colorinterp
    for key in ("blockxsize", "blockysize", "tiled", "compress", "photometric", "interleave"):
        profile.pop(key, None)
    path = folder / "copy.tif"
    for name, alter in _alterations(seen).items():
        altered = np.ascontiguousarray(alter(pixels))
        profile |= {"height": altered.shape[1], "width": altered.shape[2]}
        with rasterio.open(path, "w", **profile) as out:
            out.write(altered)
            out.colorinterp = colours
        yield name, path
        path.unlink()


def _alterations(seen: NDArray[np.bool_]) -> dict[str, Callable[[Pixels], Pixels]]:
    def turned(quarters: int) -> Callable[[Pixels], Pixels]:
        return lambda pixels: np.rot90(pixels, quarters, (1, 2))

    def hazy(veil: float, gain: float) -> Callable[[Pixels], Pixels]:
        return lambda pixels: haze(pixels, seen, veil, gain)

    return {
        "turned by 90 degrees": turned(1),
        "turned by 180 degrees": turned(2),
        "turned by 270 degrees": turned(3),
        "mirrored left to right": lambda pixels: pixels[:, :, ::-1],
        "mirrored top to bottom": lambda pixels: pixels[:, ::-1],
        **{name: hazy(*how) for name, how in _HAZES.items()},
    }


def haze(pixels: Pixels, seen: NDArray[np.bool_], veil: float, gain: float = 1.0) -> Pixels:
    """Lay a veil of light grey over red, green and blue.

    Parameters
    ----------
    pixels
        uint8[bands, H, W].
    seen
        bool[H, W]: where there is imagery; the rest stays as it is.
    veil
        Part of the light that comes from the veil.
    gain
        Multiplies the light from the ground.

    Returns
    -------
    ndarray
        uint8[bands, H, W].
    """
    out = pixels.copy()
    for band, grey in zip(out[:3], HAZE_RGB, strict=True):
        light = band[seen] * np.float32(gain * (1 - veil)) + np.float32(grey * veil)
        # Zero often stands for no imagery.
        band[seen] = np.clip(np.rint(light), 1, 254).astype(np.uint8)
    return out
