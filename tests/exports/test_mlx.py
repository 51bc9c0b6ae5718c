"""Folders for MLX: codes as planned, run by mlx-lm on the processor."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import ExportFailed, InvalidInput, InvalidPlan
from bitquota.exports.export import EXPORTERS, export_plan, open_export, prepare_export
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from format_networks import plan_with
from language_folders import LINEAR, LLAMA3, YARN, folder

WINDOWS = CalibrationSet(
    inputs=(torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0)),)
)


def model_of(path, kind="llama", **config):
    """A random model whose logits tell tokens apart."""
    return load_model(str(folder(path / "m", kind, **({"initializer_range": 0.2} | config))))


def affine(size: int) -> Scheme:
    """MLX's groups."""
    return Scheme(
        grid=Grid.OFFSET,
        granularity=Granularity.GROUP,
        group_size=size,
        scale_format=ScaleFormat.FP16,
        row_alignment_bits=32,
    )


class TestMlxFolder:
    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
            ("llama", {"rope_parameters": YARN, "dtype": "bfloat16"}),
            ("mistral", {"rope_parameters": LINEAR}),
            ("qwen2", {}),
            ("qwen3", {"head_dim": 32}),
        ],
    )
    def test_widths_mixed_per_module(self, tmp_path, kind, config):
        """Outputs are those of fake quantization, and every module has its own width."""
        pytest.importorskip("mlx_lm", reason="the extra 'mlx' is not installed")
        model = model_of(tmp_path, kind, **config)
        plan = plan_with(model, WINDOWS.inputs, target="mlx", seed=3)
        report = export_plan(model, plan, tmp_path / "o", target="mlx", samples=WINDOWS)
        assert report.difference.relative < 1e-5
        assert report.runtime["relative_in_own_type"] < 1e-2
        section = json.loads((tmp_path / "o" / "config.json").read_text())["quantization"]
        planned = {a.layer.name: a.candidate.weight_bits for a in plan.assignments}
        assert len(set(planned.values())) > 2
        linear = {n for n in planned if n != "model.embed_tokens"}
        assert {n: planned[n] for n in linear if planned[n] < 32} == {
            n: section[n]["bits"] for n in linear if section[n]
        }

    @pytest.mark.parametrize("size", [32, 64, 128])
    def test_every_width(self, tmp_path, size):
        """Each width in groups of each size: MLX unpacks the plan's own codes."""
        mx = pytest.importorskip("mlx.core", reason="the extra 'mlx' is not installed")
        model = model_of(tmp_path, hidden_size=128, intermediate_size=128)
        inventory = discover(model.module, WINDOWS.inputs, model_digest=model.digest)
        for bits in (2, 3, 4, 5, 6, 8):
            table = enumerate_candidates(inventory, (bits,), scheme=affine(size))
            plan = plan_with(model, WINDOWS.inputs, table=table, inventory=inventory)
            out = tmp_path / str(bits)
            report = export_plan(model, plan, out, format_name="mlx", samples=WINDOWS)
            assert report.difference.relative < 1e-5
            assert plan.size_bits == report.payload_bits
            weight = prepare_export(model, plan).weights["lm_head"]
            stored = mx.load(str(out / "model.safetensors"))
            codes, *steps = (stored[f"lm_head.{p}"] for p in ("weight", "scales", "biases"))
            steps = [part.astype(mx.float32) for part in steps]
            read = mx.dequantize(codes, *steps, group_size=size, bits=bits)
            assert np.allclose(np.array(read), weight.dequantize().numpy(), atol=1e-6)

    def test_wrong_codes_are_found(self, tmp_path, monkeypatch):
        """Codes in another order load, and compute something else."""
        pytest.importorskip("mlx_lm", reason="the extra 'mlx' is not installed")
        from bitquota.exports import mlx_folder

        def reversed_rows(weight):
            return mlx_folder_pack(replace(weight, codes=weight.codes.flip(0)))

        mlx_folder_pack = mlx_folder.pack
        monkeypatch.setattr(mlx_folder, "pack", reversed_rows)
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="mlx", bits=(4,))
        with pytest.raises(ExportFailed, match="mlx-lm reads the files wrongly"):
            export_plan(model, plan, tmp_path / "o", target="mlx", samples=WINDOWS)

    def test_opened_again(self, tmp_path):
        """An export is evaluated in MLX."""
        pytest.importorskip("mlx_lm", reason="the extra 'mlx' is not installed")
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="mlx", bits=(4, 8))
        export_plan(model, plan, tmp_path / "o", target="mlx", samples=WINDOWS)
        module, opened, _ = open_export(model, tmp_path / "o")
        assert plan == opened
        assert (3, 40, 64) == tuple(module(*WINDOWS.inputs).shape)

    def test_without_mlx(self, tmp_path, monkeypatch):
        """The folder is written, and the report says that nothing ran it."""
        monkeypatch.setattr(type(EXPORTERS["mlx"]), "runs_here", property(lambda _: False))
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="mlx", bits=(4,))
        report = export_plan(model, plan, tmp_path / "o", target="mlx", samples=WINDOWS)
        assert report.difference is None
        assert any("pip install bitquota[mlx]" in note for note in report.notes)

    def test_what_it_cannot_hold(self, tmp_path):
        """Groups of 16, and models that are no folder."""
        model = model_of(tmp_path)
        inventory = discover(model.module, WINDOWS.inputs, model_digest=model.digest)
        table = enumerate_candidates(inventory, (4,), scheme=affine(16))
        plan = plan_with(model, WINDOWS.inputs, table=table, inventory=inventory)
        with pytest.raises(InvalidPlan, match=r"groups of 32, 64 or 128 .*--target mlx"):
            export_plan(model, plan, tmp_path / "o", format_name="mlx")
        no_folder = load_model("format_networks:tied_tokens")
        plan = plan_with(no_folder, (WINDOWS.inputs[0] % 32,), target="mlx", bits=(4,))
        with pytest.raises(InvalidInput, match="Hugging Face folder"):
            export_plan(no_folder, plan, tmp_path / "o", format_name="mlx")
