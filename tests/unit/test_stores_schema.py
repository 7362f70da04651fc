from __future__ import annotations

import json
import pickle
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from odc.geo.geobox import GeoBox

from soundmap.errors import InputError, OutputError, UsageError
from soundmap.stores.qml import style_xml, write_style
from soundmap.stores.schema import MapSchema
from soundmap.stores.statistics import merged, partials

GRID = GeoBox((70, 90), Affine(140, 0, 500_000, 0, -140, 4_300_000), "EPSG:32629")
SCHEMA = MapSchema(
    concepts=("birdsong", "road traffic", "église"),
    groups=("biophony", "anthrophony", "anthrophony"),
    colours=("#33a02c", "#e31a1c", "#6a3d9a"),
    calibrations=("platt", "platt", "generic"),
    value="probability",
    formula="sigmoid(a (s . e) + b)",
    detail="patch",
    dtype="float32",
    grid=GRID,
    chunk_cells=32,
    model="soundmap-small",
    model_hash="0123abcd",
    imagery="scene.tif",
    attribution="Contains modified Copernicus Sentinel data",
    licence="CC BY-SA 3.0 IGO",
    gsd_m=10.0,
    software="soundmap 0.1.0",
    created="2026-01-02T03:04:05Z",
    extra={"month": "7"},
    fingerprint="f00d",
)


@pytest.mark.parametrize(
    ("field", "held", "message"),
    [
        ("concepts", (), "at least one"),
        ("concepts", ("a", "b", "a"), "'a' is named twice"),
        ("groups", ("biophony",), "groups: 1 given for 3"),
        ("colours", ("red", "#000000", "#000000"), "'red'"),
        ("value", "loudness", "use probability, share, similarity"),
        ("dtype", "int16", "use float32, uint8"),
        ("chunk_cells", 0, "at least 1"),
        ("grid", GeoBox((4, 4), Affine(1, 0, 0, 0, 1, 0), "EPSG:32629"), "north-up"),
        ("grid", GeoBox((4, 4), Affine(1, 0, 0, 0, -1, 0), None), "no CRS"),
    ],
)
def test_schema_says_what_does_not_fit(field, held, message):
    with pytest.raises(UsageError, match=message):
        replace(SCHEMA, **{field: held})


@pytest.mark.parametrize(
    "crs", ["EPSG:32629", "EPSG:4326", "EPSG:28992", "+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84"]
)
def test_attributes_survive_json_and_the_schema_pickle(crs):
    schema = replace(SCHEMA, grid=GeoBox((7, 9), Affine(0.1, 0, 3, 0, -0.1, 5), crs))
    assert MapSchema.from_attrs(json.loads(json.dumps(schema.attrs()))) == schema
    assert pickle.loads(pickle.dumps(schema)) == schema


def test_attributes_of_others_are_refused():
    with pytest.raises(InputError, match="not written by soundmap"):
        MapSchema.from_attrs({"value": "probability"})
    with pytest.raises(InputError, match="newer soundmap"):
        MapSchema.from_attrs({**SCHEMA.attrs(), "soundmap_format": 99})
    with pytest.raises(InputError, match="damaged"):
        MapSchema.from_attrs({**SCHEMA.attrs(), "transform": "nonsense"})


values = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.one_of(st.floats(0, 1, width=32), st.just(float("nan"))),
)


@given(values)
def test_float_packing_keeps_one_part_in_8192(block):
    packed = SCHEMA.pack(block)
    assert packed.dtype == np.float32
    assert packed.shape == block.shape
    np.testing.assert_allclose(SCHEMA.unpack(packed), block, rtol=2**-13, atol=1e-37)
    assert np.nanmin(packed, initial=0) >= 0
    assert np.nanmax(packed, initial=0) <= 1
    np.testing.assert_array_equal(SCHEMA.pack(packed), packed)


@given(values, st.sampled_from(["probability", "share", "similarity"]))
def test_byte_packing_keeps_half_a_step(block, value):
    schema = replace(SCHEMA, dtype="uint8", value=value)
    low, high = schema.value_range
    block = block * np.float32(high - low) + np.float32(low)
    packed = schema.pack(block)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed == 255, np.isnan(block))
    np.testing.assert_allclose(schema.unpack(packed), block, atol=schema.scale / 2 + 1e-6)


def test_byte_packing_clips():
    packed = replace(SCHEMA, dtype="uint8").pack(np.array([[-0.2, 0, 1, 1.3, np.nan]], np.float32))
    assert packed.tolist() == [[0, 0, 250, 250, 255]]


@given(
    hnp.arrays(
        np.float32,
        (4, 2, 5, 6),
        elements=st.one_of(st.floats(-1, 1, width=32), st.just(float("nan"))),
    )
)
def test_statistics_of_parts_are_those_of_the_whole(chunks):
    chunks[1] = np.nan
    results = merged(np.stack([partials(chunk) for chunk in chunks]).reshape(2, 2, 5, 2))
    for concept, one in enumerate(results):
        held = chunks[:, concept].astype(np.float64)
        held = held[~np.isnan(held)]
        assert one.valid == held.size
        if held.size:
            found = (one.minimum, one.maximum, one.mean, one.stddev)
            expected = (held.min(), held.max(), held.mean(), held.std())
            np.testing.assert_allclose(found, expected, atol=1e-12)
        else:
            assert np.isnan([one.minimum, one.maximum, one.mean, one.stddev]).all()


@pytest.mark.parametrize(("value", "low"), [("probability", 0), ("share", 0), ("similarity", -1)])
def test_style_has_one_fixed_scale(value, low):
    root = ET.fromstring(style_xml(replace(SCHEMA, value=value)))
    renderer = root.find("pipe/rasterrenderer")
    assert renderer.get("type") == "singlebandpseudocolor"
    assert renderer.get("band") == "1"
    assert (renderer.get("classificationMin"), renderer.get("classificationMax")) == (str(low), "1")
    assert renderer.find("minMaxOrigin/limits").text == "None"
    stops = [float(item.get("value")) for item in renderer.iter("item")]
    assert stops[0] == low
    assert stops[-1] == 1
    assert stops == sorted(stops)


def test_style_is_written_whole_or_refused(tmp_path):
    path = write_style(SCHEMA, tmp_path / "city.qml")
    assert path.read_text().startswith("<!DOCTYPE qgis")
    assert [entry.name for entry in tmp_path.iterdir()] == ["city.qml"]
    with pytest.raises(OutputError, match=r"city\.qml"):
        write_style(SCHEMA, tmp_path / "missing" / "city.qml")
