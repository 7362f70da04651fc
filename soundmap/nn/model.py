"""The whole model: towers, query maps and the shared codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from soundmap.nn.codebook import Codebook, QueryMap
from soundmap.nn.vit import ViT, ViTConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model, as its card states it."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    token_dim: int = 1024
    """Width of an image token after the projector."""
    dim: int = 1024
    """Length of a code and so of every embedding, D."""
    codes: int = 16000
    """Size of the codebook, K."""
    temperature: float = 1000.0
    text_dim: int = 1024
    """Width of a text token before its query map."""
    local_patches: bool = False
    """Whether patch embeddings leave the attention among patches out, see `ViT.mix`."""


class SoundModel(nn.Module):
    """Image and text towers over one codebook.

    Embeddings are unit vectors; their dot product is the similarity of a place and a sound.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = ViT(config.vit)
        self.projector = nn.Sequential(
            nn.Linear(config.vit.width, config.token_dim),
            nn.GELU(),
            nn.Linear(config.token_dim, config.token_dim),
        )
        self.image_query = QueryMap(config.token_dim, config.dim)
        self.text_query = QueryMap(config.text_dim, config.dim)
        self.codebook = Codebook(config.codes, config.dim, config.temperature)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """ImageNet normalisation: uint8 or float[B, 3, H, W] in 0..255 to float32."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (pixels.to(mean.dtype) - mean) / std

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn pixels in 0..255, uint8 or float[B, 3, H, W], into a grid of tokens."""
        return self.vit.embed(self.normalise(pixels))

    def queries(self, grid: Tensor, gsd_m: Tensor, local: bool = False) -> Tensor:
        """Turn a grid of tokens into one query per patch.

        Parameters
        ----------
        grid
            float[B, width, rows, cols] from `embed`.
        gsd_m
            float[B] or float[1], metres per pixel.
        local
            Whether patches know nothing of each other, see `soundmap.nn.vit.ViT.mix`.

        Returns
        -------
        Tensor
            float[B, N, D], patches row-major.
        """
        out: Tensor = self.image_query(self.projector(self.vit.mix(grid, gsd_m, local)))
        return out

    def encode_image(self, pixels: Tensor, gsd_m: Tensor) -> Tensor:
        """Embed windows as wholes, as the paper does: unit vectors float[B, D]."""
        return self.codebook.pool(self.queries(self.embed(pixels), gsd_m))

    def encode_patches(self, pixels: Tensor, gsd_m: Tensor) -> Tensor:
        """Embed every patch by itself: unit vectors float[B, N, D]."""
        local = self.config.local_patches
        return self.codebook.each(self.queries(self.embed(pixels), gsd_m, local))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed texts from their token vectors float[B, T, text_dim]: unit vectors float[B, D]."""
        return self.codebook.pool(self.text_query(tokens))
