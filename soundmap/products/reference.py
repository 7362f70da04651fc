"""Reference places that a map is judged by: their shapes, and what is to be heard there.

A reference is a vector file or a table of points. What is to be heard is told in one of three
ways: a class for each place and a table of what is audible in which class, columns of ratings
that are said to stand for concepts, or columns that are named like concepts.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray
from pyproj.exceptions import CRSError

from soundmap.errors import InputError, UsageError
from soundmap.products.audibility import choose_table, read_tables

_TABLES = (".csv", ".tsv", ".txt")
_LON = ("lon", "long", "lng", "longitude")
_LAT = ("lat", "latitude")
_X = ("x", "easting")
_Y = ("y", "northing")
_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0, "": np.nan, "na": np.nan, "nan": np.nan}
_NAMED = 12
"""Names that a message lists at most."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Places, and what the file says about each."""

    name: str
    """As it was given."""
    shapes: NDArray[np.object_]
    """Geometries [N] in ``crs``, 2-D; None where there is none."""
    crs: pyproj.CRS
    table: pd.DataFrame
    """N rows."""


@dataclass(frozen=True)
class Question:
    """What of a reference a map is judged by."""

    label: str | None = None
    """Column that holds the class of each place."""
    audibility: str | None = None
    """Which concept is audible in which class: ``FILE[:SET]``, or the name of a model that has such
    a table. By default the one of the map's own model."""
    values: tuple[str, ...] = ()
    """Columns of ratings: ``COLUMN=CONCEPT``, or ``COLUMN`` if it is named like the concept."""
    audible_from: float | None = None
    """Ratings from this one on count as audible."""


@dataclass(frozen=True)
class Truth:
    """What is to be heard at each place."""

    concepts: tuple[str, ...]
    """Concepts of the map that something is known of."""
    ratings: Floats
    """float64[N, K], NaN where nothing is known."""
    audible: Floats
    """float64[N, K], 1 or 0, NaN where nothing is known or a rating does not tell."""
    graded: tuple[bool, ...]
    """Per concept: whether its ratings are more than yes and no."""
    about: str
    """Where it is from, for people."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Concepts of the map that cannot be judged -> why."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Classes that the table does not have -> features."""


# --- files -----------------------------------------------------------------------------------


