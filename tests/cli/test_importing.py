"""Measurements from elsewhere: other tools' files solved, ledgers moved, importance matrices."""

from __future__ import annotations

import json
import struct

import numpy as np
import onnx
import pytest
import torch

from bitquota.models.load import load_model
from bitquota.plan import Plan
from onnx_graphs import image_graph, residual_graph
from sensitivity_networks import Residual, build
from trained_digits import trained

FAST = ["--bits", "2,4,8", "--samples", "64", "--holdout", "64", "--no-refine"]
FACTORIES = ["trained_digits:model", "trained_digits:calibration"]
BLOCK = {
    "a.self_attn": [
        {"accuracy": 0.9, "total_bits": 100, "q_proj": {"bits": [3]}},
        {"accuracy": 0.99, "total_bits": 200, "q_proj": {"bits": [4]}},
    ],
    "a.mlp": [
        {"accuracy": 0.5, "total_bits": 100, "up": {"bits": [3]}},
        {"accuracy": 0.98, "total_bits": 200, "up": {"bits": [4]}},
    ],
}
MODELOPT = {
    "candidate_stats": {
        "l1": {"formats": ["INT4", "INT8"], "scores": [5.0, 1.0], "costs": [4.0, 8.0]},
        "l2": {"formats": ["INT4", "INT8"], "scores": [2.0, 1.0], "costs": [4.0, 8.0]},
    }
}
EXLLAMAV3 = {
    "groups": [
        {"layers": ["q", "k"], "candidates": [{"dkld": -0.3, "dbits": 50}]},
        {"layers": ["o"], "candidates": [{"dkld": 0.01, "dbits": -40}]},
    ]
}


@pytest.fixture
def measurement(tmp_path):
    """Return a function that writes another tool's file."""

    def write(data):
        path = tmp_path / "measurement.json"
        path.write_text(json.dumps(data))
        return path

    return write


class TestSolveMeasurements:
    @pytest.mark.parametrize(
        ("data", "budget", "labels"),
        [
            ({"measurement": BLOCK}, "300", ["0: 3", "1: 4"]),
            ({"measurement": BLOCK}, "0.75x", ["0: 3", "1: 4"]),
            ({"measurement": BLOCK}, "1 KiB", ["1: 4", "1: 4"]),
            (MODELOPT, "12", ["INT8", "INT4"]),
            (EXLLAMAV3, "0", ["base", "base"]),
            (EXLLAMAV3, "10", ["alternative 0", "alternative 0"]),
        ],
    )
    def test_best_choice_in_the_tools_own_terms(self, bitquota, measurement, data, budget, labels):
        """Groups, options and costs are those of the tool; the bound is the optimum."""
        code, out, _ = bitquota("solve", measurement(data), "-b", budget, "--json")
        found = json.loads(out)

        assert code == 0
        assert labels == found["labels"]
        assert labels == [option["label"] for option in found["imported"]["options"]]
        assert found["objective"] == pytest.approx(found["imported"]["score"])
        assert found["bound"] == pytest.approx(found["objective"])

    def test_table_and_frontier(self, bitquota, measurement):
        """A person reads the tool's groups, and the whole curve."""
        path = measurement({"measurement": BLOCK})
        code, out, _ = bitquota("solve", path, "-b", "300", "--explain")
        assert code == 0
        assert "a.self_attn" in out
        assert "bits: 300 of 300 spent" in out
        assert "As exllamav2 measured: 300 bits, score 0.12" in out
        code, out, _ = bitquota("frontier", path, "--points", 3)
        assert code == 0
        assert "400" in out

    @pytest.mark.parametrize(
        ("data", "arguments", "code", "text"),
        [
            ({"measurement": BLOCK}, [], 2, "got none: give it with --budget"),
            ({"measurement": BLOCK}, ["-b", "3 bits"], 2, "must be a number (bits), bytes such as"),
            ({"measurement": BLOCK}, ["-b", "150"], 5, "at least 200 bits"),
            (EXLLAMAV3, ["-b", "0.1x"], 0, ""),
            (MODELOPT, ["-b", "12 MiB"], 2, "must be a number (ModelOpt's cost) or a share"),
            (MODELOPT, ["-b", "12", "--budget-index", 0], 2, "no budgets of its own"),
            ({"some": 1}, ["-b", "12"], 2, "it is none of them"),
        ],
    )
    def test_errors(self, bitquota, measurement, data, arguments, code, text):
        """One sentence and the documented exit code."""
        got, _, err = bitquota("solve", measurement(data), *arguments)
        assert code == got
        assert text in err
        assert err.count("\n") <= 1


