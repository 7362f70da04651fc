"""Maps in an object store: a real S3 server on loopback, with real keys and rights."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

import soundmap
from soundmap.errors import InputError, OutputError, PlanMismatch
from soundmap.stores import place
from soundmap.stores.run_state import run_state
from soundmap.stores.schema import MapSchema
from soundmap.stores.target import check_target
from soundmap.stores.work import Work, begin, complete
from soundmap.stores.zarr_store import Status, ZarrStore, create
from soundmap.testing.fake_map import fake_schema
from soundmap.testing.store_contract import StoreContract

pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
moto_backends = pytest.importorskip("moto.backends")

Command = Callable[..., "subprocess.CompletedProcess[str]"]

BUCKET = "maps"
CONCEPTS = "birdsong,road traffic"
pytestmark = pytest.mark.usefixtures("small_units")

# The raster of 32 x 24 cells becomes 4 x 3 units.
UNIT_CELLS = 8
UNITS = 12
SCHEMA = replace(
    fake_schema(),
    grid=GeoBox((40, 56), Affine(10, 0, 500_000, 0, -10, 5_500_000), "EPSG:32633"),
    chunk_cells=16,
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        # Twice as fast: connections are kept, and its own folder is not searched at each request.
        patch.setattr("werkzeug.serving.WSGIRequestHandler.protocol_version", "HTTP/1.1")
        modules = list(moto_backends.list_of_moto_modules())
        patch.setattr("moto.backends.list_of_moto_modules", lambda: modules)
        running = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        yield f"http://{host}:{port}"
        running.stop()


@pytest.fixture(autouse=True, scope="module")
def environment(server: str) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", server)
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # No other places to look for keys, and no waiting for those that do not answer.
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield patch


@pytest.fixture
def address() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/map.zarr"


@pytest.fixture(scope="module")
def undisturbed(town: Path, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    out = tmp_path_factory.mktemp("local") / "map.zarr"
    soundmap.predict(town, concepts=CONCEPTS, out=out)
    return soundmap.open(out)


def objects(address: str) -> set[str]:
    """Names of all objects below an address, asked from the server by another client."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    # A session of its own: the default one would remember the keys of whoever asked first.
    pages = boto3.session.Session().client("s3").get_paginator("list_objects_v2")
    return {
        found["Key"].removeprefix(prefix + "/")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix + "/")
        for found in page.get("Contents", [])
    }


