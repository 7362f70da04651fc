"""Ranks, recall and text added, against plain counting."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import soundmap.products.retrieval as module
from soundmap.errors import UsageError
from soundmap.products import evaluate
from soundmap.products.retrieval import Direction, match_ranks, nearest, recall, retrieval


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def draw(seed: int, n: int, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6))
def test_ranks_are_mean_places_in_the_order(seed: int, n: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct directions along the axes: products are exact, and ties are common.
    queries, gallery = (np.eye(dim)[rng.integers(0, dim, n)] for _ in range(2))
    found = match_ranks(queries, gallery)
    for i, fit in enumerate(queries @ gallery.T):
        places = np.flatnonzero(np.sort(fit)[::-1] == fit[i]) + 1
        assert found[i] == places.mean()


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_copies_tie_exactly(seed: int, n: int) -> None:
    """All recordings the same: every rank is the middle, whatever the rounding of the product."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(n, 97)).astype(np.float32)
    gallery = np.repeat(rng.normal(size=(1, 97)).astype(np.float32), n, axis=0)
    assert (match_ranks(queries, gallery) == (n + 1) / 2).all()


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = draw(1, 53), draw(2, 53)
    gallery[10:13] = gallery[9]
    ranks, found = match_ranks(queries, gallery), nearest(queries, gallery, 7)
    for at_once in (1, 60, 53 * 7):
        monkeypatch.setattr(module, "_SIMILARITIES_AT_ONCE", at_once)
        np.testing.assert_array_equal(match_ranks(queries, gallery), ranks)
        np.testing.assert_array_equal(nearest(queries, gallery, 7), found)


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIMILARITIES_AT_ONCE", 100_000)
    n = 3000
    queries, gallery = draw(1, n), draw(2, n)
    tracemalloc.start()
    match_ranks(queries, gallery)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 4 / 4


def test_nearest_lists_the_lower_index_first_among_equals() -> None:
    gallery = np.eye(4)[np.arange(2, 402) % 4]
    found = nearest(np.eye(4)[[0]], gallery, 102)
    assert found.tolist() == [[*range(2, 400, 4), 0, 1]]
    assert nearest(np.eye(4)[[0]], gallery, 999).shape == (1, 400)


def test_recall_counts_before_k_for_the_paper_and_up_to_k_else() -> None:
    ranks = np.arange(1.0, 201.0)
    direction = Direction(ranks)
    assert direction.k == 20
    assert direction.recall == 19 / 200
    assert direction.recall_at(20) == 20 / 200
    assert direction.recall_at(1) == 1 / 200
    assert direction.median_rank == 100.5
    assert direction.reported() == {"R@20": 0.095, "Median Rank": 100}
    assert recall(np.array([1.0, 1.5]), 1) == 0.5


def test_reporting_rounds_and_the_figures_do_not() -> None:
    direction = Direction(np.array([1.0, 2.0, 30.0] * 35))
    assert direction.recall == 70 / 105
    assert direction.reported() == {"R@10.5": 0.667, "Median Rank": 2}


class TestAddedText:
    """Against sums written out: unit vectors are added."""

    images = draw(1, 60) * 5
    sounds = draw(2, 60)
    captions = draw(3, 60) * 40

    def ranks(self, add_text: module.AddText) -> tuple[np.ndarray, np.ndarray]:
        found = retrieval(self.images, self.sounds, self.captions, add_text)
        return found.image_to_sound.ranks, found.sound_to_image.ranks

    @pytest.mark.parametrize("add_text", ["none", "audio", "query"])
    def test_sums(self, add_text: module.AddText) -> None:
        i, s, t = unit(self.images), unit(self.sounds), unit(self.captions)
        heard = s if add_text == "none" else unit(s + t)
        asked, answers = (unit(i + t), s) if add_text == "query" else (i, heard)
        forth, back = self.ranks(add_text)
        np.testing.assert_array_equal(forth, match_ranks(asked, answers))
        np.testing.assert_array_equal(back, match_ranks(heard, i))

    def test_the_three_ways_differ(self) -> None:
        none, audio, query = (self.ranks(way) for way in ("none", "audio", "query"))
        assert (none[0] != audio[0]).any()
        assert (audio[0] != query[0]).any()
        assert (none[1] != audio[1]).any()
        np.testing.assert_array_equal(audio[1], query[1])


def test_wrong_input_is_one_clear_line() -> None:
    a = draw(1, 5)
    with pytest.raises(UsageError, match=r"images \(5, 16\) and sounds \(4, 16\)"):
        retrieval(a, a[:4])
    with pytest.raises(UsageError, match="needs captions"):
        retrieval(a, a, add_text="audio")
    with pytest.raises(UsageError, match="not 'both'"):
        retrieval(a, a, a, "both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"at least 1, not \(0, 16\)"):
        match_ranks(a[:0], a[:0])
    with pytest.raises(UsageError, match="not of one model"):
        nearest(a, a[:, :8], 2)
    broken = a.copy()
    broken[3] = 0
    broken[4, 2] = np.nan
    with pytest.raises(UsageError, match=r"gallery: 2 of 5 vectors .* number 3"):
        match_ranks(a, broken)


def test_evaluate_offers_them_too() -> None:
    assert evaluate.retrieval is retrieval
    assert evaluate.match_ranks is match_ranks
