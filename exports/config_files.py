"""Configuration files for tools that quantize by themselves: one entry per layer, no weights.

Each says what a tool must be told so that it uses the plan's bit-widths. The tools fit their own
scales, so an export report has no tensors and no difference: evaluate what they make.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from bitquota.errors import InvalidInput
from bitquota.exports.export_report import ExportReport, describe_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.prepared import PreparedExport

_OWN_SCALES = "the tool fits its own scales: measure what it makes"


class ConfigFile:
    """Writes one configuration file.

    Args:
        name: What ``--format`` takes.
        summary: One sentence.
        file: Name of the file.
        render: Its text.
    """

    runs_here = False

    def __init__(
        self,
        name: str,
        summary: str,
        file: str,
        render: Callable[[PreparedExport], str],
    ) -> None:
        self.name, self.summary, self.file = name, summary, file
        self._render = render

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the file."""
        path = folder / self.file
        path.write_text(self._render(prepared))
        return ExportReport(
            exporter=self.name,
            target=prepared.target_name,
            plan_digest=prepared.plan.digest(),
            model_digest=prepared.plan.model_digest,
            files=describe_files(folder, [path]),
            tensors=(),
            notes=(_OWN_SCALES,),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Refuse: there are no weights to load."""
        del prepared, folder
        msg = f"'{self.name}' is a configuration for another tool; there is nothing to run"
        raise InvalidInput(msg, format=self.name)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=False) + "\n"


def _group(prepared: PreparedExport, name: str, default: int = -1) -> int:
    return prepared.weights[name].scheme.group_size or default


def _kept(prepared: PreparedExport) -> list[str]:
    """Return the layers of the plan and of the model that stay as they are."""
    import torch

    linear = {n for n, m in prepared.module.named_modules() if isinstance(m, torch.nn.Linear)}
    return sorted((linear | set(prepared.layers)) - set(prepared.weights))


def _most_common(prepared: PreparedExport) -> int:
    sizes: dict[int, int] = {}
    for name, weight in prepared.weights.items():
        sizes[weight.bits] = sizes.get(weight.bits, 0) + prepared.layers[name].n_weights
    return max(sizes, key=lambda bits: (sizes[bits], -bits))


def gptq_section(prepared: PreparedExport) -> JsonObject:
    """Return what GPTQModel is told of each layer.

    Rules of ``dynamic``: ``+:`` overrides, ``-:`` leaves out, both anchored.
    """
    common = _most_common(prepared)
    dynamic: JsonObject = {}
    for name, weight in prepared.weights.items():
        if weight.bits != common:
            settings = {"bits": weight.bits, "group_size": _group(prepared, name), "sym": True}
            dynamic[f"+:^{re.escape(name)}$"] = settings
    for name in _kept(prepared):
        dynamic[f"-:^{re.escape(name)}$"] = {}
    first = next(iter(prepared.weights))
    return {
        "bits": common,
        "group_size": _group(prepared, first),
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "dynamic": dynamic,
    }


def _gptqmodel(prepared: PreparedExport) -> str:
    return _json(gptq_section(prepared))


def _autoround(prepared: PreparedExport) -> str:
    layers: JsonObject = {
        name: {"bits": w.bits, "group_size": _group(prepared, name), "sym": w.zero_points is None}
        for name, w in prepared.weights.items()
    }
    layers |= {name: {"bits": 16, "data_type": "fp"} for name in _kept(prepared)}
    return _json({"layer_config": layers})


def _llm_compressor(prepared: PreparedExport) -> str:
    """Return a recipe; written as JSON, which is YAML too."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, weight in prepared.weights.items():
        groups.setdefault((weight.bits, _group(prepared, name, 0)), []).append(name)
    described = {}
    for k, ((bits, size), names) in enumerate(sorted(groups.items())):
        described[f"group_{k}"] = {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if size else "channel",
                "group_size": size or None,
            },
        }
    modifier = {"config_groups": described, "ignore": _kept(prepared)}
    return _json({"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}})


def _torchao(prepared: PreparedExport) -> str:
    """Return arguments of ``FqnToConfig``: module name to configuration; ``None`` skips."""
    entries: dict[str, Any] = {}
    for name, weight in prepared.weights.items():
        size = weight.scheme.group_size
        granularity: JsonObject = {"_type": "PerAxis", "axis": 0}
        if size:
            granularity = {"_type": "PerGroup", "group_size": size}
        entries[name] = {
            "_type": "IntxWeightOnlyConfig",
            "weight_dtype": f"torch.int{weight.bits}",
            "granularity": granularity,
        }
    entries["_default"] = None
    return _json({"_type": "FqnToConfig", "fqn_to_config": entries, "filter_fn": None})


def mlx_section(prepared: PreparedExport) -> JsonObject:
    """Return ``quantization`` of an MLX model's config: what most weights have, and each module."""
    common = _most_common(prepared)
    section: JsonObject = {"group_size": 64, "bits": common}
    for name, weight in prepared.weights.items():
        section[name] = {"bits": weight.bits, "group_size": _group(prepared, name, 64)}
    for name in _kept(prepared):
        section[name] = False
    return {"quantization": section}


def _coreml(prepared: PreparedExport) -> str:
    configs: JsonObject = {
        name: {
            "_type": "OpLinearQuantizerConfig",
            "mode": "linear_symmetric",
            "dtype": f"int{weight.bits}",
            "granularity": "per_block" if weight.scheme.group_size else "per_channel",
            "block_size": weight.scheme.group_size or 0,
        }
        for name, weight in prepared.weights.items()
    }
    configs |= dict.fromkeys(_kept(prepared))
    return _json({"op_name_configs": configs, "global_config": None})


CONFIG_FILES = (
    ConfigFile(
        "gptqmodel-config",
        "A quantize_config.json with GPTQModel's 'dynamic' rules.",
        "quantize_config.json",
        _gptqmodel,
    ),
    ConfigFile(
        "autoround-config",
        "AutoRound's 'layer_config'.",
        "layer_config.json",
        _autoround,
    ),
    ConfigFile(
        "llm-compressor-recipe",
        "A recipe for llm-compressor's QuantizationModifier.",
        "recipe.yaml",
        _llm_compressor,
    ),
    ConfigFile(
        "torchao-config",
        "Arguments of torchao's FqnToConfig.",
        "torchao_config.json",
        _torchao,
    ),
    ConfigFile(
        "mlx-config",
        "The 'quantization' section of an MLX model's config.json.",
        "mlx_quantization.json",
        lambda prepared: _json(mlx_section(prepared)),
    ),
    ConfigFile(
        "coreml-config",
        "An 'op_name_configs' table for coremltools.",
        "coreml_config.json",
        _coreml,
    ),
)
