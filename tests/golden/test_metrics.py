"""Retrieval figures against the reference: exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from soundmap.products.retrieval import AddText, match_ranks, nearest, retrieval, top_tenth

CASES = ("n200", "n200_ties", "n105")


@pytest.fixture(scope="module")
def golden(sat2sound: Path) -> Mapping[str, np.ndarray]:
    with np.load(sat2sound / "golden_metrics.npz") as file:
        return {key: np.array(file[key]) for key in file}


@pytest.mark.parametrize("add_text", ["none", "audio", "query"])
@pytest.mark.parametrize("case", CASES)
def test_recall_and_median_rank(
    golden: Mapping[str, np.ndarray], case: str, add_text: AddText
) -> None:
    found = retrieval(
        golden[f"{case}.sat"], golden[f"{case}.audio"], golden[f"{case}.audio_caption"], add_text
    )
    for name, direction in (("I2S", found.image_to_sound), ("S2I", found.sound_to_image)):
        expected = f"{case}.addtextto_{add_text}.{name}"
        assert direction.k == golden[f"{case}.R_k"]
        assert direction.recall == golden[f"{expected}.recall"]
        assert direction.median_rank == golden[f"{expected}.median_rank"]


@pytest.mark.parametrize("case", CASES)
def test_ranks(golden: Mapping[str, np.ndarray], case: str) -> None:
    found = match_ranks(golden[f"{case}.sat"], golden[f"{case}.audio"])
    np.testing.assert_array_equal(found, golden[f"{case}.ranks_I2S"])


@pytest.mark.parametrize("case", CASES)
def test_nearest_five(golden: Mapping[str, np.ndarray], case: str) -> None:
    """Up to the order of recordings that are one and the same, which the reference leaves open."""
    audio = golden[f"{case}.audio"]
    _, same = np.unique(audio, axis=0, return_inverse=True)
    found = nearest(golden[f"{case}.sat"], audio, 5)
    expected = golden[f"{case}.top5_I2S"]
    np.testing.assert_array_equal(same[found], same[expected])
    if case != "n200_ties":
        np.testing.assert_array_equal(found, expected)


def test_k(golden: Mapping[str, np.ndarray]) -> None:
    assert top_tenth(200) == golden["n200.R_k"]
    assert top_tenth(105) == golden["n105.R_k"]
