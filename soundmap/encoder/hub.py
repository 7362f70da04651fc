"""Fetching published checkpoints, and which models there are on this machine.

Files come through huggingface_hub, into its own cache: it keeps them between programs, takes a
broken connection up where it broke, checks sizes, and heeds ``HF_HOME``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE``. What it does not do is done here: the checksum is compared, and a machine
without a network is told so at once.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soundmap.encoder.card import (
    CARD_FILE,
    ModelCard,
    file_sha256,
    find_model,
    installed_root,
    model_folders,
    models_root,
    read_card,
    verify_files,
)
from soundmap.encoder.published import PUBLISHED, REPOSITORY, Published
from soundmap.encoder.repository import TIMEOUT_S, quiet, reason
from soundmap.errors import MissingExtra, ModelError, OutputError, SoundmapError, UsageError

PAGE = f"https://huggingface.co/{REPOSITORY}"
_SHA256 = re.compile(r"[0-9a-f]{64}")

State = Literal["bundled", "installed", "in a folder", "to be pulled", "damaged"]


@dataclass(frozen=True)
class Entry:
    """A model that there is, here or at the hub."""

    name: str
    state: State
    card: ModelCard | None
    """None where the model is not here, or its card cannot be read."""
    published: Published | None
    """What is known of it where it is one of the published ones."""
    problem: str = ""
    """What is wrong with a damaged one."""


def known_models() -> list[Entry]:
    """List all models: bundled, installed, and published ones that are not here yet."""
    entries = []
    states: tuple[tuple[Path, State], ...] = (
        (models_root(), "bundled"),
        (installed_root(), "installed"),
    )
    for root, state in states:
        for folder in model_folders(root):
            published = PUBLISHED.get(folder.name)
            try:
                entries.append(Entry(folder.name, state, read_card(folder), published))
            except ModelError as error:
                entries.append(Entry(folder.name, "damaged", None, published, str(error)))
    here = {entry.name for entry in entries}
    missing = (model for name, model in PUBLISHED.items() if name not in here)
    return entries + [Entry(model.name, "to be pulled", None, model) for model in missing]


def look_up(name: str) -> Entry:
    """Find a model by name or folder; a published one need not be here.

    Raises
    ------
    UsageError
        There is no such model.
    ModelError
        Its card is damaged.
    """
    if Path(name).is_file():
        raise UsageError(
            f"{name} is a file: `soundmap models convert {name} --out DIR` makes a model of it"
        )
    if name in PUBLISHED and not Path(name).is_dir():
        path = installed_root() / name
        if not (path / CARD_FILE).is_file():
            return Entry(name, "to be pulled", None, PUBLISHED[name])
    card = find_model(name)
    state: State = "in a folder"
    if card.folder.parent in (models_root(), installed_root()):
        state = "bundled" if card.folder.parent == models_root() else "installed"
    return Entry(card.name, state, card, PUBLISHED.get(card.name))


def pull(name: str) -> tuple[ModelCard, bool]:
    """Fetch a published checkpoint, convert it and install the model.

    Parameters
    ----------
    name
        One of `soundmap.encoder.published.PUBLISHED`.

    Returns
    -------
    tuple of ModelCard and bool
        The model, and whether it was fetched now; False if it was here and whole.

    Raises
    ------
    UsageError
        There is no published model of that name.
    MissingExtra
        huggingface_hub is not installed.
    ModelError
        The file cannot be reached, or is not what it should be. The message says why, and how to
        bring it by hand.
    OutputError
        There is no room for it, or the folder of models cannot be written.
    """
    if name not in PUBLISHED:
        raise UsageError(f"{name!r} is not a published model: choose one of {', '.join(PUBLISHED)}")
    model, folder = PUBLISHED[name], installed_root() / name
    if (folder / CARD_FILE).is_file():
        try:
            card = read_card(folder)
            verify_files(card)
            return card, False
        except ModelError:
            pass  # Damaged: fetched and installed again.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder of models {folder.parent} cannot be made ({error.strerror}): set "
            "SOUNDMAP_MODELS to another"
        ) from error
    path = _fetch(model)
    from soundmap.encoder.convert import convert_checkpoint

    report = convert_checkpoint(
        path, folder, name, overwrite=folder.exists(), repository=REPOSITORY
    )
    return report.card, True


def _fetch(model: Published) -> Path:
    """Get a checkpoint from the hub or from the hub's cache, and check it."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "sat2sound", "fetching published models") from error

    cached = hub.try_to_load_from_cache(REPOSITORY, model.file)
    cached = cached if isinstance(cached, str) else None
    timeout_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT_S)
    expected: str | None = None
    with quiet():
        try:
            # Asked for once and without patience. The download itself asks again, but would try
            # for half a minute before it says that there is no network.
            seen = hub.get_hf_file_metadata(
                hub.hf_hub_url(REPOSITORY, model.file), timeout=timeout_s
            )
            expected = seen.etag
            if not cached and seen.size:
                _check_room(Path(HF_HUB_CACHE), seen.size)
            path = Path(hub.hf_hub_download(REPOSITORY, model.file, etag_timeout=timeout_s))
        except SoundmapError:
            raise
        except Exception as error:
            # What was fetched before is as good, whatever keeps the hub from answering.
            if not cached:
                raise ModelError(_explain(model, error)) from error
            path = Path(cached)
    # The cache calls large files by their checksum.
    expected = expected or path.resolve().name
    if _SHA256.fullmatch(expected) and file_sha256(path) != expected:
        for damaged in {path, path.resolve()}:
            damaged.unlink(missing_ok=True)
        raise ModelError(
            f"{model.file} came damaged from the hub (its checksum is wrong) and was removed: pull "
            "it again"
        )
    return path


def _check_room(cache: Path, size: int) -> None:
    folder = next(parent for parent in (cache, *cache.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"the checkpoint takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free in "
            f"{folder}: make room, or set HF_HOME to a folder on another disk"
        )


def _explain(model: Published, error: Exception) -> str:
    """Say why a checkpoint could not be fetched, and how to bring it by hand."""
    name = model.file.rpartition("/")[2]
    return (
        f"{model.name} could not be fetched: {reason(error, REPOSITORY)}. By hand: fetch "
        f"{model.file} from {PAGE} on any machine, then `soundmap models convert {name} --out DIR` "
        "and --model DIR"
    )
