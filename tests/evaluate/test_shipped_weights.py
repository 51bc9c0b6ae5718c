"""A plan whose weights are rounded with feedback is measured, checked and exported as one file."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bitquota.cli import main
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import InvalidPlan, StalePlan
from bitquota.evaluate.scoring import score_plans
from bitquota.exports.export import export_plan, open_export
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import finish
from bitquota.models.samples import load_calibration
from bitquota.plan import WEIGHTS_SUFFIX, Plan, weights_near
from bitquota.quantizers.planned import quantized_module
from bitquota.quantizers.quantized_model import QuantizedModel, shipped_weights
from bitquota.report.text import rounding_sentences
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.jobs.messages import Piece
from bitquota.service.jobs.work import Loaded, Work
from bitquota.training.qat import finetune_plan
from bitquota.training.settings import TrainingSettings
from format_networks import write_llama
from onnx_graphs import numbers, save

pytestmark = pytest.mark.slow  # whole chains
CPU = Context(device="cpu")
KINDS = {
    "gptq": {"rounding": "gptq"},
    "qep": {"rounding": "qep"},
    "all together": {
        "rounding": "qep",
        "activation_bits": 8,
        # Rotations are for language models.
        "corrections": tuple(c for c in Correction if c is not Correction.ROTATION),
    },
    "smoothing": {"corrections": (Correction.SMOOTHING,)},
    "statistics": {"rounding": "qep", "corrections": (Correction.BATCH_NORM_STATISTICS,)},
} | {
    target: {"rounding": "qep", "target": target}
    for target in ("ref-int", "ort-cpu", "openvino-cpu", "mcu", "coreml")
}


@pytest.fixture(scope="module")
def files(tiny_pt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=rng.integers(0, 10, 60))
    return tiny_pt2, folder / "data.npz"


@pytest.fixture(scope="module")
def loaded(files):
    return load_model(str(files[0])), load_calibration(str(files[1]))


def request_of(kind):
    return PlanRequest(
        budgets=("6 bits",), samples=24, holdout_samples=16, correction_samples=40,
        refine=False, **KINDS[kind],
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """Each kind of plan, planned once: the folder that holds it with its weights."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("plan")
            found = allocate(*loaded, request_of(kind), context=CPU)
            found.plans[0].save(folders[kind] / "plan.json")
            (folders[kind] / f"plan{WEIGHTS_SUFFIX}").write_bytes(found.weights[0])
        folder = folders[kind]
        plan = Plan.load(folder / "plan.json")
        return plan, replace(loaded[0], weights=weights_near([folder / "plan.json"])), folder

    return make


