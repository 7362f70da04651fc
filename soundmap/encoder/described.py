"""Windows whose metadata are known one by one, as those of a data set are.

All windows of a map have the same fields masked; samples do not. The published model then depends
on which samples are encoded together (`soundmap.nn.metadata.MetadataFuser.forward`), so a batch
goes through the network as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundmap.encoder.base import Encoder
from soundmap.encoder.torch_encoder import TorchEncoder
from soundmap.nn.metadata import Metadata, encode_hour, encode_latlong, encode_month

AUDIO_SOURCES = ("yfcc", "iNat", "aporee", "freesound")
"""Archives of recordings, in the order of the published model's table."""

CAPTION_SOURCES = ("meta", "qwen", "pengi")
"""What wrote the captions of recordings, in the order of the published model's table."""


@dataclass(frozen=True)
class Facts:
    """What is known of one sample; None is masked."""

    lonlat: tuple[float, float] | None = None
    """Degrees, longitude first."""
    month: int | None = None
    """1 to 12."""
    hour: int | None = None
    """0 to 23, local time."""
    audio_source: str | None = None
    """One of `AUDIO_SOURCES`, in any case; others are masked."""
    caption_source: str | None = None
    """One of `CAPTION_SOURCES`, in any case; others are masked."""


def metadata_fields(encoder: Encoder) -> tuple[str, ...]:
    """Name the fields of metadata that a model fuses with the image, a part of `FIELDS`."""
    return encoder.config.metadata if isinstance(encoder, TorchEncoder) else ()


@torch.inference_mode()
def encode_described(
    encoder: Encoder, pixels: NDArray[np.uint8], facts: Sequence[Facts], gsd_m: float, scale: int
) -> NDArray[np.float32]:
    """Encode windows, each with its own metadata: unit vectors float32[B, D].

    Parameters
    ----------
    encoder
        Any; metadata are left out unless it is a model that fuses them.
    pixels
        uint8[B, 3, window, window].
    facts
        Of the B windows.
    gsd_m
        Metres per pixel that the model is told.
    scale
        How many native tiles wide a window is.

    Raises
    ------
    UsageError
        The windows have the wrong shape or type, or the model does not know the scale.
    """
    fields = metadata_fields(encoder)
    if not fields or not len(pixels) or all(one == Facts() for one in facts):
        found = encoder.encode_images(pixels, scale=scale, gsd_m=gsd_m, details=("image",)).image
        assert found is not None
        return found
    assert isinstance(encoder, TorchEncoder)
    # For what it checks: shape, type and scale.
    encoder.encode_images(pixels[:0], scale=scale, gsd_m=gsd_m, details=("image",))
    model, device = encoder.model, encoder.device
    metadata = encode_facts(facts, fields, device)
    x = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    gsd = torch.tensor([gsd_m], device=device)
    lower = encoder.precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=lower):
        queries = model.queries(model.embed(x), gsd, metadata=metadata)
    codebook = model.image_codebook or model.codebook
    vectors: NDArray[np.float32] = codebook.pool(queries.float()).cpu().numpy()
    return vectors


def encode_facts(facts: Sequence[Facts], fields: tuple[str, ...], device: torch.device) -> Metadata:
    """Encode the named fields of every sample; what is masked is not valid."""
    if not facts:
        return Metadata({}, {})
    places = torch.tensor([one.lonlat or (0.0, 0.0) for one in facts], dtype=torch.float64)
    months = torch.tensor([one.month or 1 for one in facts])
    hours = torch.tensor([one.hour or 0 for one in facts])
    audio = [_number(one.audio_source, AUDIO_SOURCES) for one in facts]
    caption = [_number(one.caption_source, CAPTION_SOURCES) for one in facts]
    held: dict[str, tuple[Tensor, list[bool]]] = {
        "asource": (torch.tensor(audio).clamp(0), [n >= 0 for n in audio]),
        "tsource": (torch.tensor(caption).clamp(0), [n >= 0 for n in caption]),
        "latlong": (encode_latlong(places), [one.lonlat is not None for one in facts]),
        "month": (encode_month(months), [one.month is not None for one in facts]),
        "time": (encode_hour(hours), [one.hour is not None for one in facts]),
    }
    return Metadata(
        {name: held[name][0].to(device) for name in fields},
        {name: torch.tensor(held[name][1], device=device) for name in fields},
    )


def _number(name: str | None, known: Sequence[str]) -> int:
    wanted = (name or "").casefold()
    return next((i for i, one in enumerate(known) if one.casefold() == wanted), -1)
