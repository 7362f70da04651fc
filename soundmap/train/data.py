"""The data of a run, as a data.toml names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmap.errors import InputError
from soundmap.products.samples import (
    FIELDS,
    Samples,
    SamplesConfig,
    StreamedSamples,
    open_samples,
)
from soundmap.products.samples.config import read_toml

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class RunData:
    """What a run learns from, and what it is judged on."""

    train: Samples | StreamedSamples
    validation: Samples | StreamedSamples | None
    facts: Mapping[str, Any]
    """What tells one set from another, for run.json: a run goes on with the same data only."""


def read_data(path: Path, hears: bool) -> RunData:
    """Open what a data.toml names: tables ``[train]`` and, if there is one, ``[validation]``.

    Each is a `soundmap.products.samples.SamplesConfig`, and its split of that name is opened.

    Parameters
    ----------
    path
        The file.
    hears
        Whether the model takes recordings; if not they are not read.

    Raises
    ------
    InputError
        The file or what it names cannot be used.
    """
    table = read_toml(path)
    for key, value in table.items():
        if key not in SPLITS or not isinstance(value, Mapping):
            raise InputError(
                f"{path}: unknown key {key!r}: it holds the tables [train] and [validation]"
            )
    if "train" not in table:
        raise InputError(f"{path} has no table [train]: add one with kind and path")
    fields = [name for name in FIELDS if hears or name != "audio"]
    configs = {
        split: SamplesConfig.from_table(table[split], f"{path}, [{split}]", path.parent)
        for split in SPLITS
        if split in table
    }
    opened = {split: open_samples(config, split, fields) for split, config in configs.items()}
    return RunData(
        opened["train"],
        opened.get("validation"),
        {split: _facts(table[split], samples) for split, samples in opened.items()},
    )


def _facts(table: Mapping[str, Any], samples: Samples | StreamedSamples) -> dict[str, Any]:
    return {
        "config": json.loads(json.dumps(table, sort_keys=True, default=str)),
        **samples_facts(samples),
    }


def samples_facts(samples: Samples | StreamedSamples) -> dict[str, Any]:
    """What tells one set of samples from another without reading it all."""
    return {
        "name": samples.name,
        "rows": len(samples) if isinstance(samples, Samples) else None,
        "fields": sorted(samples.fields),
        "gsd_m": samples.gsd_m if samples.gsd_m == samples.gsd_m else None,
        "native_px": samples.native_px,
        "digest": _digest(samples),
    }


def _digest(samples: Samples | StreamedSamples) -> str | None:
    """Digest of some rows' keys, texts and places: other rows under the same name show."""
    import hashlib

    from soundmap.products.samples import BadSample

    if not isinstance(samples, Samples):
        return None
    count = len(samples)
    digest = hashlib.sha256()
    for index in sorted({round(i * (count - 1) / 15) for i in range(16)} if count else ()):
        try:
            s = samples[index]
        except BadSample as error:
            digest.update(f"{error.key} is bad\n".encode())
            continue
        captions = sorted(s.image_captions.items())
        facts = (s.key, s.audio_caption, captions, s.lat, s.lon, s.month, s.hour)
        digest.update(f"{facts}\n".encode())
        for array in (s.image, s.mel, s.wave):
            digest.update(array.tobytes() if array is not None else b"-")
    return digest.hexdigest()
