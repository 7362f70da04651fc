"""How well a finished map agrees with what is known of places.

Every concept gets figures of how well its numbers order the places: the area under the ROC curve
(AUC) and average precision where it is known to be audible or not, Spearman's rho where it is
rated. They judge order alone, so they hold for probability, share and similarity alike.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap import __version__
from soundmap.errors import InputError, UsageError
from soundmap.products.figures import missing, without_nan
from soundmap.products.places import PlaceValues, values_at
from soundmap.products.reference import (
    Question,
    Reference,
    Truth,
    place_names,
    read_reference,
    truth_of,
)
from soundmap.products.scores import (
    Estimate,
    area_and_precision,
    estimate,
    rank_correlation,
    resampled,
)
from soundmap.stores.info import MapInfo, describe
from soundmap.stores.opening import open_map

RESAMPLES = 1000
"""Resamples of the places behind an interval."""

FEW = 5
"""Places of a kind, below which a concept's figures have no interval."""

FIGURES = ("auc", "average_precision", "spearman")

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ConceptAgreement:
    """How well the numbers of one concept order the places."""

    concept: str
    group: str
    features: int
    """Features judged."""
    places: int
    """Places that they make: what is resampled."""
    audible: int | None
    """Features where it is audible; None where ratings alone are known."""
    auc: Estimate | None
    average_precision: Estimate | None
    spearman: Estimate | None
    """Of ratings; None where it is known as audible or not."""


@dataclass(frozen=True)
class MapScore:
    """How well a map agrees with a reference."""

    map: str
    model: str
    value: str
    reference: str
    truth: str
    """What was taken for true, for people."""
    features: int
    """Features of the reference."""
    judged: int
    """Those with a value on the map and something known of them."""
    places: int
    """Places that these make."""
    left_out: dict[str, int]
    """Why features were not judged -> how many."""
    notes: tuple[str, ...]
    """What else to know."""
    concepts: tuple[ConceptAgreement, ...]
    skipped: dict[str, str]
    """Concepts that could not be judged -> why."""
    mean: dict[str, Estimate]
    """Figure -> its mean over the concepts that have it."""
    resamples: int
    seed: int


