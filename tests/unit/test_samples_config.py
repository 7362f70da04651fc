"""Configurations of samples, dates, and the report of bad rows."""

from __future__ import annotations

import pickle
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundmap.errors import InputError, OutputError, UsageError
from soundmap.products.samples import BadRows, BadSample, Sample, SamplesConfig
from soundmap.products.samples import report as report_module
from soundmap.products.samples.dates import month_and_hour


def put(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestConfig:
    def test_is_read_from_toml(self, tmp_path: Path) -> None:
        path = put(
            tmp_path / "data.toml",
            '[train]\nkind = "parquet"\npath = "MVRL/GeoSound"\nimagery = "sentinel"\n'
            'streaming = true\n[validation]\nkind = "table"\npath = ["a.csv", "b.csv"]\n'
            'gsd_m = 2\ncolumns = { image = "pic", image_caption = { 1 = "c1", 3 = "c3" } }\n'
            'splits = { val = "fold 5" }\nrequired = ["image"]\n',
        )
        train = SamplesConfig.read(path, "train")
        assert (train.kind, train.path, train.streaming) == ("parquet", ("MVRL/GeoSound",), True)
        assert train.pixels() == (256, 10.0)
        val = SamplesConfig.read(path, "validation")
        assert val.base == tmp_path
        assert val.columns == {"image": "pic", "image_caption": {1: "c1", 3: "c3"}}
        assert val.names_of("validation") == ("fold 5",)
        assert val.names_of("train") == ("train",)
        assert (val.gsd_m, val.required) == (2.0, ("image",))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('path = "x"', "kind: is missing"),
            ('kind = "table"', "path: is missing"),
            ('kind = "csv"\npath = "x"', "kind: must be one of parquet, table, folder, not 'csv'"),
            ('kind = "table"\npath = 3', "path: must be a text or a list of texts, not 3"),
            ('kind = "table"\npath = []', "path: is an empty list"),
            ('kind = "table"\npath = "x"\nstreem = 1', "unknown key 'streem': did you mean"),
            ('kind = "table"\npath = "x"\nstreaming = 1', "streaming: must be true or false"),
            ('kind = "table"\npath = "x"\nstreaming = true', "streaming: goes with kind"),
            ('kind = "table"\npath = "x"\ngsd_m = 0', "gsd_m: must be a number above 0, not 0"),
            ('kind = "table"\npath = "x"\ngsd_m = inf', "gsd_m: must be a number above 0"),
            ('kind = "table"\npath = "x"\nnative_px = 1.5', "native_px: must be a whole number"),
            ('kind = "table"\npath = "x"\nname = 1', "name: must be a text, not 1"),
            ('kind = "table"\npath = "x"\nrequired = "pic"', "required: 'pic' is none of image"),
            ('kind = "table"\npath = "x"\ncolumns = { pic = "a" }', "unknown key 'pic'"),
            ('kind = "table"\npath = "x"\ncolumns = { image = 1 }', "columns, image: must be the"),
            (
                'kind = "table"\npath = "x"\ncolumns = { image_caption = { z1 = "a" } }',
                "columns, image_caption: 'z1' is no zoom level",
            ),
            ('kind = "table"\npath = "x"\nsplits = "a"', "splits: must be a table"),
            ('kind = "folder"\npath = ["x", "y"]', "path: names several folders"),
            ('kind = "folder"\npath = "x"\ncolumns = { image = "a" }', "columns: does not go"),
            (
                'kind = "parquet"\npath = "x"\nschema = "geosound"\ncolumns = { image = "a" }',
                "columns: does not go with schema",
            ),
            ("kind = ", "is not TOML"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        path = put(tmp_path / "data.toml", text)
        with pytest.raises(InputError, match=message) as caught:
            SamplesConfig.read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_file_or_table(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no\.toml cannot be read"):
            SamplesConfig.read(tmp_path / "no.toml")
        path = put(tmp_path / "data.toml", "train = 1")
        with pytest.raises(InputError, match=r"has no table \[train\]"):
            SamplesConfig.read(path, "train")


DATES: list[tuple[Any, tuple[int | None, int | None]]] = [
    ("2012-05-03 13:22:11", (5, 13)),
    ("2012-05-03T00:00:00", (5, 0)),
    ("2012-05-03T23:10:00Z", (5, 23)),
    ("2012-05-03 1:20 PM PDT", (5, 13)),
    ("2012:05:03 13:22:11", (5, 13)),
    ("2012-05-03", (5, None)),
    ("20120503", (5, None)),
    ("May 2012", (5, None)),
    ("2013-02", (2, None)),
    ("03/04/2012", (3, None)),
    ("12:30", (None, 12)),
    ("2012", (None, None)),
    ("31", (None, None)),
    ("Sunday", (None, None)),
    ("2012-13-45", (None, None)),
    ("0000-00-00 00:00:00", (None, None)),
    ("summer, early morning", (None, None)),
    ("9" * 90, (None, None)),
    ("", (None, None)),
    (None, (None, None)),
    (float("nan"), (None, None)),
    (1336003200, (None, None)),
    (datetime(2020, 1, 2, 3, 4), (1, 3)),
    (datetime(2020, 1, 2), (1, None)),
    (date(2020, 12, 2), (12, None)),
]


class TestDates:
    @pytest.mark.parametrize(("value", "wanted"), DATES)
    def test_what_is_not_said_is_not_known(
        self, value: Any, wanted: tuple[int | None, int | None]
    ) -> None:
        assert month_and_hour(value) == wanted

    @settings(max_examples=50, deadline=None)
    @given(st.text(max_size=30) | st.from_regex(r"[0-9:/ TAPMZ+\-.]{1,25}", fullmatch=True))
    def test_any_text_has_an_answer(self, text: str) -> None:
        month, hour = month_and_hour(text)
        assert month is None or 1 <= month <= 12
        assert hour is None or 0 <= hour <= 23


class TestReport:
    def test_counts_and_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report_module, "LISTED", 2)
        bad = BadRows("birds train", read=10)
        assert not bad
        assert bad.summary() == "birds train: no bad rows of 10"
        for key in "abca":
            bad.add(key, "audio silent")
        bad.add("a", "image unreadable", "cut, short")
        assert bad.summary() == "birds train: 4 of 10 rows bad: 3 audio silent, 1 image unreadable"
        bad.write(tmp_path / "bad.csv")
        assert (tmp_path / "bad.csv").read_text().splitlines() == [
            "key,reason,detail",
            "a,audio silent,",
            "b,audio silent,",
            ",not listed,2 more rows",
        ]
        other = pickle.loads(pickle.dumps(bad))
        other.add("z", "audio silent")
        bad.merge(other)
        assert bad.counts == {"audio silent": 4, "image unreadable": 1}
        assert bad.read == 20
        with pytest.raises(OutputError, match="cannot be written"):
            bad.write(tmp_path / "no" / "bad.csv")

    def test_the_error_travels(self) -> None:
        error = pickle.loads(pickle.dumps(BadSample("a", "audio silent", "all of it")))
        assert (error.key, error.reason, error.detail) == ("a", "audio silent", "all of it")
        assert str(error) == "a: audio silent (all of it)"
        with pytest.raises(UsageError, match="'pic' is none of"):
            Sample("a").has("pic")
