"""Every command gives the same on a server as it does here."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from bitquota.cli.app import app
from bitquota.cli.remote import check_files, model_of
from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from live_server import LiveServer

FEW = ["--samples", "32", "--bits", "2,4,8"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with one key."""
    data_dir = tmp_path_factory.mktemp("remote") / "data"
    data_dir.mkdir()
    database = Database(Settings(data_dir=data_dir).url)
    database.create()
    _, key = KeyStore(database, time.time).create("ann")
    database.close()
    with LiveServer(data_dir) as running:
        yield running, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    from onnx_graphs import image_graph

    made = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3, 8, 8)).astype(np.float32)
    np.savez(made / "samples.npz", x=x, y=rng.integers(0, 10, size=64))
    image_graph(made / "net.onnx")
    return made


@pytest.fixture(scope="module")
def both(keyed, folder, tmp_path_factory):
    """Run a command here and there; returns both outputs and both folders of files."""
    server, key = keyed
    ledger = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"

    def run(name, *arguments, takes_ledger=True):
        outputs, places = [], []
        for there in (False, True):
            place = tmp_path_factory.mktemp(f"{name}-{'there' if there else 'here'}")
            line = [name, *(a.replace("OUT", str(place)) for a in arguments)]
            if there:
                line += ["--server", server.url, "--api-key", key]
            elif takes_ledger:
                line += ["--ledger", str(ledger)]
            done = CliRunner().invoke(app, line, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            outputs.append(done.stdout)
            places.append(place)
        return outputs, places

    return run


@pytest.fixture(scope="module")
def planned(both, folder):
    """Outputs and folders of one plan, made here and there."""
    return both(
        "plan", str(folder / "net.onnx"), str(folder / "samples.npz"), "-b", "4 bits", *FEW,
        "--holdout", "32", "--no-refine", "-o", "OUT/plan.json", "--matrix", "OUT/matrix.npz",
        "--json",
    )  # fmt: skip


class TestPlan:
    def test_same_output_plan_and_matrix(self, planned):
        outputs, (here, there) = planned
        assert outputs[0] == outputs[1]
        assert (here / "plan.json").read_bytes() == (there / "plan.json").read_bytes()
        for name in ("matrix.npz", "plan.certificate.npz"):
            assert (here / name).read_bytes() == (there / name).read_bytes()

    def test_without_the_key(self, keyed, folder):
        line = ["plan", str(folder / "net.onnx"), str(folder / "samples.npz"), "-b", "4 bits"]
        done = CliRunner().invoke(app, [*line, "--server", keyed[0].url])
        assert type(done.exception).__name__ == "Unauthorized"

    def test_factory_stays_here(self, keyed, folder):
        line = ["plan", "package.module:function", str(folder / "samples.npz"), "-b", "4 bits"]
        done = CliRunner().invoke(app, [*line, "--server", keyed[0].url, "--api-key", keyed[1]])
        assert "leave --server out" in str(done.exception)


class TestWrongAddress:
    def test_is_said_without_the_patience_of_a_running_job(self, folder):
        """Nobody listens there: the way out is named, long before a client gives up."""
        line = ["plan", str(folder / "net.onnx"), str(folder / "samples.npz"), "-b", "4 bits"]
        done = CliRunner().invoke(app, [*line, "--server", "http://127.0.0.1:9"])
        assert done.exception.exit_code == 3
        assert "start one with 'bitquota serve'" in str(done.exception)


class TestOptions:
    @pytest.mark.parametrize(
        "option", [("--ledger", "l.sqlite"), ("--device", "cpu"), ("--tokenizer", "bytes")]
    )
    def test_what_a_server_would_ignore_is_refused(self, folder, option):
        line = ["measure", str(folder / "net.onnx"), str(folder / "samples.npz"), *option]
        done = CliRunner().invoke(app, [*line, "--server", "http://127.0.0.1:9"])
        assert "this machine only" in str(done.exception)


class TestMeasure:
    def test_same_matrix(self, both, folder):
        outputs, (here, there) = both(
            "measure", str(folder / "net.onnx"), str(folder / "samples.npz"), *FEW,
            "-o", "OUT/m.npz",
        )  # fmt: skip
        assert outputs[0] == outputs[1]
        assert (here / "m.npz").read_bytes() == (there / "m.npz").read_bytes()


class TestSolve:
    def test_same_answer_and_certificate(self, both, planned):
        """The proof of a server's answer has the bytes that it has here."""
        matrix = planned[1][0] / "matrix.npz"
        outputs, (here, there) = both(
            "solve", str(matrix), "-b", "4 bits", "--explain", "--json",
            "--certificate", "OUT/c.npz", takes_ledger=False,
        )  # fmt: skip
        ours, theirs = (json.loads(text) for text in outputs)
        del ours["cpu_seconds"], theirs["cpu_seconds"]
        assert ours == theirs
        assert (here / "c.npz").read_bytes() == (there / "c.npz").read_bytes()


class TestFrontier:
    def test_same_table(self, both, planned):
        matrix = planned[1][0] / "matrix.npz"
        outputs, _ = both("frontier", str(matrix), "--points", "5", takes_ledger=False)
        assert outputs[0] == outputs[1]


class TestEvaluate:
    def test_same_scores(self, both, planned, folder):
        plan = planned[1][0] / "plan.json"
        outputs, _ = both(
            "evaluate", str(folder / "net.onnx"), str(folder / "samples.npz"),
            "--plan", str(plan), "--json", takes_ledger=False,
        )  # fmt: skip
        assert outputs[0] == outputs[1]


class TestExport:
    def test_same_files(self, both, planned, folder):
        plan = planned[1][0] / "plan.json"
        _, (here, there) = both(
            "export", str(folder / "net.onnx"), str(plan), "--format", "onnx-qdq",
            "--samples", str(folder / "samples.npz"), "--out", "OUT/files", takes_ledger=False,
        )  # fmt: skip
        names = sorted(p.name for p in (here / "files").iterdir())
        assert "model.onnx" in names
        assert names == sorted(p.name for p in (there / "files").iterdir())
        for name in names:
            ours, theirs = (here / "files" / name), (there / "files" / name)
            assert ours.read_bytes() == theirs.read_bytes(), name


class TestCompare:
    def test_same_plans(self, both, folder):
        outputs, _ = both(
            "compare", str(folder / "net.onnx"), str(folder / "samples.npz"), "-b", "4 bits",
            *FEW, "--holdout", "32", "--metric", "gram", "--plans", "0", "--json",
        )  # fmt: skip
        here, there = (json.loads(text) for text in outputs)
        for found in (here, there):
            for entry in found["entries"]:
                del entry["cpu_seconds"], entry["passes"]
        assert here == there


class TestModelOf:
    def test_gguf_goes_as_a_folder(self, tmp_path, monkeypatch):
        """A server takes no such file; it is unpacked here."""
        from gguf_files import write_gguf, write_model

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        file = write_gguf(write_model(tmp_path / "folder"), tmp_path / "out", 8)
        check_files(str(file))
        names = {path.name for path in model_of(str(file)).iterdir()}
        assert {"config.json", "model-00001-of-00001.safetensors"} <= names