def evaluate_map(
    path: str | Path,
    reference: str,
    question: Question | None = None,
    *,
    place: str | None = None,
    crs: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MapScore:
    """Judge a map by reference polygons or points.

    Parameters
    ----------
    path
        A GeoTIFF or Zarr that soundmap made.
    reference
        ``FILE[:LAYER]`` of polygons or points, in any CRS, or a table with coordinates.
    question
        What of it to judge by; by default the columns that are named like concepts.
    place
        Column that tells which features are of one place (a site, a session) and are resampled
        together. By default points in one cell are.
    crs
        CRS of the coordinates where the file does not tell.
    resamples
        How often to resample the places for the intervals; 0 for none.
    seed
        The same seed gives the same intervals.

    Raises
    ------
    InputError
        The map or the reference cannot be read, they do not overlap, or no concept can be judged.
    UsageError
        A column or concept is not there, or options contradict each other.

    Examples
    --------
    >>> found = evaluate_map("city.tif", "parks.gpkg", Question(label="kind"))  # doctest: +SKIP
    >>> found.mean["auc"].value  # doctest: +SKIP
    0.91
    """
    if resamples < 0:
        raise UsageError(f"resamples must be 0 or more, not {resamples}")
    info = describe(path)
    if info.kind == "Zarr" and not info.finished:
        raise InputError(f"{path}: is not finished: give its `soundmap predict` again first")
    known = read_reference(reference, crs)
    truth = truth_of(known, [one.name for one in info.concepts], question or Question(), info.model)
    sites = place_names(known, place) if place is not None else None

    values = open_map(path)[info.value]
    grid = GeoBox(info.shape, values.rio.transform(), info.crs)
    found = values_at(values, grid, known.shapes, known.crs)
    told: Bools = np.asarray(np.isfinite(truth.ratings).any(axis=1))
    judged: Bools = told & np.isfinite(found.values).all(axis=1)
    if not judged.any():
        raise _nothing_judged(info, grid, known, found, truth, told)

    spots = found.spots if sites is None else _numbered(sites)
    tasks, skipped = _tasks(info, truth, found.values, judged)
    if not tasks:
        concept, why = next(iter(skipped.items()))
        raise InputError(
            f"{reference}: none of {len(skipped)} concepts can be judged at the "
            f"{int(judged.sum())} features on the map: {concept}: {why}"
        )
    figures = _compare(tasks, spots, judged, resamples, seed)
    few = _with_few(tasks, spots)
    return MapScore(
        map=str(path),
        model=info.model,
        value=info.value,
        reference=reference,
        truth=truth.about,
        features=len(known.shapes),
        judged=int(judged.sum()),
        places=len(np.unique(spots[judged])),
        left_out=_left_out(found, truth, told),
        notes=_notes(found, judged, few),
        concepts=_agreements(info, truth, figures, few, spots, judged),
        skipped=skipped,
        mean=_means(list(figures.values())),
        resamples=resamples,
        seed=seed,
    )


def _numbered(names: NDArray[np.object_]) -> NDArray[np.int64]:
    """Number places by name; features without a name are places of their own."""
    numbers: dict[str, int] = {}
    return np.array(
        [
            -1 - i if name is None else numbers.setdefault(name, len(numbers))
            for i, name in enumerate(names)
        ],
        dtype=np.int64,
    )


# --- figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One comparison: the numbers of a concept at some features, and what is known there."""

    concept: str
    ranked: bool
    """Ratings, rather than audible or not."""
    chosen: Bools
    """bool[N], which features."""
    numbers: Floats
    known: Floats
    """float64[n], like ``numbers``."""

    def figures(self, counts: Floats) -> dict[str, Floats]:
        """Figure -> float64[B], where each of the N features counts as in float64[B, N]."""
        if self.ranked:
            return {"spearman": rank_correlation(self.numbers, self.known, counts[:, self.chosen])}
        heard = self.known > 0
        area, average = area_and_precision(self.numbers, heard, counts[:, self.chosen])
        return {"auc": area, "average_precision": average}


Figures = dict[str, dict[str, tuple[float, Floats]]]
"""Concept -> figure -> its value, and float64[B] of the resamples."""


def _tasks(
    info: MapInfo, truth: Truth, values: Floats, judged: Bools
) -> tuple[list[_Task], dict[str, str]]:
    """What can be compared, and the concepts with which nothing can be -> why."""
    tasks: list[_Task] = []
    skipped = dict(truth.skipped)
    column = {one.name: c for c, one in enumerate(info.concepts)}
    for k, name in enumerate(truth.concepts):
        numbers = values[:, column[name]]
        told = {True: truth.ratings[:, k], False: truth.audible[:, k]}
        why = ""
        for ranked in (True, False) if truth.graded[k] else (False,):
            chosen = judged & np.isfinite(told[ranked])
            known = told[ranked][chosen]
            if len(np.unique(known)) > 1:
                tasks.append(_Task(name, ranked, chosen, numbers[chosen], known))
            elif not len(known):
                why = why or "nothing is known of them at the places on the map"
            elif ranked:
                why = "all ratings are the same"
            else:
                why = why or f"audible in {'every' if known.any() else 'no'} place"
        if not any(task.concept == name for task in tasks):
            skipped[name] = why
    return tasks, skipped


def _compare(
    tasks: Sequence[_Task], spots: NDArray[np.int64], judged: Bools, resamples: int, seed: int
) -> Figures:
    found: Figures = {}
    replicates: list[list[dict[str, Floats]]] = [[] for _ in tasks]
    for drawn in resampled(spots[judged], resamples, seed):
        counts = np.zeros((len(drawn), len(judged)))
        counts[:, judged] = drawn
        for task, parts in zip(tasks, replicates, strict=True):
            parts.append(task.figures(counts))
    once = np.ones((1, len(judged)))
    for task, parts in zip(tasks, replicates, strict=True):
        for key, value in task.figures(once).items():
            again = np.concatenate([np.zeros(0), *(part[key] for part in parts)])
            found.setdefault(task.concept, {})[key] = (float(value[0]), again)
    return found


def _with_few(tasks: Sequence[_Task], spots: NDArray[np.int64]) -> dict[tuple[str, str], None]:
    """Concepts and figures that too few places stand behind, in order.

    A resample of one place never shows how another would have scored: its interval would be narrow
    and wrong.
    """
    few: dict[tuple[str, str], None] = {}
    for task in tasks:
        heard = np.zeros(len(task.chosen), dtype=bool)
        heard[task.chosen] = task.known > 0
        kinds = [task.chosen] if task.ranked else [heard, task.chosen & ~heard]
        if min(len(np.unique(spots[kind])) for kind in kinds) < FEW:
            figures = ("spearman",) if task.ranked else ("auc", "average_precision")
            few |= {(task.concept, figure): None for figure in figures}
    return few


def _agreements(
    info: MapInfo,
    truth: Truth,
    found: Figures,
    few: Collection[tuple[str, str]],
    spots: NDArray[np.int64],
    judged: Bools,
) -> tuple[ConceptAgreement, ...]:
    groups = {one.name: one.group for one in info.concepts}
    agreements = []
    for k, name in enumerate(truth.concepts):
        if name not in found:
            continue
        used = judged & np.isfinite(truth.ratings[:, k])
        heard = truth.audible[used, k]
        figures = {
            key: estimate(value, drawn[:0] if (name, key) in few else drawn)
            for key, (value, drawn) in found[name].items()
        }
        agreements.append(
            ConceptAgreement(
                concept=name,
                group=groups[name],
                features=int(used.sum()),
                places=len(np.unique(spots[used])),
                audible=int(heard.sum()) if np.isfinite(heard).all() else None,
                auc=figures.get("auc"),
                average_precision=figures.get("average_precision"),
                spearman=figures.get("spearman"),
            )
        )
    return tuple(agreements)


def _means(figures: Sequence[Mapping[str, tuple[float, Floats]]]) -> dict[str, Estimate]:
    """Mean of each figure over concepts.

    Each resample is judged as a reference of its own would be: over the concepts for which it has
    both kinds of places.
    """
    means = {}
    for key in FIGURES:
        having = [one[key] for one in figures if key in one]
        if having:
            again = np.stack([drawn for _, drawn in having])
            known = np.isfinite(again)
            mean = np.divide(
                np.where(known, again, 0).sum(axis=0),
                known.sum(axis=0),
                out=np.full(again.shape[1], np.nan),
                where=known.any(axis=0),
            )
            means[key] = estimate(float(np.mean([value for value, _ in having])), mean)
    return means


# --- what was not judged ---------------------------------------------------------------------


def _left_out(found: PlaceValues, truth: Truth, told: Bools) -> dict[str, int]:
    """Why features were not judged; each is counted once, by the first reason."""
    unknown = sum(truth.unknown.values())
    classes = ", ".join(list(truth.unknown)[:4]) + (", ..." if len(truth.unknown) > 4 else "")
    placed = ~(found.empty | found.other)
    silent = int((placed & ~told).sum())
    reasons = {
        "without a geometry or coordinates": int(found.empty.sum()),
        "neither polygon nor point": int(found.other.sum()),
        "of which nothing is known": silent,
        "off the map": int((told & found.off_map).sum()),
        "on nodata alone": int((told & found.nodata).sum()),
    }
    if unknown and silent:
        name = f"of which nothing is known (classes the audibility table lacks: {classes})"
        reasons = {name if key.startswith("of which") else key: n for key, n in reasons.items()}
    return {reason: number for reason, number in reasons.items() if number}


def _notes(found: PlaceValues, judged: Bools, few: Collection[tuple[str, str]]) -> tuple[str, ...]:
    notes: list[str] = []
    partly = int((found.partly & judged).sum())
    if partly:
        notes.append(f"{partly:,} lie in part off the map or on nodata, and are judged by the rest")
    names = list(dict.fromkeys(concept for concept, _ in few))
    if names:
        notes.append(
            f"Fewer than {FEW} places of a kind, too few for an interval, and the figure itself "
            f"says little: {', '.join(names)}"
        )
    return tuple(notes)


def _nothing_judged(
    info: MapInfo, grid: GeoBox, known: Reference, found: PlaceValues, truth: Truth, told: Bools
) -> InputError:
    out = _left_out(found, truth, told)
    placed = told & (found.off_map | found.nodata)
    if not placed.any():
        why = "; ".join(f"{number:,} {reason}" for reason, number in out.items())
        return InputError(f"{known.name}: no feature can be judged: {why}")
    if found.nodata[placed].any():
        return InputError(
            f"{known.name}: no place has a value on the map {info.path}: {int(placed.sum()):,} are "
            "off it or on nodata"
        )
    there = _lonlat_text(known.shapes[placed], known.crs)
    frame = np.array([grid.extent.geom], dtype=object)
    here = _lonlat_text(frame, pyproj.CRS(grid.crs.proj) if grid.crs else known.crs)
    return InputError(
        f"{known.name}: no place lies on the map {info.path}: {int(placed.sum()):,} places are "
        f"within {there}, the map within {here} (W S E N): give a reference of the map's area"
    )


def _lonlat_text(shapes: NDArray[np.object_], crs: pyproj.CRS) -> str:
    xy = shapely.get_coordinates(shapes)
    to_lonlat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lonlat = np.column_stack(to_lonlat.transform(xy[:, 0], xy[:, 1]))
    lonlat = lonlat[np.isfinite(lonlat).all(axis=1)]
    if not len(lonlat):
        return "no longitude and latitude"
    return " ".join(f"{v:.4f}" for v in (*lonlat.min(axis=0), *lonlat.max(axis=0)))


# --- files -----------------------------------------------------------------------------------


def to_json(score: MapScore) -> str:
    """Write a score as JSON; what there is no number for is null."""
    facts = {**asdict(score), "software": f"soundmap {__version__}"}
    return json.dumps(without_nan(facts), indent=2, ensure_ascii=False)


def to_csv(score: MapScore) -> str:
    """Write a score as CSV, a row a concept; those that could not be judged say why."""
    file = io.StringIO()
    names = ["concept", "group", "features", "places", "audible"]
    names += [f"{key}{end}" for key in FIGURES for end in ("", "_low", "_high")]
    writer = csv.DictWriter(file, [*names, "skipped"], restval="", lineterminator="\n")
    writer.writeheader()
    for one in score.concepts:
        row: dict[str, Any] = {name: getattr(one, name) for name in names[:5]}
        for key in FIGURES:
            held: Estimate | None = getattr(one, key)
            if held is not None:
                row |= {key: held.value, f"{key}_low": held.low, f"{key}_high": held.high}
        writer.writerow({name: "" if missing(item) else item for name, item in row.items()})
    for concept, why in score.skipped.items():
        writer.writerow({"concept": concept, "skipped": why})
    return file.getvalue()