# Once, with shards: every request takes the server 10 ms, and a chunk is one, as a shard is. How
# numbers are packed is no business of the place, and chunks go there in the runs below.
@pytest.mark.parametrize("schema", ["float32"], indirect=True)
class TestS3(StoreContract):
    def make_store(
        self, folder: Path, schema: MapSchema, units_shape: tuple[int, int]
    ) -> ZarrStore:
        address = f"s3://{BUCKET}/{uuid.uuid4().hex}/map.zarr"
        return create(address, schema, units_shape, shards=True)

    def test_what_was_cut_short_in_the_making_is_made_anew(
        self, schema: MapSchema, address: str
    ) -> None:
        work = Work(schema, (3, 4), shards=True)
        with begin(address, work, overwrite=False) as store:
            store.mark((0, 0), Status.DONE)
        with begin(address, work, overwrite=False) as store:
            assert store.status()[0, 0] == Status.DONE
        # The last file that is written, so that nothing else can be there but the rest.
        place.remove(f"{address}/zarr.json")
        with begin(address, work, overwrite=False) as store:
            assert (store.status() == Status.PENDING).all()

    def test_other_settings_and_finished_maps_are_in_the_way(
        self, schema: MapSchema, address: str
    ) -> None:
        block = np.ones((3, 16, 16), np.float32)
        work = Work(schema, (3, 4))
        other = Work(replace(schema, fingerprint="other"), (3, 4))
        with begin(address, work, overwrite=False) as store:
            store.write(0, 0, block)
            store.mark((0, 0), Status.DONE)
        with pytest.raises(PlanMismatch, match=r"another setting.*--overwrite"):
            begin(address, other, overwrite=False).__enter__()
        with begin(address, work, overwrite=False) as store:
            complete(store, address, overwrite=False)
        for again in (work, other):
            with pytest.raises(OutputError, match="exists already: add --overwrite"):
                begin(address, again, overwrite=False).__enter__()
        # Nothing of the older map may be left among the chunks of the new one.
        assert "probability/1/0/0" in objects(address)
        with begin(address, other, overwrite=True) as store:
            assert (store.status() == Status.PENDING).all()
        assert not [name for name in objects(address) if name.startswith("probability/1/")]

    def test_another_process_opens_it_from_its_address(
        self, schema: MapSchema, address: str, project: Path
    ) -> None:
        store = create(address, schema, (3, 4), shards=True)
        script = (
            "import sys, numpy as np\n"
            "from soundmap.stores.zarr_store import open_store\n"
            "open_store(sys.argv[1], 'r+').write(16, 16, np.ones((3, 16, 16), np.float32))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, address], cwd=project, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert (store.read(slice(16, 32), slice(16, 32)) == 1).all()

    def test_what_was_cut_short_in_the_ending_ends(self, schema: MapSchema, address: str) -> None:
        work = Work(schema, (3, 4), shards=True)
        with begin(address, work, overwrite=False) as store:
            complete(store, address, overwrite=False)
        left = f"{address}/.soundmap/partials/.zarray"
        boto3.client("s3").put_object(Bucket=BUCKET, Key=left[len(f"s3://{BUCKET}/") :], Body=b"{}")
        # It is no finished map yet, and all its units are settled.
        assert check_target(address) == "zarr"
        with begin(address, work, overwrite=False) as store:
            assert (store.status() == Status.DONE).all()
            complete(store, address, overwrite=False)
        assert not [name for name in objects(address) if name.startswith(".soundmap")]
        with pytest.raises(OutputError, match="exists already"):
            check_target(address)


_DRIVER = f"""
import sys
import soundmap.layout
soundmap.layout._MOST_UNIT_CELLS = soundmap.layout._LEAST_UNIT_CELLS = {UNIT_CELLS}
from soundmap.cli import main
from soundmap.cli.progress import ConsoleListener

class Told(ConsoleListener):
    count = 0
    def reported(self, report):
        self.count += 1
        print(self.count, flush=True)

import soundmap.cli.progress
soundmap.cli.progress.ConsoleListener = Told
main()
"""


def test_a_killed_run_goes_on_to_the_same_map(
    town: Path, address: str, project: Path, command: Command, undisturbed: xr.Dataset
) -> None:
    words = ["predict", "--imagery", town, "--concepts", CONCEPTS, "--out", address, "--quiet"]
    with subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *map(str, words)],
        cwd=project,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 3:
                process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                break
    state = run_state(address)
    assert 3 <= state.done < UNITS
    assert (state.units, state.left) == (UNITS, UNITS - state.done)
    with pytest.raises(InputError, match=f"not finished: `soundmap predict {address}`"):
        soundmap.open(address)

    result = command("predict", address)
    assert (result.returncode, result.stdout) == (0, f"Wrote {address}\n")
    assert f"Going on: {state.done} units were done before" in result.stderr
    assert "Unclosed" not in result.stderr
    found = soundmap.open(address)
    np.testing.assert_array_equal(found["probability"], undisturbed["probability"])
    assert found.rio.crs == undisturbed.rio.crs
    assert found["concept"].values.tolist() == undisturbed["concept"].values.tolist()
    assert not [name for name in objects(address) if name.startswith(".soundmap")]
    assert command("status", address).stdout == f"{address}: finished\n"
    told = json.loads(command("info", address, "--json").stdout)
    assert told["concepts"][0]["statistics"]["valid"] == found["probability"][0].size
    # Anybody else's tools read it from its address alone.
    other = xr.open_zarr(address)
    np.testing.assert_array_equal(other["probability"], undisturbed["probability"])


