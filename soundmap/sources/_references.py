"""What a VRT refers to, and whether that may be read.

A VRT that the user names may refer to files anywhere and to addresses on the network: whoever wrote
it meant that. In a folder a VRT is one file among others, perhaps of somebody else: it may refer
only to what lies in the folder. Neither may refer to what is no raster in a file: devices, system
files, databases, web services, raw bytes of files elsewhere.
"""

from __future__ import annotations

import re
import stat
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from soundmap.errors import InputError
from soundmap.sources._gdal import NETWORK

_ARCHIVES = ("/vsizip/", "/vsitar/", "/vsigzip/", "/vsi7z/", "/vsirar/", "/vsisubfile/")
_DATASETS = frozenset(
    {"GPKG", "GTIFF_DIR", "HDF4_EOS", "HDF4_SDS", "HDF5", "NETCDF", "NITF_IM"}
    | {"SENTINEL2_L1B", "SENTINEL2_L1C", "SENTINEL2_L1C_TILE", "SENTINEL2_L2A"}
)
"""Prefixes that name a part of a file."""

_SYSTEM = tuple(map(Path, ("/dev", "/proc", "/sys")))
_NAMES = frozenset({"SourceFilename", "SourceDataset"})
_SERVICE = re.compile(
    rb"<(?:GDAL_WMS|GDAL_WMTS|WMS_|WMT_|WCS_|TileMap |TileMapService|Services)", re.IGNORECASE
)

_DEEPEST = 8
"""VRTs within VRTs that are followed."""
_LOOKED_INTO = 2000
"""Files whose first bytes are looked at; of more, so many spread over them."""
_LARGEST_VRT = 256 * 1024 * 1024
_SNIFFED_BYTES = 4096


@dataclass(frozen=True)
class References:
    """All that a raster is made of besides itself."""

    files: tuple[Path, ...] = ()
    """Local rasters, those of VRTs within a VRT, too; in the order of their names."""
    vrt: bool = False
    """Whether it is a VRT."""
    remote: bool = False
    """Whether some of it comes over a network."""


