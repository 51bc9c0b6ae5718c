"""compressed-tensors: a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import ScaleFormat
from bitquota.candidates.targets.target import FUSED_SIBLINGS, siblings_in
from bitquota.errors import ExportFailed
from bitquota.exports.hugging_face_folder import (
    WEIGHTS,
    copy_other_files,
    source_config,
    source_folder,
    stored_sizes,
    unquantized_linear,
    write_json,
    write_model,
)
from bitquota.exports.storage_rules import compressed_as
from bitquota.models.huggingface import return_tensor
from bitquota.models.identity import HALF_TYPES
from bitquota.quantizers.activations import TokenQuantizer
from bitquota.quantizers.float_formats import scale_bytes, stored_scales, tensor_factor
from bitquota.quantizers.packing import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.activations import InputGrid
    from bitquota.quantizers.weights import QuantizedWeight


class CompressedTensorsFolder:
    """Writes codes and scales of each layer, and a ``quantization_config``.

    Only linear layers can be stored so; the source must be a Hugging Face folder. Other tensors
    keep the type of the checkpoint. Integers are ``pack-quantized``; small floats are NVFP4, MXFP4
    or FP8.
    """

    name = "compressed-tensors"
    summary = "A Hugging Face folder for transformers and vLLM: packed integers, NVFP4, MXFP4, FP8."
    runs_here = True
    holds_inputs = TokenQuantizer

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every tensor back, load it with transformers and run it."""
        source = source_folder(prepared.model, "compressed-tensors")

        # Packed weights, the other tensors, the config and what else the source folder holds.
        factors = shared_factors(prepared.weights)

        def tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
            kind = compressed_as(weight.bits, weight.scheme, inputs=name in prepared.activations)
            return _layer_tensors(name, weight, factors.get(name, 1.0), kind)

        config = _config(source, prepared)
        path = write_model(prepared, folder, tensors)
        paths = [path, write_json(folder / "config.json", config)]
        paths += copy_other_files(source, folder)

        # Read back what was written.
        reports = []
        sizes = stored_sizes(path)
        for name in prepared.weights:
            codes = f"{name}.weight" if f"{name}.weight" in sizes else f"{name}.weight_packed"
            parts = [codes, f"{name}.weight_scale", f"{name}.weight_global_scale"]
            group = _group_of_layer(config, name)
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=codes,
                    stored=f"{group['format']} W{group['weights']['num_bits']}",
                    actual_bits=8 * sum(sizes.get(p, 0) for p in parts),
                )
            )
        held = sum(sizes.values())
        described = sum(sizes.get(f"{name}.weight_shape", 0) for name in prepared.weights)
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            paths,
            reports,
            held_bytes=held - described,
            runtime=_runtime(config),
            weight_files=[path],
            notes=("weight_shape and the file's header are counted as container", *_notes(factors)),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Load the folder with transformers, as a user would, in float32.

        Where weights stay in their files, compressed-tensors unpacks one layer after the other.
        """
        if prepared.model.pages is not None and not prepared.activations:
            return prepared.with_tensors(_unpacking(prepared, folder))
        import transformers

        kind = getattr(transformers, prepared.model.architecture)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            with redirect_stderr(io.StringIO()):  # progress bars of compressed-tensors
                model: nn.Module = kind.from_pretrained(
                    str(folder),
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                )
                if prepared.activations:
                    # compressed-tensors rounds inputs as long as it unpacks weights itself.
                    return return_tensor(model.eval())
                # Small floats come as bfloat16, which holds them exactly.
                model.hf_quantizer.compressor.decompress_model(model)  # type: ignore[operator,union-attr]
                torch.nn.Module.float(model)  # transformers refuses its own for quantized models
        except Exception as err:  # whatever transformers raises, the folder did not load
            msg = f"transformers must load the exported folder; it says: {err}"
            raise ExportFailed(msg) from err
        finally:
            transformers.logging.set_verbosity(verbosity)
        return return_tensor(model.eval())


def shared_factors(weights: Mapping[str, QuantizedWeight]) -> dict[str, float]:
    """Return the factor of the scales of each weight whose format has one.

    vLLM fuses some layers into one matrix that has one factor. These get the largest of their
    factors, if their scales are the same in units of it; else each keeps its own.
    """
    scales = {
        name: weight.scales.double()
        for name, weight in weights.items()
        if weight.scheme.scale_format.tensor_bits
    }
    factors = {name: tensor_factor(stored) for name, stored in scales.items()}
    for names in _fused(scales):
        largest = max(factors[name] for name in names)
        exact = (
            torch.equal(stored_scales(scales[n], ScaleFormat.E4M3, largest), scales[n])
            for n in names
        )
        if all(exact):
            factors |= dict.fromkeys(names, largest)
    return factors


def _fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the layers that vLLM makes one matrix of."""
    listed = list(names)
    return [joined for tie in FUSED_SIBLINGS for joined in siblings_in(tie, listed)]


