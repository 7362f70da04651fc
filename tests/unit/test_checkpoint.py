"""Published checkpoints: read without running anything, and mapped without guessing anything."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soundmap.encoder.card import read_card, verify_files
from soundmap.encoder.checkpoint import Checkpoint, read_checkpoint
from soundmap.encoder.convert import _folder, convert_checkpoint, read_settings
from soundmap.encoder.mapping import (
    TOWER,
    UNUSED,
    constants,
    map_state,
    published_name,
    published_shapes,
)
from soundmap.encoder.torch_encoder import model_config
from soundmap.errors import ModelError, OutputError, SoundmapError, UsageError
from soundmap.nn.model import ModelConfig, SoundModel

FIELDS = ("asource", "tsource", "latlong", "month", "time")
SETTINGS: dict[str, Any] = {
    "sat_type": "bingmap",
    "dataset_type": "GeoSound",
    "metadata_type": "latlong_month_time_asource_tsource",
    "sat_input_size": 224,
    "fc_dim": 1024,
    "codebook_dim": 1024,
    "codebook_size": 16000,
}
CODES = "fdt.space_dict"
QKV = f"{TOWER}layers.0.blocks.1.attn.qkv.weight"


def one_line(caught: pytest.ExceptionInfo[SoundmapError], *about: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    for text in about:
        assert text in message


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


@pytest.fixture(scope="module")
def hollow() -> Checkpoint:
    """All keys of a checkpoint with metadata; a weight is one number repeated and takes no room."""
    config = ModelConfig(metadata=FIELDS)
    shapes = published_shapes(config)
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    counter = f"{TOWER}bn0.num_batches_tracked"
    return Checkpoint(
        Path("hollow.ckpt"),
        state | constants() | {counter: torch.tensor(7)},
        SETTINGS,
        "0" * 64,
    )


def changed(checkpoint: Checkpoint, **settings: Any) -> Checkpoint:
    return replace(checkpoint, hyper_parameters=checkpoint.hyper_parameters | settings)


def with_state(checkpoint: Checkpoint, state: dict[str, Tensor]) -> Checkpoint:
    return replace(checkpoint, state=dict(checkpoint.state) | state)


def without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    kept = {k: v for k, v in checkpoint.state.items() if not k.startswith(names)}
    return replace(checkpoint, state=kept)


def convert(checkpoint: Checkpoint) -> Any:
    return map_state(checkpoint, model_config(read_settings(checkpoint).architecture | NO_SOUND))


NO_SOUND = {"audio": False}
FUSER = "sat_encoder.meta_fuser."


class TestSettings:
    def test_as_published(self, hollow: Checkpoint) -> None:
        settings = read_settings(hollow)
        assert settings.fields == FIELDS
        assert settings.imagery.native_px == 300
        assert (settings.token_dim, settings.dim, settings.codes) == (1024, 1024, 16000)
        config = model_config(settings.architecture)
        assert config == ModelConfig(metadata=FIELDS, audio=True)

    def test_numbers_may_be_text(self, hollow: Checkpoint) -> None:
        text = changed(hollow, fc_dim="1024", codebook_size="16000", sat_input_size="224")
        assert read_settings(text) == read_settings(hollow)

    @pytest.mark.parametrize(
        ("text", "fields"),
        [
            ("latlong_month_time_tsource", ("tsource", "latlong", "month", "time")),
            ("time_month", ("month", "time")),
            ("asource", ("asource",)),
        ],
    )
    def test_fields_are_parts_of_the_text_in_a_fixed_order(
        self, hollow: Checkpoint, text: str, fields: tuple[str, ...]
    ) -> None:
        assert read_settings(changed(hollow, metadata_type=text)).fields == fields

    def test_unknown_names_are_harmless(self, hollow: Checkpoint) -> None:
        older = changed(
            hollow,
            metadata_fusion="early",
            text_qmap=1,
            use_combined_projectors=0,
            shared_codebook=1,
            text_encoder_type="flant5",
            audio_encoder_type="mgaclap",
            precision="full",
            jsd_weight=0.0,
            never_heard_of="x",
        )
        assert read_settings(older) == read_settings(hollow)

    @pytest.mark.parametrize(
        ("key", "value", "about"),
        [
            ("metadata_fusion", "late", "after the codebook"),
            ("text_qmap", 0, "without a query map"),
            ("text_qmap", "0", "without a query map"),
            ("text_qmap", False, "without a query map"),
            ("use_combined_projectors", 1, "share a projector"),
            ("use_combined_projectors", "1", "share a projector"),
            ("shared_codebook", 0, "codebook of its own"),
            ("text_encoder_type", "clip", "it runs flant5"),
            ("audio_encoder_type", "laion", "it runs mgaclap"),
            ("sat_input_size", 512, "it runs 224"),
            ("sat_type", "planet", "bingmap, sentinel, googleEarth"),
            ("metadata_type", "elevation", "asource, tsource, latlong, month, time"),
            ("metadata_type", "none", "hold a metadata fuser (50 keys)"),
            ("fc_dim", 1020, "multiple of 8"),
            ("fc_dim", -8, "positive whole number"),
            ("codebook_dim", "wide", "positive whole number"),
            ("codebook_size", 0, "positive whole number"),
            ("codebook_size", 10**12, "positive whole number"),
            ("sat_type", "x\x1b[2J\n" * 50, "sat_type"),
        ],
    )
    def test_refused(self, hollow: Checkpoint, key: str, value: Any, about: str) -> None:
        with pytest.raises(ModelError) as caught:
            read_settings(changed(hollow, **{key: value}))
        one_line(caught, "hollow.ckpt", f"{key} = ", about)

    @pytest.mark.parametrize("key", sorted(SETTINGS.keys() - {"dataset_type", "sat_input_size"}))
    def test_missing(self, hollow: Checkpoint, key: str) -> None:
        kept = {name: value for name, value in SETTINGS.items() if name != key}
        with pytest.raises(ModelError) as caught:
            read_settings(replace(hollow, hyper_parameters=kept))
        one_line(caught, "hollow.ckpt", f"have no {key}")

    def test_metadata_stated_but_not_there(self, hollow: Checkpoint) -> None:
        with pytest.raises(ModelError) as caught:
            read_settings(without(hollow, FUSER))
        one_line(caught, "metadata_type", "hold no metadata fuser")


class TestMapping:
    @pytest.mark.parametrize("kind", ["withmeta", "nometa"])
    def test_keys_and_shapes_are_the_published_ones(self, sat2sound: Path, kind: str) -> None:
        listed = json.loads((sat2sound / f"keys_{kind}.json").read_text())
        config = ModelConfig(metadata=FIELDS if kind == "withmeta" else ())
        shapes = {key: list(shape) for key, shape in published_shapes(config).items()}
        assert shapes == {key: spec["shape"] for key, spec in listed.items()}

    def test_constants_are_the_published_ones(self, filler: ModuleType) -> None:
        for key, value in constants().items():
            assert np.abs(filler.fixed(key, value.shape) - value.numpy()).max() <= 1e-6, key

    def test_names_are_those_of_the_network(self, hollow: Checkpoint) -> None:
        pytest.importorskip("transformers")
        with torch.device("meta"):
            network = SoundModel(ModelConfig(metadata=FIELDS, audio=True)).state_dict()
        weights = convert(hollow).weights
        assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in network.items()}

    def test_every_key_is_accounted_for(self, hollow: Checkpoint) -> None:
        mapped = convert(hollow)
        left_out = [key for keys in mapped.unused.values() for key in keys]
        in_part = [key for key in left_out if key.endswith(("qkv.weight", "qkv.bias"))]
        assert len(in_part) == 2
        assert len(left_out) == len(set(left_out))
        assert mapped.used + len(mapped.checked) + len(left_out) - 2 == len(hollow.state) == 431
        assert set(mapped.checked) == set(constants())
        assert "logit_scale_it_a" in left_out

    def test_no_two_names_become_one(self) -> None:
        with torch.device("meta"):
            network = SoundModel(ModelConfig(metadata=FIELDS)).state_dict()
        assert len({published_name(name) for name in network}) == len(network)
        with pytest.raises(KeyError):
            published_name("vit.norm.weight")

    def test_without_metadata(self, hollow: Checkpoint) -> None:
        plain = changed(without(hollow, FUSER), metadata_type="none")
        assert len(plain.state) == 381
        assert not any(name.startswith("fuser") for name in convert(plain).weights)

    def test_unused_weights_may_be_absent(self, hollow: Checkpoint) -> None:
        slim = without(hollow, f"{TOWER}head", f"{TOWER}tscam_conv", "logit_scale_it_a")
        assert convert(slim).weights.keys() == convert(hollow).weights.keys()

    @pytest.mark.parametrize("name", [CODES, QKV, f"{TOWER}norm.weight", "logit_scale_it"])
    def test_renamed(self, hollow: Checkpoint, name: str) -> None:
        renamed = with_state(without(hollow, name), {f"{name}.x": hollow.state[name]})
        with pytest.raises(ModelError) as caught:
            convert(renamed)
        one_line(caught, "hollow.ckpt", f"1 missing ({name})", f"1 unknown ({name}.x)")

    def test_many_missing(self, hollow: Checkpoint) -> None:
        with pytest.raises(ModelError) as caught:
            convert(without(hollow, "satmae_backbone.backbone.blocks."))
        one_line(caught, "144 missing", "blocks.0.norm1.weight", "and 141 more")

    @pytest.mark.parametrize(
        "name",
        [
            "extra",
            f"{TOWER}audio_feats_extractor.extra",
            f"{TOWER}head.extra",
            f"{TOWER}layers.4.attn_mask",
            "satmae_backbone.backbone.norm.weight",
        ],
    )
    def test_extra(self, hollow: Checkpoint, name: str) -> None:
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {name: torch.zeros(1)}))
        one_line(caught, f"of its keys, 1 unknown ({name})")

    def test_extra_names_cannot_steer_the_terminal(self, hollow: Checkpoint) -> None:
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {"\x1b[2J\nx" * 99: torch.zeros(1)}))
        one_line(caught, "1 unknown (?[2J?x")

    @pytest.mark.parametrize("name", [CODES, QKV, f"{TOWER}head.bias", "logit_scale_it"])
    def test_wrong_shape(self, hollow: Checkpoint, name: str) -> None:
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {name: torch.zeros(3, 5)}))
        one_line(caught, "1 of another shape", f"{name} is 3 x 5 and should be ")

    def test_hyper_parameters_of_another_network(self, hollow: Checkpoint) -> None:
        with pytest.raises(ModelError) as caught:
            convert(changed(hollow, codebook_size=16384))
        one_line(caught, f"{CODES} is 16000 x 1024 and should be 16384 x 1024")

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [(CODES, torch.float16), (QKV, torch.float64), ("logit_scale_it", torch.int64)],
    )
    def test_wrong_type(self, hollow: Checkpoint, name: str, dtype: torch.dtype) -> None:
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {name: hollow.state[name].to(dtype)}))
        one_line(caught, f"{name} is {str(dtype)[6:]} and should be float32")

    @pytest.mark.parametrize(
        "ending",
        ["conv_real.weight", "conv_imag.weight", "melW", "position_index", "1.attn_mask"],
    )
    @pytest.mark.parametrize("value", [2, float("nan")])
    def test_constant_of_other_value(self, hollow: Checkpoint, ending: str, value: float) -> None:
        name = next(key for key in constants() if key.endswith(ending))
        other = hollow.state[name].clone()
        other.view(-1)[5] += value if other.is_floating_point() else 2
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {name: other}))
        one_line(caught, name, "is a constant")

    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    def test_not_finite(self, hollow: Checkpoint, value: float) -> None:
        name = "fdt.img_query_model.q_map.1.weight"
        weight = torch.zeros(hollow.state[name].shape)
        weight[5, 7] = value
        with pytest.raises(ModelError) as caught:
            convert(with_state(hollow, {name: weight}))
        one_line(caught, f"1 weights hold values that are not finite numbers ({name})")

    def test_what_is_not_used_need_not_be_finite(self, hollow: Checkpoint) -> None:
        head = torch.full(hollow.state[f"{TOWER}head.bias"].shape, float("nan"))
        convert(with_state(hollow, {f"{TOWER}head.bias": head}))

    def test_every_reason_is_given(self) -> None:
        assert all(len(reason) > 10 for reason in UNUSED.values())


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


@pytest.mark.slow
class TestFullSize:
    """One checkpoint of the published size, with numbers in it."""

    def test_every_number_arrives(self, converted: Callable[..., Path], filler: ModuleType) -> None:
        folder = converted("withmeta")
        assert sorted(p.name for p in folder.iterdir()) == [
            "concepts.json",
            "model.json",
            "model.safetensors",
        ]
        card = read_card(folder)
        verify_files(card)
        assert card.spec.metadata == ("lonlat", "month", "hour")
        # Whoever may read the card may read the weights.
        modes = {(folder / name).stat().st_mode for name in ("model.json", "model.safetensors")}
        assert len(modes) == 1
        with safe_open(str(folder / "model.safetensors"), framework="np") as file:
            codes = file.get_tensor("codebook.codes")
            # The digest that the description of the published model gives.
            assert zlib.crc32(codes.tobytes()) == 2466572848
            for ours, theirs in (
                ("vit.blocks.0.norm1.weight", "satmae_backbone.backbone.blocks.0.norm1.weight"),
                ("logit_scale", "logit_scale_it"),
                ("scales.i_at", "logit_scale_i_at"),
                ("projector.2.bias", "satmae_backbone.projector.linear2.bias"),
                ("audio.query.1.weight", "fdt.audio_query_model.q_map.1.weight"),
                (
                    "fuser.layers.2.attn.qkv.weight",
                    f"{FUSER}transformer_encoder.layers.2.self_attn.in_proj_weight",
                ),
                ("fuser.embed.month.2.bias", f"{FUSER}meta_embed.month_fc.fc2.bias"),
            ):
                found = file.get_tensor(ours)
                assert np.array_equal(found, filler.draw(theirs, found.shape)), ours
            value = file.get_tensor(
                "audio.tower.encoder.layers.0.blocks.1.attention.self.value.weight"
            )
            assert np.array_equal(value, filler.draw(QKV, (288, 96))[192:])
