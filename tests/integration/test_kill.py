"""Killed at any moment and started again, a run ends in the same bytes.

Clients, workers and schedulers are real processes that get SIGKILL at random moments. They are
forked from a process that has imported everything, which saves seconds for each. A small program
gives them units of 8 cells and writes down each unit that is computed, just before it is encoded.

``SOUNDMAP_KILL_SEED`` repeats a run: the seed is printed.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import soundmap

UNIT_CELLS = 8
UNITS = 12
WORKERS = 2
# A unit takes at least so long, so that there is something to interrupt.
UNIT_SECONDS = 0.15
PATIENCE_SECONDS = 60

WATCH = f"""
import os, time
import soundmap.runner.unit as unit

def watched(job, data, encoder):
    line = f"{{data.blocks[0].span.row0}},{{data.blocks[0].span.col0}} {{os.getpid()}}\\n"
    record = os.open(RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(record, line.encode())
    os.close(record)
    time.sleep({UNIT_SECONDS})
    return encode(job, data, encoder)

# Dask may load the file twice.
if unit.encode_unit.__name__ != "watched":
    encode, unit.encode_unit = unit.encode_unit, watched
"""

PLAYER = f"""
import asyncio, os, sys
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
{WATCH}
async def serve(server, *args, **options):
    async with server(*args, **options) as running:
        if "port" in options:
            with open(ADDRESS + ".new", "w") as file:
                file.write(running.address)
            os.rename(ADDRESS + ".new", ADDRESS)
        await running.finished()

if ROLE == "scheduler":
    from distributed import Scheduler
    asyncio.run(serve(Scheduler, host="127.0.0.1", port=0, dashboard_address=":0"))
elif ROLE == "worker":
    from distributed import Worker
    asyncio.run(serve(Worker, ADDRESS, nthreads=1, resources=RESOURCES))
else:
    import dask
    import soundmap.layout
    soundmap.layout._MOST_UNIT_CELLS = soundmap.layout._LEAST_UNIT_CELLS = {UNIT_CELLS}
    # What processes run that --workers starts.
    dask.config.set({{"distributed.worker.preload": [WATCH]}})
    from soundmap.cli import main
    sys.argv = ["soundmap", *ARGS]
    main()
"""

PRELOAD = [
    "distributed",
    "soundmap.api",
    "soundmap.cli.predict",
    "soundmap.encoder.torch_encoder",
    "soundmap.runner.worker",
    "soundmap.sources.raster",
]


@dataclasses.dataclass
class Stage:
    """A folder with a run in it, and the processes that take part."""

    folder: Path
    player: Path
    imagery: Path
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
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def computed(self) -> Counter[str]:
        path = self.folder / "record"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.split()[0] for line in lines)

    def processes_seen(self) -> set[int]:
        """Numbers of the processes that have computed units."""
        path = self.folder / "record"
        lines = path.read_text().splitlines() if path.exists() else []
        return {int(line.split()[1]) for line in lines}

    def play(self, role: str, *args: str, **names: Any) -> BaseProcess:
        self.folder.joinpath("out").mkdir(parents=True, exist_ok=True)
        record, watch = self.folder / "record", self.folder / "watch.py"
        watch.write_text(f"RECORD = {str(record)!r}\n{WATCH}")
        given = {
            "ROLE": role,
            "ARGS": args,
            "LOG": str(self.folder / ("log" if role == "client" else f"log of {role}")),
            "RECORD": str(record),
            "WATCH": str(watch),
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(
            target=runpy.run_path, args=(str(self.player),), kwargs={"init_globals": given | names}
        )
        process.start()
        self.processes.append(process)
        return process

    def client(self, *options: str) -> BaseProcess:
        if self.scheduler is not None:
            options = (*options, "--scheduler", self.address)
        args = ["--imagery", str(self.imagery), "--concepts", "birdsong,road traffic"]
        return self.play("client", "predict", *args, "--quiet", "--out", str(self.out), *options)

    def start_cluster(self, workers: int = WORKERS) -> None:
        place = self.folder / f"address {len(self.processes)}"
        self.scheduler = self.play("scheduler", ADDRESS=str(place))
        wait_for(place.exists)
        self.address = place.read_text()
        self.workers = []
        for _ in range(workers):
            self.start_worker()

    def start_worker(self, **resources: float) -> BaseProcess:
        worker = self.play("worker", ADDRESS=self.address, RESOURCES=resources)
        self.workers.append(worker)
        return worker

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
        self.folder.joinpath("record").unlink()
        self.allowed_again = 0

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def finish(self) -> None:
        """Give the same command until the map is there; the first time must do."""
        client = self.client()
        client.join(PATIENCE_SECONDS)
        assert client.exitcode == 0, self.log

    def check(self, undisturbed: dict[str, bytes]) -> None:
        assert "Traceback" not in self.log
        assert {p.name for p in self.out.parent.iterdir()} == {self.out.name}
        assert files_of(self.out) == undisturbed
        computed = self.computed()
        assert len(computed) == UNITS
        assert computed.total() - UNITS <= self.allowed_again, (computed, self.allowed_again)


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a map but the two that say when it was made, and what these say but for it."""
    found = {
        str(p.relative_to(store)): p.read_bytes()
        for p in sorted(store.rglob("*"))
        if p.is_file() and p.name not in (".zattrs", ".zmetadata")
    }
    attrs = dict(soundmap.open(store).attrs)
    attrs.pop("created")
    return found | {"attributes": repr(sorted(attrs.items())).encode()}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = os.environ.get("SOUNDMAP_KILL_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"SOUNDMAP_KILL_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def stage(town: Path, tmp_path: Path) -> Iterator[Stage]:
    player = tmp_path / "player.py"
    player.write_text(PLAYER)
    stage = Stage(tmp_path / "stage", player, town)
    yield stage
    stage.end()


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    files: dict[str, bytes]
    seconds: float
    """From start to end."""


@pytest.fixture(scope="module")
def undisturbed(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    player = folder / "player.py"
    player.write_text(PLAYER)
    stage = Stage(folder / "stage", player, town)
    # The first start imports everything; the second shows how long a run takes.
    stage.client("--overwrite").join(PATIENCE_SECONDS)
    started = time.monotonic()
    stage.client("--overwrite").join(PATIENCE_SECONDS)
    seconds = time.monotonic() - started
    assert stage.processes[-1].exitcode == 0, stage.log
    assert stage.computed().total() == 2 * UNITS
    values = soundmap.open(stage.out)["probability"].to_numpy()
    assert np.isfinite(values).all()
    return Undisturbed(files_of(stage.out), seconds)


def kill_clients(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random, kills: int, again: int
) -> None:
    """Kill so many clients; a run that ends before is checked, and another begins."""
    while stage.kills < kills:
        client = stage.client()
        client.join(chance.uniform(0.1, 1) * undisturbed.seconds)
        if not stage.kill(client, again):
            assert client.exitcode == 0, stage.log
            stage.check(undisturbed.files)
            stage.begin_anew()
    if not stage.out.exists():
        stage.finish()
    print(f"{stage.kills} clients killed; the last run computed {stage.computed().total()} units")
    stage.check(undisturbed.files)


def test_clients_are_killed(stage: Stage, undisturbed: Undisturbed, chance: random.Random) -> None:
    """In one process, in which two units are under way at once."""
    kill_clients(stage, undisturbed, chance, kills=6, again=2)


def test_clients_of_a_cluster_are_killed(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random
) -> None:
    """Their workers go on with what they have begun, and serve the next client."""
    stage.start_cluster()
    kill_clients(stage, undisturbed, chance, kills=5, again=WORKERS)


def test_processes_of_its_own_are_killed(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random
) -> None:
    """The process that --workers started is replaced, and ends with its client."""
    client = stage.client("--workers", "1")
    wait_for(lambda: stage.processes_seen() or not client.is_alive())
    client.join(chance.uniform(0, 4 * UNIT_SECONDS))
    first = stage.processes_seen()
    os.kill(*first, signal.SIGKILL)
    stage.count_kill(again=1)
    # Nobody else is there to go on.
    wait_for(lambda: stage.processes_seen() > first or not client.is_alive())
    client.join(chance.uniform(0, 4 * UNIT_SECONDS))
    assert stage.kill(client, again=1), stage.log
    wait_for(lambda: not any(is_there(pid) for pid in stage.processes_seen()))
    stage.finish()
    stage.check(undisturbed.files)


def test_workers_are_killed(stage: Stage, undisturbed: Undisturbed, chance: random.Random) -> None:
    """Others take their place, and the run that lost them ends by itself."""
    stage.start_cluster()
    client = stage.client()
    wait_for(lambda: stage.computed() or not client.is_alive())
    while client.is_alive() and stage.kills < 5:
        client.join(chance.uniform(0, 4 * UNIT_SECONDS))
        if client.is_alive() and stage.kill(stage.workers.pop(0), again=1):
            stage.start_worker()
    client.join(PATIENCE_SECONDS)
    print(f"{stage.kills} workers killed; {stage.computed().total()} units computed")
    assert stage.kills
    # Three kills in a row may have met one unit by chance: it failed, and is tried again.
    if client.exitcode != 0:
        assert "3 workers died" in stage.log
        stage.finish()
    stage.check(undisturbed.files)


def test_schedulers_are_killed(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random
) -> None:
    """Each time the client ends soon, in one clear line."""

    def meet() -> None:
        stage.start_cluster()
        client = stage.client()
        before = stage.computed().total()
        wait_for(lambda: stage.computed().total() > before or not client.is_alive())
        client.join(chance.uniform(0, 4 * UNIT_SECONDS))
        assert stage.scheduler is not None
        length = len(stage.log)
        stage.kill(stage.scheduler, again=WORKERS)
        client.join(PATIENCE_SECONDS)
        assert client.exitcode is not None, "the client hangs"
        if client.exitcode != 0:
            said = stage.log[length:]
            assert said.count("\n") == 1, said
            assert "the Dask scheduler at tcp://" in said
            assert "is gone" in said
            assert "the same command goes on" in said

    while stage.kills < 3 and not stage.out.exists():
        meet()
    print(f"{stage.kills} schedulers killed; {stage.computed().total()} units computed")
    assert stage.kills
    if not stage.out.exists():
        stage.start_cluster()
        stage.finish()
    stage.check(undisturbed.files)


def test_a_unit_that_kills_three_workers_is_named_and_the_rest_goes_on(
    stage: Stage, undisturbed: Undisturbed
) -> None:
    deadly = stage.folder / "deadly"
    stage.player.write_text(
        PLAYER.replace(
            f"    time.sleep({UNIT_SECONDS})\n",
            f"    if line.startswith('8,16 ') and os.path.exists({str(deadly)!r}):\n"
            "        os.kill(os.getpid(), 9)\n",
        )
    )
    stage.folder.mkdir()
    deadly.touch()
    stage.start_cluster()
    client = stage.client()
    deaths = 0
    while client.is_alive():
        client.join(0.05)
        for worker in [w for w in stage.workers if not w.is_alive()]:
            stage.workers.remove(worker)
            deaths += 1
            stage.start_worker()
    assert client.exitcode == 1, stage.log
    assert deaths == 3
    assert stage.log.count("\n") == 1
    assert "1 of 12 units" in stage.log
    assert "3 workers died while they computed it" in stage.log
    deadly.unlink()
    stage.allowed_again = 3
    stage.finish()
    stage.check(undisturbed.files)
