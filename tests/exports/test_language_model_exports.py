"""Exports of language models: GGUF, compressed-tensors, and config files of other tools."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from bitquota.candidates.storage import Granularity, Grid, Scheme
from bitquota.candidates.table import Candidate, enumerate_candidates
from bitquota.candidates.targets import TARGETS
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.exports.export import export_plan, load_export
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from export_cases import IMAGES, TOKENS, target_plan
from format_networks import plan_with, write_llama
from refusals import refused


class TestCompressedTensors:
    def test_zero_points(self, llama, tmp_path):
        """Asymmetric grids are refused with the layers named."""
        scheme = Scheme(
            grid=Grid.ASYMMETRIC,
            granularity=Granularity.GROUP,
            group_size=32,
            row_alignment_bits=32,
        )
        target = TARGETS["ct-vllm-humming"]
        inventory = target.prepare(discover(llama.module, TOKENS.inputs, model_digest=llama.digest))
        table = enumerate_candidates(inventory, (3, 5), scheme=scheme)
        plan = plan_with(llama, TOKENS.inputs, table=table, inventory=inventory, seed=2)
        with pytest.raises(InvalidPlan, match=r"symmetric, .*q_proj"):
            export_plan(llama, plan, tmp_path / "o", format_name="compressed-tensors")

    def test_config_names_every_layer(self, llama, tmp_path):
        """Each quantized layer stands in one group, every other linear layer under ignore."""
        plan = target_plan(llama, TOKENS, "ct-vllm-humming", seed=1)
        export_plan(llama, plan, tmp_path / "o", target="ct-vllm-humming", samples=TOKENS)
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        grouped = {
            n: g["weights"]["num_bits"]
            for g in config["config_groups"].values()
            for n in g["targets"]
        }
        planned = {
            a.layer.name: a.candidate.weight_bits
            for a in plan.assignments
            if a.candidate.weight_bits < 32
        }
        assert planned == grouped
        assert not set(grouped) & set(config["ignore"])

    @pytest.mark.parametrize("target", ["ct-vllm-humming", "ct-vllm-nvfp4", "ct-vllm-mxfp4"])
    def test_loads_with_the_options_of_the_receipt(self, llama, tmp_path, target):
        """As a user would, without us."""
        import transformers

        plan = target_plan(llama, TOKENS, target, seed=1)
        report = export_plan(llama, plan, tmp_path / "o", target=target, samples=TOKENS)
        dtype = getattr(torch, report.runtime["options"]["dtype"])
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=dtype)
        ours = load_export(llama, plan, tmp_path / "o", format_name="compressed-tensors")
        with torch.no_grad():
            found, wanted = loaded(TOKENS.inputs[0]).logits.float(), ours(TOKENS.inputs[0])
        limit = 1e-5 if dtype is torch.float32 else 0.03
        assert float((found - wanted).norm() / wanted.norm()) < limit

    def test_broken_tie_is_refused(self, llama, tmp_path):
        """A plan whose q and k differ is refused with the layers named, nothing written."""
        plan = target_plan(llama, TOKENS, "ct-vllm-humming", seed=1)
        first = plan.assignments[0]
        other = 8 if first.candidate.weight_bits != 8 else 4
        changed = Candidate.of(first.layer, other, first.candidate.scheme)
        if first.candidate.weight_bits == 32:
            scheme = TARGETS["ct-vllm-humming"].formats_for(first.layer)[0].scheme
            changed = Candidate.of(first.layer, other, scheme)
        broken = replace(
            plan, assignments=(replace(first, candidate=changed), *plan.assignments[1:])
        )
        with pytest.raises(InvalidPlan, match=r"q_proj=W\d.*k_proj="):
            export_plan(llama, broken, tmp_path / "o", target="ct-vllm-humming", samples=TOKENS)
        assert list(tmp_path.iterdir()) == []

    def test_needs_a_folder(self, net, tmp_path):
        """A model that is no Hugging Face folder has no config to extend."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        with pytest.raises(InvalidInput, match="Hugging Face folder"):
            export_plan(net, plan, tmp_path / "o", format_name="compressed-tensors")


