"""Profiles: costs from times, and the files that are timed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitquota.candidates.budget import Budget
from bitquota.candidates.targets import target_by_name
from bitquota.errors import InvalidInput
from bitquota.exports import profile_files
from bitquota.exports.energy import energy_table
from bitquota.exports.export import export_plan
from bitquota.exports.profile import profile
from bitquota.exports.profile_files import designed_choices, write_files
from bitquota.exports.profile_fit import Times, fitted_table
from bitquota.exports.profile_order import SCRIPT, TIMES, Order
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from format_networks import plan_with
from refusals import refused

LABELS = ("W4", "W8", "W32")
COSTS = {0: (50_000, 20_000, 0), 1: (0, 30_000, 5_000)}
CONSTANT = 1_000_000
KINDS = (0, 0, 0, 1, 1)


class TwoLayers(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.b(torch.relu(self.a(x)))


SAMPLES = CalibrationSet(inputs=(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)),))


@pytest.fixture(scope="module")
def model():
    """Two layers, ready."""
    return finish(TwoLayers(), source="two", architecture="TwoLayers")


def order_of(seed: int = 0) -> Order:
    """An order of files for five layers of two kinds."""
    choices = designed_choices([(k,) for k in KINDS], [3] * 5, seed)
    return Order(
        runtime="onnxruntime", options={}, threads=1, batch=1, length=0, model_digest="sha256:0",
        target="ort-cpu", layers=tuple("abcde"), kinds=KINDS,
        files=tuple(f"{k:03}/model.onnx" for k in range(len(choices))),
        labels=tuple(tuple(LABELS[c] for c in choice) for choice in choices), checked=8,
    )  # fmt: skip


def times_of(order: Order, *, noise: float, rounds: int = 12, **changes: object) -> Times:
    """Times of a machine whose speed wanders by half, with noise of each run."""
    rng = np.random.default_rng(0)
    found, step = [], 0
    for _ in range(rounds):
        for k in rng.permutation(len(order.files)):
            label_costs = zip(order.kinds, order.labels[k], strict=True)
            true = CONSTANT + sum(COSTS[kind][LABELS.index(la)] for kind, la in label_costs)
            slow = 1 + 0.25 * (1 + np.sin(step / 40))
            found.append((int(k), round(true * slow * float(np.exp(noise * rng.normal())))))
            step += 1
    given = {
        "device": "a board", "runtime": {"name": "onnxruntime", "version": "1"}, "threads": 1,
        "clock": "processor", "digest": order.digest, "times": tuple(found),
    }  # fmt: skip
    return Times(**(given | changes))


class TestFit:
    def test_finds_the_costs(self):
        """A machine whose speed wanders by half hides nothing; the cheapest of a kind costs 0."""
        order = order_of()
        table = fitted_table(order, times_of(order, noise=0.003))
        found = {(c.layer, c.candidate): c.cost for c in table.layers}
        for name, kind in zip("abcde", KINDS, strict=True):
            for label, cost in zip(LABELS, COSTS[kind], strict=True):
                assert found[name, label] == pytest.approx(cost, abs=6000)
        assert table.constant == pytest.approx(CONSTANT, rel=0.03)
        assert 8 == len(table.checked)
        gaps = [abs(c.predicted / c.measured - 1) for c in table.checked]
        assert max(gaps) < 0.02

    def test_noise_alone_becomes_small(self):
        """Where widths take the same time, costs are far below the noise of a run."""
        order = order_of()
        same = times_of(order, noise=0.05)
        rng = np.random.default_rng(1)
        flat = tuple(
            (k, round(CONSTANT * float(np.exp(0.05 * rng.normal())))) for k, _ in same.times
        )
        table = fitted_table(order, replace(same, times=flat))
        assert max(c.cost for c in table.layers) < 0.02 * CONSTANT

    def test_refuses_other_times(self):
        """Of other files, with other threads, or not of all files."""
        order = order_of()
        times = times_of(order, noise=0.0, rounds=1)
        with refused(InvalidInput, threads=2):
            fitted_table(order, replace(times, threads=2))
        with refused(InvalidInput):
            fitted_table(order_of(seed=1), times)
        with refused(InvalidInput):
            fitted_table(order, replace(times, times=times.times[1:]))
        with refused(InvalidInput):
            fitted_table(order, replace(times, times=((0, 0), *times.times)))


@pytest.mark.slow
class TestProfile:
    def test_a_table_that_prices_a_plan_whose_export_is_timed(self, model, tmp_path):
        """From the runtime to the receipt: profile, budget, export, prediction beside time."""
        target = target_by_name("ort-cpu")
        table = profile(model, target, SAMPLES, weight_bits=(4, 32), rounds=4)
        assert model.digest == table.model_digest
        assert {"a", "b"} == {c.layer for c in table.layers}
        assert {"W4", "W32"} == {c.candidate for c in table.layers}
        plan = plan_with(model, SAMPLES.inputs, target="ort-cpu", seed=0, bits=(4, 32))
        budget = Budget.parse("1 s", plan.inventory, [table])
        plan = replace(plan, budgets=(budget,))
        report = export_plan(model, plan, tmp_path / "out", target="ort-cpu", samples=SAMPLES)
        assert report.timed is not None
        assert plan.spent(budget) == report.timed.predicted_ns
        assert 10**9 == report.timed.limit_ns
        assert 0 < report.timed.clocked_ns
        assert report.timed.measured_ns == pytest.approx(
            report.timed.clocked_ns * report.timed.speed, rel=1e-6, abs=1
        )
        assert report.timed.speed != 1.0  # the table has costs of full precision
        assert table.digest() == report.timed.table
        assert report == type(report).load(tmp_path / "out")

    def test_files_hold_codes_and_grids_of_inputs(self, model, tmp_path):
        """A target with quantized inputs: what each plan says is in its file."""
        target = target_by_name("ort-cpu-integer")
        found = write_files(model, target, SAMPLES, tmp_path, weight_bits=(4, 32))
        for file, labels in zip(found.files, found.labels, strict=True):
            graph = onnx.load(tmp_path / file).graph
            stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
            assert labels.count("W4A8") == len(stored)
            assert 2 == [node.op_type for node in graph.node].count("QuantizeLinear")

    def test_timed_on_another_machine(self, model, tmp_path):
        """The script needs nothing of ours, and what it writes becomes a table."""
        order = write_files(model, target_by_name("openvino-cpu"), SAMPLES, tmp_path, batch=2)
        assert order == Order.load(tmp_path)
        alone = [sys.executable, "-I", "-c", (
            "import sys, runpy; sys.modules['bitquota'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        ), str(tmp_path / SCRIPT), str(tmp_path), "2"]  # fmt: skip
        subprocess.run(alone, check=True, capture_output=True)
        times = Times.load(tmp_path / TIMES)
        assert 2 * (len(order.files) + 3 * order.checked) == len(times.times)
        table = fitted_table(order, times)
        assert (2, "openvino") == (table.batch, table.runtime["name"])


class TestEnergy:
    def test_counts_operations_and_bits(self, model):
        """By hand: 45 nm, weights from memory, activations in floating point."""
        table = energy_table(model, target_by_name("ort-cpu"), SAMPLES)
        found = {(c.layer, c.candidate): c.cost for c in table.layers}
        work = 64 * 32 * 4.6 + 64 * 32 * 100 / 64
        assert found["a", "W32"] == pytest.approx(work + 64 * 32 * 32 * 1300 / 64, abs=1)
        # Blocks of 32 columns have a scale in fp32.
        assert found["a", "W4"] == pytest.approx(work + (64 * 32 * 4 + 64 * 32) * 1300 / 64, abs=1)
        assert round(42 * 32 * 1300 / 64) == table.constant

    def test_integers_where_activations_are(self, model):
        """A target that quantizes inputs multiplies integers."""
        table = energy_table(model, target_by_name("mcu"), SAMPLES)
        cost = next(c for c in table.layers if c.layer == "a" and c.candidate.startswith("W4"))
        assert "W4A8" == cost.candidate
        work = 64 * 32 * (0.2 * 4 * 8 / 64 + 0.1) + 64 * 8 * 100 / 64
        stored = (cost.cost - work) / (1300 / 64)
        assert stored == pytest.approx(round(stored), abs=0.03)

    def test_files_that_would_fill_a_disk(self, model, tmp_path, monkeypatch):
        """Refused before one is written."""
        monkeypatch.setattr(profile_files, "LARGEST_BYTES", 10_000)
        with refused(InvalidInput, bytes=ANY):
            write_files(model, target_by_name("ort-cpu"), SAMPLES, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_target_without_a_runtime(self, model, tmp_path):
        """Nothing can be timed; the error names targets that can."""
        with refused(InvalidInput, target="mcu"):
            write_files(model, target_by_name("mcu"), SAMPLES, tmp_path)
