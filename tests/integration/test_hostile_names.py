"""Imagery that leads elsewhere or would take all memory: refused in words, or read in bounds."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rasterio

from soundmap.errors import InputError, SoundmapError, SourceError, UsageError
from soundmap.sources import open_source

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Write = Callable[..., str]

SERVICE = (
    '<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:9/${z}/${x}/${y}.png</ServerUrl>'
    "</Service><DataWindow><SizeX>256</SizeX><SizeY>256</SizeY></DataWindow></GDAL_WMS>"
)


@pytest.fixture
def folder(tmp_path: Path, town: Path) -> Path:
    """A folder of imagery with a raster and a secret beside it."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    (folder / "town.tif").write_bytes(town.read_bytes())
    (tmp_path / "elsewhere.tif").write_bytes(town.read_bytes())
    return folder


def refused(spec: object, *about: str) -> None:
    with pytest.raises(SoundmapError) as caught:
        open_source(str(spec))
    said = str(caught.value)
    assert isinstance(caught.value, InputError | UsageError), said
    assert "\n" not in said
    for words in about:
        assert words in said


# --------------------------------------------------------------------------- links and pipes


def test_a_link_out_of_the_folder_is_refused_unless_meant(folder: Path) -> None:
    link = folder / "link.tif"
    link.symlink_to(folder.parent / "elsewhere.tif")
    refused(folder, "link.tif: is a link to", "outside the folder", "glob")
    assert open_source(str(folder / "*.tif")).info.facts["mosaic"].startswith("2 rasters")
    assert open_source(str(link)).info.name == "link.tif"
    link.unlink()
    link.symlink_to(folder / "town.tif")
    assert open_source(str(folder)).info.facts["mosaic"].startswith("2 rasters")


@pytest.mark.parametrize("spec", ["", "/*.tif", "/gone.tif"])
def test_a_link_to_nothing_is_not_skipped(folder: Path, spec: str) -> None:
    (folder / "gone.tif").symlink_to(folder / "never.tif")
    refused(f"{folder}{spec}", "gone.tif: is a link to a file that does not exist")


@pytest.mark.parametrize("spec", ["", "/*.tif", "/pipe.tif"])
def test_a_pipe_is_not_waited_for(folder: Path, spec: str) -> None:
    os.mkfifo(folder / "pipe.tif")
    refused(f"{folder}{spec}", "pipe.tif: is a pipe, a device")


