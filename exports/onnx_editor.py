"""Edit an ONNX graph: float initializers become integers with DequantizeLinear, or MatMulNBits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat
from bitquota.errors import InvalidPlan
from bitquota.models.layout import TRANSPOSED_CONVOLUTIONS, back_to_stored, from_matrix
from bitquota.models.onnx.layers import readers
from bitquota.quantizers.packing import pack_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.weights import QuantizedWeight

BLOCKS = ".blocks"
"""Suffix of the packed codes of a MatMulNBits node."""

CONTRIB = "com.microsoft"

_SUFFIXES = (
    BLOCKS, ".codes", ".scales", ".scales.f32", ".zero_points", ".levels", ".levels.f32", ".index",
    ".matrix", ".f32", ".shape0", ".shape1", ".shape2", ".step0", ".step1",
)  # fmt: skip
"""What the names of a weight's parts end with."""


class GraphEditor:
    """Replaces float initializers of one graph by integers and DequantizeLinear nodes."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
        self.model = model
        self.graph = model.graph
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.new_nodes: list[Any] = []
        self.removed: set[str] = set()
        self.replaced: dict[str, list[Any]] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self.readers = readers(self.graph)
        self._taken = {v.name for v in (*self.graph.input, *self.graph.output)}
        self._taken.update(self.initializers, self.readers)
        self._taken.update(name for node in self.graph.node for name in node.output)
        self._fold_shapes()

    def quantize(self, initializer: str, layer: Layer, weight: QuantizedWeight) -> None:
        """Store ``weight`` instead of ``initializer``."""
        import onnx

        kind = self.initializers[initializer].data_type
        if kind == onnx.TensorProto.FLOAT:
            self._write(initializer, initializer, layer, weight)
            return
        # Codes and scales make float32; the graph computes in another type.
        wide = f"{self._stem(initializer)}.f32"
        self._write(initializer, wide, layer, weight)
        self.new_nodes.append(onnx.helper.make_node("Cast", [wide], [initializer], to=kind))

    def _stem(self, initializer: str) -> str:
        """Return what the names of the parts of a weight begin with: none of them is taken."""
        stem = initializer
        while any(f"{stem}{suffix}" in self._taken for suffix in _SUFFIXES):
            stem += "_"
        return stem

    def _write(self, initializer: str, target: str, layer: Layer, weight: QuantizedWeight) -> None:
        if weight.scheme.grid is Grid.CODEBOOK:
            self._look_up(initializer, target, layer, weight)
            return
        codes, scales, zeros, axis, block, steps = _arrange(layer, weight)
        output = target
        transposes = self._only_transposes(initializer) if target == initializer else []
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
        self._dequantize(self._stem(initializer), output, names, weight, axis, block, steps)

    def multiply_blocks(self, initializer: str, layer: Layer, weight: QuantizedWeight) -> bool:
        """Make every product with ``initializer`` a MatMulNBits node; say whether that can be.

        Not if the weight has no blocks that the operator takes, or anything but a matrix product
        with it on the right reads it.
        """
        import onnx

        floats = self.initializers[initializer].data_type == onnx.TensorProto.FLOAT
        if not floats or not fits_blocks(layer, weight):
            return False
        transposes = self._only_transposes(initializer)
        places = {initializer: False} | {node.output[0]: True for node in transposes}
        known = {id(node) for node in transposes}
        products = {
            id(node): node
            for name in places
            for node in self.readers.get(name, ())
            if id(node) not in known
        }
        if not products or not all(_is_product(n, places, layer) for n in products.values()):
            return False
        stem = self._stem(initializer)
        names = f"{stem}{BLOCKS}", f"{stem}.scales"
        self._add(names[0], onnx.TensorProto.UINT8, packed_blocks(weight))
        scales = weight.scales.detach().float().cpu().numpy().reshape(-1)
        self._add(names[1], onnx.TensorProto.FLOAT, scales)
        self.names[initializer] = names
        for node in transposes:
            self.removed.add(node.output[0])
        for node in products.values():
            self._replace_product(node, names, layer, weight)
        imported = {o.domain for o in self.model.opset_import}
        if CONTRIB not in imported:
            self.model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
        return True

    def _replace_product(
        self,
        node: Any,  # noqa: ANN401  # onnx.NodeProto
        names: tuple[str, str],
        layer: Layer,
        weight: QuantizedWeight,
    ) -> None:
        import onnx

        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        output = node.output[0]
        product = f"{output}.product" if bias else output
        made = [
            onnx.helper.make_node(
                "MatMulNBits",
                [node.input[0], *names],
                [product],
                domain=CONTRIB,
                K=layer.columns,
                N=layer.rows,
                bits=weight.bits,
                block_size=weight.scheme.group_size,
                accuracy_level=1,  # fp32 activations; 4 would quantize them to int8
            )
        ]
        if bias:
            made.append(onnx.helper.make_node("Add", [product, bias], [output]))
        self.replaced[output] = made

    def finish(self) -> Any:  # noqa: ANN401  # onnx.ModelProto
        """Return the edited model, without the exporter's notes."""
        import onnx

        kept = [t for name, t in self.initializers.items() if name not in self.names]
        nodes = [
            new
            for node in self.graph.node
            if not set(node.output) & self.removed
            for new in self.replaced.get(node.output[0] if node.output else "", [node])
        ]
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
        widest = any(t.data_type in tensor_types(onnx, 2) for t in self.graph.initializer)
        self.model.ir_version = max(self.model.ir_version, 13 if widest else 10)
        self.model.producer_name, self.model.producer_version = "bitquota", ""
        return self.model

    def _look_up(
        self, initializer: str, target: str, layer: Layer, weight: QuantizedWeight
    ) -> None:
        """Store codes and levels; the weight is what Gather finds.

        ONNX Runtime widens it once, when it loads the file: a smaller file, not smaller memory.
        """
        import onnx

        make = onnx.helper.make_node
        stem = self._stem(initializer)
        names = (f"{stem}.codes", f"{stem}.levels")
        own = weight.scheme.granularity is Granularity.CHANNEL
        codes = weight.codes.int() if own else from_matrix(weight.codes.int(), layer)
        levels = weight.scales if own else weight.scales.reshape(-1)
        # Codes are stored without sign; the widest are of 8 bits.
        self._add(names[0], tensor_types(onnx, weight.bits)[1], codes.cpu().numpy())
        kind = _scale_type(onnx, weight.scheme.scale_format)
        self._add(names[1], kind, levels.float().cpu().numpy())
        self.names[initializer] = names
        table, index = names[1], f"{stem}.index"
        if weight.scheme.scale_format is not ScaleFormat.FP32:
            table = f"{table}.f32"
            self.new_nodes.append(make("Cast", [names[1]], [table], to=onnx.TensorProto.FLOAT))
        self.new_nodes.append(make("Cast", [names[0]], [index], to=onnx.TensorProto.INT32))
        if not own:
            self.new_nodes.append(make("Gather", [table, index], [target], axis=0))
            return
        steps = _steps_back(layer)
        first = f"{stem}.matrix" if steps else target
        self.new_nodes.append(make("GatherElements", [table, index], [first], axis=1))
        self._follow(stem, first, target, steps)

    def _store(
        self,
        initializer: str,
        weight: QuantizedWeight,
        codes: NDArray[Any],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> tuple[str, ...]:
        import onnx

        kind = tensor_types(onnx, weight.bits)[0 if zeros is None else 1]
        stem = self._stem(initializer)
        names = [f"{stem}.codes", f"{stem}.scales"]
        self._add(names[0], kind, codes)
        self._add(names[1], _scale_type(onnx, weight.scheme.scale_format), scales)
        if zeros is not None:
            names.append(f"{stem}.zero_points")
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
        stem: str,
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
        first = f"{stem}.matrix" if steps else output
        self.new_nodes.append(
            make(
                "DequantizeLinear",
                [codes, scales, *zeros],
                [first],
                **settings,
            )
        )
        self._follow(stem, first, output, steps)

    def _follow(
        self, stem: str, first: str, output: str, steps: list[tuple[str, list[int]]]
    ) -> None:
        """Add the steps that lead from a matrix to the shape that the graph knows."""
        import onnx

        make = onnx.helper.make_node
        for k, (operator, values) in enumerate(steps):
            target = output if k == len(steps) - 1 else f"{stem}.step{k}"
            if operator == "Transpose":
                self.new_nodes.append(make("Transpose", [first], [target], perm=values))
            else:
                shape = f"{stem}.shape{k}"
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
        users = [n for n in self.readers.get(initializer, ()) if not set(n.output) & self.removed]
        for node in users:
            behind = self.readers.get(node.output[0], ())
            if not all(node.output[0] in reader.input for reader in behind):
                return []
            attributes = {a.name: list(a.ints) for a in node.attribute}
            if node.op_type != "Transpose" or attributes.get("perm", [1, 0]) != [1, 0]:
                return []
        return users

    def _rename(self, old: str, new: str) -> None:
        for node in self.graph.node:
            for k, name in enumerate(node.input):
                if name == old:
                    node.input[k] = new


class _Arranged(NamedTuple):
    """A quantized weight as DequantizeLinear takes it.

    Attributes:
        codes: The codes, in the stored shape or as a matrix ``[rows, columns]``.
        scales: One for each block of codes.
        zero_points: Like ``scales``, if there are any.
        axis: Along which scales differ; ``None`` for one scale.
        block: Codes for each scale along ``axis``; 0 where each index has its own.
        steps: Operators that make the stored shape of ``codes``, with their arguments.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    zero_points: NDArray[Any] | None
    axis: int | None
    block: int
    steps: list[tuple[str, list[int]]]


def _arrange(layer: Layer, weight: QuantizedWeight) -> _Arranged:
    """Return codes and scales so that the fewest operators give the stored shape.

    Raises:
        InvalidPlan: ONNX cannot store the weight.
    """
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
    scales = weight.scales.detach().float().cpu().numpy()
    zeros = None if weight.zero_points is None else weight.zero_points.cpu().numpy()
    granularity = weight.scheme.granularity

    def shaped(
        how: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        return how(scales), None if zeros is None else how(zeros)

    # In the stored shape, where one axis of it tells the scale.
    transposed = layer.kind is LayerKind.LINEAR_TRANSPOSED
    convolved = layer.kind in TRANSPOSED_CONVOLUTIONS
    grouped = convolved and layer.rows != layer.weight_shape[1]
    whole = from_matrix(weight.codes.int(), layer).cpu().numpy()
    by_column = int(convolved or transposed)
    found = None
    if granularity is Granularity.TENSOR:
        found = _Arranged(whole, *shaped(lambda a: a.reshape(())), None, 0, [])
    elif granularity is Granularity.CHANNEL and not grouped and layer.axes is None:
        found = _Arranged(whole, *shaped(lambda a: a.reshape(-1)), by_column, 0, [])
    elif granularity is Granularity.GROUP and transposed:
        found = _Arranged(whole, *shaped(lambda a: a.T), 0, block, [])
    if found is not None:
        return _hidden(found) if transposed and _misread(weight) else found

    # As a matrix of output channels, brought to the stored shape afterwards.
    matrix = weight.codes.int().cpu().numpy()
    steps = _steps_back(layer)
    if granularity is Granularity.CHANNEL:
        return _Arranged(matrix, *shaped(lambda a: a.reshape(-1)), 0, 0, steps)
    return _Arranged(matrix, scales, zeros, 1, block, steps)


def _hidden(plain: _Arranged) -> _Arranged:
    """Return the same behind a Reshape, so that ONNX Runtime sees no matrix that it can fuse."""
    scales, zeros, axis = plain.scales, plain.zero_points, plain.axis
    if plain.block:
        scales, zeros = scales[None], None if zeros is None else zeros[None]
    shape = list(plain.codes.shape)
    return plain._replace(
        codes=plain.codes[None],
        scales=scales,
        zero_points=zeros,
        axis=None if axis is None else axis + 1,
        steps=[("Reshape", shape)],
    )


def _steps_back(layer: Layer) -> list[tuple[str, list[int]]]:
    """Return the operators that make the stored shape of a matrix ``[rows, columns]``."""
    if layer.kind in TRANSPOSED_CONVOLUTIONS:
        n_in, out, *kernel = layer.weight_shape
        groups = layer.rows // out
        return [
            ("Reshape", [groups, out, n_in // groups, *kernel]),
            ("Transpose", [0, 2, 1, *range(3, 3 + len(kernel))]),
            ("Reshape", list(layer.weight_shape)),
        ]
    if layer.kind is LayerKind.LINEAR_TRANSPOSED:
        return [("Transpose", [1, 0])]
    if layer.axes is not None:
        turned = [layer.weight_shape[k] for k in layer.axes]
        return [("Reshape", turned), ("Transpose", back_to_stored(layer.axes))]
    if len(layer.weight_shape) > 2:
        return [("Reshape", list(layer.weight_shape))]
    return []


def _scale_type(onnx: Any, scale_format: ScaleFormat) -> int:  # noqa: ANN401  # a module
    kinds = onnx.TensorProto
    known = {
        ScaleFormat.FP32: kinds.FLOAT,
        ScaleFormat.FP16: kinds.FLOAT16,
        ScaleFormat.BF16: kinds.BFLOAT16,
    }
    return int(known[scale_format])


def fits_blocks(layer: Layer, weight: QuantizedWeight) -> bool:
    """Whether MatMulNBits can hold this weight: symmetric blocks with fp32 scales."""
    scheme, size = weight.scheme, weight.scheme.group_size or 0
    return (
        layer.kind in {LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED}
        and scheme.granularity is Granularity.GROUP
        and scheme.scale_format is ScaleFormat.FP32
        and weight.zero_points is None
        and weight.bits in {2, 4, 8}
        and size >= 16
        and size & (size - 1) == 0
        and layer.columns % size == 0
    )


def packed_blocks(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Return ``u8[rows, blocks, block_size * bits / 8]``: low bits first, shifted to be unsigned.

    Without zero points MatMulNBits subtracts ``2^(bits-1)``.
    """
    rows, columns = weight.codes.shape
    size = weight.scheme.group_size or columns
    unsigned = weight.codes.cpu().numpy() + 2 ** (weight.bits - 1)
    flat = pack_bits(unsigned.astype(np.uint16).reshape(1, -1), weight.bits)
    return flat.reshape(rows, columns // size, -1)


def _is_product(node: Any, places: dict[str, bool], layer: Layer) -> bool:  # noqa: ANN401
    """Whether ``node`` multiplies with the weight on its right, as rows of output channels."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type not in {"MatMul", "Gemm"} or node.input[1] not in places:
        return False
    if set(node.input[2:]) & set(places) or node.input[0] in places:
        return False
    turned = places[node.input[1]]
    if node.op_type == "Gemm":
        plain = all(
            name not in attributes or attributes[name].f == 1.0 for name in ("alpha", "beta")
        )
        if not plain or ("transA" in attributes and attributes["transA"].i):
            return False
        turned ^= bool("transB" in attributes and attributes["transB"].i)
    # [rows, columns] must be turned to stand on the right; [columns, rows] must not.
    return turned == (layer.kind is LayerKind.LINEAR)


def _misread(weight: QuantizedWeight) -> bool:
    """Whether ONNX Runtime would read the weight wrongly as ``[columns, rows]``.

    Its MatMulNBits fusion (1.31) takes int2 rows to start at bytes, which they do only if four
    divides their length; the result is wrong without an error. So it is through a Transpose, over
    which it pulls the codes, but not through a Reshape.
    """
    return weight.bits == 2 and weight.codes.shape[0] % 4 != 0


def tensor_types(onnx: Any, bits: int) -> tuple[int, int]:  # noqa: ANN401  # a module
    """Return the signed and unsigned tensor type of a width."""
    names = onnx.TensorProto.DataType
    return names.Value(f"INT{bits}"), names.Value(f"UINT{bits}")


def n_bytes(tensor: Any) -> int:  # noqa: ANN401  # onnx.TensorProto
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
