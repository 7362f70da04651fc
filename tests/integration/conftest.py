"""What tests of the whole program share."""

from __future__ import annotations

import dataclasses
import multiprocessing
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray

import soundmap
from soundmap.cli import main

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run ``soundmap ARGS...`` in this process, which saves the time of a start."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        words = ["soundmap", *map(str, args)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


@pytest.fixture
def program(project: Path) -> Command:
    """Run ``soundmap ARGS...`` as a program of its own."""

    def call(*args: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "soundmap", *map(str, args)]
        return subprocess.run(
            words, cwd=project, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return call


@pytest.fixture(scope="module")
def small_units() -> Iterator[None]:
    """Units of 8 x 8 cells for a whole module: the 32 x 24 cells of the town are 12 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soundmap.layout._MOST_UNIT_CELLS", 8)
        patch.setattr("soundmap.layout._LEAST_UNIT_CELLS", 8)
        yield


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raster of 256 x 192 px of 10 m: 32 x 24 cells, some structure, no nodata."""
    path = tmp_path_factory.mktemp("imagery") / "town.tif"
    height, width = 192, 256
    generator = np.random.default_rng(3)
    blocks = generator.integers(20, 200, (3, height // 16, width // 16))
    pixels = np.kron(blocks, np.ones((1, 16, 16))) + generator.normal(0, 9, (3, height, width))
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=3,
        height=height,
        width=width,
        dtype="uint8",
        crs="EPSG:32633",
        transform=Affine(10, 0, 500_000, 0, -10, 5_500_000),
        tiled=True,
        blockxsize=64,
        blockysize=64,
        compress="deflate",
    ) as dataset:
        dataset.write(pixels.clip(0, 255).astype(np.uint8))
    return path


# What every process does that computes units: it writes down each, just before encoding it.
WATCH = """
import os, time
import soundmap.runner.unit as unit

def watched(job, data, encoder):
    span = data.blocks[0].span
    record = os.open(RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(record, f"{span.row0},{span.col0} {os.getpid()}\\n".encode())
    os.close(record)
    time.sleep(SECONDS)
    while os.path.exists(HOLD):
        time.sleep(SECONDS / 10)
    return encode(job, data, encoder)

# Dask may load the file twice.
if unit.encode_unit.__name__ != "watched":
    encode, unit.encode_unit = unit.encode_unit, watched
"""

PLAYER = """
import asyncio, os, sys
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
exec(open(WATCH).read())

async def serve(server, *args, **options):
    async with server(*args, **options) as running:
        with open(PRESENT + ".new", "w") as file:
            file.write(running.address)
        os.rename(PRESENT + ".new", PRESENT)
        await running.finished()

if ROLE == "scheduler":
    from distributed import Scheduler
    asyncio.run(serve(Scheduler, host="127.0.0.1", port=0, dashboard_address=":0"))
elif ROLE == "worker":
    from distributed import Worker
    asyncio.run(serve(Worker, ADDRESS, nthreads=THREADS, resources=RESOURCES))
else:
    import dask, signal
    import soundmap.layout
    # Where a shell has started the tests in the background, it was ignored from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    soundmap.layout._MOST_UNIT_CELLS = soundmap.layout._LEAST_UNIT_CELLS = UNIT_CELLS
    os.environ["SOUNDMAP_WORKER_PATIENCE_S"] = PATIENCE
    # What processes load that --workers starts.
    dask.config.set({"distributed.worker.preload": [WATCH]})
    from soundmap.cli import main
    sys.argv = ["soundmap", *ARGS]
    main()
"""


@dataclasses.dataclass
class Stage:
    """A folder with a run in it, and the processes that take part: clients, workers, schedulers.

    They are real, but forked from a process that has imported everything: that saves seconds each.
    """

    UNITS: ClassVar = 12
    UNIT_CELLS: ClassVar = 8
    # A unit takes at least so long, so that there is something to interrupt.
    UNIT_SECONDS: ClassVar = 0.15
    PATIENCE_SECONDS: ClassVar = 120
    PRELOADED: ClassVar = [
        "distributed",
        "soundmap.api",
        "soundmap.cli.predict",
        "soundmap.encoder.torch_encoder",
        "soundmap.runner.worker",
        "soundmap.sources.raster",
        # What loading a model imports late.
        "tokenizers",
        "torch.fx.experimental.symbolic_shapes",
        "torch.utils._device",
    ]

    folder: Path
    imagery: Path
    watch: str = WATCH
    """What processes do that compute units."""
    processes: list[BaseProcess] = dataclasses.field(default_factory=list)
    kills: int = 0
    allowed_again: int = 0
    """How many units may have been computed twice so far."""
    scheduler: BaseProcess | None = None
    workers: list[BaseProcess] = dataclasses.field(default_factory=list)
    address: str = ""

    @property
    def out(self) -> Path:
        return self.folder / "out" / "map.zarr"

    @property
    def hold(self) -> Path:
        """While this file is there, units that have begun do not end."""
        return self.folder / "hold"

    @property
    def log(self) -> str:
        """All that clients have said."""
        return self._text("log of client")

    def computed(self) -> Counter[str]:
        """How often each unit was computed."""
        return Counter(line.split()[0] for line in self._text("record").splitlines())

    def processes_seen(self) -> set[int]:
        """Numbers of the processes that have computed units."""
        return {int(line.split()[1]) for line in self._text("record").splitlines()}

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def play(self, role: str, *args: str, **names: Any) -> BaseProcess:
        self.folder.joinpath("out").mkdir(parents=True, exist_ok=True)
        player, watch = self.folder / "player.py", self.folder / "watch.py"
        # Once: a process that has just been started may be reading them.
        if not player.exists():
            constants = {
                "RECORD": str(self.folder / "record"),
                "SECONDS": self.UNIT_SECONDS,
                "HOLD": str(self.hold),
            }
            watch.write_text("".join(f"{k} = {v!r}\n" for k, v in constants.items()) + self.watch)
            player.write_text(PLAYER)
        given = {
            "ROLE": role,
            "ARGS": args,
            "LOG": str(self.folder / f"log of {role}"),
            "PRESENT": str(self.folder / f"{role} {len(self.processes)}"),
            "WATCH": str(watch),
            "UNIT_CELLS": self.UNIT_CELLS,
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.PRELOADED)
        process = context.Process(
            target=runpy.run_path, args=(str(player),), kwargs={"init_globals": given | names}
        )
        process.start()
        self.processes.append(process)
        return process

    def client(
        self,
        *options: str,
        out: Path | None = None,
        patience_s: float | None = None,
        quiet: bool = True,
    ) -> BaseProcess:
        """Map the imagery, on the cluster if there is one."""
        args = ["--imagery", str(self.imagery), "--concepts", "birdsong,road traffic", *options]
        args += ["--out", str(out or self.out), *(["--quiet"] if quiet else [])]
        if self.scheduler is not None:
            args += ["--scheduler", self.address]
        patience = "" if patience_s is None else str(patience_s)
        return self.play("client", "predict", *args, PATIENCE=patience)

    def start_cluster(self, workers: int) -> None:
        place = self.folder / f"scheduler {len(self.processes)}"
        self.scheduler = self.play("scheduler")
        self.wait_for(place.exists)
        self.address = place.read_text()
        self.workers = []
        before = self.present("worker")
        for _ in range(workers):
            self.start_worker()
        self.wait_for(lambda: self.present("worker") == before + workers)

    def present(self, role: str) -> int:
        """How many processes of a kind have begun to serve so far."""
        return len(list(self.folder.glob(f"{role} *[0-9]")))

    def start_worker(self, threads: int = 1, **resources: float) -> BaseProcess:
        worker = self.play("worker", ADDRESS=self.address, THREADS=threads, RESOURCES=resources)
        self.workers.append(worker)
        return worker

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + self.PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"nothing happened: {self.log}"
            time.sleep(0.01)

    def kill(self, process: BaseProcess, again: int) -> bool:
        """Kill a process, after which so many units may be computed again; False if it ended."""
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return False
        self.count_kill(again)
        return True

    def count_kill(self, again: int) -> None:
        self.kills += 1
        self.allowed_again += again

    def begin_anew(self) -> None:
        """Make room for another run, of which nothing is done."""
        shutil.rmtree(self.folder / "out")
        self.folder.joinpath("record").unlink(missing_ok=True)
        self.allowed_again = 0

    def finish(self) -> None:
        """Give the command; the map must be there."""
        client = self.client()
        client.join(self.PATIENCE_SECONDS)
        assert client.exitcode == 0, self.log

    def check(self, undisturbed: dict[str, bytes]) -> None:
        """Check that the map is the right one, that nothing else is there, and what it took."""
        assert "Traceback" not in self.log
        assert {p.name for p in self.out.parent.iterdir()} == {self.out.name}
        assert self.files(self.out) == undisturbed
        computed = self.computed()
        assert len(computed) == self.UNITS
        assert computed.total() - self.UNITS <= self.allowed_again, computed

    @staticmethod
    def files(store: Path) -> dict[str, bytes]:
        """Every file of a map but the two that say when it was made, and what these say else."""
        found = {
            str(p.relative_to(store)): p.read_bytes()
            for p in sorted(store.rglob("*"))
            if p.is_file() and p.name not in (".zattrs", ".zmetadata")
        }
        attrs = dict(soundmap.open(store).attrs)
        attrs.pop("created")
        return found | {"attributes": repr(sorted(attrs.items())).encode()}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run of the command on a `Stage` that nothing happens to, in one process."""

    files: dict[str, bytes]
    values: NDArray[np.float32]
    seconds: float
    """From start to end."""


@pytest.fixture
def stage(town: Path, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "stage", town)
    yield stage
    stage.end()


@pytest.fixture(scope="session")
def undisturbed(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    stage = Stage(tmp_path_factory.mktemp("undisturbed"), town)
    # The first start imports everything; the second shows how long a run takes.
    stage.client("--overwrite").join(stage.PATIENCE_SECONDS)
    started = time.monotonic()
    stage.client("--overwrite").join(stage.PATIENCE_SECONDS)
    seconds = time.monotonic() - started
    assert stage.processes[-1].exitcode == 0, stage.log
    assert stage.computed().total() == 2 * stage.UNITS
    values = soundmap.open(stage.out)["probability"].to_numpy()
    assert np.isfinite(values).all()
    return Undisturbed(stage.files(stage.out), values, seconds)
