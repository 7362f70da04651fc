"""The store of a run that is under way.

Here, it stands hidden beside its target and is renamed, or exported, once the map is whole. An
object store has no renaming: there it stands under its own name, and ``.soundmap/`` in it says that
it is not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soundmap.errors import InputError, OutputError, PlanMismatch, SoundmapError
from soundmap.stores import place
from soundmap.stores.geotiff import export_cog, publish_style, scratch_path
from soundmap.stores.info import describe
from soundmap.stores.ledger import PRIVATE
from soundmap.stores.lock import RunLock, one_at_a_time
from soundmap.stores.place import Location
from soundmap.stores.schema import MapSchema
from soundmap.stores.target import aside_path, check_target, publish
from soundmap.stores.zarr_store import ROOT_FILES, ZarrStore, create, open_store

# Extra fact of a map that holds all settings of its run, as JSON.
SETTINGS = "settings"
# Longer values of settings, hashes most of all, tell a reader nothing.
_LONGEST_SHOWN = 32


@dataclass(frozen=True)
class Work:
    """What a run is to make."""

    schema: MapSchema
    """What the map will hold."""
    units_shape: tuple[int, int]
    """Rows and columns of units."""
    shards: bool = False
    """Zarr v3, a shard for each unit."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, as JSON can hold it."""


def work_path(target: Location) -> Location:
    """Where a run keeps its store until the map is whole."""
    if not isinstance(target, Path):
        return target
    return target.with_name(f".{target.name}.part.zarr")


def target_of(path: Location) -> Location:
    """Tell of which map a path speaks: its own, or that of a run's store."""
    if isinstance(path, Path) and path.name.startswith(".") and path.name.endswith(".part.zarr"):
        return path.with_name(path.name.removeprefix(".").removesuffix(".part.zarr"))
    return path


def is_unfinished(target: Location) -> bool:
    """Tell whether a run was begun on a target and has not ended."""
    store = work_path(target)
    return store.exists() if isinstance(store, Path) else PRIVATE in place.names_in(store)


@contextlib.contextmanager
def begin(target: str | Path, work: Work, overwrite: bool) -> Iterator[ZarrStore]:
    """Create the store of a run, or go on with the one that a stopped run left.

    Nobody else can begin on the same target until the context ends, for any reason.

    Parameters
    ----------
    target
        The map to be.
    work
        What is to be made.
    overwrite
        Whether a run with other settings may be thrown away.

    Raises
    ------
    PlanMismatch
        A stopped run has other settings; the message names them.
    OutputError
        The store cannot be made, or another run is writing it.
    """
    location = place.located(target)
    path = work_path(location)
    with contextlib.ExitStack() as stack:
        with place.writing(location), one_at_a_time(path):
            lock = stack.enter_context(RunLock(path, location))
            _clear_gone(path)
            store = _go_on(location, work, overwrite)
            if store is None:
                # At an address, a finished map stands where the work would.
                check_target(location, overwrite or isinstance(path, Path))
                discard(path)
                lock.release()
                store = _create(location, work)
                stack.enter_context(RunLock(path, location))
        ledger = store.ledger()
        try:
            yield store
        finally:
            # Its last seconds of pace are not worth a second error.
            with contextlib.suppress(*place.storage_errors()):
                if not store.settled():
                    ledger.save()


def _go_on(target: Location, work: Work, overwrite: bool) -> ZarrStore | None:
    """Open what a stopped run left; None where all is to be begun anew."""
    if not is_unfinished(target):
        return None
    path = work_path(target)
    try:
        store = open_store(path, "r+")
    except InputError as error:
        # Without these files, it was killed while it was being made, and holds nothing yet.
        if overwrite or not set(ROOT_FILES) & set(place.names_in(path)):
            return None
        raise OutputError(
            f"{target}: an unfinished run is here that cannot be read ({error}): try again, or add "
            "--overwrite to start anew"
        ) from error
    if store.schema.fingerprint == work.schema.fingerprint:
        return store
    if not overwrite:
        raise PlanMismatch(
            f"{target}: an unfinished run is here with another "
            f"{', '.join(_differences(store.schema, work.schema))}: repeat its settings to finish "
            f"it (`soundmap predict {target}` does), or add --overwrite to start anew"
        )
    return None


