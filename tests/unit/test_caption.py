"""Captions without a model: what is listed, how the table grows, whose fault a failure is."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soundmap.cli.caption import command
from soundmap.errors import (
    InputError,
    MissingExtra,
    ModelError,
    OutputError,
    PlanMismatch,
    UsageError,
)
from soundmap.products import caption as module
from soundmap.products.caption import CaptionListener, CaptionRequest, Summary, caption
from soundmap.products.caption_model import DEFAULT_VLM, QUESTION, Captioner
from soundmap.products.caption_table import Caption, CaptionTable

Table = Callable[..., CaptionTable]
COMMON = {"model": "m", "prompt": "What is\nheard?", "tokens": "77"}


class Teller:
    """In the place of a model: says how large a picture is and how bright, and counts."""

    name = "teller"

    def __init__(self) -> None:
        self.told = 0
        self.loaded = 0
        self.batches: list[int] = []
        self.refused: set[int] = set()
        """Widths that it fails on."""

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        if any(picture.width in self.refused for picture in pictures):
            raise ValueError("features do not\nmatch")
        self.batches.append(len(pictures))
        self.told += len(pictures)
        return [f"{p.width} x {p.height}, {p.getpixel((0, 0))[0]}" for p in pictures]


@pytest.fixture
def teller(monkeypatch: pytest.MonkeyPatch) -> Teller:
    made = Teller()

    def load(*_: object) -> Teller:
        made.loaded += 1
        return made

    monkeypatch.setattr(module, "Captioner", load)
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures, 20 px wide and more, the red of each its number."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, photos: Path) -> Callable[..., Summary]:
    def call(listener: CaptionListener | None = None, **options: Any) -> Summary:
        settings = {"images": str(photos), "out": tmp_path / "out.csv", "batch": 2} | options
        return caption(CaptionRequest(**settings), listener)

    return call


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Stop(CaptionListener):
    """Interrupts a run after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def reported(self, rows: Sequence[Caption], empty: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class TestWhatIsCaptioned:
    def test_a_folder_in_order_without_what_is_no_picture(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, photos: Path
    ) -> None:
        (photos / "notes.txt").write_text("no")
        (photos / ".6.png").write_text("half a copy")
        assert run() == Summary(made=7, before=0, empty=0, failed=())
        found = rows(tmp_path / "out.csv")
        assert [row["image"] for row in found] == [str(photos / f"{i}.png") for i in range(7)]
        assert [row["caption"] for row in found] == [f"{20 + i} x 30, {i}" for i in range(7)]
        assert {row["model"] for row in found} == {DEFAULT_VLM}
        assert {row["prompt"] for row in found} == {QUESTION}
        assert teller.batches == [2, 2, 2, 1]

    def test_names_lead_from_the_table_to_the_images(
        self,
        teller: Teller,
        run: Callable[..., Summary],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tables").mkdir()
        run(images="photos/[01].png", out=Path("tables/out.csv"))
        found = rows(tmp_path / "tables" / "out.csv")
        assert [row["image"] for row in found] == ["../photos/0.png", "../photos/1.png"]
        # So a table of captions can be captioned once more, and from elsewhere.
        monkeypatch.chdir("/")
        again = run(images=str(tmp_path / "tables" / "out.csv"), out=tmp_path / "tables" / "2.csv")
        assert (again.made, len(again.failed)) == (2, 0)

    def test_a_table_lists_what_it_cannot_name(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        table = tmp_path / "list.csv"
        table.write_text("\ufeffid,image\n1,photos/1.png\n2,\n3,photos/1.png\n4,photos/none.png\n")
        done = run(images=str(table))
        assert (done.made, done.before) == (1, 0)
        assert [(c.image, c.error) for c in done.failed] == [
            ("(row 2)", f"row 2 of {table} names no image"),
            ("photos/none.png", "no such file"),
        ]
        assert [row["image"] for row in rows(tmp_path / "out.csv")] == [
            "photos/1.png",
            "(row 2)",
            "photos/none.png",
        ]

    def test_a_crop_is_the_middle(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        pixels = np.zeros((30, 50, 3), np.uint8)
        pixels[10:20, 20:30] = 200
        Image.fromarray(pixels).save(tmp_path / "dot.png")
        Image.new("RGB", (9, 40)).save(tmp_path / "narrow.png")
        done = run(images=str(tmp_path / "*.png"), crop=10)
        assert rows(tmp_path / "out.csv")[0]["caption"] == "10 x 10, 200"
        assert done.failed[0].error == "9 x 40 px are too few for --crop 10"

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_kind_of_8_bit_picture(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, mode: str
    ) -> None:
        Image.new(mode, (40, 40)).save(tmp_path / "one.tif")
        assert run(images=str(tmp_path / "one.tif")).made == 1

    def test_what_is_no_8_bit_picture_is_listed(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, photos: Path
    ) -> None:
        Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(photos / "deep.png")
        noise = np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / "torn.png")
        (photos / "torn.png").write_bytes((photos / "torn.png").read_bytes()[:2000])
        (photos / "word.jpg").write_text("not a picture")
        done = run()
        assert done.made == 7
        reasons = {Path(c.image).name: c.error for c in done.failed}
        assert "not a picture of 8 bits" in reasons["deep.png"]
        assert "cannot be read as a picture" in reasons["torn.png"]
        assert reasons["word.jpg"].startswith("not a picture")
        assert sum(bool(row["error"]) for row in rows(tmp_path / "out.csv")) == 3

    def test_windows_cover_a_raster(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, write: Any
    ) -> None:
        bands = np.full((3, 100, 70), 9, np.uint8)
        bands[:, :30, :30] = 0
        raster = write("city.tif", bands, nodata=0)
        done = run(images=str(raster), windows=30)
        assert (done.made, done.empty) == (11, 1)
        found = rows(tmp_path / "out.csv")
        assert {row["image"] for row in found} == {str(raster)}
        places = [(int(row["row"]), int(row["col"])) for row in found]
        assert places == [(r, c) for r in (0, 30, 60, 70) for c in (0, 30, 40)][1:]
        lon, lat = float(found[0]["lon"]), float(found[0]["lat"])
        # 450 m east and 150 m south of the corner, which lies on the zone's central meridian
        assert lon == pytest.approx(15 + 450 / 111320 / np.cos(np.radians(lat)), abs=1e-4)
        assert lat == pytest.approx(49.6512, abs=1e-4)
        again = run(images=str(raster), windows=30)
        assert (again.made, again.before, again.empty) == (0, 11, 1)

    @pytest.mark.parametrize(
        ("options", "kind", "about"),
        [
            ({"images": "nowhere"}, InputError, "nowhere: no such file or folder"),
            ({"images": "none/*.png"}, InputError, "no file matches"),
            ({"images": " "}, UsageError, "no images were named"),
            ({"batch": 0}, UsageError, "--batch 0"),
            ({"crop": -1}, UsageError, "--crop -1"),
            ({"prompt": " "}, UsageError, "the prompt is empty"),
            ({"precision": "int8"}, UsageError, "--precision"),
            ({"crop": 5, "windows": 5}, UsageError, "give one of them"),
            ({"bands": (1, 2, 3)}, UsageError, "give --windows too"),
            ({"images": "sample", "windows": 9000}, UsageError, "do not fill one window"),
            ({"out": Path("out.txt")}, OutputError, "name it .csv or .parquet"),
            ({"out": Path("none/out.csv")}, OutputError, "does not exist"),
        ],
    )
    def test_what_cannot_be_is_refused_before_the_model_is_read(
        self,
        teller: Teller,
        run: Callable[..., Summary],
        options: dict[str, Any],
        kind: type[Exception],
        about: str,
    ) -> None:
        with pytest.raises(kind, match=about):
            run(**options)
        assert not teller.loaded

    def test_tables_without_images(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        table = tmp_path / "list.csv"
        table.write_text("file,lat\na.png,3\n")
        with pytest.raises(InputError, match=r"no column 'image' \(it has file, lat\)"):
            run(images=str(table))
        table.write_text("image\n")
        with pytest.raises(InputError, match="no rows"):
            run(images=str(table))
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"holds no pictures .*\*\*"):
            run(images=str(tmp_path / "empty"))


class TestGoingOn:
    def test_a_stopped_run_goes_on_and_ends_the_same(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
        run(out=whole)
        with pytest.raises(KeyboardInterrupt):
            run(Stop(after=2))
        assert len(rows(out)) == 4
        teller.told = 0
        assert run() == Summary(made=3, before=4, empty=0, failed=())
        assert teller.told == 3
        assert out.read_bytes() == whole.read_bytes()

    def test_a_line_that_was_cut_short_is_done_again(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        out = tmp_path / "out.csv"
        run()
        whole = out.read_bytes()
        # In the midst of a word, of a name, and of a letter; the last with a line break to spare.
        for cut in (whole[:-30], whole[: whole.rindex(b"6.png")], whole[:-1], b"\xc3"):
            out.write_bytes(cut if len(cut) > 1 else whole + cut)
            teller.told = 0
            done = run()
            assert teller.told == done.made <= 1
            assert out.read_bytes() == whole

    def test_nothing_left_needs_no_model(self, teller: Teller, run: Callable[..., Summary]) -> None:
        run()
        assert run() == Summary(made=0, before=7, empty=0, failed=())
        assert teller.loaded == 1

    def test_failed_images_are_tried_again(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, photos: Path
    ) -> None:
        good = (photos / "3.png").read_bytes()
        (photos / "3.png").write_text("broken")
        assert len(run().failed) == 1
        # A run over other images leaves the row as it is.
        run(images=str(photos / "[01].png"))
        assert sum(bool(row["error"]) for row in rows(tmp_path / "out.csv")) == 1
        (photos / "3.png").write_bytes(good)
        teller.told = 0
        assert run() == Summary(made=1, before=6, empty=0, failed=())
        assert teller.told == 1
        found = rows(tmp_path / "out.csv")
        assert len(found) == 7
        assert not any(row["error"] for row in found)

    @pytest.mark.parametrize(
        ("change", "about"),
        [
            ({"model": "other/one"}, "model 'llava-hf/.*', now 'other/one'"),
            ({"prompt": "Why?"}, "prompt '.*', now 'Why\\?'"),
            ({"crop": 9}, "crop 'none', now '9'"),
            ({"tokens": 5}, "tokens '77', now '5'"),
            ({"images": "sample", "windows": 400}, "columns of pictures"),
        ],
    )
    def test_other_settings_are_refused(
        self,
        teller: Teller,
        run: Callable[..., Summary],
        tmp_path: Path,
        change: dict[str, Any],
        about: str,
    ) -> None:
        run()
        before = (tmp_path / "out.csv").read_bytes()
        with pytest.raises(PlanMismatch, match=about):
            run(**change)
        assert (tmp_path / "out.csv").read_bytes() == before
        assert teller.loaded == 1
        if "windows" not in change:
            assert run(**change, overwrite=True).made == 7

    def test_what_is_no_table_of_captions_is_left_alone(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        out = tmp_path / "out.csv"
        out.write_text("image,lat\na.png,3")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="no table of captions"):
                run(overwrite=overwrite)
        assert out.read_text() == "image,lat\na.png,3"

    def test_a_row_that_lost_a_value_is_told(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        out = tmp_path / "out.csv"
        run()
        lines = out.read_text().splitlines()
        lines[2] = lines[2].partition(",")[2]
        out.write_text("\n".join(lines) + "\n")
        with pytest.raises(OutputError, match="record 3 has 5 values and not 6"):
            run()

    def test_odd_names_and_captions_come_back(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv"
        odd = ['a, "b".png', "  two  spaces.png", "ü\udcff.png", "=1+1.png"]
        with CaptionTable(path, COMMON, places=False) as table:
            table.append([Caption(name, "Birds,\n\n wind.") for name in odd])
        table = CaptionTable(path, COMMON, places=False)
        assert table.done == {(name,) for name in odd}
        assert path.read_bytes().count(b"Birds, wind.") == 4

    def test_parquet(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, photos: Path
    ) -> None:
        pytest.importorskip("pyarrow")
        import pandas as pd

        out = tmp_path / "out.parquet"
        (photos / "3.png").write_text("broken")
        with pytest.raises(KeyboardInterrupt):
            run(Stop(after=2), out=out)
        assert not out.exists()
        done = run(out=out)
        assert (done.made, done.before, len(done.failed)) == (3, 3, 1)
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.parquet"]
        assert len(pd.read_parquet(out)) == 7
        assert run(out=out).before == 6
        # As the list of another run, and for windows with their places as numbers.
        assert run(images=str(out)).made == 6
        run(images="sample", windows=500, out=tmp_path / "w.parquet")
        assert run(images="sample", windows=500, out=tmp_path / "w.parquet").made == 0
        assert pd.read_parquet(tmp_path / "w.parquet")["row"].dtype == np.int64

    @pytest.mark.parametrize("form", ["struct", "bytes"])
    def test_pictures_in_parquet_itself(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path, photos: Path, form: str
    ) -> None:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        files = sorted(photos.iterdir())[:5]
        held: list[Any] = [file.read_bytes() for file in files]
        held[1] = b"no picture"
        keys: list[str] = [f"aporee-{i}" for i in range(5)]
        if form == "struct":
            # One with its file's name alone, one with neither, and two of one name.
            held = [{"bytes": data, "path": f"{i % 4}.png"} for i, data in enumerate(held)]
            held[2] = {"bytes": None, "path": str(files[2])}
            held[3] = None
        table = pa.table({"image": held, "sample_id": keys})
        pq.write_table(table, tmp_path / "set.parquet", row_group_size=2)
        done = run(images=str(tmp_path / "set.parquet"), out=tmp_path / "out.csv")
        with (tmp_path / "out.csv").open(newline="") as file:
            rows = {row["image"]: row for row in csv.DictReader(file)}
        if form == "bytes":
            assert list(rows) == keys
            assert (done.made, [one.image for one in done.failed]) == (4, ["aporee-1"])
            return
        assert list(rows) == ["(row 1)", "1.png", str(files[2]), "aporee-3", "(row 5)"]
        assert (done.made, len(done.failed)) == (3, 2)
        assert "not a picture" in rows["1.png"]["error"]
        assert "holds no image" in rows["aporee-3"]["error"]
        with Image.open(files[4]) as last:
            assert rows["(row 5)"]["caption"].startswith(f"{last.width} x {last.height}")

    def test_parquet_without_its_library(
        self, teller: Teller, run: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtra, match=r"soundmap\[caption\]"):
            run(out=Path("out.parquet"))


class TestWhoseFault:
    def test_one_picture_that_the_model_refuses_does_not_stop_the_rest(
        self, teller: Teller, run: Callable[..., Summary], tmp_path: Path
    ) -> None:
        teller.refused = {23}
        done = run(batch=4)
        assert (done.made, len(done.failed)) == (6, 1)
        assert done.failed[0].error == "the model does not take it: features do not match"
        assert [bool(row["error"]) for row in rows(tmp_path / "out.csv")].index(True) == 3

    @pytest.mark.parametrize("batch", [1, 4])
    def test_a_model_that_takes_none_at_first_is_at_fault_itself(
        self, teller: Teller, run: Callable[..., Summary], batch: int
    ) -> None:
        teller.refused = set(range(100))
        with pytest.raises(ModelError, match="teller does not work with images and a question"):
            run(batch=batch)

    def test_no_words_are_a_failure(
        self,
        run: Callable[..., Summary],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "Captioner", lambda *_: lambda pictures: [""] * len(pictures))
        done = run()
        assert done.made == 0
        assert {c.error for c in done.failed} == {"the model gave no words"}


class TestTheModelsFiles:
    def test_missing_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingExtra, match=r"pip install 'soundmap\[caption\]'"):
            Captioner("any")

    @pytest.mark.parametrize(
        ("options", "about"), [({"device": "tpu"}, "tpu"), ({"precision": "int4"}, "int4")]
    )
    def test_unknown_choices(self, options: dict[str, str], about: str) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(UsageError, match=about):
            Captioner("any", **options)

    def test_help_names_the_default_model(self) -> None:
        default = next(p.default for p in command.params if p.name == "model")
        assert default == DEFAULT_VLM
