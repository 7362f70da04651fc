"""Whether a run that is there may go on, and what it has in common with how it was started."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soundmap.errors import OutputError, PlanMismatch
from soundmap.train.config import Settings
from soundmap.train.data import RunData
from soundmap.train.journal import (
    BAD_FILE,
    BOARD,
    METRICS_FILE,
    RUN_FILE,
    VALIDATION_FILE,
    machine,
    read_run,
)
from soundmap.train.processes import Processes
from soundmap.train.result import MODEL
from soundmap.train.start import Start
from soundmap.train.state import BEST_FILE, CHECKPOINTS, differences, last_checkpoint

# Settings that may differ when a run goes on: they decide where it ends, not what it computes.
_FREE = {
    "": ("name", "summary", "licence", "concepts"),
    "text": ("cache_mb",),
    "training": ("epochs", "steps", "workers", "save_every", "most_bad"),
    "validation": ("patience",),
}


def facts(
    settings: Settings,
    start: Start,
    data: RunData,
    processes: Processes,
    lower: bool,
    total: int,
) -> dict[str, Any]:
    """All that run.json says of a run that begins."""
    table = start.text.table
    return {
        "status": "new",
        "seed": settings.training.seed,
        "settings": asdict(settings),
        "decided": {
            "processes": processes.world,
            "device": processes.device.type,
            "bfloat16": lower,
            # One cosine over the whole run hangs on its length.
            "cosine_steps": settings.schedule.restart_steps or total,
            "started_from": start.card.hash if start.card else None,
            "text_encoder": start.text.name,
            "text_vectors": hashlib.sha256(table.tobytes()).hexdigest()
            if table is not None
            else None,
        },
        "data": dict(data.facts),
        "machine": machine(processes.device),
    }


def find_run(out: Path, now: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Find the run of a folder that is to go on; None to begin one.

    Parameters
    ----------
    out
        Folder of the run.
    now
        What this one would be, from `facts`.
    overwrite
        Whether to forget what is there.

    Raises
    ------
    PlanMismatch
        The run that is there has other settings or data.
    OutputError
        A model is there whose training nobody recorded.
    """
    if overwrite:
        return None
    run = read_run(out)
    if run is None:
        if (out / MODEL).exists():
            raise OutputError(
                f"{out} holds a model and no record of its training: choose another folder, or "
                "add --overwrite"
            )
        return None
    if run["status"] != "finished" and last_checkpoint(out) is None:
        # It had not come far enough for anything to be kept.
        return None
    said = differences(decisive(run), decisive(now))
    if said:
        raise PlanMismatch(
            f"{out} holds a run with other settings or data: {'; '.join(said[:4])}"
            f"{f' and {len(said) - 4} more' if len(said) > 4 else ''}. Give what it was "
            "started with, choose another folder, or begin anew with --overwrite"
        )
    return run


def decisive(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must have in common with how it was started."""
    settings = {
        key: {k: v for k, v in value.items() if k not in _FREE.get(key, ())}
        if isinstance(value, Mapping)
        else value
        for key, value in run["settings"].items()
        if key not in _FREE[""]
    }
    return {**settings, **run.get("decided", {}), "data": run["data"]}


def clear(out: Path) -> None:
    """Forget a run."""
    for name in (CHECKPOINTS, BOARD, MODEL):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (RUN_FILE, METRICS_FILE, VALIDATION_FILE, BAD_FILE, BEST_FILE):
        (out / name).unlink(missing_ok=True)
