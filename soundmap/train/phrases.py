"""The texts that images and clips are trained with, encoded once, to draw from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundmap.encoder.text import StaticText
from soundmap.products.labelled import Audibility

_LARGEST_BLUR = 0.6
"""Length of the noise on a text's vector, as a part of the vector's own."""


@dataclass(frozen=True)
class Phrases:
    """Captions and prompts as token vectors, to draw from."""

    captions: list[Tensor]
    """Per class: float32[n, 1, text_dim]."""
    prompts: list[Tensor]
    """Per concept: float32[n, 1, text_dim]."""
    audible: Tensor
    """float32[classes, C]."""

    def draw_captions(self, rng: torch.Generator) -> Tensor:
        """Draw a caption of each class; a quarter are made of prompts of audible concepts."""
        rows = []
        for label, written in enumerate(self.captions):
            concepts = torch.nonzero(self.audible[label])[:, 0]
            if torch.rand((), generator=rng) < 0.75 or not len(concepts):
                rows.append(_pick(written, rng))
                continue
            chosen = concepts[torch.randperm(len(concepts), generator=rng)[:3]]
            rows.append(
                torch.stack([_pick(self.prompts[int(c)], rng) for c in chosen.tolist()]).mean(0)
            )
        return _blur(torch.stack(rows), rng)

    def draw_prompts(self, rng: torch.Generator) -> Tensor:
        """Draw a prompt of each concept: float32[C, 1, text_dim]."""
        return _blur(torch.stack([_pick(p, rng) for p in self.prompts]), rng)


def _blur(vectors: Tensor, rng: torch.Generator) -> Tensor:
    """Move vectors about, by chance and by a part of their length: nearby words mean the same."""
    noise = torch.randn(vectors.shape, generator=rng) * vectors.shape[-1] ** -0.5
    part = torch.rand((len(vectors), 1, 1), generator=rng) * _LARGEST_BLUR
    return vectors + noise * part * vectors.norm(dim=-1, keepdim=True)


def _pick(options: Tensor, rng: torch.Generator) -> Tensor:
    return options[int(torch.randint(0, len(options), (), generator=rng))]


def encode(text: StaticText, texts: list[str]) -> Tensor:
    """Turn texts into vectors: float32[n, 1, text_dim]."""
    return torch.stack([torch.from_numpy(tokens) for tokens in text.tokens(texts)])


def make_phrases(
    text: StaticText, audibility: Audibility, prompts: list[list[str]], dataset: str
) -> Phrases:
    """Encode the captions of a data set's classes and the prompts of the bank once."""
    table = audibility.tables[dataset]
    return Phrases(
        [encode(text, entry["captions"]) for entry in table.values()],
        [encode(text, p) for p in prompts],
        torch.from_numpy(audibility.matrix(dataset)).float(),
    )


def clip_phrases(text: StaticText, audibility: Audibility, prompts: list[list[str]]) -> Phrases:
    """Encode the captions of all classes of clips and the prompts of the bank once."""
    return Phrases(
        [encode(text, clip["captions"]) for clip in audibility.clips.values()],
        [encode(text, p) for p in prompts],
        torch.from_numpy(audibility.clip_matrix()).float(),
    )
