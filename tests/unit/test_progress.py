"""What a person is told of a long run: pace, time left, sizes in their own units."""

from __future__ import annotations

import pytest

from soundmap.cli.amounts import duration, size
from soundmap.cli.progress import Pace
from soundmap.runner import UnitReport
from soundmap.stores.zarr_store import Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def report(status: Status, seconds: float) -> UnitReport:
    return UnitReport((0, 0), status, 100, seconds)


def test_time_left_is_at_the_pace_of_this_run() -> None:
    clock = Clock()
    pace = Pace(100_000, clock)
    assert pace.left_seconds is None
    for _ in range(10):
        clock.now += 2
        pace.count(report(Status.DONE, 2), 3.0)
    assert pace.left_seconds == pytest.approx(2 * (100_000 - 10))
    assert pace.area_text == "1.5 km2/s"
    assert pace.left_text == "2 days left"


def test_units_side_by_side() -> None:
    clock = Clock()
    pace = Pace(20, clock)
    for _ in range(10):
        clock.now += 1  # two at a time, two seconds each
        pace.count(report(Status.DONE, 2), 1.0)
    assert pace.left_seconds == pytest.approx(10)


def test_empty_units_do_not_make_the_rest_look_fast() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    for _ in range(490):
        clock.now += 0.01
        pace.count(report(Status.EMPTY, 0.01), 1.0)
    assert pace.left_seconds is None
    for _ in range(10):
        clock.now += 4
        pace.count(report(Status.DONE, 4), 1.0)
    assert pace.left_seconds == pytest.approx(4 * 500)
    clock.now += 0.01
    pace.count(report(Status.FAILED, 0.01), 1.0)
    assert pace.left_seconds == pytest.approx(4 * 499)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (600, "10 minutes"),
        (5400, "1.5 hours"),
        (100_000, "28 hours"),
        (432_000, "5 days"),
        (432_000_000, "5,000 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(3e5, "0.3 MB"), (1.234e9, "1.2 GB"), (4.5e15, "4,500.0 TB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text
