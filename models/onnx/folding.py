"""Arithmetic on weights alone, done once: casts, transposes, reshapes, masks and norms.

Exporters put Identity, Cast, Transpose or Reshape between a stored weight and the operator that
multiplies with it; weight normalisation and pruning add products of constants. Here such nodes are
replaced by their results, where no more values come of it. A weight that is also read in another
way (a tied embedding that is transposed for the head) stays what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.models.onnx.rewrites import import_onnx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_FLOATS = {1: 4, 10: 2, 11: 8, 16: 2}
"""Element types that arithmetic on weights may have, and their bytes."""

_VIEWS = frozenset({"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators of one weight whose result has the same values, so that it keeps the weight's name."""

_FOLDED = _VIEWS | {
    "Slice", "Split", "Concat", "Mul", "Div", "Add", "Sub", "Neg", "Sqrt", "Abs", "Reciprocal",
    "ReduceSum", "ReduceL2", "ReduceSumSquare", "Pow",
}  # fmt: skip
"""Operators without state whose results are not larger than what they read."""

_BROADCAST = frozenset({"Mul", "Div", "Add", "Sub", "Pow"})
_SPARE_VALUES = 1024
MAX_GROUP = 256
"""Nodes that are computed together; spectral normalisation has some thirty."""

MAX_GROWTH = 16
"""Intermediate results may take this many times the bytes of what they are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the file stores an initializer that was folded.

    Attributes:
        data_type: ONNX's number of the element type in the file, where a Cast was folded.
    """

    data_type: int

    @property
    def is_half(self) -> bool:
        """Whether a value takes 16 bits in the file."""
        return _FLOATS[self.data_type] == 2


def fold_weights(model: Any) -> dict[str, Stored]:  # noqa: ANN401  # onnx.ModelProto
    """Compute what depends on floating-point initializers alone; the graph is changed in place.

    Returns:
        What the file stores in another element type, by the initializer's name.

    Cost: one pass over the nodes; each folded tensor is copied once per node.
    """
    folder = _Folder(model)
    for component in folder.components():
        folder.fold(component)
    folder.finish()
    return folder.stored


class _Folder:
    """The initializers of a graph, who reads them, and what has been computed of them."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
        self.graph = model.graph
        self.opset = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 1)
        self.nodes = list(self.graph.node)
        self.held = {t.name: t for t in self.graph.initializer}
        self.stored: dict[str, Stored] = {}
        self.gone: set[int] = set()
        self.users: dict[str, list[int]] = {}
        self.fixed = {v.name for v in self.graph.output}
        for k, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(k)
            self.fixed.update(_read_by_bodies(node))

    def components(self) -> list[list[int]]:
        """Return the nodes that compute with weights alone, in groups that share values."""
        known = {name for name in self.held if name not in self.fixed}
        weights = {name for name in known if self._is_weight(name)}
        seen_by: dict[str, int] = {}
        parent: dict[int, int] = {}

        def root(k: int) -> int:
            while parent[k] != k:
                parent[k] = k = parent[parent[k]]
            return k

        for k, node in enumerate(self.nodes):
            names = [name for name in node.input if name]
            outputs = list(node.output)
            if (
                not _may_fold(node)
                or not known.issuperset(names)
                or not weights.intersection(names)
                or not all(name and name not in self.fixed for name in outputs)
            ):
                continue
            known.update(outputs)
            weights.update(outputs)
            parent[k] = k
            for name in weights.intersection(names):
                parent[root(seen_by.setdefault(name, k))] = root(k)
            seen_by |= dict.fromkeys(outputs, k)
        groups: dict[int, list[int]] = {}
        for k in parent:
            groups.setdefault(root(k), []).append(k)
        return [group for group in groups.values() if len(group) <= MAX_GROUP]

    def fold(self, component: list[int]) -> None:
        """Replace nodes by their values, if all readers of their weights are among them."""
        nodes = [self.nodes[k] for k in component]
        members = set(component)
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(n for node in nodes for n in node.input if n and n not in made)
        weights = [name for name in read if self._is_weight(name)]
        if any(not members.issuperset(self.users[name]) for name in weights):
            return  # it would be stored twice
        values, same = self._computed(nodes, read)
        results = {n: same.get(n, n) for n in made if not members.issuperset(self.users.get(n, ()))}
        distinct = sorted(set(results.values()))
        size = sum(self._n_values(name) for name in weights)
        if not values or sum(values[n].size for n in distinct) > size + _SPARE_VALUES:
            return
        self._replace(nodes, weights, values, results, distinct)

    def _computed(
        self, nodes: Sequence[Any], read: Mapping[str, None]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Return the value of each output, and which outputs are equal to an earlier one."""
        to_array = import_onnx().numpy_helper.to_array
        values = {name: to_array(self.held[name]) for name in read}
        same: dict[str, str] = {}
        first: dict[bytes, Any] = {}
        left = MAX_GROWTH * sum(array.nbytes for array in values.values()) + 2**16
        for node in nodes:
            inputs = [same.get(name, name) for name in node.input]
            meaning = _meaning(node, inputs)
            if meaning in first:
                same |= dict(zip(node.output, first[meaning].output, strict=True))
                continue
            first[meaning] = node
            if node.op_type in _BROADCAST:
                shapes = [values[name].shape for name in inputs if name]
                if not _fits(shapes):
                    return {}, {}
            arrays = self._run(node, [values[name] if name else None for name in inputs])
            values |= dict(zip(node.output, arrays, strict=True))
            left -= sum(array.nbytes for array in arrays)
            if left < 0:
                return {}, {}
        return values, same

    def _replace(
        self,
        nodes: Sequence[Any],
        weights: Sequence[str],
        values: Mapping[str, NDArray[Any]],
        results: Mapping[str, str],
        distinct: Sequence[str],
    ) -> None:
        onnx = import_onnx()
        self.gone.update(id(node) for node in nodes)
        largest = max(weights, key=self._n_values)
        kinds = {name: self.held[name].data_type for name in weights}
        for name in weights:
            del self.held[name]
        # A single result keeps the name of its parameter.
        names = {name: largest if len(distinct) == 1 else name for name in distinct}
        for old, new in names.items():
            array = np.ascontiguousarray(values[old])
            self.held[new] = onnx.numpy_helper.from_array(array, new)
        plain = len(weights) == 1 and all(node.op_type in _VIEWS for node in nodes)
        if plain and len(distinct) == 1 and self.held[largest].data_type != kinds[largest]:
            self.stored[largest] = Stored(data_type=kinds[largest])
        for old, kept in results.items():
            for k in self.users.get(old, ()):
                reader = self.nodes[k]
                for place, name in enumerate(reader.input):
                    if name == old:
                        reader.input[place] = names[kept]

    def _n_values(self, name: str) -> int:
        return math.prod(self.held[name].dims)

    def _is_weight(self, name: str) -> bool:
        tensor = self.held.get(name)
        return (
            tensor is not None
            and tensor.data_type in _FLOATS
            and max(tensor.dims, default=0) > 1
            and 0 not in tensor.dims
        )

    def _run(self, node: Any, inputs: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:  # noqa: ANN401
        onnx = import_onnx()
        from onnx.reference import ReferenceEvaluator

        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        given = [f"i{k}" if array is not None else "" for k, array in enumerate(inputs)]
        plain.input[:] = given
        plain.output[:] = [f"o{k}" for k in range(len(node.output))]
        # A whole model: for a node alone the evaluator takes the operators of the newest opset.
        make = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [plain],
            "folded",
            [make(name, 1, None) for name in dict.fromkeys(given) if name],
            [make(name, 1, None) for name in plain.output],
        )
        imports = [onnx.helper.make_opsetid("", self.opset)]
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports))
        feed = {name: array for name, array in zip(given, inputs, strict=True) if name}
        return [np.asarray(array) for array in evaluator.run(None, feed)]

    def finish(self) -> None:
        """Write nodes and initializers back into the graph."""
        if not self.gone:
            return
        graph = self.graph
        nodes = [node for node in self.nodes if id(node) not in self.gone]
        alive = {name for node in nodes for name in node.output}
        shapes = {name: list(t.dims) for name, t in self.held.items()}
        # Types and shapes that were written down may be those of tensors that are no more.
        described = [v for v in graph.value_info if v.name in alive]
        # So may inputs that a file declares beside its initializers.
        folded = {t.name for t in graph.initializer} - set(self.held)
        inputs = [
            v
            for v in graph.input
            if v.name not in folded and shapes.get(v.name, _dims(v)) == _dims(v)
        ]
        for field, values in (
            (graph.node, nodes),
            (graph.initializer, list(self.held.values())),
            (graph.value_info, described),
            (graph.input, inputs),
        ):
            copies = [type(v).FromString(v.SerializeToString()) for v in values]
            del field[:]
            field.extend(copies)


