"""The terms of the bundled model, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from soundmap.train.losses import (
    agreement_loss,
    caption_loss,
    class_loss,
    match_loss,
    pair_loss,
    phrase_loss,
    spread_loss,
    steady_loss,
)
from tests.unit.little import AUDIBLE, rng, unit


class TestLosses:
    def test_caption_loss_by_hand(self) -> None:
        images, captions = unit(4, 6), unit(3, 6, seed=1)
        labels = torch.tensor([0, 2, 1, 2])
        expected = 0.0
        for image, label in zip(images, labels, strict=True):
            logits = [8 * float(image @ c) for c in captions]
            expected += math.log(sum(math.exp(v) for v in logits)) - logits[int(label)]
        found = caption_loss(images, captions, labels, torch.tensor(8.0))
        assert float(found) == pytest.approx(expected / 4, rel=1e-5)

    def test_caption_loss_of_patches(self) -> None:
        patches, captions = unit(4, 5, 6), unit(3, 6, seed=1)
        labels = torch.randint(0, 3, (4, 5), generator=rng())
        whole = caption_loss(patches, captions, labels, torch.tensor(8.0))
        flat = caption_loss(patches.flatten(0, 1), captions, labels.flatten(), torch.tensor(8.0))
        torch.testing.assert_close(whole, flat)

    def test_phrase_loss_by_hand(self) -> None:
        images, phrases = unit(3, 6), unit(4, 6, seed=1)
        expected = 0.0
        for image, row in zip(images, AUDIBLE, strict=True):
            for phrase, heard in zip(phrases, row, strict=True):
                p = 1 / (1 + math.exp(-(9 * float(image @ phrase) - 2)))
                expected -= math.log(p if heard else 1 - p)
        found = phrase_loss(images, phrases, AUDIBLE, torch.tensor(9.0), torch.tensor(-2.0))
        assert float(found) == pytest.approx(expected / 12, rel=1e-5)
        patches = images[:, None].expand(-1, 5, -1)
        spread = phrase_loss(
            patches, phrases, AUDIBLE[:, None], torch.tensor(9.0), torch.tensor(-2.0)
        )
        torch.testing.assert_close(spread, found)

    @pytest.mark.parametrize("alpha", [0.0, 0.1])
    def test_class_loss(self, alpha: float) -> None:
        logits = torch.randn(5, 5, generator=rng()) * 3
        alone = class_loss(logits, torch.eye(5).bool(), alpha)
        torch.testing.assert_close(alone, pair_loss(logits, alpha))
        # Two of one class: each side's weight is shared out between them.
        match = torch.eye(5).bool()
        match[0, 1] = match[1, 0] = True
        expected = 0.0
        for side in (logits, logits.T):
            log = side.log_softmax(1)
            rows = [(log[0, :2]).mean(), (log[1, :2]).mean(), log[2, 2], log[3, 3], log[4, 4]]
            expected -= float(sum(rows)) / 10
        assert float(class_loss(logits, match, 0.0)) == pytest.approx(expected, rel=1e-5)

    def test_agreement(self) -> None:
        a = unit(4, 5, 6)
        assert float(agreement_loss(a, a)) == pytest.approx(0, abs=1e-6)
        assert float(agreement_loss(a, -a)) == pytest.approx(2, abs=1e-6)

    def test_steady(self) -> None:
        a = torch.randn(40, 5, 6, generator=rng())
        assert float(steady_loss(a, a)) == 0
        # A tenth of a concept's spread, of one concept in six. All patches alike: as a mean, and
        # one by one. Patches that cancel out: one by one alone.
        change = torch.zeros_like(a)
        change[..., 2] = 0.1 * a[..., 2].std()
        assert float(steady_loss(a, a + change)) == pytest.approx(0.0125 / 6, rel=1e-3)
        a = a[:, :2]
        change = torch.zeros_like(a)
        change[..., 2] = torch.tensor([0.1, -0.1]) * a[..., 2].std()
        before, after = a - change / 2, a + change / 2
        assert float(steady_loss(before, after)) == pytest.approx(0.0025 / 6, rel=0.05)

    def test_calling_all_alike_is_not_steadier(self) -> None:
        a, b = torch.randn(2, 8, 5, 6, generator=rng())
        assert float(steady_loss(a / 10, b / 10)) == pytest.approx(float(steady_loss(a, b)))
        # One that tells places apart and changes as much is.
        assert float(steady_loss(a * 2, a * 2 + b)) < float(steady_loss(a, a + b))

    def test_matches_of_any_number(self) -> None:
        match = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
        right = torch.where(match, 30.0, -30.0)
        # Two that share a row cannot both have all of it.
        by_row, by_column = [math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0]
        expected = (sum(by_row) / 3 + sum(by_column) / 3) / 2
        assert float(match_loss(right, match)) == pytest.approx(expected, abs=1e-5)
        assert float(match_loss(-right, match)) > 30
        # A place where nothing is heard is no sign of anything, as a row.
        alone = match[:2], right[:2]
        assert float(match_loss(alone[1], alone[0])) < expected + 1e-5
        assert float(match_loss(right, torch.zeros_like(match))) == 0

    def test_spread(self) -> None:
        even = torch.zeros(2, 7, 16)
        assert float(spread_loss(even).mean()) == pytest.approx(0, abs=1e-5)
        one = torch.full((2, 7, 16), -50.0)
        one[..., 3] = 50
        assert float(spread_loss(one).mean()) == pytest.approx(math.log(16), rel=1e-4)