def _unpacking(prepared: PreparedExport, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a reader for each tensor of the model that the folder holds."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors import safe_open

    file: Any = safe_open(str(folder / WEIGHTS), framework="pt")
    held = set(file.keys())
    groups = source_config(folder)["quantization_config"]
    schemes = {
        name: QuantizationScheme.model_validate(group)
        for group in groups["config_groups"].values()
        for name in group["targets"]
    }
    parts: dict[str, list[str]] = {name: [] for name in schemes}
    for tensor in held:
        owner, _, leaf = tensor.rpartition(".")
        if owner in parts:
            parts[owner].append(leaf)

    def unpacked(name: str) -> Tensor:
        scheme = schemes[name]
        packed = {leaf: file.get_tensor(f"{name}.{leaf}") for leaf in parts[name]}
        # It multiplies in the type of the scales, which transformers loads in float32.
        packed = {leaf: t.float() if t.dtype in HALF_TYPES else t for leaf, t in packed.items()}
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(packed, scheme)
        weight: Tensor = found["weight"]
        return weight

    state = prepared.module.state_dict()
    readers: dict[str, Callable[[], Tensor]] = {
        name: partial(file.get_tensor, name) for name in held & state.keys()
    }
    return readers | {
        prepared.layers[name].weight_name: partial(unpacked, name) for name in schemes
    }


def _notes(factors: Mapping[str, float]) -> tuple[str, ...]:
    apart = [names for names in _fused(factors) if len({factors[n] for n in names}) > 1]
    return tuple(
        f"{', '.join(names)} differ too much to share a global scale: vLLM, which fuses them, warns"
        for names in apart
    )


def _layer_tensors(
    name: str, weight: QuantizedWeight, factor: float, kind: str | None
) -> dict[str, Tensor]:
    rows, columns = weight.codes.shape
    if kind == "int-quantized":
        return {
            f"{name}.weight": weight.codes.to(torch.int8),
            f"{name}.weight_scale": weight.scales.contiguous(),
        }
    if kind == "float-quantized":
        codes = weight.codes.to(torch.uint8)
        return {
            f"{name}.weight": codes.view(torch.float8_e4m3fn),
            f"{name}.weight_scale": weight.scales.contiguous(),
        }
    packed = pack(weight)
    if kind != "pack-quantized":
        scales, _ = scale_bytes(weight.scales, weight.scheme.scale_format, factor)
        tensors = {
            f"{name}.weight_packed": torch.from_numpy(packed.codes).reshape(rows, -1),
            f"{name}.weight_scale": scales,
        }
        if weight.scheme.scale_format.tensor_bits:
            tensors[f"{name}.weight_scale"] = scales.view(torch.float8_e4m3fn)
            tensors[f"{name}.weight_global_scale"] = torch.tensor([1 / factor])
        return tensors
    return {
        f"{name}.weight_packed": torch.from_numpy(packed.codes.view("<i4")).reshape(rows, -1),
        f"{name}.weight_scale": weight.scales.contiguous(),
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _config(source: Path, prepared: PreparedExport) -> JsonObject:
    config = source_config(source)
    groups: dict[tuple[str, int, int], list[str]] = {}
    inputs = prepared.activations
    for name, weight in prepared.weights.items():
        kind = compressed_as(weight.bits, weight.scheme, inputs=name in inputs) or ""
        key = (kind, weight.bits, weight.scheme.group_size or 0)
        groups.setdefault(key, []).append(name)
    described = {}
    for k, (key, names) in enumerate(sorted(groups.items())):
        kind, bits, size = key
        described[f"group_{k}"] = {
            "targets": sorted(names),
            "format": kind,
            "input_activations": _described(inputs.get(names[0])),
            "output_activations": None,
            "weights": {
                "num_bits": bits,
                "type": "int" if kind in ("pack-quantized", "int-quantized") else "float",
                "symmetric": True,
                "strategy": _strategy(kind, size),
                "group_size": size or None,
                "dynamic": False,
                "observer": "minmax",
            },
        }
    kinds = sorted({kind for kind, _, _ in groups})
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": kinds[0] if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": unquantized_linear(prepared),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config


def _described(inputs: InputGrid | None) -> JsonObject | None:
    """Return how inputs are quantized; all layers of a plan have the same."""
    if not isinstance(inputs, TokenQuantizer):
        return None
    return {
        "num_bits": inputs.bits,
        "type": "float" if inputs.floats else "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def _strategy(kind: str, size: int) -> str:
    """Return what shares a scale; ``tensor_group`` has a factor for the tensor too."""
    if kind == "nvfp4-pack-quantized":
        return "tensor_group"
    return "group" if size else "channel"


def _group_of_layer(config: JsonObject, name: str) -> JsonObject:
    for group in config["quantization_config"]["config_groups"].values():
        if name in group["targets"]:
            found: JsonObject = group
            return found
    msg = f"layer '{name}' must belong to a group of the written config; it does not"
    raise ExportFailed(msg, layer=name)


def _runtime(config: JsonObject) -> JsonObject:
    from importlib.metadata import version

    groups = config["quantization_config"]["config_groups"].values()
    # compressed-tensors unpacks FP4 into bfloat16, whatever the rest of the model has.
    half = any("fp4" in group["format"] for group in groups)
    return {
        "name": "transformers",
        "version": version("transformers"),
        "options": {"dtype": "bfloat16" if half else "float32"},
        "compressed-tensors": version("compressed-tensors"),
    }