@pytest.mark.parametrize("spec", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/meminfo"])
def test_devices_and_files_of_the_system(spec: str) -> None:
    if not Path(spec).exists():
        pytest.skip(f"no {spec} here")
    refused(spec, spec, "not a raster")


@pytest.mark.parametrize(
    "spec",
    [
        "http:/tiles.example/a.tif",
        "file:///data/a.tif",
        "vrt:///data/a.tif?bands=1",
        "<VRTDataset/>",
        "NETCDF:/data/a.nc:red",
        "WMS:http://tiles.example/?",
        "/vsizip/a.zip/a.tif",
        "x" * 5000,
        "a\0b.tif",
    ],
)
def test_names_that_are_no_path(spec: str) -> None:
    refused(spec)


# --------------------------------------------------------------------------- what a VRT refers to

REFERENCES = {
    "a file of the system": ("/proc/meminfo", "is no raster file"),
    "a device": ("/dev/zero", "is no raster file"),
    "another VRT made up on the spot": ("vrt:///data/a.tif?bands=1", "which is no file"),
    "a web address": ("https://tiles.example/a.tif", "/vsicurl/https"),
    "a service": ("WMS:http://127.0.0.1:9/?", "which is no file"),
    "standard input": ("/vsistdin/", "which is no file"),
    "a dataset on the network": ("NETCDF:/vsicurl/http://127.0.0.1:9/a.nc:red", "no file"),
    "what is no raster": ("/etc/passwd", "not a raster"),
    "what is missing": ("/data/away.tif", "does not exist"),
    "what is missing in an archive": ("/vsizip//data/away.zip/a.tif", "does not exist"),
}


@pytest.mark.parametrize(("name", "about"), REFERENCES.values(), ids=REFERENCES)
def test_odd_references(tmp_path: Path, write_vrt: Write, name: str, about: str) -> None:
    vrt = tmp_path / "odd.vrt"
    vrt.write_text(write_vrt([(name, (0, 0), (64, 64))], (64, 64)))
    refused(vrt, "odd.vrt: refers to", about)
    inner = vrt.rename(tmp_path / "inner.vrt")
    vrt.write_text(write_vrt([(str(inner), (0, 0), (64, 64))], (64, 64)))
    refused(vrt, "odd.vrt: refers to", about)


def test_services_are_no_files(tmp_path: Path, write_vrt: Write) -> None:
    service, vrt = tmp_path / "tile.tif", tmp_path / "a.vrt"
    service.write_text(SERVICE)
    refused(service, "tile.tif: describes a web service")
    vrt.write_text(write_vrt([(str(service), (0, 0), (64, 64))], (64, 64)))
    refused(vrt, "a.vrt: refers to", "tile.tif, which describes a web service")


def test_raw_bytes_come_from_beside_the_vrt(tmp_path: Path) -> None:
    vrt = tmp_path / "raw.vrt"
    (tmp_path / "raw.bin").write_bytes(bytes(range(64)) * 64)

    def refer(name: str) -> None:
        vrt.write_text(
            '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32633</SRS>'
            "<GeoTransform>500000,10,0,5500000,0,-10</GeoTransform>"
            '<VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">'
            f'<SourceFilename relativetoVRT="1">{name}</SourceFilename><ImageOffset>0</ImageOffset>'
            "<PixelOffset>1</PixelOffset><LineOffset>64</LineOffset></VRTRasterBand></VRTDataset>"
        )

    refer("/etc/passwd")
    refused(vrt, "raw.vrt: refers to /etc/passwd, as raw bytes")
    refer("raw.bin")
    source = open_source(str(vrt))
    assert source.read(source.info.native_grid).pixels[0, 0].tolist() == list(range(64))


def test_a_vrt_in_a_folder_stays_in_it(
    folder: Path, town: Path, write_vrt: Write, file_server: Any
) -> None:
    file_server.files["town.tif"] = town.read_bytes()
    vrt = folder / "whole.vrt"
    for name in (folder.parent / "elsewhere.tif", f"/vsicurl/{file_server.url}/town.tif"):
        vrt.write_text(write_vrt([(str(name), (0, 0), (192, 256))], (192, 256)))
        refused(folder, "whole.vrt: refers to", "outside the folder", "glob")
        # Named by itself, it may: whoever wrote it meant that.
        source, local = open_source(str(vrt)), open_source(str(town))
        grid = local.info.native_grid
        assert np.array_equal(source.read(grid).pixels, local.read(grid).pixels)
    vrt.write_text(write_vrt([(str(folder / "town.tif"), (0, 0), (192, 256))], (192, 256)))
    assert open_source(str(folder)).info.facts["mosaic"].startswith("2 rasters")


def test_a_vrt_of_itself(tmp_path: Path, write_vrt: Write) -> None:
    vrt = tmp_path / "self.vrt"
    vrt.write_text(write_vrt([(str(vrt), (0, 0), (64, 64))], (64, 64)))

    def read() -> None:
        source = open_source(str(vrt))
        source.read(source.info.native_grid)

    with pytest.raises((InputError, SourceError), match=r"self\.vrt: ") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_missing_source_is_never_taken_for_an_empty_one(
    tmp_path: Path, town: Path, write_vrt: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GDAL remembers a file that it could not open while any VRT is open, and says nothing then."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("SOUNDMAP_READ_WAIT_S", "0")
    over = tmp_path / "over.tif"
    with rasterio.open(town) as dataset:
        below, profile = dataset.read(), dataset.profile
    with rasterio.open(over, "w", **profile) as dataset:
        dataset.write(255 - below)
    whole = below.copy()
    whole[:, 64:128, 64:128] = 255 - below[:, :64, :64]
    parts = [(str(town), (0, 0), (192, 256)), (str(over), (64, 64), (64, 64))]
    for name in ("a.vrt", "b.vrt"):
        (tmp_path / name).write_text(write_vrt(parts, (192, 256)))
    sources = [open_source(str(tmp_path / name)) for name in ("a.vrt", "b.vrt")]
    over.unlink()
    grid = sources[0].info.native_grid

    def read(i: int) -> str:
        source = sources[i % 2]
        source.read(grid[:32, :32])
        try:
            image = source.read(grid[48:96, 48:96])
        except SourceError as error:
            return str(error)
        # A file that GDAL still holds open can be read though its name is gone.
        return "right" if np.array_equal(image.pixels, whole[:, 48:96, 48:96]) else "wrong"

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(read, range(30)))
    failed = [words for words in said if "could not be read" in words and "over.tif" in words]
    assert len(failed) + said.count("right") == 30, said
    assert len(failed) > 20


# --------------------------------------------------------------------------- sizes and numbers


def test_a_raster_as_wide_as_numbers_go(tmp_path: Path, town: Path) -> None:
    vrt = tmp_path / "huge.vrt"
    n = 2**31 - 1
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{b}"><SimpleSource><SourceFilename>{town}'
        f"</SourceFilename><SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
        for b in (1, 2, 3)
    )
    vrt.write_text(
        f'<VRTDataset rasterXSize="{n}" rasterYSize="{n}"><SRS>EPSG:4326</SRS>'
        f"<GeoTransform>10,1e-8,0,50,0,-1e-8</GeoTransform>{bands}</VRTDataset>"
    )
    before = psutil.Process().memory_info().rss
    source = open_source(str(vrt))
    image = source.read(source.info.native_grid[:192, :256])
    assert image.valid.all()
    assert psutil.Process().memory_info().rss - before < 300e6


