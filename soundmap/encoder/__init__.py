"""Encoders: model cards, and loading a model by name or folder."""

from __future__ import annotations

from soundmap.encoder.base import Conditions, Encoder, Encoding
from soundmap.encoder.card import InputSpec, ModelCard, Reading, bundled_models, find_model

DEFAULT_MODEL = "soundmap-small"

__all__ = [
    "DEFAULT_MODEL",
    "Conditions",
    "Encoder",
    "Encoding",
    "InputSpec",
    "ModelCard",
    "Reading",
    "bundled_models",
    "find_model",
    "load_encoder",
]


def load_encoder(
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> Encoder:
    """Load a model.

    Parameters
    ----------
    model
        A bundled or installed name, the folder of a model, or a published checkpoint.
    device
        "auto", "cpu" or "cuda".
    threads
        Threads to share windows out to; one per core if not given.
    precision
        "auto", "float32", "bfloat16" or "int8".

    Raises
    ------
    UsageError
        There is no such model.
    ModelError
        Its files are missing or damaged.

    Examples
    --------
    >>> enc = load_encoder("soundmap-small")
    >>> enc.encode_text(["church bells"]).shape
    (1, 128)
    """
    from soundmap.encoder.torch_encoder import TorchEncoder

    return TorchEncoder(find_model(model), device, threads, precision)
