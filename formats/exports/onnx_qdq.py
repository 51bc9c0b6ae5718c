"""ONNX with quantized initializers: DequantizeLinear in front of the layers' weights.

The graph is the user's own file, or what ``torch.onnx.export`` makes of the module; only weights
are replaced. Types are int2 (opset 25), int4 (opset 21), int8 and int16, unsigned with zero points
on asymmetric grids. ONNX Runtime turns blocked matrix products into MatMulNBits.
"""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bitquota.candidates import LayerKind
from bitquota.errors import ExportFailed, InvalidInput, InvalidPlan, MissingDependency
from bitquota.formats.exports.onnx_tidy import absorb_batch_norms, fold_constants, shorten_names
from bitquota.formats.exports.prepared import widths_must_be
from bitquota.formats.onnx_model import OnnxModule, import_onnxruntime, read_onnx
from bitquota.formats.receipt import Receipt, describe_files
from bitquota.quantizers.layout import TRANSPOSED_CONVOLUTIONS, from_matrix
from bitquota.storage import Granularity, ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bitquota.candidates import Layer
    from bitquota.canonical import JsonObject
    from bitquota.formats.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

FILE = "model.onnx"
OPSET = 21
OPSET_2_BITS = 25
WIDTHS = (2, 4, 8, 16)
SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""At its default level 4 ONNX Runtime quantizes the activations of matrix products to int8."""


class OnnxQdq:
    """Writes ``model.onnx`` with weights as 2, 4, 8 or 16-bit initializers."""

    name = "onnx-qdq"
    summary = "ONNX with quantized weights and DequantizeLinear, run by ONNX Runtime."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> Receipt:
        """Write the file, read every code back, run it in ONNX Runtime."""
        widths_must_be(prepared, WIDTHS, "ONNX")
        two_bits = any(w.bits == 2 for w in prepared.weights.values())
        model, initializer_of = float_graph(prepared, OPSET_2_BITS if two_bits else OPSET)
        weights = prepared.weights
        traced = not isinstance(prepared.module, OnnxModule)
        if traced:
            weights = absorb_batch_norms(model, weights, prepared.layers, initializer_of)
        editor = _Editor(model)
        for name, weight in weights.items():
            editor.quantize(initializer_of[name], prepared.layers[name], weight)
        model = editor.finish()
        if traced:
            shorten_names(model.graph)
        path = folder / FILE
        path.write_bytes(model.SerializeToString(deterministic=True))
        sizes = _read_back(path, prepared, editor.names)
        receipts = tuple(
            prepared.tensor_receipt(
                name,
                tensor=editor.names[initializer_of[name]][0],
                stored=stored,
                actual_bits=bits,
            )
            for name, (stored, bits) in sizes.items()
        )
        payload = sum(r.actual_bits for r in receipts)
        held = sum(_nbytes(t) for t in read_onnx(path).graph.initializer)
        return Receipt(
            exporter=self.name,
            target=prepared.target_name,
            plan_digest=prepared.plan.digest(),
            model_digest=prepared.plan.model_digest,
            files=describe_files(folder, [path]),
            tensors=receipts,
            unquantized_bits=held * 8 - payload,
            planned_unquantized_bits=prepared.planned_rest_bits,
            container_bytes=path.stat().st_size - held,
            difference=prepared.difference(self.load(prepared, folder)),
            runtime=runtime(),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the file as a module that runs in ONNX Runtime."""
        del prepared
        return OnnxFile(folder / FILE)


class OnnxFile(nn.Module):
    """An ONNX file run as it is, with the session options of the receipt."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        for key, value in SESSION_OPTIONS.items():
            options.add_session_config_entry(key, value)
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # onnxruntime raises its own kinds
            msg = f"ONNX Runtime must run the exported file; it says: {err}"
            raise ExportFailed(msg) from err
        self._types = {
            "tensor(float)": np.float32,
            "tensor(int64)": np.int64,
            "tensor(int32)": np.int32,
            "tensor(float16)": np.float16,
        }

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the file."""
        feed = {
            given.name: tensor.detach().cpu().numpy().astype(self._types[given.type])
            for given, tensor in zip(self._session.get_inputs(), inputs, strict=True)
        }
        return torch.from_numpy(self._session.run(None, feed)[0])


