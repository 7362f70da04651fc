"""What every encoder must keep, as a test class to inherit.

::

    class TestMyEncoder(EncoderContract):
        def make_encoder(self):
            return MyEncoder()
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from soundmap.encoder import Encoder
from soundmap.errors import UsageError


class EncoderContract:
    """Tests of the promises in :class:`soundmap.encoder.Encoder`.

    Subclasses give ``make_encoder``.
    """

    tolerance = 1e-5
    """By how much an embedding may change with its batch; more for reduced precision."""
    texts = ("church bells", "birdsong", "traffic")
    """Texts that the encoder knows, all different."""
    clips: tuple[str, ...] = ()
    """Paths of sound files, all different; none if the encoder has no tower for sound."""

    def make_encoder(self) -> Encoder:
        """Return an encoder; it may be the same each time."""
        raise NotImplementedError

    @pytest.fixture
    def encoder(self) -> Encoder:
        """Return the encoder under test."""
        return self.make_encoder()

    def windows(self, encoder: Encoder, count: int) -> NDArray[np.uint8]:
        """Make windows, each of its own colour and texture: uint8[B, 3, window, window]."""
        rng = np.random.default_rng(count)
        side = encoder.spec.window_px
        colours = rng.integers(0, 206, (count, 3, 1, 1))
        return (colours + rng.integers(0, 50, (count, 3, side, side))).astype(np.uint8)

    def test_says_what_it_is(self, encoder: Encoder) -> None:
        """Its facts make sense, and a second one of the same has the same identity."""
        spec = encoder.spec
        assert encoder.id
        assert encoder.id == self.make_encoder().id
        assert encoder.dim > 0
        assert np.isfinite(encoder.share_scale)
        assert encoder.share_scale > 0
        assert spec.patch_px * spec.patches == spec.window_px
        assert spec.gsd_m
        assert all(0 < low <= high for low, high in spec.gsd_m)
        assert list(spec.gsd_m) == sorted(spec.gsd_m), "ranges stand finest first"

    def test_gives_unit_vectors(self, encoder: Encoder) -> None:
        """Both details have the shapes and types promised, and every vector has length one."""
        pixels = self.windows(encoder, 3)
        kept = pixels.copy()
        encoding = encoder.encode_images(pixels)
        n = encoder.spec.patches
        _check(encoding.image, (3, encoder.dim))
        _check(encoding.patches, (3, n, n, encoder.dim))
        assert np.array_equal(pixels, kept), "the caller's pixels were changed"

    def test_flat_windows_have_vectors(self, encoder: Encoder) -> None:
        """Black, white and grey windows are imagery too: the sea at night, snow, fog."""
        side = encoder.spec.window_px
        levels = np.array([0, 127, 255], np.uint8)[:, None, None, None]
        encoding = encoder.encode_images(np.broadcast_to(levels, (3, 3, side, side)))
        n = encoder.spec.patches
        _check(encoding.image, (3, encoder.dim))
        _check(encoding.patches, (3, n, n, encoder.dim))

    def test_gives_only_what_is_asked_for(self, encoder: Encoder) -> None:
        """Each detail alone equals both together, and what was not asked for is None."""
        pixels = self.windows(encoder, 3)
        both = encoder.encode_images(pixels)
        image = encoder.encode_images(pixels, details=("image",))
        patch = encoder.encode_images(pixels, details=("patch",))
        assert image.patches is None
        assert patch.image is None
        self._same(image.image, both.image)
        self._same(patch.patches, both.patches)

    def test_does_the_same_twice(self, encoder: Encoder) -> None:
        """Nothing is random."""
        pixels = self.windows(encoder, 4)
        self._same(encoder.encode_images(pixels).patches, encoder.encode_images(pixels).patches)

    def test_batch_size_changes_nothing(self, encoder: Encoder) -> None:
        """A window's embedding does not depend on its batch, and the order is kept."""
        pixels = self.windows(encoder, 70)
        whole = encoder.encode_images(pixels)
        assert whole.image is not None
        assert whole.patches is not None
        for rows in (slice(0, 1), slice(30, 41), slice(69, 70), slice(None, None, -1)):
            part = encoder.encode_images(np.ascontiguousarray(pixels[rows]))
            self._same(part.image, whole.image[rows])
            self._same(part.patches, whole.patches[rows])
        apart = np.abs(whole.image[1:] - whole.image[:-1]).max()
        assert apart > 10 * self.tolerance, "all windows look alike to it, so this proves nothing"

    def test_takes_strided_windows(self, encoder: Encoder) -> None:
        """Windows may be views with any strides."""
        pixels = self.windows(encoder, 3)
        strided = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        self._same(encoder.encode_images(strided).patches, encoder.encode_images(pixels).patches)

    def test_takes_every_gsd_that_it_knows(self, encoder: Encoder) -> None:
        """Telling a GSD of its card gives unit vectors."""
        pixels = self.windows(encoder, 2)
        for low, high in encoder.spec.gsd_m:
            for gsd_m in (low, high):
                _check(encoder.encode_images(pixels, gsd_m=gsd_m).image, (2, encoder.dim))

    def test_empty_batch(self, encoder: Encoder) -> None:
        """No windows give no vectors, in the right shape."""
        encoding = encoder.encode_images(self.windows(encoder, 0))
        n = encoder.spec.patches
        _check(encoding.image, (0, encoder.dim))
        _check(encoding.patches, (0, n, n, encoder.dim))

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda x: x[0],
            lambda x: x[:, :2],
            lambda x: x[..., 1:],
            lambda x: x[..., 1:, :],
            lambda x: x.transpose(0, 2, 3, 1),
            lambda x: x.astype(np.float32),
            lambda x: x.astype(np.int16),
            lambda x: x > 100,
        ],
        ids=["3-d", "bands", "width", "height", "bands last", "float", "int16", "bool"],
    )
    def test_refuses_other_windows(self, encoder: Encoder, spoil: Any) -> None:
        """What is not uint8[B, 3, window, window] is refused, not bent into shape."""
        with pytest.raises(UsageError) as caught:
            encoder.encode_images(spoil(self.windows(encoder, 2)))
        _one_line(caught)

    def test_refuses_what_it_was_not_trained_with(self, encoder: Encoder) -> None:
        """Metadata and scales that the card does not list are refused, not ignored."""
        pixels = self.windows(encoder, 1)
        given: dict[str, Any] = {"lonlat": np.array([[9.0, 48.0]]), "month": 7, "hour": 6}
        for name in set(given) - set(encoder.spec.metadata):
            with pytest.raises(UsageError) as caught:
                encoder.encode_images(pixels, **{name: given[name]})
            _one_line(caught)
        with pytest.raises(UsageError) as caught:
            encoder.encode_images(pixels, scale=max(encoder.spec.scales) + 1)
        _one_line(caught)

    def test_metadata_count(self, encoder: Encoder) -> None:
        """Each kind of metadata on the card changes the embedding; what is not given is masked."""
        pixels = self.windows(encoder, 2)
        bare = encoder.encode_images(pixels).patches
        given: dict[str, list[Any]] = {
            "lonlat": [np.array([[9.0, 48.0]] * 2), np.array([[9.0, -33.0]] * 2)],
            "month": [1, 7],
            "hour": [0, 6],
        }
        for name in encoder.spec.metadata:
            seen = [encoder.encode_images(pixels, **{name: v}).patches for v in given[name]]
            for one, other in ((bare, seen[0]), (bare, seen[1]), (seen[0], seen[1])):
                assert one is not None
                assert other is not None
                assert np.abs(one - other).max() > 10 * self.tolerance, name

    def test_every_window_has_its_own_place(self, encoder: Encoder) -> None:
        """A window's place is its own, whatever windows it is encoded with."""
        if "lonlat" not in encoder.spec.metadata:
            return
        pixels = np.repeat(self.windows(encoder, 1), 40, axis=0)
        places = np.stack([np.linspace(-170, 170, 40), np.linspace(-80, 80, 40)], 1)
        given = {n: 5 for n in ("month", "hour") if n in encoder.spec.metadata}
        whole = encoder.encode_images(pixels, places, **given, details=("image",)).image
        assert whole is not None
        for i in (0, 17, 39):
            place = places[i : i + 1]
            alone = encoder.encode_images(pixels[:1], place, **given, details=("image",))
            self._same(alone.image, whole[i : i + 1])
        assert np.abs(whole[1:] - whole[:-1]).max() > 10 * self.tolerance

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("month", 0),
            ("month", 13),
            ("hour", 24),
            ("hour", -1),
            ("lonlat", np.zeros((3, 2))),
            ("lonlat", np.array([[8.0, 91.0]])),
            ("lonlat", np.array([[np.nan, 1.0]])),
        ],
    )
    def test_refuses_impossible_metadata(self, encoder: Encoder, name: str, value: Any) -> None:
        """There is no thirteenth month, whether the model knows months or not."""
        with pytest.raises(UsageError) as caught:
            encoder.encode_images(self.windows(encoder, 1), **{name: value})
        _one_line(caught)

    def test_takes_every_scale_that_it_knows(self, encoder: Encoder) -> None:
        """Windows of more native tiles give unit vectors, and others."""
        pixels = self.windows(encoder, 1)
        found = [encoder.encode_images(pixels, scale=s).image for s in encoder.spec.scales]
        for one in found:
            _check(one, (1, encoder.dim))
        for one, other in itertools.pairwise(found):
            assert one is not None
            assert other is not None
            assert np.abs(one - other).max() > 10 * self.tolerance

    def test_clips_are_unit_vectors(self, encoder: Encoder) -> None:
        """Sound files become vectors of the same space; or are refused by who cannot hear."""
        if not self.clips:
            with pytest.raises(UsageError) as caught:
                encoder.encode_audio(["birds.wav"])
            _one_line(caught)
            return
        clips = list(self.clips)
        vectors = encoder.encode_audio(clips)
        _check(vectors, (len(clips), encoder.dim))
        self._same(encoder.encode_audio(clips[::-1])[::-1], vectors)
        likeness = vectors @ vectors.T - np.eye(len(clips))
        assert likeness.max() < 1 - 1e-4, "all sounds are alike to it"

    def test_spectrograms_are_unit_vectors(self, encoder: Encoder) -> None:
        """Stored spectrograms become vectors of the same space, whatever their batch."""
        mel = np.random.default_rng(2).uniform(-80, 20, (3, 1, 1001, 64)).astype(np.float32)
        if not self.clips:
            with pytest.raises(UsageError) as caught:
                encoder.encode_mel(mel)
            _one_line(caught)
            return
        vectors = encoder.encode_mel(mel)
        _check(vectors, (3, encoder.dim))
        self._same(encoder.encode_mel(mel[1:]), vectors[1:])
        assert encoder.encode_mel(mel[:0]).shape == (0, encoder.dim)
        with pytest.raises(UsageError) as caught:
            encoder.encode_mel(mel[:, 0])
        _one_line(caught)

    def test_context_is_what_the_card_says(self, encoder: Encoder) -> None:
        """A patch that needs few pixels around it is the same in windows of any place and size."""
        spec = encoder.spec
        n, patch = spec.patches, spec.patch_px
        side = spec.window_px
        rows, cols = 3 * n // 2 + 1, n + 3
        tiles = self.windows(encoder, 4).reshape(2, 2, 3, side, side)
        scene = np.block([[[*row] for row in tiles[:, :, band]] for band in range(3)])
        scene = scene.reshape(1, 3, 2 * side, 2 * side)
        large = np.ascontiguousarray(scene[:, :, : rows * patch, : cols * patch])
        if spec.context_px is None:
            with pytest.raises(UsageError):
                encoder.encode_images(large, details=("patch",))
            return
        cut = -(-spec.context_px // patch)
        whole = encoder.encode_images(large, details=("patch",)).patches
        _check(whole, (1, rows, cols, encoder.dim))
        assert whole is not None
        row, col = rows - n, 2
        window = large[..., row * patch : rows * patch, col * patch : (col + n) * patch]
        part = encoder.encode_images(window, details=("patch",)).patches
        assert part is not None
        inner = slice(cut, n - cut)
        shifted = whole[:, row : row + n, col : col + n]
        self._same(part[:, inner, inner], shifted[:, inner, inner])

    def test_texts_are_unit_vectors(self, encoder: Encoder) -> None:
        """Texts become vectors of the same space, the same ones each time."""
        texts = list(self.texts)
        vectors = encoder.encode_text(texts)
        _check(vectors, (len(texts), encoder.dim))
        self._same(encoder.encode_text(texts), vectors)
        for text, vector in zip(texts, vectors, strict=True):
            self._same(encoder.encode_text([text])[0], vector)
        self._same(encoder.encode_text(texts[::-1]), vectors[::-1])
        likeness = vectors @ vectors.T - np.eye(len(texts))
        assert likeness.max() < 1 - 1e-4, "all texts look alike to it"

    @pytest.mark.parametrize("text", ["", "  \n"])
    def test_refuses_texts_without_words(self, encoder: Encoder, text: str) -> None:
        """A text that says nothing has no vector."""
        with pytest.raises(UsageError) as caught:
            encoder.encode_text([self.texts[0], text])
        _one_line(caught)

    def _same(self, one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> None:
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one, other, rtol=0, atol=self.tolerance)


def _check(vectors: NDArray[np.float32] | None, shape: tuple[int, ...]) -> None:
    assert vectors is not None
    assert vectors.dtype == np.float32
    assert vectors.shape == shape
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=0, atol=1e-5)


def _one_line(caught: pytest.ExceptionInfo[UsageError]) -> None:
    message = str(caught.value)
    assert message
    assert "\n" not in message
