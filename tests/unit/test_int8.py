"""8-bit weights: how near they come, that windows do not meet, and what cannot be quantised."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from soundmap.errors import UsageError
from soundmap.nn import int8
from soundmap.nn.codebook import Codebook
from soundmap.nn.int8 import Int8Codebook, Int8Linear, is_available, quantise
from soundmap.nn.metadata import Metadata, encode_latlong, encode_month
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig

VIT = ViTConfig(window_px=64, patch_px=8, width=96, depth=3, heads=3)
CONFIG = ModelConfig(VIT, token_dim=80, dim=128, codes=2100, temperature=100.0, text_dim=40)
WITH_METADATA = replace(CONFIG, metadata=("latlong", "month", "time"))

pytestmark = pytest.mark.skipif(
    not is_available(), reason="needs a PyTorch with oneDNN's 8-bit convolutions"
)


def pair(config: ModelConfig) -> tuple[SoundModel, SoundModel]:
    """A model, and the same with 8-bit weights."""
    torch.manual_seed(0)
    model = SoundModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.endswith("codes"):
                weight.normal_().div_(np.sqrt(np.prod(weight.shape[1:])))
    coarse = copy.deepcopy(model)
    quantise(coarse)
    return model, coarse


@pytest.fixture(scope="module")
def models() -> tuple[SoundModel, SoundModel]:
    return pair(CONFIG)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Patterns that differ, as imagery does, more than noise would."""
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(5, 3, 5, 5, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=64, mode="bilinear")
    return ((smooth + 0.1 * torch.rand(5, 3, 64, 64, generator=rng)) * 230).to(torch.uint8)


GSD_M = torch.tensor([10.0])


def image(model: SoundModel, windows: Tensor, metadata: Metadata | None = None) -> Tensor:
    with torch.inference_mode():
        return model.encode_image(windows, GSD_M, metadata)