def test_what_is_no_map_is_left_alone(address: str) -> None:
    key = address.removeprefix(f"s3://{BUCKET}/")
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{key}/thesis.txt", Body=b"years of work")
    with pytest.raises(OutputError, match="left alone"):
        check_target(address, overwrite=True)
    assert objects(address) == {"thesis.txt"}


@pytest.fixture
def guarded(server: str, environment: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make the server ask for keys, and give a way to become one of its users."""
    iam = boto3.client("iam")
    keys: dict[str, Any] = {}
    for user, actions in (("writer", ["s3:*"]), ("reader", ["s3:Get*", "s3:List*"])):
        name = f"{user}-{uuid.uuid4().hex}"
        iam.create_user(UserName=name)
        keys[user] = iam.create_access_key(UserName=name)["AccessKey"]
        allowed = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        text = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=text)

    def ask_for_keys(after: float) -> None:
        message = urllib.request.Request(
            f"{server}/moto-api/reset-auth",
            data=str(after).encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(message, timeout=10).close()

    with pytest.MonkeyPatch.context() as patch:

        def become(user: str) -> None:
            if user == "nobody":
                patch.delenv("AWS_ACCESS_KEY_ID")
                patch.delenv("AWS_SECRET_ACCESS_KEY")
                return
            known = keys[user if user in keys else "writer"]
            secret = "x" * 40 if user == "liar" else known["SecretAccessKey"]
            key = "AKIAXXXXXXXXXXXXXXXX" if user == "stranger" else known["AccessKeyId"]
            patch.setenv("AWS_ACCESS_KEY_ID", key)
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)

        ask_for_keys(0)
        try:
            yield become
        finally:
            ask_for_keys(float("inf"))


def test_refusals_come_before_the_work(
    command: Command,
    town: Path,
    address: str,
    guarded: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work began")

    words = ("predict", "--imagery", town, "--concepts", CONCEPTS, "--out")
    with monkeypatch.context() as patch:
        patch.setattr("soundmap.api.prepare", work)
        for user, said in (
            ("nobody", "Unable to locate credentials"),
            ("stranger", "does not exist in our records"),
            ("liar", "signature"),
            ("reader", "Access Denied"),
        ):
            guarded(user)
            result = command(*words, address)
            assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
            assert said in result.stderr
            assert address in result.stderr
        guarded("writer")
        for target, said in (
            ("s3://nobody-has-this/map.zarr", "bucket does not exist"),
            (f"s3://{BUCKET}/map.tif", "GeoTIFF is written to a folder"),
            (f"s3://{BUCKET}", "names no map"),
        ):
            result = command(*words, target)
            assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
            assert said in result.stderr
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        result = command(*words, address)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "Could not connect" in result.stderr
    # In the same process, keys that are right are taken up at once.
    assert check_target(address) == "zarr"
    assert objects(address) == set()


def test_rights_that_are_lost_on_the_way_lose_nothing(
    address: str, guarded: Callable[[str], None]
) -> None:
    work = Work(SCHEMA, (3, 4))
    block = np.ones((2, 16, 16), np.float32)
    guarded("writer")
    with begin(address, work, overwrite=False) as store:
        store.write(0, 0, block)
        store.mark((0, 0), Status.DONE)
        guarded("reader")
        # As in a worker, which opens the store anew.
        for refused in (store, pickle.loads(pickle.dumps(store))):
            refused._arrays.clear()
            with pytest.raises(OutputError, match="Access Denied") as caught:
                refused.write(0, 16, block)
            assert "\n" not in str(caught.value)
            with pytest.raises(OutputError, match="Access Denied"):
                refused.mark((0, 1), Status.DONE)
    guarded("writer")
    with begin(address, work, overwrite=False) as store:
        assert [tuple(index) for index in np.argwhere(store.status() == Status.DONE)] == [(0, 0)]
        np.testing.assert_array_equal(store.read(slice(0, 16), slice(0, 16)), block)
