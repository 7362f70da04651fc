"""The published data sets: small Parquet files in their exact columns."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soundmap.errors import InputError
from soundmap.products.samples import (
    BadSample,
    Samples,
    SamplesConfig,
    StreamedSamples,
    check,
    open_samples,
)

datasets = pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")

RATE = 32_000
MEL = (5, 1, 1001, 64)


def picture(side: int = 24, seed: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def clip(seconds: float = 0.2, kind: str = "OGG", rate: int = RATE, level: float = 0.1) -> bytes:
    wave = level * np.sin(np.arange(round(seconds * rate)) * 0.3)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind)
    return file.getvalue()


def mel(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-40, 10, MEL).astype(np.float32)


def geosound(rows: int = 4) -> dict[str, list[Any]]:
    texts = ("description", "tags", "title", "scientific_name", "common_name", "sound_format")
    texts += ("text", "address", "bin_id")
    sources = ("yfcc", "iNat", "aporee", "freesound")
    return {
        "sample_id": [f"{sources[i % 4]}-{i}" for i in range(rows)],
        "source": [sources[i % 4] for i in range(rows)],
        "audio": [{"bytes": clip(kind=("OGG", "FLAC")[i % 2]), "path": None} for i in range(rows)],
        "bingmap_image": [{"bytes": picture(30, i), "path": None} for i in range(rows)],
        "sentinel_image": [{"bytes": picture(20, i, "PNG"), "path": None} for i in range(rows)],
        "audio_caption": [f"a sound of {i}" for i in range(rows)],
        "audio_caption_source": [("meta", "qwen", "pengi")[i % 3] for i in range(rows)],
        "mel_features": [mel(i) for i in range(rows)],
        **{
            f"llava_caption_{imagery}_zl{zoom}": [f"{imagery} {zoom} {i}" for i in range(rows)]
            for imagery in ("bingmap", "sentinel")
            for zoom in (1, 3, 5)
        },
        "latitude": [10.0 + i for i in range(rows)],
        "longitude": [-20.0 - i for i in range(rows)],
        "date": ["2012-05-03 13:22:11", "2012", "May 2014", "2015-07-01 06:00"][:rows]
        + [""] * (rows - 4),
        **{name: [""] * rows for name in texts},
        "original_sampling_rate": [44_100] * rows,
    }


def soundingearth(rows: int = 3) -> dict[str, list[Any]]:
    return {
        "sample_id": [f"aporee-{i}" for i in range(rows)],
        "short_id": [str(i) for i in range(rows)],
        "audio": [{"bytes": clip(), "path": None} for _ in range(rows)],
        "googleearth_image": [{"bytes": picture(26, i), "path": None} for i in range(rows)],
        "audio_caption": [f"a sound of {i}" for i in range(rows)],
        "audio_caption_source": ["meta"] * rows,
        "mel_features": [mel(i) for i in range(rows)],
        "llava_caption_googleearth_zl1": [f"one hears {i}" for i in range(rows)],
        "latitude": [1.0] * rows,
        "longitude": [2.0] * rows,
        "date_recorded": ["2010-12-24 23:30:00", None, "who knows"][:rows],
    }


def features(table: dict[str, list[Any]], nested: bool = False) -> Any:
    f: dict[str, Any] = {}
    for name in table:
        if name == "audio":
            f[name] = datasets.Audio(sampling_rate=RATE)
        elif name.endswith("_image"):
            f[name] = datasets.Image()
        elif name == "mel_features":
            one = datasets.Value("float32")
            for _ in MEL if nested else ():
                one = datasets.Sequence(one)
            f[name] = one if nested else datasets.Array4D(MEL, "float32")
        elif name in ("latitude", "longitude"):
            f[name] = datasets.Value("float64")
        elif name == "original_sampling_rate":
            f[name] = datasets.Value("int64")
        else:
            f[name] = datasets.Value("string")
    return datasets.Features(f)


def nested_lists(values: list[Any]) -> Any:
    """Arrays of four axes, of any shapes, as lists in lists; None stays a gap."""
    import pyarrow as pa

    there = [np.asarray(v, np.float32) for v in values if v is not None]
    array = pa.array(np.concatenate([v.ravel() for v in there]))
    for axis in (3, 2, 1):
        lengths = [np.full(int(np.prod(v.shape[:axis])), v.shape[axis]) for v in there]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        array = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), array)
    offsets = np.cumsum([0, *(0 if v is None else len(v) for v in values)])
    gaps = pa.array([v is None for v in values])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), array, mask=gaps)


def store(path: Path, table: dict[str, list[Any]], nested: bool = False) -> Path:
    """Write a table as Parquet, with the features of ``datasets`` in its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = features(table, nested).arrow_schema
    arrays = []
    for name, field in zip(table, schema, strict=True):
        if name != "mel_features":
            arrays.append(pa.array(table[name], field.type))
        elif nested:
            arrays.append(nested_lists(table[name]).cast(field.type))
        else:
            storage = nested_lists(table[name]).cast(field.type.storage_type)
            arrays.append(pa.ExtensionArray.from_storage(field.type, storage))
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, row_group_size=2)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sets, in their splits."""
    root = tmp_path_factory.mktemp("published")
    store(root / "geo" / "train-00000-of-00002.parquet", geosound(4))
    store(root / "geo" / "train-00001-of-00002.parquet", geosound(4))
    store(root / "geo" / "validation-00000-of-00001.parquet", geosound(2), nested=True)
    store(root / "earth" / "data" / "test.parquet", soundingearth())
    return root


Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def opened(root: Path) -> Opener:
    def opened(path: str | list[str], split: str = "train", fields: Any = None, **keys: Any) -> Any:
        keys = {"cache": str(root / "cache")} | keys
        table = {"kind": "parquet", "path": path, **keys}
        config = SamplesConfig.from_table(table, "data.toml, [train]", root)
        return open_samples(config, split, *([] if fields is None else [fields]))

    return opened


both = pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])


def rows_of(samples: Any) -> list[Any]:
    return (
        list(samples)
        if isinstance(samples, StreamedSamples)
        else [*map(samples.__getitem__, range(len(samples)))]
    )


@both
class TestPublished:
    def test_geosound(self, opened: Opener, streaming: bool) -> None:
        samples = opened("geo", imagery="bingmap", streaming=streaming)
        assert isinstance(samples, StreamedSamples if streaming else Samples)
        assert isinstance(samples, Samples) is not streaming
        assert (samples.native_px, samples.gsd_m) == (300, 0.6)
        rows = rows_of(samples)
        assert len(rows) == 8
        first = rows[0]
        assert first.key == "yfcc-0"
        assert first.image.dtype == np.uint8
        assert first.image.shape == (3, 30, 30)
        np.testing.assert_array_equal(first.mel, mel(0))
        assert first.mel.dtype == np.float32
        assert first.wave is None
        assert first.audio_caption == "a sound of 0"
        assert first.image_captions == {1: "bingmap 1 0", 3: "bingmap 3 0", 5: "bingmap 5 0"}
        assert (first.lat, first.lon) == (10.0, -20.0)
        assert (first.audio_source, first.caption_source) == ("yfcc", "meta")
        assert [(row.month, row.hour) for row in rows[:4]] == [
            (5, 13),
            (None, None),
            (5, None),
            (7, None),  # a clip of freesound: its clock is that of the upload
        ]

    def test_soundingearth(self, opened: Opener, streaming: bool) -> None:
        samples = opened("earth", "test", streaming=streaming)
        assert (samples.native_px, samples.gsd_m) == (256, 0.2)
        rows = rows_of(samples)
        assert [row.audio_source for row in rows] == ["aporee"] * 3
        assert [(row.month, row.hour) for row in rows] == [(12, 23), (None, None), (None, None)]
        assert rows[1].image_captions == {1: "one hears 1"}
        assert rows[2].image.shape == (3, 26, 26)

    def test_sentinel_and_the_other_name_of_validation(
        self, opened: Opener, streaming: bool
    ) -> None:
        for name in ("val", "validation"):
            samples = opened("geo", name, imagery="sentinel", streaming=streaming)
            rows = rows_of(samples)
            assert len(rows) == 2
            assert (samples.native_px, samples.gsd_m) == (256, 10.0)
            pixels = np.asarray(Image.open(io.BytesIO(picture(20, 1, "PNG"))))
            np.testing.assert_array_equal(rows[1].image, pixels.transpose(2, 0, 1))
            assert rows[1].image_captions[5] == "sentinel 5 1"
            np.testing.assert_array_equal(rows[1].mel, mel(1))

    def test_sound_itself(self, opened: Opener, streaming: bool) -> None:
        samples = opened(
            "geo", "val", {"audio"}, imagery="bingmap", streaming=streaming, audio="wave"
        )
        for row in rows_of(samples):
            assert row.mel is None
            assert row.image is None
            assert row.wave.shape == (6400,)
            assert row.wave.dtype == np.float32
            assert 0.05 < np.abs(row.wave).max() < 0.15

    def test_what_is_not_asked_for_does_no_harm(
        self, opened: Opener, root: Path, streaming: bool
    ) -> None:
        table = geosound(2)
        table["bingmap_image"] = [{"bytes": b"no image", "path": None}] * 2
        table["mel_features"][1] = np.full(MEL, np.nan)
        path = store(root / "odd" / "broken.parquet", table)
        asked = {"path": str(path), "imagery": "bingmap", "streaming": streaming}
        samples = opened(fields=["audio_caption", "image_caption"], **asked)
        rows = rows_of(samples)
        assert [row.audio_caption for row in rows] == ["a sound of 0", "a sound of 1"]
        assert samples.fields == {"audio_caption", "image_caption"}
        assert not {"bingmap_image", "audio", "mel_features"} & set(samples.data.column_names)
        assert check(opened(fields=["image"], **asked)).counts == {"image unreadable": 2}
        assert check(opened(fields=["audio"], **asked)).counts == {"mel not finite": 1}

    def test_heavy_columns_are_not_read(self, opened: Opener, root: Path, streaming: bool) -> None:
        import pyarrow.parquet as pq

        path = store(root / "odd" / "holed.parquet", geosound(4))
        found = pq.ParquetFile(path).metadata
        data = bytearray(path.read_bytes())
        for group in range(found.num_row_groups):
            for number in range(found.num_columns):
                column = found.row_group(group).column(number)
                if column.path_in_schema.startswith(("bingmap", "sentinel", "mel", "audio.")):
                    start = column.dictionary_page_offset or column.data_page_offset
                    data[start : start + column.total_compressed_size] = bytes(
                        column.total_compressed_size
                    )
        path.write_bytes(data)
        asked = {"path": str(path), "imagery": "bingmap", "streaming": streaming}
        rows = rows_of(opened(fields=["audio_caption"], **asked))
        assert [row.audio_caption for row in rows] == [f"a sound of {i}" for i in range(4)]
        with pytest.raises(InputError, match=r"^data.toml|reading stopped") as caught:
            rows_of(opened(fields=["image"], **asked))
        assert "\n" not in str(caught.value)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "image cut short": ("bingmap_image", {"bytes": picture(64)[:-900]}, "image unreadable"),
    "no image": ("bingmap_image", {"bytes": b"<html>404</html>"}, "image unreadable"),
    "image without bytes": ("bingmap_image", {"bytes": b""}, "image unreadable"),
    "image file gone": ("bingmap_image", {"path": "gone.jpg"}, "image file missing"),
    "16 bits": ("bingmap_image", {"bytes": picture(8, 0, "PNG", "I;16")}, "image unreadable"),
    "shape": ("mel_features", np.zeros((5, 1, 1000, 64)), "mel shape wrong"),
    "infinite": ("mel_features", np.full(MEL, -np.inf), "mel not finite"),
    "hole": ("mel_features", np.where(np.arange(64) == 5, np.nan, mel()), "mel not finite"),
    "silent": ("mel_features", np.full(MEL, -100.0), "audio silent"),
    "latitude": ("latitude", 91.0, "place off the Earth"),
    "longitude": ("longitude", -180.5, "place off the Earth"),
    "NaN": ("latitude", float("nan"), "place off the Earth"),
    "half a place": ("longitude", None, "place off the Earth"),
    "no caption": ("audio_caption", "  ", "no audio caption"),
    "caption null": ("audio_caption", None, "no audio caption"),
}
SOUND_DAMAGE: dict[str, tuple[Any, str]] = {
    "zeros": ({"bytes": clip(kind="FLAC", level=0)}, "audio silent"),
    "no sound": ({"bytes": b"OggS but not really"}, "audio unreadable"),
    "cut short": ({"bytes": clip(1.0, "FLAC")[:-2000]}, "audio unreadable"),
    "empty": ({"bytes": clip(0.0, "WAV")}, "audio unreadable"),
    "no bytes": ({"bytes": b""}, "audio unreadable"),
    "gone": ({"path": "gone.ogg"}, "audio file missing"),
}


@both
def test_every_fault_is_counted_and_none_becomes_zeros(
    opened: Opener, root: Path, tmp_path: Path, streaming: bool
) -> None:
    table = geosound(len(DAMAGE) + 1)
    for row, (column, value, _) in enumerate(DAMAGE.values(), 1):
        if isinstance(value, dict):
            value = {"bytes": None, "path": None} | value
        table[column][row] = value
    path = root / "odd" / "bad.parquet"
    if not path.exists():
        store(path, table, nested=True)
    samples = opened(str(path), imagery="bingmap", streaming=streaming, required=["audio_caption"])
    bad = check(samples)
    wanted = {table["sample_id"][i]: d[2] for i, d in enumerate(DAMAGE.values(), 1)}
    assert {key: reason for key, reason, _ in bad.rows} == wanted
    assert len(bad) == len(DAMAGE)
    assert bad.read == len(DAMAGE) + 1
    assert f"{len(DAMAGE)} of {len(DAMAGE) + 1} rows bad" in bad.summary()
    if streaming:
        assert [row.key for row in samples] == ["yfcc-0"]
        assert len(samples.bad) == len(DAMAGE)
        assert samples.bad.read == len(DAMAGE) + 1
    else:
        with pytest.raises(BadSample, match="iNat-1: image unreadable"):
            samples[1]
    bad.write(tmp_path / "bad.csv")
    lines = (tmp_path / "bad.csv").read_text().splitlines()
    assert lines[0] == "key,reason,detail"
    assert len(lines) == len(DAMAGE) + 1


@both
def test_bad_sound(opened: Opener, root: Path, streaming: bool) -> None:
    table = geosound(len(SOUND_DAMAGE) + 1)
    for row, (value, _) in enumerate(SOUND_DAMAGE.values(), 1):
        table["audio"][row] = {"bytes": None, "path": None} | value
    del table["mel_features"]
    path = root / "odd" / "sound.parquet"
    if not path.exists():
        store(path, table)
    bad = check(opened(str(path), fields=["audio"], streaming=streaming))
    assert [reason for _, reason, _ in bad.rows] == [r for _, r in SOUND_DAMAGE.values()]


class TestAccess:
    def test_threads_see_the_same_rows_as_one(self, opened: Opener) -> None:
        samples = opened("geo", imagery="bingmap")
        order = [7, 0, 3, 3, 5, 1, 6, 2, 4, -1] * 3
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(samples.__getitem__, order))
        for index, sample in zip(order, found, strict=True):
            once = samples[index]
            assert sample.key == once.key
            np.testing.assert_array_equal(sample.image, once.image)
            np.testing.assert_array_equal(sample.mel, once.mel)
        with pytest.raises(IndexError):
            samples[8]

    def test_it_travels(self, opened: Opener) -> None:
        samples = pickle.loads(pickle.dumps(opened("geo", imagery="bingmap")))
        assert samples[5].key == "iNat-1"
        stream = pickle.loads(pickle.dumps(opened("geo", imagery="bingmap", streaming=True)))
        assert len(list(stream)) == 8

    @pytest.mark.parametrize("count", [2, 3])
    def test_parts_hold_every_row_once(self, opened: Opener, count: int) -> None:
        stream = opened("geo", fields=["audio_caption"], imagery="bingmap", streaming=True)
        parts = [[row.audio_caption for row in stream.shard(count, i)] for i in range(count)]
        assert sorted(chain(*parts)) == sorted(row.audio_caption for row in stream)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_library_decoders_are_never_called(
        self, opened: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def decode(*_: Any, **__: Any) -> None:
            raise AssertionError("decoded by the library")

        monkeypatch.setattr(datasets.Audio, "decode_example", decode)
        monkeypatch.setattr(datasets.Image, "decode_example", decode)
        for streaming in (False, True):
            rows = rows_of(
                opened("geo", "val", imagery="bingmap", audio="wave", streaming=streaming)
            )
            assert rows[0].image is not None
            assert rows[0].wave is not None


class TestNamesAndColumns:
    def test_a_set_at_the_hub(
        self, opened: Opener, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        load = datasets.load_dataset

        def from_hub(path: str, **keys: Any) -> Any:
            asked.append((path, keys.pop("revision"), keys.get("columns")))
            return load(str(root / "geo"), **keys)

        monkeypatch.setattr(datasets, "load_dataset", from_hub)
        for streaming in (False, True):
            samples = opened(
                "MVRL/GeoSound",
                "val",
                ["image"],
                imagery="bingmap",
                streaming=streaming,
                revision="v1",
            )
            assert [row.image.shape for row in rows_of(samples)] == [(3, 30, 30)] * 2
            assert samples.name == "MVRL/GeoSound validation"
        assert {(path, revision) for path, revision, _ in asked} == {("MVRL/GeoSound", "v1")}
        assert "mel_features" not in asked[-1][2]
        with pytest.raises(InputError, match=r"has no split 'test' \(it has train, validation\)"):
            opened("MVRL/GeoSound", "test", imagery="bingmap", revision="v1")

    def test_a_hub_out_of_reach_is_said_in_one_line(
        self, opened: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(path: str, **_: Any) -> Any:
            raise ConnectionError(f"Couldn't reach '{path}'\non the Hub")

        monkeypatch.setattr(datasets, "load_dataset", gone)
        message = r"^data.toml, \[train\], path: MVRL/Geo cannot be read .*reach 'MVRL/Geo' on"
        with pytest.raises(InputError, match=message) as caught:
            opened("MVRL/Geo")
        assert "\n" not in str(caught.value)

    def test_names_of_splits_can_be_given(self, opened: Opener) -> None:
        val = opened("geo", "test", imagery="bingmap", splits={"test": "validation"})
        assert len(val) == 2
        one = opened("geo", imagery="bingmap", splits={"train": "train-00001*.parquet"})
        assert len(one) == 4
        assert len(opened("geo/train-*.parquet", imagery="bingmap")) == 8
        assert len(opened("geo/train-00000-of-00002.parquet", "test", imagery="bingmap")) == 4

    def test_columns_of_your_own(self, opened: Opener, root: Path) -> None:
        (root / "media").mkdir(exist_ok=True)
        (root / "media" / "a.png").write_bytes(picture(9, 0, "PNG"))
        import pyarrow as pa
        import pyarrow.parquet as pq

        wave = np.sin(np.arange(1600) * 0.2).tolist()
        table = {
            "pic": ["a.png", None],
            "rec": [
                {"array": wave, "sampling_rate": 16_000},
                {"array": None, "sampling_rate": None},
            ],
            "said": ["hens", None],
            "kind": [1, 0],
        }
        own = features({"said": []}) | {
            "pic": datasets.Value("string"),
            "rec": {
                "array": datasets.Sequence(datasets.Value("float64")),
                "sampling_rate": datasets.Value("int64"),
            },
            "kind": datasets.ClassLabel(names=["cow", "hen"]),
        }
        schema = datasets.Features({name: own[name] for name in table}).arrow_schema
        pq.write_table(pa.table(table, schema=schema), root / "media" / "own.parquet")
        columns = {"image": "pic", "audio": "rec", "caption": "said", "label": "kind"}
        for streaming in (False, True):
            samples = opened(
                "media/own.parquet", columns=columns, gsd_m=2, native_px=64, streaming=streaming
            )
            (row,) = check_rows = [rows_of(samples)[0]] if streaming else [samples[0]]
            assert len(check_rows) == 1
            assert row.image.shape == (3, 9, 9)
            assert row.wave.shape == (3200,)
            assert (row.audio_caption, row.label) == ("hens", "hen")
            assert row.key == "row 0"
            assert check(samples).counts == {"nothing there": 1}

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"path": "nowhere"}, r"path: .*nowhere does not exist$"),
            ({"path": "nowhere/*.parquet"}, r"path: .* does not exist$"),
            ({"path": "geo"}, r"imagery: is missing: choose bingmap or sentinel$"),
            ({"path": "geo", "imagery": "googleearth"}, r"imagery: geosound has bingmap and"),
            ({"path": "geo", "imagery": "bingmap", "split": "test"}, r"no split 'test' \(it has"),
            ({"path": "geo", "columns": {"image": "photo"}}, r"no column 'photo' \(it has sample"),
            ({"path": "damaged.parquet"}, r"path: damaged.parquet cannot be read as Parquet"),
            ({"path": "geo", "columns": {"image": "audio"}}, r"native_px: is missing"),
            ({"path": "notes.parquet"}, r"none of the columns of geosound \(it has note\)"),
            (
                {"path": "notes.parquet", "columns": {"caption": "note"}, "required": ["audio"]},
                r"required: .* has nothing for audio",
            ),
        ],
    )
    def test_what_cannot_be_opened(
        self, opened: Opener, root: Path, keys: dict[str, Any], message: str
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (root / "damaged.parquet").write_bytes(b"PAR1 and no more")
        pq.write_table(pa.table({"note": ["x"]}), root / "notes.parquet")
        with pytest.raises(InputError, match=message) as caught:
            opened(**keys)
        assert str(caught.value).startswith("data.toml, [train]")
        assert "\n" not in str(caught.value)