def float_graph(prepared: PreparedExport, opset: int) -> tuple[Any, dict[str, str]]:
    """Return the graph with the corrected weights in floating point, and each layer's initializer.

    Raises:
        InvalidInput: The model is no ONNX file and there is no sample to trace it with.
        ExportFailed: torch cannot express the model in ONNX, or a weight got lost on the way.
    """
    if isinstance(prepared.module, OnnxModule):
        model = read_onnx(Path(prepared.model.source))
        initializer_of = {la.name: la.initializer for la in prepared.module.layers}
        _write_back(model, prepared.module)
    else:
        model = _trace(prepared)
        held = {t.name for t in model.graph.initializer}
        initializer_of = {}
        for name, layer in prepared.layers.items():
            names = [n for n in (layer.weight_name, *layer.aliases) if n in held]
            if names:
                initializer_of[name] = names[0]
    if lost := sorted(set(prepared.weights) - set(initializer_of)):
        msg = f"every planned weight must be an initializer of the ONNX graph; {lost[0]} is not"
        raise ExportFailed(msg, layers=lost)
    return at_opset(model, opset), initializer_of


def at_opset(model: Any, opset: int) -> Any:  # noqa: ANN401  # onnx.ModelProto
    """Return ``model`` at ``opset`` or above."""
    import onnx

    current = next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
    if current >= opset:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the converter raises RuntimeError and others
        msg = f"the graph cannot be converted from opset {current} to {opset}: {err}"
        raise ExportFailed(msg, opset=opset) from err
    return converted


def runtime() -> JsonObject:
    """Return what runs ONNX files here, and with which options."""
    ort = import_onnxruntime()
    return {"name": "onnxruntime", "version": ort.__version__, "options": dict(SESSION_OPTIONS)}


