"""What every imagery source must keep, as a test class to inherit.

::

    class TestMySource(SourceContract):
        def make_source(self):
            return MySource("somewhere")
"""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.errors import SourceError
from soundmap.grid import cell_lonlat, local_metric_crs
from soundmap.sources.base import Image, Resampling, Source

in_both_ways = pytest.mark.parametrize("resampling", ["area", "cubic"])


class SourceContract:
    """Tests of the promises in :class:`soundmap.sources.base.Source`.

    Subclasses give ``make_source``. The others have defaults for sources with a native grid.
    """

    rounding = 0
    """Grey levels by which a pixel may differ when it is read as part of another grid; 1 for
    sources that resample all that they read."""

    def make_source(self) -> Source:
        """Return a new source; imagery should be at least 64 px each way."""
        raise NotImplementedError

    def watch_pixels(self, monkeypatch: pytest.MonkeyPatch) -> list[object] | None:
        """Arrange that each reading of stored pixels appends to the list returned.

        None, the default, leaves out the test that constructing reads no pixels.
        """
        return None

    def fail_next(self, source: Source, times: int | None) -> bool:
        """Arrange that the source's next tries to get pixels fail for a reason that may pass.

        Parameters
        ----------
        source
            One from ``make_source``.
        times
            How many tries fail before it goes well; None: all.

        Returns
        -------
        bool
            False, the default, leaves out the tests of trying again.
        """
        return False

    def grid_within(self, source: Source) -> GeoBox:
        """Return a small grid over the imagery; by default the middle of its native grid."""
        native = source.info.native_grid
        if native is None:
            raise NotImplementedError("an endless source must say where to look")
        height, width = native.shape
        rows, cols = min(96, height), min(96, width)
        row, col = (height - rows) // 2, (width - cols) // 2
        return _part(native, row, row + rows, col, col + cols)

    def grid_outside(self, source: Source) -> GeoBox:
        """Return a grid where there is no imagery; by default two widths beside the native grid."""
        native = source.info.native_grid
        if native is None:
            pytest.skip("the source is endless")
        return _part(native, 0, 32, 3 * native.shape[1], 3 * native.shape[1] + 32)

    @pytest.fixture
    def source(self) -> Source:
        """Return the source under test."""
        return self.make_source()

    def test_keeps_the_protocol(self, source: Source) -> None:
        """It has what the protocol names."""
        assert isinstance(source, Source)

    def test_constructing_reads_no_pixels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Thousands of workers construct sources: that must cost headers only."""
        seen = self.watch_pixels(monkeypatch)
        if seen is None:
            pytest.skip("the subclass does not watch pixel reads")
        source = self.make_source()
        assert not seen
        source.read(self.grid_within(source))
        assert seen, "the watch sees nothing, so it proves nothing"

    def test_info(self, source: Source) -> None:
        """The facts are there, are text, and are the same each time."""
        info = source.info
        assert info.name
        assert np.isfinite(info.native_gsd_m)
        assert info.native_gsd_m > 0
        assert info.facts, "facts are part of a run's fingerprint"
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in info.facts.items())
        assert info == self.make_source().info

    @in_both_ways
    def test_fills_the_grid(self, source: Source, resampling: Resampling) -> None:
        """An image has the shape, types and place that were asked for."""
        grid = self.grid_within(source)
        image = source.read(grid, resampling)
        _check(image, grid)
        assert image.valid.any(), "choose grid_within where there is imagery"

    @in_both_ways
    def test_fills_other_grids(self, source: Source, resampling: Resampling) -> None:
        """So it has on grids that are not its own."""
        for grid in self._other_grids(source):
            image = source.read(grid, resampling)
            _check(image, grid)
            assert image.valid.any()

    @in_both_ways
    def test_outside_is_not_valid(self, source: Source, resampling: Resampling) -> None:
        """Where there is no imagery nothing is valid, and nothing is raised."""
        grid = self.grid_outside(source)
        image = source.read(grid, resampling)
        _check(image, grid)
        assert not image.valid.any()

    @pytest.mark.parametrize("times", [1, 2])
    def test_what_passes_is_tried_again(self, source: Source, times: int) -> None:
        """A read that fails for the moment ends in the same pixels."""
        grid = self.grid_within(source)
        if not self.fail_next(source, times):
            pytest.skip("the subclass makes nothing fail")
        _same(source.read(grid), self.make_source().read(grid))

    def test_what_does_not_pass_is_told_in_one_line(self, source: Source) -> None:
        """After a bounded number of tries a read fails, and the next one may go well."""
        grid = self.grid_within(source)
        if not self.fail_next(source, None):
            pytest.skip("the subclass makes nothing fail")
        with pytest.raises(SourceError, match=r"tried \d+ times") as caught:
            source.read(grid)
        assert "\n" not in str(caught.value)
        self.fail_next(source, 0)
        _same(source.read(grid), self.make_source().read(grid))

    @in_both_ways
    def test_same_again(self, source: Source, resampling: Resampling) -> None:
        """Reading twice gives the same pixels."""
        grid = self.grid_within(source)
        _same(source.read(grid, resampling), source.read(grid, resampling))

    def test_area_unless_told(self, source: Source) -> None:
        """Who does not say how gets pixels by area."""
        for grid in self._other_grids(source):
            _same(source.read(grid), source.read(grid, "area"))

    def test_own_pixels_are_the_same_in_both_ways(self, source: Source) -> None:
        """Where a grid's pixels are the imagery's own there is nothing to resample."""
        if self.rounding:
            pytest.skip("the source resamples all that it reads")
        grid = self.grid_within(source)
        _same(source.read(grid, "area"), source.read(grid, "cubic"))

    @in_both_ways
    def test_part_is_the_part_of_the_whole(self, source: Source, resampling: Resampling) -> None:
        """What a pixel holds does not depend on what else was asked for."""
        grid = self.grid_within(source)
        rows, cols = grid.shape
        whole = source.read(grid, resampling)
        for row0, row1, col0, col1 in ((0, rows // 2, 0, cols), (5, 6, 7, 8), (3, rows, 11, cols)):
            part = source.read(_part(grid, row0, row1, col0, col1), resampling)
            step = part.pixels.astype(int) - whole.pixels[:, row0:row1, col0:col1]
            assert np.abs(step).max() <= self.rounding
            assert np.array_equal(part.valid, whole.valid[row0:row1, col0:col1])

    @in_both_ways
    def test_part_is_the_part_of_the_whole_on_other_grids(
        self, source: Source, resampling: Resampling
    ) -> None:
        """Nor does it where pixels are resampled."""
        for grid in self._other_grids(source):
            rows, cols = grid.shape
            whole = source.read(grid, resampling)
            part = source.read(_part(grid, rows // 3, rows, 5, cols - 2), resampling)
            cut = (slice(rows // 3, rows), slice(5, cols - 2))
            seen = part.valid & whole.valid[cut]
            # Coordinates are found a little differently: a pixel may round the other way.
            assert np.mean(part.valid != whole.valid[cut]) < 0.005
            step = part.pixels[:, seen].astype(int) - whole.pixels[:, *cut][:, seen]
            assert np.abs(step).max(initial=0) <= 1

    def test_coarser_is_averaged(self, source: Source) -> None:
        """A pixel of 4 x 4 native ones is their mean."""
        grid = self.grid_within(source)
        rows, cols = grid.shape[0] // 4 * 4, grid.shape[1] // 4 * 4
        fine = source.read(_part(grid, 0, rows, 0, cols))
        coarse = source.read(
            GeoBox((rows // 4, cols // 4), grid.affine * Affine.scale(4), grid.crs)
        )
        blocks = (rows // 4, 4, cols // 4, 4)
        whole = fine.valid.reshape(blocks).all(axis=(1, 3))
        mean = fine.pixels.reshape(3, *blocks).mean(axis=(2, 4))
        assert coarse.valid[whole].all()
        assert not coarse.valid[~fine.valid.reshape(blocks).any(axis=(1, 3))].any()
        assert np.abs(coarse.pixels - mean)[:, whole].max(initial=0) <= 1

    def test_coarser_is_antialiased(self, source: Source) -> None:
        """By bicubic resampling, a pixel of 4 x 4 native ones weighs the 16 x 16 around it."""
        grid = self.grid_within(source)
        rows, cols = grid.shape[0] // 4 * 4, grid.shape[1] // 4 * 4
        fine = source.read(_part(grid, 0, rows, 0, cols), "cubic")
        ground = grid.affine * Affine.translation(8, 8) * Affine.scale(4)
        coarse = source.read(GeoBox((rows // 4 - 4, cols // 4 - 4), ground, grid.crs), "cubic")
        down, across = _cubic_weights(coarse.valid.shape[0]), _cubic_weights(coarse.valid.shape[1])
        seen = down @ fine.valid @ across.T
        colour = down @ fine.pixels @ across.T / np.where(seen >= 0.5, seen, 1)
        assert np.array_equal(coarse.valid, seen >= 0.5)
        step = np.abs(coarse.pixels - np.clip(colour, 0, 255))
        assert step[:, coarse.valid].max(initial=0) <= 1

    @in_both_ways
    def test_copy_reads_the_same(self, source: Source, resampling: Resampling) -> None:
        """Pickled, before or after reading, it reads the same."""
        grids = [self.grid_within(source), *self._other_grids(source)]
        unread = pickle.loads(pickle.dumps(source))
        before = [source.read(grid, resampling) for grid in grids]
        for copy in (unread, pickle.loads(pickle.dumps(source))):
            assert copy.info == source.info
            for grid, image in zip(grids, before, strict=True):
                _same(copy.read(grid, resampling), image)

    @in_both_ways
    def test_threads_read_what_one_reads(self, source: Source, resampling: Resampling) -> None:
        """Eight threads get what one gets."""
        grid = self.grid_within(source)
        rows, cols = grid.shape
        grids = [
            _part(grid, r, min(r + 40, rows), c, min(c + 40, cols))
            for r in range(0, rows, 20)
            for c in range(0, cols, 20)
        ] + self._other_grids(source)
        alone = [self.make_source().read(g, resampling) for g in grids]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda g: source.read(g, resampling), grids * 2))
        for one, other in zip(alone * 2, together, strict=True):
            _same(one, other)

    def _other_grids(self, source: Source) -> list[GeoBox]:
        """Shifted and finer, coarser, and in a metric CRS, over ``grid_within``."""
        grid = self.grid_within(source)
        shifted = grid.affine * Affine.translation(0.3, 0.6) * Affine.scale(0.7)
        coarser = grid.affine * Affine.translation(0.8, -1.4) * Affine.scale(8 / 7)
        lon, lat = cell_lonlat(grid)
        middle = (grid.shape[0] // 2, grid.shape[1] // 2)
        crs = local_metric_crs(float(lon[middle]), float(lat[middle]))
        turned = grid.to_crs(crs)
        return [
            GeoBox(grid.shape, shifted, grid.crs),
            GeoBox(grid.shape, coarser, grid.crs),
            turned,
        ]


def _part(grid: GeoBox, row0: int, row1: int, col0: int, col1: int) -> GeoBox:
    affine = grid.affine * Affine.translation(col0, row0)
    return GeoBox((row1 - row0, col1 - col0), affine, grid.crs)


def _cubic_weights(n: int) -> NDArray[np.float64]:
    """Weights of 4 n + 16 pixels in n of four times their size, 8 px from the first one.

    Bicubic kernel, a = -0.5: Keys, Cubic convolution interpolation (1981), eq. 15.
    """
    x = np.abs((np.arange(16) - 7.5) / 4)
    taps = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    weights = np.zeros((n, 4 * n + 16))
    for i in range(n):
        # The first one's middle is 10 px from the first pixel's edge.
        weights[i, 4 * i + 2 : 4 * i + 18] = taps / taps.sum()
    return weights


def _check(image: Image, grid: GeoBox) -> None:
    assert image.grid == grid
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape == (3, *grid.shape)
    assert image.valid.dtype == np.bool_
    assert image.valid.shape == tuple(grid.shape)
    assert not image.pixels[:, ~image.valid].any()


def _same(one: Image, other: Image) -> None:
    assert np.array_equal(one.valid, other.valid)
    assert np.array_equal(one.pixels, other.pixels)
