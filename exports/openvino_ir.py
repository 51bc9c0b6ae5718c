"""OpenVINO IR with compressed constants of 2, 4 and 8 bits, run by OpenVINO on the CPU.

Design: docs/design/targets.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity
from bitquota.errors import ExportFailed, MissingDependency
from bitquota.exports.onnx_qdq import OPSET, float_graph
from bitquota.models.layout import TRANSPOSED_CONVOLUTIONS, from_matrix
from bitquota.models.onnx.program import source_of
from bitquota.quantizers.packing import pack_bits

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.exports.export_report import ExportedTensor, ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.models.onnx.program import OnnxSource
    from bitquota.quantizers.weights import QuantizedWeight

XML, BIN = "model.xml", "model.bin"
OPTIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
"""By default activations are quantized on the fly and products run in bf16."""

_SUFFIX = ".codes"


class OpenvinoIr:
    """Writes ``model.xml`` and ``model.bin``.

    Codes are i4 and i8, and u2 with the zero point 2 (OpenVINO has no signed 2-bit type).
    """

    name = "openvino"
    summary = "OpenVINO IR with constants of 2, 4 and 8 bits, run by OpenVINO."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the files, read types and bytes back, run them."""
        ov = import_openvino()
        graph = float_graph(prepared, OPSET)
        initializer_of, prepared = graph.initializer_of, prepared.without(graph.unused)
        model = ov.Core().read_model(graph.model.SerializeToString(), b"")
        put_integers(ov, model, prepared, initializer_of)
        ov.save_model(model, str(folder / XML), compress_to_fp16=False)
        reports, held = read_back(ov, folder / XML, prepared, initializer_of)
        files = [folder / XML, folder / BIN]
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            files,
            reports,
            held_bytes=held,
            runtime={"name": "openvino", "version": ov.__version__, "options": dict(OPTIONS)},
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the files as a module that runs in OpenVINO."""
        return OpenvinoFile(folder / XML, source_of(prepared.module))


def put_integers(
    ov: Any,  # noqa: ANN401  # a module
    model: Any,  # noqa: ANN401  # openvino.Model
    prepared: PreparedExport,
    initializer_of: dict[str, str],
    turned: frozenset[str] = frozenset(),
) -> None:
    """Put integers and their dequantization in the place of every weight of ``model``.

    Args:
        ov: The package.
        model: Read from an ONNX graph.
        prepared: The plan.
        initializer_of: The constant of each layer's weight.
        turned: Linear layers and embeddings whose constants are ``[columns, rows]``.

    Raises:
        ExportFailed: A weight is no constant of the model.
    """
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    for name, weight in prepared.weights.items():
        initializer, layer = initializer_of[name], prepared.layers[name]
        if initializer not in constants:
            msg = f"OpenVINO must read the weight of layer '{name}' as a constant"
            raise ExportFailed(msg, layer=name)
        if name in turned:
            shape = (layer.columns, layer.rows)
            layer = replace(layer, kind=LayerKind.LINEAR_TRANSPOSED, weight_shape=shape)
        parts = _constants(ov, initializer, layer, weight)
        kind = constants[initializer].get_element_type()
        # One product per reader, so that each can be fused with what reads it.
        for reader in constants[initializer].output(0).get_target_inputs():
            made = _dequantized(ov, parts, kind, layer.weight_shape)
            reader.replace_source_output(made.output(0))


def read_back(
    ov: Any,  # noqa: ANN401  # a module
    path: Path,
    prepared: PreparedExport,
    initializer_of: dict[str, str],
) -> tuple[list[ExportedTensor], int]:
    """Return what a written IR holds for each layer, and the bytes of all its constants."""
    stored = {
        node.get_friendly_name(): node
        for node in ov.Core().read_model(str(path)).get_ops()
        if node.get_type_name() == "Constant"
    }
    reports = []
    for name in prepared.weights:
        parts = [f"{initializer_of[name]}{suffix}" for suffix in (_SUFFIX, ".scales")]
        if missing := [part for part in parts if part not in stored]:
            msg = f"the written IR must hold '{missing[0]}'; it does not"
            raise ExportFailed(msg, layer=name)
        bits = 8 * sum(int(stored[part].get_byte_size()) for part in parts)
        kind = stored[parts[0]].get_element_type().get_type_name()
        reports.append(
            prepared.exported_tensor(name, tensor=parts[0], stored=kind, actual_bits=bits)
        )
    return reports, sum(int(node.get_byte_size()) for node in stored.values())


class OpenvinoFile(nn.Module):
    """An IR compiled for the CPU with the options of its report.

    Args:
        path: The ``.xml``.
        source: The ONNX graph that it was made of, if it was one (as of ``OnnxFile``).
    """

    def __init__(self, path: Path, source: OnnxSource | None = None) -> None:
        super().__init__()
        self._source = source
        ov = import_openvino()
        try:
            self._compiled = ov.Core().compile_model(str(path), "CPU", dict(OPTIONS))
        except RuntimeError as err:
            msg = f"OpenVINO must compile the exported files; it says: {err}"
            raise ExportFailed(msg) from err

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the files."""
        if self._source is not None:
            wanted = self._compiled.output(self._source.output)
            # The arrays of a result belong to the compiled model, which overwrites them.
            parts = [np.array(self._compiled(p)[wanted]) for p in self._source.pieces(inputs)]
            return torch.from_numpy(np.concatenate(parts)[: len(inputs[0])].astype(np.float32))
        results = self._compiled([tensor.detach().cpu().numpy() for tensor in inputs])
        return torch.from_numpy(np.array(results[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The constants of one weight.

    Attributes:
        codes: In ``shape``, or flat.
        zero_point: Of codes without a sign.
        scales: One for each output channel, in a shape that meets ``shape``.
        shape: In which codes and scales are multiplied.
    """

    codes: Any
    zero_point: Any | None
    scales: Any
    shape: tuple[int, ...]


def _constants(ov: Any, name: str, layer: Layer, weight: QuantizedWeight) -> _Parts:  # noqa: ANN401
    """Return the constants that stand for ``weight``."""
    codes = _split(from_matrix(weight.codes.int(), layer).cpu().numpy(), layer)
    kind = {2: ov.Type.u2, 4: ov.Type.i4, 8: ov.Type.i8}[weight.bits]
    # A tensor over a numpy array does not own its memory; one made by shape does.
    flat = _misread(layer, weight)
    tensor = ov.Tensor(kind, ov.Shape([codes.size] if flat else codes.shape))
    packed = _packed(codes, weight.bits)
    tensor.data.reshape(-1).view(np.uint8)[: len(packed)] = packed
    constant = ov.op.Constant(tensor)
    constant.set_friendly_name(name + _SUFFIX)
    zero = None
    if weight.bits == 2:
        zero = ov.opset13.constant(np.float32(2.0))
        zero.set_friendly_name(f"{name}.zero_point")
    scales = weight.scales.float().cpu().numpy().reshape(_scale_shape(layer, weight, codes.shape))
    scale = ov.opset13.constant(scales)
    scale.set_friendly_name(f"{name}.scales")
    return _Parts(codes=constant, zero_point=zero, scales=scale, shape=codes.shape)


def _dequantized(ov: Any, parts: _Parts, kind: Any, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    """Return a node for ``(codes - zero point) * scale``, of type ``kind`` and in ``shape``."""
    make = ov.opset13
    value = make.convert(parts.codes, "f32")
    if tuple(parts.codes.get_output_shape(0)) != parts.shape:
        value = make.reshape(value, np.array(parts.shape), special_zero=False)
    if parts.zero_point is not None:
        value = make.subtract(value, parts.zero_point)
    value = make.multiply(value, parts.scales)
    if parts.shape != shape:
        value = make.reshape(value, np.array(shape), special_zero=False)
    return value if kind == ov.Type.f32 else make.convert(value, kind.get_type_name())


def _misread(layer: Layer, weight: QuantizedWeight) -> bool:
    """Whether OpenVINO would read the codes wrongly as a matrix.

    Its matrix products on compressed weights (2026.4, from five samples on) take the codes of an
    output channel to start at a byte; the result is wrong without an error. Codes stored flat are
    widened when the model is compiled instead.
    """
    return len(layer.weight_shape) == 2 and layer.columns * weight.bits % 8 != 0


def _packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        flat: NDArray[np.uint8] = codes.astype(np.int8).view(np.uint8).reshape(-1)
        return flat
    # i4 is two's complement, u2 is shifted.
    unsigned = codes + 2 if bits == 2 else codes & 15
    return pack_bits(unsigned.astype(np.uint16).reshape(1, -1), bits)


def _split(codes: NDArray[Any], layer: Layer) -> NDArray[Any]:
    """Return the codes with an axis for the groups of a transposed convolution.

    Its output channels lie on two axes, ``[groups, in, out, ...]``.
    """
    if layer.kind not in TRANSPOSED_CONVOLUTIONS:
        return codes
    groups = layer.rows // codes.shape[1]
    return codes.reshape(groups, -1, *codes.shape[1:])


def _scale_shape(layer: Layer, weight: QuantizedWeight, shape: tuple[int, ...]) -> list[int]:
    """Return the shape in which scales meet codes of ``shape``."""
    axes = {0}
    if weight.scheme.granularity is Granularity.TENSOR:
        axes = set()
    elif layer.kind is LayerKind.LINEAR_TRANSPOSED:
        axes = {1}
    elif layer.kind in TRANSPOSED_CONVOLUTIONS:
        axes = {0, 2}
    return [n if axis in axes else 1 for axis, n in enumerate(shape)]


def import_openvino() -> Any:  # noqa: ANN401  # a module
    """Return the package; raises ``MissingDependency`` that names the extra."""
    try:
        import openvino
    except ImportError as err:
        msg = "an OpenVINO export needs openvino; install it with: pip install bitquota[exports]"
        raise MissingDependency(msg) from err
    return openvino
