"""The network: its parts against references, its shapes, and the published numbers."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from soundmap.nn.codebook import Codebook, QueryMap
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.sparsemax import sparsemax, sparsemax_threshold
from soundmap.nn.vit import ViT, ViTConfig, position_embedding

TINY = ViTConfig(window_px=32, patch_px=8, width=16, depth=2, heads=2, mlp_ratio=2.0)
MODEL = ModelConfig(vit=TINY, token_dim=12, dim=20, codes=24, temperature=0.5, text_dim=10)


@pytest.fixture(scope="module")
def sat2sound(shared_data: Path) -> Path:
    """Published numbers, which lie beside the checkout and are no part of it."""
    folder = shared_data.parent / "sat2sound"
    if not (folder / "golden_sat.npz").is_file():
        pytest.skip("needs ../shared/sat2sound: reference outputs beside the checkout")
    return folder


PUBLISHED_NAMES = {
    "satmae_backbone.backbone.patch_embed.proj": "vit.patch_embed",
    "satmae_backbone.backbone": "vit",
    "satmae_backbone.projector.linear1": "projector.0",
    "satmae_backbone.projector.linear2": "projector.2",
    "fdt.img_query_model.q_map": "image_query",
    "fdt.txt_query_model.q_map": "text_query",
    "fdt.space_dict": "codebook.codes",
}


def our_name(key: str) -> str | None:
    """Name here of a weight of the published checkpoint's image and text side."""
    for theirs, ours in PUBLISHED_NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def stand_in(key: str, shape: list[int]) -> np.ndarray:
    """Draw the weights that the published outputs were computed with, from the key alone."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    noise = rng.standard_normal(size=tuple(shape), dtype=np.float32)
    if key == "fdt.space_dict":
        return noise
    if len(shape) == 1:
        noise *= np.float32(0.02)
        return noise if key.endswith("bias") else 1 + noise
    return np.asarray(noise / math.sqrt(np.prod(shape[1:])), np.float32)


def reference(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sparsemax by sorting (Martins and Astudillo 2016), in float64: weights and thresholds."""
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    ranked = -np.sort(-z, axis=-1)
    sums = np.cumsum(ranked, axis=-1)
    count = np.arange(1, z.shape[-1] + 1)
    support = (1 + count * ranked > sums).sum(-1, keepdims=True)
    tau = (np.take_along_axis(sums, support - 1, axis=-1) - 1) / support
    return np.maximum(0, z - tau), tau


def check(z: np.ndarray, atol: float) -> None:
    found = sparsemax(torch.from_numpy(z)).numpy()
    assert found.dtype == z.dtype
    assert (found >= 0).all()
    np.testing.assert_allclose(found, reference(z)[0], rtol=0, atol=atol)
    np.testing.assert_allclose(found.sum(-1, dtype=np.float64), 1, rtol=0, atol=20 * atol)


def rows(dtype: type) -> st.SearchStrategy[np.ndarray]:
    # Half of the numbers come from a coarse scale, so that ties are common.
    width = 64 if dtype is np.float64 else 32
    numbers = st.one_of(st.integers(-12, 12).map(lambda n: n / 4), st.floats(-30, 30, width=width))
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12)
    return hnp.arrays(dtype, shapes, elements=numbers)


