"""Training a model on samples of up to four modalities."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soundmap.errors import InputError, RunFailed
from soundmap.products.samples import BadRows, Samples, StreamedSamples
from soundmap.train.batches import Collator, Feeder, Rows
from soundmap.train.config import Settings
from soundmap.train.data import RunData
from soundmap.train.journal import BAD_FILE, Journal, Listener, write_run
from soundmap.train.objective import TERMS, Objective, backward, hide_metadata, log_scales
from soundmap.train.optimiser import learning_rate, make_optimiser
from soundmap.train.processes import Processes, average, gather_objects, share_buffers, wait
from soundmap.train.result import MODEL, concepts_of, write_result
from soundmap.train.resume import clear, facts, find_run
from soundmap.train.start import Start, set_training
from soundmap.train.state import (
    Progress,
    last_checkpoint,
    load_checkpoint,
    read_best,
    save_best,
    save_checkpoint,
)
from soundmap.train.streams import StreamFeeder
from soundmap.train.texts import Captions
from soundmap.train.validate import LOSS, Validator
from soundmap.train.views import View, Viewer

_EMPTY_STEPS = 50
_STEP = 7


@dataclass(frozen=True)
class TrainReport:
    """What became of a run."""

    folder: Path
    """The model folder."""
    steps: int
    best_step: int
    """Step of the model that was kept; the last one where nothing was validated."""
    figures: Mapping[str, float]
    """Of that model, on the validation samples; empty without."""
    bad: BadRows
    left_out: Mapping[str, int]
    """Term -> steps that went without it."""
    stopped_early: bool
    was_finished: bool
    """Whether nothing was left to do."""


def train(
    settings: Settings,
    start: Start,
    data: RunData,
    out: Path,
    processes: Processes,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> TrainReport:
    """Train a model, or go on where a run was stopped.

    A run that was killed and is started again by the same call ends in the same weights as one
    that never stopped, to the last bit on one machine's processor with as many threads.

    Parameters
    ----------
    settings, start, data
        What to train, from where, on what.
    out
        Folder of the run: checkpoints, ``run.json``, ``metrics.csv``, ``validation.csv``,
        ``bad_rows.csv``, ``tensorboard/``, and in the end ``model/``.
    processes
        Which process this is, of how many.
    listener
        Is told of every step, in the first process alone.
    overwrite
        Whether to begin anew where a run is.

    Raises
    ------
    PlanMismatch
        An unfinished run is there, of other settings or data.
    InputError
        The data cannot be trained on.
    RunFailed
        The loss is no number any more.
    OutputError
        The folder cannot be written.
    """
    run = _Run(settings, start, data, out, processes, listener or Listener())
    try:
        return run.go(overwrite)
    finally:
        run.close()


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        settings: Settings,
        start: Start,
        data: RunData,
        out: Path,
        processes: Processes,
        listener: Listener,
    ) -> None:
        self.settings = settings
        self.start = start
        self.data = data
        self.out = out
        self.processes = processes
        self.listener = listener if processes.first else Listener()
        t = settings.training
        if t.threads:
            torch.set_num_threads(t.threads)
        if not data.train.native_px or "image" not in data.train.fields:
            raise InputError(f"{data.train.name} has no images: a model of places needs them")
        self.lower = _lower(t.precision, processes.device)
        self.feeder = self._feeder()
        self.total = self._total()
        concepts_of(settings)
        model: nn.Module = start.model.to(processes.device)
        if processes.world > 1 and processes.device.type == "cuda":
            # One batch over all processes, for the norms as well.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = start.model
        self.optimiser = make_optimiser(model, settings.optimiser)
        captions = Captions(start.text.tokens, processes.device, settings.text.cache_mb)
        config = self.model.config
        self.collator = Collator(captions, config.metadata, config.audio, processes.device)
        self._pool = ThreadPoolExecutor(
            t.workers, "validate", initializer=lambda: torch.set_num_threads(1)
        )
        self.validator = self._validator()
        self.journal = Journal(out, self.listener)
        self.progress = Progress()
        self.figures: dict[str, float] = {}
        self.began = time.monotonic()

    # ------------------------------------------------------------------------------- making ready

    def _viewer(self, samples: Samples | StreamedSamples, train: bool) -> Viewer:
        window = self.start.model.config.vit.window_px
        return Viewer(self.settings.input, window, samples.native_px, samples.gsd_m, train)

    def _feeder(self) -> Feeder | StreamFeeder:
        t, samples = self.settings.training, self.data.train
        viewer = self._viewer(samples, True)
        place = (self.processes.rank, self.processes.world)
        if isinstance(samples, Samples):
            rows = Rows(samples, viewer, t.seed, t.most_bad)
            feeder = Feeder(rows, t.batch, *place, t.workers)
            if not feeder.per_epoch:
                raise InputError(
                    f"{samples.name} has {len(samples):,} rows, and a step takes "
                    f"{t.batch * self.processes.world:,}: lower training.batch"
                )
            return feeder
        return StreamFeeder(
            samples, viewer, t.seed, t.batch, *place, t.workers, t.buffer, t.most_bad
        )

    def _total(self) -> int:
        t = self.settings.training
        if t.steps:
            return t.steps
        if not self.feeder.per_epoch:
            raise InputError(f"{self.data.train.name} is a stream of unknown length: set "
                             "training.steps")  # fmt: skip
        return t.epochs * self.feeder.per_epoch

    def _validator(self) -> Validator | None:
        samples = self.data.validation
        if samples is None:
            if self.settings.validation.patience:
                raise InputError(
                    "validation.patience needs samples to validate on: add [validation] to the data"
                )
            return None
        seed, viewer = self.settings.training.seed, self._viewer(samples, False)
        rows: Rows | tuple[StreamedSamples, Viewer]
        if isinstance(samples, Samples):
            rows = Rows(samples, viewer, seed, self.settings.training.most_bad)
        else:
            rows = (samples, viewer)
        return Validator(
            rows,
            self.collator,
            self.settings.validation,
            self.settings.loss,
            self.processes,
            self._pool,
            seed,
        )

    def _every(self) -> int:
        """Steps from one validation to the next."""
        return self.settings.validation.every or self.feeder.per_epoch or self.total

    # ------------------------------------------------------------------------------------ the run

    def go(self, overwrite: bool) -> TrainReport:
        run = self._find(overwrite)
        if run.get("status") == "finished" and self._is_over() and (self.out / MODEL).is_dir():
            return self._report(run.get("figures", {}), was_finished=True)
        if self.processes.first:
            run |= {"status": "running"}
            write_run(self.out, run)
            self.journal.begin(self.progress.step)
        self.listener.planned(self.total, self.progress.step)
        set_training(self.model, self.settings.freeze)
        empty = 0
        steps = self.feeder.steps(self.progress.step)
        while not self._is_over():
            found = self._step(steps)
            empty = empty + 1 if found.total is None else 0
            if empty >= _EMPTY_STEPS:
                raise InputError(
                    f"{self.data.train.name}: for {empty} steps no two samples of a batch had the "
                    "same two of image, recording, caption and image caption: nothing to learn"
                )
            at = self.progress.step
            if self.validator and (at % self._every() == 0 or at == self.total):
                self._validate()
            if at % self.settings.training.save_every == 0 or self._is_over():
                self._save()
        return self._finish(run)

    def _is_over(self) -> bool:
        patience = self.settings.validation.patience
        stopped = bool(patience) and self.progress.waited >= patience
        return self.progress.step >= self.total or stopped

    def _find(self, overwrite: bool) -> dict[str, Any]:
        """Find the run that is there and load its state, or begin one."""
        place = (self.processes, self.lower, self.total)
        now = facts(self.settings, self.start, self.data, *place)
        run = find_run(self.out, now, overwrite)
        # Nobody writes or clears before all have looked.
        wait(self.processes)
        if run is None:
            if self.processes.first:
                clear(self.out)
            return now
        checkpoint = last_checkpoint(self.out)
        if checkpoint is not None:
            device = self.processes.device
            self.progress = load_checkpoint(checkpoint, self.model, self.optimiser, device)
            self.listener.noted(f"Going on after step {self.progress.step:,}")
        history = [*run.get("history", []), run["machine"]]
        kept: dict[str, Any] = {key: run[key] for key in ("status", "figures") if key in run}
        return {**now, "history": history, **kept}

    def _step(self, steps: Iterator[list[View]]) -> Objective:
        s, progress = self.settings, self.progress
        began = time.monotonic()
        seed = (s.training.seed, _STEP, progress.step)
        rate = learning_rate(progress.step, self.total, s.optimiser.lr, s.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self.collator.collate(next(steps))
        if self.model.fuser is not None:
            batch = hide_metadata(batch, s.training.metadata_dropout, seed, self.processes)
        self.optimiser.zero_grad(set_to_none=True)
        found = backward(
            self.model,
            batch,
            s.loss,
            self.processes,
            parts=s.training.accumulate,
            lower=self.lower,
            seed=seed,
        )
        loss = None if found.total is None else float(found.total.detach())
        norm = None
        if loss is not None:
            norm = self._learn(loss)
        progress.step += 1
        for name in found.left_out:
            progress.left_out[name] = progress.left_out.get(name, 0) + 1
        samples = len(batch) * self.processes.world
        if self.processes.first:
            seconds = time.monotonic() - began
            self.journal.step(
                {
                    "step": progress.step,
                    "epoch": (progress.step - 1) // (self.feeder.per_epoch or self.total) + 1,
                    "lr": rate,
                    "loss": loss,
                    **{name: found.terms.get(name) for name in TERMS},
                    "grad_norm": norm,
                    "seconds": round(time.monotonic() - self.began, 3),
                    "samples_per_s": round(samples / max(seconds, 1e-6), 2),
                }
            )
        self.listener.stepped(progress.step, loss, samples)
        return found

    def _learn(self, loss: float) -> float:
        """Take a step along the gradients; returns their norm."""
        s = self.settings
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        average(parameters, self.processes)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailed(
                f"the loss became {loss} (gradient {norm}) at step {self.progress.step + 1}: lower "
                "optimiser.lr, set optimiser.clip_norm, or train in float32. The last checkpoint "
                "is kept"
            )
        if s.optimiser.clip_norm:
            nn.utils.clip_grad_norm_(parameters, s.optimiser.clip_norm)
        self.optimiser.step()
        if s.loss.largest_scale:
            with torch.no_grad():
                for scale in log_scales(self.model).values():
                    scale.clamp_(max=math.log(s.loss.largest_scale))
        return norm

    def _validate(self) -> None:
        assert self.validator is not None
        share_buffers(self.model, self.processes)
        self.model.eval()
        figures = self.validator.figures(self.model, self.lower)
        set_training(self.model, self.settings.freeze)
        keep = self.settings.validation.keep
        if keep not in figures:
            raise InputError(
                f"validation.keep = {keep!r} cannot be told: the validation samples "
                f"{'lack what it compares' if figures else 'hold no two that can be compared'}"
            )
        # The lower the better, whichever it is.
        value = figures[keep] if keep == LOSS else -figures[keep]
        progress = self.progress
        best = progress.best is None or value < progress.best
        if best:
            progress.best, progress.best_step, progress.waited = value, progress.step, 0
            self.figures = figures
        else:
            progress.waited += 1
        if self.processes.first:
            if best:
                save_best(self.out, self.model, progress, figures)
            self.journal.validation({"step": progress.step, **figures, "best": int(best)})
        self.listener.validated(progress.step, figures, best)

    def _save(self) -> None:
        share_buffers(self.model, self.processes)
        bad = self._bad()
        self.progress.bad = list(bad.rows)
        if self.processes.first:
            bad.write(self.out / BAD_FILE)
            save_checkpoint(self.out, self.model, self.optimiser, self.progress)
        wait(self.processes)

    def _bad(self) -> BadRows:
        """Bad rows of all processes, and of the run before it was stopped."""
        feeder = self.feeder
        own = feeder.rows.bad if isinstance(feeder, Feeder) else feeder.samples.bad
        every = BadRows(self.data.train.name)
        for row in self.progress.bad:
            every.add(*row)
        mine = list(own.rows)
        if self.validator and isinstance(self.validator.rows, Rows):
            mine += self.validator.rows.bad.rows
        for rows in gather_objects(mine, self.processes):
            for row in rows:
                every.add(*row)
        return every

    def _finish(self, run: dict[str, Any]) -> TrainReport:
        state, figures = self.model.state_dict(), self.figures
        best = read_best(self.out) if self.validator else None
        if best is not None:
            state, figures = best
        report = self._report(figures)
        if self.processes.first:
            s = self.settings
            about = {
                "training": {
                    "command": run["machine"]["command"],
                    "settings": run["settings"],
                    "steps": report.steps,
                    "kept_step": report.best_step,
                    "samples_per_step": s.training.batch * self.processes.world,
                    "bad_rows": len(report.bad),
                    "hardware": f"{self.processes.world} x {run['machine']['device']}",
                    "versions": {k: run["machine"][k] for k in ("soundmap", "torch")},
                    "started_from": s.start or "scratch",
                    "objective": "Sat2Sound (arXiv 2505.13777): image, recording and caption in "
                    "pairs, image with both, image with its own caption, pseudo-matches",
                },
                "figures": {k: round(v, 5) for k, v in figures.items()},
                "data": [
                    {"name": facts["name"], "rows": facts["rows"], "use": split}
                    for split, facts in run["data"].items()
                ],
            }
            write_result(
                self.out, s, self.model.config, state, self.start.text, self.data.train, about
            )
            write_run(
                self.out,
                run
                | {
                    "status": "finished",
                    "steps": report.steps,
                    "kept_step": report.best_step,
                    "figures": dict(figures),
                    "left_out": dict(report.left_out),
                    "bad_rows": len(report.bad),
                    "refused_captions": self.collator.captions.refused,
                },
            )
        wait(self.processes)
        return report

    def _report(self, figures: Mapping[str, float], was_finished: bool = False) -> TrainReport:
        p = self.progress
        return TrainReport(
            folder=self.out / MODEL,
            steps=p.step,
            best_step=p.best_step or p.step,
            figures=figures,
            bad=self._bad(),
            left_out=p.left_out,
            stopped_early=p.step < self.total,
            was_finished=was_finished,
        )

    def close(self) -> None:
        self.journal.close()
        self.feeder.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _lower(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"
