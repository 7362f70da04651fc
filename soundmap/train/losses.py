"""What the model is trained to do: tell what fits a place from what does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def spread_loss(logits: Tensor) -> Tensor:
    """Keep codes in use: the mean softmax over the batch should not collapse onto a few.

    Returns the Kullback-Leibler divergence of the mean from the uniform distribution, in nats.
    """
    mean = logits.flatten(0, -2).softmax(-1).mean(0)
    return (mean * (mean.clamp_min(1e-9) * len(mean)).log()).sum() + torch.zeros_like(mean[0])
