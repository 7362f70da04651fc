"""The contract of stores, kept by those that come with soundmap; S3 keeps it in test_s3.py."""

from __future__ import annotations

from pathlib import Path

from soundmap.stores.schema import MapSchema
from soundmap.stores.zarr_store import ZarrStore, create
from soundmap.testing.store_contract import StoreContract


class TestZarr(StoreContract):
    def make_store(
        self, folder: Path, schema: MapSchema, units_shape: tuple[int, int]
    ) -> ZarrStore:
        return create(folder / "map.zarr", schema, units_shape)


class TestZarrScratch(StoreContract):
    def make_store(
        self, folder: Path, schema: MapSchema, units_shape: tuple[int, int]
    ) -> ZarrStore:
        return create(folder / "map.zarr", schema, units_shape, scratch=True)


class TestZarrShards(StoreContract):
    def make_store(
        self, folder: Path, schema: MapSchema, units_shape: tuple[int, int]
    ) -> ZarrStore:
        return create(folder / "map.zarr", schema, units_shape, shards=True)