class _Editor:
    """Replaces float initializers of one graph by integers and DequantizeLinear nodes."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
        self.model = model
        self.graph = model.graph
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.new_nodes: list[Any] = []
        self.removed: set[str] = set()
        self.names: dict[str, tuple[str, ...]] = {}
        self._fold_shapes()

    def quantize(self, initializer: str, layer: Layer, weight: QuantizedWeight) -> None:
        """Store ``weight`` instead of ``initializer``."""
        codes, scales, zeros, axis, block, steps = _arrange(layer, weight)
        output = initializer
        transposes = self._only_transposes(initializer)
        if transposes and codes.ndim == 2 and not steps and not _misread(weight):
            # Store what the matrix product reads: [columns, rows].
            codes, scales = codes.T, scales.T if scales.ndim == 2 else scales
            zeros = zeros.T if zeros is not None and zeros.ndim == 2 else zeros
            axis = 1 - axis if axis is not None else None
            output = transposes[0].output[0]
            for node in transposes:
                self._rename(node.output[0], output)
                self.removed.add(node.output[0])
        names = self._store(initializer, weight, codes, scales, zeros)
        self._dequantize(initializer, output, names, weight, axis, block, steps)

    def finish(self) -> Any:  # noqa: ANN401  # onnx.ModelProto
        """Return the edited model, without the exporter's notes."""
        import onnx

        kept = [t for name, t in self.initializers.items() if name not in self.names]
        nodes = [n for n in self.graph.node if not set(n.output) & self.removed]
        inputs = [v for v in self.graph.input if v.name not in self.names]
        for held, values in (
            (self.graph.initializer, kept),
            (self.graph.node, [*self.new_nodes, *nodes]),
            (self.graph.input, inputs),
        ):
            copies = [_copied(v) for v in values]
            del held[:]
            held.extend(copies)
        del self.graph.value_info[:]
        _strip(self.model)
        widest = any(t.data_type in _types(onnx, 2) for t in self.graph.initializer)
        self.model.ir_version = max(self.model.ir_version, 13 if widest else 10)
        self.model.producer_name, self.model.producer_version = "bitquota", ""
        return self.model

    def _store(
        self,
        initializer: str,
        weight: QuantizedWeight,
        codes: NDArray[Any],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> tuple[str, ...]:
        import onnx

        kind = _types(onnx, weight.bits)[0 if zeros is None else 1]
        names = [f"{initializer}.codes", f"{initializer}.scales"]
        self._add(names[0], kind, codes)
        scale_kind = {
            ScaleFormat.FP32: onnx.TensorProto.FLOAT,
            ScaleFormat.FP16: onnx.TensorProto.FLOAT16,
            ScaleFormat.BF16: onnx.TensorProto.BFLOAT16,
        }[weight.scheme.scale_format]
        self._add(names[1], scale_kind, scales)
        if zeros is not None:
            names.append(f"{initializer}.zero_points")
            self._add(names[2], kind, zeros)
        self.names[initializer] = tuple(names)
        return self.names[initializer]

    def _add(self, name: str, kind: int, values: NDArray[Any]) -> None:
        import onnx

        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        array = np.ascontiguousarray(values).astype(dtype)
        self.initializers[name] = onnx.numpy_helper.from_array(array, name)

    def _dequantize(
        self,
        initializer: str,
        output: str,
        names: tuple[str, ...],
        weight: QuantizedWeight,
        axis: int | None,
        block: int,
        steps: list[tuple[str, list[int]]],
    ) -> None:
        import onnx

        make = onnx.helper.make_node
        codes, scales, *zeros = names
        if weight.scheme.scale_format is not ScaleFormat.FP32:
            wide = f"{scales}.f32"
            self.new_nodes.append(make("Cast", [scales], [wide], to=onnx.TensorProto.FLOAT))
            scales = wide
        settings = {} if axis is None else {"axis": axis}
        if block:
            settings["block_size"] = block
        first = f"{initializer}.matrix" if steps else output
        self.new_nodes.append(
            make(
                "DequantizeLinear",
                [codes, scales, *zeros],
                [first],
                **settings,
            )
        )
        for k, (operator, values) in enumerate(steps):
            target = output if k == len(steps) - 1 else f"{initializer}.step{k}"
            if operator == "Transpose":
                self.new_nodes.append(make("Transpose", [first], [target], perm=values))
            else:
                shape = f"{initializer}.shape{k}"
                self._add(shape, onnx.TensorProto.INT64, np.array(values))
                self.new_nodes.append(make("Reshape", [first, shape], [target]))
            first = target

    def _fold_shapes(self) -> None:
        """Replace ``Shape`` of an initializer by its value: it needs no weight at run time."""
        import onnx

        for node in self.graph.node:
            if (
                node.op_type == "Shape"
                and node.input[0] in self.initializers
                and not node.attribute
            ):
                dims = list(self.initializers[node.input[0]].dims)
                self._add(node.output[0], onnx.TensorProto.INT64, np.array(dims))
                self.removed.add(node.output[0])

    def _only_transposes(self, initializer: str) -> list[Any]:
        users = [
            n
            for n in self.graph.node
            if initializer in n.input and not set(n.output) & self.removed
        ]
        for node in users:
            attributes = {a.name: list(a.ints) for a in node.attribute}
            if node.op_type != "Transpose" or attributes.get("perm", [1, 0]) != [1, 0]:
                return []
        return users

    def _rename(self, old: str, new: str) -> None:
        for node in self.graph.node:
            for k, name in enumerate(node.input):
                if name == old:
                    node.input[k] = new


def _arrange(
    layer: Layer, weight: QuantizedWeight
) -> tuple[
    NDArray[Any], NDArray[Any], NDArray[Any] | None, int | None, int, list[tuple[str, list[int]]]
]:
    """Return codes, scales, zero points, axis, block size, and steps back to the stored shape."""
    granularity = weight.scheme.granularity
    scales = weight.scales.detach().float().cpu().numpy()
    zeros = None if weight.zero_points is None else weight.zero_points.cpu().numpy()
    block = weight.scheme.group_size or 0
    if block and layer.columns % block:
        msg = (
            f"ONNX needs the group size {block} to divide the {layer.columns} weights per output "
            f"channel of layer '{layer.name}'; plan with --target ort-cpu, or per channel"
        )
        raise InvalidPlan(msg, layers=[layer.name])
    if layer.kind is LayerKind.EXPERTS:
        msg = f"ONNX has no operator for the experts of layer '{layer.name}'; exclude them"
        raise InvalidPlan(msg, layers=[layer.name])
    matrix = weight.codes.int().cpu().numpy()
    whole = from_matrix(weight.codes.int(), layer).cpu().numpy()
    if granularity is Granularity.TENSOR:
        return whole, scales.reshape(()), zeros if zeros is None else zeros.reshape(()), None, 0, []
    grouped_transposed = (
        layer.kind in TRANSPOSED_CONVOLUTIONS and layer.rows != layer.weight_shape[1]
    )
    turned = layer.kind is LayerKind.LINEAR_TRANSPOSED and _misread(weight)
    if granularity is Granularity.CHANNEL and not grouped_transposed and not turned:
        by_column = layer.kind in TRANSPOSED_CONVOLUTIONS
        by_column |= layer.kind is LayerKind.LINEAR_TRANSPOSED
        flat = None if zeros is None else zeros.reshape(-1)
        return whole, scales.reshape(-1), flat, int(by_column), 0, []
    if (
        granularity is Granularity.GROUP
        and layer.kind is LayerKind.LINEAR_TRANSPOSED
        and not turned
    ):
        return whole, scales.T, None if zeros is None else zeros.T, 0, block, []
    steps: list[tuple[str, list[int]]] = []
    if layer.kind in TRANSPOSED_CONVOLUTIONS:
        n_in, out, *kernel = layer.weight_shape
        groups = layer.rows // out
        steps.append(("Reshape", [groups, out, n_in // groups, *kernel]))
        steps.append(("Transpose", [0, 2, 1, *range(3, 3 + len(kernel))]))
        steps.append(("Reshape", list(layer.weight_shape)))
    elif turned:
        steps.append(("Transpose", [1, 0]))
    elif len(layer.weight_shape) > 2:
        steps.append(("Reshape", list(layer.weight_shape)))
    if granularity is Granularity.CHANNEL:
        flat = None if zeros is None else zeros.reshape(-1)
        return matrix, scales.reshape(-1), flat, 0, 0, steps
    return matrix, scales, zeros, 1, block, steps


def _misread(weight: QuantizedWeight) -> bool:
    """Whether ONNX Runtime would read the weight wrongly as ``[columns, rows]``.

    Its MatMulNBits fusion (1.31) takes int2 rows to start at bytes, which they do only if four
    divides their length; the result is wrong without an error. Behind a Transpose it is right.
    """
    return weight.bits == 2 and weight.codes.shape[0] % 4 != 0


def _read_back(
    path: Path, prepared: PreparedExport, names: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, int]]:
    """Return what the file holds for each layer, after comparing every code and scale."""
    import onnx

    held = {t.name: t for t in read_onnx(path).graph.initializer}
    by_codes = {parts[0]: parts for parts in names.values()}
    found = {}
    for (codes, parts), (name, weight) in zip(
        by_codes.items(), prepared.weights.items(), strict=True
    ):
        tensors = [held[part] for part in parts]
        values = onnx.numpy_helper.to_array(held[codes]).astype(np.int64)
        expected = weight.codes.cpu().numpy().astype(np.int64)
        # The same numbers in some arrangement: order is proved by running the file.
        same = np.array_equal(np.sort(values, axis=None), np.sort(expected, axis=None))
        if not same or values.size != expected.size:
            msg = f"layer '{name}' does not read back as it was written"
            raise ExportFailed(msg, layer=name)
        kind = onnx.TensorProto.DataType.Name(held[codes].data_type).lower()
        shape = "x".join(map(str, held[codes].dims))
        found[name] = (f"{kind} {shape}", 8 * sum(_nbytes(t) for t in tensors))
    return found


def _trace(prepared: PreparedExport) -> Any:  # noqa: ANN401  # onnx.ModelProto
    inputs = prepared.inputs or prepared.model.example_inputs
    if inputs is None:
        msg = "a model that is no ONNX file needs a sample to be traced with; hand in samples"
        raise InvalidInput(msg)
    example = tuple(t[:2] for t in inputs)
    tokens = all(not t.is_floating_point() for t in example)
    axes = {0: torch.export.Dim.DYNAMIC}
    if tokens:
        axes[1] = torch.export.Dim.DYNAMIC
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so less clearly

        with _quiet():
            program = torch.onnx.export(
                prepared.module,
                example,
                dynamo=True,
                optimize=False,
                dynamic_shapes=tuple(dict(axes) for _ in example),
                opset_version=OPSET,
                verbose=False,
                output_names=["logits"],
            )
    except ImportError as err:
        msg = "exporting a torch model to ONNX needs onnxscript: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    except Exception as err:  # the exporter raises whatever it meets
        msg = f"torch.onnx must be able to export the model; it says: {err}"
        raise ExportFailed(msg) from err
    if program is None:
        msg = "torch.onnx must return a program; it returned none"
        raise ExportFailed(msg)
    return fold_constants(program)


def _write_back(model: Any, module: OnnxModule) -> None:  # noqa: ANN401  # onnx.ModelProto
    """Write the module's weights and biases (corrected) into the graph's initializers."""
    import onnx

    for tensor in model.graph.initializer:
        value = module.fed_value(tensor.name)
        if value is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _types(onnx: Any, bits: int) -> tuple[int, int]:  # noqa: ANN401  # a module
    """Return the signed and unsigned tensor type of a width."""
    names = onnx.TensorProto.DataType
    return names.Value(f"INT{bits}"), names.Value(f"UINT{bits}")


def _nbytes(tensor: Any) -> int:  # noqa: ANN401  # onnx.TensorProto
    """Return the bytes that a tensor's values take in the file."""
    import onnx

    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    return int(onnx.numpy_helper.to_array(tensor).nbytes)


def _copied(message: Any) -> Any:  # noqa: ANN401  # a protobuf message
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _strip(model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
    """Remove traces and notes of the exporter: they took 57 KB of a 150 KB model."""
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for items in (graph.node, graph.initializer, graph.input, graph.output):
        for item in items:
            item.doc_string = ""
            del item.metadata_props[:]
