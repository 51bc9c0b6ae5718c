"""``ref-int``: packed integers of any width in one safetensors file, read back by torch."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Scheme
from bitquota.canonical import canonical_json
from bitquota.errors import ExportFailed
from bitquota.models.layout import from_matrix
from bitquota.quantizers.packing import PackedWeight, pack, unpack

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

FORMAT = "bitquota/ref-int/1"
FILE = "model.safetensors"
_PARTS = ("codes", "scales", "zero_points")


class RefInt:
    """Writes ``LAYER.codes``, ``LAYER.scales`` and ``LAYER.zero_points`` as bytes.

    The bytes are those of ``bitquota.quantizers.packing``; every other tensor keeps its name and
    type. What a layer's bytes mean stands in the metadata of the file.
    """

    name = "ref-int"
    summary = "Packed integers in safetensors, any width, any layer; read back by bitquota."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write ``model.safetensors``, read it back, run it."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        described = {}
        for name, weight in prepared.weights.items():
            packed = pack(weight)
            for part in _PARTS:
                data = getattr(packed, part)
                if len(data):
                    tensors[f"{name}.{part}"] = torch.from_numpy(data)
            described[name] = {"bits": weight.bits, "scheme": weight.scheme.to_json()}
        for name, tensor in prepared.unquantized_tensors().items():
            tensors[name] = tensor.detach().cpu().contiguous()
        # One member only: safetensors does not keep the order of several.
        metadata = canonical_json({"format": FORMAT, "layers": described})
        path = folder / FILE
        save_file(tensors, path, metadata={"bitquota": metadata})
        stored = read_ref_int(path, prepared.layers)

        # Every weight must read back as it was packed.
        reports = []
        for name, weight in prepared.weights.items():
            if not same_weight(weight, stored[name]):
                msg = f"layer '{name}' does not read back as it was written"
                raise ExportFailed(msg, layer=name)
            parts = [f"{name}.{part}" for part in _PARTS]
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=f"{name}.codes",
                    stored=f"{weight.bits}-bit codes, {weight.scales.numel()} scales",
                    actual_bits=sum(tensors[p].nbytes * 8 for p in parts if p in tensors),
                )
            )
        held = sum(t.nbytes for t in tensors.values())
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            [path],
            reports,
            held_bytes=held,
            runtime={"name": "torch", "version": torch.__version__, "options": {}},
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return a copy of the model with everything read from the files."""
        from safetensors import safe_open

        module = copy.deepcopy(prepared.module)
        state = module.state_dict()
        stored = read_ref_int(folder / FILE, prepared.layers)
        with torch.no_grad(), safe_open(str(folder / FILE), framework="pt") as file:
            held = set(file.keys())
            for name, tensor in state.items():
                if name in held:
                    tensor.copy_(file.get_tensor(name))
            for name, weight in stored.items():
                layer = prepared.layers[name]
                state[layer.weight_name].copy_(from_matrix(weight.dequantize(), layer))
        return module


def read_ref_int(path: Path, layers: dict[str, Layer]) -> dict[str, QuantizedWeight]:
    """Return the integer weights of a ``ref-int`` file.

    Raises:
        ExportFailed: Not such a file, or a layer that the plan does not have.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            described = json.loads((file.metadata() or {})["bitquota"])
            if described["format"] != FORMAT:
                msg = f"'{path.name}' must be of format '{FORMAT}'; got {described['format']!r}"
                raise ExportFailed(msg)
            held = set(file.keys())
            for name, item in described["layers"].items():
                parts = {
                    part: file.get_tensor(f"{name}.{part}")
                    for part in _PARTS
                    if f"{name}.{part}" in held
                }
                parts.setdefault("zero_points", parts["codes"][:0])
                found[name] = unpack(
                    PackedWeight(
                        **parts,
                        rows=layers[name].rows,
                        columns=layers[name].columns,
                        bits=item["bits"],
                        scheme=Scheme.from_json(item["scheme"]),
                    )
                )
    except (SafetensorError, KeyError, ValueError, OSError) as err:
        msg = f"'{path.name}' must be a whole ref-int file of this plan; reading it failed: {err!r}"
        raise ExportFailed(msg) from err
    return found


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether codes, scales and zero points are all equal."""
    if (a.zero_points is None) != (b.zero_points is None):
        return False
    pairs = [(a.codes.int(), b.codes.int()), (a.scales, b.scales)]
    if a.zero_points is not None and b.zero_points is not None:
        pairs.append((a.zero_points.int(), b.zero_points.int()))
    return all(torch.equal(x, y) for x, y in pairs)
