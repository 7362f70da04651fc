"""Published checkpoints: settings and weights are mapped without guessing anything."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from soundmap.encoder.card import read_card, verify_files
from soundmap.encoder.checkpoint import Checkpoint
from soundmap.encoder.convert import read_settings
from soundmap.encoder.mapping import (
    TOWER,
    UNUSED,
    constants,
    map_state,
    published_name,
    published_shapes,
)
from soundmap.encoder.torch_encoder import model_config
from soundmap.errors import ModelError
from soundmap.nn.model import ModelConfig, SoundModel
from tests.unit.messages import one_line

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
