"""What is tried again, how often, and how waiting ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from rasterio.errors import RasterioIOError

from soundmap.errors import SourceError, UsageError
from soundmap.sources._gdal import may_pass
from soundmap.sources._retry import PassingError, Patience, read_patiently, stop_waiting

HASTY = Patience(first_wait_s=0)


class Flaky:
    """Fails so many times, then gives "pixels"."""

    def __init__(self, times: int, error: type[SourceError] = PassingError) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error("a.tif: could not be read")
        return "pixels"


@pytest.mark.parametrize("times", range(5))
def test_what_may_pass_is_tried_five_times(times: int) -> None:
    read = Flaky(times)
    assert read_patiently(read, HASTY) == "pixels"
    assert read.calls == times + 1


def test_then_it_says_how_often() -> None:
    read = Flaky(9)
    with pytest.raises(SourceError, match=r"^a\.tif: could not be read \(tried 5 times\)$"):
        read_patiently(read, HASTY)
    assert read.calls == 5


def test_what_cannot_pass_gets_one_more_try() -> None:
    read = Flaky(9, SourceError)
    with pytest.raises(SourceError, match="tried 2 times"):
        read_patiently(read, HASTY)
    assert read.calls == 2
    assert read_patiently(Flaky(1, SourceError), HASTY) == "pixels"


def test_one_try_is_one_try() -> None:
    read = Flaky(9)
    with pytest.raises(SourceError, match=r"could not be read$"):
        read_patiently(read, Patience(tries=1))
    assert read.calls == 1


def test_no_try_is_begun_late() -> None:
    read = Flaky(9)
    with pytest.raises(SourceError, match=r"could not be read$"):
        read_patiently(read, Patience(first_wait_s=0, longest_s=0))
    assert read.calls == 1


def test_other_errors_pass_through_at_once() -> None:
    def read() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_patiently(read, HASTY)


def test_waits_can_be_ended() -> None:
    said: list[str] = []
    begun = threading.Barrier(4)

    def read() -> None:
        begun.wait()
        raise PassingError("a.tif: could not be read")

    def wait() -> None:
        try:
            read_patiently(read, Patience(first_wait_s=600, longest_s=6000))
        except SourceError as error:
            said.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    stop_waiting()
    for thread in threads:
        thread.join(60)
    assert said == ["reading was stopped while it waited to try again"] * 3
    # Later ones wait as before.
    assert read_patiently(Flaky(1), Patience(first_wait_s=0.01)) == "pixels"


def test_patience_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Patience.from_environment() == Patience()
    monkeypatch.setenv("SOUNDMAP_READ_TRIES", "3")
    monkeypatch.setenv("SOUNDMAP_READ_WAIT_S", "0.5")
    monkeypatch.setenv("SOUNDMAP_READ_LONGEST_S", "60")
    assert Patience.from_environment() == Patience(3, 0.5, 60)
    for wrong in ("0", "many", "nan", "-1"):
        monkeypatch.setenv("SOUNDMAP_READ_TRIES", wrong)
        with pytest.raises(UsageError, match=r"SOUNDMAP_READ_TRIES=.* give a number from 1 up"):
            Patience.from_environment()


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("HTTP response code: 500", True),
        ("HTTP response code: 503", True),
        ("HTTP response code: 429", True),
        ("HTTP response code: 404", False),
        ("HTTP response code: 403", False),
        ("HTTP response code on http://tiles.example/a.tif: 404", False),
        ("CURL error: Operation timed out after 301 milliseconds", True),
        ("TIFFFillTile:Read error at row 1; got 7284 bytes, expected 49163", True),
    ],
)
def test_what_a_server_says(said: str, passes: bool) -> None:
    outer = RasterioIOError("Read failed. See previous exception for details.")
    outer.__cause__ = RasterioIOError(said)
    assert may_pass(outer, Path("a.vrt"), remote=True) == passes


def test_files_are_asked_themselves(tmp_path: Path) -> None:
    error = RasterioIOError("TIFFFillTile:Read error at row 1; got 7284 bytes, expected 49163")
    damaged = tmp_path / "a.tif"
    damaged.write_bytes(b"damaged")
    assert not may_pass(error, damaged, remote=False)
    assert not may_pass(error, tmp_path / "gone.tif", remote=False)
    # Its first byte cannot be read: EIO, as of a mount whose server is away.
    memory = Path("/proc/self/mem")
    if memory.exists():
        assert may_pass(error, memory, remote=False)
