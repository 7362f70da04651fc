"""Published checkpoints: read without running anything, and converted whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from soundmap.encoder.checkpoint import read_checkpoint
from soundmap.encoder.convert import _folder, convert_checkpoint
from soundmap.errors import ModelError, OutputError, UsageError
from tests.unit.messages import one_line


class Spy:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"echo was here > {self.mark}",)


def save(path: Path, **content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint that can be read, with the tables that trainers add."""
    return save(
        tmp_path / "whole.ckpt",
        epoch=19,
        state_dict={"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
        hyper_parameters={"sat_type": "bingmap", "sizes": (1, 2), "config": None},
        callbacks={"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.ones(())}},
        optimizer_states=[{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        loops={"fit_loop": {"state_dict": {}}},
    )


class TestReading:
    def test_what_is_in_it(self, whole: Path) -> None:
        checkpoint = read_checkpoint(whole)
        assert set(checkpoint.state) == {"a", "b"}
        assert torch.equal(checkpoint.state["a"], torch.arange(6.0).view(2, 3))
        assert checkpoint.hyper_parameters["sat_type"] == "bingmap"
        assert checkpoint.path == whole
        assert len(checkpoint.sha256) == 64

    @pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "callbacks", "whole"])
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_code_is_refused_and_not_run(self, tmp_path: Path, place: str, protocol: int) -> None:
        mark, path = tmp_path / "mark", tmp_path / "evil.ckpt"
        content: Any = {
            "state_dict": {"a": torch.zeros(1)},
            "hyper_parameters": {"sat_type": "bingmap"},
        }
        content = Spy(mark) if place == "whole" else content | {place: {"a": Spy(mark)}}
        torch.save(content, path, pickle_protocol=protocol)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(path)
        one_line(caught, "evil.ckpt", "refused and none of it was run")
        if protocol == 2:
            one_line(caught, "system")
        assert not mark.exists()
        # It is the refusal that saved us: read the ordinary way, this file does run its code.
        torch.load(path, weights_only=False)
        assert mark.exists()

    @pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
    def test_a_bare_pickle_is_refused_and_not_run(self, tmp_path: Path, protocol: int) -> None:
        mark, path = tmp_path / "mark", tmp_path / "evil.ckpt"
        path.write_bytes(pickle.dumps(Spy(mark), protocol))
        with pytest.raises(ModelError) as caught:
            read_checkpoint(path)
        one_line(caught, "none of it was run" if protocol > 1 else "not a checkpoint")
        assert not mark.exists()

    def test_an_environment_variable_does_not_lift_the_restriction(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        path = save(tmp_path / "evil.ckpt", state_dict=Spy(tmp_path / "mark"))
        with pytest.raises(ModelError, match="holds code"):
            read_checkpoint(path)
        assert not (tmp_path / "mark").exists()

    def test_names_of_code_cannot_steer_the_terminal(self, tmp_path: Path) -> None:
        path = tmp_path / "evil.ckpt"
        torch.save({"state_dict": {}}, path)
        name = b"c\x1b[2Jos\nsystem\n."
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as other:
            for entry in archive.infolist():
                data = archive.read(entry)
                inside = b"\x80\x02" + name if entry.filename.endswith("data.pkl") else data
                other.writestr(entry.filename, inside)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(tmp_path / "b.ckpt")
        one_line(caught, "b.ckpt", "system")

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_cut_short(self, whole: Path, share: float) -> None:
        data = whole.read_bytes()
        whole.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelError) as caught:
            read_checkpoint(whole)
        one_line(caught, "whole.ckpt", "cut short or damaged", "fetch it again")

    def test_a_flipped_bit(self, whole: Path) -> None:
        data = bytearray(whole.read_bytes())
        place = data.index(torch.arange(6.0).numpy().tobytes())
        data[place + 5] ^= 1
        whole.write_bytes(data)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(whole)
        one_line(caught, "whole.ckpt", "damaged", "checksum")

    @pytest.mark.parametrize(
        ("name", "content", "about"),
        [
            ("empty.ckpt", b"", "is empty"),
            ("picture.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
            ("page.ckpt", b"<!doctype html><title>404</title>", "is not a checkpoint"),
        ],
    )
    def test_something_else(self, tmp_path: Path, name: str, content: bytes, about: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(tmp_path / name)
        one_line(caught, name, about)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_another_archive(self, tmp_path: Path, compression: int) -> None:
        path = tmp_path / "papers.ckpt"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("paper.txt", "text" * 100)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(path)
        one_line(caught, "papers.ckpt", "zip archive, but not a checkpoint")

    def test_nothing_there(self, tmp_path: Path) -> None:
        for path, about in ((tmp_path / "a.ckpt", "does not exist"), (tmp_path, "is a folder")):
            with pytest.raises(UsageError) as caught:
                read_checkpoint(path)
            one_line(caught, str(path), about)

    def test_a_model_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.json").write_text("{}")
        with pytest.raises(UsageError, match="is a model folder already"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("content", "about"),
        [
            (torch.zeros(3), "holds a Tensor"),
            ([1, 2], "holds a list"),
            ({"blocks.0.weight": torch.zeros(3)}, "has no state_dict (it has blocks.0.weight)"),
            ({"model": {}, "epoch": 3}, "has no state_dict (it has model, epoch)"),
            ({}, "has no state_dict (it has nothing)"),
            ({"state_dict": {"a": torch.zeros(1)}}, "has no hyper_parameters"),
            ({"state_dict": {}, "hyper_parameters": {}}, "state_dict is empty"),
            ({"state_dict": [], "hyper_parameters": {}}, "state_dict is a list"),
            (
                {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": "x"},
                "hyper_parameters is a str",
            ),
            (
                {"state_dict": {"a": torch.zeros(1), "b": 3.0}, "hyper_parameters": {}},
                "1 of 2 entries of its state_dict are not plain tensors (b)",
            ),
            (
                {"state_dict": {5: torch.zeros(1)}, "hyper_parameters": {}},
                "not plain tensors (5)",
            ),
            (
                {"state_dict": {"a": torch.zeros(2).to_sparse()}, "hyper_parameters": {}},
                "not plain tensors (a)",
            ),
            (
                {"state_dict": {"a": torch.zeros(2, device="meta")}, "hyper_parameters": {}},
                "not plain tensors (a)",
            ),
        ],
    )
    def test_not_a_lightning_checkpoint(self, tmp_path: Path, content: Any, about: str) -> None:
        path = tmp_path / "other.ckpt"
        torch.save(content, path)
        with pytest.raises(ModelError) as caught:
            read_checkpoint(path)
        one_line(caught, "other.ckpt", about)


class TestTarget:
    """What is refused before the checkpoint is even read."""

    def test_refused(self, tmp_path: Path, whole: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "diary.txt").touch()
        for out, overwrite, about in (
            ("away/model", False, "does not exist"),
            ("file", False, "exists already"),
            ("file", True, "is not a model folder"),
            ("notes", False, "exists already: add --overwrite"),
            ("notes", True, "is not a model folder"),
        ):
            with pytest.raises(OutputError) as caught:
                convert_checkpoint(whole, tmp_path / out, overwrite=overwrite)
            one_line(caught, out, about)
        assert (tmp_path / "notes" / "diary.txt").exists()

    def test_the_checkpoint_is_not_deleted_with_what_is_replaced(self, whole: Path) -> None:
        (whole.parent / "model.json").write_text("{}")
        with pytest.raises(OutputError, match="holds the checkpoint itself"):
            convert_checkpoint(whole, whole.parent, overwrite=True)
        assert whole.exists()

    @pytest.mark.parametrize("name", ["", "a/b", "a\nb", "..", " a", "x" * 200])
    def test_name(self, tmp_path: Path, whole: Path, name: str) -> None:
        with pytest.raises(UsageError, match="cannot be a model's name"):
            convert_checkpoint(whole, tmp_path / "model", name)

    @pytest.mark.parametrize("name", ["no/such/folder", "./flan", "/flan", ""])
    def test_text_encoder(self, tmp_path: Path, whole: Path, name: str) -> None:
        with pytest.raises(UsageError, match="--text-encoder"):
            convert_checkpoint(whole, tmp_path / "model", text_encoder=name)

    def test_a_failure_leaves_nothing(self, tmp_path: Path, whole: Path) -> None:
        before = set(tmp_path.iterdir())
        with pytest.raises(ModelError):
            convert_checkpoint(whole, tmp_path / "model")
        assert set(tmp_path.iterdir()) == before


def replace_by(out: Path, name: str, error: BaseException | None = None) -> None:
    """Write a folder of one file over another, or break off with an error."""
    with _folder(out, 0, overwrite=True) as folder:
        (folder / name).write_text(name)
        if error is not None:
            raise error


class TestFolder:
    """The folder is written beside its place and renamed."""

    def test_whole_or_not_at_all(self, tmp_path: Path) -> None:
        out = tmp_path / "model"
        with _folder(out, 0, overwrite=False) as folder:
            (folder / "a").write_text("a")
            assert not out.exists()
        assert (out / "a").read_text() == "a"
        with pytest.raises(KeyboardInterrupt):
            replace_by(out, "b", KeyboardInterrupt())
        assert [p.name for p in out.iterdir()] == ["a"]
        replace_by(out, "b")
        assert [p.name for p in out.iterdir()] == ["b"]
        assert list(tmp_path.iterdir()) == [out]

    def test_who_is_first_stays(self, tmp_path: Path) -> None:
        out = tmp_path / "model"
        writing = _folder(out, 0, overwrite=False)
        writing.__enter__()
        replace_by(out, "another program's")
        with pytest.raises(OutputError, match="exists already"):
            writing.__exit__(None, None, None)
        assert (out / "another program's").exists()
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), SafetensorError("No space left")]
    )
    def test_a_full_disk(self, tmp_path: Path, error: Exception) -> None:
        with pytest.raises(OutputError) as caught:
            replace_by(tmp_path / "model", "a", error)
        one_line(caught, "model", "No space left")
        assert not list(tmp_path.iterdir())

    def test_too_little_room(self, tmp_path: Path) -> None:
        writing = _folder(tmp_path / "model", 10**18, overwrite=False)
        with pytest.raises(OutputError, match=r"takes 1000000000\.00 GB"):
            writing.__enter__()
        assert not list(tmp_path.iterdir())

    def test_what_a_killed_conversion_left_is_cleared(self, tmp_path: Path) -> None:
        old, fresh, other = (
            tmp_path / name for name in (".model.aa.part", ".model.bb.part", ".models.cc.part")
        )
        for folder in (old, fresh, other):
            folder.mkdir()
        for folder in (old, other):
            os.utime(folder, (1, 1))
        with _folder(tmp_path / "model", 0, overwrite=False):
            pass
        assert {p for p in tmp_path.iterdir()} == {tmp_path / "model", fresh, other}
