"""The optimiser, and the course of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from soundmap.train.config import OptimiserSettings, ScheduleSettings


def learning_rate(step: int, total: int, base: float, schedule: ScheduleSettings) -> float:
    """Learning rate of a step, from 0: a linear rise, then cosines with warm restarts.

    After Loshchilov and Hutter (2017, arXiv 1608.03983), set anew for every step.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    since = step - schedule.warmup_steps
    length = schedule.restart_steps or max(1, total - schedule.warmup_steps)
    turn = (since % length if schedule.restart_steps else since) / length
    floor = base * schedule.lowest
    return floor + (base - floor) * (1 + math.cos(math.pi * turn)) / 2


def make_optimiser(model: nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over what is to be trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": settings.weight_decay}]
    if settings.decay == "matrices":
        groups = [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    first, second = settings.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], settings.lr, (first, second), settings.eps
    )
