"""A run that is killed while its map is put in place, at any change of a file."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import soundmap
from soundmap.stores.schema import MapSchema
from soundmap.stores.target import check_target
from soundmap.stores.work import Work, begin, complete, is_unfinished, tidy
from soundmap.stores.zarr_store import Status
from soundmap.testing.fake_map import fake_schema

OLD = replace(fake_schema(), fingerprint="old")
NEW = replace(OLD, fingerprint="new", created="2026-02-03T04:05:06+00:00")
UNITS = (1, 1)
# One moment of so many is tried, another one each time: all of them take half a minute.
STEP = 6

# Forks before anything has started a thread, so that each child is as a program of its own.
_KILLER = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from soundmap.stores.geotiff import export_cog
from soundmap.stores.work import complete, work_path
from soundmap.stores.zarr_store import open_store

prepared, name, first, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def end(target, at):
    count = 0
    def counted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call
    for change in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(os, change, counted(getattr(os, change)))
    complete(open_store(work_path(target), "r+"), target, overwrite=True)
    os._exit(0)

for at in itertools.count(first, step):
    folder = prepared.with_name(f"killed-{at:03}")
    shutil.copytree(prepared, folder)
    child = os.fork()
    if not child:
        try:
            end(folder / name, at)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([str(folder), status]), flush=True)
    if not status:
        break
"""


def make(target: Path, schema: MapSchema, value: float, *, ends: bool) -> None:
    with begin(target, Work(schema, UNITS), overwrite=True) as store:
        store.write(0, 0, np.full(schema.shape, value, np.float32))
        store.mark((0, 0), Status.DONE)
        if ends:
            complete(store, target, overwrite=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_killed_at_any_change_of_a_file(tmp_path: Path, project: Path, name: str) -> None:
    seed = int(os.environ.get("SOUNDMAP_TEST_SEED") or random.randrange(1000))
    print(f"SOUNDMAP_TEST_SEED={seed}")
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    make(prepared / name, OLD, 0.25, ends=True)
    make(prepared / name, NEW, 0.5, ends=False)
    told = subprocess.run(
        [sys.executable, "-c", _KILLER, str(prepared), name, str(1 + seed % STEP), str(STEP)],
        cwd=project,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ends = [json.loads(line) for line in told.stdout.splitlines()]
    assert [status for _, status in ends[-1:]] == [0]
    assert {status for _, status in ends[:-1]} == {9}
    # Attributes, statistics, the marker, what the run noted, the rename or the export.
    assert len(ends) > 8, f"{len(ends) - 1} kills"

    for folder, status in ends:
        target = Path(folder) / name
        # The old map or the new one, whole; in place of a folder there may be neither for a
        # moment, since a folder cannot be replaced in one step.
        if name == "map.tif" or target.exists():
            assert soundmap.open(target)["probability"].to_numpy().max() in (0.25, 0.5)
        else:
            assert is_unfinished(target)
        # The same command again.
        tidy(target)
        if is_unfinished(target):
            check_target(target, overwrite=True)
            with begin(target, Work(NEW, UNITS), overwrite=True) as store:
                assert (store.status() == Status.DONE).all(), folder
                complete(store, target, overwrite=True)
        assert (soundmap.open(target)["probability"].to_numpy() == 0.5).all(), folder
        assert {entry.name for entry in Path(folder).iterdir()} <= {name, "map.qml"}
        assert not status or name == "map.zarr" or (Path(folder) / "map.qml").exists()
        shutil.rmtree(folder)
