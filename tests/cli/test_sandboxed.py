"""Commands that open untrusted models run themselves again in a sandbox."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from bitquota.cli import sandboxed as module
from bitquota.cli.app import app, main
from bitquota.cli.sandboxed import OUTSIDE, Outside, sandboxed
from bitquota.errors import InvalidInput
from bitquota.service.security.sandbox import bubblewrap
from live_server import npz
from onnx_graphs import endless_graph, image_graph
from waiting import PATIENCE_S, wait_for

needs_bubblewrap = pytest.mark.skipif(bubblewrap() is None, reason="no bubblewrap works here")

INPUTS = {
    "base", "exported", "from_plan", "imatrix", "ledger", "lock_files", "plan", "plan_file",
    "plans", "table", "tables", "times",
}  # fmt: skip
"""Parameters that name files which are only read (the ledger has a rule of its own)."""


def run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "bitquota", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment},
    )  # fmt: skip


@pytest.fixture
def probe(tmp_path, monkeypatch, capfd):
    """Return a function that runs Python in place of a sandboxed command, beside a secret."""
    image_graph(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_text("weights")
    (tmp_path / "secret.py").write_text("secret")
    monkeypatch.chdir(tmp_path)

    def command(
        model: str, out: Path | None = None, kept: Path | None = None, plan: Path | None = None
    ) -> None:
        pytest.fail(f"ran outside with {model}, {out}, {kept}, {plan}")

    def call(code: str, *, mode: str = "require", **values: object) -> tuple[int, str]:
        entered = "import json, os, sys; os.chdir(json.loads(sys.argv[1])['folder']); "
        monkeypatch.setattr(module, "_ENTER", entered + code)
        token = OUTSIDE.set(Outside(arguments=(), mode=mode))
        try:
            sandboxed(files=("out",), folders=("kept",))(command)(model="m.onnx", **values)
        except typer.Exit as stop:
            return stop.exit_code, capfd.readouterr().out
        finally:
            OUTSIDE.reset(token)
        return -1, ""

    return call


class TestSandboxed:
    def test_every_path_is_an_input_or_an_output(self):
        """A new option of a sandboxed command must be put on one of the two sides."""
        seen = 0
        for command in app.registered_commands:
            sides = inspect.getclosurevars(command.callback).nonlocals
            if "reads" not in sides:
                continue
            seen += 1
            for name, parameter in inspect.signature(
                command.callback, eval_str=True
            ).parameters.items():
                if "Path" in str(parameter.annotation):
                    assert name in {*INPUTS, *sides["files"], *sides["folders"]}, command.name
        assert seen == 10

    def test_a_command_line_leaves_nothing_behind(self, monkeypatch):
        """A second one in the same process would run the arguments of the first."""
        monkeypatch.setattr(sys, "argv", ["bitquota", "targets", "--json"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        assert OUTSIDE.get() is None

    @needs_bubblewrap
    def test_sees_only_what_is_named(self, probe):
        """The model, its weights beside it; nothing else of the folder, and no other home."""
        code, out = probe(
            f"print(sorted(os.listdir('.'))); print(os.path.exists({str(Path.home())!r} + '/.ssh'))"
        )
        assert code == 0
        assert out.splitlines() == ["['m.onnx', 'm.onnx.data']", "False"]

    @needs_bubblewrap
    def test_inputs_cannot_be_written(self, probe, tmp_path):
        """Not the model; and a new file beside it is nowhere."""
        before = (tmp_path / "m.onnx").read_bytes()
        assert probe("open('m.onnx', 'ab').write(b'x')")[0] == 1
        assert probe("os.remove('m.onnx')")[0] == 1
        probe("open('new.txt', 'w').write('x')")
        assert (tmp_path / "m.onnx").read_bytes() == before
        assert not (tmp_path / "new.txt").exists()

    @needs_bubblewrap
    def test_outputs_land_and_nothing_else(self, probe, tmp_path):
        """The named file is moved to its place; a file beside it, or a link, is not."""
        code, _ = probe(
            "open('out.json', 'w').write('made'); open('evil.py', 'w');"
            "os.symlink('x', 'out-2.json')",
            out=Path("out.json"),
        )
        assert code == 0
        assert (tmp_path / "out.json").read_text() == "made"
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "m.onnx", "m.onnx.data", "out.json", "secret.py",
        ]  # fmt: skip

    @needs_bubblewrap
    def test_a_former_file_is_seen_and_replaced(self, probe, tmp_path):
        """So that a command can say what it replaces; left alone, it stays."""
        (tmp_path / "out.json").write_text("former")
        probe("print(open('out.json').read())", out=Path("out.json"))
        assert (tmp_path / "out.json").read_text() == "former"
        _, out = probe(
            "print(open('out.json').read()); open('out.json', 'w').write('new')",
            out=Path("out.json"),
        )
        assert out.strip() == "former"
        assert (tmp_path / "out.json").read_text() == "new"

    @needs_bubblewrap
    def test_a_former_file_in_a_kept_folder_is_replaced(self, probe, tmp_path):
        """The folder of --ledger is written to itself: no former copy comes back over the file."""
        (tmp_path / "out.json").write_text("former")
        probe("open('out.json', 'w').write('new')", out=Path("out.json"), kept=Path())
        assert (tmp_path / "out.json").read_text() == "new"

    @needs_bubblewrap
    def test_new_folders(self, probe, tmp_path):
        """A folder that appears whole, in folders that are not there yet; and one kept open."""
        code, _ = probe(
            "os.makedirs('a/b/export'); open('a/b/export/w.bin', 'w').write('w');"
            "open('run/checkpoint', 'w').write('c')",
            out=Path("a/b/export"), kept=Path("run"),
        )  # fmt: skip
        assert code == 0
        assert (tmp_path / "a/b/export/w.bin").read_text() == "w"
        assert (tmp_path / "run/checkpoint").read_text() == "c"

    @needs_bubblewrap
    def test_what_was_shown_stays(self, probe, tmp_path):
        """Where it is mounted an empty file is left beside what a command writes."""
        belongs = tmp_path / "made.weights.safetensors"
        belongs.write_text("weights")
        (tmp_path / "made.json").write_text("{}")
        code = "os.mkdir('made'); open('made/file', 'w').write('new'); print(os.listdir())"
        code, _ = probe(code, out=Path("made"), plan=tmp_path / "made.json")
        assert 0 == code
        assert "new" == (tmp_path / "made/file").read_text()
        assert "weights" == belongs.read_text()

    @needs_bubblewrap
    def test_no_network(self, probe):
        """Not even this machine's loopback."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            code, _ = probe(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        assert code == 1

    @needs_bubblewrap
    def test_exit_codes_pass(self, probe):
        """Those of the command inside."""
        assert probe("sys.exit(5)")[0] == 5

    def test_without_bubblewrap_it_is_said(self, probe, monkeypatch, tmp_path, capfd):
        """One line where it is wanted, an error where it is required."""
        bubblewrap.cache_clear()
        monkeypatch.setenv("PATH", str(tmp_path))
        try:
            with pytest.raises(InvalidInput, match="a sandbox is required"):
                probe("")
            with pytest.raises(pytest.fail.Exception, match="ran outside"):
                probe("", mode="auto")
            assert "m.onnx is opened without a sandbox" in capfd.readouterr().err
        finally:
            bubblewrap.cache_clear()

    @needs_bubblewrap
    @pytest.mark.parametrize("values", [{"log_to": "mlflow"}, {"metrics": ["mine.top:one"]}])
    def test_what_no_sandbox_has(self, probe, values):
        """A tracker, or code of one's own."""
        with pytest.raises(InvalidInput, match="a sandbox is required, but"):
            probe("", **values)


