"""The codebook's ways past large arrays, its masked pooling, and the search for a good start."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soundmap.nn import codebook as module
from soundmap.nn.codebook import Codebook, QueryMap
from soundmap.nn.sparsemax import project_, sparsemax, sparsemax_threshold


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest array has that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.fixture
def book() -> Codebook:
    torch.manual_seed(0)
    return Codebook(3000, 32, 5.0).requires_grad_(False)


@pytest.fixture(params=["one part", "many parts"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many parts":
        monkeypatch.setattr(module, "_POOL_BLOCK", 5000)
        monkeypatch.setattr(module, "_LEAST_CODES", 7)
        monkeypatch.setattr(module, "_EACH_BLOCK", 10_000)


def queries(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("_parts")
class TestInParts:
    """Without gradients, logits are made part by part: the same numbers with less memory."""

    def test_largest(self, book: Codebook) -> None:
        q = queries(3, 19)
        expected = book.logits(q).amax(-2)
        torch.testing.assert_close(book.largest(q), expected, rtol=0, atol=1e-6)

    def test_pool(self, book: Codebook) -> None:
        q = queries(3, 19)
        expected = book.combine(book.logits(q).amax(-2))
        torch.testing.assert_close(book.pool(q), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("shape", [(19,), (3, 19), (2, 3, 5), (1, 1)])
    def test_each(self, book: Codebook, shape: tuple[int, ...]) -> None:
        q = queries(*shape)
        found = book.each(q)
        assert found.shape == q.shape
        torch.testing.assert_close(found, book.combine(book.logits(q)), rtol=0, atol=1e-6)

    def test_part_of_a_larger_array(self, book: Codebook) -> None:
        """Image tokens stand before those of metadata in one array."""
        q = queries(3, 19)[:, :11]
        assert not q.is_contiguous()
        torch.testing.assert_close(book.each(q), book.each(q.clone()), rtol=0, atol=1e-6)
        torch.testing.assert_close(book.pool(q), book.pool(q.clone()), rtol=0, atol=1e-6)

    def test_no_windows(self, book: Codebook) -> None:
        assert book.each(queries(0, 19)).shape == (0, 19, 32)
        assert book.pool(queries(0, 19)).shape == (0, 32)

    def test_queries_are_kept(self, book: Codebook) -> None:
        q = queries(3, 19)
        before = q.clone()
        book.pool(q)
        book.each(q)
        assert torch.equal(q, before)

    def test_with_gradients_it_is_the_same(self, book: Codebook) -> None:
        q = queries(3, 19)
        pooled, each = book.pool(q), book.each(q)
        q.requires_grad_()
        torch.testing.assert_close(book.pool(q).detach(), pooled, rtol=0, atol=1e-6)
        torch.testing.assert_close(book.each(q).detach(), each, rtol=0, atol=1e-6)
        (book.pool(q)[:, 0].sum() + book.each(q)[..., 1].sum()).backward()
        assert q.grad is not None
        assert q.grad.abs().sum() > 0


def test_logits_never_stand_in_memory_together(
    book: Codebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POOL_BLOCK", 40_000)
    monkeypatch.setattr(module, "_EACH_BLOCK", 40_000)
    q = queries(4, 50)
    for run in (book.pool, book.each):
        with torch.inference_mode(), Largest() as watched:
            run(q)
        # The codes themselves are seen when they are cut.
        assert watched.numel <= max(book.codes.numel(), 256 * 200)
        assert watched.numel < 4 * 50 * 3000 / 4


class TestMask:
    """Padding has logits of zero, as in the published model, not minus infinity."""

    @pytest.mark.parametrize("grad", [False, True])
    def test_formula(self, book: Codebook, grad: bool) -> None:
        q = queries(4, 9).requires_grad_(grad)
        mask = torch.arange(9) < torch.tensor([9, 4, 1, 0])[:, None]
        expected = (book.logits(q) * mask[..., None]).amax(-2)
        found = book.largest(q, mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found[1:] >= 0).all()
        assert (found[0] < 0).any()
        assert (found[3] == 0).all()
        torch.testing.assert_close(book.pool(q, mask), book.combine(expected), rtol=0, atol=1e-6)

    def test_nothing_masked(self, book: Codebook) -> None:
        q = queries(4, 9)
        assert torch.equal(book.pool(q, torch.ones(4, 9, dtype=torch.bool)), book.pool(q))

    def test_what_is_masked_does_not_matter(self, book: Codebook) -> None:
        q, mask = queries(2, 9), torch.arange(9).expand(2, 9) < 5
        other = torch.where(mask[..., None], q, 3.0)
        assert torch.equal(book.pool(q, mask), book.pool(other, mask))


@pytest.fixture(scope="module")
def text_side(filler: ModuleType) -> tuple[QueryMap, Codebook]:
    """The published text side: query map and codebook with the weights of the golden outputs."""
    query, book = QueryMap(1024, 1024), Codebook(16_000, 1024, 1000.0)
    state = {
        name: filler.draw(f"fdt.txt_query_model.q_map.{name}", weight.shape)
        for name, weight in query.state_dict().items()
    }
    query.load_state_dict({name: torch.from_numpy(weight) for name, weight in state.items()})
    codes = torch.from_numpy(filler.draw("fdt.space_dict", (16_000, 1024)))
    book.load_state_dict({"codes": codes})
    return query.requires_grad_(False), book.requires_grad_(False)


class TestPublishedText:
    @pytest.mark.parametrize(
        ("case", "mask", "factor"),
        [
            ("main", "mask", 1.0),
            ("short", "mask_short", 1.0),
            ("sample1_unpadded", None, 1.0),
            ("short1_unpadded", None, 1.0),
            ("main.codebook_x0.05", "mask", 0.05),
            ("sample1_unpadded.codebook_x0.05", None, 0.05),
        ],
    )
    def test_numbers(
        self,
        sat2sound: Path,
        text_side: tuple[QueryMap, Codebook],
        case: str,
        mask: str | None,
        factor: float,
    ) -> None:
        query, whole = text_side
        book = Codebook(1, 1024, 1000.0)
        book.codes = torch.nn.Parameter(whole.codes * factor, requires_grad=False)
        with np.load(sat2sound / "golden_text.npz") as golden:
            tokens = torch.from_numpy(golden["patch_embeds"])
            valid = None if mask is None else torch.from_numpy(golden[mask])
            if valid is None:
                count = golden["mask_short" if "short1" in case else "mask"][1].sum()
                tokens = tokens[1:, :count]
            expected = {
                key: golden[f"{case}.{key}"]
                for key in ("embed", "pooled", "pooled.stats", "nnz", "n_exact_zero", "query.head")
                if f"{case}.{key}" in golden
            }
        q = query(tokens)
        head = q[:, : expected["query.head"].shape[1], :128]
        np.testing.assert_allclose(head, expected["query.head"], rtol=0, atol=1e-5)
        pooled = book.largest(q, valid)
        if "pooled" in expected:
            np.testing.assert_allclose(pooled, expected["pooled"], rtol=0, atol=1e-8)
        stats = torch.stack([pooled.mean(-1), pooled.std(-1, correction=0)], -1)
        np.testing.assert_allclose(stats, expected["pooled.stats"], rtol=1e-5, atol=1e-10)
        assert ((pooled == 0).sum(-1).numpy() == expected["n_exact_zero"]).all()
        support = (sparsemax(pooled) > 0).sum(-1)
        # Codes within rounding of the threshold may fall on either side of it.
        np.testing.assert_allclose(support, expected["nnz"], rtol=0, atol=3)
        embed = expected["embed"]
        np.testing.assert_allclose(book.mix(pooled), embed, rtol=0, atol=1e-5 * np.abs(embed).max())
        unit = embed / np.linalg.norm(embed, axis=-1, keepdims=True)
        np.testing.assert_allclose(book.pool(q, valid), unit, rtol=0, atol=1e-6)

    def test_padding_can_matter(
        self, sat2sound: Path, text_side: tuple[QueryMap, Codebook]
    ) -> None:
        """With small codes the zeros of padding win, and a text's embedding changes."""
        query, whole = text_side
        book = Codebook(1, 1024, 1000.0)
        book.codes = torch.nn.Parameter(whole.codes * 0.05, requires_grad=False)
        with np.load(sat2sound / "golden_text.npz") as golden:
            tokens, mask = (torch.from_numpy(golden[k]) for k in ("patch_embeds", "mask"))
        q = query(tokens)
        padded, bare = book.pool(q, mask)[1], book.pool(q[1:, : mask[1].sum()])[0]
        assert (padded - bare).abs().max() > 1e-4


