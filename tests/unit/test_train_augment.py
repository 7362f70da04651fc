"""What training does to images, and the patchwork that knows its patches' origin."""

from __future__ import annotations

import pytest
import torch

from soundmap.train.augment import (
    Patchwork,
    clear,
    crop_resize,
    gaps,
    hide,
    patchwork,
    recolour,
    sharpen,
    turn,
    veil,
)
from tests.unit.little import pixels, rng


class TestAugment:
    @pytest.mark.parametrize(("crop", "window"), [(32, 32), (20, 20), (20, 32), (32, 16), (45, 64)])
    def test_crop_resize(self, crop: int, window: int) -> None:
        images = pixels(side=64)
        found = crop_resize(images, crop, window, rng())
        assert found.shape == (5, 3, window, window)
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.max() <= 255

    def test_crops_are_parts_of_their_image(self) -> None:
        images = pixels(side=12)
        found = crop_resize(images, 9, 9, rng(3))
        places = set()
        for image, crop in zip(images.float(), found, strict=True):
            at = [
                (y, x)
                for y in range(4)
                for x in range(4)
                if torch.equal(image[:, y : y + 9, x : x + 9], crop)
            ]
            assert len(at) == 1
            places.add(at[0])
        assert len(places) > 1

    def test_flat_images_stay_flat_when_resized(self) -> None:
        flat = torch.full((2, 3, 40, 40), 77, dtype=torch.uint8)
        assert (crop_resize(flat, 31, 64, rng()) - 77).abs().max() < 1e-3

    def test_turn(self) -> None:
        images = pixels(64, 8).float()
        found = turn(images, rng())
        kinds = set()
        for image, turned in zip(images, found, strict=True):
            ways = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
            ways += [way.flip(-1) for way in ways]
            same = [i for i, way in enumerate(ways) if torch.equal(way, turned)]
            assert len(same) == 1
            kinds.add(same[0])
        assert kinds == set(range(8))

    def test_recolour(self) -> None:
        images = pixels(50).float()
        before = images.clone()
        found = recolour(images, rng())
        assert torch.equal(images, before)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 255
        assert found.isfinite().all()
        changed = (found - images).abs().mean((1, 2, 3))
        assert changed.min() > 0.5
        assert changed.max() < 80
        # Each image by itself, all of its pixels alike.
        grey = torch.full((20, 3, 4, 4), 120.0)
        one = recolour(grey, rng())
        assert (one - one[..., :1, :1]).abs().max() < 1e-3
        assert one[:, 0, 0, 0].std() > 2

    def test_veil(self) -> None:
        images = pixels(60).float()
        found = veil(images, rng())
        assert found.min() >= 0
        assert found.max() <= 255
        # A straight line in the light of the ground, of a slope that haze lowers: by at most three
        # tenths, and a tenth of less light.
        dark, light = (torch.full((60, 3, 2, 2), v) for v in (20.0, 120.0))
        slope = (veil(light, rng()) - veil(dark, rng()))[..., 0, 0] / 100
        assert slope.max() <= 1.1
        assert slope.min() >= 0.9 * 0.7 - 1e-5
        assert slope.std(0).min() > 0.05
        lifted = veil(torch.zeros(60, 3, 2, 2), rng())[:, :, 0, 0]
        assert lifted.max() < 0.3 * 230
        assert lifted.mean() > 10

    def test_sharpen(self) -> None:
        images = pixels(200).float() / 4 + 64
        before = images.clone()
        found = sharpen(images, rng())
        assert torch.equal(images, before)
        assert found.min() >= 0
        assert found.max() <= 255
        # From as much contrast to two and a half times that, each image by itself.
        contrast = found.std((1, 2, 3)) / images.std((1, 2, 3))
        assert 0.9 < contrast.min() < 1.2
        assert 1.8 < contrast.max() < 2.6
        light = (found - images).mean((1, 2, 3))
        assert -25 < light.min() < -5
        assert 35 < light.max() < 55
        # Flat ground is flat no more.
        grain = sharpen(torch.full((200, 3, 16, 16), 100.0), rng()).std((1, 2, 3))
        assert grain.min() < 2
        assert 12 < grain.max() < 18

    def test_clear(self) -> None:
        images = torch.full((200, 3, 2, 2), 90.0)
        assert torch.equal(clear(images, (25, 45, 67), 0.0, rng()), images)
        found = clear(images, (25, 45, 67), 0.4, rng())
        changed = (found != images).flatten(1).any(1)
        assert 50 < int(changed.sum()) < 110
        # Blue air is the brightest: what is left of grey ground is red.
        red, _, blue = found[changed][:, :, 0, 0].mean(0).tolist()
        assert red > blue + 15
        assert clear(torch.zeros(50, 3, 2, 2), (25, 45, 67), 1.0, rng()).max() == 0

    def test_gaps(self) -> None:
        assert not gaps(50, 32, 0.0, rng()).any()
        missing = gaps(400, 32, 0.5, rng())
        assert missing.shape == (400, 1, 32, 32)
        share = missing.float().mean((1, 2, 3))
        assert 120 < int((share > 0).sum()) < 200
        assert share.max() < 0.6
        # Pieces, and whole sides.
        sides = missing.all(2).any(-1)[:, 0]
        assert 40 < int(sides.sum()) < int((share > 0).sum())

    def test_hide(self) -> None:
        images = pixels(60).float()
        before = images.clone()
        found = hide(images, 0.6, rng(1))
        assert torch.equal(images, before)
        changed = 0
        for image, hidden in zip(images, found, strict=True):
            gone = (image != hidden).any(0)
            if not gone.any():
                continue
            changed += 1
            # A rectangle, of the mean colour of all that is left.
            rows, cols = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
            area = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
            left = torch.ones(32, 32, dtype=torch.bool)
            left[area] = False
            assert left.float().mean() > 0.3
            colour = image[:, left].mean(1)
            assert (hidden[(slice(None), *area)] - colour[:, None, None]).abs().max() < 1e-3
            assert torch.equal(hidden[:, left], image[:, left])
        assert 10 < changed < 60
        assert torch.equal(hide(images, 0.0, rng()), images)


class TestPatchwork:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(("batch", "side", "patch"), [(2, 32, 8), (5, 24, 8), (3, 16, 8)])
    def test_patches_equal_their_origin(self, seed: int, batch: int, side: int, patch: int) -> None:
        images = pixels(batch, side, seed).float()
        found: Patchwork = patchwork(images, patch, rng(seed))
        n = side // patch
        assert found.pixels.shape == images.shape
        assert found.image.shape == found.patch.shape == (batch, n * n)
        for b in range(batch):
            for p in range(n * n):
                y, x = divmod(p, n)
                here = found.pixels[b, :, y * patch :, x * patch :][:, :patch, :patch]
                y, x = divmod(int(found.patch[b, p]), n)
                origin = images[int(found.image[b, p])]
                assert torch.equal(here, origin[:, y * patch :, x * patch :][:, :patch, :patch])

    def test_windows_are_pieced_together(self) -> None:
        found = patchwork(pixels(8).float(), 8, rng())
        assert all(len(set(row.tolist())) > 1 for row in found.image)
        own = torch.arange(16)
        assert not (found.patch == own).all(1).any()