class TestSparsemax:
    @given(rows(np.float64))
    def test_equals_sorting(self, z: np.ndarray) -> None:
        check(z, 1e-13)

    @given(rows(np.float32))
    def test_equals_sorting_in_float32(self, z: np.ndarray) -> None:
        check(z, 5e-6)

    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([1, 2, 3, 17, 400]),
        st.floats(-4, 2),
        st.sampled_from(["normal", "exponential", "uniform", "geometric"]),
    )
    def test_any_spread(self, seed: int, k: int, power: float, kind: str) -> None:
        rng = np.random.default_rng(seed)
        if kind == "geometric":
            # Each step of the search drops few codes here: its slow case.
            z = -(0.5 ** np.arange(k)[None] * rng.random((3, 1)) * 3)
        else:
            z = getattr(rng, kind)(size=(3, k))
        check(z * 10**power, 1e-12)
        check((z * 10**power).astype(np.float32), 1e-5)

    @pytest.mark.parametrize("spread", [1e-5, 1e-3, 0.03, 1, 30, 1e4])
    def test_large_codebook(self, spread: float) -> None:
        z = np.random.default_rng(1).normal(size=(3, 16_000)) * spread
        check(z, 1e-12)
        check(z.astype(np.float32), 1e-6)

    @pytest.mark.parametrize("level", [-1e6, -1e3, 50.0, 1e3, 1e6, 1e8])
    def test_level_does_not_matter(self, level: float) -> None:
        """Adding one number to all logits changes nothing, however large it is."""
        z = np.random.default_rng(2).normal(size=(4, 16_000)) * 3 + level
        check(z.astype(np.float32), 1e-5)

    def test_ties_share_evenly(self) -> None:
        z = torch.zeros(2, 16_000)
        assert (sparsemax(z) == 1 / 16_000).all()
        z[:, 5:9] = 7
        expected = torch.zeros_like(z)
        expected[:, 5:9] = 0.25
        assert torch.equal(sparsemax(z), expected)

    @pytest.mark.parametrize(
        ("z", "tau"),
        [
            ([3.0], 2.0),
            ([0.0, 0.0], -0.5),
            ([1.0, 0.0], 0.0),  # the second code stands exactly on the threshold
            ([2.0, 1.5, -9.0], 1.25),
            ([0.5, 0.5, 0.0, -0.25], 0.0),
        ],
    )
    def test_threshold_is_exact(self, z: list[float], tau: float) -> None:
        for dtype in (torch.float32, torch.float64):
            found = sparsemax_threshold(torch.tensor([z, z], dtype=dtype))
            assert found.tolist() == [[tau], [tau]]

    def test_rows_do_not_meet(self) -> None:
        rng = np.random.default_rng(3)
        z = torch.from_numpy(rng.normal(size=(50, 300)) * rng.uniform(0.01, 20, (50, 1)))
        together = sparsemax(z)
        for one, alone in zip(together, z, strict=True):
            torch.testing.assert_close(one, sparsemax(alone), rtol=0, atol=1e-14)

    def test_input_is_kept(self) -> None:
        z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
        before = z.clone()
        sparsemax(z)
        assert torch.equal(z, before)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("spread", [0.05, 1.0, 5.0])
    def test_gradient(self, seed: int, spread: float) -> None:
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(2, 3, 11, generator=rng, dtype=torch.float64) * spread
        assert torch.autograd.gradcheck(sparsemax, z.requires_grad_())

    def test_published_weights(self, sat2sound: Path) -> None:
        with np.load(sat2sound / "golden_sat.npz") as golden:
            for kind in ("nometa", "withmeta"):
                key = f"{kind}.bingmap.z1"
                pooled = golden[f"{key}.pooled"]
                expected = np.zeros_like(pooled)
                place = golden[f"{key}.sparse.row"], golden[f"{key}.sparse.col"]
                expected[place] = golden[f"{key}.sparse.val"]
                found = sparsemax(torch.from_numpy(pooled)).numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
                np.testing.assert_allclose(found[place], expected[place], rtol=1e-3, atol=1e-8)
                # Codes within rounding of the threshold may fall on either side of it.
                count = (found > 0).sum(-1)
                np.testing.assert_allclose(count, golden[f"{key}.nnz"], rtol=0, atol=3)


class TestPositionEmbedding:
    @pytest.mark.parametrize(
        ("sat", "zoom", "gsd_m"),
        [
            *(("bingmap", zoom, 0.6) for zoom in (1, 3, 5)),
            *(("sentinel", zoom, 10.0) for zoom in (1, 3, 5)),
            ("googleEarth", 1, 0.2),
        ],
    )
    def test_published(self, sat2sound: Path, sat: str, zoom: int, gsd_m: float) -> None:
        with np.load(sat2sound / "golden_sat.npz") as golden:
            expected, tokens = golden[f"pos.{sat}.z{zoom}"], golden["pos.rows"]
        found = position_embedding(14, 14, 768, torch.tensor([zoom * gsd_m], dtype=torch.float64))
        # The published model rounds the angle, up to 13 g, to float32 before it takes the sine.
        atol = 1e-6 + 13 * zoom * gsd_m * 2**-23
        np.testing.assert_allclose(found[0, tokens], expected, rtol=0, atol=atol)

    def test_formula(self) -> None:
        rows, cols, width, g = 3, 5, 24, 7.03
        found = position_embedding(rows, cols, width, torch.tensor([1.0, g], dtype=torch.float64))
        assert found.shape == (2, 15, 24)
        assert found.dtype == torch.float32
        freq = 10000.0 ** (-np.arange(6) / 6)
        for r in range(rows):
            for c in range(cols):
                across, down = c * g * freq, r * g * freq
                parts = [np.sin(across), np.cos(across), np.sin(down), np.cos(down)]
                np.testing.assert_allclose(
                    found[1, r * cols + c], np.concatenate(parts), rtol=0, atol=1e-6
                )

    def test_images_of_several_gsd(self) -> None:
        gsd_m = torch.tensor([0.6, 10.0, 7.5])
        together = position_embedding(4, 4, 16, gsd_m)
        for i in range(3):
            assert torch.equal(together[i], position_embedding(4, 4, 16, gsd_m[i : i + 1])[0])


