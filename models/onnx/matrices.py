"""Weights of recurrent layers, Einsum and batched MatMul, stored as matrices.

LSTM, GRU and RNN take the matrices of all gates and directions stacked in one tensor; a batched
MatMul and Einsum take tensors of any rank. Here each such initializer becomes matrices of one row
per output, with the Concat, Reshape and Transpose in front of the operator that stack them again.
So each gate may have its own bit-width, and an export needs no kind of storage of its own.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.layers import LayerKind
from bitquota.models.onnx.layers import FLOATS, Matrix, readers
from bitquota.models.onnx.rewrites import import_onnx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_GATES = {"LSTM": ("i", "o", "f", "c"), "GRU": ("z", "r", "h"), "RNN": ("h",)}
"""Gates in the order in which ONNX stacks them; of both directions, the forward one first."""


def expose_matrices(model: Any) -> dict[str, Matrix]:  # noqa: ANN401  # onnx.ModelProto
    """Store the weights of recurrent and contracting operators as matrices, in place.

    Returns:
        The matrices by the names of their initializers. A weight that any other node reads, or
        that is an output of the graph, stays as it is.
    """
    splitter = _Splitter(model)
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"} or len(node.input) < 2:
            continue
        if node.op_type in _GATES and len(node.input) > 2:
            for place, which in ((1, "W"), (2, "R")):
                splitter.split_gates(node, node.input[place], which)
        elif node.op_type == "MatMul":
            splitter.split_product(node)
        elif node.op_type == "Einsum" and len(node.input) == 2:
            splitter.split_contraction(node)
    splitter.finish()
    return splitter.found


class _Splitter:
    def __init__(self, model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
        self.graph = model.graph
        self.held = {t.name: t for t in self.graph.initializer}
        self.readers = readers(self.graph)
        self.outputs = {v.name for v in self.graph.output}
        self.taken = {*self.held, *self.readers, *self.outputs}
        self.taken.update(name for node in self.graph.node for name in node.output)
        self.found: dict[str, Matrix] = {}
        self.new_nodes: list[Any] = []
        self.new: list[Any] = []
        self.gone: set[str] = set()

    def split_gates(self, node: Any, name: str, which: str) -> None:  # noqa: ANN401
        """Give each gate of each direction an initializer of its own."""
        weight = self._own_weight(name, 3)
        gates = _GATES[node.op_type]
        if weight is None or weight.shape[1] % len(gates):
            return
        directions = weight.shape[0]
        rows = weight.shape[1] // len(gates)
        ways = ("",) if directions == 1 else ("forward.", "backward.")
        parts = []
        for way, matrices in zip(ways, weight, strict=True):
            for k, gate in enumerate(gates):
                part = self._matrix(
                    f"{name}.{way}{gate}", matrices[k * rows : (k + 1) * rows], node,
                    LayerKind.RECURRENT, f"{node.name}.{which}.{way}{gate}", node.input[0],
                )  # fmt: skip
                parts.append(part)
        stacked = parts[0]
        if len(parts) > 1:
            stacked = self._free(f"{name}.stacked")
            self._node("Concat", parts, stacked, axis=0)
        self._reshape(stacked, weight.shape, name)
        self.gone.add(name)

    def split_product(self, node: Any) -> None:  # noqa: ANN401  # onnx.NodeProto
        """Store the constant side of a batched MatMul with one row per output."""
        for place in (1, 0):
            name = node.input[place]
            tensor = self.held.get(name)
            if tensor is None or len(tensor.dims) < 3:
                continue
            axes = list(range(len(tensor.dims)))
            order = [*axes[:-2], axes[-1], axes[-2]] if place else axes
            self._contract(node, name, order, 1, node.input[1 - place])
            return

    def split_contraction(self, node: Any) -> None:  # noqa: ANN401  # onnx.NodeProto
        """Store the constant side of an Einsum: kept letters are rows, summed ones columns."""
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        terms, arrow, result = equation.replace(" ", "").partition("->")
        sides = terms.split(",")
        if not arrow or len(sides) != 2:
            return
        for place in (1, 0):
            name, letters = node.input[place], sides[place]
            tensor = self.held.get(name)
            if tensor is None or len(tensor.dims) < 2 or not letters.isalpha():
                continue
            if len(set(letters)) != len(letters) or len(letters) != len(tensor.dims):
                continue
            kept = [k for k, letter in enumerate(letters) if letter in result]
            summed = [k for k, letter in enumerate(letters) if letter not in result]
            if kept and summed:
                self._contract(node, name, [*kept, *summed], len(summed), node.input[1 - place])
                return

    def _contract(
        self,
        node: Any,  # noqa: ANN401  # onnx.NodeProto
        name: str,
        order: Sequence[int],
        n_summed: int,
        data: str,
    ) -> None:
        weight = self._own_weight(name, 2)
        if weight is None or data in self.held:
            return
        turned = weight.transpose(order)
        columns = math.prod(turned.shape[-n_summed:])
        label = name.removesuffix(".weight") if name.endswith(".weight") else node.name
        part = self._matrix(
            f"{name}.matrix", turned.reshape(-1, columns), node, LayerKind.CONTRACTION, label, data
        )
        plain = list(order) == sorted(order)
        shaped = name if plain else self._free(f"{name}.shaped")
        self._reshape(part, turned.shape, shaped)
        if not plain:
            self._node("Transpose", [shaped], name, perm=[int(k) for k in np.argsort(order)])
        self.gone.add(name)

    def _own_weight(self, name: str, rank: int) -> NDArray[Any] | None:
        """Return a floating-point initializer that one node alone reads."""
        tensor = self.held.get(name)
        if tensor is None or tensor.data_type not in FLOATS or len(tensor.dims) < rank:
            return None
        if len(self.readers[name]) != 1 or name in self.outputs or 0 in tensor.dims:
            return None
        if list(self.readers[name][0].input).count(name) != 1 or name in self.gone:
            return None
        array: NDArray[Any] = import_onnx().numpy_helper.to_array(tensor)
        return array

    def _matrix(
        self,
        wanted: str,
        values: NDArray[Any],
        node: Any,  # noqa: ANN401  # onnx.NodeProto
        kind: LayerKind,
        label: str,
        data: str,
    ) -> str:
        name = self._free(wanted)
        self.new.append(import_onnx().numpy_helper.from_array(np.ascontiguousarray(values), name))
        self.found[name] = Matrix(name=label, kind=kind, node=node.name, data=data)
        return name

    def _reshape(self, source: str, shape: Sequence[int], target: str) -> None:
        numbers = self._free(f"{target}.shape")
        array = np.array(shape, np.int64)
        self.new.append(import_onnx().numpy_helper.from_array(array, numbers))
        self._node("Reshape", [source, numbers], target)

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:  # noqa: ANN401
        make = import_onnx().helper.make_node
        # Without a name of its own: any could be that of another node.
        self.new_nodes.append(make(operator, inputs, [output], **attributes))

    def _free(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def finish(self) -> None:
        """Write nodes and initializers back into the graph."""
        if not self.gone:
            return
        graph = self.graph
        tensors = [t for t in graph.initializer if t.name not in self.gone] + self.new
        inputs = [v for v in graph.input if v.name not in self.gone]
        nodes = [*self.new_nodes, *graph.node]
        for field, values in (
            (graph.initializer, tensors), (graph.input, inputs), (graph.node, nodes)
        ):  # fmt: skip
            copies = [type(v).FromString(v.SerializeToString()) for v in values]
            del field[:]
            field.extend(copies)
