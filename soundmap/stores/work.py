"""The store of a run that is under way: beside its target, until the map is whole."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from soundmap.errors import OutputError, PlanMismatch, SoundmapError
from soundmap.stores.geotiff import export_cog
from soundmap.stores.schema import MapSchema
from soundmap.stores.target import check_target, publish
from soundmap.stores.zarr_store import ZarrStore, create, open_store

# Extra fact of a map that holds all settings of its run, as JSON.
SETTINGS = "settings"


def work_path(target: Path) -> Path:
    """Where a run keeps its store until the map is whole: hidden, beside the target."""
    return target.with_name(f".{target.name}.part.zarr")


def begin(
    target: Path, schema: MapSchema, units_shape: tuple[int, int], overwrite: bool
) -> ZarrStore:
    """Create the store of a run, or go on with the one that a stopped run left.

    Parameters
    ----------
    target
        The map to be.
    schema
        What it will hold.
    units_shape
        Rows and columns of units.
    overwrite
        Whether a run with other settings may be thrown away.

    Raises
    ------
    PlanMismatch
        A stopped run has other settings; the message names them.
    OutputError
        The store cannot be made.
    """
    path = work_path(target)
    if path.exists():
        try:
            store = open_store(path, "r+")
        except SoundmapError:
            store = None
        if store is not None and store.schema.fingerprint == schema.fingerprint:
            return store
        if store is not None and not overwrite:
            raise PlanMismatch(
                f"{target}: an unfinished run is here with another "
                f"{', '.join(_differences(store.schema, schema))}: repeat its settings to finish "
                "it, or add --overwrite to start anew"
            )
        discard(path)
    scratch = check_target(target, overwrite=True) == "geotiff"
    return create(path, schema, units_shape, scratch=scratch)


def _differences(old: MapSchema, new: MapSchema) -> list[str]:
    before, after = (json.loads(s.extra.get(SETTINGS, "{}")) for s in (old, new))
    keys = sorted(set(before) | set(after))
    return [key for key in keys if before.get(key) != after.get(key)] or ["setting"]


def complete(store: ZarrStore, target: Path, overwrite: bool) -> None:
    """Turn a run's store into the map: exported as GeoTIFF, or renamed.

    Raises
    ------
    OutputError
        The target cannot be written.
    """
    store.finish()
    if check_target(target, overwrite=True) == "geotiff":
        export_cog(store, target, overwrite=overwrite)
        discard(store.path)
    else:
        publish(store.path, target, overwrite)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give a folder for a map that is kept in memory alone; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="soundmap-") as folder:
        yield Path(folder)


def discard(path: Path) -> None:
    """Remove a run's store."""
    shutil.rmtree(path, ignore_errors=True)


def check_room(target: Path, bytes_out: int) -> None:
    """Refuse a run whose map would not fit the disk.

    Raises
    ------
    OutputError
        Less is free than the map takes before compression.
    """
    free = shutil.disk_usage(target.absolute().parent).free
    if bytes_out > free:
        raise OutputError(
            f"{target}: the map takes up to {bytes_out / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free there: map fewer concepts or a smaller region, or use --dtype uint8"
        )
