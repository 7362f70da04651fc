"""The whole model: towers, query maps and the shared codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from soundmap.nn.audio_small import AudioConfig, SmallAudioSide
from soundmap.nn.codebook import Codebook, QueryMap
from soundmap.nn.metadata import Metadata, MetadataFuser
from soundmap.nn.vit import ViT, ViTConfig

if TYPE_CHECKING:
    from soundmap.nn.audio import AudioSide

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
    metadata: tuple[str, ...] = ()
    """Fields that are fused with the image, a part of `soundmap.nn.metadata.FIELDS`; or none."""
    audio: bool = False
    """Whether there is a tower for sound."""
    audio_tower: AudioConfig | None = None
    """Size of a small tower for sound; None: the published one."""


_START_SCALE = math.log(1 / 0.07)
OTHER_SCALES = ("at", "ia", "i_at", "fdt")
"""Pairs with a learned scale of their own, beside image and audio caption: audio and its caption,
image and audio, image and both, image and image caption."""


class SoundModel(nn.Module):
    """Image, text and audio towers over one codebook.

    Embeddings are unit vectors; their dot product is the similarity of a place and a sound.
    """

    audio: AudioSide | SmallAudioSide | None
    image_codebook: Codebook | None
    """Set by `soundmap.nn.int8.quantise`: what images are compared with instead of `codebook`."""

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
        self.fuser = MetadataFuser(config.metadata, config.token_dim) if config.metadata else None
        self.logit_scale = nn.Parameter(torch.tensor(_START_SCALE))
        self.image_codebook = None
        self.audio = None
        if config.audio:
            self.add_audio()
        # These two are known, even while the weights are still to come (device "meta").
        mean, std = (torch.tensor(v, device="cpu") for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", mean.view(3, 1, 1) * 255, False)
        self.register_buffer("std", std.view(3, 1, 1) * 255, False)

    def add_audio(self) -> None:
        """Give the model its audio side, with fresh weights.

        The published one is large and needs a library of its own: who only encodes images leaves
        it out.

        Raises
        ------
        ImportError
            It is the published one, and transformers is not installed.
        """
        if self.config.audio_tower is not None:
            self.audio = SmallAudioSide(self.config.audio_tower, self.config.dim)
        else:
            from soundmap.nn.audio import AudioSide

            self.audio = AudioSide(self.config.dim)
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(_START_SCALE)) for name in OTHER_SCALES}
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """ImageNet normalisation: uint8 or float[B, 3, H, W] in 0..255 to float32."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (pixels.to(mean.dtype) - mean) / std

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn pixels in 0..255, uint8 or float[B, 3, H, W], into a grid of tokens."""
        return self.vit.embed(self.normalise(pixels))

    def tokens(self, grid: Tensor, gsd_m: Tensor, local: bool = False) -> Tensor:
        """Run the image tower and its projector over a grid of tokens.

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
            float[B, N, token_dim], patches row-major.
        """
        out: Tensor = self.projector(self.vit.mix(grid, gsd_m, local))
        return out

    def queries(
        self, grid: Tensor, gsd_m: Tensor, local: bool = False, metadata: Metadata | None = None
    ) -> Tensor:
        """Turn a grid of tokens into one query per patch, and one per field of metadata.

        Parameters
        ----------
        grid, gsd_m, local
            See `tokens`.
        metadata
            Of the B windows, for models with a fuser; None masks every field.

        Returns
        -------
        Tensor
            float[B, N + M, D], patches row-major, then the M fields that the model knows.
        """
        tokens = self.tokens(grid, gsd_m, local)
        if self.fuser is not None:
            tokens = self.fuser(tokens, metadata or Metadata({}, {}))
        out: Tensor = self.image_query(tokens)
        return out

    def encode_image(
        self, pixels: Tensor, gsd_m: Tensor, metadata: Metadata | None = None
    ) -> Tensor:
        """Embed windows as wholes, as the paper does: unit vectors float[B, D]."""
        codebook = self.image_codebook or self.codebook
        return codebook.pool(self.queries(self.embed(pixels), gsd_m, metadata=metadata))

    def encode_patches(
        self, pixels: Tensor, gsd_m: Tensor, metadata: Metadata | None = None
    ) -> Tensor:
        """Embed every patch by itself: unit vectors float[B, N, D]."""
        grid = self.embed(pixels)
        queries = self.queries(grid, gsd_m, self.config.local_patches, metadata)
        codebook = self.image_codebook or self.codebook
        return codebook.each(queries[:, : grid.shape[-2] * grid.shape[-1]])

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed texts from their token vectors: unit vectors float[B, D].

        Parameters
        ----------
        tokens
            float[B, T, text_dim].
        mask
            bool[B, T], False for padding; see `Codebook.largest` for what padding does.
        """
        return self.codebook.pool(self.text_query(tokens), mask)

    def encode_audio(self, mel: Tensor) -> Tensor:
        """Embed clips from their log-mel spectrograms float[B, 1, 1001, 64]: float[B, D]."""
        assert self.audio is not None
        return self.codebook.pool(self.audio.queries(mel))
