"""MLX: a Hugging Face folder whose codes, scales and biases mlx-lm loads as they are.

MLX stores ``w = scale q + bias`` in groups of 32, 64 or 128, codes in rows of 32-bit words, each
code behind the bits of the one before it: the grid with offsets, packed as our own files are.

References:
    ml-explore/mlx: mlx/ops.cpp (quantize), python/mlx/nn/layers/quantized.py
    ml-explore/mlx-lm: mlx_lm/utils.py (load_model)

Design: docs/design/targets.md
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.errors import ExportFailed, MissingDependency
from bitquota.exports.config_files import mlx_section
from bitquota.exports.hugging_face_folder import (
    copy_other_files,
    source_config,
    source_folder,
    stored_sizes,
    write_json,
    write_model,
)
from bitquota.quantizers.packing import pack

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

_PARTS = ("weight", "scales", "biases")
MISSING = "MLX did not run the files: pip install bitquota[mlx]"
_NOTES = ("compared in float32 (set_dtype); MLX itself computes in the type of the file's tensors",)


class MlxFolder:
    """Writes codes, scales and biases of each layer, and the section ``quantization``.

    The files are run by mlx-lm in float32; what MLX computes in the files' own type is in the
    report too. Without MLX the folder is read back, and the report says that nothing ran it.
    """

    name = "mlx"
    summary = "A Hugging Face folder for mlx-lm: packed codes, scales and biases, mixed per module."

    @property
    def runs_here(self) -> bool:
        """Whether mlx-lm is there."""
        return importlib.util.find_spec("mlx_lm") is not None

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every size back, load it with mlx-lm and run it."""
        source = source_folder(prepared.model, "mlx")

        # Packed weights, the other tensors, the config and what else the source folder holds.
        path = write_model(prepared, folder, _layer_tensors, kind="mlx")
        paths = [path, write_json(folder / "config.json", _config(source, prepared))]
        paths += copy_other_files(source, folder)

        # Read back what was written.
        sizes = stored_sizes(path)
        reports = [
            prepared.exported_tensor(
                name,
                tensor=f"{name}.weight",
                stored=f"affine, {weight.bits} bits, groups of {weight.scheme.group_size}",
                actual_bits=8 * sum(sizes[f"{name}.{part}"] for part in _PARTS),
            )
            for name, weight in prepared.weights.items()
        ]
        # Run it, in float32 and as it is.
        module, runtime, notes = None, {"name": "nothing"}, (MISSING,)
        if self.runs_here:
            module, notes = _Mlx(folder), _NOTES
            own = prepared.difference(_Mlx(folder, in_float32=False))
            runtime = _runtime(None if own is None else own.relative)
        return prepared.report(
            self.name,
            module,
            folder,
            paths,
            reports,
            held_bytes=sum(sizes.values()),
            runtime=runtime,
            weight_files=[path],
            notes=notes,
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Load the folder with mlx-lm, as a user would, but computing in float32."""
        del prepared
        return _Mlx(folder)


class _Mlx(torch.nn.Module):
    """A folder in mlx-lm, on the processor: takes tokens and returns logits as torch does.

    Args:
        folder: What ``export`` wrote.
        in_float32: Whether scales, biases and other tensors are widened first, so that MLX computes
            in float32; else in the types of the file.

    Raises:
        MissingDependency: mlx-lm is not installed, or finds no library to compute with.
        ExportFailed: mlx-lm does not load the folder.
    """

    def __init__(self, folder: Path, *, in_float32: bool = True) -> None:
        super().__init__()
        try:
            import mlx.core as mx
            from mlx_lm.utils import load_model
        except ImportError as err:
            msg = f"MLX files need mlx-lm ({err}); install it with: pip install bitquota[mlx]"
            raise MissingDependency(msg) from err
        mx.disable_compile()  # on the processor it starts a C++ compiler
        mx.set_default_device(mx.cpu)
        try:
            self._model, _ = load_model(folder)
        except Exception as err:  # whatever mlx-lm raises, the folder did not load
            msg = f"mlx-lm must load the exported folder; it says: {err}"
            raise ExportFailed(msg) from err
        if in_float32:
            self._model.set_dtype(mx.float32)
        self._mx = mx

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits, zero where ``mask`` is; a mask may leave out the ends of windows only."""
        found = self._model(self._mx.array(tokens.numpy())).astype(self._mx.float32)
        logits = torch.from_numpy(np.array(found))
        return logits if mask is None else logits * mask[..., None].to(logits.dtype)


def _layer_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    rows = len(weight.codes)
    words = torch.from_numpy(pack(weight).codes.view("<u4").reshape(rows, -1))
    scales, biases = weight.scales.reshape(rows, -1, 2).unbind(2)
    parts = (words, scales.contiguous(), biases.contiguous())
    return {f"{name}.{part}": tensor for part, tensor in zip(_PARTS, parts, strict=True)}


def _config(source: Path, prepared: PreparedExport) -> JsonObject:
    """Return the source's config with the section, and rotary positions as mlx-lm reads them."""
    config = source_config(source)
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope.pop("rope_theta"))
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    return config | mlx_section(prepared)


def _runtime(in_own_type: float | None) -> JsonObject:
    from importlib.metadata import version

    return {
        "name": "mlx-lm",
        "version": version("mlx-lm"),
        "mlx": version("mlx"),
        "options": {"dtype": "float32"},
        "relative_in_own_type": in_own_type,
    }
