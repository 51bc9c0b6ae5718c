"""Edit an ONNX graph: float initializers become integers with DequantizeLinear, or blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.storage import (
    PRUNED_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    order_bits,
)
from bitquota.exports.onnx_arrangement import arrange, misread, steps_back
from bitquota.exports.onnx_blocks import (
    BLOCKS,
    CONTRIB,
    block_look_up,
    block_product,
    fits_blocks,
    is_look_up,
    is_product,
    packed_blocks,
)
from bitquota.models.layout import from_matrix
from bitquota.models.onnx.layers import readers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.weights import QuantizedWeight

EIGHT = 8
SAFE_CODE = 64
"""255 x 64, twice, fits into 16 bits."""

_SUFFIXES = (
    BLOCKS, ".codes", ".scales", ".scales.f32", ".zero_points", ".levels", ".levels.f32", ".index",
    ".matrix", ".f32", ".order", ".parts", ".rows",
    ".shape", ".shape0", ".shape1", ".shape2", ".step0", ".step1",
    ".wide", ".int", ".shift", ".shifted", ".zero", ".zeros", ".count",
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
        self._widened: set[str] = set()
        self.readers = readers(self.graph)
        self._taken = {v.name for v in (*self.graph.input, *self.graph.output)}
        self._taken.update(self.initializers, self.readers)
        self._taken.update(name for node in self.graph.node for name in node.output)
        self._fold_shapes()

    def quantize(
        self, initializer: str, layer: Layer, weight: QuantizedWeight, *, widened: bool = False
    ) -> None:
        """Store ``weight`` instead of ``initializer``; ``widened`` codes are cast to 8 bits."""
        import onnx

        if widened:
            self._widened.add(self._stem(initializer))

        kind = self.initializers[initializer].data_type
        if kind == onnx.TensorProto.FLOAT:
            self._write(initializer, initializer, layer, weight)
            return
        # Codes and scales make float32; the graph computes in another type.
        wide = f"{self._stem(initializer)}.f32"
        self._write(initializer, wide, layer, weight)
        self.new_nodes.append(onnx.helper.make_node("Cast", [wide], [initializer], to=kind))

    def leave_out(self, initializer: str) -> None:
        """Make ``initializer`` zeros, of which the file holds the shape alone."""
        old = self.initializers[initializer]
        self._zeros(self._stem(initializer), initializer, old.dims, old.data_type)
        self.names[initializer] = ()

    def _zeros(self, stem: str, output: str, dims: Iterable[int], kind: int) -> None:
        """Make ``output`` zeros of a type."""
        import onnx

        make, shape = onnx.helper.make_node, f"{stem}.shape"
        zero = onnx.helper.make_tensor("zero", kind, [1], [0.0])
        self.new_nodes += [
            make("Constant", [], [shape], value_ints=list(dims)),
            make("ConstantOfShape", [shape], [output], value=zero),
        ]

    def _stem(self, initializer: str) -> str:
        """Return what the names of the parts of a weight begin with: none of them is taken."""
        stem = initializer
        while any(f"{stem}{suffix}" in self._taken for suffix in _SUFFIXES):
            stem += "_"
        return stem

    def _write(self, initializer: str, target: str, layer: Layer, weight: QuantizedWeight) -> None:
        if weight.scheme.row_bits:
            self._join_parts(initializer, target, layer, weight)
            return
        if weight.scheme.grid is Grid.CODEBOOK:
            self._look_up(initializer, target, layer, weight)
            return
        codes, scales, zeros, axis, block, steps = arrange(layer, weight)
        output = target
        transposes = self._only_transposes(initializer) if target == initializer else []
        if transposes and codes.ndim == 2 and not steps and not misread(weight):
            # Store what the matrix product reads: [columns, rows].
            codes, scales = codes.T, scales.T if scales.ndim == 2 else scales
            zeros = zeros.T if zeros is not None and zeros.ndim == 2 else zeros
            axis = 1 - axis if axis is not None else None
            output = transposes[0].output[0]
            for node in transposes:
                self._rename(node.output[0], output)
                self.removed.add(node.output[0])
        stem = self._stem(initializer)
        names = self._store(stem, weight, codes, scales, zeros)
        self.names[initializer] = names
        self._dequantize(stem, output, names, weight, axis, block, steps)

    def _join_parts(
        self, initializer: str, target: str, layer: Layer, weight: QuantizedWeight
    ) -> None:
        """Store rows of one bit-width as a tensor each; the weight is what Gather puts in order."""
        import onnx

        make = onnx.helper.make_node
        stem = self._stem(initializer)
        made, joined = [], []
        for rows, part in weight.parts():
            shape = (len(rows), *layer.weight_shape[1:])
            own = replace(
                layer, weight_shape=shape, rows=len(rows), n_weights=len(rows) * layer.columns
            )
            under = self._stem(f"{stem}.w{part.bits}")
            if part.bits == PRUNED_BITS:
                joined.append(f"{under}.rows")
                self._zeros(under, joined[-1], shape, onnx.TensorProto.FLOAT)
                continue
            codes, scales, zeros, axis, block, steps = arrange(own, part)
            made.append(self._store(under, part, codes, scales, zeros))
            joined.append(f"{under}.rows")
            self._dequantize(under, joined[-1], made[-1], part, axis, block, steps)
        # Where each row of the weight stands behind one another in the parts.
        order = f"{stem}.order"
        kind = {8: onnx.TensorProto.UINT8, 16: onnx.TensorProto.UINT16, 32: onnx.TensorProto.INT32}
        self._add(order, kind[order_bits(layer.rows)], weight.order().argsort().numpy())
        self.new_nodes += [
            make("Concat", joined, [f"{stem}.parts"], axis=0),
            make("Cast", [order], [f"{stem}.index"], to=onnx.TensorProto.INT32),
            make("Gather", [f"{stem}.parts", f"{stem}.index"], [target], axis=0),
        ]
        heads, rest = zip(*((names[0], names[1:]) for names in made), strict=True)
        self.names[initializer] = (*heads, *(name for names in rest for name in names), order)

    def multiply_blocks(self, initializer: str, layer: Layer, weight: QuantizedWeight) -> bool:
        """Make products with ``initializer`` MatMulNBits and look-ups GatherBlockQuantized.

        Says whether that can be: not if the weight has no blocks that the operators take, or
        anything reads it but matrix products with it on the right and look-ups of rows.
        """
        import onnx

        floats = self.initializers[initializer].data_type == onnx.TensorProto.FLOAT
        if not floats or not fits_blocks(layer, weight):
            return False
        users = self._users(initializer)
        transposes = [node for node in users if _is_transpose(node)]
        places = {initializer: False} | {node.output[0]: True for node in transposes}
        known = {id(node) for node in transposes}
        readers = {
            id(node): node
            for name in places
            for node in self.readers.get(name, ())
            if id(node) not in known
        }
        if not readers or not all(
            is_product(n, places, layer) or is_look_up(n, places, layer) for n in readers.values()
        ):
            return False
        stem = self._stem(initializer)
        names, shape = (f"{stem}{BLOCKS}", f"{stem}.scales"), f"{stem}.shape0"
        self._add(names[0], onnx.TensorProto.UINT8, packed_blocks(weight))
        scales = weight.scales.detach().float().cpu().numpy().reshape(-1)
        self._add(names[1], onnx.TensorProto.FLOAT, scales)
        self.names[initializer] = names
        for node in transposes:
            self.removed.add(node.output[0])
        for node in readers.values():
            if node.op_type == "Gather":
                self._add(shape, onnx.TensorProto.INT64, np.array([layer.rows, -1]))
                made = block_look_up(node, names, shape, weight)
            else:
                made = block_product(node, names, layer, weight)
            self.replaced[node.output[0]] = made
        imported = {o.domain for o in self.model.opset_import}
        if CONTRIB not in imported:
            self.model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
        return True

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
        steps = steps_back(layer)
        first = f"{stem}.matrix" if steps else target
        self.new_nodes.append(make("GatherElements", [table, index], [first], axis=1))
        self._follow(stem, first, target, steps)

    def _store(
        self,
        stem: str,
        weight: QuantizedWeight,
        codes: NDArray[Any],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> tuple[str, ...]:
        import onnx

        kind = tensor_types(onnx, weight.bits)[0 if zeros is None else 1]
        names = [f"{stem}.codes", f"{stem}.scales"]
        self._add(names[0], kind, codes)
        self._add(names[1], _scale_type(onnx, weight.scheme.scale_format), scales)
        if zeros is not None:
            names.append(f"{stem}.zero_points")
            self._add(names[2], kind, zeros)
        return tuple(names)

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
        if stem in self._widened:
            codes, *zeros = self._widen(stem, codes, scales, weight)
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

    def _widen(
        self, stem: str, codes: str, scales: str, weight: QuantizedWeight
    ) -> tuple[str, ...]:
        """Return codes of 8 bits, and their zero points if these are not 0, made at loading.

        x86 without VNNI adds two products of unsigned inputs and signed weights in 16 bits, which
        codes beyond 64 overflow: such codes become unsigned, with 128 for zero.
        """
        import onnx

        make, kinds = onnx.helper.make_node, onnx.TensorProto
        if int(weight.codes.abs().max()) <= SAFE_CODE:
            if weight.bits == EIGHT:
                return (codes,)
            self.new_nodes.append(make("Cast", [codes], [f"{stem}.wide"], to=kinds.INT8))
            return (f"{stem}.wide",)
        self._add(f"{stem}.shift", kinds.INT32, np.array(128))
        self._add(f"{stem}.zero", kinds.UINT8, np.array(128))
        n = onnx.numpy_helper.to_array(self.initializers[scales]).shape
        self._add(f"{stem}.count", kinds.INT64, np.array(n))
        self.new_nodes += [
            make("Cast", [codes], [f"{stem}.int"], to=kinds.INT32),
            make("Add", [f"{stem}.int", f"{stem}.shift"], [f"{stem}.shifted"]),
            make("Cast", [f"{stem}.shifted"], [f"{stem}.wide"], to=kinds.UINT8),
            make("Expand", [f"{stem}.zero", f"{stem}.count"], [f"{stem}.zeros"]),
        ]
        return f"{stem}.wide", f"{stem}.zeros"

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

    def _users(self, initializer: str) -> list[Any]:
        """Return the nodes that read ``initializer``, without those removed already."""
        return [n for n in self.readers.get(initializer, ()) if not set(n.output) & self.removed]

    def _only_transposes(self, initializer: str) -> list[Any]:
        users = self._users(initializer)
        for node in users:
            behind = self.readers.get(node.output[0], ())
            if not all(node.output[0] in reader.input for reader in behind):
                return []
            if not _is_transpose(node):
                return []
        return users

    def _rename(self, old: str, new: str) -> None:
        for node in self.graph.node:
            for k, name in enumerate(node.input):
                if name == old:
                    node.input[k] = new


def _is_transpose(node: Any) -> bool:  # noqa: ANN401  # onnx.NodeProto
    """Whether ``node`` turns a matrix."""
    attributes = {a.name: list(a.ints) for a in node.attribute}
    return bool(node.op_type == "Transpose") and attributes.get("perm", [1, 0]) == [1, 0]


def _scale_type(onnx: Any, scale_format: ScaleFormat) -> int:  # noqa: ANN401  # a module
    kinds = onnx.TensorProto
    known = {
        ScaleFormat.FP32: kinds.FLOAT,
        ScaleFormat.FP16: kinds.FLOAT16,
        ScaleFormat.BF16: kinds.BFLOAT16,
    }
    return int(known[scale_format])


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