def _may_fold(node: Any) -> bool:  # noqa: ANN401  # onnx.NodeProto
    if node.domain not in {"", "ai.onnx"} or node.op_type not in _FOLDED:
        return False
    return node.op_type != "Cast" or all(a.i in _FLOATS for a in node.attribute if a.name == "to")


def _fits(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether arrays of these shapes make one as large as the largest of them."""
    try:
        return np.broadcast_shapes(*shapes) in shapes
    except ValueError:
        return False


def restore_types(model: Any, stored: Mapping[str, Stored]) -> None:  # noqa: ANN401  # ModelProto
    """Store initializers in the types that they had in the file, with a Cast behind each."""
    onnx = import_onnx()
    graph = model.graph
    taken = {t.name for t in graph.initializer} | {n for node in graph.node for n in node.output}
    casts = []
    for tensor in graph.initializer:
        if tensor.name not in stored:
            continue
        name, wide = tensor.name, tensor.data_type
        narrow = f"{name}.stored"
        while narrow in taken:
            narrow += "_"
        kind = stored[name].data_type
        array = onnx.numpy_helper.to_array(tensor)
        array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, narrow))
        casts.append(onnx.helper.make_node("Cast", [narrow], [name], name=narrow, to=wide))
    if casts:
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        gone = {node.output[0] for node in casts}
        inputs = [v for v in graph.input if v.name not in gone]
        del graph.input[:]
        graph.input.extend(inputs)


def _dims(value: Any) -> list[int]:  # noqa: ANN401  # onnx.ValueInfoProto
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def _meaning(node: Any, inputs: Sequence[str]) -> bytes:  # noqa: ANN401  # onnx.NodeProto
    """Return what two nodes that compute the same of the same ``inputs`` have in common."""
    copy = type(node)()
    copy.op_type, copy.domain = node.op_type, node.domain
    copy.input.extend(inputs)
    copy.attribute.extend(sorted(node.attribute, key=lambda a: a.name))
    copy.output.extend("o" for _ in node.output)
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


def _read_by_bodies(node: Any) -> set[str]:  # noqa: ANN401  # onnx.NodeProto
    """Return every name that the bodies of If, Loop or Scan mention."""
    names: set[str] = set()
    stack = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else [*a.graphs])]
    while stack:
        graph = stack.pop()
        names.update(v.name for v in graph.output)
        for inner in graph.node:
            names.update(inner.input)
            for a in inner.attribute:
                stack.extend([a.g] if a.HasField("g") else a.graphs)
    return names
