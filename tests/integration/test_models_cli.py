"""``soundmap models``: listing, converting and pulling, against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soundmap.encoder.mapping import TOWER, constants, published_shapes
from soundmap.nn.model import ModelConfig

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Result = subprocess.CompletedProcess

NAME = "sat2sound-bingmap-nometa"
FILE = "sat2sound/bingmap_nometa.ckpt"
SETTINGS: dict[str, Any] = {
    "sat_type": "bingmap",
    "dataset_type": "GeoSound",
    "metadata_type": "none",
    "fc_dim": 1024,
    "codebook_dim": 1024,
    "codebook_size": 16000,
}


def refused(result: Result[str], *about: str) -> None:
    assert result.returncode not in (0, None)
    assert not result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for text in about:
        assert text in lines[0]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of installed models; what is installed is large and does not stay."""
    folder = tmp_path / "installed"
    monkeypatch.setenv("SOUNDMAP_MODELS", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def hollow(size: int = 1024, codes: int = 16000) -> dict[str, Tensor]:
    """The weights of a checkpoint without metadata, each one number repeated: 6 MB in a file."""
    config = ModelConfig(token_dim=size, dim=size, codes=codes)
    shapes = published_shapes(config)
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    return state | constants() | {f"{TOWER}bn0.num_batches_tracked": torch.tensor(7)}


def save(path: Path, state: dict[str, Any], **settings: Any) -> Path:
    torch.save({"state_dict": state, "hyper_parameters": SETTINGS | settings}, path)
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return hollow()


class Mark:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"echo was here > {self.path}",)


def spoil(path: Path, state: dict[str, Any], kind: str) -> None:
    """Write a checkpoint that is wrong in one way."""
    codes = "fdt.space_dict"
    if kind == "truncated":
        data = save(path, state).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "renamed key":
        save(path, {key.replace(codes, "fdt.codes"): value for key, value in state.items()})
    elif kind == "wrong shape":
        save(path, state | {codes: torch.zeros(()).expand(16384, 1024)})
    elif kind == "extra key":
        save(path, state | {"fdt.temperature": torch.ones(())})
    elif kind == "NaN":
        save(path, state | {codes: torch.tensor(float("nan")).expand(16000, 1024)})
    elif kind == "late fusion":
        save(path, state, metadata_fusion="late")
    elif kind == "metadata without a fuser":
        save(path, state, metadata_type="latlong_month")
    elif kind == "no table of weights":
        torch.save(state, path)


MISTAKES = {
    "truncated": "cut short or damaged",
    "renamed key": "1 missing (fdt.space_dict); 1 unknown (fdt.codes)",
    "wrong shape": "fdt.space_dict is 16384 x 1024 and should be 16000 x 1024",
    "extra key": "1 unknown (fdt.temperature)",
    "NaN": "not finite numbers (fdt.space_dict)",
    "late fusion": "metadata_fusion = late",
    "metadata without a fuser": "no metadata fuser",
    "no table of weights": "has no state_dict",
}