def patches(model: SoundModel, windows: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.encode_patches(windows, GSD_M)


class TestRounding:
    @given(st.integers(0, 2**32 - 1), st.floats(-6, 6), st.floats(-3, 3), st.integers(1, 40))
    def test_leads_back(self, seed: int, power: float, shift: float, count: int) -> None:
        rng = np.random.default_rng(seed)
        x = torch.from_numpy((rng.normal(size=(2, count)) + shift).astype(np.float32) * 10**power)
        x = x.float()
        rounded, scale, offset = int8._round(x)
        assert rounded.dtype == torch.uint8
        assert rounded.max() <= 127
        assert 0 <= offset <= 127
        back = (rounded.double() - offset) * scale
        assert (back - x).abs().max() <= scale * 0.5001

    def test_zeros(self) -> None:
        rounded, scale, offset = int8._round(torch.zeros(3, 4))
        assert (rounded == 0).all()
        assert (scale, offset) == (1.0, 0)

    def test_input_is_kept_unless_it_may_be_spoilt(self) -> None:
        x = torch.randn(3, 4)
        before = x.clone()
        kept = int8._round(x)[0]
        assert torch.equal(x, before)
        assert torch.equal(int8._round(x, spoil=True)[0], kept)


class TestLinear:
    def test_near(self) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(300, 70)
        x = torch.randn(3, 50, 300)
        expected, found = linear(x).detach(), Int8Linear(linear)(x)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert (found - expected).std() < 0.03 * expected.std()

    def test_whole_numbers_are_exact_up_to_the_largest(self) -> None:
        """Products of the largest numbers of one sign do not overflow where they are added up."""
        linear = nn.Linear(768, 6, bias=False)
        weight = torch.randint(-127, 128, (6, 768), generator=torch.Generator().manual_seed(0))
        weight[0], weight[1], weight[2:, 0] = 127, -127, 127
        linear.weight.data = weight.float()
        x = torch.randint(-9, 118, (5, 768), generator=torch.Generator().manual_seed(1)).float()
        x[0] = 117
        x[1, 0], x[1, 1] = -9, 117
        expected = x.double() @ weight.T.double()
        torch.testing.assert_close(Int8Linear(linear)(x).double(), expected, rtol=1e-6, atol=0.5)

    def test_a_window_does_not_depend_on_others(self) -> None:
        linear = Int8Linear(nn.Linear(48, 20))
        x = torch.randn(4, 30, 48) * torch.tensor([1.0, 100.0, 0.01, 3.0])[:, None, None]
        together = linear(x)
        for alone, window in zip(together, x, strict=True):
            assert torch.equal(linear(window), alone)
            assert torch.equal(linear(window[None])[0], alone)

    @pytest.mark.parametrize("count", [1, 2, 49, 196, 201])
    def test_any_number_of_tokens(self, count: int) -> None:
        linear = nn.Linear(48, 20)
        x = torch.randn(count, 48)
        assert (Int8Linear(linear)(x) - linear(x)).abs().max() < 0.1

    def test_channels_without_weight(self) -> None:
        linear = nn.Linear(48, 20)
        nn.init.zeros_(linear.weight)
        expected = linear.bias.detach().expand(7, 20)
        assert torch.equal(Int8Linear(linear)(torch.randn(7, 48)), expected)


class TestCodebook:
    @pytest.mark.parametrize("codes", [70, 1000, 2100])
    def test_near(self, codes: int) -> None:
        torch.manual_seed(0)
        book = Codebook(codes, 64, 100.0).requires_grad_(False)
        last = nn.Linear(64, 64).requires_grad_(False)
        tokens = torch.randn(3, 40, 64)
        q = last(tokens)
        coarse = Int8Codebook(book, last)
        for kind in ("logits", "largest"):
            logits, found = getattr(book, kind)(q), getattr(coarse, kind)(tokens)
            assert found.shape == logits.shape
            assert (found - logits).abs().max() < 0.05 * logits.abs().max()
        for kind in ("pool", "each"):
            expected, found = getattr(book, kind)(q), getattr(coarse, kind)(tokens)
            assert found.shape == expected.shape
            assert (found * expected).sum(-1).min() > 0.995
            np.testing.assert_allclose(found.norm(dim=-1), 1, atol=1e-6)

    def test_codes_are_shared(self) -> None:
        book = Codebook(70, 16, 1.0)
        assert Int8Codebook(book, nn.Linear(16, 16)).codes is book.codes

    def test_part_of_a_larger_array(self) -> None:
        book = Codebook(70, 16, 1.0).requires_grad_(False)
        book = Int8Codebook(book, nn.Linear(16, 16))
        q = torch.randn(3, 9, 16)[:, :5]
        torch.testing.assert_close(book.each(q), book.each(q.clone()))


class TestModel:
    def test_embeddings_hardly_change(
        self, models: tuple[SoundModel, SoundModel], windows: Tensor
    ) -> None:
        model, coarse = models
        expected, found = image(model, windows), image(coarse, windows)
        assert (expected * found).sum(-1).min() > 0.99
        texts = nn.functional.normalize(torch.randn(100, 128), dim=-1)
        assert ((expected - found) @ texts.T).abs().max() < 0.03
        # What windows differ in is much more than that.
        assert (expected @ expected.T).min() < 0.9
        single = (patches(model, windows) * patches(coarse, windows)).sum(-1)
        assert single.mean() > 0.98

    def test_a_window_does_not_depend_on_others(
        self, models: tuple[SoundModel, SoundModel], windows: Tensor
    ) -> None:
        _, coarse = models
        together, each = image(coarse, windows), patches(coarse, windows)
        for i in range(len(windows)):
            alone = windows[i : i + 1]
            torch.testing.assert_close(image(coarse, alone)[0], together[i], rtol=0, atol=1e-5)
            torch.testing.assert_close(patches(coarse, alone)[0], each[i], rtol=0, atol=1e-5)

    def test_threads_do_not_meet(
        self, models: tuple[SoundModel, SoundModel], windows: Tensor
    ) -> None:
        _, coarse = models
        expected = image(coarse, windows)
        with ThreadPoolExecutor(4, initializer=lambda: torch.set_num_threads(1)) as pool:
            for found in pool.map(lambda _: image(coarse, windows), range(12)):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_text_is_not_touched(self, models: tuple[SoundModel, SoundModel]) -> None:
        model, coarse = models
        tokens = torch.randn(3, 6, 40)
        assert torch.equal(model.encode_text(tokens), coarse.encode_text(tokens))

    def test_metadata(self, windows: Tensor) -> None:
        model, coarse = pair(WITH_METADATA)
        places = torch.tensor([[13.9, 50.0 + i] for i in range(5)], dtype=torch.float64)
        values = {"latlong": encode_latlong(places), "month": encode_month(torch.arange(5) + 1)}
        given = Metadata(values, {})
        expected, found = image(model, windows, given), image(coarse, windows, given)
        assert (expected * found).sum(-1).min() > 0.99
        for i in range(5):
            alone = image(coarse, windows[i : i + 1], given.part(i, i + 1))[0]
            torch.testing.assert_close(alone, found[i], rtol=0, atol=1e-5)

    def test_all_large_maps_are_replaced(self, models: tuple[SoundModel, SoundModel]) -> None:
        _, coarse = models
        left = [n for n, m in coarse.named_modules() if isinstance(m, nn.Linear)]
        assert left == ["text_query.1", "text_query.4"]
        _, coarse = pair(WITH_METADATA)
        left = [n for n, m in coarse.named_modules() if isinstance(m, nn.Linear)]
        assert all(name.startswith(("text_query.", "fuser.embed.")) for name in left)


class TestRefusals:
    def test_models_without_attention(self) -> None:
        with pytest.raises(UsageError, match="use float32"):
            quantise(SoundModel(replace(CONFIG, local_patches=True)))

    def test_builds_without_the_operators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*args: object) -> Tensor:
            raise NotImplementedError("no kernel")

        model = SoundModel(CONFIG)
        monkeypatch.setattr(torch.ops.onednn, "qconv_prepack", missing)
        assert not is_available()
        with pytest.raises(UsageError, match="use float32"):
            quantise(model)
        assert isinstance(model.projector[0], nn.Linear), "nothing is half done"

    def test_other_devices(self) -> None:
        with torch.device("meta"):
            model = SoundModel(CONFIG)
        with pytest.raises(UsageError, match="on a GPU use bfloat16"):
            quantise(model)
