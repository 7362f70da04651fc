"""The architecture, held by parsing: layers, and what may touch torch, Dask, files and terminal.

``LAYERS`` is the table of the design. A module imports only from what stands above it in the
table, and from its own area (the top-level module or sub-package that it
is in). Imports inside functions and under ``TYPE_CHECKING`` count as well: a late import hides a
dependency, it does not remove it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "soundmap"

# In the order of the design's table: what may import what is decided by the row.
LAYERS = {
    name: row
    for row, name in enumerate(
        (
            "errors",
            "region",
            "grid",
            "area",
            "lattice",
            "warp",
            "scoring",
            "nn",
            "plan",
            "sources",
            "encoder",
            "stores",
            "concepts",
            "layout",
            "pipeline",
            "estimate",
            "runner",
            "request",
            "prepare",
            "api",
            "products",
            "train",
            "testing",
            "serve",
            "cli",
        )
    )
}

# The package's front door and `python -m soundmap` hand on to the API and the command line. They
# are in no layer, but must be lazy: test_starting_is_light below.
FRONT = {"", "__main__"}

# What anybody may take from the front door: it costs no import.
FRONT_CONSTANTS = {"__version__"}


@dataclass(frozen=True)
class Confinement:
    """A kind of work that only some areas do, and how it shows in their source."""

    what: str
    """Said in the failure: "<what> belongs in <areas>"."""
    areas: frozenset[str]
    """Areas of the package that may do it."""
    packages: frozenset[str] = frozenset()
    """Importing one of these, or anything inside it, counts."""
    but_not: frozenset[str] = frozenset()
    """Parts of those packages that are pure computation."""
    builtins: frozenset[str] = frozenset()
    """Calling one of these builtins counts."""
    methods: frozenset[str] = frozenset()
    """Calling a method or function of this name on anything counts."""
    attributes: frozenset[str] = frozenset()
    """Naming one of these dotted names counts, called or not."""


CONFINEMENTS = [
    Confinement(
        what="torch",
        areas=frozenset({"nn", "encoder", "train", "products"}),
        packages=frozenset({"torch", "safetensors.torch"}),
    ),
    Confinement(
        what="transformers",
        areas=frozenset({"nn", "encoder", "train", "products"}),
        packages=frozenset({"transformers"}),
    ),
    Confinement(
        what="sound files and the model hub",
        areas=frozenset({"encoder"}),
        packages=frozenset({"huggingface_hub", "soundfile"}),
    ),
    Confinement(
        what="machine code made at run time",
        areas=frozenset({"nn"}),
        packages=frozenset({"llvmlite"}),
    ),
    Confinement(
        what="published data sets",
        areas=frozenset({"products"}),
        packages=frozenset({"datasets", "pyarrow"}),
    ),
    Confinement(
        what="Dask",
        areas=frozenset({"runner"}),
        packages=frozenset({"dask", "distributed"}),
    ),
    Confinement(
        what="click and printing",
        areas=frozenset({"cli"}),
        packages=frozenset({"click", "rich"}),
        builtins=frozenset({"print", "input"}),
        attributes=frozenset({"sys.stdout", "sys.stderr", "sys.stdin"}),
    ),
    Confinement(
        # Whether a path exists may be asked anywhere: an argument can be a name or a file, and
        # somebody has to find out which.
        what="reading and writing files, and sockets",
        areas=frozenset({"sources", "stores", "region", "encoder", "train", "products"}),
        packages=frozenset(
            {
                "PIL",
                "aiohttp",
                "fiona",
                "fsspec",
                "geopandas",
                "gzip",
                "http",
                "httpx",
                "mmap",
                "obstore",
                "osgeo",
                "pyogrio",
                "rasterio",
                "requests",
                "rio_cogeo",
                "safetensors",
                "shutil",
                "socket",
                "sqlite3",
                "tarfile",
                "tempfile",
                "urllib.request",
                "zarr",
                "zipfile",
            }
        ),
        but_not=frozenset(
            {
                "rasterio.coords",
                "rasterio.crs",
                "rasterio.enums",
                "rasterio.errors",
                "rasterio.features",
                "rasterio.transform",
                "rasterio.warp",
                "rasterio.windows",
            }
        ),
        builtins=frozenset({"open"}),
        methods=frozenset(
            {
                "fromfile",
                "genfromtxt",
                "iterdir",
                "loadtxt",
                "makedirs",
                "mkdir",
                "open",
                "open_dataarray",
                "open_dataset",
                "open_mfdataset",
                "open_rasterio",
                "open_zarr",
                "read_bytes",
                "read_csv",
                "read_file",
                "read_text",
                "rglob",
                "rmdir",
                "savetxt",
                "scandir",
                "symlink_to",
                "to_csv",
                "to_file",
                "to_netcdf",
                "to_raster",
                "to_zarr",
                "tofile",
                "touch",
                "unlink",
                "write_bytes",
                "write_text",
            }
        ),
        attributes=frozenset(
            {
                "np.load",
                "np.memmap",
                "np.save",
                "np.savez",
                "np.savez_compressed",
                "os.listdir",
                "os.remove",
                "os.rename",
                "os.replace",
                "os.walk",
            }
        ),
    ),
]


@dataclass(frozen=True)
class Import:
    """One imported thing: an own module or an outside one, as fully as the source tells."""

    target: str
    line: int


def _own_modules() -> dict[str, Path]:
    """Dotted name -> file, of every module in the package."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["soundmap", *path.relative_to(PACKAGE).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = path
    return modules


