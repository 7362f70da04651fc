"""The training loop of the bundled model: phase after phase, and on from where it was stopped."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soundmap.errors import InputError
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.train.feed import Clips, Diet, draw_batch, rows_of, step_rng
from soundmap.train.terms import STEM_WEIGHTS, VIEWS, WEIGHTS, Heads, Shares, stem_terms, step_terms
from soundmap.train.turns import tie, tie_statistics, write_out

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
_LARGEST_SCALE = math.log(50.0)


@dataclass(frozen=True)
class Phase:
    """A part of training with its own course of the learning rate: up, then down a cosine."""

    steps: int
    learning_rate: float
    warmup: int
    windows: tuple[tuple[int, float], ...]
    """Side of the window and how often: small windows are seen faster."""
    stem_only: bool = False
    """Whether the convolutions learn alone, from class labels."""
    fixed_norms: bool = False
    """Whether batch norms use their running statistics, as the finished model does."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Terms that weigh otherwise in this phase. Those of `soundmap.train.terms.VIEWS` are left out
    of phases that give them none."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the card keeps it."""

    phases: tuple[Phase, ...]
    seed: int = 56
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    average: float = 0.998
    """Decay of the running mean of the weights; the mean is what is kept."""
    shares: Shares = field(default_factory=Shares)
    turned_alike: bool = False
    """Whether the convolutions see the same in an image however it is turned, see
    `soundmap.train.turns`."""
    threads: int = 1
    save_every: int = 200


@dataclass(frozen=True)
class Spent:
    """What training took, over all of its runs."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process, on all of its threads: less than the wall's on a machine that others use."""

    def since(self, start: Spent) -> Spent:
        """Add what a run has taken that began at ``start``, from `now`."""
        here = now()
        return Spent(
            self.wall_s + here.wall_s - start.wall_s, self.cpu_s + here.cpu_s - start.cpu_s
        )


def now() -> Spent:
    """Read the clocks."""
    return Spent(time.monotonic(), time.process_time())


@dataclass
class _Run:
    """What learns, and how far it has come."""

    model: SoundModel
    mean: SoundModel
    heads: Heads
    phase: int
    step: int
    before: Spent
    """What earlier runs took."""
    began: Spent
    """The clocks when this one began."""
    optimiser: torch.optim.Optimizer | None = None


def fit(
    model_config: ModelConfig,
    config: TrainConfig,
    diets: list[Diet],
    clips: Clips | None,
    out: Path,
) -> tuple[SoundModel, Spent]:
    """Train a model, or go on with a run that was stopped.

    A phase starts from the running mean of the weights of the one before. Each step's batch and
    all other chance follow from the seed and its number, so a run that was stopped and taken up
    again ends with the same weights as one that was not.

    Parameters
    ----------
    model_config, config
        Architecture, and how to train.
    diets, clips
        What to train on; None: no recordings.
    out
        Folder for the checkpoint (every ``save_every`` steps), ``weights.safetensors`` and
        ``log.jsonl``. A checkpoint there is gone on from.

    Returns
    -------
    tuple
        The model with the running mean of the weights, and what training took.

    Raises
    ------
    InputError
        The checkpoint was made with other settings. Phases that had not begun may differ, and more
        may follow. Or the convolutions are to be `TrainConfig.turned_alike` and cannot be.
    """
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    told = json.loads(json.dumps({"model": asdict(model_config), "train": asdict(config)}))
    run = _start(model_config, config, diets, clips, out / CHECKPOINT, told)
    with (out / "log.jsonl").open("a", encoding="utf-8") as journal:

        def note(row: Mapping[str, Any]) -> None:
            journal.write(json.dumps(row) + "\n")
            journal.flush()
            log.info("%s", row)

        if run.phase == run.step == 0:
            note(told)
        while run.phase < len(config.phases):
            _run_phase(run, config, diets, clips, note, out, told)
            run.model.load_state_dict(run.mean.state_dict())
            run.phase, run.step, run.optimiser = run.phase + 1, 0, None
            _save(run, out / CHECKPOINT, told)
        write_out(run.mean.vit.patch_embed)
        save_weights(run.mean, out / "weights.safetensors")
    return run.mean.eval(), run.before.since(run.began)


