from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bitquota.errors import LimitExceeded
from bitquota.service.security.limits import Limits, Resource, exceeded
from bitquota.service.security.sandbox import (
    TMP_FOLDERS,
    View,
    bubblewrap,
    launch,
)
from bitquota.service.security.watch import Watch, descendants
from waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(
    bubblewrap() is None, reason="bubblewrap is missing or user namespaces are forbidden here"
)

LIMITS = Limits(
    memory_bytes=2**28, processes=40, tmp_bytes=2**25, disk_bytes=2**23, files=100,
    file_bytes=2**30,
)  # fmt: skip
IN_PEACE = "import time, sys; print('ready', flush=True); sys.stdin.readline(); print('done')"
# Every attack stops by itself far below what would hurt this machine.
FORKS = """
import os, time
for _ in range(120):
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
time.sleep(600)
"""
THREADS = """
import threading, time
for _ in range(120):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
time.sleep(600)
"""
MANY_SMALL_EATERS = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        kept = bytearray(os.urandom(2**20)) * 60
        time.sleep(600)
time.sleep(600)
"""
FILL = """
import time
with open({path!r}, 'wb') as file:
    try:
        for _ in range(60):
            file.write(bytes(2**20))
            file.flush()
    except OSError:
        pass
    time.sleep(600)
"""
FILL_TMP = FILL.format(path=TMP_FOLDERS[0] + "/x")
FILL_REMOVED = """
import os, time
file = open('kept', 'wb')
os.unlink('kept')
for _ in range(16):
    file.write(os.urandom(2**20))
file.flush()
time.sleep(600)
"""
MAP_REMOVED = """
import mmap, os, time
file = os.open('kept', os.O_RDWR | os.O_CREAT)
os.truncate('kept', 2**24)
kept = mmap.mmap(file, 2**24)
os.unlink('kept')
os.close(file)
kept[:] = bytes(2**24)
time.sleep(600)
"""
MANY_FILES = """
import time
for k in range(400):
    open(f'file-{k}', 'w').close()
time.sleep(600)
"""
HIDDEN_FILES = """
import os, time
os.mkdir('locked')
for k in range(400):
    open(f'locked/file-{k}', 'w').close()
os.chmod('locked', 0)
time.sleep(600)
"""


IDS = ["forks", "threads", "memory", "tmp", "shm", "disk", "removed", "mapped", "files", "locked"]


class Started:
    """A program in a sandbox, under a watch."""

    def __init__(self, folder, program, limits=LIMITS):
        folder.mkdir()
        view = View(work=folder, tmp_bytes=limits.tmp_bytes)
        self.process = launch(
            bubblewrap(), view, ["-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.watch = Watch(self.process.pid, folder, limits)
        self.watch.start()

    def end(self):
        self.watch.stop()
        self.watch.end()
        self.process.communicate()


@pytest.fixture
def start(tmp_path):
    begun = []

    def start(name, program, limits=LIMITS):
        begun.append(Started(tmp_path / name, program, limits))
        return begun[-1]

    yield start
    for each in begun:
        each.end()


class TestWatch:
    @pytest.mark.parametrize(
        ("program", "resource"),
        [
            (FORKS, Resource.PROCESSES),
            (THREADS, Resource.PROCESSES),
            (MANY_SMALL_EATERS, Resource.MEMORY),
            (FILL_TMP, Resource.TMP),
            (FILL.format(path=TMP_FOLDERS[1] + "/x"), Resource.TMP),
            (FILL.format(path="x"), Resource.DISK),
            (FILL_REMOVED, Resource.DISK),
            (MAP_REMOVED, Resource.DISK),
            (MANY_FILES, Resource.FILES),
            (HIDDEN_FILES, Resource.FILES),
        ],
        ids=IDS,
    )
    def test_job_over_a_limit_is_ended_and_others_are_not(self, start, program, resource):
        other = start("other", IN_PEACE)
        assert other.process.stdout.readline() == "ready\n"
        job = start("job", program)
        job.process.communicate(timeout=PATIENCE_S)
        verdict = job.watch.verdict
        assert isinstance(verdict, LimitExceeded), "it ended by itself"
        assert verdict.details["resource"] == resource.value
        assert verdict.details["used"] >= verdict.details["limit"] * 0.98
        assert verdict.details["setting"] in verdict.message
        assert descendants(job.process.pid) == []
        assert other.process.communicate("go\n", timeout=PATIENCE_S)[0] == "done\n"
        assert other.watch.verdict is None

    def test_files_in_memory_are_part_of_the_memory(self, start):
        small = replace(LIMITS, memory_bytes=2**26, tmp_bytes=2**30)
        program = "kept = bytearray(2**25)\n" + FILL_TMP
        job = start("job", program, small)
        job.process.communicate(timeout=PATIENCE_S)
        assert job.watch.verdict.details["resource"] == Resource.MEMORY.value

    def test_pages_that_forks_share_count_once(self, start):
        """A pool of forks shares one model."""
        program = (
            "import os, sys, time\n"
            "kept = bytearray(os.urandom(2**20)) * 60\n"
            "children = [os.fork() for _ in range(1)]\n"
            "while len(children) < 8 and all(children): children.append(os.fork())\n"
            "if not all(children): time.sleep(600)\n"
            "print('ready', flush=True); sys.stdin.readline(); print('done', flush=True)\n"
            "os.kill(1, 9)\n"
        )
        job = start("job", program)
        assert job.process.stdout.readline() == "ready\n"
        assert job.watch.look() is None
        assert job.watch.usage().memory_bytes < LIMITS.memory_bytes
        job.process.stdin.write("go\n")
        job.process.stdin.flush()
        assert job.process.stdout.readline() == "done\n"

    def test_without_a_sandbox_the_tree_of_processes_is_watched(self, tmp_path):
        process = launch(None, View(work=tmp_path), ["-c", FORKS.replace("os.setsid()", "pass")])
        watch = Watch(process.pid, tmp_path, LIMITS, sandboxed=False)
        watch.start()
        try:
            process.wait(timeout=PATIENCE_S)
            assert watch.verdict.details["resource"] == Resource.PROCESSES.value
        finally:
            watch.stop()
            watch.end()
            process.wait()

    def test_verdict_of_a_control_group_is_the_verdict(self, tmp_path):
        found = exceeded(Resource.MEMORY, 1000)
        watch = Watch(os.getpid(), tmp_path, LIMITS, sandboxed=True, verdict=lambda: found)
        assert watch.look() is found


class TestExceeded:
    def test_names_limit_figure_and_setting(self):
        said = exceeded(Resource.PROCESSES, 1024, 1500)
        assert {"resource": "processes", "limit": 1024, "used": 1500,
                "setting": "BITQUOTA_MAX_PROCESSES"} == said.details  # fmt: skip
        assert "1,024" in said.message
        assert "1,500" in said.message


class TestDescendants:
    def test_children_of_children(self):
        inner = "import time; print('ready', flush=True); time.sleep(600)"
        outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
        with subprocess.Popen(
            [os.sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "ready\n"
            found = descendants(process.pid)
            assert len(found) == 1
            assert Path(f"/proc/{found[0]}").exists()
            os.kill(found[0], 9)
            process.wait()
