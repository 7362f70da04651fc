"""The written record of a run: run.json, metrics.csv, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soundmap import __version__
from soundmap.errors import OutputError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
VALIDATION_FILE = "validation.csv"
BAD_FILE = "bad_rows.csv"
BOARD = "tensorboard"


class Listener:
    """Hears what a run does. Override what you need."""

    def planned(self, steps: int, done: int) -> None:
        """So many steps are to be done, so many of them were done before."""

    def stepped(self, step: int, loss: float | None, samples: int) -> None:
        """A step is done; ``samples`` over all processes."""

    def validated(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """The model was judged."""

    def noted(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class _Table:
    """A CSV file that grows by rows with a step, and can be cut back to one."""

    path: Path

    def cut(self, step: int) -> None:
        """Drop rows after a step: they will come again."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        # A row that a kill has cut short is after the last checkpoint, too.
        whole = [r for r in rows[1:] if len(r) == len(rows[0]) and r[0].isdigit()]
        kept = rows[:1] + [r for r in whole if int(r[0]) <= step]
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(kept)
        os.replace(part, self.path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row; the first one makes the heading."""
        new = not self.path.is_file()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow("" if v is None else v for v in row.values())


class Journal:
    """Writes a run's record.

    Parameters
    ----------
    out
        Folder of the run.
    listener
        Is told once if TensorBoard is missing.
    """

    def __init__(self, out: Path, listener: Listener) -> None:
        self.out = out
        self._metrics = _Table(out / METRICS_FILE)
        self._validation = _Table(out / VALIDATION_FILE)
        self._listener = listener
        self._board: Any = None

    def begin(self, step: int) -> None:
        """Go on after a step; what was written of later ones is dropped."""
        for table in (self._metrics, self._validation):
            table.cut(step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._listener.noted(
                "TensorBoard is not installed (pip install 'soundmap[train]'): "
                f"the course of training is in {METRICS_FILE} alone"
            )
            return
        self._board = SummaryWriter(str(self.out / BOARD), purge_step=step + 1)

    def step(self, row: Mapping[str, Any]) -> None:
        """Record a step; ``row`` begins with "step"."""
        self._metrics.add(row)
        self._show("train", row)

    def validation(self, row: Mapping[str, Any]) -> None:
        """Record a validation."""
        self._validation.add(row)
        self._show("validation", row)

    def _show(self, group: str, row: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(f"{group}/{key}", value, row["step"])

    def close(self) -> None:
        """Let TensorBoard finish."""
        if self._board is not None:
            self._board.close()


def read_run(out: Path) -> dict[str, Any] | None:
    """Read run.json; None if there is no run.

    Raises
    ------
    OutputError
        It is damaged.
    """
    path = out / RUN_FILE
    if not path.is_file():
        return None
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("status", "settings", "data", "machine"):
            run[key]
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is no record of a run ({error!r}): choose another folder, or add --overwrite"
        ) from error


def write_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all."""
    path = out / RUN_FILE
    part = path.with_suffix(".part")
    try:
        out.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def machine(device: torch.device) -> dict[str, Any]:
    """Say what a run runs on, and with which versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "soundmap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": gpu or f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "command": " ".join(["soundmap", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
