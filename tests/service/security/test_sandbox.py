from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import bitquota
import escape_attempts
from bitquota.errors import InvalidInput
from bitquota.service.security import seccomp
from bitquota.service.security.limits import memory_limit
from bitquota.service.security.sandbox import (
    TMP_FOLDERS,
    SandboxDirectory,
    View,
    bubblewrap,
    discard_stale_kernels,
    kernel_folders,
    launch,
    sandbox_of,
)
from bitquota.service.settings import Settings
from waiting import wait_for

NOBODY = 65534
SYSTEM_PYTHON = Path("/usr/bin/python3")

needs_bubblewrap = pytest.mark.skipif(
    bubblewrap() is None, reason="bubblewrap is missing or user namespaces are forbidden here"
)


@pytest.fixture
def directory(tmp_path):
    scratch = tmp_path / "data" / "scratch" / "job"
    scratch.mkdir(parents=True)
    made = SandboxDirectory(scratch=scratch)
    made.create()
    return made


def start(directory, arguments, *, sandbox=True, **streams):
    return launch(
        bubblewrap() if sandbox else None,
        directory.view(directory.scratch.parent.parent, 2**24),
        arguments,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams,
    )


def run(directory, program, *, sandbox=True):
    with start(directory, ["-c", "import sys\n" + program], sandbox=sandbox) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, out, err)


def fails_inside(directory, program):
    """Whether ``program`` raises an OSError inside; it must start to run in any case."""
    guarded = "print('started')\ntry:\n"
    guarded += "".join(f"    {line}\n" for line in program.splitlines())
    guarded += "    print('done')\nexcept OSError as error:\n    print(type(error).__name__)\n"
    done = run(directory, guarded)
    assert done.stdout.startswith("started\n"), done.stderr
    return "done" not in done.stdout


