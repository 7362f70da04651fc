"""Text to the token states of Flan-T5, which the published model reads."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder.repository import repository_folder
from soundmap.errors import MissingExtra, ModelError, UsageError

ENCODER_VARIABLE = "SOUNDMAP_TEXT_ENCODER"
_MOST_TOKENS = 512
# Not its weights as pickles, which the repository has as well.
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)


class FlanText:
    """The encoder half of a T5 model; loaded when the first text comes.

    Parameters
    ----------
    name
        Name at the hub, or a folder; the environment variable ``SOUNDMAP_TEXT_ENCODER`` goes first.
    dim
        Width of its token states, which the model was trained with.
    """

    def __init__(self, name: str, dim: int) -> None:
        self.name = os.environ.get(ENCODER_VARIABLE) or name
        self.dim = dim
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def tokens(self, texts: list[str]) -> list[NDArray[np.float32]]:
        """Turn texts into token states, each text by itself, so that none is padded.

        Returns
        -------
        list of ndarray
            float32[T, dim] for each text, last hidden states; the end-of-text token is the last.

        Raises
        ------
        UsageError
            A text is empty, or longer than the encoder reads.
        ModelError
            The encoder is not on this machine and cannot be fetched, or is another one.
        MissingExtra
            The library that runs it is not installed.
        """
        import torch

        for text in texts:
            if not text.strip():
                raise UsageError("the text is empty: give a phrase")
        tokenizer, model = self.load()
        result = []
        with torch.inference_mode():
            for text in texts:
                ids = tokenizer(text, truncation=False).input_ids
                if len(ids) > _MOST_TOKENS:
                    raise UsageError(
                        f"the text {text[:40]!r}... has {len(ids)} tokens, and the model reads "
                        f"{_MOST_TOKENS}: shorten it"
                    )
                states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                result.append(states.float().numpy())
        return result

    def load(self) -> tuple[Any, Any]:
        """Read tokeniser and encoder, once; torch modules of transformers, without gradients.

        Raises
        ------
        ModelError
            The files cannot be had, are damaged, or are of another model.
        MissingExtra
            The library that runs it is not installed.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._read()
            return self._loaded

    def _read(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
            from transformers.utils import logging
        except ImportError as error:
            raise MissingExtra("transformers", "sat2sound", "this model's text side") from error
        import torch

        folder = repository_folder(
            self.name,
            what="the text encoder",
            extra="sat2sound",
            files=_FILES,
            whole=lambda held: all((held / file).exists() for file in _FILES[:3]),
            advice=f"set {ENCODER_VARIABLE}=DIR; or give sounds as recordings, with --audio",
        )
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # safetensors alone: other weight files are pickles, which can run code.
            model = T5EncoderModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ModelError(
                f"the text encoder in {folder} is damaged or not whole: fetch it again ({reason})"
            ) from error
        if model.config.d_model != self.dim:
            raise ModelError(
                f"the text encoder {self.name} gives vectors of {model.config.d_model} numbers, "
                f"and the model reads {self.dim}: it was trained with another one"
            )
        return tokenizer, model.eval().requires_grad_(False)
