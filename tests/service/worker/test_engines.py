"""The local engine: one fork server for each job, forks that share its memory, helpers that die."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bitquota.canonical import digest_bytes
from bitquota.errors import InvalidInput, ServiceError, UnsafeModel
from bitquota.request import PlanRequest
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.security.limits import Group, group_of, limits_of
from bitquota.service.security.watch import descendants
from bitquota.service.settings import Settings
from bitquota.service.worker.engines import ENGINES, Assignment, InputFile, engine_of
from bitquota.service.worker.engines.local import LocalEngine
from bitquota.service.worker.worker_pool import WorkerPool
from live_server import LiveServer
from seeded_jobs import inventory_of, matrix_of
from waiting import PATIENCE_S, PATIENTLY, wait_for

REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(2, 3, 4, 8), samples=512, holdout_samples=128,
    measure="pairs", refine=False,
)  # fmt: skip
PIDS = Path("/sys/fs/cgroup/pids")


def input_files(*paths, roles=("model", "dataset")):
    return tuple(
        InputFile(
            role=role, name=f"{role}{path.suffix}", path=path,
            digest=digest_bytes([path.read_bytes()]),
        )
        for role, path in zip(roles, paths, strict=True)
    )  # fmt: skip


def helper_order(digits_files, **changes):
    """An evaluator that loads everything and then waits for tasks."""
    head = {
        "kind": "measure", "request": REQUEST.to_json(), "threads": 1, "device": "cpu",
        "memory_bytes": 2**30,
        "helper": True,
    }  # fmt: skip
    return Assignment(**{"head": head, "input_files": input_files(*digits_files)} | changes)


@pytest.fixture
def engine(tmp_path):
    made = LocalEngine(Settings(data_dir=tmp_path / "data", workers=2, slots=2))
    made.open()
    yield made
    made.close()


@pytest.fixture
def unready(tmp_path):
    """An engine whose process loads what its job needs, once it has one."""
    made = LocalEngine(Settings(data_dir=tmp_path / "data", reserve=False))
    yield made
    made.close()


def running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def private_bytes(pid):
    """Memory that this process shares with nobody."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Private_")
    )


def python_processes(engine):
    """The fork server and its forks, in order of their start."""
    first = engine._server.process.pid
    found = []
    for pid in (first, *descendants(first)):
        with contextlib.suppress(OSError):  # it has ended
            if "python" in Path(f"/proc/{pid}/exe").readlink().name:
                found.append(pid)
    return found