class TestLedger:
    def test_moves_between_machines(self, bitquota, tmp_path):
        """What was exported and imported elsewhere is not measured again."""
        code, _, _ = bitquota("measure", *FACTORIES, *FAST[:4], "--ledger", "one.sqlite")
        assert code == 0
        assert bitquota("ledger", "export", "all.zip", "--ledger", "one.sqlite")[0] == 0
        code, _, err = bitquota("ledger", "import", "all.zip", "--ledger", "two.sqlite")
        assert code == 0
        assert "new to two.sqlite" in err

        found = [
            json.loads(bitquota("ledger", "show", "--json", "--ledger", name)[1])["entries"]
            for name in ("one.sqlite", "two.sqlite")
        ]
        assert found[0] == found[1] > 0
        bitquota("measure", *FACTORIES, *FAST[:4], "--ledger", "two.sqlite", "-o", "two.npz")
        assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "sensitivity.npz").read_bytes()
        again = json.loads(bitquota("ledger", "show", "--json", "--ledger", "two.sqlite")[1])
        assert again["entries"] == found[1]

    def test_errors(self, bitquota, tmp_path):
        """No ledger yet, and a file that is none."""
        code, _, err = bitquota("ledger", "show")
        assert (code, "measure something first" in err) == (2, True)
        (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
        code, _, err = bitquota("ledger", "import", "bad.zip")
        assert (code, "must be what" in err) == (2, True)


class TestImatrix:
    @pytest.fixture
    def imatrix(self, tmp_path):
        """Return an importance matrix of the digits network's layers, quite uneven."""
        module = trained().model.module
        layers = {n: p for n, p in module.named_parameters() if p.ndim > 1}
        data = struct.pack("<i", len(layers))
        for name, weight in layers.items():
            columns = weight[0].numel()
            sums = np.logspace(-2, 2, columns).astype("<f4").tobytes()
            data += struct.pack("<i", len(name)) + name.encode()
            data += struct.pack("<ii", 1, columns) + sums
        path = tmp_path / "imatrix.dat"
        path.write_bytes(data)
        return path

    def test_decides_the_weights_that_are_measured_and_shipped(self, bitquota, tmp_path, imatrix):
        """The plan names it, its losses differ, and only with it can the plan be used."""
        order = ["plan", *FACTORIES, "-b", "3 bits", "--rounding", "nearest", *FAST]
        remote = ["--imatrix", imatrix, "--server", "http://localhost:1"]
        code, _, err = bitquota(*order, *remote)
        assert (code, "on this machine only" in err) == (2, True)
        assert bitquota(*order, "--imatrix", imatrix)[0] == 0
        plan = Plan.load(tmp_path / "plan.json")
        assert bitquota(*order, "-o", "plain.json")[0] == 0
        plain = Plan.load(tmp_path / "plain.json")

        assert "importance" not in plain.provenance
        assert plan.provenance["importance"].startswith("sha256:")
        losses = [{b.name: b.measured.mean for b in p.baselines} for p in (plan, plain)]
        assert losses[0]["uniform W2"] != losses[1]["uniform W2"]
        again = ["evaluate", *FACTORIES, "--plan", "plan.json"]
        code, _, err = bitquota(*again)
        assert (code, "give that file with --imatrix" in err) == (4, True)
        export = ["export", FACTORIES[0], "plan.json", "-o", "e", "--format", "ref-int"]
        code, _, err = bitquota(*export)
        assert (code, "give that file with --imatrix" in err) == (4, True)
        assert bitquota(*again, "--imatrix", imatrix)[0] == 0
        code, _, err = bitquota(*export, "--imatrix", imatrix)
        assert code == 0, err


class TestOnnx:
    def test_plan_of_a_file_that_torch_never_saw(self, bitquota, tmp_path):
        """An .onnx and an .npz give a refined plan, measured in ONNX Runtime."""
        path = image_graph(tmp_path / "m.onnx")
        x = np.random.default_rng(3).normal(size=(48, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "c.npz", x=x)
        code, out, err = bitquota(
            "plan", path, "c.npz", "-b", "4 bits", "--bits", "2,4,8",
            "--samples", 24, "--holdout", 24, "--correction", "bias_correction",
        )  # fmt: skip

        assert code == 0, err
        plan = Plan.load(tmp_path / "plan.json")
        assert plan.average_bits <= 4
        assert plan.provenance["matrix"]["runner"]["engine"] == "onnxruntime"
        assert plan.provenance["matrix"]["runner"]["bias_correction"]
        assert "stage/depthwise" in out
        with torch.no_grad():
            assert load_model(str(path)).module(torch.from_numpy(x)).shape == (48, 10)

    def test_corrected_files_go_out_as_they_were_measured(self, bitquota, tmp_path):
        """Statistics and shifts are in the exported file, which runs like fake-quantization."""
        residual_graph(tmp_path / "m.onnx", build(Residual))
        x = np.random.default_rng(3).normal(size=(96, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "c.npz", x=x)
        code, _, err = bitquota(
            "plan", "m.onnx", "c.npz", "-b", "4.5 bits", "--bits", "2,4,8", "--no-refine",
            "--samples", 48, "--holdout", 48, "--correction", "bias_correction",
            "--correction", "batch_norm_statistics",
        )  # fmt: skip
        assert code == 0, err
        code, out, err = bitquota(
            "export", "m.onnx", "plan.json", "-o", "e", "--format", "onnx-qdq",
            "--samples", "c.npz", "--json",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["difference"]["relative"] < 1e-4
        before, after = (
            {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
            for path in (tmp_path / "m.onnx", tmp_path / "e" / "model.onnx")
        )
        assert not np.allclose(before["norm.running_mean"], after["norm.running_mean"])
        assert not np.allclose(before["side.bias"], after["side.bias"])

    def test_corrections_that_would_do_nothing(self, bitquota, tmp_path):
        """One sentence instead of silence."""
        image_graph(tmp_path / "m.onnx")
        x = np.zeros((8, 3, 8, 8), dtype=np.float32)
        np.savez(tmp_path / "c.npz", x=x + np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1))
        order = ["plan", "m.onnx", "c.npz", "-b", "4 bits", "--samples", 4, "--holdout", 4]
        code, _, err = bitquota(*order, "--correction", "batch_norm_statistics")
        assert code == 2
        assert "leave the correction out" in err
        code, _, err = bitquota(*order, "--precision", "bf16")
        assert (code, "runs in its own precision" in err) == (2, True)
