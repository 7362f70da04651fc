"""What the model is trained to do: tell what fits a place from what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soundmap.errors import UsageError


def caption_loss(images: Tensor, captions: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Contrast each image with one caption of every class (InfoNCE; one positive per row).

    Parameters
    ----------
    images
        float[..., D] unit vectors.
    captions
        float[classes, D] unit vectors, one caption of each class.
    labels
        int64[...], class of each image.
    scale
        Scalar; multiplies the similarities.
    """
    logits = scale * images @ captions.T
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def phrase_loss(
    images: Tensor, phrases: Tensor, audible: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Judge every pair of image and phrase by itself (sigmoid loss, Zhai et al. 2023).

    Parameters
    ----------
    images
        float[..., D] unit vectors.
    phrases
        float[C, D] unit vectors, one phrase of each concept.
    audible
        float[..., C], one where the phrase's concept is audible in the image's class.
    scale, bias
        Scalars; the logit is ``scale * similarity + bias``.
    """
    logits = scale * images @ phrases.T + bias
    return F.binary_cross_entropy_with_logits(logits, audible.expand_as(logits))


def agreement_loss(a: Tensor, b: Tensor) -> Tensor:
    """Hold two views of the same patches to one answer: one minus the mean cosine."""
    return 1 - (a * b).sum(-1).mean()


def steady_loss(a: Tensor, b: Tensor) -> Tensor:
    """Hold two views of the same patches to the same similarities, above all on average.

    Changes are measured against how much a concept differs from patch to patch, so that a model
    gains nothing by calling everything alike.

    Parameters
    ----------
    a, b
        float[B, n, C] similarities of n patches of each image with C phrases.

    Returns
    -------
    Tensor
        Squared changes over the variance of ``a`` and ``b`` over all patches, the mean over
        concepts: that of the images' means, and a quarter of that of single patches, which may
        scatter.
    """
    change = a - b
    size = change.mean(1).square().mean(0) + change.square().mean((0, 1)) / 4
    spread = (a.flatten(0, 1).var(0) + b.flatten(0, 1).var(0)) / 2
    return (size / spread.clamp_min(1e-6)).mean()


def spread_loss(logits: Tensor) -> Tensor:
    """Keep codes in use: the mean softmax over the batch should not collapse onto a few.

    Returns the Kullback-Leibler divergence of the mean from the uniform distribution, in nats.
    """
    mean = logits.flatten(0, -2).softmax(-1).mean(0)
    return (mean * (mean.clamp_min(1e-9) * len(mean)).log()).sum() + torch.zeros_like(mean[0])


# ------------------------------------------------------------- the objective of the published model


@dataclass(frozen=True)
class FourEmbeddings:
    """What the published model makes of a batch of samples, each float[B, D], not normalised."""

    image: Tensor
    """Image, with its metadata if the model takes any."""
    audio: Tensor
    """Recording made at the place."""
    audio_caption: Tensor
    """Caption of the recording."""
    image_caption: Tensor
    """Caption of the image."""


def class_loss(logits: Tensor, match: Tensor, alpha: float = 0.1) -> Tensor:
    """Contrast pairs both ways where others than the drawn partner are right, too.

    Like `pair_loss`, with the weight of the true pair shared out evenly among all that match:
    of two clips of one class, neither is held against the other's place.

    Parameters
    ----------
    logits
        float[B, B] from `pair_logits`.
    match
        bool[B, B], which pairs are right; the diagonal is.
    alpha
        Weight of the pseudo-matches; 0 leaves them out.

    Returns
    -------
    Tensor
        Scalar.
    """
    loss = match_loss(logits, match)
    if alpha:
        by_row, by_column = F.log_softmax(logits, dim=1), F.log_softmax(logits, dim=0)
        evidence = -(by_row + by_column) / (2 * len(logits))
        loss = loss + alpha * (evidence * pseudo_matches(logits)).sum()
    return loss


def match_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Contrast all of one kind with all of another, where any number of them may match.

    Parameters
    ----------
    logits
        float[N, M].
    match
        bool[N, M]. Rows and columns without any match are left out.

    Returns
    -------
    Tensor
        The mean of both ways, each the mean cross-entropy with the matches in equal shares; 0
        where nothing matches.
    """
    ways = []
    for scores, right in ((logits, match), (logits.T, match.T)):
        able = right.any(1)
        shares = right[able].to(logits.dtype)
        shares = shares / shares.sum(1, keepdim=True)
        ways.append(-(F.log_softmax(scores[able], dim=1) * shares).sum() / able.sum().clamp(min=1))
    return (ways[0] + ways[1]) / 2


@dataclass(frozen=True)
class FourEmbeddingsLoss:
    """The published model's objective and its terms; scalars."""

    total: Tensor
    """``multimodal + fdt_weight * fdt``: what is minimised."""
    multimodal: Tensor
    """``(it + at + ia) / 3 + i_at``."""
    it: Tensor
    """Image with audio caption."""
    at: Tensor
    """Audio with audio caption."""
    ia: Tensor
    """Image with audio."""
    i_at: Tensor | None
    """Image with audio and audio caption together; None if left out."""
    fdt: Tensor
    """Image with image caption, before its weight."""


def pair_logits(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Scale the cosines of every row of ``a`` with every row of ``b``.

    Parameters
    ----------
    a, b
        float[B, D], of any length.
    log_scale
        Scalar: natural logarithm of the scale, as the model holds it.

    Returns
    -------
    Tensor
        float[B, B]; row i belongs to ``a[i]``, and the diagonal to the true pairs.
    """
    return log_scale.exp() * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def pseudo_matches(logits: Tensor) -> Tensor:
    """Mark the pairs that fit at least as well as the true pair of their row.

    Rows alone decide; a column's own order plays no part. The true pairs are marked, too.

    Parameters
    ----------
    logits
        float[B, B], true pairs on the diagonal.

    Returns
    -------
    Tensor
        bool[B, B], without gradient.
    """
    with torch.no_grad():
        return logits >= logits.diagonal()[:, None]


def pair_loss(logits: Tensor, alpha: float = 0.1) -> Tensor:
    """Contrast pairs both ways, and lend some weight to what fits as well as the true pair.

    ``L(I) + alpha L(P)``, where ``L(T) = (CE(S, T) + CE(S', T')) / 2``, S are the logits, I is the
    identity, P are `pseudo_matches`, and ' is the transpose. Rows of P are not made to sum to one:
    two pseudo-matches weigh twice as much as one (Sat2Sound, arXiv 2505.13777, and its code).

    Parameters
    ----------
    logits
        float[B, B] from `pair_logits`.
    alpha
        Weight of the pseudo-matches; 0 leaves them out.

    Returns
    -------
    Tensor
        Scalar.
    """
    by_row, by_column = F.log_softmax(logits, dim=1), F.log_softmax(logits, dim=0)
    # The transposed targets meet the transposed logits at the same places, so one sum serves both.
    evidence = -(by_row + by_column) / (2 * len(logits))
    loss = evidence.diagonal().sum()
    if alpha:
        loss = loss + alpha * (evidence * pseudo_matches(logits)).sum()
    return loss


def four_embeddings_loss(
    embeddings: FourEmbeddings,
    log_scales: Mapping[str, Tensor],
    *,
    alpha: float = 0.1,
    fdt_weight: float = 1.0,
    combined: bool = True,
) -> FourEmbeddingsLoss:
    """The objective that the published model was trained with.

    Parameters
    ----------
    embeddings
        Of one batch; sample i is row i of all four.
    log_scales
        Logarithms of the learned scales of the terms: "it", "at", "ia", "i_at", "fdt". Of a
        `soundmap.nn.model.SoundModel` with audio: ``{"it": m.logit_scale, **m.scales}``.
    alpha
        Weight of pseudo-matches in every term (``pseudo_match_alpha``).
    fdt_weight
        Weight of image with image caption.
    combined
        Whether image with audio and audio caption together counts (``combined_modality_loss``).

    Raises
    ------
    UsageError
        The four embeddings are not of one shape [B, D].
    """
    e = embeddings
    shapes = {n: tuple(getattr(e, n).shape) for n in FourEmbeddings.__dataclass_fields__}
    if len(set(shapes.values())) > 1 or e.image.ndim != 2:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(f"embeddings of one batch must share one shape [batch, dim]: {told}")

    def term(name: str, b: Tensor, a: Tensor = e.image) -> Tensor:
        return pair_loss(pair_logits(a, b, log_scales[name]), alpha)

    it = term("it", e.audio_caption)
    at = term("at", e.audio_caption, e.audio)
    ia = term("ia", e.audio)
    fdt = term("fdt", e.image_caption)
    multimodal = (it + at + ia) / 3
    i_at = None
    if combined:
        # Added as they are: the longer of the two weighs more.
        i_at = term("i_at", e.audio + e.audio_caption)
        multimodal = multimodal + i_at
    total = multimodal + fdt_weight * fdt
    return FourEmbeddingsLoss(total, multimodal, it, at, ia, i_at, fdt)