def read_reference(spec: str, crs: str | None = None) -> Reference:
    """Read places from a file.

    Parameters
    ----------
    spec
        ``FILE`` or ``FILE:LAYER``: whatever GDAL reads as vectors, or a table (.csv, .tsv, .txt)
        with columns lon and lat, or x and y.
    crs
        CRS of the coordinates where the file does not tell: "EPSG:n" or anything PROJ reads.

    Raises
    ------
    InputError
        The file is missing, unreadable or empty, the layer is unknown or must be chosen, or its
        CRS is not known.
    UsageError
        ``crs`` is no CRS, or contradicts the file.
    """
    path, layer = split_spec(spec)
    given = _crs(crs) if crs is not None else None
    if Path(path).suffix.lower() in _TABLES:
        return _read_points(spec, path, given)
    return _read_vectors(spec, path, layer, given)


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split ``FILE[:PART]`` where the file exists; InputError where it does not."""
    if os.path.exists(spec) or "://" in spec or spec.startswith("/vsi"):
        return spec, None
    path, _, part = spec.rpartition(":")
    if path and part and os.path.exists(path):
        return path, part
    raise InputError(f"{spec}: no such file: check the path")


def _crs(text: str) -> pyproj.CRS:
    try:
        return pyproj.CRS(text)
    except CRSError as error:
        raise UsageError(f"{text!r} is not a CRS: give one such as EPSG:27700") from error


def _read_vectors(spec: str, path: str, layer: str | None, crs: pyproj.CRS | None) -> Reference:
    try:
        layers = [(str(name), kind) for name, kind in pyogrio.list_layers(path)]
        layer = _choose_layer(path, layer, layers)
        frame: Any = pyogrio.read_dataframe(path, layer=layer, force_2d=True, on_invalid="fix")
    except InputError:
        raise
    except Exception as error:  # whatever GDAL, GEOS and pyogrio raise: the file is no good
        reason = " ".join(str(error).split()).split(";")[0].removeprefix(f"{path}: ")
        raise InputError(f"{path}: cannot be read as a vector file: {reason}") from error
    if not len(frame):
        raise InputError(f"{spec}: has no features: there is nothing to judge by")
    if "geometry" not in frame:
        raise InputError(
            f"{spec}: holds a table without geometries: give polygons or points, or a .csv with "
            "columns lon and lat"
        )
    if frame.crs is None and crs is None:
        raise InputError(f"{spec}: does not say its CRS: give it with --crs EPSG:...")
    if frame.crs is not None and crs is not None and pyproj.CRS(frame.crs) != crs:
        raise UsageError(
            f"{spec}: says that its CRS is {pyproj.CRS(frame.crs).name}: leave out --crs, or "
            "correct the file"
        )
    shapes = np.array(frame.geometry.array, dtype=object)
    table = pd.DataFrame(frame.drop(columns=frame.geometry.name))
    return Reference(spec, shapes, pyproj.CRS(frame.crs or crs), table)


def _choose_layer(path: str, wanted: str | None, layers: list[tuple[str, Any]]) -> str:
    names = [name for name, _ in layers]
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{path}: has no layer {wanted!r}; it has {', '.join(names)}")
        return wanted
    drawn = [name for name, kind in layers if kind]
    for found in (names, drawn):
        if len(found) == 1:
            return found[0]
    raise InputError(
        f"{path}: has {len(names)} layers; choose one as {path}:LAYER, from {', '.join(names)}"
    )


def _read_points(spec: str, path: str, crs: pyproj.CRS | None) -> Reference:
    table = read_table(path)
    if not len(table):
        raise InputError(f"{spec}: has no rows: there is nothing to judge by")
    by_name = {str(name).strip().casefold(): name for name in table.columns}
    for names in ((_LON, _LAT), (_X, _Y)):
        found = [next((by_name[n] for n in part if n in by_name), None) for part in names]
        if None not in found:
            break
    else:
        raise InputError(
            f"{spec}: has no columns lon and lat, or x and y; it has {_list(table.columns)}"
        )
    if crs is None and names == (_X, _Y):
        raise InputError(
            f"{spec}: does not say in which CRS {found[0]} and {found[1]} are: give it with --crs "
            "EPSG:..."
        )
    x, y = (_numbers(spec, table[name], str(name)) for name in found)
    crs = crs or pyproj.CRS("EPSG:4326")
    known = np.isfinite(x) & np.isfinite(y)
    if crs.is_geographic:
        wrong = np.flatnonzero(known & ((np.abs(x) > 360) | (np.abs(y) > 90)))
        if len(wrong):
            raise InputError(
                f"{spec}: {found[0]} {x[wrong[0]]:.10g}, {found[1]} {y[wrong[0]]:.10g} in row "
                f"{wrong[0] + 1} are not degrees: correct them, or say their CRS with --crs"
            )
    shapes = np.full(len(table), None, dtype=object)
    shapes[known] = shapely.points(x[known], y[known])
    return Reference(spec, shapes, crs, table)


def read_table(path: str) -> pd.DataFrame:
    """Read a table with commas, semicolons or tabs between; InputError where it is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = file.readline()
        separator = max(",;\t", key=header.count)
        return pd.read_csv(path, sep=separator, encoding="utf-8-sig", low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: is empty") from error
    except (OSError, ValueError) as error:  # pandas' own errors and wrong encodings are ValueErrors
        raise InputError(f"{path}: cannot be read as a table: {error}") from error


# --- what is to be heard ---------------------------------------------------------------------


def truth_of(
    reference: Reference, concepts: Sequence[str], question: Question, model: str
) -> Truth:
    """Tell what is to be heard at each place.

    Parameters
    ----------
    reference
        The places.
    concepts
        Concepts of the map.
    question
        What to judge by.
    model
        Name of the map's model, whose table is taken if none is given.

    Raises
    ------
    UsageError
        A column or concept is not there, or options contradict each other.
    InputError
        A column holds what cannot be read, or the table has none of the classes.
    """
    if question.label is not None:
        if question.values or question.audible_from is not None:
            other = "--value" if question.values else "--audible-from"
            raise UsageError(f"--label and {other} exclude each other: a class is not a rating")
        return _truth_of_labels(reference, concepts, question.label, question.audibility, model)
    if question.audibility is not None:
        raise UsageError("--audibility needs --label: which column holds the class of a place")
    columns = (
        _chosen_columns(reference, concepts, question.values)
        if question.values
        else _named_columns(reference, concepts)
    )
    return _truth_of_ratings(reference, columns, question.audible_from)


def place_names(reference: Reference, column: str) -> NDArray[np.object_]:
    """What a column says, as text; None where it says nothing."""
    series = _column(reference, column)
    if pd.api.types.is_float_dtype(series):
        # Whole numbers with gaps are read as floats: 111.0 is class 111.
        kept = series.dropna()
        if (kept == kept.round()).all():
            series = series.astype("Int64")
    texts = [None if pd.isna(one) else str(one).strip() or None for one in series]
    return np.array(texts, dtype=object)


def _truth_of_labels(
    reference: Reference, concepts: Sequence[str], column: str, audibility: str | None, model: str
) -> Truth:
    labels = place_names(reference, column)
    if not any(labels):
        raise InputError(f"{reference.name}: column {column!r} is empty: no place has a class")
    counts = Counter(label for label in labels if label is not None)
    tables, source = read_tables(audibility, model)
    name, table = choose_table(tables, counts, source, f"{reference.name}, {column}")
    heard = {label: {one.casefold() for one in table[label]} for label in table}
    named = set().union(*heard.values())
    judged = tuple(one for one in concepts if one.casefold() in named)
    if not judged:
        raise InputError(
            f"{source}: names none of the map's concepts ({_list(concepts)}): give another table "
            "with --audibility"
        )
    audible = np.full((len(labels), len(judged)), np.nan)
    for i, label in enumerate(labels):
        if label in heard:
            audible[i] = [one.casefold() in heard[label] for one in judged]
    return Truth(
        concepts=judged,
        ratings=audible,
        audible=audible,
        graded=(False,) * len(judged),
        about=f"classes in {column!r}, heard as {source}{f' ({name})' if name else ''} says",
        skipped={
            one: "no class of the audibility table has it" for one in concepts if one not in judged
        },
        unknown={label: n for label, n in counts.most_common() if label not in heard},
    )


def _chosen_columns(
    reference: Reference, concepts: Sequence[str], values: Iterable[str]
) -> dict[str, str]:
    """Concept -> column, as chosen one by one."""
    chosen: dict[str, str] = {}
    for text in values:
        column, _, concept = (text, "", "") if text in reference.table else text.rpartition("=")
        if not column:
            column, concept = text, ""
        _column(reference, column)
        found = _match(concept or column, concepts)
        if found is None:
            near = _near(concept or column, concepts)
            how = "" if concept else f"; say which as --value '{column}=CONCEPT'"
            raise UsageError(f"the map has no concept {(concept or column)!r}{near}{how}")
        if found in chosen:
            raise UsageError(f"--value: {found!r} has two columns, {chosen[found]} and {column}")
        chosen[found] = column
    return chosen


def _named_columns(reference: Reference, concepts: Sequence[str]) -> dict[str, str]:
    """Concept -> column of its name."""
    found = {}
    for column in map(str, reference.table.columns):
        concept = _match(column, concepts)
        if concept is not None:
            found[concept] = column
    if not found:
        raise UsageError(
            f"{reference.name}: no column is named like a concept of the map: say with --label or "
            f"--value what to judge by; it has {_list(reference.table.columns)}"
        )
    return {concept: found[concept] for concept in concepts if concept in found}


def _truth_of_ratings(
    reference: Reference, columns: dict[str, str], audible_from: float | None
) -> Truth:
    ratings = np.stack(
        [_numbers(reference.name, _column(reference, name), name) for name in columns.values()],
        axis=1,
    )
    if not np.isfinite(ratings).any():
        raise InputError(f"{reference.name}: column {_list(columns.values())} holds no numbers")
    known = np.isfinite(ratings)
    graded = ~((ratings == 0) | (ratings == 1) | ~known).all(axis=0)
    if audible_from is not None:
        graded[:] = True
        audible = np.where(known, ratings >= audible_from, np.nan)
    else:
        audible = np.where(graded, np.nan, ratings)
    about = ", ".join(f"{column!r} as {concept}" for concept, column in columns.items())
    if audible_from is not None:
        about += f"; audible from {audible_from:g} on"
    return Truth(tuple(columns), ratings, audible, tuple(map(bool, graded)), f"columns {about}")


def _column(reference: Reference, name: str) -> pd.Series[Any]:
    columns = [str(one) for one in reference.table.columns]
    if name not in columns:
        near = _near(name, columns) or f"; it has {_list(columns)}"
        raise UsageError(f"{reference.name}: has no column {name!r}{near}")
    return reference.table.iloc[:, columns.index(name)]


def _numbers(file: str, series: pd.Series[Any], column: str) -> Floats:
    """Numbers of a column, NaN where it is empty; yes and no, true and false are 1 and 0."""
    if pd.api.types.is_numeric_dtype(series):
        numbers = series.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
        return np.where(np.isfinite(numbers), numbers, np.nan)
    result = np.full(len(series), np.nan)
    for i, one in enumerate(series):
        if one is None or one is pd.NA or one != one:
            continue
        word = str(one).strip().casefold()
        try:
            result[i] = _WORDS[word] if word in _WORDS else float(word)
        except ValueError:
            raise InputError(
                f"{file}: column {column!r} holds {str(one)!r} in row {i + 1}: not a number"
            ) from None
    return result


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _match(name: str, concepts: Sequence[str]) -> str | None:
    """The concept of that name, in any case and with underscores for spaces."""
    return next((one for one in concepts if _plain(one) == _plain(name)), None)


def _near(name: str, names: Sequence[str]) -> str:
    folded = {one.casefold(): one for one in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(folded[one]) for one in near)}?" if near else ""


def _list(names: Iterable[object]) -> str:
    every = [str(name) for name in names]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more
