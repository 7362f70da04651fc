"""Token states of captions, kept for when they come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundmap.encoder.flan import FlanText
from soundmap.encoder.text import TextTokens
from soundmap.errors import UsageError

_AT_ONCE = 32
_MOST_TOKENS = 512


@dataclass
class Captions:
    """Turns captions into token states by a frozen encoder.

    A T5 runs on the device, many texts at a time, where that is a GPU. On a processor it takes each
    text by itself, so that its numbers do not depend on which texts come together.
    """

    text: TextTokens
    device: torch.device
    cache_mb: int = 2048
    refused: int = 0
    """Captions that the encoder does not take: too long, or of no word that it knows."""
    _kept: OrderedDict[str, NDArray[np.float32] | None] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def states(self, texts: Iterable[str]) -> list[NDArray[np.float32] | None]:
        """Token states of each text, float32[T, text_dim]; None for an empty or refused one."""
        texts = list(texts)
        found: dict[str, NDArray[np.float32] | None] = {"": None}
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
                found[text] = self._kept[text]
        new = [text for text in dict.fromkeys(texts) if text not in found]
        for text, states in zip(new, self._encode(new), strict=True):
            found[text] = states
            self._keep(text, states)
        return [found[text] for text in texts]

    def _encode(self, texts: list[str]) -> list[NDArray[np.float32] | None]:
        if isinstance(self.text, FlanText) and self.device.type != "cpu" and texts:
            made = self._encode_together(self.text, texts)
        else:
            made = [self._encode_alone(text) for text in texts]
        self.refused += sum(one is None for one in made)
        return made

    def _encode_alone(self, text: str) -> NDArray[np.float32] | None:
        try:
            return self.text.tokens([text])[0]
        except UsageError:
            return None

    @torch.inference_mode()
    def _encode_together(
        self, text: FlanText, texts: list[str]
    ) -> list[NDArray[np.float32] | None]:
        tokenizer, model = text.load()
        model = model.to(self.device)
        ids = [tokenizer(one, truncation=False).input_ids for one in texts]
        made: list[NDArray[np.float32] | None] = [None] * len(texts)
        order = sorted((i for i in range(len(ids)) if len(ids[i]) <= _MOST_TOKENS),
                       key=lambda i: len(ids[i]))  # fmt: skip
        for start in range(0, len(order), _AT_ONCE):
            rows = order[start : start + _AT_ONCE]
            longest = len(ids[rows[-1]])
            padded = torch.zeros((len(rows), longest), dtype=torch.long)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for row, i in enumerate(rows):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            states = model(
                input_ids=padded.to(self.device), attention_mask=mask.to(self.device)
            ).last_hidden_state
            whole = states.float().cpu().numpy()
            for row, i in enumerate(rows):
                made[i] = whole[row, : len(ids[i])].copy()
        return made

    def _keep(self, text: str, states: NDArray[np.float32] | None) -> None:
        self._kept[text] = states
        self._bytes += len(text) + (states.nbytes if states is not None else 0)
        while self._bytes > self.cache_mb << 20 and len(self._kept) > 1:
            old, gone = self._kept.popitem(last=False)
            self._bytes -= len(old) + (gone.nbytes if gone is not None else 0)


def join(states: list[NDArray[np.float32]]) -> Tensor:
    """Stack token states of differing lengths: float32[B, T, text_dim].

    Short ones are filled up with their own last token. Pooling takes the largest logit over the
    tokens, which a repeated one does not change: each text comes to what it would by itself. (The
    published training filled up with zeros, whose logits of zero took part; SPEC 5.)
    """
    longest = max(len(one) for one in states)
    rows = [np.pad(one, ((0, longest - len(one)), (0, 0)), mode="edge") for one in states]
    return torch.from_numpy(np.stack(rows))
