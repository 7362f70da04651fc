"""The published model's own way from an image to the pixels of its window, to the last grey level.

Maps do not go this way: they read imagery once, at the ground sampling distance of the window.
`docs/preprocessing.md` says by how much the two differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from soundmap.errors import UsageError


def reference_window(
    image: NDArray[np.uint8], crop_px: int, window_px: int = 224
) -> NDArray[np.uint8]:
    """Cut an image's centre and resize it to the model's window.

    The cut starts at half of what is left over, rounded half to even. Where the image is smaller
    than the cut, black is put around it: it is not enlarged. Resizing is Pillow's bicubic, whose
    kernel widens with the reduction, so that nothing aliases. The model itself normalises colours
    (`soundmap.nn.model.SoundModel.normalise`).

    Parameters
    ----------
    image
        uint8[3, H, W], red, green, blue; any size.
    crop_px
        Side of the cut: the card's ``native_px`` times the scale, 300 px for Bing at scale 1.
    window_px
        Side of the result.

    Returns
    -------
    uint8[3, window_px, window_px]

    Raises
    ------
    UsageError
        The image is not uint8[3, H, W] or has no pixels, or a side is not at least 1 px.

    Examples
    --------
    >>> reference_window(np.zeros((3, 1500, 1500), np.uint8), crop_px=900).shape
    (3, 224, 224)
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"an image must be uint8 red, green and blue as [3, height, width], not "
            f"{image.dtype} {list(image.shape)}: convert it to 8-bit RGB first"
        )
    if crop_px < 1 or window_px < 1:
        raise UsageError(f"a cut of {crop_px} px cannot become a window of {window_px} px")
    cut = _centre(image, crop_px)
    picture = Picture.fromarray(np.ascontiguousarray(cut.transpose(1, 2, 0)))
    resized = picture.resize((window_px, window_px), Picture.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _centre(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    _, height, width = image.shape
    (top, row), (left, col) = _place(height, side), _place(width, side)
    rows, cols = min(height, side), min(width, side)
    cut = image[:, row : row + rows, col : col + cols]
    if (rows, cols) == (side, side):
        return cut
    framed = np.zeros((3, side, side), np.uint8)
    framed[:, top : top + rows, left : left + cols] = cut
    return framed


def _place(size: int, side: int) -> tuple[int, int]:
    """Black before the image, and where the cut starts in it; one of the two is 0."""
    if size < side:
        return (side - size) // 2, 0
    return 0, round((size - side) / 2)
