"""Fixtures and settings that every test shares."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
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
