"""GPTQ checkpoints: a Hugging Face folder that vLLM and GPTQModel load.

Each linear layer has ``qweight``, its codes in 32-bit words along the inputs, ``scales`` and
``qzeros`` of each group, and ``g_idx``, the group of each input. Layers with another width than
most have a rule in ``dynamic``. Codes and scales are the plan's own; every zero point is the middle
code, which the first version of the format stores less one.

References:
    [GPTQModel] ModelCloud, github.com/ModelCloud/GPTQModel, release 7.7: nn_modules/qlinear.

Design: docs/design/targets.md
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bitquota
from bitquota.exports.config_files import gptq_section
from bitquota.exports.hugging_face_folder import (
    copy_other_files,
    read_model,
    source_config,
    source_folder,
    stored_sizes,
    write_json,
    write_model,
)
from bitquota.quantizers.packing import pack

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight


class GptqFolder:
    """Writes packed codes, scales and constant zero points, and ``quantization_config``.

    Files are read back and run by torch: kernels for them come with vLLM and GPTQModel.
    """

    name = "gptq"
    summary = "A GPTQ checkpoint for vLLM and GPTQModel: packed codes, mixed per module."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every tensor back and run it."""
        source = source_folder(prepared.model, "gptq")

        path = write_model(prepared, folder, _layer_tensors)
        described = source_config(source)
        described["quantization_config"] = gptq_section(prepared) | {
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"bitquota:{bitquota.__version__}"]},
        }
        paths = [path, write_json(folder / "config.json", described)]
        paths += copy_other_files(source, folder)

        # Read back what was written.
        sizes = stored_sizes(path)
        reports = [
            prepared.exported_tensor(
                name,
                tensor=f"{name}.qweight",
                stored=f"gptq, {weight.bits} bits, {_groups_of(weight)}",
                actual_bits=8 * (sizes[f"{name}.qweight"] + sizes[f"{name}.scales"]),
            )
            for name, weight in prepared.weights.items()
        ]
        constant = sum(sizes[f"{n}.qzeros"] + sizes[f"{n}.g_idx"] for n in prepared.weights)
        note = (
            f"qzeros and g_idx say the same for every plan; their {constant:,} bytes and the "
            "file's header are counted as container"
        )
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            paths,
            reports,
            held_bytes=sum(sizes.values()) - constant,
            runtime={"name": "bitquota", "version": bitquota.__version__},
            weight_files=[path],
            notes=(note,),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the model with the weights that the file holds, in float32."""
        return read_model(prepared, folder, partial(_weight, prepared.weights))


def _groups_of(weight: QuantizedWeight) -> str:
    size = weight.scheme.group_size
    return f"groups of {size}" if size else "per channel"


def _layer_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    rows, columns = weight.codes.shape
    size = weight.scheme.group_size or columns
    words = torch.from_numpy(pack(weight).codes.view("<i4").reshape(rows, -1))
    middle = np.full(rows, 2 ** (weight.bits - 1) - 1, np.uint8)
    zeros = np.unpackbits(middle[:, None], axis=1, count=weight.bits, bitorder="little")
    line = np.packbits(zeros.reshape(-1), bitorder="little").view("<i4")
    return {
        f"{name}.qweight": words.t().contiguous(),
        f"{name}.qzeros": torch.from_numpy(line).repeat(columns // size, 1),
        f"{name}.scales": weight.scales.reshape(rows, -1).t().contiguous(),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def _weight(
    weights: Mapping[str, QuantizedWeight],
    file: Any,  # noqa: ANN401  # safetensors' file
    name: str,
) -> Tensor:
    """Return f32[rows, columns] out of a layer's tensors."""
    part: dict[str, Tensor] = {
        key: file.get_tensor(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")
    }
    bits = weights[name].bits
    codes = _codes(part["qweight"].t().contiguous(), bits)  # [rows, columns]
    zeros = _codes(part["qzeros"], bits).t() + 1  # [rows, groups]
    group = part["g_idx"].long()
    return (codes - zeros[:, group]).float() * part["scales"].t().float()[:, group]


def _codes(words: Tensor, bits: int) -> Tensor:
    """Return i32[lines, n] out of 32-bit words of ``[lines, n bits / 32]``."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    parts = stream.reshape(len(words), -1, bits).astype(np.int32) << np.arange(bits)
    return torch.from_numpy(parts.sum(axis=2, dtype=np.int32))
