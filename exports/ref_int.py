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
from bitquota.quantizers.packing import from_packed_tensors, packed_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

FORMAT = "bitquota/ref-int/1"
FILE = "model.safetensors"


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
        own = {}
        for name, weight in prepared.weights.items():
            own[name] = packed_tensors(name, weight)
            tensors |= {stem: torch.from_numpy(data) for stem, data in own[name].items()}
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
            widths = ", ".join(str(part.bits) for _, part in weight.parts())
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=next(iter(own[name]), f"{name}.codes"),
                    stored=f"{widths}-bit codes, {weight.scales.numel()} scales"
                    if weight.bits
                    else "zeros",
                    actual_bits=sum(data.nbytes * 8 for data in own[name].values()),
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
            # Tensors that are not quantized are left in the file.
            held = (name for name in file.keys() if file.get_slice(name).get_dtype() == "U8")  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in held}
            for name, item in described["layers"].items():
                layer = layers[name]
                found[name] = from_packed_tensors(
                    name,
                    tensors,
                    (layer.rows, layer.columns),
                    item["bits"],
                    Scheme.from_json(item["scheme"]),
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