def _start(
    model_config: ModelConfig,
    config: TrainConfig,
    diets: list[Diet],
    clips: Clips | None,
    path: Path,
    told: Mapping[str, Any],
) -> _Run:
    torch.manual_seed(config.seed)
    model = SoundModel(model_config)
    if config.turned_alike:
        tie(model.vit.patch_embed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heads = Heads(
        model_config.dim,
        model_config.vit.width,
        {d.data.name: len(d.data.classes) for d in diets},
        len(clips.clips.classes) if clips is not None else 0,
    )
    run = _Run(model, copy.deepcopy(model), heads, 0, 0, Spent(), now())
    if not path.exists():
        return run
    state = torch.load(path, weights_only=True)
    begun = state["phase"] + (state["step"] > 0)
    if not _goes_on(json.loads(state["told"]), told, begun):
        raise InputError(f"{path} was made with other settings: choose another --out, or remove it")
    for part in ("model", "mean", "heads"):
        getattr(run, part).load_state_dict(state[part])
    run.phase, run.step, run.before = state["phase"], state["step"], Spent(*state["spent"])
    if state["optimiser"] is not None:
        run.optimiser = _optimiser(run, config)
        run.optimiser.load_state_dict(state["optimiser"])
    log.info("going on from step %d of phase %d", run.step, run.phase + 1)
    return run


def _goes_on(before: Mapping[str, Any], now: Mapping[str, Any], begun: int) -> bool:
    """Whether settings are the same as far as they were used: phases to come may change."""

    def used(told: Mapping[str, Any]) -> list[Any]:
        # How many threads and how often to save do not change what is learnt.
        free = ("phases", "threads", "save_every")
        rest = {k: v for k, v in told["train"].items() if k not in free}
        return [told["model"], told["train"]["phases"][:begun], rest]

    return used(before) == used(now)


def _save(run: _Run, path: Path, told: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    part = path.with_suffix(".part")
    state = {
        "told": json.dumps(told, sort_keys=True),
        "model": run.model.state_dict(),
        "mean": run.mean.state_dict(),
        "heads": run.heads.state_dict(),
        "optimiser": run.optimiser.state_dict() if run.optimiser is not None else None,
        "phase": run.phase,
        "step": run.step,
        "spent": astuple(run.before.since(run.began)),
    }
    torch.save(state, part)
    part.replace(path)


def _optimiser(run: _Run, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [*run.model.parameters(), *run.heads.parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )


def _run_phase(
    run: _Run,
    config: TrainConfig,
    diets: list[Diet],
    clips: Clips | None,
    note: Callable[[Mapping[str, Any]], None],
    out: Path,
    told: Mapping[str, Any],
) -> None:
    phase = config.phases[run.phase]
    if run.optimiser is None:
        run.optimiser = _optimiser(run, config)
    parameters = [p for group in run.optimiser.param_groups for p in group["params"]]
    run.model.train()
    if phase.fixed_norms:
        _fix_norms(run.model)
    sums: dict[str, float] = {}
    since = run.step
    for step in range(run.step, phase.steps):
        for group in run.optimiser.param_groups:
            group["lr"] = learning_rate(step, phase)
        terms = _terms(run, phase, config, diets, clips, step)
        weights = STEM_WEIGHTS if phase.stem_only else {**WEIGHTS, **phase.weights}
        torch.stack([weights[k] * v for k, v in terms.items()]).sum().backward()
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        tie_statistics(run.model.vit.patch_embed)
        with torch.no_grad():
            for scale in (run.model.logit_scale, *_scales(run.model)):
                scale.clamp_(max=_LARGEST_SCALE)
        follow(run.mean, run.model, min(config.average, (step + 1) / (step + 10)))
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        run.step = step + 1
        if run.step % 50 == 0 or run.step == phase.steps:
            row = {k: round(v / (run.step - since), 4) for k, v in sums.items()}
            spent = run.before.since(run.began)
            clocks = {"seconds": round(spent.wall_s, 1), "cpu": round(spent.cpu_s, 1)}
            note({"phase": run.phase, "step": run.step, **clocks, **row})
            sums.clear()
            since = run.step
        if run.step % config.save_every == 0:
            _save(run, out / CHECKPOINT, told)


def _scales(model: SoundModel) -> list[Tensor]:
    return list(model.scales.values()) if model.config.audio else []


def _terms(
    run: _Run,
    phase: Phase,
    config: TrainConfig,
    diets: list[Diet],
    clips: Clips | None,
    step: int,
) -> dict[str, Tensor]:
    rng = step_rng(config.seed, run.phase, step)
    rows = [rows_of(len(d.data.labels), d.batch, step, config.seed + run.phase) for d in diets]
    batch = draw_batch(diets, dict(phase.windows), rows, rng)
    if phase.stem_only:
        return stem_terms(run.model, run.heads, diets, batch, rng)
    views = [view for view in VIEWS if view in phase.weights]
    return step_terms(run.model, run.heads, diets, clips, batch, config.shares, rng, views)


def learning_rate(step: int, phase: Phase) -> float:
    """Rate of a step: a linear rise, then a cosine down to a hundredth."""
    if step < phase.warmup:
        return phase.learning_rate * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return phase.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _fix_norms(model: SoundModel) -> None:
    """Hold batch norms to their running statistics; their scale and offset still learn."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def follow(mean: SoundModel, model: SoundModel, decay: float) -> None:
    """Move a running mean of weights towards a model."""
    for kept, new in zip(mean.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def save_weights(model: SoundModel, path: Path) -> None:
    """Write the weights, whole or not at all."""
    part = path.with_suffix(".part")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(part))
    part.replace(path)
