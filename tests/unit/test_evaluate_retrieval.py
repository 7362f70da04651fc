"""Retrieval over sets of samples: what is counted, what is missing, and the figures by class."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from soundmap.encoder.described import Facts, encode_described
from soundmap.errors import InputError, UsageError
from soundmap.products.by_class import audible_score, precision_by_gallery, precision_by_query
from soundmap.products.embed_samples import (
    Embeddings,
    Reading,
    embed_samples,
    label_words,
    load_embeddings,
    save_embeddings,
    told_gsd_m,
)
from soundmap.products.evaluate_clips import encode_clips, score_clips
from soundmap.products.evaluate_retrieval import direction_score, evaluate_retrieval
from soundmap.products.retrieval import match_ranks, retrieval
from soundmap.products.retrieval_inputs import audible_table, open_set, read_prompts
from soundmap.products.retrieval_report import to_csv, to_json
from soundmap.products.samples.base import FIELDS, BadSample, Sample
from soundmap.products.samples.report import BadRows
from soundmap.testing.fake_encoder import FakeEncoder

PX = 16


class Hearing(FakeEncoder):
    """Hears and reads colours, too: a spectrogram begins with one, a text ends with one."""

    def encode_mel(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.embed(mel[:, 0, 0, :3])

    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        found = super().encode_text(texts)
        for row, text in zip(found, texts, strict=True):
            words = text.split()
            if words[0] == "colour":
                row[:] = self.embed([float(word) for word in words[1:]])
        return found

    def encode_audio(self, clips: Any) -> NDArray[np.float32]:
        if any("broken" in str(clip) for clip in clips):
            raise InputError("it is broken")
        return self.encode_text([f"sound of a {Path(clip).parent.name}" for clip in clips])


class Held:
    """Samples in memory."""

    name, gsd_m, native_px, fields = "held", 10.0, PX, frozenset(FIELDS)

    def __init__(self, samples: list[Sample | BadSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        one = self.samples[index]
        if isinstance(one, BadSample):
            raise one
        return one


class Streamed:
    """Samples that come one by one."""

    name, gsd_m, native_px, fields = "streamed", 10.0, PX, frozenset(FIELDS)

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.bad = samples, BadRows("streamed")

    def __iter__(self) -> Any:
        yield from self.samples
        self.bad.add("z", "image cannot be read")

    def shard(self, count: int, index: int) -> Streamed:
        return self


def encoder(**settings: Any) -> Hearing:
    return Hearing(dim=8, window_px=PX, patch_px=8, **settings)


def sample(key: int, colour: Any, heard: Any = None, **more: Any) -> Sample:
    """A sample of one colour, heard as another."""
    mel = np.zeros((2, 1, 1001, 64), np.float32)
    mel[0, 0, 0, :3] = colour if heard is None else heard
    pixels = np.broadcast_to(np.asarray(colour, np.uint8)[:, None, None], (3, PX, PX))
    return Sample(
        str(key),
        np.ascontiguousarray(pixels),
        mel,
        audio_caption="colour " + " ".join(map(str, colour)),
        image_captions={1: "colour " + " ".join(map(str, colour))},
        **more,
    )


@pytest.fixture
def colours() -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, 256, (20, 3))


@pytest.fixture
def samples(colours: NDArray[np.int64]) -> list[Sample | BadSample]:
    """Twenty, of which every other is heard as something else."""
    wrong = np.random.default_rng(6).integers(0, 256, (20, 3))
    return [sample(i, c, wrong[i] if i % 2 else None) for i, c in enumerate(colours)]


class TestDirections:
    def test_all_are_counted_as_the_paper_does(self, samples: list[Any]) -> None:
        held = embed_samples(encoder(), Held(samples))
        score = evaluate_retrieval(held, resamples=50)
        names = [(one.name, one.add_text) for one in score.directions]
        assert names == [
            ("image -> audio", "none"),
            ("audio -> image", "none"),
            ("image -> audio + audio caption", "audio"),
            ("audio + audio caption -> image", "audio"),
            ("image + audio caption -> audio", "query"),
            ("audio + audio caption -> image", "query"),
            ("image -> image caption", None),
            ("image caption -> image", None),
            ("image -> audio caption", None),
            ("audio caption -> image", None),
        ]
        vectors = held.vectors
        for i, mode in enumerate(("none", "audio", "query")):
            both = retrieval(
                vectors["image"],
                vectors["audio"],
                vectors["audio_caption"],
                mode,  # type: ignore[arg-type]
            )
            for one, direct in zip(
                score.directions[2 * i : 2 * i + 2],
                (both.image_to_sound, both.sound_to_image),
                strict=True,
            ):
                assert one.recall_tenth.value == direct.recall
                assert one.median_rank.value == direct.median_rank
                assert one.reported == direct.reported()
                assert {k: v.value for k, v in one.recall_at.items()} == {
                    k: direct.recall_at(k) for k in (1, 5, 10)
                }
                assert one.recall_at[1].low <= one.recall_at[1].value <= one.recall_at[1].high
        captions = score.directions[6]
        assert captions.recall_at[1].value == 1
        assert (captions.samples, captions.k, captions.chance) == (20, 2.0, 0.05)

    def test_each_is_over_the_samples_that_have_both(self, samples: list[Any]) -> None:
        samples[0] = replace(samples[0], image=None)
        samples[1] = replace(samples[1], mel=None)
        samples[2] = replace(samples[2], audio_caption="")
        samples[3] = replace(samples[3], image_captions={3: "colour 1 2 3"})
        samples[4] = BadSample("4", "image cannot be read", "cut short")
        bad = BadRows()
        held = embed_samples(encoder(), Held(samples), bad=bad)
        score = evaluate_retrieval(held, resamples=0)
        assert score.samples == 19
        assert score.having == {
            "image": 18, "audio": 18, "audio_caption": 18, "image_caption": 18,
        }  # fmt: skip
        assert [one.samples for one in score.directions] == [17, 17, 16, 16, 16, 16, 17, 17, 17, 17]
        assert score.facts["bad_rows"] == {"image cannot be read": 1}
        assert bad.rows == [("4", "image cannot be read", "cut short")]
        # A gallery never holds what is not known.
        known = held.known["image"] & held.known["audio"]
        parts = [held.vectors[kind][known] for kind in ("image", "audio")]
        both = match_ranks(*parts)
        assert score.directions[0].median_rank.value == np.median(both)

    def test_what_cannot_be_judged_is_said(self, samples: list[Any]) -> None:
        silent = [replace(one, mel=None, audio_caption="") for one in samples]
        score = evaluate_retrieval(embed_samples(encoder(), Held(silent)), resamples=0)
        assert [one.name for one in score.directions] == [
            "image -> image caption",
            "image caption -> image",
        ]
        assert score.skipped == {
            "image and audio, text added to none": "no sample has audio",
            "image and audio, text added to audio": "no sample has audio or audio caption",
            "image and audio, text added to query": "no sample has audio or audio caption",
            "image and audio caption": "no sample has audio caption",
        }
        alone = [replace(one, image_captions={}) for one in silent]
        with pytest.raises(InputError, match=r"nothing can be judged.*20 images"):
            evaluate_retrieval(embed_samples(encoder(), Held(alone)))

    def test_a_model_without_tower_hears_nothing(self, samples: list[Any]) -> None:
        deaf = FakeEncoder(dim=8, window_px=PX, patch_px=8)
        held = embed_samples(deaf, Held(samples))
        assert not held.known["audio"].any()
        assert held.facts["recordings_without_tower"] == 20

    def test_intervals_are_those_of_resampled_queries(self) -> None:
        ranks = np.array([1.0, 1, 2, 3, 5, 8, 20, 20.5, 20.5, 30] * 4)
        recall, median, at = direction_score(ranks, 400, 7)
        generator = np.random.default_rng(7)
        drawn = []
        for _ in range(400):
            drawn.append(ranks[generator.integers(40, size=40)])
        for found, again in (
            (recall, [np.mean(one < 4) for one in drawn]),
            (median, [np.median(one) for one in drawn]),
            (at[5], [np.mean(one <= 5) for one in drawn]),
        ):
            assert (found.low, found.high) == pytest.approx(np.percentile(again, [2.5, 97.5]))


class TestReading:
    def test_a_stream_gives_the_same(self, samples: list[Any]) -> None:
        bad = BadRows()
        whole = embed_samples(encoder(), Held(samples), Reading(batch=7))
        stream = embed_samples(encoder(), Streamed(samples), Reading(batch=20), bad=bad)
        for kind in FIELDS:
            np.testing.assert_allclose(whole.vectors[kind], stream.vectors[kind], atol=1e-6)
        assert stream.facts["bad_rows"] == {"image cannot be read": 1}

    def test_waves_are_heard_in_pieces_of_ten_seconds(self, colours: NDArray[np.int64]) -> None:
        heard: list[int] = []

        class Counting(Hearing):
            def encode_mel(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
                heard.append(len(mel))
                return super().encode_mel(mel)

        wave = np.random.default_rng(1).normal(0, 0.1, 400_000).astype(np.float32)
        one = replace(sample(0, colours[0]), mel=None, wave=wave)
        held = embed_samples(Counting(dim=8, window_px=PX), Held([one, sample(1, colours[1])]))
        assert heard == [0, 3]
        assert np.linalg.norm(held.vectors["audio"][0]) == pytest.approx(1, abs=1e-5)

    def test_another_spectrogram_may_be_heard(self, samples: list[Any]) -> None:
        other = embed_samples(encoder(), Held(samples), Reading(mel_index=1))
        assert len(np.unique(other.vectors["audio"], axis=0)) == 1
        bad = BadRows()
        none = embed_samples(encoder(), Held(samples), Reading(mel_index=2), bad=bad)
        assert bad.counts == {"has no spectrogram number 2": 20}
        assert not none.known["audio"].any()

    def test_a_caption_without_a_word_is_bad_by_itself(self, samples: list[Any]) -> None:
        class Terse(Hearing):
            def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
                if any("unknown" in text for text in texts):
                    raise UsageError("no word")
                return super().encode_text(texts)

        samples[3] = replace(samples[3], audio_caption="unknown")
        bad = BadRows()
        held = embed_samples(Terse(dim=8, window_px=PX), Held(samples), bad=bad)
        assert bad.rows == [("3", "a caption has no word the model knows", "")]
        assert held.known["audio_caption"].sum() == 19

    def test_the_model_is_told_the_ground_it_sees(self, samples: list[Any]) -> None:
        small = encoder()
        embed_samples(small, Held(samples))
        assert set(small.told_m) == {10.0}
        wide = FakeEncoder(window_px=32, patch_px=8).spec
        assert told_gsd_m(wide, 0.6, 300, 1) == pytest.approx(0.6 * 300 / 32)
        published = replace(wide, window_px=224, native_px=300, scales=(1, 3, 5))
        assert told_gsd_m(published, 0.6, 900, 3) == pytest.approx(1.8)
        with pytest.raises(UsageError):
            embed_samples(small, Held(samples), Reading(scale=3))

    def test_facts_are_left_out_of_models_without_metadata(self) -> None:
        pixels = np.zeros((2, 3, PX, PX), np.uint8)
        facts = [Facts((8.0, 50.0), 5, 12, "yfcc", "meta"), Facts()]
        assert encode_described(encoder(), pixels, facts, 10, 1).shape == (2, 8)

    def test_vectors_can_be_kept(self, samples: list[Any], tmp_path: Path) -> None:
        samples[0] = replace(samples[0], image=None, label="SeaLake")
        held = embed_samples(encoder(), Held(samples))
        save_embeddings(held, tmp_path / "vectors.npz")
        again = load_embeddings(tmp_path / "vectors.npz")
        assert to_json(evaluate_retrieval(again, resamples=20)) == to_json(
            evaluate_retrieval(held, resamples=20)
        )
        (tmp_path / "other.npz").write_bytes(b"PK nothing")
        for name in ("other.npz", "none.npz"):
            with pytest.raises(InputError, match=name):
                load_embeddings(tmp_path / name)

    def test_nothing_to_read(self) -> None:
        with pytest.raises(InputError, match=r"no sample can be read.*torn"):
            embed_samples(encoder(), Held([BadSample("a", "torn")]))

    @pytest.mark.parametrize("label", ["SeaLake", "sea_lake", "sea lake"])
    def test_labels_are_words(self, label: str) -> None:
        assert label_words(label) == "sea lake"


class TestClasses:
    def test_average_precision_is_that_of_scikit_learn(self) -> None:
        metrics = pytest.importorskip("sklearn.metrics")
        generator = np.random.default_rng(2)
        queries, gallery = generator.normal(size=(30, 6)), generator.normal(size=(50, 6))
        gallery[10:20] = gallery[:10]
        classes, labels = generator.integers(0, 3, 30), generator.integers(0, 4, 50)
        right = labels == np.arange(3)[:, None]
        unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, gallery)]
        values = np.round(unit[0] @ unit[1].T, 12)
        expected = {
            name: np.mean(
                [
                    metrics.average_precision_score(right[c], row)
                    for row, k in zip(values, classes, strict=True)
                    if k == c
                ]
            )
            for c, name in enumerate("abc")
        }
        found = precision_by_query(queries, classes, gallery, right, "abc", resamples=200)
        assert {n: e.value for n, e in found.by_class.items()} == pytest.approx(expected)
        assert found.mean.value == pytest.approx(np.mean(list(expected.values())))
        assert found.mean.low < found.mean.value < found.mean.high
        assert found.share == pytest.approx(right.mean())

        prompts = generator.normal(size=(4, 6))
        unit[0] = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
        values = np.round(unit[0] @ unit[1].T, 12)
        by_name = precision_by_gallery(prompts, gallery, labels, "abcd", resamples=200)
        for c, name in enumerate("abcd"):
            known = metrics.average_precision_score(labels == c, values[c])
            assert by_name.by_class[name].value == pytest.approx(known)
        assert by_name.mean.low < by_name.mean.value < by_name.mean.high

    def test_by_hand(self) -> None:
        angle = np.radians([0, 10, 20, 30, 40, 50, 60, 70, 80, 90])
        gallery = np.stack([np.cos(angle), np.sin(angle)], 1)
        right = np.zeros((2, 10), bool)
        right[0, [0, 3]] = True
        # Places 1 and 4 of 10, and a tenth of the gallery is 1, which does not count itself.
        found = audible_score(gallery[:1], np.array([0]), gallery, right, "ab", resamples=0)
        assert found.precision.mean.value == pytest.approx((1 + 2 / 4) / 2)
        assert (found.recall.mean.value, found.recall.chance) == (0, 0)
        twice = np.repeat(gallery, 2, axis=0)
        found = audible_score(
            gallery[:1], np.array([0]), twice, np.repeat(right, 2, axis=1), "ab", resamples=0
        )
        # Both copies of the best share rank 1.5 of 20; those of the other, 7.5.
        assert (found.recall.mean.value, found.recall.chance) == (0.5, 1 / 20)
        assert found.recall.ceiling == 1 / 4
        # Against the 16 wrong ones alone ranks are 1 and 5, and less than 1.7 counts.
        assert (found.recall_alone.mean.value, found.recall_alone.chance) == (0.5, 1 / 17)
        assert (found.queries, found.gallery) == (1, 20)
        assert found.recall.share == 0.2

    def test_chance_is_what_chance_gives(self) -> None:
        generator = np.random.default_rng(3)
        queries, gallery = generator.normal(size=(600, 24)), generator.normal(size=(105, 24))
        right = np.zeros((1, 105), bool)
        right[0, :20] = True
        classes = np.zeros(600, np.int64)
        found = audible_score(queries, classes, gallery, right, "a", resamples=0)
        assert found.recall.mean.value == pytest.approx(found.recall.chance, abs=0.02)
        assert found.recall_alone.mean.value == pytest.approx(found.recall_alone.chance, abs=0.02)
        assert found.precision.mean.value == pytest.approx(found.precision.chance, abs=0.02)
        assert found.recall.ceiling == 10 / 20

    def test_samples_with_labels(self, colours: NDArray[np.int64]) -> None:
        names = ["red", "green", "blue"]
        shade = np.eye(3) * 200
        samples: list[Any] = [
            sample(i, (shade[i % 3] + colours[i] / 8).astype(int), label=names[i % 3])
            for i in range(20)
        ]
        samples += [sample(20, colours[0]), replace(sample(21, colours[1]), mel=None, label="odd")]
        prompts = {
            n: [f"colour {a:g} {b:g} {c:g}"] for n, (a, b, c) in zip(names, shade, strict=True)
        }
        held = embed_samples(encoder(), Held(samples), prompts=prompts)
        score = evaluate_retrieval(held, resamples=30)
        found = {one.name: one for one in score.classes}
        assert list(found) == [
            "image -> audio", "audio -> image",
            "class -> audio", "audio -> class", "class -> image", "image -> class",
        ]  # fmt: skip
        assert found["image -> audio"].precision.mean.value == pytest.approx(1)
        assert found["class -> audio"].precision.mean.value == pytest.approx(1)
        assert found["audio -> class"].precision.mean.value == pytest.approx(1)
        # The odd one has an image alone: it is no query to recordings, but one to classes.
        assert (found["image -> audio"].queries, found["image -> audio"].items) == (21, 20)
        assert "odd" not in found["image -> audio"].precision.by_class
        assert "odd" in found["image -> class"].precision.by_class

    def test_by_what_is_audible(self, colours: NDArray[np.int64], tmp_path: Path) -> None:
        shade = np.array([[200, 0, 0], [0, 200, 0], [200, 0, 200]])
        images = [replace(sample(i, shade[i % 2], label=f"c{i % 2}"), mel=None) for i in range(6)]
        sounds = [
            replace(sample(9 + i, shade[i % 3], label="xyz"[i % 3]), image=None) for i in range(30)
        ]
        held = embed_samples(encoder(), Held([*images, *sounds]))
        (tmp_path / "table.csv").write_text("class,concept\nc0,x\nc1,y\nc1,z\n")
        table = audible_table(str(tmp_path / "table.csv"), held)
        score = evaluate_retrieval(held, audible=table, resamples=0)
        assert score.audible is not None
        assert score.audible.queries == 6
        assert score.audible.precision.by_class["c0"].value == pytest.approx(1)
        assert score.audible.precision.by_class["c1"].value == pytest.approx((1 + 2 / 3) / 2)
        assert score.skipped["image to audio by class"] == "no class has both image and audio"
        rows = list(csv.DictReader(io.StringIO(to_csv(score))))
        heard = [r for r in rows if r["gallery"] == "audio audible in its class" and not r["class"]]
        assert [r["figure"] for r in heard] == [
            "recall_tenth", "recall_tenth_alone", "average_precision",
        ]  # fmt: skip
        assert json.loads(to_json(score))["audible"]["recall"]["mean"]["low"] is None


class TestInputs:
    def test_prompts(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.json"
        path.write_text('{"rain": "rain falls", "dog": ["a dog", "barking"]}')
        assert read_prompts(path) == {"rain": ["rain falls"], "dog": ["a dog", "barking"]}
        for text in ("[]", '{"rain": 3}', '{"rain": []}', "{"):
            path.write_text(text)
            with pytest.raises(InputError, match=r"prompts\.json"):
                read_prompts(path)

    def test_splits_that_are_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "data.toml"
        path.write_text('[train]\nkind = "folder"\npath = "here"\n')
        with pytest.raises(InputError, match=r"nor a table \[test\]; it has \[train\]"):
            open_set(path, "test")
        with pytest.raises(InputError, match=r"none\.toml"):
            open_set(tmp_path / "none.toml", "test")


class TestClips:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "audio").mkdir()
        rows = ["file,category,split,freesound_id,esc10"]
        for i in range(12):
            kind = ("dog", "rain", "wind")[i % 3]
            rows.append(f"a/{kind}/{i}.ogg,{kind},test,{i // 2},{kind != 'wind'}")
        rows += ["a/broken/0.ogg,rain,test,99,True", "a/cow/1.ogg,cow,train,98,False"]
        (tmp_path / "audio" / "esc_index.csv").write_text("\n".join(rows))
        return tmp_path

    def test_are_named_and_found(self, folder: Path) -> None:
        prompts = {name: [f"sound of a {name}"] for name in ("dog", "rain", "wind", "cow")}
        clips = encode_clips(encoder(), folder, "test")
        score = score_clips(encoder(), clips, prompts=prompts)
        assert score.categories == ("cow", "dog", "rain", "wind")
        assert (score.clips, score.recordings) == (12, 6)
        assert score.text_to_audio.mean.value == score.audio_to_text.mean.value == 1
        assert score.audio_to_text.share == 1 / 4
        assert score.text_to_audio.share == pytest.approx(1 / 3)
        assert score.top1.value == 1
        assert score.left_out == {"a/broken/0.ogg": "it is broken"}

        assert clips.esc10 == ("dog", "rain")
        swapped = {"dog": prompts["rain"], "rain": prompts["dog"]}
        few = score_clips(encoder(), clips, categories=clips.esc10, prompts=swapped)
        assert (few.clips, few.top1.value, few.audio_to_text.mean.value) == (8, 0, 0.5)

    def test_mistakes_are_told(self, folder: Path) -> None:
        clips = encode_clips(encoder(), folder, "test")
        with pytest.raises(UsageError, match="without a prompt: cow, rain, wind"):
            score_clips(encoder(), clips, prompts={"dog": ["a dog"]})
        with pytest.raises(UsageError, match="no class cat"):
            score_clips(encoder(), clips, categories=["cat"], prompts={})
        with pytest.raises(InputError, match="no clips of split 'val'; it has test, train"):
            encode_clips(encoder(), folder, "val")
        with pytest.raises(InputError, match="not found"):
            encode_clips(encoder(), folder / "audio", "test")


def test_keeps_its_shape() -> None:
    held = Embeddings((), (), {k: np.zeros((0, 4), np.float32) for k in FIELDS},
                      {k: np.zeros(0, bool) for k in FIELDS})  # fmt: skip
    with pytest.raises(InputError):
        evaluate_retrieval(held)
    with pytest.raises(UsageError):
        evaluate_retrieval(held, resamples=-1)