def bitquota(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bitquota", "--sandbox", "off", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return json.loads(printed.out)


def kl_of(model, module, data):
    with torch.no_grad():
        q = module(*data.inputs).double().log_softmax(-1)
        p = model.module(*data.inputs).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
class TestOneNumber:
    def test_on_the_holdout_without_correction_data(self, kind, loaded, made):
        plan, model, _ = made(kind)
        setup = build_setup(*loaded, request_of(kind), context=CPU)
        (found,) = score_plans(model, setup.holdout, plans={"p": plan}, with_uniform=False)[1:]
        expected = pytest.approx(plan.measured.mean, rel=1e-4, abs=1e-9)
        assert found.metrics["kl"].mean == expected

    def test_through_the_commands_and_a_job(self, kind, files, made, monkeypatch, capsys, tmp_path):
        plan, model, folder = made(kind)
        data = load_calibration(str(files[1]))
        expected = kl_of(model, quantized_module(model, plan, example=data), data)
        printed = bitquota(
            monkeypatch, capsys, "evaluate", files[0], files[1], "--plan", folder / "plan.json",
            "--no-uniform", "--device", "cpu", "--json",
        )  # fmt: skip
        (mine,) = [score for score in printed if score["kind"] == "plan"]
        assert mine["metrics"]["kl"]["mean"] == pytest.approx(expected, rel=1e-5)

        sent = []
        request = kind_by_name("evaluate").request(uniform=False).model_dump()
        work = Work(
            request=request,
            inputs={
                "model": [str(files[0])],
                "dataset": [str(files[1])],
                "plans": [str(folder / "plan.json")],
                "quantized": [str(folder / f"plan{WEIGHTS_SUFFIX}")],
            },
            loaded=Loaded(),
            ledger=MemoryLedger(),
            send=sent.append,
            cancelled=lambda: False,
            device="cpu",
            scratch=tmp_path,
        )
        kind_by_name("evaluate").run(work)
        scores = json.loads(b"".join(m.data for m in sent if isinstance(m, Piece)))["scores"]
        (theirs,) = [score for score in scores if score["kind"] == "plan"]
        assert theirs["metrics"] == mine["metrics"]

    def test_export_holds_the_codes(self, kind, loaded, made, tmp_path):
        plan, model, _ = made(kind)
        target = KINDS[kind].get("target")
        if target in {"mcu", "coreml"}:
            target = None  # their exporters write configurations for other tools
        how = {"target": target} if target else {"format_name": "ref-int"}
        report = export_plan(model, plan, tmp_path / "out", samples=loaded[1], **how)
        assert report.difference.relative < 1e-3
        run, _, _ = open_export(model, tmp_path / "out", correction_data=loaded[1])
        shipped = replace(shipped_weights(plan, model), activations={})
        folded = quantized_module(model, plan, example=loaded[1])
        assert set(shipped.weights) == {t.layer for t in report.tensors}
        if not plan.assignments[0].candidate.activation_bits:
            with torch.no_grad():
                gap = run(*loaded[1].inputs) - folded(*loaded[1].inputs)
            assert float(gap.abs().max()) < 1e-3


class TestFile:
    def test_reads_back_as_it_was(self, made, tmp_path):
        plan, _, folder = made("all together")
        path = folder / f"plan{WEIGHTS_SUFFIX}"
        found = QuantizedModel.load(path)
        assert found.to_bytes() == path.read_bytes()
        assert plan.weights.n_bytes == path.stat().st_size
        assert found.activations
        assert found.tensors
        assert Plan.from_json(plan.to_json()) == plan

    def test_plan_without_its_file_is_refused(self, made, loaded):
        plan, _, _ = made("qep")
        with pytest.raises(StalePlan) as refused:
            quantized_module(loaded[0], plan)
        assert refused.value.details["wanted"] == plan.weights.digest

    def test_other_weights_are_refused(self, made):
        plan, _, _ = made("qep")
        _, other, _ = made("gptq")
        with pytest.raises(StalePlan):
            quantized_module(other, plan)

    def test_damaged_content_is_refused(self, made, tmp_path):
        path = tmp_path / f"x{WEIGHTS_SUFFIX}"
        path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        with pytest.raises(InvalidPlan) as refused:
            QuantizedModel.load(path)
        assert refused.value.details["path"] == str(path)

    def test_equal_plans_have_equal_files(self, loaded, made):
        _, _, folder = made("qep")
        again = allocate(*loaded, request_of("qep"), context=CPU)
        assert again.weights[0] == (folder / f"plan{WEIGHTS_SUFFIX}").read_bytes()


class TestLanguageModel:
    @pytest.mark.parametrize(
        ("target", "corrections"),
        [
            ("gguf-py", (Correction.SMOOTHING,)),
            ("ct-vllm-humming", (Correction.SMOOTHING, Correction.ROTATION)),
        ],
    )
    def test_changed_norms_travel(self, target, corrections, tmp_path):
        """What was measured is in the exported folder, with norms that are not the model's."""
        llama = load_model(str(write_llama(tmp_path / "llama", tied=len(corrections) == 1)))
        tokens = CalibrationSet(
            inputs=(torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(0)),)
        )
        request = PlanRequest(
            budgets=("6 bits",), target=target, corrections=corrections,
            samples=12, holdout_samples=12, refine=False, effort="quick",
        )  # fmt: skip
        found = allocate(llama, tokens, request, context=CPU)
        (plan,) = found.plans
        path = tmp_path / f"plan{WEIGHTS_SUFFIX}"
        path.write_bytes(found.weights[0])
        held = QuantizedModel.load(path)
        assert any("norm" in s.pair.weight for s in held.scalings)
        # The stream and the values of two layers.
        turned = Correction.ROTATION in corrections
        assert len(held.rotations) == (3 if turned else 0)
        told = any("stream was turned" in line for line in rounding_sentences(plan))
        assert told == turned
        ready = replace(llama, weights=(path,))
        report = export_plan(ready, plan, tmp_path / "out", target=target, samples=tokens)
        assert report.difference.relative < 1e-3
        run, _, _ = open_export(ready, tmp_path / "out")
        with torch.no_grad():
            gap = run(*tokens.inputs) - quantized_module(ready, plan)(*tokens.inputs)
        assert float(gap.abs().max()) < 1e-3


