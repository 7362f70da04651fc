"""The image side against the published model, stage by stage, with stand-in weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soundmap.encoder.card import read_card
from soundmap.encoder.torch_encoder import TorchEncoder
from soundmap.nn.metadata import (
    FIELDS,
    Metadata,
    encode_hour,
    encode_latlong,
    encode_month,
)
from soundmap.nn.model import SoundModel
from soundmap.nn.sparsemax import sparsemax
from soundmap.nn.vit import position_embedding

GSD_M = {"bingmap": 0.6, "sentinel": 10.0, "googleEarth": 0.2}
Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden(sat2sound: Path) -> Golden:
    with np.load(sat2sound / "golden_sat.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def encoder(converted: Callable[[str], Path]) -> TorchEncoder:
    """The checkpoint that takes metadata."""
    return TorchEncoder(read_card(converted("withmeta")), "cpu", 2, "float32")


@pytest.fixture(scope="module")
def plain_encoder(converted: Callable[[str], Path]) -> TorchEncoder:
    """The checkpoint that takes none."""
    return TorchEncoder(read_card(converted("nometa")), "cpu", 2, "float32")


@pytest.fixture(scope="module")
def model(encoder: TorchEncoder) -> SoundModel:
    return encoder.model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def metadata_of(golden: Golden) -> Metadata:
    lonlat = np.stack([golden["in.lon"], golden["in.lat"]], 1)
    values = {
        "asource": torch.from_numpy(golden["in.audio_source"]),
        "tsource": torch.from_numpy(golden["in.caption_source"]),
        "latlong": encode_latlong(torch.from_numpy(lonlat)),
        "month": encode_month(torch.from_numpy(golden["in.month"])),
        "time": encode_hour(torch.from_numpy(golden["in.hour"])),
    }
    return Metadata(values, {})


def raw(model: SoundModel, tokens: Tensor) -> np.ndarray:
    """Embed tokens as the reference returns it: before it is made a unit vector."""
    largest = model.codebook.largest(model.image_query(tokens))
    return model.codebook.mix(largest).numpy()


def same_embedding(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # The numbers are small, so that 1e-4 alone would not say much.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    product = (found * expected).sum(-1)
    cosine = product / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() >= 0.99999


def same_stage(found: Tensor, expected: np.ndarray) -> None:
    width = expected.shape[-1]
    part = found.numpy()[:, : expected.shape[1], :width]
    np.testing.assert_allclose(part, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def same_stats(found: Tensor, expected: np.ndarray) -> None:
    values = found.double().flatten(1).numpy()
    stats = np.stack([values.mean(1), values.std(1)], 1)
    np.testing.assert_allclose(stats, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.fixture(scope="module")
def pixels(golden: Golden) -> Tensor:
    return torch.from_numpy(golden["images_u8"])


@pytest.fixture(scope="module")
def tokens(model: SoundModel, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.tokens(model.embed(pixels), torch.tensor([0.6]))


def test_encodings(golden: Golden) -> None:
    found = metadata_of(golden).values
    for name in ("latlong", "month", "time"):
        np.testing.assert_array_equal(found[name].numpy(), golden[f"enc.{name}"])


@pytest.mark.parametrize("zoom", [1, 3, 5])
@pytest.mark.parametrize("sat", GSD_M)
def test_positions(golden: Golden, sat: str, zoom: int) -> None:
    if f"pos.{sat}.z{zoom}" not in golden:
        assert (sat, zoom) in {("googleEarth", 3), ("googleEarth", 5)}
        return
    found = position_embedding(14, 14, 768, torch.tensor([zoom * GSD_M[sat]]))[0]
    rows = golden["pos.rows"]
    np.testing.assert_allclose(found[rows].numpy(), golden[f"pos.{sat}.z{zoom}"], atol=1e-4)


def test_patch_convolution(model: SoundModel, pixels: Tensor, golden: Golden) -> None:
    grid = model.embed(pixels).flatten(2).transpose(1, 2)
    same_stage(grid, golden["patch.head"])
    same_stats(grid, golden["patch.stats"])


CASES = [f"{sat}.z{zoom}" for sat in ("bingmap", "sentinel") for zoom in (1, 3, 5)]
CASES += ["googleEarth.z1", "bingmap.mixed_z1_3_5_1"]


def gsd_of(case: str) -> Tensor:
    sat, _, zoom = case.partition(".z")
    if "mixed" in case:
        return torch.tensor([1, 3, 5, 1]) * GSD_M["bingmap"]
    return torch.tensor([int(zoom)] * 4) * GSD_M[sat]


def compare(golden: Golden, key: str, model: SoundModel, stages: dict[str, Tensor]) -> int:
    """Compare all that the reference has of a case; returns how much that is."""
    compared = 0
    for name, stage in stages.items():
        if f"{key}{name}.head" in golden:
            same_stage(stage, golden[f"{key}{name}.head"])
            same_stats(stage, golden[f"{key}{name}.stats"])
            compared += 1
    if f"{key}proj.last" in golden:
        same_stage(stages["proj"][:, -1:], golden[f"{key}proj.last"][:, None])
    if f"{key}fused.meta" in golden:
        same_stage(stages["fused"][:, 196:], golden[f"{key}fused.meta"])
    last = stages.get("fused", stages["proj"])
    pooled = model.codebook.largest(model.image_query(last))
    if f"{key}pooled" in golden:
        z = golden[f"{key}pooled"]
        np.testing.assert_allclose(pooled.numpy(), z, rtol=0, atol=1e-4 * np.abs(z).max())
        compared += 1
    weights = sparsemax(pooled)
    if f"{key}sparse.val" in golden:
        dense = np.zeros((4, 16000), np.float32)
        dense[golden[f"{key}sparse.row"], golden[f"{key}sparse.col"]] = golden[f"{key}sparse.val"]
        np.testing.assert_allclose(weights.numpy(), dense, rtol=0, atol=1e-6)
        compared += 1
    count = (weights > 0).sum(-1).numpy()
    assert np.abs(count - golden[f"{key}nnz"]).max() <= 2
    same_embedding(model.codebook.mix(pooled).numpy(), golden[f"{key}embed"])
    if f"{key}embed_l2" in golden:
        unit = model.codebook.combine(pooled).numpy()
        np.testing.assert_allclose(unit, golden[f"{key}embed_l2"], rtol=0, atol=1e-6)
        compared += 1
    return compared


@pytest.mark.parametrize("case", CASES)
def test_every_stage(model: SoundModel, pixels: Tensor, golden: Golden, case: str) -> None:
    seen = model.vit.mix(model.embed(pixels), gsd_of(case))
    projected = model.projector(seen)
    assert model.fuser is not None
    fused = model.fuser(projected, metadata_of(golden))
    assert fused.shape == (4, 201, 1024)
    stages = {"vit": seen, "proj": projected, "fused": fused}
    compared = compare(golden, f"withmeta.{case}.", model, stages)
    assert compared >= 5 or case != "bingmap.z1", "the reference has all stages of this case"
    # Stand-in weights depend on their names alone, so the other checkpoint has the same tower.
    compare(golden, f"nometa.{case}.", model, {"vit": seen, "proj": projected})


def test_without_metadata(plain_encoder: TorchEncoder, pixels: Tensor, golden: Golden) -> None:
    """The checkpoint that takes none: stages, and what everybody gets, in any order and batch."""
    model = plain_encoder.model
    assert model.fuser is None
    seen = model.vit.mix(model.embed(pixels), gsd_of("bingmap.z1"))
    stages = {"vit": seen, "proj": model.projector(seen)}
    assert compare(golden, "nometa.bingmap.z1.", model, stages) >= 4
    order = [3, 1, 1]
    found = plain_encoder.encode_images(
        golden["images_u8"][order], scale=3, details=("image",)
    ).image
    expected = golden["nometa.bingmap.z3.embed"][order]
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


class TestMasks:
    """Masked metadata: what stands last in every row comes out as zero, else it is computed."""

    @pytest.mark.parametrize(
        "variant",
        [
            "time_invalid_s1",
            "month_invalid_s0",
            "month_s0_time_s1",
            "time_and_month_invalid_all",
            "time_invalid_all",
        ],
    )
    def test_not_valid(
        self, model: SoundModel, tokens: Tensor, golden: Golden, variant: str
    ) -> None:
        key = f"withmeta.bingmap.z1.{variant}"
        assert model.fuser is not None
        valid = {n: torch.from_numpy(golden[f"{key}.{n}_valid"] != 0) for n in ("month", "time")}
        given = Metadata(metadata_of(golden).values, valid)
        fused = model.fuser(tokens, given)
        same_stage(fused[:, 196:], golden[f"{key}.fused.meta"])
        same_embedding(raw(model, fused), golden[f"{key}.embed"])
        plain = model.fuser.mix(tokens, *model.fuser.tokens(given, tokens))
        same_embedding(raw(model, plain), golden[f"{key}.slowpath.embed"])

    @pytest.mark.parametrize(
        "fields",
        [
            "latlong",
            "asource_tsource_latlong_month",
            "asource_tsource_latlong",
            "latlong_month_time",
            "none",
        ],
    )
    def test_masked_but_not_emptied(
        self, model: SoundModel, tokens: Tensor, golden: Golden, fields: str
    ) -> None:
        """The reference can hide a field without emptying its token."""
        key = f"withmeta.bingmap.z1.eval_meta={fields}"
        assert model.fuser is not None
        full, _ = model.fuser.tokens(metadata_of(golden), tokens)
        valid = torch.tensor([[name in fields for name in FIELDS]] * 4)
        same_embedding(raw(model, model.fuser.fuse(tokens, full, valid)), golden[f"{key}.embed"])
        plain = model.fuser.mix(tokens, full, valid)
        same_embedding(raw(model, plain), golden[f"{key}.slowpath.embed"])

    @pytest.mark.parametrize("fields", ["latlong", "asource_time", "latlong_month_time_tsource"])
    def test_absent(self, model: SoundModel, tokens: Tensor, golden: Golden, fields: str) -> None:
        """A model that was built without a field has no token of it."""
        assert model.fuser is not None
        full, valid = model.fuser.tokens(metadata_of(golden), tokens)
        own = [i for i, name in enumerate(FIELDS) if name in fields]
        fused = model.fuser.fuse(tokens, full[:, own], valid[:, own])
        key = f"withmeta.bingmap.z1.metadata_type={fields}.embed"
        same_embedding(raw(model, fused), golden[key])

    def test_what_a_map_gives(self, encoder: TorchEncoder, golden: Golden, tokens: Tensor) -> None:
        """Place, month and hour; never a source, which the reference's demos make up."""
        given = metadata_of(golden)
        lonlat = np.stack([golden["in.lon"], golden["in.lat"]], 1)
        window, month, hour = 2, int(golden["in.month"][2]), int(golden["in.hour"][2])
        found = encoder.encode_images(
            golden["images_u8"], lonlat, month, hour, gsd_m=0.6, details=("image",)
        ).image
        assert found is not None
        fuser = encoder.model.fuser
        assert fuser is not None
        hidden = torch.zeros(1, dtype=torch.bool)
        one = Metadata(
            {name: value[window : window + 1] for name, value in given.values.items()},
            {"asource": hidden, "tsource": hidden},
        )
        fused = fuser(tokens[window : window + 1], one)
        expected = raw(encoder.model, fused)
        np.testing.assert_allclose(
            found[window], expected[0] / np.linalg.norm(expected[0]), rtol=0, atol=1e-5
        )
