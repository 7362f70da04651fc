"""Tables and folders of one's own."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from soundmap.errors import InputError, UsageError
from soundmap.products.samples import (
    FIELDS,
    BadSample,
    Sample,
    Samples,
    SamplesConfig,
    StreamedSamples,
    check,
    open_samples,
)
from soundmap.products.samples.decoding import Undecodable, decode_image

soundfile = pytest.importorskip("soundfile")

RATE = 32_000


def picture(side: int = 12, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def clip(seconds: float = 0.1, kind: str = "FLAC", rate: int = RATE, channels: int = 1) -> bytes:
    wave = 0.1 * np.sin(np.arange(round(seconds * rate)) * 0.3)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave] * channels, 1), rate, format=kind)
    return file.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def open_at(root: Path, split: str = "train", fields: Any = FIELDS, **keys: Any) -> Any:
    keys = {"gsd_m": 1, "native_px": 12} | keys
    return open_samples(SamplesConfig.from_table(keys, "d.toml", root), split, fields)


HEADER = "image,audio,caption,image_caption,lat,lon,date,source,label,split"


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    put(tmp_path / "pics" / "a.png", picture(seed=1))
    put(tmp_path / "a.flac", clip(channels=2, rate=16_000))

    def table(*rows: str, header: str = HEADER) -> Path:
        put(tmp_path / "own.csv", "\n".join([header, *rows]) + "\n")
        return tmp_path

    return table


Table = Callable[..., Path]


class TestTable:
    def test_everything_and_nothing(self, table: Table) -> None:
        root = table(
            'pics/a.png,a.flac,"hens, two",a farm,51.5,-0.1,2012-05-03 13:00,yfcc,farm,train',
            ",,a brook,,,,,,,train",
            "pics/a.png,,,,,,,,,val",
        )
        samples = open_at(root, kind="table", path="own.csv")
        assert isinstance(samples, Samples)
        assert not isinstance(samples, StreamedSamples)
        assert len(samples) == 2
        first = samples[0]
        pixels = np.asarray(Image.open(root / "pics" / "a.png")).transpose(2, 0, 1)
        np.testing.assert_array_equal(first.image, pixels)
        assert first.wave.shape == (3200,)
        assert first.audio_caption == "hens, two"
        assert first.image_captions == {1: "a farm"}
        assert (first.lat, first.lon, first.month, first.hour) == (51.5, -0.1, 5, 13)
        assert (first.audio_source, first.label, first.key) == ("yfcc", "farm", "own.csv:2")
        second = samples[1]
        assert second == Sample("own.csv:3", audio_caption="a brook")
        assert samples[-1] == second
        assert len(open_at(root, "validation", kind="table", path="own.csv")) == 1
        with pytest.raises(InputError, match=r"no split 'test' \(it has train, validation\)"):
            open_at(root, "test", kind="table", path="own.csv")
        again = pickle.loads(pickle.dumps(samples))
        assert again[1] == second

    def test_columns_by_other_names(self, table: Table) -> None:
        root = table("pics/a.png\t7\t25\tnight\t3\tx\ty", header="pic\tm\th\tk\tfold\tz1\tz5")
        (root / "own.csv").rename(root / "own.tsv")
        columns = {"image": "pic", "month": "m", "hour": "h", "key": "k", "split": "fold"}
        samples = open_at(
            root,
            "test",
            kind="table",
            path="own.tsv",
            columns=columns | {"image_caption": {"1": "z1", "5": "z5"}},
            splits={"test": ["3", "4"]},
        )
        row = samples[0]
        assert (row.key, row.month, row.hour) == ("night", 7, None)
        assert row.image_captions == {1: "x", 5: "y"}
        assert samples.fields == {"image", "image_caption"}
        with pytest.raises(InputError, match=r"^d.toml, columns: .* has no column 'nix' \(it has"):
            open_at(root, kind="table", path="own.tsv", columns={"image": "nix"})

    def test_parquet_that_names_files(self, table: Table) -> None:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        root = table()
        when = [datetime(2020, 6, 1, 7, 30), None]
        rows = pa.table(
            {"image": ["pics/a.png", None], "lat": [1.0, 2.0], "lon": [3.0, 4.0], "date": when}
        )
        pq.write_table(rows, root / "own.parquet")
        samples = open_at(root, kind="table", path="own.parquet")
        assert (samples[0].lat, samples[0].month, samples[0].hour) == (1.0, 6, 7)
        assert samples[0].image.shape == (3, 12, 12)
        with pytest.raises(BadSample, match="nothing there"):
            samples[1]
        pq.write_table(pa.table({"image": [picture()]}), root / "own.parquet")
        with pytest.raises(InputError, match='read it with kind = "parquet"'):
            open_at(root, kind="table", path="own.parquet")

    def test_what_is_not_asked_for_is_not_looked_at(self, table: Table) -> None:
        root = table("gone.png,a.flac,hens,,,,,,,", "gone.png,gone.flac,,,,,,,,")
        asked = {"kind": "table", "path": "own.csv"}
        assert open_at(root, fields=["audio_caption"], **asked)[0].audio_caption == "hens"
        samples = open_at(root, fields="audio", **asked)
        assert samples[0].image is None
        assert math.isnan(samples.gsd_m)
        assert check(samples).counts == {"audio file missing": 1}
        with pytest.raises(UsageError, match="opened for it"):
            check(samples, ["image"])
        with pytest.raises(UsageError, match="'sound' is none of image, audio"):
            open_at(root, fields=["sound"], **asked)

    def test_every_fault_is_found(self, table: Table, tmp_path: Path) -> None:
        put(tmp_path / "short.jpg", picture(64, kind="JPEG")[:-700])
        put(tmp_path / "deep.png", picture(mode="I;16"))
        put(tmp_path / "text.flac", "not sound")
        put(tmp_path / "zero.wav", clip(0.1, "WAV")[:44] + bytes(6400))
        put(tmp_path / "loop.png", "")
        good = "pics/a.png,a.flac,hens,,1,2,,,,"
        faults = {
            "pics/b.png,a.flac,hens,,1,2,,,,": "image file missing",
            "pics,a.flac,hens,,1,2,,,,": "image file missing",
            "short.jpg,a.flac,hens,,1,2,,,,": "image unreadable",
            "deep.png,a.flac,hens,,1,2,,,,": "image unreadable",
            "loop.png,a.flac,hens,,1,2,,,,": "image unreadable",
            "pics/a.png,text.flac,hens,,1,2,,,,": "audio unreadable",
            "pics/a.png,zero.wav,hens,,1,2,,,,": "audio silent",
            "pics/a.png,b.wav,hens,,1,2,,,,": "audio file missing",
            "pics/a.png,a.flac,,,1,2,,,,": "no audio caption",
            "pics/a.png,,hens,,1,2,,,,": "no audio",
            "pics/a.png,a.flac,hens,,90.01,2,,,,": "place off the Earth",
            "pics/a.png,a.flac,hens,,nan,2,,,,": "place off the Earth",
            "pics/a.png,a.flac,hens,,,2,,,,": "place off the Earth",
            "pics/a.png,a.flac,hens,,1,200,,,,": "place off the Earth",
            "pics/a.png,a.flac,hens,,here,2,,,,": "place off the Earth",
            "pics/a.png,a.flac": "row malformed",
        }
        root = table(good, *faults, "pics/a.png,a.flac,hens,,1,2,whenever,,,")
        asked = {"kind": "table", "path": "own.csv", "required": ["audio", "audio_caption"]}
        samples = open_at(root, **asked)
        seen = []
        bad = check(samples, ["image"], seen.append)
        assert {k: r for k, r, _ in bad.rows} == {
            f"own.csv:{line}": reason for line, reason in enumerate(faults.values(), 3)
        }
        assert seen == list(range(1, len(faults) + 3))
        assert samples[len(samples) - 1].month is None

    def test_a_long_recording_is_read_from_its_beginning(self, table: Table) -> None:
        root = table(",long.flac,,,,,,,,")
        put(root / "long.flac", clip(3.0, rate=8000))
        samples = open_at(root, kind="table", path="own.csv", longest_s=0.5)
        assert samples[0].wave.shape == (16_000,)

    @pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
    def test_rasters_and_odd_pictures(self, table: Table) -> None:
        import rasterio

        root = table("float.tif,,,,,,,,,", "four.tif,,,,,,,,,", "palette.png,,,,,,,,,")
        pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 9), dtype=np.uint8)
        profile = {"driver": "GTiff", "width": 9, "height": 8, "count": 4}
        with rasterio.open(root / "float.tif", "w", dtype="float32", **profile) as file:
            file.write(pixels.astype(np.float32))
        planes = {"interleave": "band", "compress": "zstd", "photometric": "minisblack"}
        with rasterio.open(root / "four.tif", "w", dtype="uint8", **profile, **planes) as file:
            file.write(pixels)
        Image.fromarray(pixels[:3].transpose(1, 2, 0)).quantize().save(root / "palette.png")
        samples = open_at(root, kind="table", path="own.csv")
        assert check(samples).counts == {"image unreadable": 1}
        np.testing.assert_array_equal(samples[1].image, pixels[:3])
        assert samples[2].image.shape == (3, 8, 9)
        with pytest.raises(Undecodable, match="image unreadable"):
            decode_image((root / "four.tif").read_bytes(), root)

    def test_spectrograms_in_files(self, table: Table) -> None:
        root = table("a.npy", "b.npy", "c.npy", "a.flac", header="mel")
        mel = np.random.default_rng(0).normal(-40, 10, (2, 1, 1001, 64)).astype(np.float32)
        np.save(root / "a.npy", mel)
        np.save(root / "b.npy", mel[0])
        samples = open_at(root, kind="table", path="own.csv")
        np.testing.assert_array_equal(samples[0].mel, mel)
        assert [reason for _, reason, _ in check(samples).rows] == [
            "mel shape wrong",
            "mel file missing",
            "mel unreadable",
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"", "own.csv is empty"),
            (b"image,image\n", "has the column 'image' twice"),
            (b"one,two\n1,2\n", r"no column with a usual name \(it has one, two\)"),
            (b"image\n", "holds no rows"),
            (b"image\n\xff\xfe\n", "cannot be read as a table"),
            (b'image\n"a\n', "cannot be read as a table"),
        ],
    )
    def test_what_is_no_table(self, tmp_path: Path, text: bytes, message: str) -> None:
        put(tmp_path / "own.csv", text)
        with pytest.raises(InputError, match=message) as caught:
            open_at(tmp_path, kind="table", path="own.csv")
        assert "\n" not in str(caught.value)

    def test_files_of_splits(self, tmp_path: Path) -> None:
        for name in ("train", "val", "test"):
            put(tmp_path / f"{name}.csv", f"caption\n{name}\n")
        asked = {"kind": "table", "path": "."}
        assert open_at(tmp_path, "validation", **asked)[0].audio_caption == "val"
        both = open_at(tmp_path, "train", **asked, splits={"train": ["train.csv", "test.csv"]})
        assert [both[i].audio_caption for i in range(len(both))] == ["train", "test"]
        (tmp_path / "val.csv").unlink()
        with pytest.raises(InputError, match=r"no split 'validation' \(it has test, train\)"):
            open_at(tmp_path, "val", **asked)

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_damage_is_told_and_never_filled_with_zeros(
        self, tmp_path: Path, data: st.DataObject
    ) -> None:
        kind, whole = data.draw(
            st.sampled_from([("a.jpg", picture(24, kind="JPEG")), ("a.png", picture(24)),
                             ("a.flac", clip()), ("a.ogg", clip(kind="OGG"))])
        )  # fmt: skip
        cut = data.draw(st.integers(0, len(whole)))
        noise = data.draw(st.binary(max_size=8))
        put(tmp_path / kind, whole[:cut] + noise + whole[cut + len(noise) :][: cut * 7 % 3000])
        column = "image" if kind.endswith("g") and "ogg" not in kind else "audio"
        put(tmp_path / "own.csv", f"{column}\n{kind}\n")
        samples = open_at(tmp_path, kind="table", path="own.csv")
        bad = check(samples)
        if bad:
            assert set(bad.counts) <= {f"{column} unreadable", f"{column} silent"}
            return
        sample = samples[0]
        found = sample.image if column == "image" else sample.wave
        assert found.any()
        assert np.isfinite(found).all()


class TestFolder:
    def test_pairs_by_name(self, tmp_path: Path) -> None:
        put(tmp_path / "images" / "a.png", picture())
        put(tmp_path / "images" / "b.JPG", picture(kind="JPEG"))
        put(tmp_path / "images" / "a.txt", "a farm from above\n")
        put(tmp_path / "audio" / "a.flac", clip())
        put(tmp_path / "audio" / "c.ogg", clip(kind="OGG"))
        put(tmp_path / "audio" / "c.txt", "a brook")
        put(tmp_path / "audio" / ".hidden.wav", "x")
        put(tmp_path / "licence.txt", "free")
        put(
            tmp_path / "captions.csv",
            "file,caption,lat,lon,date,source\n"
            "a.flac,hens,1,2,2020-02,aporee\nb,,,,,\nd.png,gone,,,,\n",
        )
        samples = open_at(tmp_path, "val", kind="folder", path=".")
        assert len(samples) == 4
        a, b, c = (samples[i] for i in range(3))
        assert (a.key, a.audio_caption, a.image_captions) == ("a", "hens", {1: "a farm from above"})
        assert (a.lat, a.month, a.audio_source, a.label) == (1.0, 2, "aporee", None)
        assert a.image.shape == (3, 12, 12)
        assert a.wave.shape == (3200,)
        assert (b.key, b.wave, b.audio_caption) == ("b", None, "")
        assert (c.key, c.image, c.audio_caption) == ("c", None, "a brook")
        assert check(samples).rows == [("d", "image file missing", "d.png")]
        captions = open_at(tmp_path, fields=["audio_caption"], kind="folder", path=".")
        assert captions[0].image is None
        assert captions[0].image_captions == {}
        assert pickle.loads(pickle.dumps(samples))[2].key == "c"

    def test_classes_and_splits(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for number, name in enumerate(("farm", "river")):
                put(tmp_path / split / name / f"{split}{number}.png", picture(seed=number))
        put(tmp_path / "train" / "audio" / "farm" / "train0.flac", clip())
        samples = open_at(tmp_path, "train", kind="folder", path=".")
        assert [samples[i].label for i in range(len(samples))] == ["farm", "river"]
        assert [samples[i].key for i in range(len(samples))] == ["farm/train0", "river/train1"]
        assert samples[0].wave is not None
        assert samples[-1].key == "river/train1"
        with pytest.raises(IndexError):
            samples[2]
        assert open_at(tmp_path, "validation", kind="folder", path=".")[0].key == "farm/val0"
        with pytest.raises(InputError, match=r"no split 'test' \(it has train, validation\)"):
            open_at(tmp_path, "test", kind="folder", path=".")
        other = {"test": "val"}
        assert len(open_at(tmp_path, "test", kind="folder", path=".", splits=other)) == 2

    def test_what_is_no_folder_of_samples(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is no folder"):
            open_at(tmp_path, kind="folder", path="nowhere")
        with pytest.raises(InputError, match="neither images nor sound"):
            open_at(tmp_path, kind="folder", path=".")
        put(tmp_path / "a.png", picture())
        with pytest.raises(InputError, match=r"required: \. has nothing for audio"):
            open_at(tmp_path, kind="folder", path=".", required=["audio"])
        put(tmp_path / "a.jpg", picture(kind="JPEG"))
        with pytest.raises(InputError, match=r"a.jpg and .*a.png are both the image of 'a'"):
            open_at(tmp_path, kind="folder", path=".")
