from __future__ import annotations

import os
import stat

import pytest

from soundmap.errors import OutputError
from soundmap.stores import target as module
from soundmap.stores.target import check_target, publish


@pytest.fixture
def store(tmp_path):
    def make(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zgroup").write_text(text)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.tif", "geotiff"), ("a.TIFF", "geotiff"), ("a.zarr", "zarr")],
)
def test_kind_follows_the_suffix(tmp_path, name, kind):
    assert check_target(tmp_path / name) == kind
    assert not list(tmp_path.iterdir())


def test_a_bare_name_is_a_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_target("a.tif") == "geotiff"


@pytest.mark.parametrize("name", ["a.png", "a", "a.tif.gz"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(OutputError, match=r"\.tif \(GeoTIFF\) or \.zarr \(Zarr\)"):
        check_target(tmp_path / name)


def test_folders_must_be_there_and_writable(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="does not exist"):
        check_target(tmp_path / "missing" / "a.tif")
    for other in ("gs://bucket/a.zarr", "https://example.org/a.zarr"):
        with pytest.raises(OutputError, match="local folders and to s3://"):
            check_target(other)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        check_target(tmp_path / "a.tif")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="cannot write"):
        check_target(folder / "a.tif")


def test_what_exists_is_replaced_only_on_request(tmp_path, store):
    (tmp_path / "a.tif").write_text("old")
    store("a.zarr", "old")
    for name in ("a.tif", "a.zarr"):
        with pytest.raises(OutputError, match="--overwrite"):
            check_target(tmp_path / name)
        assert check_target(tmp_path / name, overwrite=True)


def test_what_is_no_map_is_never_replaced(tmp_path):
    (tmp_path / "a.tif").mkdir()
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("years of work")
    for name in ("a.tif", "a.zarr"):
        with pytest.raises(OutputError, match="choose another name"):
            check_target(tmp_path / name, overwrite=True)


def test_publish_puts_files_and_folders_in_place(tmp_path, store):
    for old, new in (("new", "a.zarr"), ("newer", "a.zarr")):
        publish(store(old, old), tmp_path / new, overwrite=True)
        assert (tmp_path / new / ".zgroup").read_text() == old
    for old in ("new.tif", "newer.tif"):
        (tmp_path / old).write_text(old)
        publish(tmp_path / old, tmp_path / "a.tif", overwrite=True)
        assert (tmp_path / "a.tif").read_text() == old
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tif", "a.zarr"]


def test_publish_clears_what_a_killed_run_left(tmp_path, store):
    store(".a.zarr.old", "oldest")
    publish(store("new", "new"), tmp_path / "a.zarr")
    store(".a.zarr.old", "oldest")
    publish(store("new", "newer"), tmp_path / "a.zarr", overwrite=True)
    assert (tmp_path / "a.zarr" / ".zgroup").read_text() == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zarr"]


def test_publish_keeps_the_old_map_without_overwrite(tmp_path, store):
    store("a.zarr", "old")
    with pytest.raises(OutputError, match="exists already"):
        publish(store("new", "new"), tmp_path / "a.zarr")
    assert (tmp_path / "a.zarr" / ".zgroup").read_text() == "old"


def test_publish_puts_the_old_map_back_when_it_fails(tmp_path, store, monkeypatch):
    target, made = store("a.zarr", "old"), store("new", "new")
    rename = os.rename

    def fail_once(source, destination):
        if os.fspath(source) == os.fspath(made):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(module.os, "rename", fail_once)
    with pytest.raises(OutputError, match="No space left on device"):
        publish(made, target, overwrite=True)
    assert (target / ".zgroup").read_text() == "old"
    assert (made / ".zgroup").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zarr", "new"]