class TestModelOpt:
    def test_names_the_algorithm_of_every_layer(self, llama, tmp_path):
        """Both descriptions do, and every other linear layer is excluded; FP8 has input scales."""
        plan = target_plan(llama, TOKENS, "modelopt", seed=1)
        report = export_plan(llama, plan, tmp_path / "o", target="modelopt", samples=TOKENS)
        about = json.loads((tmp_path / "o" / "hf_quant_config.json").read_text())["quantization"]
        section = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        assert section["quant_method"] == "modelopt"
        assert about["quant_algo"] == section["quant_algo"] == "MIXED_PRECISION"
        named = {n: layer["quant_algo"] for n, layer in about["quantized_layers"].items()}
        names = {4: "W4A16_NVFP4", 8: "FP8", 32: None}
        planned = {a.layer.name: names[a.candidate.weight_bits] for a in plan.assignments}
        assert named == {n: algorithm for n, algorithm in planned.items() if algorithm}
        assert not set(named) & set(about["exclude_modules"])
        assert about["exclude_modules"] == section["ignore"]
        with safe_open(tmp_path / "o" / "model.safetensors", framework="pt") as file:
            scaled = {n.removesuffix(".input_scale") for n in file.keys() if "input_s" in n}  # noqa: SIM118
            assert scaled == {n for n, algorithm in named.items() if algorithm == "FP8"}
            assert all(float(file.get_tensor(f"{n}.input_scale")) > 0 for n in scaled)
        assert any("FP8" in note for note in report.notes)

    def test_one_algorithm_needs_no_list(self, llama, tmp_path):
        """NVFP4 alone is named once, without samples."""
        plan = plan_with(llama, TOKENS.inputs, target="modelopt", bits=(4,))
        export_plan(llama, plan, tmp_path / "o", target="modelopt")
        about = json.loads((tmp_path / "o" / "hf_quant_config.json").read_text())["quantization"]
        assert (about["quant_algo"], about["group_size"]) == ("W4A16_NVFP4", 16)

    def test_fp8_needs_samples(self, llama, tmp_path):
        """What the file must hold of inputs is not made up."""
        plan = plan_with(llama, TOKENS.inputs, target="modelopt", bits=(8,))
        bare = replace(llama, example_inputs=None)
        with pytest.raises(InvalidInput, match="give samples to the export"):
            export_plan(bare, plan, tmp_path / "o", target="modelopt")

    def test_modelopt_reads_the_same_weights(self, llama, tmp_path):
        """Its own class for NVFP4 tensors, where it is installed, finds what the plan says."""
        qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
        plan = plan_with(llama, TOKENS.inputs, target="modelopt", bits=(4,))
        export_plan(llama, plan, tmp_path / "o", target="modelopt", samples=TOKENS)
        ours = load_export(llama, plan, tmp_path / "o", format_name="modelopt")
        with safe_open(tmp_path / "o" / "model.safetensors", framework="pt") as file:
            for a in plan.assignments:
                codes = file.get_tensor(f"{a.layer.name}.weight")
                read = qtensor.NVFP4QTensor(
                    torch.Size((a.layer.rows, a.layer.columns)), torch.float32, codes
                ).dequantize(
                    dtype=torch.float32,
                    scale=file.get_tensor(f"{a.layer.name}.weight_scale"),
                    double_scale=file.get_tensor(f"{a.layer.name}.weight_scale_2"),
                    block_sizes={-1: 16},
                )
                assert torch.equal(read, ours.get_parameter(a.layer.weight_name))


