"""A disk that is full, read-only or locked: the answer says so, and nothing is half there."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

import httpx
import pytest

from bitquota.errors import InvalidInput, StorageFull
from bitquota.service.store.blobs import BlobStore
from bitquota.service.store.storage_errors import require_writable
from live_server import LiveServer, npz, safetensors
from waiting import PATIENCE_S

MIB = 2**20


def mounted(folder, *options):
    """Mount a small file system; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 24 MiB."""
    mounted(tmp_path / "disk", "size=24m")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def dataset(n):
    return safetensors({"x": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}, bytes(n))


def write_all(incoming, body):
    for k in range(0, len(body), MIB + 7):
        incoming.write(body[k : k + MIB + 7])


def left(data_dir):
    """Return the files on their way in."""
    return list((data_dir / "blobs" / "incoming").iterdir())


class TestFullDisk:
    def test_upload_that_does_not_fit(self, disk):
        """It is refused by what it says of its length, or when the disk is full."""
        with LiveServer(disk / "data", slots=0, min_free_bytes=MIB) as server:
            url = server.url + "/v1/datasets"
            body = dataset(40 * MIB)
            for content in (body, (body[k : k + MIB] for k in range(0, len(body), MIB))):
                answer = httpx.put(url, content=content, timeout=PATIENCE_S)
                assert answer.status_code == 507, answer.text
                assert answer.json()["type"] == "urn:bitquota:problem:storage-full"
                assert not left(disk / "data")
            assert httpx.get(url).json()["data"] == []
            assert httpx.put(url, content=npz()).status_code == 201
            assert httpx.get(server.url + "/readyz").status_code == 200

    def test_ready_and_orders_say_that_it_is_full(self, disk):
        with LiveServer(disk / "data", slots=0, min_free_bytes=0) as server:
            assert httpx.put(server.url + "/v1/datasets", content=npz()).status_code == 201
            with (disk / "filler").open("wb", 0) as filler, contextlib.suppress(OSError):
                while filler.write(bytes(4096)):
                    pass
            ready = httpx.get(server.url + "/readyz")
            assert ready.status_code == 503
            assert "disk is full" in ready.json()["detail"]
            assert ready.json()["details"]["data_dir"] is False
            solve = {"matrix": "sha256:" + "0" * 64, "budgets": ["3 bits"]}
            refused = [
                httpx.put(server.url + "/v1/datasets", content=npz(9)),
                httpx.post(server.url + "/v1/solve", json=solve),
            ]
            assert [answer.status_code for answer in refused] == [507, 507]
            assert len(httpx.get(server.url + "/v1/datasets").json()["data"]) == 1
            (disk / "filler").unlink()
            assert httpx.get(server.url + "/readyz").status_code == 200
            assert httpx.put(server.url + "/v1/datasets", content=npz(9)).status_code == 201
            assert not left(disk / "data")

    def test_limit_on_the_size_of_files(self, tmp_path):
        """A quota ends a write as a full disk does."""
        program = (
            "import resource, sys, pathlib\n"
            "from bitquota.service.store.blobs import BlobStore\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
            "incoming = BlobStore(pathlib.Path(sys.argv[1])).incoming(2**30)\n"
            "try:\n"
            "    for _ in range(3): incoming.write(bytes(2**19 + 1))\n"
            "    incoming.flush()\n"
            "except Exception as error:\n"
            "    print(type(error).__name__)\n"
            "finally:\n"
            "    incoming.discard()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == StorageFull.__name__
        assert list((tmp_path / "incoming").iterdir()) == []

    def test_room_is_checked_beforehand(self, tmp_path):
        store = BlobStore(tmp_path)
        store.check_room(0, 0)
        with pytest.raises(StorageFull, match="full"):
            store.check_room(2**62, 0)
        with pytest.raises(StorageFull):
            store.check_room(0, 2**62)

    def test_part_that_was_written_can_be_gone_on_from(self, disk):
        """What is there of an upload in pieces is a beginning of it, also after a full disk."""
        body = bytes(range(256)) * (120 * MIB // 1024)
        store = BlobStore(disk / "blobs")
        incoming = store.resume("ann", "x", 0, len(body))
        with pytest.raises(StorageFull):
            write_all(incoming, body)
        with contextlib.suppress(StorageFull):
            incoming.flush()
        there = store.received("ann", "x")
        (path,) = (disk / "blobs" / "incoming").iterdir()
        assert 0 < there == path.stat().st_size
        assert path.read_bytes() == body[:there]
        incoming.discard()


class TestReadOnly:
    def test_start_says_so(self, tmp_path):
        mounted(tmp_path / "disk", "ro")
        try:
            with pytest.raises(InvalidInput, match="can write to") as caught:
                require_writable(tmp_path / "disk" / "data")
            assert "Read-only file system" in caught.value.message
        finally:
            subprocess.run(["umount", str(tmp_path / "disk")], check=True)

    def test_answers_say_so(self, tmp_path):
        blobs = tmp_path / "data" / "blobs"
        blobs.parent.mkdir()
        mounted(blobs, "size=24m")
        try:
            with LiveServer(tmp_path / "data", slots=0, min_free_bytes=0) as server:
                assert httpx.put(server.url + "/v1/datasets", content=npz()).status_code == 201
                subprocess.run(["mount", "-o", "remount,ro", str(blobs)], check=True)
                answer = httpx.put(server.url + "/v1/datasets", content=npz(9))
                assert answer.status_code == 503
                assert "read-only" in answer.json()["detail"]
                ready = httpx.get(server.url + "/readyz")
                assert ready.status_code == 503
                assert "data_dir: it is read-only" in ready.json()["detail"]
        finally:
            subprocess.run(["umount", str(blobs)], check=True)


class TestLocked:
    def test_ready_says_so(self, tmp_path):
        with LiveServer(tmp_path / "data", slots=0) as server:
            assert httpx.get(server.url + "/readyz").status_code == 200
            database = tmp_path / "data" / "bitquota.db"
            with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                ready = httpx.get(server.url + "/readyz", timeout=PATIENCE_S)
                assert ready.status_code == 503
                assert "database: it is locked" in ready.json()["detail"]
                assert ready.json()["details"]["database"] is False
            assert httpx.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 200
