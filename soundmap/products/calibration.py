"""How far a bank's probabilities lie from what comes true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soundmap.encoder import Encoder
from soundmap.products.evaluate import as_windows
from soundmap.products.labelled import Audibility, LabelledImages
from soundmap.products.scores import calibration_error
from soundmap.scoring import ConceptBank, score


def evaluate_calibration(
    encoder: Encoder, bank: ConceptBank, audibility: Audibility, sets: Sequence[LabelledImages]
) -> dict[str, float]:
    """Expected calibration error over all images and concepts.

    Parameters
    ----------
    encoder, bank
        The bank is calibrated for whole images.
    audibility
        What counts as so.
    sets
        Labelled images, each read as one window.

    Returns
    -------
    dict
        Data set -> error, 0 to 1; last, under "all", of all images together.
    """
    given, known = [], []
    for data in sets:
        pixels, told_m = as_windows(data, encoder)
        image = encoder.encode_images(pixels, gsd_m=told_m, details=("image",)).image
        assert image is not None
        given.append(score(image, bank, "probability"))
        known.append(audibility.matrix(data.name)[data.labels])
    found = {
        data.name: calibration_error(p, t) for data, p, t in zip(sets, given, known, strict=True)
    }
    found["all"] = calibration_error(np.concatenate(given), np.concatenate(known))
    return found
