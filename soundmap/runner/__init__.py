"""Push units through an executor, few in flight. The only package that imports Dask."""

from __future__ import annotations

from soundmap.runner.cluster import Cluster, check_workers, connect
from soundmap.runner.flow import run_on_cluster
from soundmap.runner.here import run_here
from soundmap.runner.unit import OnReport, UnitReport

__all__ = [
    "Cluster",
    "OnReport",
    "UnitReport",
    "check_workers",
    "connect",
    "run_here",
    "run_on_cluster",
]
