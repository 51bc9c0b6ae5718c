"""ModelOpt: a Hugging Face folder of NVFP4 and FP8 weights, as NVIDIA's Model Optimizer writes it.

``hf_quant_config.json`` and the section of ``config.json`` name the algorithm of each layer; vLLM,
SGLang and TensorRT-LLM read either. NVFP4 layers keep inputs in bf16 (``W4A16_NVFP4``). For FP8 a
runtime rounds inputs to FP8, too, in units of ``input_scale``.

References:
    NVIDIA/Model-Optimizer: modelopt/torch/export/quant_utils.py, convert_hf_config.py
    vllm-project/vllm: vllm/model_executor/layers/quantization/modelopt.py

Design: docs/design/targets.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import FLOATS, Grid
from bitquota.errors import InvalidInput
from bitquota.exports.compressed_tensors_folder import shared_factors
from bitquota.exports.hugging_face_folder import (
    copy_other_files,
    read_model,
    source_config,
    source_folder,
    stored_sizes,
    unquantized_linear,
    write_json,
    write_model,
)
from bitquota.exports.storage_rules import MODELOPT_ALGORITHMS, floats_as
from bitquota.quantizers.activations import InputWatcher, weights_of
from bitquota.quantizers.float_formats import E4M3, float_read, scale_bytes
from bitquota.quantizers.packing import pack

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

_CONFIG = "hf_quant_config.json"
_NOTES = {
    "FP8": (
        "runtimes round inputs of FP8 layers to FP8, in units of input_scale (the largest input of "
        "the samples over 448): that was not measured"
    ),
}


class ModelOptFolder:
    """Writes codes, scales and the names of algorithms; reads them back and runs them in torch."""

    name = "modelopt"
    summary = "A Hugging Face folder as ModelOpt writes it: NVFP4 and FP8, for vLLM and TensorRT."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every tensor back, and run what was read."""
        source = source_folder(prepared.model, "modelopt")
        algorithms = {
            name: floats_as(MODELOPT_ALGORITHMS, w.bits, w.scheme) or ""
            for name, w in prepared.weights.items()
        }
        reaches = _largest_inputs(prepared, [n for n, a in algorithms.items() if a == "FP8"])
        factors = shared_factors(prepared.weights)

        def tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
            made = _layer_tensors(name, weight, factors.get(name, 1.0))
            if name in reaches:
                made[f"{name}.input_scale"] = torch.tensor(reaches[name] / E4M3.largest)
            return made

        # Tensors, both descriptions of them, and what else the source folder holds.
        path = write_model(prepared, folder, tensors)
        described = _description(prepared, algorithms)
        about = {"producer": _PRODUCER, "quantization": described}
        ignored = {"ignore": described["exclude_modules"]}
        kept = {k: v for k, v in described.items() if k != "exclude_modules"}
        section = {"quant_method": "modelopt", "producer": _PRODUCER, **kept, **ignored}
        whole = source_config(source) | {"quantization_config": section}
        paths = [path, write_json(folder / _CONFIG, about)]
        paths += [write_json(folder / "config.json", whole), *copy_other_files(source, folder)]

        # Read back what was written.
        sizes = stored_sizes(path)
        reports = [
            prepared.exported_tensor(
                name,
                tensor=f"{name}.weight",
                stored=algorithms[name],
                actual_bits=8
                * sum(sizes.get(f"{name}.weight{part}", 0) for part in ("", "_scale", "_scale_2")),
            )
            for name in prepared.weights
        ]
        kinds = sorted(set(algorithms.values()))
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            paths,
            reports,
            held_bytes=sum(sizes.values()) - sum(sizes[f"{name}.input_scale"] for name in reaches),
            runtime={"name": "torch", "version": torch.__version__, "options": {}},
            weight_files=[path],
            notes=tuple(_NOTES[kind] for kind in kinds if kind in _NOTES),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the model with the weights that the files stand for, in float32."""
        return read_model(prepared, folder, _read)


_PRODUCER = {"name": "bitquota", "version": ""}


def _largest_inputs(prepared: PreparedExport, names: list[str]) -> dict[str, float]:
    """Return the largest absolute input of each of these layers on the samples."""
    if not names:
        return {}
    if prepared.inputs is None:
        msg = (
            "FP8 layers of a ModelOpt folder need samples, whose largest inputs the file holds "
            f"(input_scale); got none for {', '.join(names[:4])}: give samples to the export"
        )
        raise InvalidInput(msg, layers=names)
    found = dict.fromkeys(names, 0.0)

    def look(layer: str, values: Tensor) -> Tensor:
        if layer in found:
            found[layer] = max(found[layer], float(values.abs().max()))
        return values

    watched = weights_of(prepared.module, prepared.plan.inventory)
    with torch.no_grad(), InputWatcher(watched, look):
        prepared.module(*prepared.inputs)
    return {name: reach or E4M3.largest for name, reach in found.items()}


def _layer_tensors(name: str, weight: QuantizedWeight, factor: float) -> dict[str, Tensor]:
    rows = weight.codes.shape[0]
    if weight.bits == 8:
        return {
            f"{name}.weight": weight.codes.to(torch.uint8).view(torch.float8_e4m3fn),
            f"{name}.weight_scale": weight.scales.reshape(()).float(),
        }
    scales, _ = scale_bytes(weight.scales, weight.scheme.scale_format, factor)
    return {
        f"{name}.weight": torch.from_numpy(pack(weight).codes).reshape(rows, -1),
        f"{name}.weight_scale": scales.view(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(factor),
    }


def _read(file: Any, name: str) -> Tensor:  # noqa: ANN401  # an open safetensors file
    """Return the weight that the tensors of a layer stand for, ``[rows, columns]`` in float32."""
    codes, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
    if codes.dtype != torch.uint8:
        made: Tensor = codes.float() * scale
        return made
    # Two codes in a byte, the first in its low half.
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    values = float_read(both.int(), FLOATS[Grid.FLOAT][4], torch.float32)
    scales = scale.float() * file.get_tensor(f"{name}.weight_scale_2")
    weight: Tensor = values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)
    return weight


def _description(prepared: PreparedExport, algorithms: dict[str, str]) -> JsonObject:
    """Return what ``hf_quant_config.json`` says of the layers."""

    def of(algorithm: str) -> JsonObject:
        size: JsonObject = {"group_size": 16} if algorithm == "W4A16_NVFP4" else {}
        return {"quant_algo": algorithm, **size}

    described: JsonObject = {
        "kv_cache_quant_algo": None,
        "exclude_modules": unquantized_linear(prepared),
    }
    kinds = sorted(set(algorithms.values()))
    if len(kinds) == 1:
        return described | of(kinds[0])
    layers = {name: of(algorithms[name]) for name in sorted(algorithms)}
    return described | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
