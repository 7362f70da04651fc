"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PROJECT = Path(__file__).resolve().parents[1]

# No deadline anywhere: the first example pays for imports and PROJ's start, and machines differ.
# On CI the examples are the same each time, so that a red run is red again when it is repeated.
_no_deadline = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=50, **_no_deadline)
settings.register_profile("ci", max_examples=100, derandomize=True, print_blob=True, **_no_deadline)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's top folder."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery and boundaries, which lie beside the checkout and are no part of it."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data: real imagery beside the checkout")
    return folder