class TestConvert:
    @pytest.mark.parametrize(("kind", "about"), MISTAKES.items(), ids=MISTAKES)
    def test_a_wrong_checkpoint_is_told_in_one_line(
        self, command: Command, tmp_path: Path, state: dict[str, Tensor], kind: str, about: str
    ) -> None:
        path = tmp_path / "own.ckpt"
        spoil(path, state, kind)
        refused(command("models", "convert", path, "--out", tmp_path / "model"), str(path), about)
        assert list(tmp_path.iterdir()) == [path]

    def test_code_is_not_run(self, program: Command, tmp_path: Path) -> None:
        path, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
        save(path, {"a": torch.zeros(1)}, evil=Mark(mark))
        about = ("evil.ckpt holds code", "system", "none of it was run")
        refused(program("models", "convert", path, "--out", tmp_path / "model"), *about)
        words = ["--imagery", "sample", "--out", tmp_path / "map.tif"]
        refused(program("predict", "--model", path, *words), *about)
        assert sorted(p.name for p in tmp_path.iterdir()) in (
            ["evil.ckpt"],
            ["evil.ckpt", "installed"],
        )
        torch.load(path, weights_only=False)
        assert mark.exists()

    def test_usage(self, command: Command, tmp_path: Path) -> None:
        refused(command("models", "convert"), "CKPT")
        refused(command("models", "convert", tmp_path / "a.ckpt"), "--out")
        words = ["models", "convert", tmp_path / "a.ckpt", "--out", tmp_path / "model"]
        refused(command(*words), "a.ckpt does not exist")
        refused(command(*words, "--name", "a/b"), "cannot be a model's name")
        refused(command(*words, "--text-encoder", "./flan"), "--text-encoder")

    def test_a_folder_of_another_kind_is_left_alone(self, command: Command, tmp_path: Path) -> None:
        diary = tmp_path / "notes" / "diary.txt"
        diary.parent.mkdir()
        diary.write_text("dear diary")
        words = ["models", "convert", tmp_path / "a.ckpt", "--out", diary.parent]
        refused(command(*words), "add --overwrite")
        refused(command(*words, "--overwrite"), "is not a model folder")
        assert diary.read_text() == "dear diary"

    def test_from_checkpoint_to_model(self, command: Command, tmp_path: Path) -> None:
        path = save(
            tmp_path / "own.ckpt",
            hollow(8, 16),
            fc_dim="8",
            codebook_dim=8,
            codebook_size=16,
            sat_type="googleEarth",
            dataset_type="SoundingEarth",
        )
        out = tmp_path / "model"
        out.mkdir()
        text_encoder = tmp_path / "flan"
        text_encoder.mkdir()
        words = ["models", "convert", path, "--out", out, "--text-encoder", text_encoder]
        result = command(*words, "--name", "village")
        assert (result.returncode, result.stderr) == (0, "")
        assert "Of 381 keys 350 are used, and 20 are constants" in result.stdout
        for text in ("logit_scale_it_a: ", " and 3 more: ", "AudioSet", f"--model {out}"):
            assert text in result.stdout
        card = json.loads((out / "model.json").read_text())
        assert card["name"] == "village"
        assert card["text"] == {"encoder": str(text_encoder)}
        assert card["architecture"]["codes"] == 16
        assert card["input"]["native_px"] == 256
        assert card["input"]["gsd_m"] == [[0.2, 0.2]]
        assert card["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        # Figures are the published models' own.
        assert "figures" not in card
        told = command("models", "info", out).stdout
        for text in ("village", "in a folder", "SoundingEarth", "CC BY 4.0", "own.ckpt", str(out)):
            assert text in told
        assert command("models", "path", out).stdout.strip() == str(out)

        # The same again, over it; then something that fails, which leaves it as it is.
        refused(command(*words), "exists already: add --overwrite")
        assert command(*words, "--overwrite", "--name", "town").returncode == 0
        assert json.loads((out / "model.json").read_text())["name"] == "town"
        before = (out / "model.safetensors").stat()
        spoil(path, hollow(8, 16), "extra key")
        refused(command(*words, "--overwrite"), "fdt.temperature")
        assert (out / "model.safetensors").stat() == before
        left = sorted(p.name for p in tmp_path.iterdir())
        shutil.rmtree(out)
        assert left == ["flan", "model", "own.ckpt"]


class TestCheckpointAsModel:
    def test_it_is_converted_once(self, command: Command, tmp_path: Path, installed: Path) -> None:
        path = save(
            tmp_path / "own.ckpt", hollow(8, 16), fc_dim=8, codebook_dim=8, codebook_size=16
        )
        first = command("models", "path", path)
        assert first.stderr == ""
        folder = Path(first.stdout.strip())
        assert folder.parent == installed / "converted"
        before = (folder / "model.safetensors").stat()
        # By what it holds, not by where it lies.
        assert command("models", "path", path.rename(tmp_path / "b.ckpt")).stdout == first.stdout
        assert (folder / "model.safetensors").stat() == before
        assert "own" not in command("models", "list").stdout
        refused(command("models", "info", tmp_path / "b.ckpt"), "models convert")


class TestListing:
    def test_list(self, command: Command) -> None:
        result = command("models", "list")
        assert (result.returncode, result.stderr) == (0, "")
        for text in ("soundmap-small", "bundled", NAME, "to be pulled", "0.6 m", "10 m", "0.2 m"):
            assert text in result.stdout

    def test_info_of_what_is_not_here(self, command: Command) -> None:
        result = command("models", "info", "sat2sound-sentinel-withmeta")
        assert (result.returncode, result.stderr) == (0, "")
        told = " ".join(result.stdout.split())
        for text in (
            "soundmap models pull sat2sound-sentinel-withmeta",
            "10 m",
            "resized from 256, 768, 1280 px",
            "lonlat, month, hour",
            "not stated",
            "research use only",
            "R@10% 0.868, median rank 191",
            "R@10% 0.872, median rank 183",
            "not measured by soundmap",
            "sat2sound/sentinel_withmeta.ckpt",
        ):
            assert text in told

    def test_info_of_the_bundled_one(self, command: Command) -> None:
        told = " ".join(command("models", "info", "soundmap-small").stdout.split())
        for text in ("bundled", "Apache-2.0", "EuroSAT", "mean concept auc", "ESC-10"):
            assert text in told

    def test_path(self, command: Command, installed: Path, project: Path) -> None:
        assert command("models", "path").stdout.strip() == str(installed)
        small = command("models", "path", "soundmap-small").stdout.strip()
        assert small == str(project / "models" / "soundmap-small")
        refused(command("models", "path", NAME), f"soundmap models pull {NAME}")

    def test_a_published_model_that_is_not_here(self, command: Command, tmp_path: Path) -> None:
        words = ["--imagery", "sample", "--out", tmp_path / "map.tif"]
        refused(command("predict", "--model", NAME, *words), f"soundmap models pull {NAME}")


@dataclass
class Hub:
    """What a hub on this machine answers."""

    content: bytes = b""
    etag: str = ""
    """Digest that it announces; empty: the right one."""
    announced: int | None = None
    """Size that it announces; None: the right one."""
    status: int = 200
    error: str = ""
    cut_at: int | None = None
    """Bytes after which the first connection breaks."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of each request."""


class Handler(BaseHTTPRequestHandler):
    """As huggingface.co does it: the address of a large file leads on to where its bytes are."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def do_HEAD(self) -> None:
        hub = self.hub
        hub.asked.append(("HEAD", self.path, ""))
        headers = {"X-Repo-Commit": "c" * 40, "Content-Length": "0"}
        if hub.status != 200 or self.path != f"/MVRL/sat2sound/resolve/main/{FILE}":
            self.answer(hub.status if hub.status != 200 else 404, {**headers} | self.problem())
            return
        # Another host in name: the library tells an address of the hub's own from one beyond it.
        port = self.server.server_address[1]
        size = len(hub.content) if hub.announced is None else hub.announced
        headers |= {
            "Location": f"http://localhost:{port}/bytes",
            "X-Linked-Etag": f'"{hub.etag or hashlib.sha256(hub.content).hexdigest()}"',
            "X-Linked-Size": str(size),
        }
        self.answer(302, headers)

    def do_GET(self) -> None:
        hub = self.hub
        wanted = self.headers.get("Range", "")
        if self.path != "/bytes":
            # The library asks for other things, too, which are of no importance.
            self.answer(404, {"Content-Length": "0"})
            return
        hub.asked.append(("GET", self.path, wanted))
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        body = hub.content[start:]
        headers = {"Content-Length": str(len(body))}
        if wanted:
            total = len(hub.content)
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.answer(206 if wanted else 200, headers)
        if hub.cut_at is not None and not start:
            self.wfile.write(body[: hub.cut_at])
            self.close_connection = True
            return
        self.wfile.write(body)

    def problem(self) -> dict[str, str]:
        return {"X-Error-Code": self.hub.error} if self.hub.error else {}

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    away_from_the_real_one(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield server.hub  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


def away_from_the_real_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str) -> None:
    for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_ETAG_TIMEOUT", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for key in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.upper(), raising=False)


BY_HAND = ("By hand: fetch sat2sound/bingmap_nometa.ckpt", "models convert bingmap_nometa.ckpt")


class TestPull:
    @pytest.mark.slow
    def test_fetched_through_a_broken_connection_and_kept(
        self,
        program: Command,
        hub: Hub,
        tmp_path: Path,
        installed: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Of a size that the library takes in several pieces; what it has of one it drops.
        state = hollow(8, 16)
        large = {key: value.clone() for key, value in state.items() if value.numel() > 2e6}
        sizes = {"fc_dim": 8, "codebook_dim": 8, "codebook_size": 16}
        path = save(tmp_path / "file.ckpt", state | dict(list(large.items())[:4]), **sizes)
        hub.content = path.read_bytes()
        hub.cut_at = 25_000_000
        result = program("models", "pull", NAME)
        assert result.returncode == 0, result.stderr
        assert f"Installed {NAME} in {installed / NAME}" in result.stdout
        assert f"predict --model {NAME} --imagery" in result.stdout
        first, second = (asked[2] for asked in hub.asked if asked[0] == "GET")
        assert first == ""
        assert 1_000_000 < int(second.removeprefix("bytes=").removesuffix("-")) <= 25_000_000
        card = json.loads((installed / NAME / "model.json").read_text())
        assert card["source"]["repository"] == "MVRL/sat2sound"
        assert card["source"]["file"] == FILE
        assert card["figures"]["image to audio"] == {"R@10%": 0.534, "median rank": 872}

        # It is there now, by its name, and nobody asks the hub.
        hub.asked.clear()
        again = program("models", "pull", NAME)
        assert (again.returncode, again.stderr) == (0, "")
        assert "Here already" in again.stdout
        assert not hub.asked

        # Damaged, it is made again from the hub's cache, for which no network is needed.
        (installed / NAME / "model.safetensors").write_bytes(b"")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        again = program("models", "pull", NAME)
        assert (again.returncode, again.stderr) == (0, "")
        assert "Installed" in again.stdout
        assert not hub.asked
        assert (installed / NAME / "model.safetensors").stat().st_size > 400e6
        assert [p.name for p in installed.iterdir()] == [NAME]

    @pytest.mark.parametrize(
        ("status", "error", "about"),
        [
            (404, "EntryNotFound", "MVRL/sat2sound at 127.0.0.1:{port} has no such file"),
            (404, "RepoNotFound", "has no repository MVRL/sat2sound (HTTP 404)"),
            (401, "", "HTTP 401"),
            (403, "GatedRepo", "approved accounts alone"),
            (503, "", "answered with HTTP 503"),
        ],
    )
    def test_a_hub_that_says_no(
        self, program: Command, hub: Hub, installed: Path, status: int, error: str, about: str
    ) -> None:
        hub.status, hub.error = status, error
        result = program("models", "pull", NAME, timeout_s=60)
        about = about.format(port=os.environ["HF_ENDPOINT"].rpartition(":")[2])
        refused(result, f"{NAME} could not be fetched", about, *BY_HAND)
        assert len(hub.asked) == 1
        assert not list(installed.iterdir())

    def test_another_size_than_announced(
        self, program: Command, hub: Hub, installed: Path, tmp_path: Path
    ) -> None:
        hub.content, hub.announced = b"x" * 1000, 2000
        refused(program("models", "pull", NAME), "another size", *BY_HAND)
        assert not list(installed.iterdir())
        assert not [
            p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.stat().st_size > 900
        ]

    def test_another_checksum_than_announced(
        self, program: Command, hub: Hub, installed: Path, tmp_path: Path
    ) -> None:
        hub.content, hub.etag = b"x" * 1000, "0" * 64
        refused(program("models", "pull", NAME), "checksum is wrong", "was removed")
        assert not list(installed.iterdir())
        assert not [
            p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.stat().st_size > 900
        ]

    def test_what_comes_is_no_checkpoint(self, program: Command, hub: Hub, installed: Path) -> None:
        hub.content = b"<!doctype html><title>Sign in to the hotel's network</title>"
        refused(program("models", "pull", NAME), "is not a checkpoint")
        assert not list(installed.iterdir())

    def test_no_network(
        self, program: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("huggingface_hub")
        away_from_the_real_one(monkeypatch, tmp_path, "http://127.0.0.1:9")
        # Patience would show: the library alone tries for 23 seconds.
        result = program("models", "pull", NAME, timeout_s=20)
        refused(result, "127.0.0.1:9 cannot be reached", *BY_HAND)

    def test_offline(self, program: Command, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused(program("models", "pull", NAME), "offline mode is on (HF_HUB_OFFLINE)", *BY_HAND)
        assert not hub.asked

    def test_no_place(
        self, program: Command, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("SOUNDMAP_MODELS", str(tmp_path / "file" / "models"))
        refused(program("models", "pull", NAME), "SOUNDMAP_MODELS")
        assert not hub.asked

    def test_unknown(self, command: Command) -> None:
        refused(command("models", "pull", "sat2sound"), "is not a published model", NAME)
