"""GPTQ checkpoints: codes as planned, in the layout that GPTQModel unpacks."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bitquota.candidates.architectures import prepare_inventory
from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import InvalidPlan
from bitquota.exports.export import export_plan, prepare_export
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from format_networks import plan_with
from language_folders import folder

WINDOWS = CalibrationSet(
    inputs=(torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0)),)
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = folder(
        tmp_path_factory.mktemp("gptq") / "m",
        "llama",
        initializer_range=0.2,
        hidden_size=128,
        intermediate_size=256,
    )
    return load_model(str(path))


def groups(size: int | None, scales: ScaleFormat = ScaleFormat.FP16) -> Scheme:
    return Scheme(
        granularity=Granularity.CHANNEL if size is None else Granularity.GROUP,
        group_size=size,
        scale_format=scales,
        row_alignment_bits=32,
    )


def linear_layers(model):
    found = discover(model.module, WINDOWS.inputs, model_digest=model.digest)
    return prepare_inventory(found, None, exclude=("model.embed_tokens", "lm_head"))


def bit_by_bit(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Return i64[n, columns]: code ``i`` of a column has bits ``i b`` to ``i b + b - 1``."""
    found = torch.zeros(n, words.shape[1], dtype=torch.int64)
    for i in range(n):
        for k in range(bits):
            at = i * bits + k
            found[i] |= (words[at // 32].long() >> at % 32 & 1) << k
    return found


class TestGptqFolder:
    def test_mixed_widths_of_the_target(self, llama, tmp_path):
        plan = plan_with(llama, WINDOWS.inputs, target="gptq-vllm", seed=3)
        report = export_plan(llama, plan, tmp_path / "o", target="gptq-vllm", samples=WINDOWS)
        assert report.exporter == "gptq"
        assert report.difference.relative < 1e-6
        assert all(t.planned_bits == t.actual_bits for t in report.tensors)
        section = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        assert section["quant_method"] == "gptq"
        for a in plan.assignments:
            rules = [
                rule
                for pattern, rule in section["dynamic"].items()
                if re.match(pattern[2:], a.layer.name)
            ]
            found = rules[0].get("bits", 32) if rules else section["bits"]
            assert found == a.candidate.weight_bits

    @pytest.mark.parametrize("size", [32, 128, None])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_layout(self, llama, tmp_path, bits, size):
        """Words hold the codes along the inputs; zero points are the middle less one."""
        inventory = linear_layers(llama)
        table = enumerate_candidates(inventory, (bits,), scheme=groups(size))
        plan = plan_with(llama, WINDOWS.inputs, table=table, inventory=inventory)
        out = tmp_path / "o"
        export_plan(llama, plan, out, format_name="gptq", samples=WINDOWS)
        name = inventory.layers[0].name
        stored = prepare_export(llama, plan).weights[name]
        rows, columns = stored.codes.shape
        held = load_file(out / "model.safetensors")
        codes = bit_by_bit(held[f"{name}.qweight"], bits, columns)
        assert torch.equal(codes.t() - 2 ** (bits - 1), stored.codes.long())
        zeros = bit_by_bit(held[f"{name}.qzeros"].t(), bits, rows)
        assert (zeros == 2 ** (bits - 1) - 1).all()
        group = held[f"{name}.g_idx"].long()
        scales = held[f"{name}.scales"].float()[group]  # [columns, rows]
        expected = (codes - (zeros.t()[group] + 1)).float() * scales
        assert torch.equal(expected.t(), stored.dequantize().float())

    def test_what_it_cannot_hold_is_refused(self, llama, tmp_path):
        inventory = linear_layers(llama)
        table = enumerate_candidates(inventory, (4,), scheme=groups(32, ScaleFormat.BF16))
        plan = plan_with(llama, WINDOWS.inputs, table=table, inventory=inventory)
        with pytest.raises(InvalidPlan, match="fp16 scales"):
            export_plan(llama, plan, tmp_path / "o", format_name="gptq", samples=WINDOWS)
