"""Little to train on and to judge by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soundmap.products.labelled import LabelledImages

CLASSES = ("forest", "sea", "town")
CONCEPTS = ("birds", "waves", "traffic", "wind")
AUDIBLE = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.float32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 5, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=rng(seed), dtype=torch.uint8)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


def places(count: int = 36, side: int = 40) -> LabelledImages:
    """Three kinds of places that differ in colour and in texture."""
    noise = np.random.default_rng(0)
    labels = np.arange(count) % 3
    colours = np.array([[40, 90, 40], [20, 50, 120], [140, 130, 120]])[labels][..., None, None]
    rough = np.array([25, 4, 60])[labels][:, None, None, None]
    images = colours + noise.normal(size=(count, 3, side, side)) * rough
    return LabelledImages("places", np.clip(images, 0, 255).astype(np.uint8), labels, CLASSES, 10.0)
