"""Text to static token vectors: a WordPiece vocabulary with one frozen vector per token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokens(Protocol):
    """Turns texts into token vectors for the text tower."""

    def tokens(self, texts: list[str]) -> list[NDArray[np.float32]]:
        """Turn texts into vectors: for each float32[T, text_dim], T differing from text to text.

        Raises
        ------
        UsageError
            A text has no word.
        """
        ...


@dataclass(frozen=True)
class StaticText:
    """A tokeniser and a vector for each of its tokens.

    A text becomes the mean of its token vectors. The vectors were distilled from a sentence model
    with model2vec, which scales them by how telling a token is, so the mean is a sentence vector.
    """

    tokenizer: Tokenizer
    table: NDArray[np.float16]
    """float16[tokens, text_dim]."""

    @classmethod
    def load(cls, tokenizer_path: Path, table: NDArray[np.float16]) -> StaticText:
        """Read the tokeniser beside a model's weights.

        Raises
        ------
        ModelError
            The file is missing or does not fit the table.
        """
        from tokenizers import Tokenizer

        if not tokenizer_path.exists():
            raise ModelError(f"{tokenizer_path} is missing: the model folder is not complete")
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.get_vocab_size() != len(table):
            raise ModelError(
                f"{tokenizer_path} has {tokenizer.get_vocab_size()} tokens but the weights hold "
                f"{len(table)} vectors: the files are from different models"
            )
        return cls(tokenizer, table)

    def tokens(self, texts: list[str]) -> list[NDArray[np.float32]]:
        """Turn texts into token vectors for the text tower.

        Returns
        -------
        list of ndarray
            float32[1, text_dim] for each text: its mean vector, as its single token.

        Raises
        ------
        UsageError
            A text has no token that the vocabulary knows.
        """
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            known = [i for i in ids if self.table[i].any()]
            if not known:
                raise UsageError(f"the text {text!r} has no word that the model knows: rephrase it")
            rows.append(self.table[known].astype(np.float32).mean(axis=0, keepdims=True))
        return rows
