"""Tables of what one would hear in which class of places, as JSON or CSV."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soundmap.encoder.card import installed_root, models_root
from soundmap.errors import InputError, UsageError

FILE = "audibility.json"
"""Name of the table in a model's folder."""

Table = Mapping[str, frozenset[str]]
"""Class -> concepts that are audible in it."""

_YES = {"1", "1.0", "true", "yes", "x"}
_NO = {"0", "0.0", "false", "no", ""}


def read_tables(spec: str | None, model: str) -> tuple[dict[str, Table], str]:
    """Read the sets of classes of a table.

    Parameters
    ----------
    spec
        ``FILE`` or ``FILE:SET``, the name of a model that has a table, also ``MODEL:SET``; None for
        ``model``.
    model
        The map's model.

    Returns
    -------
    tuple
        Set -> class -> audible concepts (one set "" where the file has but one), and the
        table's name for people.

    Raises
    ------
    UsageError
        No such table, or it does not have the set.
    InputError
        It cannot be read as one.
    """
    path, wanted = _find(spec, model)
    # A model's folder says whose table it is; the file's name does not.
    name = f"{path.parent.name}/{path.name}" if path.name == FILE else path.name
    if path.suffix.lower() == ".json":
        tables = _read_json(path)
    else:
        tables = {"": _read_csv(path)}
    if wanted is None:
        return tables, name
    if wanted not in tables:
        raise UsageError(f"{path}: has no set {wanted!r}; it has {', '.join(tables)}")
    return {wanted: tables[wanted]}, name


def choose_table(
    tables: Mapping[str, Table], labels: Mapping[str, int], source: str, asked: str
) -> tuple[str, Table]:
    """Choose the set that has the classes of most features.

    Parameters
    ----------
    tables
        Set -> table.
    labels
        Class -> number of features.
    source, asked
        Names of the table and of the column of classes, for messages.

    Raises
    ------
    InputError
        No set has any of the classes, or two have as many.
    """
    counts = {
        name: sum(n for label, n in labels.items() if label in table)
        for name, table in tables.items()
    }
    most = max(counts.values())
    best = [name for name, n in counts.items() if n == most]
    if not most:
        known = [label for table in tables.values() for label in table]
        near = difflib.get_close_matches(str(next(iter(labels))), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise InputError(
            f"{asked}: none of its classes ({_list(labels)}) is in {source}, which has "
            f"{_list(known)}: {hint}give another table with --audibility"
        )
    if len(best) > 1:
        raise InputError(
            f"{asked}: its classes are in several sets of {source}: choose one as "
            f"--audibility FILE:SET, from {', '.join(best)}"
        )
    return best[0], tables[best[0]]


def _find(spec: str | None, model: str) -> tuple[Path, str | None]:
    """File of a table, and the set that is wanted of it."""
    if spec is None:
        found = _of_model(model)
        if found is None:
            raise UsageError(
                f"the map's model, {model}, has no table of what is audible in which class: give "
                "one with --audibility FILE"
            )
        return found, None
    name, _, part = spec.rpartition(":")
    for text, wanted in ((spec, None), (name, part)):
        if text and Path(text).is_file():
            return Path(text), wanted
        if text and Path(text).is_dir() and (Path(text) / FILE).is_file():
            return Path(text) / FILE, wanted
        found = _of_model(text)
        if found is not None:
            return found, wanted
    raise UsageError(f"--audibility: {spec}: there is no such file, and no model with such a table")


def _of_model(name: str) -> Path | None:
    # Not `find_model`, which would convert a checkpoint of that name.
    if not name or Path(name).name != name:
        return None
    files = (root / name / FILE for root in (models_root(), installed_root()))
    return next((file for file in files if file.is_file()), None)


def _read_json(path: Path) -> dict[str, Table]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    held = data.get("classes", data) if isinstance(data, dict) else None
    if isinstance(held, dict) and held:
        single = _table(held)
        if single is not None:
            return {"": single}
        sets = {str(name): _table(part) for name, part in held.items() if isinstance(part, dict)}
        tables = {name: table for name, table in sets.items() if table}
        if tables and len(tables) == len(held):
            return tables
    raise InputError(
        f'{path}: is not a table of what is audible in which class: {{"class": ["concept", ...]}} '
        "is one"
    )


def _table(classes: Mapping[str, Any]) -> Table | None:
    found = {str(name): _concepts(entry) for name, entry in classes.items()}
    known = {name: concepts for name, concepts in found.items() if concepts is not None}
    return known if len(known) == len(found) else None


def _concepts(entry: Any) -> frozenset[str] | None:
    """Concepts in a list, as keys of reasons, or either of them under "audible"."""
    if isinstance(entry, dict) and "audible" in entry:
        return _concepts(entry["audible"])
    if isinstance(entry, list | dict):
        words = list(entry.values()) if isinstance(entry, dict) else entry
        if all(isinstance(word, str) for word in words):
            return frozenset(map(str, entry))
    return None


def _read_csv(path: Path) -> Table:
    """Rows of class and concept, or a row a class with 1 and 0 under the concepts."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table: {error}") from error
    names = {name.strip().casefold(): name for name in header}
    if "class" not in names or len(header) < 2 or not rows:
        raise InputError(
            f"{path}: a table of what is audible needs columns class and concept, or class and a "
            "column of 1 and 0 for each concept"
        )
    of_class = names["class"]
    table: dict[str, set[str]] = {}
    for number, row in enumerate(rows, 1):
        heard = table.setdefault((row[of_class] or "").strip(), set())
        if "concept" in names:
            concept = (row[names["concept"]] or "").strip()
            heard |= {concept} - {""}
            continue
        for name in header:
            word = (row[name] or "").strip().casefold()
            if name == of_class or word in _NO:
                continue
            if word not in _YES:
                raise InputError(f"{path}: {row[name]!r} in row {number}, {name!r} is not 1 or 0")
            heard.add(name.strip())
    return {name: frozenset(concepts) for name, concepts in table.items()}


def _list(names: Any) -> str:
    every = [str(name) for name in names]
    more = f" and {len(every) - 8} more" if len(every) > 8 else ""
    return ", ".join(every[:8]) + more
