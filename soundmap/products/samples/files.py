"""Which files belong to a split."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

from soundmap.errors import InputError
from soundmap.products.samples.config import SamplesConfig, split_name

_USUAL = frozenset({"train", "training", "validation", "val", "valid", "dev", "test"})
_MAGIC = re.compile(r"[*?\[]")


def split_files(config: SamplesConfig, split: str, suffixes: Collection[str]) -> list[Path]:
    """Find the files of a split.

    Files that the configuration names are taken as they are. Of a folder or pattern, those are
    taken whose name, or whose folder's name, holds the name of the split as a word of its own; if
    no file's does hold any, all are taken.

    Parameters
    ----------
    config
        Its ``path`` and ``splits`` are used.
    split
        The split that is asked for.
    suffixes
        Of the files that count in a folder, with the dot, in lower case.

    Raises
    ------
    InputError
        There is no such file, or none of this split.
    """
    roots = [config.base / Path(path).expanduser() for path in config.path]
    names = config.names_of(split)
    if config.says(split) and any(is_file_like(name, suffixes) for name in names):
        start = roots[0] if roots[0].is_dir() else config.base
        return [file for name in names for file in _expand(config, start / name, suffixes)[0]]
    files: list[Path] = []
    fixed: list[Path] = []
    for root in roots:
        found, is_choice = _expand(config, root, suffixes)
        (files if is_choice else fixed).extend(found)
    return fixed + (_of_split(config, split, files, roots[0]) if files else [])


def is_file_like(name: str, suffixes: Collection[str]) -> bool:
    """Tell names of files and patterns from names of splits."""
    return bool(_MAGIC.search(name)) or PurePath(name).suffix.lower() in suffixes


def _expand(
    config: SamplesConfig, path: Path, suffixes: Collection[str]
) -> tuple[list[Path], bool]:
    """List what a path stands for, and tell whether there was a choice."""
    if path.is_file():
        return [path], False
    if path.is_dir():
        found = [f for f in path.rglob("*") if f.suffix.lower() in suffixes and f.is_file()]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
    if not found:
        kinds = ", ".join(suffixes)
        what = f"{path} holds no file ({kinds})" if path.is_dir() else f"{path} does not exist"
        raise InputError(f"{config.where}, path: {what}")
    return sorted(found), True


def _words(file: Path, root: Path) -> set[str]:
    """Words of a file's name and of the folders below the root that it is in."""
    inner = file.relative_to(root) if root in file.parents else PurePath(file.name)
    # Whatever stands before the first dot: what follows are suffixes, and names of shards.
    return {word for part in inner.parts for word in re.split(r"[^a-z0-9]+", part.lower())}


def _of_split(config: SamplesConfig, split: str, files: list[Path], root: Path) -> list[Path]:
    wanted = {split_name(name) for name in config.names_of(split)}
    words = {file: {split_name(word) for word in _words(file, root)} for file in files}
    chosen = [file for file in files if words[file] & wanted]
    if chosen:
        return chosen
    known = {split_name(name) for name in _USUAL}
    there = sorted({word for found in words.values() for word in found} & known)
    if there or config.says(split):
        raise no_split(config, split, there)
    return files


def no_split(config: SamplesConfig, split: str, there: Iterable[str]) -> InputError:
    """Say that a set lacks a split."""
    have = ", ".join(sorted(there)) or "none that it names"
    return InputError(
        f"{config.where}: {config.title} has no split {' or '.join(config.names_of(split))!r} "
        f"(it has {have}): say which it is under splits"
    )