MODULES = _own_modules()
per_module = pytest.mark.parametrize("name", MODULES)


def _area(module: str) -> str:
    """Top-level part of an own module: "" for the front door, "nn" for soundmap.nn.vit."""
    _, _, rest = module.partition(".")
    return rest.partition(".")[0]


def _inside(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def _tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"), filename=str(MODULES[name]))


def _imports(tree: ast.Module, name: str, is_package: bool) -> Iterator[Import]:
    """Every import in a module's source, wherever it stands, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            called = _dotted(node.func)
            first = node.args[0]
            if (
                called.rpartition(".")[2] in {"import_module", "__import__"}
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and not first.value.startswith(".")
            ):
                yield Import(first.value, node.lineno)


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute chain; ``?.c`` where the chain starts with an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _own_names(tree: ast.Module) -> set[str]:
    """Names that the module defines or imports itself: no builtins, whatever they are called."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _layer_faults(tree: ast.Module, name: str, is_package: bool = False) -> list[str]:
    area = _area(name)
    faults = []
    for item in _imports(tree, name, is_package):
        if not _inside(item.target, "soundmap"):
            continue
        other = _area(item.target)
        where = f"{name}, line {item.line}: imports {item.target}"
        if other in FRONT_CONSTANTS:
            continue
        if other not in LAYERS:
            faults.append(
                f"{where}: take names from the module that defines them; the front door "
                f"({', '.join(sorted(FRONT_CONSTANTS))} apart) is for users"
            )
        elif other != area and LAYERS[other] >= LAYERS[area]:
            faults.append(
                f"{where}: {area} is in layer {LAYERS[area]} and may import only from layers "
                f"below that number, but {other} is in layer {LAYERS[other]}"
            )
    return faults


def _confinement_faults(tree: ast.Module, name: str, is_package: bool = False) -> list[str]:
    faults = []
    own_names = _own_names(tree)
    for rule in CONFINEMENTS:
        if _area(name) in rule.areas:
            continue
        seen: list[tuple[int, str]] = [
            (item.line, f"imports {item.target}")
            for item in _imports(tree, name, is_package)
            if any(_inside(item.target, package) for package in rule.packages)
            and not any(_inside(item.target, pure) for pure in rule.but_not)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _dotted(node) in rule.attributes:
                seen.append((node.lineno, f"uses {_dotted(node)}"))
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                if node.func.id in rule.builtins - own_names:
                    seen.append((node.lineno, f"calls {node.func.id}()"))
            elif isinstance(node.func, ast.Attribute) and node.func.attr in rule.methods:
                # soundmap's own modules have an open(), too: calling that touches no file here
                holder = _dotted(node.func.value)
                if holder not in LAYERS and holder != "soundmap":
                    seen.append((node.lineno, f"calls {holder}.{node.func.attr}()"))
        faults += [
            f"{name}, line {line}: {what}; {rule.what} belongs in {', '.join(sorted(rule.areas))}"
            for line, what in sorted(set(seen))
        ]
    return faults


def _unsafe_loads(tree: ast.Module, name: str) -> list[str]:
    """Whatever could unpickle a file: code would run that came with the data."""
    faults = [
        f"{name}, line {item.line}: imports {item.target}: keep data in safetensors, NumPy or JSON"
        for item in _imports(tree, name, False)
        # Plug-in authors' contract tests send an object of their own through pickle and back.
        if any(_inside(item.target, package) for package in ("pickle", "joblib", "dill"))
        and _area(name) != "testing"
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {
            word.arg: word.value.value
            for word in node.keywords
            if isinstance(word.value, ast.Constant)
        }
        if _dotted(node.func) == "torch.load" and options.get("weights_only") is not True:
            faults.append(f"{name}, line {node.lineno}: torch.load without weights_only=True")
        if options.get("allow_pickle"):
            faults.append(f"{name}, line {node.lineno}: allow_pickle")
    return faults


@per_module
def test_every_module_has_a_place_in_the_table(name: str) -> None:
    area = _area(name)
    assert area in LAYERS or area in FRONT, (
        f"{name} is not in the table of layers: decide what it may import and what may import it, "
        f"and add {area!r} to LAYERS in {Path(__file__).name}, or move it into a module there"
    )


@pytest.mark.parametrize("name", [name for name in MODULES if _area(name) in LAYERS])
def test_a_module_imports_only_from_layers_above_it(name: str) -> None:
    faults = _layer_faults(_tree(name), name, MODULES[name].name == "__init__.py")
    assert not faults, "\n".join(faults)


@per_module
def test_special_work_stays_where_it_belongs(name: str) -> None:
    faults = _confinement_faults(_tree(name), name, MODULES[name].name == "__init__.py")
    assert not faults, "\n".join(faults)


@per_module
def test_nothing_is_unpickled_from_a_file(name: str) -> None:
    faults = _unsafe_loads(_tree(name), name)
    assert not faults, "\n".join(faults)


@per_module
def test_modules_are_small_and_named_for_a_job(name: str) -> None:
    lines = MODULES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 500, f"{name} has {lines} lines: two jobs are hiding in it"
    assert not {"utils", "util", "helpers", "misc", "common"} & set(name.split(".")), (
        f"{name}: a name that says what the module is for, please"
    )


HEAVY = [
    *("torch", "rasterio", "zarr", "xarray", "dask", "distributed", "geopandas", "pyogrio"),
    *("datasets", "llvmlite", "pyarrow", "transformers"),
]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("import soundmap", id="import"),
        pytest.param("import soundmap.cli", id="cli"),
        pytest.param(
            "import sys\nsys.argv = ['soundmap', '--help']\n"
            "from soundmap.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code",
            id="help",
        ),
    ],
)
def test_starting_is_light(start: str) -> None:
    code = f"{start}\nimport sys\nprint('loaded', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].removeprefix("loaded").split()
    assert not loaded, f"`{start.splitlines()[-1]}` loads {loaded}: import them where they are used"


class TestTheTestsThemselves:
    """A guard that sees nothing passes everything: each must catch what it is for."""

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("soundmap.grid", "import soundmap.plan"),
            ("soundmap.grid", "from soundmap import plan"),
            ("soundmap.grid", "from . import plan"),
            ("soundmap.grid", "from .plan import Unit"),
            ("soundmap.region", "from soundmap.grid import block"),
            ("soundmap.nn.vit", "from ..encoder import Encoder"),
            ("soundmap.plan", "def late():\n    from soundmap.cli.options import region"),
            ("soundmap.plan", "import importlib\nimportlib.import_module('soundmap.api')"),
            ("soundmap.plan", "import soundmap"),
            ("soundmap.plan", "from soundmap import predict"),
        ],
    )
    def test_a_wrong_layer_is_seen(self, name: str, source: str) -> None:
        assert _layer_faults(ast.parse(source), name)

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("soundmap.plan", "from soundmap.grid import blocks\nfrom .errors import InputError"),
            ("soundmap.sources.raster", "from .base import Image"),
            ("soundmap.sources.raster", "from ..grid import ground_gsd_m"),
            ("soundmap.stores.schema", "from soundmap import __version__"),
        ],
    )
    def test_a_right_layer_passes(self, name: str, source: str) -> None:
        assert not _layer_faults(ast.parse(source), name)

    def test_relative_imports_of_a_package_start_inside_it(self) -> None:
        tree = ast.parse("from .base import Image\nfrom ..cli import main")
        found = [item.target for item in _imports(tree, "soundmap.sources", is_package=True)]
        assert found == ["soundmap.sources.base.Image", "soundmap.cli.main"]

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("soundmap.pipeline", "import torch.nn.functional as F"),
            ("soundmap.scoring", "def f():\n    from torch import Tensor"),
            ("soundmap.pipeline", "from dask import delayed"),
            ("soundmap.api", "import click"),
            ("soundmap.runner", "print('done')"),
            ("soundmap.runner", "import sys\nsys.stderr.write('done')"),
            ("soundmap.concepts", "open('bank.json')"),
            ("soundmap.concepts", "from pathlib import Path\nPath('bank.json').read_text()"),
            ("soundmap.grid", "import rasterio"),
            ("soundmap.grid", "from rasterio import open as raster_open"),
            ("soundmap.cli.predict", "from PIL import Image"),
            ("soundmap.api", "import xarray as xr\nxr.open_zarr('map.zarr')"),
        ],
    )
    def test_work_in_the_wrong_place_is_seen(self, name: str, source: str) -> None:
        assert _confinement_faults(ast.parse(source), name)

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("soundmap.encoder", "import torch\nfrom safetensors import safe_open"),
            ("soundmap.runner", "import distributed"),
            ("soundmap.cli.info", "import click\nprint('a map')"),
            ("soundmap.region", "import geopandas\ngeopandas.read_file('a.geojson')"),
            ("soundmap.grid", "from rasterio.features import geometry_mask"),
            ("soundmap.api", "def open(path): ...\nopen('city.zarr')"),
            ("soundmap.cli.info", "from soundmap import api\napi.open('city.zarr')"),
        ],
    )
    def test_work_in_the_right_place_passes(self, name: str, source: str) -> None:
        assert not _confinement_faults(ast.parse(source), name)

    @pytest.mark.parametrize(
        "source",
        [
            "import pickle",
            "import torch\ntorch.load('a.pt')",
            "import torch\ntorch.load('a.pt', weights_only=False)",
            "import numpy as np\nnp.load('a.npz', allow_pickle=True)",
        ],
    )
    def test_an_unsafe_load_is_seen(self, source: str) -> None:
        assert _unsafe_loads(ast.parse(source), "soundmap.encoder")
