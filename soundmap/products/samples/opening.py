"""Opening a set of samples by its configuration."""

from __future__ import annotations

from collections.abc import Collection

from soundmap.products.samples.base import FIELDS, Samples, StreamedSamples, check_fields
from soundmap.products.samples.config import SamplesConfig


def open_samples(
    config: SamplesConfig, split: str, fields: Collection[str] = FIELDS
) -> Samples | StreamedSamples:
    """Open a split of a set of samples. Nothing is decoded yet.

    Parameters
    ----------
    config
        The set.
    split
        "train", "validation" (or "val") or "test", or whatever else the set has.
    fields
        Which of `FIELDS` to decode. The columns of the others are not read. What the configuration
        requires is always read.

    Returns
    -------
    Samples or StreamedSamples
        The latter where ``config.streaming``.

    Raises
    ------
    InputError
        A file or column is missing or unreadable, or there is no such split.
    UsageError
        One of ``fields`` is unknown.
    MissingExtra
        Parquet is read and ``datasets`` or pyarrow is not installed.
    """
    wanted = check_fields(fields) | check_fields(config.required)
    if config.kind == "table":
        from soundmap.products.samples.table import open_table

        return open_table(config, split, wanted)
    if config.kind == "folder":
        from soundmap.products.samples.folder import open_folder

        return open_folder(config, split, wanted)
    from soundmap.products.samples.parquet import open_parquet

    return open_parquet(config, split, wanted)