@needs_bubblewrap
class TestCommandInside:
    def test_python_and_bitquota_are_there(self, directory):
        done = run(directory, "import numpy, torch, bitquota.search.allocate; print('fine')")
        assert done.stdout == "fine\n", done.stderr

    def test_inbox_can_be_read_and_not_changed(self, directory):
        file = directory.inbox / "model"
        file.write_text("weights")
        assert run(directory, f"print(open({str(file)!r}).read())").stdout == "weights\n"
        assert fails_inside(directory, f"open({str(file)!r}, 'w')")
        assert fails_inside(directory, f"import os; os.chmod({str(file)!r}, 0o777)")
        assert fails_inside(directory, f"import os; os.unlink({str(file)!r})")

    def test_files_that_come_later_are_seen(self, directory):
        """The driver starts its evaluator before it knows the job."""
        waiting = ["-c", f"input(); print(open({str(directory.inbox / 'late')!r}).read())"]
        with start(directory, waiting, stdin=subprocess.PIPE) as process:
            (directory.inbox / "late").write_text("here")
            assert process.communicate("go\n")[0] == "here\n"

    def test_work_folder_can_be_written(self, directory):
        run(directory, f"open({str(directory.work / 'x')!r}, 'w').write('y')")
        assert (directory.work / "x").read_text() == "y"

    @pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/root/.bashrc", "/var/log"])
    def test_files_of_the_machine_are_not_there(self, directory, path):
        assert fails_inside(directory, f"import os; os.stat({path!r})")

    def test_other_jobs_and_the_database_are_not_there(self, directory):
        secret = directory.scratch.parent.parent / "bitquota.db"
        secret.write_text("secret")
        other = directory.scratch.parent / "other"
        other.mkdir()
        assert fails_inside(directory, f"open({str(secret)!r})")
        assert fails_inside(directory, f"import os; os.stat({str(other)!r})")

    def test_data_folder_below_a_shown_folder_is_hidden(self, tmp_path, monkeypatch):
        """For example a virtual environment in the folder that also holds the data."""
        from bitquota.service.security import sandbox

        data_dir = tmp_path / "home" / "data"
        scratch = data_dir / "scratch" / "job"
        scratch.mkdir(parents=True)
        (data_dir / "bitquota.db").write_text("secret")
        directory = SandboxDirectory(scratch=scratch)
        directory.create()
        shown = [*sandbox.python_folders(), tmp_path / "home"]
        monkeypatch.setattr(sandbox, "python_folders", lambda: shown)
        assert fails_inside(directory, f"open({str(data_dir / 'bitquota.db')!r})")
        assert not fails_inside(directory, f"open({str(directory.work / 'x')!r}, 'w')")

    def test_no_network_not_even_loopback(self, directory):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
            assert fails_inside(directory, program)

    def test_no_other_process_can_be_seen(self, directory):
        done = run(directory, "import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
        assert int(done.stdout) <= 3

    def test_environment_does_not_carry_secrets_in(self, directory, monkeypatch):
        monkeypatch.setenv("BITQUOTA_DATABASE_URL", "postgresql://user:secret@host/db")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        done = run(directory, "import os; print(dict(os.environ))")
        assert "secret" not in done.stdout

    def test_ends_with_its_parent(self, directory):
        """Bubblewrap asks for that early in its start, not at once: hence the sign of life."""
        sign = directory.work / "started"
        inside = f"import time; open({str(sign)!r}, 'w'); time.sleep(600)"
        script = (
            "import time, pathlib\n"
            "from bitquota.service.security.sandbox import View, bubblewrap, launch\n"
            f"view = View(work=pathlib.Path({str(directory.work)!r}))\n"
            f"p = launch(bubblewrap(), view, ['-c', {inside!r}])\n"
            "print(p.pid, flush=True); time.sleep(600)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        child = int(parent.stdout.readline())
        wait_for(sign.exists, "the start")
        parent.kill()
        parent.wait()
        parent.stdout.close()
        wait_for(lambda: not running(child), "the end of the child")


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
        from bitquota.service.security import sandbox

        monkeypatch.setattr(sandbox, "bubblewrap", lambda: None)
        with pytest.raises(InvalidInput, match="bubblewrap is missing"):
            sandbox_of(Settings(sandbox="require"))
        assert sandbox_of(Settings(sandbox="auto")) is None


@pytest.fixture
def offered():
    """What the escape attempts aim at: a listener of each kind, and our own process."""
    name = f"bitquota-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        yield {"port": tcp.getsockname()[1], "abstract": name, "pid": os.getpid()}


def namespaces():
    return {n: str(Path(f"/proc/self/ns/{n}").readlink()) for n in escape_attempts.NAMESPACES}


def aims(directory, offered):
    """Put what nobody may touch around a sandbox directory."""
    data_dir = directory.scratch.parent.parent
    (data_dir / "bitquota.db").write_text("secret")
    (data_dir / "scratch" / "other").mkdir()
    (data_dir / "scratch" / "other" / "model").write_text("secret")
    (directory.inbox / "model").write_text("weights")
    return offered | {
        "database": str(data_dir / "bitquota.db"),
        "other_job": str(data_dir / "scratch" / "other" / "model"),
        "outside": str(data_dir / "outside"),
        "input": str(directory.inbox / "model"),
        "namespaces": namespaces(),
        "unix": str(data_dir / "none"),
    }


LAUNCH = """
import os, pathlib, subprocess, sys
from bitquota.service.security.sandbox import SandboxDirectory, bubblewrap, launch
os.environ["BITQUOTA_SECRET"] = "SECRET"
scratch, payload, given = sys.argv[1:]
directory = SandboxDirectory(scratch=pathlib.Path(scratch))
view = directory.view(directory.scratch.parent.parent, 2**24)
with launch(bubblewrap(), view, ["-c", payload, given],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    print(process.communicate()[0].decode())
"""
"""A server in short: its standard error is a log file, its environment holds a secret."""


@needs_bubblewrap
class TestEscape:
    """Code that already runs inside, as if no model had ever been vetted."""

    def attempt(self, python, directory, offered, tmp_path, **options):
        payload = Path(escape_attempts.__file__).read_text()
        given = json.dumps(aims(directory, offered))
        if options:
            for path in [tmp_path, *tmp_path.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)
        source = Path(sandbox_source()).parent
        with (tmp_path / "server.log").open("w+") as log:
            done = subprocess.run(
                [str(python), "-c", LAUNCH, str(directory.scratch), payload, given],
                stdout=subprocess.PIPE, stderr=log, check=False, text=True,
                env={**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"},
                **options,
            )  # fmt: skip
            log.seek(0)
            assert log.read() == "", "somebody wrote to the log"
        assert done.stdout, done.stdout
        return json.loads(done.stdout)

    def assert_harmless(self, results, directory):
        assert len(results) == len(escape_attempts.attempts({"outside": ""}))
        # A folder that is not shown may exist inside, in memory; what counts is what lies here.
        got = {name: r for name, r in results.items() if "refused" not in r}
        assert {} == {name: r for name, r in got.items() if name != "write outside"}
        data_dir = directory.scratch.parent.parent
        assert sorted(p.name for p in data_dir.iterdir()) == ["bitquota.db", "scratch"]
        assert (directory.inbox / "model").read_text() == "weights"

    def test_every_attempt_fails(self, directory, offered, tmp_path):
        results = self.attempt(sys.executable, directory, offered, tmp_path)
        self.assert_harmless(results, directory)

    @pytest.mark.skipif(
        os.geteuid() != 0 or not SYSTEM_PYTHON.exists(), reason="only root can become another user"
    )
    def test_every_attempt_fails_for_a_user_without_rights(self, offered):
        """As a service should run; root's sandbox might hold where a user's does not."""
        folder = Path(f"/var/tmp/bitquota-test-{os.getpid()}")  # noqa: S108  # pytest's are root's alone
        scratch = folder / "data" / "scratch" / "job"
        scratch.mkdir(parents=True)
        try:
            directory = SandboxDirectory(scratch=scratch)
            directory.create()
            results = self.attempt(
                SYSTEM_PYTHON,
                directory,
                offered,
                folder,
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
            )
            self.assert_harmless(results, directory)
        finally:
            shutil.rmtree(folder)

    def test_attempts_succeed_in_a_loose_sandbox(self, directory, offered, tmp_path):
        """So what fails inside fails because of ours: everything is shown, no call is refused.

        Only the folder of the test may be written to, and nothing of the machine can be changed.
        """
        payload = Path(escape_attempts.__file__).read_text()
        given = json.dumps(aims(directory, offered))
        loose = [
            bubblewrap(), "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
            "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--die-with-parent",
            "--new-session", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
            "--bind", str(tmp_path), str(tmp_path), "--",
        ]  # fmt: skip
        done = subprocess.run(
            [*loose, sys.executable, "-c", payload, given],
            env={**os.environ, "BITQUOTA_SECRET": "SECRET"},
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.stdout, done.stderr
        assert (directory.scratch.parent.parent / "outside").read_text() == "forged"
        assert (directory.inbox / "model").read_text() == "weightsforged"
        got = {name for name, result in json.loads(done.stdout).items() if "got" in result}
        assert got >= {
            "read passwd", "read the database", "see the database", "read another job",
            "write outside", "change an input", "secrets in my environment",
            "connect to loopback", "abstract socket", "netlink", "ptrace", "read memory of others",
            "new user namespace", "clone a user namespace", "clone3", "mount", "unmount",
            "change the root", "enter a namespace", "personality", "keyctl",
            "memory in no file system", "system v memory", "shared memory without a file",
            "zero device",
        }  # fmt: skip

    def test_nothing_is_attempted_outside(self):
        assert not escape_attempts.confined({"namespaces": namespaces()})

    def test_closed_even_where_the_starter_leaves_descriptors_open(self, directory, tmp_path):
        with (tmp_path / "open").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            done = run(directory, "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))")
        assert json.loads(done.stdout)[:3] == [0, 1, 2]
        assert len(json.loads(done.stdout)) == 4, "the last one lists the folder"


def sandbox_source():
    import bitquota

    return next(iter(bitquota.__path__))


class TestView:
    @needs_bubblewrap
    def test_files_given_to_read_and_to_write(self, tmp_path):
        """As the command line shows its own files to itself."""
        (tmp_path / "model").write_text("weights")
        (tmp_path / "out").mkdir()
        (tmp_path / "work").mkdir()
        view = View(work=tmp_path / "work", read=(tmp_path / "model",), write=(tmp_path / "out",))
        program = (
            f"from pathlib import Path; t = Path({str(tmp_path)!r})\n"
            "(t / 'out' / 'plan').write_text((t / 'model').read_text())\n"
            "print(sorted(p.name for p in t.iterdir()))\n"
            "(t / 'model').write_text('changed')\n"
        )
        with launch(bubblewrap(), view, ["-c", program], stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL) as process:  # fmt: skip
            assert process.communicate()[0] == b"['model', 'out', 'work']\n"
        assert process.returncode == 1
        assert (tmp_path / "out" / "plan").read_text() == "weights"

    @needs_bubblewrap
    @pytest.mark.parametrize("folder", TMP_FOLDERS)
    def test_memory_file_systems_are_small(self, directory, folder):
        fill = f"open({folder + '/x'!r}, 'wb').write(bytes(2**25))"
        assert "No space left" in run(directory, fill).stderr

    def test_needs_neither_web_framework_nor_database(self):
        program = (
            "import sys, bitquota.service.security.sandbox, bitquota.service.security.watch\n"
            "print({m.split('.')[0] for m in sys.modules} & {'fastapi', 'pydantic', 'sqlalchemy',"
            " 'numpy', 'torch'})"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout == "set()\n"


class TestSeccomp:
    def test_numbers_are_those_of_libseccomp(self):
        try:
            library = ctypes.CDLL("libseccomp.so.2")
        except OSError:
            pytest.skip("libseccomp is not installed")
        resolve = library.seccomp_syscall_resolve_name_arch
        resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
        for name, (x86_64, aarch64) in seccomp.refused_calls().items():
            for number, audit in ((x86_64, 0xC000003E), (aarch64, 0xC00000B7)):
                known = resolve(audit, name.encode())
                # Negative: there is no such call, or the library is older than it.
                assert number == known or known < 0, name

    @pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
    def test_program_fits_the_kernel(self, machine):
        code = seccomp.filter_program(machine)
        assert len(code) % 8 == 0
        assert len(code) // 8 < 4096

    def test_unknown_machine_has_none(self):
        assert seccomp.filter_program("riscv64") is None

    @needs_bubblewrap
    @pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit calls of x86")
    def test_call_of_a_foreign_architecture_kills(self, directory):
        """``int 0x80`` with number 20: getpid of i386, but writev of x86_64."""
        program = (
            "import ctypes, mmap\n"
            "code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)\n"
            "code.write(bytes.fromhex('b814000000cd80c3'))\n"
            "at = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
            "print('ready', flush=True)\n"
            "print(ctypes.CFUNCTYPE(ctypes.c_int)(at)())\n"
        )
        done = run(directory, program)
        assert done.stdout == "ready\n"
        assert done.returncode != 0

    @needs_bubblewrap
    def test_threads_processes_and_libraries_work(self, directory):
        program = (
            "import subprocess, threading, torch, onnxruntime, tempfile\n"
            "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
            "print(subprocess.run(['true']).returncode)\n"
            "torch.set_num_threads(2); x = torch.ones(300, 300); print(int((x @ x)[0, 0]))\n"
        )
        done = run(directory, program)
        assert done.stdout == "thread\n0\n300\n", done.stderr


class TestLimits:
    def test_memory_beyond_the_limit_is_refused(self, directory):
        program = (
            "from bitquota.service.security.sandbox import limit_resources\n"
            "limit_resources(2**28, 2**20)\n"
            "try:\n    x = bytearray(2**30)\nexcept MemoryError:\n    print('refused')\n"
            "try:\n    open('big', 'wb').write(bytes(2**21))\n"
            "except OSError:\n    print('refused')\n"
        )
        done = run(
            directory,
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + program,
            sandbox=False,
        )
        assert done.stdout == "refused\nrefused\n", done.stderr

    def test_slots_share_the_machine(self):
        assert memory_limit(Settings(slots=4)) * 4 == pytest.approx(
            memory_limit(Settings()), rel=0.01
        )


class TestKernelFolders:
    def test_kernels_older_than_their_source_do_not_count(self, tmp_path, monkeypatch):
        """After an upgrade they lie there still, and no evaluator could use them."""
        monkeypatch.setattr(bitquota, "__path__", [str(tmp_path)])
        folder = tmp_path / "solver" / "__pycache__"
        folder.mkdir(parents=True)
        source, kernel = folder.parent / "core.py", folder / "core.solve-1.py311.nbi"
        left_over = folder / "core.removed-9.py311.nbi"
        for at, path in enumerate((left_over, source, kernel)):
            path.write_text("@compiled\ndef solve(n):\n    return n\n")
            os.utime(path, (at, at))
        (folder / "deleted.run-1.py311.nbi").touch()
        assert kernel_folders() == [folder]
        source.write_text(source.read_text() + "\n\n@compiled\ndef bound(n):\n    return n\n")
        os.utime(source, (1, 1))
        assert kernel_folders() == [], "a kernel that no warm-up reached"
        added = folder / "core.bound-6.py311.nbi"
        added.touch()
        os.utime(added, (3, 3))
        assert kernel_folders() == [folder]
        os.utime(source, (9, 9))
        assert kernel_folders() == []
        discard_stale_kernels()
        assert not list(folder.iterdir())
