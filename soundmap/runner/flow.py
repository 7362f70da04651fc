"""A run's units over the workers of a Dask cluster, which come and go.

The client hands each worker one unit to compute and names the one to read meanwhile. It knows at
any time which unit is where, so that it can tell which one was under way when a worker died, and a
worker's next unit is begun only once the report of its last has been taken: whatever dies, no more
than one unit per worker has to be computed again.

Everything that happens arrives in one queue, in order: reports (events that workers send), workers
that came or left, and tasks that ended without a report.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from soundmap import __version__
from soundmap.errors import RunFailed, SoundmapError
from soundmap.pipeline import Job
from soundmap.runner import worker
from soundmap.runner.cluster import Cluster
from soundmap.runner.unit import OnReport, UnitReport, one_line
from soundmap.stores.zarr_store import Status

if TYPE_CHECKING:
    import distributed

# A unit that has ended so many workers is not tried again.
_MOST_KILLS = 3
# Answers may be lost on the way, but not again and again.
_MOST_LOST_ANSWERS = 5
# A job is large: no more workers than this take it at the same time.
_WELCOMES_AT_ONCE = 32
# How often the cluster is looked at when nothing happens.
_LOOK_SECONDS = 5.0
# A scheduler that does not answer for so long is given up.
_SILENCE_SECONDS = 60.0
# A worker that takes no tasks for so long (paused, closing) loses its unit to another.
_AWAY_SECONDS = 60.0
_TICK_SECONDS = 1.0
_GOODBYE_SECONDS = 15.0
_KEPT = "what is done is kept: the same command goes on from there"

OnNote = Callable[[str], None]


@dataclass(eq=False)
class _Seat:
    """A worker, as the client knows it."""

    address: str
    gpu: bool
    task: distributed.Future | None = None
    """What it does: takes the job, then computes units."""
    ready: bool = False
    """Whether it has the job."""
    refusal: SoundmapError | None = None
    """Why it cannot take part."""
    unit: int | None = None
    """What it computes."""
    ahead: int | None = None
    """What it reads meanwhile, and will compute next."""
    seen: float = field(default_factory=time.monotonic)
    """When it was last known to take tasks."""
    away: bool = False
    """Whether it is known not to."""


def run_on_cluster(
    cluster: Cluster,
    job: Job,
    positions: Sequence[int],
    on_report: OnReport,
    on_note: OnNote = lambda text: None,
) -> None:
    """Compute units on a Dask cluster, a unit per worker and one read ahead.

    Workers may join and leave at any time. A unit whose worker was lost is computed by another; one
    that was under way when three workers died, at least twice of these alone, is reported as
    failed. If all workers have left, the run waits for another as long as ``cluster`` says.

    Where workers declare the resource GPU, units go to these alone and take one GPU each. (Tried
    with plain workers that declare it; no machine with GPUs was at hand.)

    Parameters
    ----------
    cluster
        From `connect`.
    job
        What to compute; its store must be reachable from every worker under the same path.
    positions
        Which units of its plan, as positions in ``plan.units``.
    on_report
        Called once for every unit, in this thread.
    on_note
        Called with what the user should know meanwhile, in this thread.

    Raises
    ------
    RunFailed
        The scheduler is gone, no worker is left, or no worker can take part.
    SoundmapError
        What would fail every other unit as well.
    """
    _Run(cluster, job, positions, on_report, on_note).run()


class _Run:
    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        positions: Sequence[int],
        on_report: OnReport,
        on_note: OnNote,
    ) -> None:
        self.cluster, self.client, self.job = cluster, cluster.client, job
        self.on_report, self.on_note = on_report, on_note
        self.payload = worker.packed(job)
        self.name = f"soundmap-{uuid.uuid4().hex[:12]}"
        self.waiting = deque(int(p) for p in positions)
        # Units that were under way when a worker died. Each is computed alone from then on, with
        # nothing read ahead, so that an innocent one clears itself; and after all others.
        self.suspects: deque[int] = deque()
        self.open = set(self.waiting)
        self.kills: dict[int, int] = {}
        self.lost_answers: dict[int, int] = {}
        self.seats: dict[str, _Seat] = {}
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.tasks = 0
        self.alone_since: float | None = None
        self.had_workers = False
        self.asked: float | None = None
        self.answered = time.monotonic()

    def run(self) -> None:
        if not self.open:
            return
        self.client.subscribe_topic(self.name, self._on_message)
        self.client.subscribe_topic("all", self._on_cluster_event)
        try:
            self._look()
            while self.open:
                self._welcome_and_hand_out()
                self._check_cluster()
                self._take_events()
        finally:
            self._say_goodbye()

    # What arrives; called in Dask's threads, so it only queues.

    def _on_message(self, event: tuple[float, dict[str, Any]]) -> None:
        self.events.put(partial(self._reported, event[1]))

    def _on_cluster_event(self, event: tuple[float, Any]) -> None:
        message = event[1] if isinstance(event[1], dict) else {}
        if message.get("action") == "remove-worker":
            expected = bool(message.get("expected"))
            self.events.put(partial(self._gone, message.get("worker", ""), expected))
        elif message.get("action") == "add-worker":
            self.events.put(partial(self._look, soon=True))

    def _on_task_end(self, seat: _Seat, task: distributed.Future) -> None:
        self.events.put(partial(self._ended, seat, task))

    def _on_quiet(self, seat: _Seat, answer: Future[Any]) -> None:
        self.events.put(partial(self._quiet, seat))

    def _on_answer(self, answer: Future[dict[str, Any]]) -> None:
        self.events.put(partial(self._answered, answer))

    def _take_events(self) -> None:
        try:
            self.events.get(timeout=_TICK_SECONDS)()
            while True:
                self.events.get_nowait()()
        except queue.Empty:
            pass

    # The cluster.

    def _look(self, soon: bool = False) -> None:
        """Ask the scheduler which workers there are; the answer comes as an event."""
        if self.asked is not None and not soon:
            return
        self.asked = time.monotonic()
        scheduler: Any = self.client.scheduler
        # With a number of -1 all workers are told, not the first few.
        self._ask(scheduler.identity, n_workers=-1).add_done_callback(self._on_answer)

    def _answered(self, answer: Future[dict[str, Any]]) -> None:
        self.asked = None
        if answer.cancelled() or answer.exception() is not None:
            return
        self.answered = now = time.monotonic()
        workers = answer.result()["workers"]
        for address in self.seats.keys() - workers.keys():
            self._gone(address, expected=False)
        for address, facts in workers.items():
            takes_tasks = facts.get("status", "running") == "running"
            seat = self.seats.get(address)
            if seat is None:
                if takes_tasks and self._being_welcomed() < _WELCOMES_AT_ONCE:
                    self._welcome(address, bool(facts.get("resources", {}).get("GPU")))
                continue
            seat.away = not takes_tasks
            if takes_tasks:
                seat.seen = now
            elif now - seat.seen > _AWAY_SECONDS:
                self._gone(address, expected=True)

    def _being_welcomed(self) -> int:
        return sum(not s.ready and s.refusal is None for s in self.seats.values())

    def _welcome(self, address: str, gpu: bool) -> None:
        self.seats[address] = seat = _Seat(address, gpu)
        # Before its first task, as the profiler is at work only while there is one.
        quiet = self._ask(
            self.client.run,
            worker.stop_profiler,
            workers=[address],
            on_error="ignore",
            asynchronous=True,
        )
        quiet.add_done_callback(partial(self._on_quiet, seat))

    def _quiet(self, seat: _Seat) -> None:
        if self.seats.get(seat.address) is seat:
            self._submit(seat, worker.welcome, self.name, self.payload, __version__)

    def _submit(self, seat: _Seat, function: Callable[..., None], *args: object) -> None:
        self.tasks += 1
        # A key of its own for every try: a unit may be asked for again, and Dask would count the
        # workers that were lost with a key, and blame whatever was on them.
        seat.task = self.client.submit(
            function,
            *args,
            key=(self.name, self.tasks),
            workers=[seat.address],
            allow_other_workers=False,
            resources={"GPU": 1} if seat.gpu and seat.ready else None,
            pure=False,
        )
        seat.task.add_done_callback(partial(self._on_task_end, seat))

    def _ask(
        self, question: Callable[..., Awaitable[Any]], *args: Any, **options: Any
    ) -> Future[Any]:
        """Ask in Dask's event loop, without waiting for the answer."""

        async def ask() -> Any:
            return await question(*args, **options)

        loop: Any = self.client.loop
        return asyncio.run_coroutine_threadsafe(ask(), loop.asyncio_loop)

    def _check_cluster(self) -> None:
        now = time.monotonic()
        if self.client.status != "running":
            raise RunFailed(f"the Dask scheduler at {self.cluster.name} is gone; {_KEPT}")
        if now - self.answered > _SILENCE_SECONDS:
            raise RunFailed(
                f"the Dask scheduler at {self.cluster.name} has not answered for "
                f"{_SILENCE_SECONDS:.0f} s; {_KEPT}"
            )
        if self.asked is None and now - self.answered > _LOOK_SECONDS:
            self._look()
        if any(seat.refusal is None for seat in self.seats.values()):
            self.alone_since = None
            self.had_workers = True
            return
        for seat in self.seats.values():
            if seat.refusal is not None:
                raise seat.refusal
        if self.alone_since is None:
            self.alone_since = now
            if self.had_workers:
                self.on_note(
                    "no worker is left: waiting up to "
                    f"{_duration(self.cluster.patience_s)} for another"
                )
        elif now - self.alone_since > self.cluster.patience_s:
            raise RunFailed(
                f"the Dask cluster at {self.cluster.name} has had no worker for "
                f"{_duration(self.cluster.patience_s)}: start some; {_KEPT}"
            )

    # Units.

    def _welcome_and_hand_out(self) -> None:
        ready = [s for s in self.seats.values() if s.ready and not s.away]
        if any(seat.gpu for seat in self.seats.values() if seat.refusal is None):
            ready = [s for s in ready if s.gpu]
        idle = [s for s in ready if s.unit is None]
        for number, seat in enumerate(idle):
            position = self._next_for(seat)
            if position is None:
                return
            seat.unit = position
            others = len(idle) - number - 1
            if position not in self.kills and len(self.waiting) > others:
                seat.ahead = self.waiting.popleft()
            self._submit(seat, worker.compute, self.name, position, seat.ahead, self.name)

    def _next_for(self, seat: _Seat) -> int | None:
        """What was read ahead there; else what waits; else what was read ahead elsewhere."""
        position, seat.ahead = seat.ahead, None
        if position is not None:
            return position
        for units in (self.waiting, self.suspects):
            while units:
                position = units.popleft()
                # A report that was thought lost may have come after all.
                if position in self.open:
                    return position
        for other in self.seats.values():
            if other.ahead is not None:
                position, other.ahead = other.ahead, None
                return position
        return None

    def _reported(self, message: dict[str, Any]) -> None:
        position = message["unit"]
        for seat in self.seats.values():
            if seat.unit == position:
                seat.unit = None
        if position not in self.open:
            return
        self._settle(position, Status(message["status"]), message["seconds"], str(message["error"]))

    def _settle(self, position: int, status: Status, seconds: float, error: str) -> None:
        self.open.discard(position)
        unit = self.job.plan.units[position]
        rows, cols = unit.cells.shape
        self.on_report(UnitReport(unit.index, status, rows * cols, seconds, error))

    def _ended(self, seat: _Seat, task: distributed.Future) -> None:
        if self.seats.get(seat.address) is not seat or seat.task is not task:
            return
        if task.status == "error":
            self._failed(seat, task.exception())
        elif task.status == "finished":
            if not seat.ready:
                seat.ready = True
            else:
                self._answer_lost(seat)
        elif self.client.status == "running":
            self._answer_lost(seat)

    def _failed(self, seat: _Seat, error: BaseException) -> None:
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            self._gone(seat.address, expected=False)
        elif isinstance(error, worker.JobUnknown):
            self._gone(seat.address, expected=True)
            self._look()
        elif isinstance(error, SoundmapError) and seat.ready:
            raise error
        elif isinstance(error, SoundmapError):
            seat.refusal = error
            self.on_note(str(error))
        else:
            raise RunFailed(
                f"the worker at {seat.address} failed ({type(error).__name__}: "
                f"{one_line(error)}): is the same soundmap installed there? {_KEPT}"
            ) from error

    def _answer_lost(self, seat: _Seat) -> None:
        position, seat.unit = seat.unit, None
        if not seat.ready:
            del self.seats[seat.address]
        if position is None or position not in self.open:
            return
        self.lost_answers[position] = self.lost_answers.get(position, 0) + 1
        if self.lost_answers[position] > _MOST_LOST_ANSWERS:
            raise RunFailed(f"the cluster at {self.cluster.name} loses its answers; {_KEPT}")
        self.waiting.appendleft(position)

    def _gone(self, address: str, expected: bool) -> None:
        """Give a worker's units to others; ``expected`` if it left of its own accord."""
        seat = self.seats.pop(address, None)
        if seat is None:
            return
        self._cancel(seat)
        for position in (seat.ahead, seat.unit):
            if position is None or position not in self.open:
                continue
            if expected:
                self.waiting.appendleft(position)
                continue
            self.kills[position] = self.kills.get(position, 0) + 1
            if self.kills[position] < _MOST_KILLS:
                self.suspects.append(position)
            else:
                reason = (
                    f"{_MOST_KILLS} workers died while they computed it, the last at {address}: "
                    "out of memory, or a crash in a library; their logs may tell"
                )
                self._settle(position, Status.FAILED, 0.0, reason)

    def _cancel(self, seat: _Seat) -> None:
        with contextlib.suppress(Exception):
            if seat.task is not None:
                seat.task.cancel()

    def _say_goodbye(self) -> None:
        """Leave nothing of the run on the cluster, and nobody writing."""
        with contextlib.suppress(Exception):
            if self.client.status != "running":
                return
            for seat in self.seats.values():
                self._cancel(seat)
            self.client.unsubscribe_topic(self.name)
            self.client.unsubscribe_topic("all")
            self.client.run(
                worker.forget,
                self.name,
                workers=[s.address for s in self.seats.values() if s.ready],
                on_error="ignore",
                callback_timeout=_GOODBYE_SECONDS,
            )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"