class TestViT:
    def test_a_token_per_patch(self) -> None:
        tower = ViT(TINY)
        tokens = tower(torch.zeros(3, 3, 32, 32), torch.tensor([10.0]))
        assert tokens.shape == (3, 16, 16)

    def test_no_class_token_norm_or_stored_position(self) -> None:
        names = {name for name, _ in ViT(TINY).named_parameters()}
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        expected = {
            f"{part}.{kind}"
            for part in ("patch_embed", *(f"blocks.{i}.{p}" for i in range(2) for p in parts))
            for kind in ("weight", "bias")
        }
        assert names == expected
        assert not list(ViT(TINY).buffers())

    def test_nothing_comes_after_the_blocks(self) -> None:
        """With blocks that add nothing, a token is its patch and its place."""
        torch.manual_seed(0)
        tower = ViT(TINY)
        for block in tower.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        pixels, gsd_m = torch.randn(2, 3, 32, 32), torch.tensor([3.0])
        convolution = tower.patch_embed
        patches = pixels.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, -1)
        expected = patches @ convolution.weight.flatten(1).T + convolution.bias
        expected = expected + position_embedding(4, 4, 16, gsd_m)
        torch.testing.assert_close(tower(pixels, gsd_m), expected, rtol=0, atol=1e-5)

    def test_size_comes_from_the_config(self) -> None:
        config = replace(TINY, window_px=48, patch_px=16, width=24, depth=3, heads=3, mlp_ratio=3)
        tower = ViT(config)
        assert config.patches == 3
        assert tower.patch_embed.weight.shape == (24, 3, 16, 16)
        assert len(tower.blocks) == 3
        assert tower.blocks[0].mlp.fc1.weight.shape == (72, 24)
        assert tower(torch.zeros(1, 3, 48, 48), torch.tensor([1.0])).shape == (1, 9, 24)

    def test_stem(self) -> None:
        config = replace(TINY, stem=(4, 6, 8), stem_strides=(2, 1, 4))
        tower = ViT(config)
        kernels = [m for m in tower.patch_embed if isinstance(m, torch.nn.Conv2d)]
        assert [k.weight.shape[0] for k in kernels] == [4, 6, 8, 16]
        assert tower(torch.zeros(2, 3, 32, 32), torch.tensor([1.0])).shape == (2, 16, 16)

    def test_gsd_per_image_or_for_all(self) -> None:
        torch.manual_seed(1)
        tower = ViT(TINY).eval()
        pixels = torch.randn(3, 3, 32, 32)
        one = tower(pixels, torch.tensor([9.0]))
        torch.testing.assert_close(one, tower(pixels, torch.full((3,), 9.0)))
        mixed = tower(pixels, torch.tensor([9.0, 2.0, 9.0]))
        torch.testing.assert_close(mixed[[0, 2]], one[[0, 2]])
        assert not torch.allclose(mixed[1], one[1], atol=1e-3)

    def test_local_patches_know_only_their_own_pixels(self) -> None:
        torch.manual_seed(2)
        tower = ViT(TINY).eval()
        gsd_m = torch.tensor([9.0])
        pixels = torch.randn(1, 3, 32, 32)
        other = torch.randn(1, 3, 32, 32)
        # Patch (1, 2) of one window becomes patch (3, 0) of another.
        other[..., 24:32, 0:8] = pixels[..., 8:16, 16:24]
        here = tower(pixels, gsd_m, local=True)[0, 1 * 4 + 2]
        there = tower(other, gsd_m, local=True)[0, 3 * 4 + 0]
        torch.testing.assert_close(here, there)
        assert not torch.allclose(tower(other, gsd_m)[0, 12], there, atol=1e-3)
        told_else = tower(pixels, torch.tensor([1.0]), local=True)[0, 6]
        assert not torch.allclose(told_else, here, atol=1e-3)


