"""``ref-int``: packed integers of any width in one safetensors file, read back by torch."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.candidates.storage import Scheme, order_bits
from bitquota.canonical import canonical_json
from bitquota.errors import ExportFailed
from bitquota.models.layout import from_matrix
from bitquota.quantizers.packing import PackedWeight, pack, unpack
from bitquota.quantizers.weights import QuantizedWeight

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport

FORMAT = "bitquota/ref-int/1"
FILE = "model.safetensors"
_PARTS = ("codes", "scales", "zero_points")


class RefInt:
    """Writes ``LAYER.codes``, ``LAYER.scales`` and ``LAYER.zero_points`` as bytes.

    Of a layer whose rows have several bit-widths it writes these for each part (``LAYER.w2.codes``)
    and the rows of all parts, one after the other, as ``LAYER.order``; of a layer of zeros nothing.

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
            for stem, part in _stems(name, weight):
                packed = pack(part)
                for what in _PARTS:
                    data = getattr(packed, what)
                    if len(data):
                        tensors[f"{stem}.{what}"] = torch.from_numpy(data)
            if weight.scheme.row_bits:
                kind = np.dtype(f"<u{order_bits(len(weight.codes)) // 8}")
                order = weight.order().numpy().astype(kind).view(np.uint8)
                tensors[f"{name}.order"] = torch.from_numpy(order)
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
            stems = _stems(name, weight)
            parts = [f"{stem}.{part}" for stem, _ in stems for part in _PARTS]
            parts.append(f"{name}.order")
            widths = ", ".join(str(part.bits) for _, part in stems)
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=f"{stems[0][0]}.codes",
                    stored=f"{widths}-bit codes, {weight.scales.numel()} scales"
                    if weight.bits
                    else "zeros",
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

            def read(
                stem: str, rows: int, columns: int, bits: int, scheme: Scheme
            ) -> QuantizedWeight:
                parts = {
                    part: file.get_tensor(f"{stem}.{part}")
                    for part in _PARTS
                    if f"{stem}.{part}" in held
                }
                for part in _PARTS:  # of pruned layers nothing is stored
                    parts.setdefault(part, np.zeros(0, dtype=np.uint8))
                return unpack(
                    PackedWeight(**parts, rows=rows, columns=columns, bits=bits, scheme=scheme)
                )

            for name, item in described["layers"].items():
                scheme, layer = Scheme.from_json(item["scheme"]), layers[name]
                if not scheme.row_bits:
                    found[name] = read(name, layer.rows, layer.columns, item["bits"], scheme)
                    continue
                kind = f"<u{order_bits(layer.rows) // 8}"
                order = file.get_tensor(f"{name}.order").view(kind).astype(np.int64)
                counts = [
                    (bits, scheme.row_bits.count(bits)) for bits in sorted(set(scheme.row_bits))
                ]
                places = torch.split(torch.from_numpy(order), [n for _, n in counts])
                found[name] = QuantizedWeight.of_parts(
                    [
                        (rows, read(f"{name}.w{bits}", n, layer.columns, bits, scheme.of_parts))
                        for rows, (bits, n) in zip(places, counts, strict=True)
                    ],
                    scheme,
                )
    except (SafetensorError, KeyError, ValueError, OSError) as err:
        msg = f"'{path.name}' must be a whole ref-int file of this plan; reading it failed: {err!r}"
        raise ExportFailed(msg) from err
    return found


def _stems(name: str, weight: QuantizedWeight) -> list[tuple[str, QuantizedWeight]]:
    """Return the parts of a weight, and what the names of their tensors begin with."""
    parts = [part for _, part in weight.parts()]
    return [(name, weight)] if len(parts) == 1 else [(f"{name}.w{p.bits}", p) for p in parts]


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether codes, scales and zero points are all equal."""
    if (a.zero_points is None) != (b.zero_points is None):
        return False
    pairs = [(a.codes.int(), b.codes.int()), (a.scales, b.scales)]
    if a.zero_points is not None and b.zero_points is not None:
        pairs.append((a.zero_points.int(), b.zero_points.int()))
    return all(torch.equal(x, y) for x, y in pairs)
