from __future__ import annotations

import contextlib
import json

import anyio
import anyio.lowlevel
import pytest

from bitquota.errors import BitquotaError, InvalidModel, TooLarge, Unavailable
from bitquota.service.security import task_pool
from bitquota.service.security.task_pool import TaskPool
from live_server import npz

MEMORY = 2**30


@pytest.fixture
def pools():
    made = []

    def make(size=1, memory_bytes=MEMORY, time_limit_s=120.0):
        made.append(TaskPool(size, memory_bytes=memory_bytes, time_limit_s=time_limit_s, nice=0))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def order(path, data, kind="dataset"):
    path.write_bytes(data)
    return {"kind": kind, "path": str(path), "max_ratio": 100, "max_bytes": 2**30}


def ask(pool, arguments, tenant="ann"):
    return anyio.run(lambda: pool.run(tenant, "inspect", arguments, what="the upload"))[0]


def lists(n):
    """A plan of ``n`` tiny lists, just below what is counted as too much."""
    return b'{"a":[' + b"[]," * n + b"[]]}"


class TestTaskPool:
    def test_verdict(self, pools, tmp_path):
        assert ask(pools(), order(tmp_path / "x", npz())) == {"format": "npz"}

    def test_error_is_the_one_that_was_raised(self, pools, tmp_path):
        with pytest.raises(InvalidModel, match=r"\.pt2"):
            ask(pools(), order(tmp_path / "x", b"text", "model"))

    def test_memory_has_a_limit_and_the_next_task_is_unharmed(self, pools, tmp_path):
        pool = pools(memory_bytes=160 * 2**20)
        with pytest.raises(TooLarge, match="memory"):
            ask(pool, order(tmp_path / "x", lists(1_990_000), "plan"))
        assert ask(pool, order(tmp_path / "x", npz())) == {"format": "npz"}

    def test_time_has_a_limit_and_the_next_task_is_unharmed(self, pools, tmp_path):
        pool = pools(time_limit_s=0.05)
        with pytest.raises(TooLarge, match=r"within 0\.05 s"):
            ask(pool, order(tmp_path / "x", npz()))
        pool._time_limit_s = 120.0
        assert ask(pool, order(tmp_path / "x", npz())) == {"format": "npz"}

    def test_process_is_used_again(self, pools, tmp_path):
        pool = pools()
        used = set()
        for k in range(3):
            ask(pool, order(tmp_path / str(k), npz()))
            (process,) = pool._idle
            used.add(process.process.pid)
        assert len(used) == 1

    def test_a_lasting_answer_is_kept_and_others_are_not(self, pools, tmp_path, monkeypatch):
        """Until newer ones take its room."""
        pool, sent = pools(), order(tmp_path / "x", npz())

        def lasting(arguments):
            call = {"what": "the upload", "lasting": True}
            return anyio.run(lambda: pool.run("ann", "inspect", arguments, **call))[0]

        assert ask(pool, sent) == lasting(sent) == {"format": "npz"}
        (tmp_path / "x").write_bytes(b"no longer")
        assert lasting(sent) == {"format": "npz"}
        with pytest.raises(BitquotaError):
            ask(pool, sent)
        monkeypatch.setattr(task_pool, "_KEPT_BYTES", 20)
        assert lasting(order(tmp_path / "y", npz())) == {"format": "npz"}
        assert len(pool._kept) == 1
        with pytest.raises(BitquotaError):
            lasting(sent)

    def test_one_tenant_does_not_take_every_process(self, pools, tmp_path):
        """Four slow tasks of one tenant do not come before the one that another asks for later."""
        pool = pools(size=2)
        slow = order(tmp_path / "slow", json.dumps([[1, 2]] * 400_000).encode(), "plan")
        quick = order(tmp_path / "quick", npz())
        ended = []

        async def one(tenant, arguments):
            with contextlib.suppress(BitquotaError):  # no plan; finding that out takes its time
                await pool.run(tenant, "inspect", arguments, what="the upload")
            ended.append(tenant)

        async def all_of_them():
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(one, "ann", slow)
                await anyio.lowlevel.checkpoint()
                group.start_soon(one, "bob", quick)

        anyio.run(all_of_them)
        assert ended.index("bob") < 3
        assert len(ended) == 5

    def test_closed(self, pools, tmp_path):
        pool = pools()
        ask(pool, order(tmp_path / "x", npz()))
        (process,) = pool._idle
        pool.close()
        assert process.process.poll() is not None
        with pytest.raises(Unavailable):
            ask(pool, order(tmp_path / "x", npz()))
