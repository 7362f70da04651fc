"""What is known of the published checkpoints, and finding models by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from soundmap.encoder import find_model
from soundmap.encoder.card import installed_root, read_card
from soundmap.encoder.hub import known_models, look_up, pull
from soundmap.encoder.published import (
    CAVEAT,
    FIELDS,
    LICENCE,
    PUBLISHED,
    card_input,
    published_as,
)
from soundmap.errors import MissingExtra, ModelError, UsageError


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of installed models, so that this machine's own do not matter."""
    folder = tmp_path / "installed"
    monkeypatch.setenv("SOUNDMAP_MODELS", str(folder))
    return folder


def install(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    known = PUBLISHED.get(name, next(iter(PUBLISHED.values())))
    card = {
        "name": name,
        "summary": "A card without a model.",
        "licence": LICENCE,
        "architecture": {},
        "input": card_input(known.imagery, known.fields),
        "files": {},
    }
    (made / "model.json").write_text(json.dumps(card))
    return made


class TestFacts:
    def test_the_six(self) -> None:
        assert {model.file for model in PUBLISHED.values()} == {
            f"sat2sound/{imagery}_{kind}.ckpt"
            for imagery in ("bingmap", "sentinel", "SoundingEarth")
            for kind in ("nometa", "withmeta")
        }
        assert list(PUBLISHED) == [model.name for model in PUBLISHED.values()]
        assert all(name == name.lower() for name in PUBLISHED)

    @pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
    def test_metadata_is_that_of_the_name(self, model: object) -> None:
        assert isinstance(model, type(next(iter(PUBLISHED.values()))))
        spec = model.input_spec
        if "nometa" in model.name:
            assert not model.fields
            assert spec.metadata == ()
        else:
            assert spec.metadata == ("lonlat", "month", "hour")
            assert model.fields == tuple(field for field in FIELDS if field in model.fields)
        assert "asource" not in model.fields or "soundingearth" not in model.name

    @pytest.mark.parametrize(
        ("name", "gsd_m", "native_px", "scales"),
        [
            ("sat2sound-bingmap-nometa", 0.6, 300, (1, 3, 5)),
            ("sat2sound-sentinel-withmeta", 10.0, 256, (1, 3, 5)),
            ("sat2sound-soundingearth-nometa", 0.2, 256, (1,)),
        ],
    )
    def test_input(self, name: str, gsd_m: float, native_px: int, scales: tuple[int, ...]) -> None:
        spec = PUBLISHED[name].input_spec
        assert spec.gsd_m == ((gsd_m, gsd_m),)
        assert (spec.window_px, spec.patch_px, spec.native_px) == (224, 16, native_px)
        assert spec.scales == scales

    def test_the_card_says_the_same(self, installed: Path) -> None:
        for name, model in PUBLISHED.items():
            assert read_card(install(installed, name)).spec == model.input_spec

    def test_metadata_helps_and_the_caveat_says_how(self) -> None:
        for plain, told in zip(*[iter(PUBLISHED.values())] * 2, strict=True):
            assert (plain.name[:-6], told.name[-8:]) == (told.name[:-8], "withmeta")
            for one, other in (
                (plain.image_to_audio, told.image_to_audio),
                (plain.audio_to_image, told.audio_to_image),
            ):
                assert 0.1 < one.recall_at_10_percent < other.recall_at_10_percent < 1
                assert one.median_rank > other.median_rank
        for word in ("not measured", "archive", "masks"):
            assert word in CAVEAT

    def test_a_file_is_known_by_its_name_and_its_settings(self) -> None:
        found = published_as("bingmap_withmeta.ckpt", "bingmap", tuple(FIELDS))
        assert found is PUBLISHED["sat2sound-bingmap-withmeta"]
        assert published_as("bingmap_withmeta.ckpt", "bingmap", ()) is None
        assert published_as("bingmap_withmeta.ckpt", "sentinel", tuple(FIELDS)) is None
        assert published_as("own.ckpt", "bingmap", tuple(FIELDS)) is None


class TestFinding:
    def test_where_models_are_installed(
        self, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert installed_root() == installed
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("SOUNDMAP_MODELS", "~/own")
        assert installed_root() == tmp_path / "own"
        monkeypatch.setenv("SOUNDMAP_MODELS", "")
        assert installed_root().name == "models"
        assert "soundmap" in installed_root().parts

    def test_by_name(self, installed: Path) -> None:
        folder = install(installed, "own")
        assert find_model("own").folder == folder
        assert find_model(str(folder)).folder == folder
        assert find_model("soundmap-small").folder.parent != installed

    def test_a_bundled_name_cannot_be_taken(self, installed: Path) -> None:
        install(installed, "soundmap-small")
        assert find_model("soundmap-small").folder.parent != installed

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_a_published_one_that_is_not_here(self, installed: Path, name: str) -> None:
        with pytest.raises(UsageError, match=f"soundmap models pull {name}"):
            find_model(name)
        install(installed, name)
        assert find_model(name).name == name

    def test_a_slip_of_the_pen(self, installed: Path) -> None:
        install(installed, "own")
        with pytest.raises(UsageError, match="did you mean 'sat2sound-sentinel-nometa'") as caught:
            find_model("sat2sound-sentinel-no-meta")
        assert "soundmap-small, own" in str(caught.value)

    @pytest.mark.parametrize("name", ["..", ".", "converted"])
    def test_no_way_out_of_the_folder(self, installed: Path, name: str) -> None:
        installed.mkdir()
        (installed.parent / "model.json").write_text("{}")
        with pytest.raises((UsageError, ModelError)) as caught:
            find_model(name)
        assert str(installed.parent) not in str(caught.value)

    def test_a_file_that_is_no_checkpoint(self, installed: Path) -> None:
        path = install(installed, "own") / "model.json"
        with pytest.raises(UsageError, match="give the folder of a model"):
            find_model(str(path))


class TestListing:
    def test_all(self, installed: Path) -> None:
        install(installed, "sat2sound-bingmap-nometa")
        broken = install(installed, "broken")
        (broken / "model.json").write_text("{")
        states = {entry.name: entry.state for entry in known_models()}
        assert states.pop("soundmap-small") == "bundled"
        assert states.pop("sat2sound-bingmap-nometa") == "installed"
        assert states.pop("broken") == "damaged"
        assert set(states.values()) == {"to be pulled"}
        assert len(states) == 5
        assert [e.problem for e in known_models() if e.name == "broken"] != [""]

    def test_look_up(self, installed: Path) -> None:
        name = "sat2sound-bingmap-nometa"
        assert look_up("soundmap-small").state == "bundled"
        assert (look_up(name).state, look_up(name).card) == ("to be pulled", None)
        folder = install(installed, name)
        assert look_up(name).state == "installed"
        elsewhere = folder.rename(installed.parent / "elsewhere")
        assert look_up(str(elsewhere)).state == "in a folder"
        with pytest.raises(UsageError, match="models convert"):
            look_up(str(elsewhere / "model.json"))
        with pytest.raises(UsageError, match="no model named"):
            look_up("nothing")

    def test_what_is_here_is_not_fetched(self, installed: Path) -> None:
        folder = install(installed, "sat2sound-bingmap-nometa")
        card, fetched = pull("sat2sound-bingmap-nometa")
        assert (card.folder, fetched) == (folder, False)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(MissingExtra, match=r"pip install 'soundmap\[sat2sound\]'"):
            pull("sat2sound-bingmap-nometa")

    def test_what_is_not_published_cannot_be_pulled(self) -> None:
        with pytest.raises(UsageError, match="not a published model"):
            pull("soundmap-small")
