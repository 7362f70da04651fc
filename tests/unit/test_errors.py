"""The error tree: as documented, caught as promised, and fit to cross a process boundary."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import tomllib
from pathlib import Path

import pytest

from soundmap import errors
from soundmap.errors import MissingExtra, SoundmapError

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if member.__module__ == errors.__name__
]


def _example(cls: type[SoundmapError]) -> SoundmapError:
    if cls is MissingExtra:
        return MissingExtra("model2vec", "train", "distilling token vectors")
    return cls("cannot read a.tif: it is empty; give another file")


def test_the_docstring_draws_the_tree_that_is_there() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__))
    assert drawn == {cls.__name__ for cls in CLASSES} - {"SoundmapError"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_caught_by_the_base(cls: type[SoundmapError]) -> None:
    assert issubclass(cls, SoundmapError)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("UsageError", ValueError),
        ("InputError", ValueError),
        ("SourceError", OSError),
        ("OutputError", OSError),
        ("MissingExtra", ImportError),
    ],
)
def test_the_matching_builtin_catches_it_too(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


def test_kinds_of_error_are_told_apart() -> None:
    """No class but the base catches another: each stands for a different thing to do."""
    for one in CLASSES:
        for other in CLASSES:
            assert one is other or one is SoundmapError or not issubclass(other, one)


def test_a_missing_extra_says_how_to_get_it() -> None:
    message = str(_example(MissingExtra))
    assert "model2vec" in message
    assert "soundmap[train]" in message
    assert message.startswith("distilling token vectors")
    assert "\n" not in message


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_come_back_whole_from_another_process(cls: type[SoundmapError]) -> None:
    error = _example(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)


def test_every_extra_that_an_error_names_exists(project: Path) -> None:
    with (project / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    named = {
        node.args[1].value: path.relative_to(project)
        for path in sorted((project / "soundmap").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "MissingExtra"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }
    assert set(named) <= extras, f"named in MissingExtra, but not in pyproject.toml: {named}"
