"""The published model's objective against the reference: every term, and its gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soundmap.errors import UsageError
from soundmap.train.losses import (
    FourEmbeddings,
    FourEmbeddingsLoss,
    four_embeddings_loss,
    pair_logits,
    pair_loss,
    pseudo_matches,
)

TERMS = ("it", "at", "ia", "i_at", "fdt")
INPUTS = {
    "image": "sat",
    "audio": "audio",
    "audio_caption": "audio_caption",
    "image_caption": "image_caption",
}


class Golden:
    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.values = {key: torch.from_numpy(np.array(file[key])) for key in file}
        self.embeddings = FourEmbeddings(
            **{ours: self.values[f"in.{theirs}"] for ours, theirs in INPUTS.items()}
        )
        self.scales = {term: self.values[f"logit_scale.{term}"] for term in TERMS}

    def logits(self, term: str) -> Tensor:
        e = self.embeddings
        a, b = {
            "it": (e.image, e.audio_caption),
            "at": (e.audio, e.audio_caption),
            "ia": (e.image, e.audio),
            "i_at": (e.image, e.audio + e.audio_caption),
            "fdt": (e.image, e.image_caption),
        }[term]
        return pair_logits(a, b, self.scales[term])

    def loss(self, **options: float | bool) -> FourEmbeddingsLoss:
        return four_embeddings_loss(self.embeddings, self.scales, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def golden(sat2sound: Path) -> Golden:
    return Golden(sat2sound / "golden_loss.npz")


def close(found: Tensor | None, expected: Tensor, atol: float = 1e-5) -> None:
    assert found is not None
    found = found.detach()
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=atol)


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_every_term(golden: Golden, alpha: float) -> None:
    found = golden.loss(alpha=alpha)
    for term in TERMS:
        close(getattr(found, term), golden.values[f"alpha{alpha}.{term}"])
    close(found.total, golden.values[f"alpha{alpha}.loss"])
    close(found.multimodal, golden.values[f"alpha{alpha}.multimodal_loss"])
    close(found.fdt, golden.values[f"alpha{alpha}.fdt_loss"])


def test_defaults_are_the_published_ones(golden: Golden) -> None:
    assert torch.equal(golden.loss().total, golden.loss(alpha=0.1, fdt_weight=1.0).total)


def test_without_the_combined_term(golden: Golden) -> None:
    found = golden.loss(combined=False)
    assert found.i_at is None
    close(found.total, golden.values["no_combined.loss"])


def test_without_image_captions(golden: Golden) -> None:
    found = golden.loss(fdt_weight=0.0)
    close(found.total, golden.values["fdt_weight0.loss"])
    close(found.fdt, golden.values["alpha0.1.fdt"])


def test_logits(golden: Golden) -> None:
    close(golden.logits("ia"), golden.values["similarity.ia"])


@pytest.mark.parametrize("term", TERMS)
def test_pseudo_matches(golden: Golden, term: str) -> None:
    found = pseudo_matches(golden.logits(term))
    assert torch.equal(found, golden.values[f"matched.{term}"].bool())
    assert int(found.sum()) - len(found) == int(golden.values[f"n_pseudo.{term}"])


def test_gradients(golden: Golden) -> None:
    embeddings = FourEmbeddings(
        **{ours: getattr(golden.embeddings, ours).clone().requires_grad_() for ours in INPUTS}
    )
    scales = {term: scale.clone().requires_grad_() for term, scale in golden.scales.items()}
    four_embeddings_loss(embeddings, scales).total.backward()
    for ours, theirs in INPUTS.items():
        expected = golden.values[f"grad.{theirs}"]
        close(getattr(embeddings, ours).grad[:, :64], expected, 1e-5 * float(expected.abs().max()))
    for term, scale in scales.items():
        expected = golden.values[f"grad.logit_scale.{term}"]
        close(scale.grad, expected, 1e-5 * abs(float(expected)))
    # The reference has one scale more, and never uses it.
    assert golden.values["grad.logit_scale.it_a"].isnan()


# ------------------------------------------------------------------- what needs no reference


def by_hand(logits: np.ndarray, alpha: float) -> float:
    """The pair loss in float64, with whole target matrices."""

    def cross_entropy(s: np.ndarray, target: np.ndarray) -> float:
        log_p = s - np.log(np.exp(s).sum(axis=1, keepdims=True))
        return float(-(target * log_p).sum(axis=1).mean())

    def both(target: np.ndarray) -> float:
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target.T)) / 2

    matched = (logits >= np.diag(logits)[:, None]).astype(float)
    return both(np.eye(len(logits))) + alpha * both(matched)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
def test_pair_loss_is_what_its_formula_says(alpha: float) -> None:
    logits = np.random.default_rng(3).normal(size=(7, 7)) * 3
    found = float(pair_loss(torch.from_numpy(logits), alpha))
    assert found == pytest.approx(by_hand(logits, alpha), rel=1e-12)


def test_rows_alone_decide_on_matches() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 3.0], [5.0, 5.0, 4.0]])
    expected = [[True, True, False], [False, True, True], [True, True, True]]
    assert pseudo_matches(logits).tolist() == expected


def test_lengths_matter_only_to_the_sum(golden: Golden) -> None:
    """Each embedding is made a unit vector, but audio and its caption are added as they are."""
    e = golden.embeddings
    longer = replace(e, image=4 * e.image, audio=4 * e.audio, image_caption=4 * e.image_caption)
    before, after = golden.loss(), four_embeddings_loss(longer, golden.scales)
    for term in ("it", "at", "ia", "fdt"):
        close(getattr(after, term), getattr(before, term))
    assert before.i_at is not None
    assert after.i_at is not None
    assert abs(float(after.i_at - before.i_at)) > 0.01


def test_embeddings_of_two_batches_are_refused(golden: Golden) -> None:
    short = replace(golden.embeddings, audio=golden.embeddings.audio[:5])
    with pytest.raises(UsageError, match=r"one shape.*audio \(5, 1024\)"):
        four_embeddings_loss(short, golden.scales)
