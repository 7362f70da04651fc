"""Figures of retrieval as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from soundmap import __version__
from soundmap.products.evaluate_retrieval import RANKS, RetrievalScore
from soundmap.products.figures import missing, without_nan
from soundmap.products.scores import Estimate

_COLUMNS = ("query", "gallery", "add_text", "class", "samples", "figure", "value", "low", "high")


def to_json(score: RetrievalScore) -> str:
    """Write a score as JSON; what there is no number for is null."""
    facts = {**asdict(score), "software": f"soundmap {__version__}"}
    return json.dumps(without_nan(facts), indent=2, ensure_ascii=False)


def to_csv(score: RetrievalScore) -> str:
    """Write a score as CSV, a row a figure."""
    file = io.StringIO()
    writer = csv.DictWriter(
        file, [*_COLUMNS, "chance"], restval="", lineterminator="\n", extrasaction="raise"
    )
    writer.writeheader()
    for row in _rows(score):
        writer.writerow({name: "" if missing(item) else item for name, item in row.items()})
    return file.getvalue()


def _rows(score: RetrievalScore) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for one in score.directions:
        about = {
            "query": one.query,
            "gallery": one.gallery,
            "add_text": one.add_text,
            "samples": one.samples,
        }
        rows.append(about | _figure("recall_tenth", one.recall_tenth, one.chance))
        rows.append(about | _figure("median_rank", one.median_rank, (one.samples + 1) / 2))
        for k in RANKS:
            chance = min(1.0, k / one.samples)
            rows.append(about | _figure(f"recall_{k}", one.recall_at[k], chance))
    by_class = [
        (c.query, c.gallery, c.queries, "average_precision", c.precision) for c in score.classes
    ]
    if score.audible is not None:
        pair = ("image", "audio audible in its class", score.audible.queries)
        by_class += [
            (*pair, "recall_tenth", score.audible.recall),
            (*pair, "recall_tenth_alone", score.audible.recall_alone),
            (*pair, "average_precision", score.audible.precision),
        ]
    for query, gallery, count, name, figure in by_class:
        about = {"query": query, "gallery": gallery, "samples": count}
        rows.append(about | _figure(name, figure.mean, figure.chance))
        for label, held in figure.by_class.items():
            rows.append(about | {"class": label} | _figure(name, held))
    return rows


def _figure(name: str, held: Estimate, chance: float | None = None) -> dict[str, Any]:
    return {
        "figure": name,
        "value": held.value,
        "low": held.low,
        "high": held.high,
        "chance": chance,
    }
