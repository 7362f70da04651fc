"""Cut and resize against the reference: to the last grey level."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image as Picture

from soundmap.encoder.preprocess import reference_window
from soundmap.errors import UsageError
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.sources import open_source

CROP_PX = {
    "bing_z1_330x341": 300,
    "bing_z3_1200x1200": 900,
    "sentinel_z1_smaller_200x220": 256,
    "sentinel_z1_257x257": 256,
}


@pytest.fixture(scope="module")
def golden(sat2sound: Path) -> Mapping[str, np.ndarray]:
    with np.load(sat2sound / "golden_pre.npz") as file:
        return {key: np.array(file[key]) for key in file}


def window(golden: Mapping[str, np.ndarray], case: str) -> np.ndarray:
    """The case's input, drawn anew and brought to the model's window."""
    rng = np.random.Generator(np.random.PCG64(int(golden[f"{case}.seed"])))
    image = rng.integers(0, 256, tuple(golden[f"{case}.in_shape"]), dtype=np.uint8)
    assert zlib.crc32(image.tobytes()) == golden[f"{case}.in_crc32"][0]
    return reference_window(image.transpose(2, 0, 1), CROP_PX[case])


@pytest.mark.parametrize("case", CROP_PX)
def test_pixels(golden: Mapping[str, np.ndarray], case: str) -> None:
    found = window(golden, case)
    assert found.shape == (3, 224, 224)
    rows = golden[f"{case}.rows"]
    np.testing.assert_array_equal(found[:, rows], golden[f"{case}.resized_u8"])


@pytest.mark.parametrize("case", CROP_PX)
def test_the_model_normalises_as_the_reference(golden: Mapping[str, np.ndarray], case: str) -> None:
    vit = ViTConfig(window_px=224, patch_px=112, width=8, depth=1, heads=2)
    model = SoundModel(ModelConfig(vit=vit, token_dim=8, dim=8, codes=8, text_dim=8))
    found = model.normalise(torch.from_numpy(window(golden, case))[None])[0, :, :4]
    expected = torch.from_numpy(golden[f"{case}.normalised_rows0_4"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------- what a map reads instead


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_a_map_reads_what_the_documentation_says(shared_data: Path, scale: int) -> None:
    """docs/preprocessing.md: at most 0.25 grey levels in the mean, 99 of 100 pixels within 1."""
    scene = shared_data / "scenes" / "s2_krivoklatsko_rgb_10m_sharpened_utm33.tif"
    source, crop = open_source(str(scene)), 256 * scale
    native = source.info.native_grid
    assert native is not None
    errors = []
    for col in (0, 1875 - 1280):
        exact = reference_window(source.read(native[:crop, col : col + crop]).pixels, crop)
        ground = native.affine * Affine.translation(col, 0) * Affine.scale(crop / 224)
        read = source.read(GeoBox((224, 224), ground, native.crs), "cubic").pixels
        errors.append(np.abs(read.astype(int) - exact))
    assert np.mean(errors) <= 0.25
    assert np.percentile(errors, 99) <= 1


# ------------------------------------------------------------------- what needs no reference


def numbered(height: int, width: int) -> np.ndarray:
    """An image whose pixels tell where they were."""
    rows, cols = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, cols, np.full_like(rows, 255)])


@pytest.mark.parametrize(
    ("size", "first"),
    [(8, 0), (9, 0), (10, 1), (11, 2), (12, 2), (13, 2), (15, 4)],  # halves to the even neighbour
)
def test_where_the_cut_starts(size: int, first: int) -> None:
    down = reference_window(numbered(size, 8), 8, 8)
    across = reference_window(numbered(8, size), 8, 8)
    assert down[0, 0, 0] == first
    assert across[1, 0, 0] == first
    assert down[0, 7, 0] == first + 7


def test_what_is_smaller_gets_a_black_frame() -> None:
    found = reference_window(numbered(5, 12), 8, 8)
    framed = np.flatnonzero(found[2].any(axis=1))
    assert framed.tolist() == [1, 2, 3, 4, 5]
    assert (found[2, 1:6] == 255).all()
    assert (found[1, 1] == np.arange(2, 10)).all()


def test_larger_than_the_window_does_not_alias() -> None:
    """Stripes finer than the result's pixels become grey."""
    stripes = np.zeros((3, 896, 896), np.uint8)
    stripes[:, :, ::2] = 255
    found = reference_window(stripes, 896)
    assert np.ptp(found[:, :, 4:-4].astype(int)) <= 2
    nearest = Picture.fromarray(stripes[0]).resize((224, 224), Picture.Resampling.NEAREST)
    assert np.ptp(np.asarray(nearest).astype(int)) in (0, 255)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((300, 300, 3), np.uint8),
        np.zeros((1, 300, 300), np.uint8),
        np.zeros((4, 300, 300), np.uint8),
        np.zeros((300, 300), np.uint8),
        np.zeros((3, 300, 300), np.float32),
        np.zeros((3, 300, 300), np.uint16),
        np.zeros((3, 0, 300), np.uint8),
    ],
    ids=["channels last", "grey", "alpha", "flat", "float", "16 bits", "empty"],
)
def test_anything_but_rgb_is_refused(image: np.ndarray) -> None:
    with pytest.raises(UsageError, match="8-bit RGB"):
        reference_window(image, 300)


@pytest.mark.parametrize(("crop_px", "window_px"), [(0, 224), (-5, 224), (300, 0)])
def test_no_window_is_refused(crop_px: int, window_px: int) -> None:
    with pytest.raises(UsageError, match="px"):
        reference_window(np.zeros((3, 300, 300), np.uint8), crop_px, window_px)
