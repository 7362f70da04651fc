"""Killed at any moment and started again, a run ends in the same bytes.

Clients, workers and schedulers are real processes that get SIGKILL at random moments.
``SOUNDMAP_KILL_SEED`` repeats a run: the seed is printed.
"""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Stage, Undisturbed

WORKERS = 2


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = os.environ.get("SOUNDMAP_KILL_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"SOUNDMAP_KILL_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


def kill_clients(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random, kills: int, again: int
) -> None:
    """Kill so many clients; a run that ends before is checked, and another begins."""
    while stage.kills < kills:
        client = stage.client()
        client.join(chance.uniform(0.1, 1) * undisturbed.seconds)
        killed = stage.kill(client, again)
        assert killed or client.exitcode == 0, stage.log
        # A client may be killed when its map is there and it is on its way out.
        if stage.out.exists():
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
    stage.start_cluster(WORKERS)
    kill_clients(stage, undisturbed, chance, kills=5, again=WORKERS)


def test_processes_of_its_own_are_killed(
    stage: Stage, undisturbed: Undisturbed, chance: random.Random
) -> None:
    """The process that --workers started is replaced, and ends with its client."""
    client = stage.client("--workers", "1")
    stage.wait_for(lambda: stage.processes_seen() or not client.is_alive())
    client.join(chance.uniform(0, 4 * stage.UNIT_SECONDS))
    first = stage.processes_seen()
    os.kill(*first, signal.SIGKILL)
    stage.count_kill(again=1)
    # Nobody else is there to go on.
    stage.wait_for(lambda: stage.processes_seen() > first or not client.is_alive())
    client.join(chance.uniform(0, 4 * stage.UNIT_SECONDS))
    assert stage.kill(client, again=1) or client.exitcode == 0, stage.log
    stage.wait_for(lambda: not any(is_there(pid) for pid in stage.processes_seen()))
    if not stage.out.exists():
        stage.finish()
    stage.check(undisturbed.files)


def test_workers_are_killed(stage: Stage, undisturbed: Undisturbed, chance: random.Random) -> None:
    """Others take their place, and the run that lost them ends by itself."""
    stage.start_cluster(WORKERS)
    client = stage.client()
    stage.wait_for(lambda: stage.computed() or not client.is_alive())
    while client.is_alive() and stage.kills < 5:
        client.join(chance.uniform(0, 4 * stage.UNIT_SECONDS))
        if client.is_alive() and stage.kill(stage.workers.pop(0), again=1):
            stage.start_worker()
    client.join(stage.PATIENCE_SECONDS)
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
        stage.start_cluster(WORKERS)
        client = stage.client()
        before = stage.computed().total()
        stage.wait_for(lambda: stage.computed().total() > before or not client.is_alive())
        client.join(chance.uniform(0, 4 * stage.UNIT_SECONDS))
        assert stage.scheduler is not None
        length = len(stage.log)
        stage.kill(stage.scheduler, again=WORKERS)
        client.join(stage.PATIENCE_SECONDS)
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
        stage.start_cluster(WORKERS)
        stage.finish()
    stage.check(undisturbed.files)


def test_a_unit_that_kills_three_workers_is_named_and_the_rest_goes_on(
    stage: Stage, undisturbed: Undisturbed
) -> None:
    deadly = stage.folder / "deadly"
    stage.watch = stage.watch.replace(
        "    time.sleep(SECONDS)\n",
        f"    if (span.row0, span.col0) == (8, 16) and os.path.exists({str(deadly)!r}):\n"
        "        os.kill(os.getpid(), 9)\n",
    )
    stage.folder.mkdir()
    deadly.touch()
    stage.start_cluster(WORKERS)
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


def is_there(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