def reference(z: np.ndarray) -> np.ndarray:
    """Sparsemax by sorting (Martins and Astudillo 2016), in float64."""
    z = z.astype(np.float64)
    ranked = -np.sort(-z, axis=-1)
    sums = np.cumsum(ranked, axis=-1)
    count = np.arange(1, z.shape[-1] + 1)
    support = (1 + count * ranked > sums).sum(-1, keepdims=True)
    tau = (np.take_along_axis(sums, support - 1, axis=-1) - 1) / support
    return np.maximum(0, z - tau)


class TestStart:
    """Long rows start where a part of them says; wherever that is, the answer is exact."""

    @pytest.mark.parametrize("order", ["as drawn", "rising", "falling", "alternating"])
    @pytest.mark.parametrize("spread", [1e-4, 1e-3, 0.05, 1.0, 100.0])
    def test_order_of_codes_does_not_matter(self, order: str, spread: float) -> None:
        z = np.random.default_rng(0).normal(size=(5, 16_000)) * spread
        if order != "as drawn":
            z = np.sort(z, axis=-1)[:, :: 1 if order == "rising" else -1]
        if order == "alternating":
            z[:, ::2] = z[:, ::-2]
        found = sparsemax(torch.from_numpy(np.ascontiguousarray(z)))
        np.testing.assert_allclose(found, reference(z), rtol=0, atol=1e-12)
        z = z.astype(np.float32)
        found = sparsemax(torch.from_numpy(np.ascontiguousarray(z)))
        np.testing.assert_allclose(found, reference(z), rtol=0, atol=1e-6)

    @given(st.integers(0, 2**32 - 1), st.integers(1024, 3000), st.floats(-3, 1), st.booleans())
    def test_parts_unlike_the_rest(self, seed: int, k: int, power: float, first: bool) -> None:
        """Whether the part that is looked at lies far above the rest, or far below."""
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(3, k)) * 10**power
        z[:, : k // 16] += 3 if first else -3
        np.testing.assert_allclose(sparsemax(torch.from_numpy(z)), reference(z), atol=1e-12)

    def test_codes_that_are_out_of_reach(self) -> None:
        z = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
        z[:, ::3] = -torch.inf
        found = sparsemax(z)
        assert (found[:, ::3] == 0).all()
        kept = torch.ones(2000, dtype=torch.bool)
        kept[::3] = False
        torch.testing.assert_close(found[:, kept], sparsemax(z[:, kept]), rtol=0, atol=1e-6)

    def test_in_place(self) -> None:
        z = torch.randn(2, 7, 2000, generator=torch.Generator().manual_seed(0))
        expected, tau = sparsemax(z), sparsemax_threshold(z)
        torch.testing.assert_close((z - tau).clamp_min(0), expected, rtol=0, atol=1e-6)
        assert project_(z) is z
        assert torch.equal(z, expected)