class TestLocalEngine:
    def test_workers_are_forks_that_share_torch_and_model(self, engine, digits_files):
        """The server has one thread; a worker that has loaded all has little of its own."""
        inbox = queue.SimpleQueue()
        workers = [engine.start(helper_order(digits_files, needs_sandbox=False), inbox)
                   for _ in range(2)]  # fmt: skip
        asked = {}
        while len(asked) < 2:
            worker, message = inbox.get(timeout=PATIENCE_S)
            assert message is not None, "an evaluator died"
            if message[0]["type"] != "progress":
                asked[worker] = message[0]["type"]
        assert {"idle"} == set(asked.values())
        server, *forks = python_processes(engine)
        assert len(forks) == 2
        for fork in forks:
            stat = Path(f"/proc/{fork}/stat").read_text().rpartition(")")[2].split()
            assert server == int(stat[1])
            assert private_bytes(fork) < 0.4 * private_bytes(server) + 40 * 2**20
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
        maps = Path(f"/proc/{forks[0]}/maps").read_text()
        assert "libtorch" in maps
        workers[0].end()
        wait_for(lambda: inbox.get(timeout=PATIENCE_S) == (workers[0], None), "the end of one")
        engine.close()
        wait_for(lambda: not any(running(fork) for fork in forks), "the end of all")

    def test_matrix_is_solved_without_torch(self, unready, tmp_path):
        matrix = tmp_path / "matrix.npz"
        matrix.write_bytes(matrix_of(inventory_of(4)).to_bytes())
        request = kind_by_name("solve").request(budget="4 bits").model_dump()
        head = {"kind": "solve", "request": request, "threads": 1, "device": "auto"}
        head["memory_bytes"] = 2**30
        files = input_files(matrix, roles=("matrix",))
        inbox = queue.SimpleQueue()
        unready.start(Assignment(head=head, input_files=files, needs_sandbox=False), inbox)
        said = []
        while "end" not in said:
            said.append(inbox.get(timeout=PATIENCE_S)[1][0]["type"])
        assert "result" in said
        server, *_ = python_processes(unready)
        assert "libtorch" not in Path(f"/proc/{server}/maps").read_text()

    def test_stranger_without_a_sandbox_is_refused(self, tmp_path, digits_files):
        made = LocalEngine(Settings(data_dir=tmp_path / "data", sandbox="off"))
        try:
            with pytest.raises(UnsafeModel, match="install bubblewrap"):
                made.start(helper_order(digits_files), queue.SimpleQueue())
        finally:
            made.close()
        assert list((tmp_path / "data" / "scratch").iterdir()) == []

    def test_file_that_is_no_model_is_told_by_the_worker(self, unready, digits_files, tmp_path):
        wrong = tmp_path / "wrong.pt2"
        wrong.write_bytes(b"no zip")
        order = helper_order((wrong, digits_files[1]), needs_sandbox=False)
        inbox = queue.SimpleQueue()
        unready.start(order, inbox)
        said = [inbox.get(timeout=PATIENCE_S)[1] for _ in range(3)]
        assert [head["type"] for head, _ in said] == ["progress", "error", "end"]

    def test_dead_fork_server_is_noticed(self, unready, digits_files):
        inbox = queue.SimpleQueue()
        worker = unready.start(helper_order(digits_files, needs_sandbox=False), inbox)
        # Bubblewrap asks for death with its parent early in its start, not at once.
        assert inbox.get(timeout=PATIENCE_S)[1] is not None
        os.kill(unready._server.process.pid, signal.SIGKILL)
        while (said := inbox.get(timeout=PATIENCE_S))[1] is not None and not isinstance(
            said[1], Exception
        ):
            pass
        assert worker is said[0]


class TestHelpers:
    def test_killed_helper_changes_nothing(self, tmp_path, digits_files, server):
        """Three workers, one of which is killed: the plan of one worker, byte for byte."""
        model, calibration = digits_files
        with server.client() as client:
            alone = client.submit(model=model, calibration=calibration, request=REQUEST)
            expected = alone.wait(**PATIENTLY).plan_text()
        with LiveServer(tmp_path / "data", workers=3, heartbeat_s=0.1) as helped:
            with helped.client() as client:
                job = client.submit(model=model, calibration=calibration, request=REQUEST)
                wait_for(lambda: len(helped.forks()) >= 3, "helpers")
                os.kill(helped.forks()[-1], signal.SIGKILL)
                assert job.wait(**PATIENTLY).plan_text() == expected
                assert job.body["attempts"] == 1
            log = helped.log.read_text()
        assert "helper lost" in log
        assert '"event": "measured"' in log


class Worker:
    """Takes down what it is told."""

    def __init__(self, place):
        self.place, self.told, self.ended = place, [], False

    def send(self, head, parts=()):
        self.told.append(head)

    def end(self):
        self.ended = True

    @property
    def last(self):
        return self.told[-1]["type"] if self.told else None

    def tasks(self):
        return [head["number"] for head in self.told if head["type"] == "task"]


