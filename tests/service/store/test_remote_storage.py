"""Files in an S3 bucket (moto's server on loopback) and in a folder behind fsspec."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import threading
import time

import pytest

from bitquota.errors import InvalidInput, MissingDependency, NotFound, ServiceError
from bitquota.service.settings import Settings
from bitquota.service.store.blobs import BlobStore, blob_store
from bitquota.service.store.database import Database
from bitquota.service.store.remote_storage import FsspecStorage
from bitquota.service.worker.maintenance import collect, verify

MISSING = [n for n in ("fsspec", "s3fs", "moto", "flask") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
HOUR = 3600.0


@pytest.fixture(scope="module")
def s3():
    """An S3 on loopback in a process of its own."""
    code = (
        "import sys, logging; logging.disable()\n"
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start()\n"
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    port = process.stdout.readline().strip()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path, monkeypatch):
    """A place for files that no test used before."""
    if request.param == "file":
        return f"file://{tmp_path / 'elsewhere'}"
    endpoint = request.getfixturevalue("s3")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    bucket = "bq-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/files"


def two_hosts(url, tmp_path):
    """Stores of two hosts that share nothing but the storage."""
    return [BlobStore(tmp_path / name, FsspecStorage(url)) for name in ("one", "two")]


class TestFsspecStorage:
    def test_what_one_host_keeps_another_reads(self, url, tmp_path):
        one, two = two_hosts(url, tmp_path)
        digest = one.put(b"weights")
        path = two.path(digest)
        assert path.read_bytes() == b"weights"
        assert path.is_relative_to(tmp_path / "two")
        assert two.path(digest) == path

    def test_several_parts_arrive_whole(self, url, tmp_path):
        one, two = two_hosts(url, tmp_path)
        data = bytes(range(256)) * (20 * 2**12)  # 20 MiB, three parts
        digest = one.put(data)
        assert data == two.read(digest)

    def test_altered_file_is_refused(self, url, tmp_path):
        """A copy is compared with its digest before anybody sees it."""
        one, two = two_hosts(url, tmp_path)
        digest = one.put(b"weights")
        wrong = tmp_path / "wrong"
        wrong.write_bytes(b"WEIGHTS!")
        one.storage.put(digest.removeprefix("sha256:"), wrong, now=time.time())
        with pytest.raises(ServiceError, match="returned others"):
            two.path(digest)
        assert not two.place(digest).exists()
        assert list((tmp_path / "two" / "incoming").iterdir()) == []

    def test_missing_file(self, url, tmp_path):
        one, _ = two_hosts(url, tmp_path)
        with pytest.raises(NotFound, match="upload it again"):
            one.path("sha256:" + "0" * 64)

    def test_removed_file(self, url, tmp_path):
        one, two = two_hosts(url, tmp_path)
        digest = one.put(b"weights")
        (entry,) = one.storage.entries()
        assert (digest, 7) == (f"sha256:{entry.name}", entry.size)
        assert abs(entry.modified - time.time()) < HOUR
        one.storage.remove(entry.name)
        one.storage.remove(entry.name)
        assert list(one.storage.entries()) == []
        with pytest.raises(NotFound):
            two.path(digest)

    def test_many_at_once(self, url, tmp_path):
        one, two = two_hosts(url, tmp_path)
        digests = {}

        def keep(k):
            digests[k] = one.put(b"%d" % k)

        threads = [threading.Thread(target=keep, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [b"%d" % k for k in range(8)] == [two.read(digests[k]) for k in range(8)]

    def test_nobody_there(self, tmp_path, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        store = BlobStore(tmp_path, FsspecStorage("s3://bucket/files"))
        with pytest.raises(ServiceError, match="must be written to"):
            store.put(b"weights")
        assert list((tmp_path / "incoming").iterdir()) == []

    def test_unknown_address(self):
        with pytest.raises((InvalidInput, MissingDependency), match="BITQUOTA_BLOB_URL|fsspec"):
            FsspecStorage("nonsense://x")

    def test_address_is_shown_without_secrets(self, tmp_path):
        assert "secret" not in FsspecStorage(f"file://user:secret@{tmp_path}").place

    def test_memory_stays_small(self, url, tmp_path):
        """An upload of 96 MB, in a process of its own, whose peak is compared with one of 1 MB."""
        code = (
            "import sys, resource, pathlib\n"
            "from bitquota.service.store.blobs import BlobStore\n"
            "from bitquota.service.store.remote_storage import FsspecStorage\n"
            "store = BlobStore(pathlib.Path(sys.argv[1]), FsspecStorage(sys.argv[2]))\n"
            "store.put(b'x' * 2**20)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "incoming = store.incoming(2**30)\n"
            "for _ in range(96): incoming.write(bytes(2**20))\n"
            "digest = store.keep(incoming)\n"
            "store.place(digest).unlink()\n"
            "store.path(digest)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "one"), url],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 64 * 1024


class TestCollect:
    def test_old_files_that_nothing_names_go(self, url, tmp_path):
        settings = Settings(data_dir=tmp_path / "data", blob_url=url)
        settings.data_dir.mkdir()
        database = Database(settings.url)
        database.create()
        store = blob_store(settings)
        store.put(b"forgotten")
        assert collect(settings, database, time.time()).files == 0
        assert list(store.storage.entries())
        gone = collect(settings, database, time.time() + 2 * HOUR)
        assert gone.files
        assert list(store.storage.entries()) == []
        assert verify(settings, database) == []
        database.close()


class TestTrim:
    def test_copies_beyond_the_limit_go_and_come_back(self, url, tmp_path):
        one, _ = two_hosts(url, tmp_path)
        digests = [one.put(bytes([k]) * 100) for k in range(3)]
        assert one.trim(150, time.time()) == 0, "in use within the hour"
        assert one.trim(150, time.time() + 2 * HOUR) == 200
        assert sum(one.place(d).exists() for d in digests) == 1
        assert [bytes([k]) * 100 for k in range(3)] == [one.read(d) for d in digests]

    def test_folder_that_is_the_storage_is_never_trimmed(self, tmp_path):
        store = BlobStore(tmp_path)
        digest = store.put(b"only copy")
        assert store.trim(0, time.time() + 2 * HOUR) == 0
        assert store.read(digest) == b"only copy"