def bomb(path: Path, side: int, *, tile: bool = True) -> None:
    """Write a TIFF whose only strip or tile is ``side`` px square, and a few kilobytes on disk."""
    packer = zlib.compressobj(9)
    data = b"".join([packer.compress(bytes(1000)), packer.flush()])
    block = [(322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(data))]
    strip = [(273, 4, 8), (278, 4, side), (279, 4, len(data))]
    entries = [
        *((256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)),
        *(block if tile else strip),
    ]
    offset = 8 + len(data) + len(data) % 2
    table = b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in sorted(entries))
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, offset)
        + data.ljust(offset - 8, b"\0")
        + struct.pack("<H", len(entries))
        + table
        + bytes(4)
    )
    path.with_suffix(".tfw").write_text("10\n0\n0\n-10\n500005\n5499995\n")
    path.with_suffix(".tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS></PAMDataset>")


def test_a_bomb_in_one_strip_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    bomb(path, 40_000, tile=False)
    before = psutil.Process().memory_info().rss
    source = open_source(str(path))
    with pytest.raises(SourceError, match=r"bomb\.tif: could not be read"):
        source.read(source.info.native_grid[:64, :64])
    assert psutil.Process().memory_info().rss - before < 300e6


def test_a_bomb_in_one_block(tmp_path: Path, write_vrt: Write) -> None:
    path = tmp_path / "bomb.tif"
    bomb(path, 40_000)
    before = psutil.Process().memory_info().rss
    refused(path, "bomb.tif: is stored in blocks of 40000 x 40000", "gdal_translate -co TILED=YES")
    vrt = tmp_path / "bomb.vrt"
    vrt.write_text(write_vrt([(str(path), (0, 0), (64, 64))], (64, 64)))
    refused(vrt, "bomb.vrt: refers to", "bomb.tif: is stored in blocks")
    assert psutil.Process().memory_info().rss - before < 300e6
    # As large a block as is still read.
    bomb(path, 4_000)
    assert open_source(str(path)).info.native_grid.shape == (4000, 4000)


def test_a_bomb_in_the_mask(tmp_path: Path, town: Path) -> None:
    path = tmp_path / "town.tif"
    path.write_bytes(town.read_bytes())
    bomb(tmp_path / "mask.tif", 40_000)
    (tmp_path / "mask.tif").rename(tmp_path / "town.tif.msk")
    refused(path, "town.tif.msk: is stored in blocks of 40000 x 40000")


@pytest.mark.parametrize(
    ("numbers", "about"),
    [
        ("nan,10,0,5500000,0,-10", "does not say where its pixels lie"),
        ("500000,inf,0,5500000,0,-10", "does not say where its pixels lie"),
        ("1e300,10,0,5500000,0,-10", "off the Earth"),
        ("500000,1e200,0,5500000,0,-1e200", ""),
        ("500000,1e-9,0,5500000,0,-1e-9", "pixels of 1e-09 m"),
    ],
)
def test_geotransforms_that_cannot_be(
    tmp_path: Path, town: Path, write_vrt: Write, numbers: str, about: str
) -> None:
    vrt = tmp_path / "odd.vrt"
    text = write_vrt([(str(town), (0, 0), (192, 256))], (192, 256))
    vrt.write_text(text.replace("500000,10,0,5500000,0,-10", numbers))
    refused(vrt, "odd.vrt: ", about)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", -9999), ("uint8", 1e40), ("uint16", 0.5), ("float32", 1e300), ("int16", 40_000)],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_nodata_that_the_type_cannot_hold(
    tmp_path: Path, town: Path, write_vrt: Write, dtype: str, nodata: float
) -> None:
    kinds = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32", "int16": "Int16"}
    vrt = tmp_path / "odd.vrt"
    text = write_vrt([(str(town), (0, 0), (192, 256))], (192, 256))
    text = text.replace('dataType="Byte" band', f'dataType="{kinds[dtype]}" band')
    vrt.write_text(
        text.replace("<SimpleSource>", f"<NoDataValue>{nodata:g}</NoDataValue><SimpleSource>", 3)
    )
    source = open_source(str(vrt), rescale=(0, 255))
    image = source.read(source.info.native_grid)
    with rasterio.open(town) as dataset:
        assert np.array_equal(image.pixels, dataset.read())
    assert image.valid.all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_at_the_ends_of_their_type(tmp_path: Path, town: Path) -> None:
    path = tmp_path / "ends.tif"
    stored = np.random.default_rng(0).normal(0, 1, (3, 64, 64))
    stored[:, :20] = np.finfo(float).max
    stored[:, 20:40] = -np.finfo(float).max
    stored[0, 40] = np.inf
    stored[1, 41] = np.nan
    with rasterio.open(town) as dataset:
        profile = {**dataset.profile, "dtype": "float64", "height": 64, "width": 64}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(stored)
    source = open_source(str(path))
    image = source.read(source.info.native_grid)
    assert not image.valid[40:42].any()
    assert image.valid.sum() == 62 * 64
    assert (image.pixels[:, :20] == 255).all()
    assert not image.pixels[:, 20:40].any()


def test_the_program_refuses_them_in_one_line(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    bomb(folder / "bomb.tif", 40_000)
    for imagery in (folder / "bomb.tif", folder, "/dev/zero"):
        result = command("predict", "--imagery", imagery, "--out", tmp_path / "map.tif")
        assert result.returncode in (1, 2)
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "map.tif").exists()
