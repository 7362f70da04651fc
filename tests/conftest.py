"""Fixtures and settings that every test shares."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

PROJECT = Path(__file__).resolve().parents[1]

# No deadline anywhere: the first example pays for imports and PROJ's start, and machines differ.
# On CI the examples are the same each time, so that a red run is red again when it is repeated.
_no_deadline = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=50, **_no_deadline)
settings.register_profile("ci", max_examples=100, derandomize=True, print_blob=True, **_no_deadline)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's top folder."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery and boundaries, which lie beside the checkout and are no part of it."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data: real imagery beside the checkout")
    return folder


@pytest.fixture(scope="session")
def sat2sound(shared_data: Path) -> Path:
    """Outputs of the published model, which lie beside the checkout and are no part of it."""
    folder = shared_data.parent / "sat2sound"
    if not (folder / "golden_sat.npz").is_file():
        pytest.skip("needs ../shared/sat2sound: reference outputs beside the checkout")
    return folder


@pytest.fixture(scope="session")
def filler(sat2sound: Path) -> ModuleType:
    """The program that draws stand-in weights of the published model from their names."""
    spec = importlib.util.spec_from_file_location("sat2sound_fill", sat2sound / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder for files of hundreds of megabytes, which are not left behind."""
    folder = tmp_path_factory.mktemp("published")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def published(sat2sound: Path, filler: ModuleType, _large: Path) -> Callable[[str], Path]:
    """Checkpoints in the published format and size: ``published("withmeta")``, ``("nometa")``."""

    def make(kind: str, *overrides: str) -> Path:
        path = _large / f"{'_'.join((kind, *overrides))}.ckpt"
        if not path.exists():
            own = () if kind == "withmeta" else ("metadata_type=none",)
            keys, arguments = sat2sound / f"keys_{kind}.json", sat2sound / "hparams.json"
            filler.main(str(keys), str(arguments), str(path), *own, *overrides)
        return path

    return make


@pytest.fixture(scope="session")
def converted(published: Callable[..., Path], _large: Path) -> Callable[..., Path]:
    """Model folders made of such checkpoints, by the same names."""
    from soundmap.encoder.convert import convert_checkpoint

    def make(kind: str, *overrides: str) -> Path:
        folder = _large / "_".join(("model", kind, *overrides))
        if not folder.exists():
            convert_checkpoint(published(kind, *overrides), folder)
        return folder

    return make


# --------------------------------------------------------------------------- a server with faults


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    name: str
    span: str
    """The Range header; empty where all was asked for."""
    nth: int
    """How often just this was asked, this time included."""
    fault: int | str | None = None
    """What it met."""


Fault = Callable[[Asked], int | str | None]
"""Decides what a request meets: a status such as 500, "hang", "cut", or None: all is well."""


class FileServer:
    """Serves bytes on loopback, a range at a time, and misbehaves when told to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault: Fault = lambda asked: None
        self.asked: list[Asked] = []
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def forget(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self.asked.clear()
            self._seen.clear()

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _note(self, method: str, name: str, span: str) -> Asked:
        with self._lock:
            self._seen[method, name, span] += 1
            asked = Asked(name, span, self._seen[method, name, span])
        asked = dataclasses.replace(asked, fault=self.fault(asked))
        with self._lock:
            self.asked.append(asked)
        return asked

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                span = self.headers.get("Range", "")
                asked = server._note(self.command, self.path.lstrip("/"), span)
                data = server.files.get(asked.name)
                if asked.fault == "hang":
                    server._stopping.wait(20)
                    self.close_connection = True
                elif isinstance(asked.fault, int):
                    self.head(asked.fault, 0)
                elif data is None:
                    self.head(404, 0)
                else:
                    self.send(data, span, with_body, asked.fault == "cut")

            def send(self, data: bytes, span: str, with_body: bool, cut: bool) -> None:
                first, _, last = span.removeprefix("bytes=").partition("-")
                start, stop = int(first or 0), min(int(last or len(data)) + 1, len(data))
                if start >= len(data):
                    self.head(416, 0)
                    return
                place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if span else {}
                self.head(206 if span else 200, stop - start, place)
                if with_body:
                    self.wfile.write(data[start : start + (stop - start) // 2 if cut else stop])
                self.close_connection = cut

            def head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.send_header("Accept-Ranges", "bytes")
                for key, value in (more or {}).items():
                    self.send_header(key, value)
                self.end_headers()

            def handle(self) -> None:
                # Who reads may hang up first, having waited long enough.
                with contextlib.suppress(ConnectionError):
                    super().handle()

        return Handler


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of files on loopback that misbehaves when told to, and haste in reading from it."""
    # All of these a user may set as well.
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "0.2")
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")
    monkeypatch.setenv("GDAL_HTTP_RETRY_DELAY", "0.01")
    monkeypatch.setenv("SOUNDMAP_READ_WAIT_S", "0.01")
    server = FileServer()
    yield server
    server.close()


def vrt_of(
    sources: Sequence[tuple[str, tuple[int, int], tuple[int, int]]], shape: tuple[int, int]
) -> str:
    """Return a VRT in three bands of 10 m, UTM zone 33: of (name, first row and column, shape)."""
    bands = ""
    for band in (1, 2, 3):
        parts = "".join(
            f'<SimpleSource><SourceFilename relativeToVRT="0">{name}</SourceFilename>'
            f"<SourceBand>{band}</SourceBand>"
            f'<SourceProperties RasterXSize="{w}" RasterYSize="{h}" DataType="Byte" '
            'BlockXSize="64" BlockYSize="64"/>'
            f'<SrcRect xOff="0" yOff="0" xSize="{w}" ySize="{h}"/>'
            f'<DstRect xOff="{col}" yOff="{row}" xSize="{w}" ySize="{h}"/></SimpleSource>'
            for name, (row, col), (h, w) in sources
        )
        bands += f'<VRTRasterBand dataType="Byte" band="{band}">{parts}</VRTRasterBand>'
    return (
        f'<VRTDataset rasterXSize="{shape[1]}" rasterYSize="{shape[0]}"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>500000,10,0,5500000,0,-10</GeoTransform>{bands}</VRTDataset>"
    )


@pytest.fixture(scope="session")
def write_vrt() -> Callable[..., str]:
    """Make the text of a VRT: see `vrt_of`."""
    return vrt_of