@needs_bubblewrap
class TestCommandLine:
    def test_equal_outside_and_inside(self, tmp_path):
        """The same bytes on standard output, from a model named by a relative path."""
        image_graph(tmp_path / "m.onnx")
        done = {
            mode: run(tmp_path, "--sandbox", mode, "inspect", "m.onnx", "--json")
            for mode in ("require", "off")
        }
        assert done["require"].returncode == 0, done["require"].stderr
        assert json.loads(done["require"].stdout) == json.loads(done["off"].stdout)
        assert done["require"].stderr == ""

    def test_what_stands_beside_a_plan_lands_and_is_read(self, tmp_path):
        image_graph(tmp_path / "m.onnx")
        x = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "x.npz", x=x)
        made = run(
            tmp_path, "--sandbox", "require", "plan", "m.onnx", "x.npz", "--budget", "6 bits",
            "--effort", "quick", "--rounding", "qep", "--samples", "12", "--holdout", "12",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert (tmp_path / "plan.certificate.npz").is_file()
        assert (tmp_path / "plan.weights.safetensors").is_file()
        told = run(
            tmp_path, "--sandbox", "require", "evaluate", "m.onnx", "x.npz", "--plan", "plan.json",
            "--no-uniform", "--json",
        )  # fmt: skip
        assert told.returncode == 0, told.stderr

    def test_errors_come_out(self, tmp_path):
        """The sentence and its exit code."""
        (tmp_path / "m.pt2").write_bytes(b"PK nothing")
        done = run(tmp_path, "inspect", "m.pt2", BITQUOTA_SANDBOX="require")
        assert done.returncode == 2
        assert done.stderr.startswith("error: a .pt2 model must be the whole archive")

    def test_interrupted(self, tmp_path):
        """Ctrl-C ends the command inside too, and leaves no folder that stood in for another.

        Inside, a model never ends: the command cannot be over before the signal arrives.
        """
        endless_graph(tmp_path / "m.onnx")
        (tmp_path / "samples.npz").write_bytes(npz(16))
        line = ["plan", "m.onnx", "samples.npz", "--budget", "4 bits", "--samples", "8"]
        with subprocess.Popen(
            [sys.executable, "-m", "bitquota", "--sandbox", "require", *line],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            # Tests that were started in the background ignore Ctrl-C, and so would the command.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        ) as process:  # fmt: skip

            def has_begun():
                assert process.poll() is None
                return list(tmp_path.glob("cache/bitquota/sandboxed/*/bitquota/ledger.sqlite"))

            wait_for(has_begun, "the ledger")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert "interrupted" in errors
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "m.onnx", "samples.npz"]

    def test_unknown_mode(self, tmp_path):
        """The three words."""
        image_graph(tmp_path / "m.onnx")
        done = run(tmp_path, "--sandbox", "maybe", "inspect", "m.onnx")
        assert done.returncode == 2
        assert "must be one of auto, require, off" in done.stderr