class TestCodebook:
    def book(self) -> Codebook:
        torch.manual_seed(0)
        return Codebook(24, 20, 0.5)

    def expected(self, book: Codebook, logits: np.ndarray) -> np.ndarray:
        weights, _ = reference(logits)
        vectors = weights @ book.codes.detach().numpy().astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def test_pool_takes_the_largest_logit_of_each_code(self) -> None:
        book = self.book()
        queries = torch.randn(3, 7, 20)
        codes = book.codes.detach().numpy().astype(np.float64)
        logits = queries.numpy().astype(np.float64) @ codes.T / np.sqrt(20) / 0.5
        found = book.pool(queries).detach().numpy()
        assert found.shape == (3, 20)
        np.testing.assert_allclose(found, self.expected(book, logits.max(axis=1)), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)

    def test_each_takes_every_token_by_itself(self) -> None:
        book = self.book()
        queries = torch.randn(3, 7, 20)
        found = book.each(queries).detach()
        assert found.shape == (3, 7, 20)
        np.testing.assert_allclose(found.norm(dim=-1), 1, atol=1e-6)
        for b in range(3):
            for n in range(7):
                alone = book.pool(queries[b : b + 1, n : n + 1])[0]
                torch.testing.assert_close(found[b, n], alone.detach(), rtol=0, atol=1e-6)

    def test_temperature_spreads_the_weight(self) -> None:
        queries = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
        book = self.book()
        sharp = (sparsemax(book.logits(queries)) > 0).sum(-1)
        book.scale /= 100
        assert ((sparsemax(book.logits(queries)) > 0).sum(-1) > sharp).all()

    def test_gradient_reaches_the_codes(self) -> None:
        book = self.book()
        queries = torch.randn(2, 5, 20, requires_grad=True)
        (book.pool(queries)[:, 0].sum() + book.each(queries)[..., 1].sum()).backward()
        assert book.codes.grad is not None
        assert queries.grad is not None
        assert book.codes.grad.abs().sum() > 0
        assert queries.grad.isfinite().all()

    def test_query_map(self) -> None:
        kinds = [type(layer).__name__ for layer in QueryMap(6, 8)]
        assert kinds == ["LayerNorm", "Linear", "GELU", "LayerNorm", "Linear"]
        assert QueryMap(6, 8)(torch.zeros(2, 3, 6)).shape == (2, 3, 8)


class TestModel:
    def test_normalisation(self) -> None:
        pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        found = SoundModel(MODEL).normalise(pixels).flatten()
        expected = (np.array([0, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_unit_vectors(self) -> None:
        torch.manual_seed(0)
        model = SoundModel(MODEL).eval()
        pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        gsd_m = torch.tensor([10.0])
        image = model.encode_image(pixels, gsd_m).detach()
        patches = model.encode_patches(pixels, gsd_m).detach()
        text = model.encode_text(torch.randn(2, 1, 10)).detach()
        assert (image.shape, patches.shape, text.shape) == ((3, 20), (3, 16, 20), (2, 20))
        for vectors in (image, patches, text):
            np.testing.assert_allclose(vectors.norm(dim=-1), 1, atol=1e-5)

    def test_one_codebook_for_all(self) -> None:
        names = [n for n, _ in SoundModel(MODEL).named_parameters() if "code" in n]
        assert names == ["codebook.codes"]

    def test_published_size(self) -> None:
        """The defaults are the published model; its shapes are checked without its memory."""
        with torch.device("meta"):
            model = SoundModel(ModelConfig())
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert shapes["vit.patch_embed.weight"] == (768, 3, 16, 16)
        assert shapes["vit.blocks.11.attn.qkv.weight"] == (2304, 768)
        assert shapes["vit.blocks.11.mlp.fc1.weight"] == (3072, 768)
        assert "vit.blocks.12.norm1.weight" not in shapes
        assert shapes["projector.0.weight"] == (1024, 768)
        assert shapes["projector.2.weight"] == (1024, 1024)
        assert shapes["image_query.1.weight"] == (1024, 1024)
        assert shapes["codebook.codes"] == (16_000, 1024)
        assert model.codebook.scale == pytest.approx(1 / 32 / 1000)
        assert {b.eps for n, b in model.vit.named_modules() if "norm" in n} == {1e-6}
        assert {layer.eps for layer in model.image_query if hasattr(layer, "eps")} == {1e-5}

    def test_published_keys(self, sat2sound: Path) -> None:
        """Every image-side and text-side weight of the checkpoint has its place; none is left."""
        published = json.loads((sat2sound / "keys_nometa.json").read_text())
        expected = {"logit_scale": ()}
        for key, entry in published.items():
            if name := our_name(key):
                expected[name] = tuple(entry["shape"])
        with torch.device("meta"):
            model = SoundModel(ModelConfig())
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected
