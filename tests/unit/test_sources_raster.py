"""Rasters as they come: bands, numbers, validity, grids, mosaics, errors."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from soundmap.errors import InputError, SourceError, UsageError
from soundmap.sources import open_source, raster
from soundmap.sources.raster import RasterSource

UTM = "EPSG:32633"
NATIVE = Affine(10, 0, 500000, 0, -10, 5500000)

Write = Callable[..., Path]


def noise(
    shape: tuple[int, ...], dtype: str = "uint8", low: int = 0, high: int = 256, seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def whole(source: RasterSource) -> tuple[np.ndarray, np.ndarray]:
    image = source.read(source.info.native_grid)
    return image.pixels, image.valid


# --------------------------------------------------------------------------- naming imagery


def test_names_of_imagery(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write("b.tif", noise((3, 8, 8)))
    write("a.tif", noise((3, 8, 8)), transform=NATIVE * Affine.translation(8, 0))
    (tmp_path / "._a.tif").write_bytes(b"left by a file manager")
    (tmp_path / "notes.txt").write_text("no raster")
    (tmp_path / "below").mkdir()
    shutil.copy(one, tmp_path / "below" / "c.tif")

    assert open_source(str(one)).info.name == "b.tif"
    folder = open_source(str(tmp_path))
    assert folder.info.facts["mosaic"].startswith("2 rasters")
    assert folder.info.facts["files"].startswith("a.tif:")
    assert open_source(str(tmp_path / "*.tif")).info.native_grid.shape == (8, 16)
    assert open_source(str(tmp_path / "**" / "c.tif")).info.name == "c.tif"
    shutil.copy(one, tmp_path / "sample")
    monkeypatch.chdir(tmp_path)
    assert open_source("./sample").info.native_grid.shape == (8, 8)


def test_sample_is_a_reserved_word() -> None:
    pytest.importorskip("soundmap.sources.sample")
    assert "sample" in type(open_source("sample")).__name__.lower()
    with pytest.raises(UsageError, match="sample takes neither"):
        open_source("sample", bands=(1, 2, 3))


def test_vrt_reads_what_its_files_hold(write: Write, tmp_path: Path) -> None:
    bands = noise((3, 16, 16))
    write("a.tif", bands)
    vrt = tmp_path / "all.vrt"
    sources = "".join(
        f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>{b}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for b in (1, 2, 3)
    )
    vrt.write_text(
        '<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>500000,10,0,5500000,0,-10</GeoTransform>{sources}</VRTDataset>"
    )
    pixels, valid = whole(open_source(str(vrt)))
    assert np.array_equal(pixels, bands)
    assert valid.all()
    (tmp_path / "a.tif").rename(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"all\.vrt: refers to .*a\.tif, which does not exist"):
        open_source(str(vrt))


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("https://tiles.example/a.tif", UsageError, "local files in this version"),
        ("s3://bucket/a.tif", UsageError, "local files in this version"),
        ("/vsicurl/https://tiles.example/a.tif", UsageError, "local files in this version"),
        ("", UsageError, "no imagery was named"),
        ("{}/lisbom.tif", InputError, "did you mean .*lisbon.tif"),
        ("{}/nowhere/a.tif", InputError, "there is no folder"),
        ("{}/*.jp2", InputError, "no file matches"),
        ("{}/empty", InputError, "holds no rasters"),
    ],
)
def test_names_of_nothing(
    spec: str, error: type[Exception], says: str, write: Write, tmp_path: Path
) -> None:
    write("lisbon.tif", noise((3, 8, 8)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=says) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- bands

C = ColorInterp
PLAIN = (C.gray, C.undefined, C.undefined, C.undefined)


@pytest.mark.parametrize(
    ("colours", "names", "asked", "bands"),
    [
        ((C.red, C.green, C.blue), (), None, (1, 2, 3)),
        ((C.blue, C.green, C.red, C.undefined), (), None, (3, 2, 1)),
        ((C.alpha, C.red, C.green, C.blue), (), None, (2, 3, 4)),
        ((C.gray,), (), None, (1,)),
        ((C.gray, C.alpha), (), None, (1,)),
        ((C.gray, C.undefined), (), None, (1,)),
        (PLAIN, ("B02", "B03", "B04", "B08"), None, (3, 2, 1)),
        (PLAIN, ("nir", "Red", "green", "BLUE"), None, (2, 3, 4)),
        (PLAIN, ("B4", "B3", "B2", "B8"), None, (1, 2, 3)),
        (PLAIN, (), None, (1, 2, 3)),
        (PLAIN, (), (4, 3, 2), (4, 3, 2)),
        (PLAIN, (), (4,), (4,)),
        ((C.red, C.green, C.blue), (), (2, 2, 1), (2, 2, 1)),
    ],
)
def test_bands(
    write: Write,
    colours: tuple[ColorInterp, ...],
    names: tuple[str, ...],
    asked: tuple[int, ...] | None,
    bands: tuple[int, ...],
) -> None:
    stored = noise((len(colours), 12, 10), low=1)
    path = write("a.tif", stored, colours=colours, names=names)
    source = RasterSource([path], bands=asked)
    pixels, valid = whole(source)
    expected = stored[[b - 1 for b in bands]]
    assert np.array_equal(pixels, np.broadcast_to(expected, (3, 12, 10)))
    assert valid.all()
    assert source.info.facts["bands"].startswith(",".join(map(str, bands)) + " (")


@pytest.mark.parametrize(
    ("bands", "says"),
    [((1, 2, 4), "has 3 bands .* no band 4"), ((0, 1, 2), "no band 0"), ((1, 2), "three bands")],
)
def test_bands_that_are_not_there(write: Write, bands: tuple[int, ...], says: str) -> None:
    path = write("a.tif", noise((3, 8, 8)))
    with pytest.raises(UsageError, match=says):
        open_source(str(path), bands=bands)


def test_palette_becomes_colours(write: Write) -> None:
    stored = noise((1, 20, 20), high=4)
    palette = {0: (9, 9, 9, 0), 1: (200, 10, 20, 255), 2: (1, 2, 3, 255), 3: (90, 80, 70, 255)}
    pixels, valid = whole(RasterSource([write("a.tif", stored, palette=palette, nodata=0)]))
    table = np.array([palette[i][:3] for i in range(4)])
    table[0] = 0
    assert np.array_equal(pixels, np.moveaxis(table[stored[0]], -1, 0))
    assert np.array_equal(valid, stored[0] > 0)


# --------------------------------------------------------------------------- numbers to 0..255


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float32", "float64", "int8"])
def test_percentiles_of_the_whole_raster(write: Write, dtype: str) -> None:
    high = 120 if dtype == "int8" else 9000
    stored = noise((3, 60, 50), dtype, low=-100 if dtype != "uint16" else 0, high=high)
    stored[0] //= 3
    source = RasterSource([write("a.tif", stored)])
    low, high = np.percentile(stored, (2, 98))
    expected = np.clip(np.floor((stored - low) * (255 / (high - low)) + 0.5), 0, 255)
    pixels, _ = whole(source)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert np.ptp(pixels[0]) < 0.6 * np.ptp(pixels[1]), "one stretch for all bands keeps hues"
    # Recorded numbers, typed in, give the same pixels; and a part is stretched like the whole.
    recorded, _, how = source.info.facts["rescale"].partition(" ")
    assert how == "(percentiles 2-98)"
    low, high = map(float, recorded.split(","))
    typed = RasterSource([source._files[0].path], rescale=(low, high))
    assert np.array_equal(whole(typed)[0], pixels)
    part = source.read(source.info.native_grid[7:19, 11:30])
    assert np.array_equal(part.pixels, pixels[:, 7:19, 11:30])


def test_uint8_is_taken_as_it_is_unless_told(write: Write) -> None:
    stored = noise((3, 20, 20), low=50, high=150)
    path = write("a.tif", stored)
    assert np.array_equal(whole(RasterSource([path]))[0], stored)
    pixels, _ = whole(RasterSource([path], rescale=(50, 150)))
    expected = np.clip(np.floor((stored.astype(float) - 50) * 2.55 + 0.5), 0, 255)
    assert np.array_equal(pixels, expected)


def test_percentiles_leave_out_what_is_not_valid(write: Write) -> None:
    stored = noise((3, 60, 60), "float32", low=1000, high=2000)
    clean = np.percentile(stored[:, 20:], (2, 98))
    stored[:, :10] = -9999
    stored[:, 10:15] = np.nan
    stored[:, 15:20] = np.inf
    source = RasterSource([write("a.tif", stored, nodata=-9999)])
    low, high = map(float, source.info.facts["rescale"].split(" ")[0].split(","))
    assert (low, high) == pytest.approx(tuple(clean), rel=1e-3)
    _, valid = whole(source)
    assert np.array_equal(np.flatnonzero(valid.all(axis=1)), np.arange(20, 60))
    assert not valid[:20].any()


@pytest.mark.parametrize(
    ("fill", "says"), [(0, "no valid pixels"), (7, "one value"), (-3, "one value")]
)
def test_rasters_of_one_number(write: Write, fill: int, says: str) -> None:
    source = RasterSource([write("a.tif", np.full((3, 9, 9), fill, "int16"), nodata=0)])
    _, valid = whole(source)
    assert valid.all() == (fill != 0)
    assert says in source.info.facts["rescale"]


def test_mostly_one_number_is_stretched_over_the_rest(write: Write) -> None:
    stored = np.zeros((1, 50, 50), "uint16")
    stored[0, 0, :10] = np.arange(10) * 100
    pixels, _ = whole(RasterSource([write("a.tif", stored)]))
    assert pixels[0, 0, 9] == 255


def test_large_sources_are_sampled(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 10000, 700 * 600).reshape(1, 700, 600).astype("uint16")
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    path = write("a.tif", ramp, **tiles)
    monkeypatch.setattr(raster, "_READ_WHOLE_PX", 1000)
    monkeypatch.setattr(raster, "_SAMPLE_PX", 20_000)
    text = RasterSource([path]).info.facts["rescale"]
    low, high = map(float, text.split(" ")[0].split(","))
    assert (low, high) == pytest.approx((200, 9800), abs=60)


@pytest.mark.parametrize("rescale", [(5, 5), (9, 3), (0, float("nan")), (float("-inf"), 4)])
def test_rescale_that_is_none(write: Write, rescale: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="--rescale"):
        open_source(str(write("a.tif", noise((3, 8, 8)))), rescale=rescale)


# --------------------------------------------------------------------------- validity


def test_dark_pixels_with_one_band_at_nodata_stay(write: Write) -> None:
    stored = noise((4, 40, 40), high=3)
    path = write("a.tif", stored, nodata=0, colours=PLAIN)
    pixels, valid = whole(RasterSource([path]))
    assert np.array_equal(valid, stored[:3].any(axis=0))
    assert np.array_equal(pixels, stored[:3])


def test_nodata_at_the_end_of_the_type(write: Write) -> None:
    lowest = float(np.finfo("float32").min)
    stored = noise((3, 8, 8), "float32")
    stored[:, :2] = lowest
    _, valid = whole(RasterSource([write("b.tif", stored, nodata=lowest)]))
    assert np.array_equal(valid.all(axis=1), np.arange(8) >= 2)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_any_opacity_is_valid(write: Write, dtype: str) -> None:
    stored = noise((4, 30, 30), dtype, low=0, high=4)
    path = write("a.tif", stored, colours=(C.red, C.green, C.blue, C.alpha))
    pixels, valid = whole(RasterSource([path]))
    assert np.array_equal(valid, stored[3] > 0)
    with rasterio.open(path) as dataset:
        assert np.array_equal(valid, dataset.dataset_mask() > 0)
    assert not pixels[:, ~valid].any()


@pytest.mark.parametrize("name", ["internal.tif", "sidecar.tif"])
def test_mask_bands(write: Write, name: str, tmp_path: Path) -> None:
    mask = noise((30, 30), high=2).astype(bool)
    internal = name == "internal.tif"
    path = write(name, noise((3, 30, 30)), mask=mask, internal_mask=internal)
    assert (tmp_path / f"{name}.msk").exists() != internal
    assert np.array_equal(whole(RasterSource([path]))[1], mask)


@pytest.mark.parametrize("blocks", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_windows_are_what_gdal_reads(write: Write, blocks: dict, interleave: str) -> None:
    path = write("a.tif", noise((3, 100, 90)), interleave=interleave, compress="deflate", **blocks)
    source = RasterSource([path])
    grid = source.info.native_grid
    with rasterio.open(path) as dataset:
        for row, col, height, width in ((0, 0, 100, 90), (13, 7, 31, 64), (90, 80, 40, 40)):
            image = source.read(
                GeoBox((height, width), grid.affine * Affine.translation(col, row), UTM)
            )
            there = dataset.read(
                window=Window(col, row, min(width, 90 - col), min(height, 100 - row))
            )
            assert np.array_equal(image.pixels[:, : there.shape[1], : there.shape[2]], there)
            assert image.valid.sum() == there[0].size


# --------------------------------------------------------------------------- errors


def test_what_cannot_be_placed(write: Write, tmp_path: Path) -> None:
    points = [rasterio.control.GroundControlPoint(r, c, 15 + c / 1e3, 50 - r / 1e3)
              for r in (0, 8) for c in (0, 8)]  # fmt: skip
    path = tmp_path / "gcps.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 8, "width": 8, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
    with pytest.raises(InputError, match="gdalwarp -t_srs"):
        RasterSource([path])
    with pytest.raises(InputError, match="rio edit-info --crs"):
        RasterSource([write("a.tif", noise((3, 8, 8)), crs=None)])
    with pytest.raises(InputError, match="no geotransform"):
        RasterSource([write("b.tif", noise((3, 8, 8)), transform=None)])
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    with pytest.raises(InputError, match="not tied to the Earth"):
        RasterSource([write("c.tif", noise((3, 8, 8)), crs=local)])


def test_what_is_no_imagery(write: Write) -> None:
    with pytest.raises(InputError, match="complex"):
        RasterSource([write("a.tif", noise((1, 8, 8)).astype("complex64"))])
    with pytest.raises(UsageError, match="no raster"):
        RasterSource([])


def test_files_that_fail_while_reading(write: Write) -> None:
    path = write("a.tif", noise((3, 64, 64)), compress="deflate")
    source = RasterSource([path])
    whole(source)
    with rasterio.open(path) as dataset:
        start = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 2000] = b"x" * 2000
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match=r"a\.tif: could not be read"):
        whole(RasterSource([path]))
    path.unlink()
    source.close()
    with pytest.raises(SourceError, match=r"a\.tif: could not be opened again"):
        source.read(source._files[0].grid)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_nothing_is_printed(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """GDAL and rasterio have much to say: nodata beside alpha, no CRS, damaged files."""
    both = write("a.tif", noise((4, 8, 8)), nodata=0, colours=(C.red, C.green, C.blue, C.alpha))
    nowhere = write("b.tif", noise((3, 8, 8)), crs=None, transform=None)
    cut = write("c.tif", noise((3, 64, 64)), compress="deflate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        whole(RasterSource([both]))
        for bad in (nowhere, Path(__file__)):
            with pytest.raises(InputError):
                RasterSource([bad])
        source = RasterSource([cut])
        cut.write_bytes(cut.read_bytes()[:300])
        with pytest.raises(SourceError):
            source.read(source._files[0].grid)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=20)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.tif"
    path.write_bytes(b"II*\x00" + data)
    with pytest.raises((InputError, SourceError)) as caught:
        RasterSource([path])
    assert "\n" not in str(caught.value)
