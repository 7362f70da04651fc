"""Fit the concept bank's calibration on held-out images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder import Encoder
from soundmap.products.evaluate import as_windows, draw_cells
from soundmap.products.labelled import Audibility, LabelledImages
from soundmap.scoring import fit_platt

_PATCHES_PER_IMAGE = 6


def similarities(
    encoder: Encoder, vectors: NDArray[np.float32], data: LabelledImages, detail: str, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compare held-out images with concepts.

    Returns
    -------
    tuple
        float64[N, C] similarities and int64[N] labels; for patch detail a few patches of every
        image, drawn with ``seed``.
    """
    pixels, told_m = as_windows(data, encoder)
    found = encoder.encode_images(pixels, gsd_m=told_m, details=(detail,))
    if detail == "image":
        assert found.image is not None
        return (found.image @ vectors.T).astype(np.float64), data.labels
    assert found.patches is not None
    patches = draw_cells(found.patches, _PATCHES_PER_IMAGE, seed)
    similarity = (patches @ vectors.T).reshape(-1, len(vectors)).astype(np.float64)
    return similarity, np.repeat(data.labels, _PATCHES_PER_IMAGE)


def calibrate(
    encoder: Encoder,
    vectors: NDArray[np.float32],
    audibility: Audibility,
    held_out: list[LabelledImages],
    seed: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """Fit slope and offset of every concept, and one pair for all, for both details.

    Every land-cover class weighs the same, whatever its number of images: the probability speaks
    of a place drawn evenly over the classes of the held-out sets.

    Returns
    -------
    dict
        ``{detail}.scale`` and ``{detail}.bias`` float32[C], ``{detail}.generic`` float32[2].
    """
    result: dict[str, NDArray[np.float32]] = {}
    for detail in ("image", "patch"):
        parts = [similarities(encoder, vectors, d, detail, seed) for d in held_out]
        similarity = np.concatenate([s for s, _ in parts])
        audible = np.concatenate(
            [audibility.matrix(d.name)[y] for d, (_, y) in zip(held_out, parts, strict=True)]
        )
        weight = np.concatenate([_even(y) for _, y in parts])
        pairs = [
            fit_platt(similarity[:, c], audible[:, c], weight) for c in range(similarity.shape[1])
        ]
        generic = fit_platt(
            similarity.ravel(), audible.ravel(), np.repeat(weight, similarity.shape[1])
        )
        result[f"{detail}.scale"] = np.array([a for a, _ in pairs], np.float32)
        result[f"{detail}.bias"] = np.array([b for _, b in pairs], np.float32)
        result[f"{detail}.generic"] = np.array(generic, np.float32)
    return result


def _even(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.bincount(labels)
    weights: NDArray[np.float64] = 1.0 / counts[labels]
    return weights