class TestWorkerPool:
    @pytest.fixture
    def helpers(self):
        return []

    @pytest.fixture
    def pool(self, helpers):
        def start():
            helpers.append(Worker(f"node {len(helpers)}"))
            return helpers[-1]

        return WorkerPool(2, start, restarts=1)

    def finish(self, pool, *workers):
        """Let workers do what they have been told until nobody has anything to do."""
        seen = dict.fromkeys(workers, 0)
        while any(len(worker.told) > seen[worker] for worker in workers):
            for worker in workers:
                for head in worker.told[seen[worker] :]:
                    seen[worker] += 1
                    if head["type"] == "task":
                        pool.idle(worker, head["number"])

    def tasks(self, n):
        return [{"measure": "pairs", "chunk": k} for k in range(n)]

    def test_each_task_is_done_once(self, pool, helpers):
        main = Worker("main")
        pool.begin(main, self.tasks(5))
        pool.idle(helpers[0], None)
        self.finish(pool, main, helpers[0])
        assert sorted(main.tasks() + helpers[0].tasks()) == [0, 1, 2, 3, 4]
        assert main.last == "go_on"
        assert {"main", "node 0"} == set(pool.shares)

    def test_main_waits_for_the_last_helper(self, pool, helpers):
        main = Worker("main")
        pool.begin(main, self.tasks(2))
        pool.idle(helpers[0], None)
        pool.idle(main, 0)
        assert main.last == "task"
        assert main.told[-1]["number"] == 0
        pool.idle(helpers[0], 1)
        assert main.last == "go_on"

    def test_task_of_a_lost_helper_goes_to_another(self, pool, helpers):
        main = Worker("main")
        pool.begin(main, self.tasks(2))
        pool.idle(helpers[0], None)
        pool.idle(main, 0)
        pool.lost(helpers[0], "killed")
        assert main.tasks() == [0, 1]
        assert helpers[0].ended
        pool.idle(main, 1)
        assert main.last == "go_on"

    def test_task_that_costs_two_helpers_is_left_to_the_evaluator(self, pool, helpers):
        main = Worker("main")
        pool.begin(main, self.tasks(2))
        pool.idle(helpers[0], None)
        pool.lost(helpers[0], "killed")  # main is busy: a new helper gets the task
        pool.idle(helpers[1], None)
        assert helpers[0].tasks() == helpers[1].tasks() == [1]
        pool.lost(helpers[1], "killed")
        pool.idle(main, 0)
        assert main.last == "go_on"
        assert len(helpers) == 2, "restarts are limited"

    def test_job_whose_helpers_never_come_is_done_alone(self, pool):
        main = Worker("main")
        pool.begin(main, self.tasks(3))
        self.finish(pool, main)
        assert main.tasks() == [0, 1, 2]
        assert main.last == "go_on"

    def test_cancel_lets_the_evaluator_go_on(self, pool, helpers):
        main = Worker("main")
        pool.begin(main, self.tasks(2))
        pool.idle(helpers[0], None)
        pool.idle(main, 0)
        pool.stop()
        assert main.last == "go_on"
        assert helpers[0].last == "cancel"
        pool.begin(main, self.tasks(4))
        assert main.last == "go_on"

    def test_second_list_before_the_first_is_done(self, pool):
        pool.begin(Worker("main"), self.tasks(2))
        with pytest.raises(ServiceError, match="one list of tasks"):
            pool.begin(Worker("main"), self.tasks(2))


class TestEngineOf:
    @pytest.mark.parametrize("name", ENGINES)
    def test_by_name(self, name):
        assert engine_of(Settings(engine=name)).name == name

    def test_unknown(self):
        with pytest.raises(InvalidInput, match="local, ray"):
            engine_of(Settings(engine="dask"))


class TestGroup:
    def test_none_unless_named(self):
        assert group_of(Settings()) is None

    def test_folder_that_is_no_group(self, tmp_path):
        with pytest.raises(InvalidInput, match="BITQUOTA_CGROUP"):
            group_of(Settings(cgroup=str(tmp_path)))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(
        not os.access(PIDS, os.W_OK) or os.geteuid() != 0, reason="needs control groups to write to"
    )
    def test_command_and_its_children_are_inside(self):
        """With the controller that this machine lends; version 1 has files of the same names."""
        import subprocess

        group = Group(PIDS, replace(limits_of(Settings()), processes=8))
        try:
            assert "pids.max" in group.holds
            line = [*group.enter, "sh", "-c", "sh -c 'cat /proc/self/cgroup'"]
            told = subprocess.run(line, capture_output=True, text=True, check=True).stdout
            assert group.path.name in told
            assert group.verdict() is None
            many = "for k in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.5 & done; wait"
            subprocess.run([*group.enter, "sh", "-c", many], check=False, capture_output=True)
            assert group.verdict().details["resource"] == "processes"
        finally:
            group.remove()
        assert not group.path.exists()
