"""Our own 8-bit products: exact whatever comes, and never more than 16 bits hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from soundmap.nn import int8, int8_kernel
from soundmap.nn.int8_kernel import MAX_ACTIVATION, Kernel
from soundmap.nn.int8_program import COLUMNS, RUN, STEP

KERNEL = int8_kernel.load()

needs_kernel = pytest.mark.skipif(
    KERNEL is None, reason="needs llvmlite and a processor with AVX2 and no 8-bit instructions"
)


def the_kernel() -> Kernel:
    assert KERNEL is not None
    return KERNEL


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = int8_kernel.group_scale(weight)
    scale[scale == 0] = 1
    return (weight / scale[:, None]).round().to(torch.int8), scale


def worst_inputs(weights: Tensor) -> Tensor:
    """Activations that drive each output's sums as far up, and as far down, as they go."""
    up = (weights > 0).to(torch.uint8) * MAX_ACTIVATION
    return torch.cat([up, MAX_ACTIVATION - up])


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 450),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from(["normal", "ones", "heavy", "zeros"]),
)
def test_is_exact(seed: int, tokens: int, steps: int, blocks: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    shape = (blocks * COLUMNS, steps * STEP)
    weight = {
        "normal": rng.normal(size=shape),
        "ones": np.ones(shape) * rng.choice([-1, 1]),
        "heavy": rng.standard_t(1.5, size=shape),
        "zeros": np.zeros(shape),
    }[kind]
    weights, scale = rounded(torch.from_numpy(weight.astype(np.float32)))
    drawn = torch.from_numpy(rng.integers(0, MAX_ACTIVATION + 1, (tokens, shape[1]), np.uint8))
    x = torch.cat([drawn, worst_inputs(weights)])
    bias = torch.from_numpy(rng.normal(size=shape[0]).astype(np.float32))
    want = (x.long() @ weights.long().T).float() * (scale * 0.01) + bias
    packed = int8_kernel.pack(weights)
    torch.testing.assert_close(the_kernel().multiply(x, packed, scale, bias, 0.01), want)
    largest = the_kernel().largest(x, packed, scale, bias, 0.01)
    torch.testing.assert_close(largest, want.amax(0))


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(-6, 6), st.floats(-4, 4), st.booleans()
)
def test_rounds_to_the_nearest_step(
    seed: int, runs: int, power: float, shift: float, gelu: bool
) -> None:
    rng = np.random.default_rng(seed)
    drawn = (rng.normal(size=runs * RUN) + shift) * 10.0 ** min(power, 2 if gelu else 6)
    x = torch.from_numpy(drawn.astype(np.float32))
    given_x = x.clone()
    steps, scale, offset = the_kernel().round(given_x, gelu)
    if gelu:
        exact = nn.functional.gelu(x.double()).float()
        torch.testing.assert_close(given_x, exact, rtol=0, atol=5e-6 * float(x.abs().max()))
        x = given_x
    assert steps.max() <= MAX_ACTIVATION
    assert ((scale * (steps.float() - offset) - x).abs() <= 0.501 * scale + 1e-6).all()
    # All of the range is used.
    assert scale * (MAX_ACTIVATION - 2) <= max(x.max(), 0) - min(x.min(), 0) + 1e-3


@needs_kernel
def test_rounds_zeros() -> None:
    steps, scale, offset = the_kernel().round(torch.zeros(RUN))
    assert (steps == offset).all()
    assert scale == 1


def test_no_sum_of_sixteen_bits_can_overflow() -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(64, 96), torch.ones(16, 32), torch.randn(16, 64) ** 3):
        weights, _ = rounded(weight)
        assert weights.abs().max() <= int8_kernel.MAX_WEIGHT
        # Inputs 0, 1, 4 and 5 of every eight share one sum, 2, 3, 6 and 7 the other.
        for together in ([0, 1, 4, 5], [2, 3, 6, 7]):
            group = weights.view(len(weights), -1, STEP)[..., together].long()
            for side in (group.clamp(min=0), -group.clamp(max=0)):
                assert side.sum(-1).max() * MAX_ACTIVATION < 2**15


def test_scale_is_hardly_coarser_than_it_must_be() -> None:
    weight = torch.randn(256, 768, generator=torch.Generator().manual_seed(0))
    finest = weight.abs().amax(1) / int8_kernel.MAX_WEIGHT
    assert (int8_kernel.group_scale(weight) / finest).mean() < 1.05


@needs_kernel
def test_serves_matrices_that_fit_and_leaves_the_others_alone() -> None:
    assert int8._Rounded(torch.randn(COLUMNS * 2, STEP * 3)).kernel is KERNEL
    assert int8._Rounded(torch.randn(COLUMNS * 2 - 1, STEP * 3)).kernel is None
    assert int8._Rounded(torch.randn(COLUMNS * 2, STEP * 3 + 4)).kernel is None


def test_without_it_the_numbers_are_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not int8.is_available():
        pytest.skip("needs a PyTorch with oneDNN's 8-bit convolutions")
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64), torch.randn(3, 20, 96)
    found = int8.Int8Linear(linear)(x)
    monkeypatch.setattr(int8_kernel, "load", lambda: None)
    other = int8.Int8Linear(linear)
    assert other.weights.kernel is None
    with torch.no_grad():
        exact = linear(x)
    for one in (found, other(x)):
        assert (one - exact).norm() / exact.norm() < 0.02
