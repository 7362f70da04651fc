"""Convolutions that see turned images alike, and are plain ones when written out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from soundmap.errors import InputError
from soundmap.nn.vit import ConvStem
from soundmap.train.turns import tie, tie_statistics, write_out
from tests.unit.little import rng


def stem(channels: tuple[int, ...] = (8, 12, 6), stride: int = 1, seed: int = 0) -> ConvStem:
    """Make a tied stem whose norms have seen something."""
    torch.manual_seed(seed)
    made = ConvStem(channels, (stride,) * len(channels), 5).double()
    tie(made)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_()
    for _ in range(3):
        made(noise())
        tie_statistics(made)
    return made.eval()


def noise(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=rng(seed), dtype=torch.float64) + 0.3


class TestTurns:
    @given(
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
        st.integers(1, 7),
        st.integers(1, 3),
        st.integers(0, 99),
    )
    @settings(max_examples=25, deadline=None)
    def test_turned_images_are_seen_alike(
        self, quarters: list[int], last: int, turns: int, seed: int
    ) -> None:
        made = stem((*(4 * n for n in quarters), last), seed=seed)
        seen, turned = made(noise()), made(torch.rot90(noise(), turns, (2, 3)))
        torch.testing.assert_close(torch.rot90(seen, turns, (2, 3)), turned)

    def test_not_for_seeing_nothing(self) -> None:
        made = stem()
        seen = made(noise())
        assert seen.std() > 0.01
        # Directions are told: what mirrors swap is another thing.
        assert (seen.flip(-1) - made(noise().flip(-1))).abs().max() > 0.01

    def test_plain_convolutions_are_not(self) -> None:
        torch.manual_seed(0)
        made = ConvStem((8, 12, 6), (1, 1, 1), 5).double().eval()
        turned = made(torch.rot90(noise(), 1, (2, 3)))
        assert (torch.rot90(made(noise()), 1, (2, 3)) - turned).abs().max() > 0.01

    def test_written_out_they_are_plain(self) -> None:
        made = stem(stride=2)
        plain = ConvStem((8, 12, 6), (2, 2, 2), 5).double().eval()
        names = set(plain.state_dict())
        assert set(made.state_dict()) != names
        before = made(noise())
        write_out(made)
        assert set(made.state_dict()) == names
        assert torch.equal(made(noise()), before)
        plain.load_state_dict(made.state_dict())
        assert torch.equal(plain(noise()), before)
        write_out(plain)
        assert torch.equal(plain(noise()), before)

    def test_a_quarter_of_the_weights_learns(self) -> None:
        made = stem()
        plain = ConvStem((8, 12, 6), (1, 1, 1), 5)
        last, norm = 5 * 6 + 5, 2 * 6
        count, whole = (sum(p.numel() for p in m.parameters()) for m in (made, plain))
        assert 4 * (count - last - norm) == whole - last - norm

    def test_they_stay_tied_while_they_learn(self) -> None:
        made = stem().train()
        optimiser = torch.optim.SGD(made.parameters(), lr=0.1)
        before = copy.deepcopy(made)
        for step in range(3):
            # What turns differ in is what is asked for.
            seen = made(noise(seed=step))
            (seen * torch.arange(16.0)).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            tie_statistics(made)
        made.eval()
        before.eval()
        assert (made(noise()) - before(noise())).abs().max() > 0.01
        turned = made(torch.rot90(noise(), 1, (2, 3)))
        torch.testing.assert_close(torch.rot90(made(noise()), 1, (2, 3)), turned)

    @pytest.mark.parametrize(
        "made",
        [
            nn.Conv2d(3, 8, 8, 8),
            ConvStem((8,), (1,), 4),
            ConvStem((8, 10, 8), (1, 1, 1), 4),
        ],
    )
    def test_what_cannot_be_tied_is_refused(self, made: nn.Module) -> None:
        names = set(made.state_dict())
        with pytest.raises(InputError, match="cannot be tied in four directions"):
            tie(made)
        assert set(made.state_dict()) == names