class TestTrained:
    def test_training_begins_with_the_plan_as_it_ships(self, loaded, made):
        plan, model, _ = made("qep")
        data = loaded[1]
        settings = TrainingSettings(epochs=1, batch_size=16, learning_rate=1e-3)
        trained = finetune_plan(model, plan, data, settings, context=CPU)
        (before,) = trained.plan.baselines
        _, holdout = data.split(settings.holdout_fraction, settings.seed)
        _, found = score_plans(model, holdout, plans={"p": plan}, with_uniform=False)
        assert before.measured.mean == pytest.approx(found.metrics["kl"].mean, rel=1e-6)
        assert trained.plan.weights is None


class TestOnnx:
    def test_a_graph_is_rounded_as_the_torch_module_that_it_came_from(self, tmp_path):
        """The same codes but for float noise, on asymmetric padding, groups and Gemm."""
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 64, 10),
        ).eval()  # fmt: skip
        x = torch.randn(60, 3, 8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own trees
            torch.onnx.export(
                module, (x[:2],), tmp_path / "m.onnx", dynamo=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )  # fmt: skip
        samples = CalibrationSet(inputs=(x,))
        request = PlanRequest(
            budgets=("6 bits",), weight_bits=(4,), rounding="qep", samples=40, holdout_samples=20,
            refine=False, corrections=(Correction.SMOOTHING,),
        )  # fmt: skip
        graph = load_model(str(tmp_path / "m.onnx"))
        torch_model = finish(module, source="m", architecture="m")
        found = [allocate(m, samples, request, context=CPU) for m in (graph, torch_model)]
        kl, expected = (f.plans[0].measured.mean for f in found)
        assert kl == pytest.approx(expected, rel=0.05)
        plan = found[0].plans[0]
        (tmp_path / f"p{WEIGHTS_SUFFIX}").write_bytes(found[0].weights[0])
        places = [len(QuantizedModel.load(f.weights[0]).scalings) for f in found]
        assert places[0] == places[1] > 0
        ready = replace(graph, weights=(tmp_path / f"p{WEIGHTS_SUFFIX}",))
        nearest = allocate(graph, samples, replace(request, rounding="nearest"), context=CPU)
        assert plan.measured.mean < 0.6 * nearest.plans[0].measured.mean
        report = export_plan(ready, plan, tmp_path / "out", format_name="onnx-qdq", samples=samples)
        assert report.difference.relative < 1e-3

    def test_a_weight_that_is_multiplied_with_a_weight_is_rounded_by_itself(self, tmp_path):
        """Its input never changes and is nothing that a run could stop at."""
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 16]) for n in "xy"]
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("MatMul", ["down", "up"], ["update"]),
            helper.make_node("MatMul", ["h", "update"], ["z"]),
            helper.make_node("Add", ["h", "z"], ["y"]),
        ]
        shapes = {"w": (16, 16), "down": (16, 2), "up": (2, 16)}
        tensors = [
            numpy_helper.from_array(numbers(*shape, seed=k), name)
            for k, (name, shape) in enumerate(shapes.items())
        ]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
        model = load_model(str(save(graph, tmp_path / "m.onnx", 21)))
        samples = CalibrationSet(inputs=(torch.randn(24, 16),))
        request = PlanRequest(
            budgets=("5 bits",), weight_bits=(4,), rounding="qep", samples=12, holdout_samples=12,
            refine=False, loss="mse",
        )  # fmt: skip
        (plan,) = allocate(model, samples, request, context=CPU).plans
        assert {a.layer.name for a in plan.assignments} == {"h", "update"}
        assert plan.rounding == "qep"