def _create(target: Location, work: Work) -> ZarrStore:
    scratch = check_target(target, overwrite=True) == "geotiff"
    return create(
        work_path(target),
        work.schema,
        work.units_shape,
        scratch=scratch,
        shards=work.shards,
        job=work.job,
    )


def _differences(old: MapSchema, new: MapSchema) -> list[str]:
    before, after = (json.loads(s.extra.get(SETTINGS, "{}")) for s in (old, new))
    keys = sorted(set(before) | set(after))
    named = []
    for key in keys:
        was, now = str(before.get(key, "none")), str(after.get(key, "none"))
        if was == now:
            continue
        short = max(len(was), len(now)) <= _LONGEST_SHOWN
        named.append(f"{key} ({was} there, {now} now)" if short else key)
    return named or ["setting"]


def complete(store: ZarrStore, target: str | Path, overwrite: bool) -> None:
    """Turn a run's store into the map: exported as GeoTIFF, renamed, or declared finished.

    May be repeated after a kill at any moment.

    Raises
    ------
    OutputError
        The target cannot be written.
    """
    location = place.located(target)
    if isinstance(location, Path) and check_target(location, overwrite=True) == "geotiff":
        # Its status goes with the store, so that nobody begins on it meanwhile.
        store.finish(keep_status=True)
        export_cog(store, location, overwrite=overwrite)
        discard(store.path)
        return
    with one_at_a_time(store.path):
        store.finish()
        if isinstance(location, Path):
            assert isinstance(store.path, Path)
            publish(store.path, location, overwrite)


def tidy(target: str | Path) -> None:
    """Remove what a run left that was killed after its map was in place.

    Nothing goes that another run holds, and nothing that was not made for the map as it is.
    """
    location = place.located(target)
    if not isinstance(location, Path) or not location.exists():
        return
    path = work_path(location)
    with one_at_a_time(path), contextlib.suppress(SoundmapError, OSError), RunLock(path, location):
        place.remove(aside_path(location))
        _clear_gone(path)
        if not is_unfinished(location):
            return
        there, left = describe(location), open_store(path).schema
        if (there.fingerprint, there.created) == (left.fingerprint, left.created):
            publish_style(location)
            place.remove(scratch_path(location))
            discard(path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for a map that is kept in memory alone; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="soundmap-") as folder:
        yield Path(folder)


def discard(path: Location) -> None:
    """Remove a run's store, as far as storage lets us.

    Killed on the way, it leaves nothing that could be taken for a store: half of the chunks with
    all of the status would be a map with holes.
    """
    with contextlib.suppress(*place.storage_errors()):
        if isinstance(path, Path):
            _clear_gone(path)
            os.rename(path, _gone(path))
            _clear_gone(path)
            return
        names = place.names_in(path)
        if not names:
            return
        # Not finished from here on, and not to be opened either.
        place.write_bytes(place.child(path, PRIVATE, "discarded"), b"")
        for name in ROOT_FILES:
            place.remove_file(place.child(path, name))
        for name in names:
            if name != PRIVATE:
                place.remove(place.child(path, name))
        place.remove(place.child(path, PRIVATE))


def _gone(path: Path) -> Path:
    return path.with_name(f"{path.name}.gone")


def _clear_gone(path: Location) -> None:
    """Remove the rest of a store that was being removed when its run was killed."""
    if isinstance(path, Path):
        shutil.rmtree(_gone(path), ignore_errors=True)


def check_room(target: str | Path, bytes_out: int) -> None:
    """Refuse a run whose map would not fit the disk. Object stores are taken to have room.

    Parameters
    ----------
    target
        The map to be.
    bytes_out
        What is still to be written, before compression.

    Raises
    ------
    OutputError
        Less is free than that.
    """
    location = place.located(target)
    if not isinstance(location, Path):
        return
    free = shutil.disk_usage(location.absolute().parent).free
    if bytes_out > free:
        raise OutputError(
            f"{target}: the map takes up to {bytes_out / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free there: map fewer concepts or a smaller region, or use --dtype uint8"
        )