def check_file(path: Path) -> None:
    """Refuse what is no regular file: opening a pipe or a device may never come to an end.

    Raises
    ------
    InputError
        It is missing, a dangling link, a pipe, a device, a socket, or a file of the system.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a file that does not exist") from error
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_why(error)})") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _of_the_system(path):
        raise InputError(f"{path}: is a pipe, a device or a file of the system, not a raster")


def find_references(path: Path, within: Path | None = None) -> References:
    """Find what a raster refers to, without opening any of it as a raster.

    Parameters
    ----------
    path
        A regular file.
    within
        The folder that all of it must lie in; None: anywhere.

    Raises
    ------
    InputError
        It describes a web service, or is a VRT that refers to something missing or not allowed;
        one line that names both.
    """
    found = _Found(path, within)
    found.look_into(path, ())
    return References(tuple(sorted(found.files)), found.vrt, found.remote)


@dataclass
class _Found:
    asked: Path
    within: Path | None
    files: set[Path] = field(default_factory=set)
    vrt: bool = False
    remote: bool = False

    def look_into(self, path: Path, above: tuple[Path, ...]) -> None:
        """Follow a file that the VRTs ``above`` lead to."""
        head = _head(path)
        if _SERVICE.search(head):
            where = "" if path == self.asked else f"refers to {path}, which "
            raise InputError(
                f"{self.asked}: {where}describes a web service, and is no imagery in a file"
            )
        # As GDAL tells a VRT.
        if b"<VRTDataset" not in head:
            return
        self.vrt = True
        above = (*above, path.resolve())
        if len(above) > _DEEPEST:
            raise InputError(f"{self.asked}: holds VRTs within VRTs, more than {_DEEPEST} deep")
        new = self._local(path, above)
        self.files |= new
        ordered = sorted(new)
        if len(ordered) > _LOOKED_INTO:
            at = np.linspace(0, len(ordered) - 1, _LOOKED_INTO).astype(int)
            ordered = [ordered[i] for i in at]
        for file in ordered:
            if file.is_file():
                self.look_into(file, above)

    def _local(self, vrt: Path, above: tuple[Path, ...]) -> set[Path]:
        """Local files that a VRT names and that were not known yet."""
        new = set()
        for name, relative, raw in _names(vrt):
            file = self._local_file(vrt, name, relative)
            if file is None or file in self.files or file in new:
                continue
            self._check(file, name)
            # GDAL never lets go of a VRT that is part of itself.
            if file.resolve() in above:
                self._refuse(name, "which it is itself a part of")
            if not raw:
                new.add(file)
            elif not _lies_in(file, vrt.parent):
                self._refuse(name, "as raw bytes, and it does not lie beside the VRT")
        return new

    def _local_file(self, vrt: Path, name: str, relative: bool) -> Path | None:
        """Where a name leads on this machine; None if that is for GDAL alone to know."""
        if name.startswith("/vsi"):
            return self._virtual(name)
        if name.startswith("<") or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
            self._refuse(name, "which is no file; a web address is written /vsicurl/https://...")
        prefix = re.match(r"([A-Za-z][A-Za-z0-9_]+):", name)
        if prefix:
            if prefix[1].upper() not in _DATASETS or any(n in name for n in ("/vsi", "://")):
                self._refuse(name, "which is no file")
            self._stay_inside(name)
            return None
        return (vrt.parent if relative else Path.cwd()) / name

    def _virtual(self, name: str) -> Path | None:
        if any(part in name for part in NETWORK):
            self._stay_inside(name)
            self.remote = True
            return None
        inner = name
        while inner.startswith(_ARCHIVES):
            inner = inner[inner.index("/", 1) + 1 :]
        if inner.startswith("/vsi") or inner == name:
            self._refuse(name, "which is no file")
        # "/vsisubfile/0_100,/data/a.zip/b.tif", "/vsizip/{/data/a.zip}/b.tif"
        file = Path(inner.split(",", 1)[-1].replace("{", "").replace("}", ""))
        return next((p for p in (file, *file.parents) if p.is_file()), file)

    def _check(self, file: Path, name: str) -> None:
        try:
            check_file(file)
        except InputError as error:
            gone = not file.exists()
            self._refuse(name, "which does not exist" if gone else "which is no raster file", error)
        if self.within is not None and not _lies_in(file, self.within):
            self._stay_inside(name)

    def _stay_inside(self, name: str) -> None:
        if self.within is not None:
            self._refuse(
                name,
                f"outside the folder {self.within} that was given as imagery; if that is meant, "
                "give the file itself, or a glob",
            )

    def _refuse(self, name: str, why: str, cause: Exception | None = None) -> None:
        shown = name if len(name) <= 200 else name[:200] + "..."
        raise InputError(f"{self.asked}: refers to {shown}, {why}") from cause


def _names(vrt: Path) -> Iterator[tuple[str, bool, bool]]:
    """Names in a VRT, whether each is relative to it, and whether it is of raw bytes."""
    try:
        if vrt.stat().st_size > _LARGEST_VRT:
            raise InputError(f"{vrt}: is a VRT of more than {_LARGEST_VRT // 2**20} MiB; split it")
        raw = 0
        for event, element in ET.iterparse(vrt, ("start", "end")):
            band = element.tag == "VRTRasterBand"
            if band and element.get("subClass") == "VRTRawRasterBand":
                raw += 1 if event == "start" else -1
            if event == "end" and element.tag in _NAMES and (element.text or "").strip():
                relative = element.get("relativeToVRT", element.get("relativetoVRT", "0"))
                yield (element.text or "").strip(), relative == "1", raw > 0
            if event == "end" and band:
                # A VRT of a hundred thousand tiles is not held in memory.
                element.clear()
    except ET.ParseError as error:
        raise InputError(f"{vrt}: is a damaged VRT ({error})") from error
    except OSError as error:
        raise InputError(f"{vrt}: cannot be read ({_why(error)})") from error


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_why(error)})") from error


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _of_the_system(path: Path) -> bool:
    real = path.resolve()
    return any(real.is_relative_to(root) for root in _SYSTEM)


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()
