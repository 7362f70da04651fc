"""Concept files, banks, and the choice of what to map."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from soundmap.concepts import FREE_COLOURS, bank_of, choose_concepts, concept_vectors
from soundmap.encoder import ModelCard
from soundmap.encoder.bank_files import (
    DEFAULT_COLOUR,
    Calibration,
    Concept,
    read_bank,
    read_concepts,
    read_generic,
    write_bank,
)
from soundmap.encoder.card import read_card
from soundmap.errors import InputError, ModelError, UsageError
from soundmap.testing.fake_encoder import FakeEncoder
from tests.unit.messages import one_line

CARD: dict[str, Any] = {
    "name": "fake",
    "summary": "A model for tests.",
    "licence": "Apache-2.0",
    "architecture": {"dim": 16},
    "input": {
        "window_px": 64,
        "patch_px": 8,
        "native_px": 64,
        "gsd_m": [[1.0, 1.2], [7.03, 10.0]],
    },
    "files": {},
}
CONCEPTS = [
    {"name": "birdsong", "group": "biophony", "colour": "#33a02c", "prompts": ["birds", "a lark"]},
    {"name": "road traffic", "group": "anthrophony", "colour": "#e31a1c", "prompts": ["cars"]},
    {"name": "waves", "group": "geophony", "colour": "#1f78b4", "prompts": ["surf", "the sea"]},
]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def folder(tmp_path: Path, encoder: FakeEncoder) -> Path:
    """A model folder with a card and a bank, but without weights."""
    made = tmp_path / "fake"
    made.mkdir()
    (made / "model.json").write_text(json.dumps(CARD))
    (made / "concepts.json").write_text(json.dumps({"concepts": CONCEPTS}))
    write(made, encoder)
    return made


def write(folder: Path, encoder: FakeEncoder, **changes: NDArray[np.float32] | None) -> None:
    arrays = {
        "vectors": concept_vectors(encoder, read_concepts(folder / "concepts.json")),
        "share_scale": np.array([7.5], np.float32),
    }
    for detail, level in (("image", 1.0), ("patch", 2.0)):
        arrays[f"{detail}.scale"] = np.array([level, level + 0.1, level + 0.2], np.float32)
        arrays[f"{detail}.bias"] = -arrays[f"{detail}.scale"]
        arrays[f"{detail}.generic"] = np.array([level * 10, -level], np.float32)
    for key, value in changes.items():
        if value is not None:
            arrays[key.replace("__", ".")] = value
    write_bank(folder, read_card(folder).hash, arrays)


@pytest.fixture
def card(folder: Path) -> ModelCard:
    return read_card(folder)


class TestConceptFiles:
    def read(self, tmp_path: Path, text: str, name: str = "mine.txt") -> tuple[Concept, ...]:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_concepts(path)

    def fails(self, tmp_path: Path, text: str, name: str = "mine.txt") -> str:
        with pytest.raises(InputError) as caught:
            self.read(tmp_path, text, name)
        message = one_line(caught)
        assert name in message
        return message

    def test_text(self, tmp_path: Path) -> None:
        text = (
            "# what I listen for\n\nchurch bells\n"
            "  Blackbird :  a blackbird sings; song of a merle ;\nrain # on leaves\n"
        )
        found = self.read(tmp_path, text)
        assert found == (
            Concept("church bells", "text", DEFAULT_COLOUR, ("church bells",)),
            Concept("Blackbird", "text", DEFAULT_COLOUR, ("a blackbird sings", "song of a merle")),
            Concept("rain", "text", DEFAULT_COLOUR, ("rain",)),
        )
        assert self.read(tmp_path, text.replace("\n", "\r\n")) == found
        assert self.read(tmp_path, text, "no_suffix") == found

    @pytest.mark.parametrize("bare", [False, True])
    def test_json(self, tmp_path: Path, bare: bool) -> None:
        entries = [*CONCEPTS, {"name": "église"}]
        data: Any = entries if bare else {"concepts": entries}
        found = self.read(tmp_path, json.dumps(data), "mine.JSON")
        assert found[0] == Concept("birdsong", "biophony", "#33a02c", ("birds", "a lark"))
        assert found[3] == Concept("église", "text", DEFAULT_COLOUR, ("église",))

    @pytest.mark.parametrize("text", ["", "\n# nothing\n\n", ":\n : prompt\n"])
    def test_text_without_concepts(self, tmp_path: Path, text: str) -> None:
        assert "holds no concept" in self.fails(tmp_path, text)

    @pytest.mark.parametrize("text", ["[]", '{"concepts": []}'])
    def test_json_without_concepts(self, tmp_path: Path, text: str) -> None:
        assert "holds no concept" in self.fails(tmp_path, text, "mine.json")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "church bells",
            "{",
            "[1, 2]",
            '{"sounds": []}',
            '[{"prompts": ["rain"]}]',
            '["rain"]',
            '{"concepts": 5}',
            "null",
            "[null]",
        ],
    )
    def test_json_of_another_kind(self, tmp_path: Path, text: str) -> None:
        assert "is not a concept file" in self.fails(tmp_path, text, "mine.json")

    @pytest.mark.parametrize(
        "entry",
        [
            {"name": ""},
            {"name": "  "},
            {"name": "rain", "prompts": []},
            {"name": "rain", "prompts": [""]},
            {"name": "rain", "prompts": "drops on leaves"},
        ],
        ids=["no name", "blank name", "no prompts", "empty prompt", "one text"],
    )
    def test_json_entries_that_mean_nothing(self, tmp_path: Path, entry: dict[str, Any]) -> None:
        """Taken as they stand, they would end in a crash or a map of nonsense."""
        self.fails(tmp_path, json.dumps([{"name": "wind"}, entry]), "mine.json")

    @pytest.mark.parametrize(
        ("text", "name"),
        [("rain\nwind\nRain\n", "mine.txt"), ('[{"name": "rain"}, {"name": "RAIN"}]', "m.json")],
    )
    def test_names_twice(self, tmp_path: Path, text: str, name: str) -> None:
        assert "twice" in self.fails(tmp_path, text, name)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.txt"
        path.write_bytes(b"\xff\xfe\x00rain")
        with pytest.raises(InputError, match="cannot be read"):
            read_concepts(path)
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_concepts(tmp_path / "missing.txt")
        one_line(caught)
        with pytest.raises(InputError, match="cannot be read"):
            read_concepts(tmp_path)


class TestBankFiles:
    def test_own_calibration_of_each_detail(self, card: ModelCard, encoder: FakeEncoder) -> None:
        for detail, level in (("image", 1.0), ("patch", 2.0)):
            bank = read_bank(card, detail)
            assert bank.names == ("birdsong", "road traffic", "waves")
            assert bank.groups == ("biophony", "anthrophony", "geophony")
            np.testing.assert_allclose(bank.scale, [level, level + 0.1, level + 0.2], rtol=1e-6)
            np.testing.assert_array_equal(bank.bias, -bank.scale)
            assert bank.calibration == ("platt",) * 3
            assert bank.share_scale == 7.5
            assert bank.encoder_id == card.hash
            assert read_generic(card, detail) == Calibration(level * 10, -level)
        vectors = concept_vectors(encoder, read_concepts(card.folder / "concepts.json"))
        np.testing.assert_array_equal(bank.vectors, vectors)

    def test_concepts_without_calibration(self, folder: Path, encoder: FakeEncoder) -> None:
        write(folder, encoder, patch__scale=np.array([1, np.nan, 1], np.float32))
        assert read_bank(read_card(folder), "patch").calibration == ("platt", "none", "platt")

    def test_no_bank(self, folder: Path) -> None:
        (folder / "concepts.safetensors").unlink()
        with pytest.raises(ModelError, match="has no concept bank") as caught:
            read_bank(read_card(folder), "patch")
        one_line(caught)
        assert read_generic(read_card(folder), "patch") is None

    def test_bank_of_other_weights(self, folder: Path) -> None:
        text = (folder / "model.json").read_text()
        (folder / "model.json").write_text(text.replace('"files": {}', '"files": {"a": "0"}'))
        with pytest.raises(ModelError, match="other weights") as caught:
            read_bank(read_card(folder), "patch")
        one_line(caught)

    @pytest.mark.parametrize("keep", [0, 5, 200, -3])
    def test_damaged_bank(self, folder: Path, keep: int) -> None:
        path = folder / "concepts.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        for read in (read_bank, read_generic):
            with pytest.raises(ModelError) as caught:
                read(read_card(folder), "patch")
            assert "concepts.safetensors" in one_line(caught)

    def test_concepts_that_do_not_fit_the_bank(self, folder: Path) -> None:
        """A concept more in the list would give every name after it another's numbers."""
        changed = [{"name": "wind", "prompts": ["wind"]}, *CONCEPTS]
        (folder / "concepts.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError) as caught:
            read_bank(read_card(folder), "patch")
        one_line(caught)


class TestVectors:
    def test_mean_over_prompts(self, encoder: FakeEncoder) -> None:
        concepts = [
            Concept("a", "g", "#000000", ("x", "y z", "w")),
            Concept("b", "g", "#1", ("x",)),
        ]
        found = concept_vectors(encoder, concepts)
        assert found.dtype == np.float32
        mean = encoder.encode_text(["x", "y z", "w"]).mean(axis=0)
        np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
        np.testing.assert_allclose(found[1], encoder.encode_text(["x"])[0], atol=1e-6)

    def test_bank_without_own_calibration(self, encoder: FakeEncoder) -> None:
        concepts = [Concept("a", "g", "#000000", ("x",))]
        bank = bank_of(encoder, concepts, Calibration(4.0, -1.0))
        assert bank.calibration == ("generic",)
        assert (bank.scale.tolist(), bank.bias.tolist()) == ([4.0], [-1.0])
        bare = bank_of(encoder, concepts, None)
        assert bare.calibration == ("none",)
        assert np.isnan(bare.scale).all()
        assert bare.encoder_id == encoder.id
        assert bare.share_scale == encoder.share_scale


Choose = Callable[..., Any]


class TestChoice:
    @pytest.fixture
    def choose(self, card: ModelCard) -> Choose:
        class Matching(FakeEncoder):
            id = card.hash

        def choose(concepts: Any = None, text: Any = (), detail: str = "patch") -> Any:
            return choose_concepts(Matching(), card, detail, concepts, text)

        return choose

    def fails(self, choose: Choose, *args: Any) -> str:
        with pytest.raises(UsageError) as caught:
            choose(*args)
        return one_line(caught)

    def test_default(self, choose: Choose, card: ModelCard) -> None:
        for detail in ("patch", "image"):
            assert choose(detail=detail).digest() == read_bank(card, detail).digest()

    @pytest.mark.parametrize(
        "names",
        ["waves,birdsong", " Waves , BIRDSONG ,", ["waves", "birdsong"], ("Waves", "birdsong")],
    )
    def test_names(self, choose: Choose, names: Any) -> None:
        bank = choose(names)
        assert bank.names == ("waves", "birdsong")
        assert bank.calibration == ("platt", "platt")

    @pytest.mark.parametrize("names", ["", " , ", [], ()])
    def test_no_names(self, choose: Choose, names: Any) -> None:
        assert "names no concept" in self.fails(choose, names)

    def test_unknown_name(self, choose: Choose) -> None:
        assert "did you mean 'birdsong'" in self.fails(choose, "waves,birdsnog")

    @pytest.mark.parametrize("names", ["waves,Waves", ["waves", "birdsong", "WAVES"]])
    def test_names_twice(self, choose: Choose, names: Any) -> None:
        assert "twice" in self.fails(choose, names)

    def test_text_alone(self, choose: Choose, encoder: FakeEncoder) -> None:
        bank = choose(None, ["church bells", "  a\tslow   river "])
        assert bank.names == ("church bells", "a slow river")
        assert bank.calibration == ("generic",) * 2
        assert bank.groups == ("text",) * 2
        assert bank.colours == FREE_COLOURS[:2]
        assert (bank.scale.tolist(), bank.bias.tolist()) == ([20, 20], [-2, -2])
        expected = encoder.encode_text(["church bells", "a slow river"])
        np.testing.assert_allclose(bank.vectors, expected, atol=1e-6)
        assert choose(None, ["rain"], "image").scale.tolist() == [10]

    def test_more_texts_than_colours(self, choose: Choose) -> None:
        bank = choose(None, [f"sound {i}" for i in range(20)])
        assert all(colour in FREE_COLOURS for colour in bank.colours)

    def test_names_and_text(self, choose: Choose) -> None:
        bank = choose("waves", ["church bells"])
        assert bank.names == ("waves", "church bells")
        assert bank.calibration == ("platt", "generic")

    @pytest.mark.parametrize(("concepts", "text"), [("waves", ["Waves"]), (None, ["a", "A "])])
    def test_text_twice(self, choose: Choose, concepts: Any, text: Any) -> None:
        assert "twice" in self.fails(choose, concepts, text)

    @pytest.mark.parametrize("text", [[""], ["rain", " \t"]])
    def test_empty_text(self, choose: Choose, text: list[str]) -> None:
        assert "--text is empty" in self.fails(choose, None, text)

    def test_file(self, choose: Choose, tmp_path: Path, encoder: FakeEncoder) -> None:
        path = tmp_path / "mine.txt"
        path.write_text("birdsong: a robin\nwind\n")
        bank = choose(str(path))
        assert bank.names == ("birdsong", "wind")
        assert bank.calibration == ("generic", "generic")
        np.testing.assert_allclose(bank.vectors[0], encoder.encode_text(["a robin"])[0], atol=1e-6)

    def test_file_named_like_a_concept(
        self, choose: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file is what was meant if there is one of exactly that name."""
        monkeypatch.chdir(tmp_path)
        assert choose("waves").calibration == ("platt",)
        Path("waves").write_text("surf\n")
        assert choose("waves").names == ("surf",)
        assert choose(["waves"]).names == ("waves",)

    @pytest.mark.parametrize("name", ["mine.json", "folder/mine.txt", "MINE.CSV"])
    def test_missing_file(self, choose: Choose, name: str) -> None:
        assert "does not exist" in self.fails(choose, name)

    def test_model_without_generic_calibration(
        self, choose: Choose, card: ModelCard, encoder: FakeEncoder
    ) -> None:
        (card.folder / "concepts.safetensors").unlink()
        assert choose(None, ["rain"]).calibration == ("none",)
