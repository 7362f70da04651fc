"""What `soundmap evaluate retrieval` reads: sets of samples, texts of classes, what is audible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from soundmap.errors import InputError
from soundmap.products.audibility import Table, choose_table, read_tables
from soundmap.products.embed_samples import Embeddings
from soundmap.products.samples import Samples, SamplesConfig, StreamedSamples, open_samples
from soundmap.products.samples.config import read_toml, split_name


def open_set(path: str | Path, split: str) -> Samples | StreamedSamples:
    """Open a split of the set that a TOML file describes.

    Parameters
    ----------
    path
        The keys of a set (kind, path, ...) by themselves, or in a table that is named like the
        split, as a file for training has them.
    split
        "test", "validation" (or "val"), "train", or whatever else there is.

    Raises
    ------
    InputError
        The file or the set cannot be read, or has no such split.
    """
    path = Path(path)
    held = read_toml(path)
    if "kind" in held:
        return open_samples(SamplesConfig.from_table(held, str(path), path.parent), split)
    found = [name for name in held if split_name(name) == split_name(split)]
    if not found:
        tables = ", ".join(f"[{name}]" for name in held if isinstance(held[name], dict))
        raise InputError(
            f"{path}: has neither a set of its own (kind, path) nor a table [{split}]; it has "
            f"{tables or 'no table'}: add one, or choose another --split"
        )
    return open_samples(SamplesConfig.read(path, found[0]), split)


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Read the texts that describe classes: a JSON object of label -> text, or list of texts.

    Raises
    ------
    InputError
        The file is missing, or something else is in it.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    prompts = {}
    for label, texts in held.items() if isinstance(held, dict) else [("", None)]:
        several = [texts] if isinstance(texts, str) else texts
        right = isinstance(several, list) and all(isinstance(t, str) and t.strip() for t in several)
        if not right or not several:
            raise InputError(
                f"{path}: must be an object of class to text, or to a list of texts; {label!r} is "
                "not"
            )
        prompts[label] = several
    return prompts


def audible_table(spec: str, embeddings: Embeddings) -> Table:
    """Read which classes of recordings are audible in which class of images.

    Parameters
    ----------
    spec
        ``FILE`` or ``FILE:SET``, as `soundmap.products.audibility.read_tables` takes it, with
        classes of recordings in the place of concepts.
    embeddings
        Whose labels choose the set, where the file has several.

    Raises
    ------
    UsageError
        There is no such file or set.
    InputError
        It cannot be read, or has none of the labels.
    """
    tables, source = read_tables(spec, "")
    known = embeddings.known["image"]
    counts = Counter(
        label for label, has in zip(embeddings.labels, known, strict=True) if has and label
    )
    if not counts:
        raise InputError("no image has a label: --audible is for labelled images")
    return choose_table(tables, counts, source, "the labels of the images")[1]
