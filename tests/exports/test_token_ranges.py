"""Ranges of inputs that are found token by token: measured, stored, run by compressed-tensors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bitquota.candidates.targets import target_by_name
from bitquota.context import Context, MemoryLedger
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.exports.export import export_plan, load_export
from bitquota.models.load import load_model
from bitquota.plan import Plan
from bitquota.quantizers.activations import TokenInputs, TokenQuantizer
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.training.qat import finetune_plan
from export_cases import TOKENS
from format_networks import write_llama
from refusals import refused

REQUEST = PlanRequest(
    budgets=("7 bits",), effort="quick", refine=False, samples=4, holdout_samples=4,
    rounding="nearest", loss="kl",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose rows groups of 128 divide."""
    path = tmp_path_factory.mktemp("llama")
    return load_model(str(write_llama(path, width=128, inner=128, tied=False)))


@pytest.fixture(scope="module")
def planned(model):
    """Return the plan and the model with its weights, by target."""
    found = {}
    for target in ("ct-vllm-fp8", "ct-vllm-int8"):
        budgets = ("8 bits",) if target == "ct-vllm-int8" else REQUEST.budgets
        context = Context(device="cpu", ledger=MemoryLedger())
        request = replace(REQUEST, target=target, budgets=budgets)
        made = allocate(model, TOKENS, request, context=context)
        found[target] = made.plans[0], made.with_weights(model)
    return found


class TestTokenQuantizer:
    def test_each_token_has_its_own_step(self):
        """By hand: the largest value of a token is the largest code less half a step."""
        values = torch.tensor([[1.0, -0.5, 0.1], [100.0, 3.0, -100.0], [0.0, 0.0, 0.0]])
        found = TokenQuantizer(bits=4)(values)
        step = values.abs().amax(dim=1, keepdim=True) / 7.5
        expected = (values / step.clamp_min(1e-30)).round().clamp(-8, 7) * step
        assert torch.equal(expected, found)
        assert torch.equal(torch.zeros(3), found[2])

    def test_numbers_of_8_bits_are_those_of_torch(self):
        """E4M3 in units of the largest value over 448, against torch's own type."""
        values = torch.randn(64, 32, generator=torch.manual_seed(0)) * torch.logspace(-3, 3, 32)
        step = values.abs().amax(dim=1, keepdim=True) / 448
        expected = (values / step).to(torch.float8_e4m3fn).float() * step
        assert torch.equal(expected, TokenQuantizer(bits=8, floats=True)(values))

    def test_what_has_no_tokens_is_refused(self):
        """Convolutions, and floats of other bits."""
        inputs = TokenInputs(kinds={"a": "conv2d", "b": "linear"}, floats=True)
        with refused(InvalidInput, layer="a"):
            inputs("a", 8)
        with refused(InvalidInput, activation_bits=4):
            inputs("b", 4)


class TestPlans:
    def test_a_target_brings_its_own_ranges(self, planned, model):
        """No samples are needed for them, and evaluation finds them again."""
        plan, with_weights = planned["ct-vllm-fp8"]
        assert plan.activation_fit == "token_float"
        widths = {a.candidate.weight_bits for a in plan.assignments}
        assert {4, 8} <= widths
        assert Plan.from_json(plan.to_json()) == plan
        quantized = quantized_module(with_weights, plan)
        with torch.no_grad():
            one = quantized(TOKENS.inputs[0][:1, :8])
            rest = quantized(TOKENS.inputs[0][:1])[:, :8]
        assert torch.allclose(one, rest, atol=1e-5)  # no token looks at others' ranges

    def test_other_targets_and_ranges_are_refused(self):
        """With the reason, before anything is measured."""
        with refused(InvalidInput, target="ort-cpu-integer", activation_fit="token"):
            PlanRequest(target="ort-cpu-integer", activation_fit="token")
        with refused(InvalidInput, target="ct-vllm-fp8", activation_fit="chan"):
            PlanRequest(target="ct-vllm-fp8", activation_fit="chan")
        assert PlanRequest(target="ort-cpu", activation_fit="chan").activation_fit == "chan"
        assert target_by_name("ct-vllm-int8").agreed_fit("mse") == "token"

    def test_training_is_refused(self, planned):
        """It would learn one grid for all tokens."""
        plan, with_weights = planned["ct-vllm-int8"]
        with refused(InvalidInput, activation_fit="token"):
            finetune_plan(with_weights, plan, TOKENS)


class TestExports:
    @pytest.mark.parametrize("target", ["ct-vllm-fp8", "ct-vllm-int8"])
    def test_transformers_rounds_inputs_as_planned(self, planned, tmp_path, target):
        """Loaded as a user would; the effect of the ranges is far above the difference."""
        import transformers

        plan, model = planned[target]
        report = export_plan(model, plan, tmp_path / "o", target=target, samples=TOKENS)
        assert report.difference.relative < 1e-5
        assert sum(t.actual_bits for t in report.tensors) == plan.size_bits
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        for group in config["config_groups"].values():
            assert group["input_activations"]["strategy"] == "token"
            assert group["input_activations"]["dynamic"]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "o", dtype=torch.float32
        )
        ours = load_export(model, plan, tmp_path / "o", format_name="compressed-tensors")
        with torch.no_grad():
            found, wanted = loaded(TOKENS.inputs[0]).logits, ours(TOKENS.inputs[0])
            planned_outputs = quantized_module(model, plan)(TOKENS.inputs[0])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert torch.allclose(found, planned_outputs, atol=1e-4)

    def test_without_samples_ranges_are_written_too(self, planned, tmp_path):
        """They are none of a calibration set."""
        plan, model = planned["ct-vllm-fp8"]
        bare = replace(plan, weights=None)
        export_plan(replace(model, weights=()), bare, tmp_path / "o", target="ct-vllm-fp8")
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        assert all(g["input_activations"] for g in config["config_groups"].values())

    def test_onnx_is_refused(self, planned, tmp_path):
        """Its operator for ranges at run time has one for a tensor."""
        plan, model = planned["ct-vllm-int8"]
        with refused(InvalidPlan, format="onnx-qdq", activation_fit="token"):
            export_plan(model, plan, tmp_path / "o", format_name="onnx-qdq", samples=TOKENS)