class TestGguf:
    def test_reader_finds_every_type(self, llama, tmp_path):
        """The gguf package reads the planned type of every tensor; the recipe agrees."""
        import gguf

        plan = target_plan(llama, TOKENS, "gguf-py", seed=4)
        export_plan(llama, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        reader = gguf.GGUFReader(str(tmp_path / "o" / "model.gguf"))
        types = {t.name: t.tensor_type.name for t in reader.tensors}
        names = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0", 32: "F32"}
        planned = {a.layer.name: names[a.candidate.weight_bits] for a in plan.assignments}
        assert planned["model.layers.1.self_attn.q_proj"] == types["blk.1.attn_q.weight"]
        assert planned["model.layers.0.mlp.down_proj"] == types["blk.0.ffn_down.weight"]
        recipe = dict(
            line.split("=") for line in (tmp_path / "o" / "tensor-types.txt").read_text().split()
        )
        for pattern, kind in recipe.items():
            name = pattern.strip("^$").replace("\\", "")
            assert types[name].lower() == kind

    def test_queries_are_reordered(self, llama, tmp_path):
        """Q rows are stored with rotated pairs adjacent, as llama.cpp's converter does."""
        import gguf

        plan = plan_with(llama, TOKENS.inputs, target="gguf-py", bits=(8,))
        export_plan(llama, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        reader = gguf.GGUFReader(str(tmp_path / "o" / "model.gguf"))
        (found,) = [t for t in reader.tensors if t.name == "blk.0.attn_q.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        weight = llama.module.get_parameter("model.layers.0.self_attn.q_proj.weight").detach()
        # Head size 16: row 1 of the file is row 8 of the first head.
        assert torch.allclose(values[1], weight[8], atol=2e-3)
        assert torch.allclose(values[2], weight[1], atol=2e-3)


class TestGgufK:
    @pytest.mark.slow
    def test_super_blocks_where_256_divides(self, tmp_path):
        """Every K type is found by the reader; rows of 320 take blocks of 32."""
        import gguf

        model = load_model(str(write_llama(tmp_path / "m", width=256, inner=320)))
        plan = target_plan(model, TOKENS, "gguf-k", seed=2)
        report = export_plan(model, plan, tmp_path / "o", target="gguf-k", samples=TOKENS)
        assert plan.size_bits - report.payload_bits == sum(
            a.candidate.size_bits for a in plan.assignments if a.candidate.weight_bits == 32
        )
        assert report.difference.maximum == 0.0
        types = {
            t.name: t.tensor_type.name
            for t in gguf.GGUFReader(str(tmp_path / "o" / "model.gguf")).tensors
        }
        planned = {a.layer.name: a.candidate for a in plan.assignments}
        stored = {t.layer: types[t.tensor] for t in report.tensors}
        for name, kind in stored.items():
            wide = planned[name].scheme.group_size == 256
            suffix = "_K" if wide else "_0"
            assert f"Q{planned[name].weight_bits}{suffix}" == kind
        assert len({k for k in stored.values() if k.endswith("_K")}) >= 3
        assert not any(k.endswith("_K") for n, k in stored.items() if "down_proj" in n)

    def test_other_formats_refuse(self, tmp_path):
        """Nothing but GGUF has super-blocks."""
        model = load_model(str(write_llama(tmp_path / "m", width=256, inner=320)))
        plan = target_plan(model, TOKENS, "gguf-k", seed=2, bits=(4, 5))
        with pytest.raises(InvalidPlan, match="k_blocks"):
            export_plan(model, plan, tmp_path / "o", format_name="ref-int", samples=TOKENS)


class TestConfigFiles:
    @pytest.mark.parametrize(
        ("format_name", "file"),
        [
            ("gptqmodel-config", "quantize_config.json"),
            ("autoround-config", "layer_config.json"),
            ("llm-compressor-recipe", "recipe.yaml"),
            ("torchao-config", "torchao_config.json"),
            ("mlx-config", "mlx_quantization.json"),
            ("coreml-config", "coreml_config.json"),
        ],
    )
    def test_every_layer_is_named(self, llama, tmp_path, format_name, file):
        """Each quantized layer stands in the file, with its own width where it differs."""
        plan = plan_with(llama, TOKENS.inputs, target="ct-vllm-marlin", bits=(4, 8), seed=3)
        report = export_plan(llama, plan, tmp_path / "o", format_name=format_name)
        text = (tmp_path / "o" / file).read_text()
        json.loads(text)
        common = 4 if format_name == "gptqmodel-config" else None
        for a in plan.assignments:
            name = a.layer.name.replace(".", r"\\.") if common else a.layer.name
            widths = {b.candidate.weight_bits for b in plan.assignments}
            assert widths == {4, 8}
            if common is None:
                assert name in text
        assert report.difference is None
        assert report.notes

    @pytest.mark.parametrize(
        ("target", "file"),
        [
            ("mlx", "config.json"),
            ("torchao", "torchao_config.json"),
            ("coreml", "coreml_config.json"),
        ],
    )
    def test_targets_of_other_tools(self, llama, tmp_path, target, file):
        """The target's own plan, with its own grid, becomes its configuration."""
        plan = plan_with(llama, TOKENS.inputs, target=target, bits=(4, 8), seed=3)
        report = export_plan(llama, plan, tmp_path / "o", target=target)
        text = (tmp_path / "o" / file).read_text()
        assert TARGETS[target].exporter == report.exporter
        assert all(f'"{a.layer.name}"' in text for a in plan.assignments)

    def test_gptq_rules_are_anchored(self, llama, tmp_path):
        """Rules name whole modules; what is left out has a negative rule."""
        import re

        plan = plan_with(llama, TOKENS.inputs, target="ct-vllm-marlin", bits=(4, 8), seed=3)
        export_plan(llama, plan, tmp_path / "o", format_name="gptqmodel-config")
        config = json.loads((tmp_path / "o" / "quantize_config.json").read_text())
        for a in plan.assignments:
            hits = [
                rule
                for pattern, rule in config["dynamic"].items()
                if pattern.startswith("+:") and re.match(pattern[2:], a.layer.name)
            ]
            assert a.candidate.weight_bits == (hits[0]["bits"] if hits else config["bits"])

    def test_cannot_be_run(self, llama, tmp_path):
        """A configuration holds no weights."""
        plan = plan_with(llama, TOKENS.inputs, bits=(4,))
        with refused(InvalidInput, format="mlx-config"):
            load_export(llama, plan, tmp_path, format_name="mlx-config")
