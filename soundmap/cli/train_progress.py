"""How training is shown while it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.markup import escape

from soundmap.cli.bar import Bar
from soundmap.train.journal import Listener

_SMOOTH = 0.9
_PIPED_LINES = 20


class TrainProgress(Bar, Listener):
    """Shows a bar with steps, samples per second, loss and time left, and a line per validation.

    Where there is no terminal the loss is written about twenty times in all instead.
    """

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet, "steps", "loss")
        self._total = 0
        self._loss: float | None = None
        self._samples = 0
        self._started = 0.0

    def planned(self, steps: int, done: int) -> None:
        """Begin the bar."""
        self._total = steps
        self.begin("training", steps, done)
        self._started = time.monotonic()

    def stepped(self, step: int, loss: float | None, samples: int) -> None:
        """Count a step."""
        if loss is not None:
            before = loss if self._loss is None else self._loss
            self._loss = _SMOOTH * before + (1 - _SMOOTH) * loss
        self._samples += samples
        pace = f"{self._samples / max(1e-6, time.monotonic() - self._started):.3g} samples/s"
        told = "" if self._loss is None else f"loss {self._loss:.4f}"
        self.update(completed=step, pace=pace, loss=told)
        if not self.console.is_terminal and step % max(1, self._total // _PIPED_LINES) == 0:
            self.noted(f"step {step:,} of {self._total:,}, {told}, {pace}")

    def validated(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Say how the model is doing."""
        parts = [f"loss {figures['loss']:.4f}"] if "loss" in figures else []
        names = {"i2s": "image to sound", "s2i": "sound to image", "i2c": "image to caption"}
        for key, name in names.items():
            if f"{key}_recall" in figures:
                recall, rank = figures[f"{key}_recall"], figures[f"{key}_median_rank"]
                parts.append(f"{name} R@10% {recall:.3f} (median rank {rank:g})")
        kept = ", the best so far" if best else ""
        self.noted(f"validation at step {step:,}: {', '.join(parts)}{kept}")

    def noted(self, text: str) -> None:
        """Say something."""
        self.say(escape(text))
