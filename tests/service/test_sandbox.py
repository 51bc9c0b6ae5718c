from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitquota.errors import InvalidInput
from bitquota.service.sandbox import Cell, bubblewrap, command, memory_limit, sandbox_of
from bitquota.service.settings import Settings

needs_bubblewrap = pytest.mark.skipif(
    bubblewrap() is None, reason="bubblewrap is missing or user namespaces are forbidden here"
)


@pytest.fixture
def cell(tmp_path):
    scratch = tmp_path / "data" / "scratch" / "job"
    scratch.mkdir(parents=True)
    made = Cell(scratch=scratch)
    made.create()
    return made


def run(cell, program, *, sandbox=True):
    line, environment = command(
        bubblewrap() if sandbox else None,
        cell,
        cell.scratch.parent.parent,
        ["-c", "import sys\n" + program],
    )
    return subprocess.run(
        line, env=environment, cwd=cell.work, capture_output=True, text=True, check=False
    )


def fails_inside(cell, program):
    """Whether ``program`` raises an OSError inside; it must start to run in any case."""
    guarded = "print('started')\ntry:\n"
    guarded += "".join(f"    {line}\n" for line in program.splitlines())
    guarded += "    print('done')\nexcept OSError as error:\n    print(type(error).__name__)\n"
    done = run(cell, guarded)
    assert done.stdout.startswith("started\n"), done.stderr
    return "done" not in done.stdout


@needs_bubblewrap
class TestCommandInside:
    def test_python_and_bitquota_are_there(self, cell):
        done = run(cell, "import numpy, torch, bitquota.allocate; print('fine')")
        assert done.stdout == "fine\n", done.stderr

    def test_inbox_can_be_read_and_not_changed(self, cell):
        file = cell.inbox / "model"
        file.write_text("weights")
        assert run(cell, f"print(open({str(file)!r}).read())").stdout == "weights\n"
        assert fails_inside(cell, f"open({str(file)!r}, 'w')")
        assert fails_inside(cell, f"import os; os.chmod({str(file)!r}, 0o777)")
        assert fails_inside(cell, f"import os; os.unlink({str(file)!r})")

    def test_files_that_come_later_are_seen(self, cell):
        """The driver starts its evaluator before it knows the job."""
        line, environment = command(
            bubblewrap(),
            cell,
            cell.scratch.parent.parent,
            ["-c", f"input(); print(open({str(cell.inbox / 'late')!r}).read())"],
        )
        with subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            (cell.inbox / "late").write_text("here")
            assert process.communicate("go\n")[0] == "here\n"

    def test_work_folder_can_be_written(self, cell):
        run(cell, f"open({str(cell.work / 'x')!r}, 'w').write('y')")
        assert (cell.work / "x").read_text() == "y"

    @pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/root/.bashrc", "/var/log"])
    def test_files_of_the_machine_are_not_there(self, cell, path):
        assert fails_inside(cell, f"import os; os.stat({path!r})")

    def test_other_jobs_and_the_database_are_not_there(self, cell):
        secret = cell.scratch.parent.parent / "bitquota.db"
        secret.write_text("secret")
        other = cell.scratch.parent / "other"
        other.mkdir()
        assert fails_inside(cell, f"open({str(secret)!r})")
        assert fails_inside(cell, f"import os; os.stat({str(other)!r})")

    def test_data_folder_below_a_shown_folder_is_hidden(self, tmp_path, monkeypatch):
        """For example a virtual environment in the folder that also holds the data."""
        from bitquota.service import sandbox

        data_dir = tmp_path / "home" / "data"
        scratch = data_dir / "scratch" / "job"
        scratch.mkdir(parents=True)
        (data_dir / "bitquota.db").write_text("secret")
        cell = Cell(scratch=scratch)
        cell.create()
        shown = [*sandbox.python_folders(), tmp_path / "home"]
        monkeypatch.setattr(sandbox, "python_folders", lambda: shown)
        assert fails_inside(cell, f"open({str(data_dir / 'bitquota.db')!r})")
        assert not fails_inside(cell, f"open({str(cell.work / 'x')!r}, 'w')")

    def test_no_network_not_even_loopback(self, cell):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
            assert fails_inside(cell, program)

    def test_no_other_process_can_be_seen(self, cell):
        done = run(cell, "import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
        assert int(done.stdout) <= 3

    def test_environment_does_not_carry_secrets_in(self, cell, monkeypatch):
        monkeypatch.setenv("BITQUOTA_DATABASE_URL", "postgresql://user:secret@host/db")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        done = run(cell, "import os; print(dict(os.environ))")
        assert "secret" not in done.stdout

    def test_ends_with_its_parent(self, cell):
        """Bubblewrap asks for that early in its start, not at once: hence the sign of life."""
        sign = cell.work / "started"
        inside = f"import time; open({str(sign)!r}, 'w'); time.sleep(600)"
        line, environment = command(bubblewrap(), cell, cell.scratch.parent.parent, ["-c", inside])
        script = (
            "import subprocess, time\n"
            f"p = subprocess.Popen({line!r}, env={environment!r})\n"
            "print(p.pid, flush=True); time.sleep(600)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        child = int(parent.stdout.readline())
        wait_for(sign.exists)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        wait_for(lambda: not running(child))


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


class TestSandboxOf:
    def test_unknown_mode(self):
        with pytest.raises(InvalidInput, match="auto, require, off"):
            sandbox_of(Settings(sandbox="maybe"))

    def test_off(self):
        assert sandbox_of(Settings(sandbox="off")) is None

    def test_required_and_missing(self, monkeypatch):
        from bitquota.service import sandbox

        monkeypatch.setattr(sandbox, "bubblewrap", lambda: None)
        with pytest.raises(InvalidInput, match="bubblewrap is missing"):
            sandbox_of(Settings(sandbox="require"))
        assert sandbox_of(Settings(sandbox="auto")) is None


class TestLimits:
    def test_memory_beyond_the_limit_is_refused(self, cell):
        program = (
            "from bitquota.service.sandbox import limit_resources\n"
            "limit_resources(2**28, 2**20)\n"
            "try:\n    x = bytearray(2**30)\nexcept MemoryError:\n    print('refused')\n"
            "try:\n    open('big', 'wb').write(bytes(2**21))\n"
            "except OSError:\n    print('refused')\n"
        )
        done = run(
            cell,
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + program,
            sandbox=False,
        )
        assert done.stdout == "refused\nrefused\n", done.stderr

    def test_slots_share_the_machine(self):
        assert memory_limit(Settings(slots=4)) * 4 == pytest.approx(
            memory_limit(Settings()), rel=0.01
        )
