"""Outputs of an ONNX graph, and graphs that end where a loss is measured.

Design: docs/design/outputs.md
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.models.onnx.rewrites import import_onnx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bitquota.models.onnx.program import OnnxSource
    from bitquota.plan import PlanOutput

_TINY = float(np.finfo(np.float32).tiny)
_ENDS = {"softmax": "Softmax", "sigmoid": "Sigmoid", "argmax": "ArgMax"}


def onnx_outputs(
    module: nn.Module, source: OnnxSource, inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Return every output of the graph by name; those that no node makes are left out."""
    program = source.program("eval")
    names = [name for name in source.outputs if name in program.maker]
    needed = program.needed(names, ())
    pieces: list[dict[str, Any]] = [
        program.run(needed, names, {}, source.feeds(module) | piece)
        for piece in source.pieces(inputs)
    ]
    n = len(inputs[0])
    found = {}
    for name in names:
        parts = [piece[name] for piece in pieces]
        if not isinstance(parts[0], np.ndarray):
            continue  # a sequence or map of ONNX-ML
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if source.fixed_batch is not None and whole.ndim:
            whole = whole[:n]
        kept = whole.astype(np.float32) if np.issubdtype(whole.dtype, np.floating) else whole
        found[name] = torch.from_numpy(np.ascontiguousarray(kept)).to(inputs[0].device)
    return found


def measuring_onnx(
    module: nn.Module, source: OnnxSource, outputs: Sequence[PlanOutput], *, before: bool
) -> nn.Module:
    """Return the module with a graph that ends in what ``outputs`` say; see ``measuring``."""
    onnx = import_onnx()
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output if name}
    opset = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    added = _Additions(graph)

    # Each output with its softmax or sigmoid undone: what went into it, or else the logarithm.
    values = []
    for read in outputs:
        node = maker[read.name]
        while node.op_type == "Identity" and node.input[0] in maker:
            node = maker[node.input[0]]
        if before and node.op_type == _ENDS.get(read.undone):
            value, axis = node.input[0], _axis(node, read, opset)
        else:
            value, axis = _undone(added, read), read.axis
        if axis != -1 and read.undone != "sigmoid":
            rank = len(read.shape) + 1
            order = [k for k in range(rank) if k != axis % rank] + [axis % rank]
            value = added.node("Transpose", [value], perm=order)
        values.append(value)

    # Several outputs become one row for each sample, and the graph ends there.
    if len(values) > 1:
        flat = [added.node("Flatten", [added.to_float(value)]) for value in values]
        values = [added.node("Concat", flat, axis=1)]
    (output,) = values
    del graph.output[:]
    graph.output.append(onnx.ValueInfoProto(name=output))
    other = copy.copy(module)
    other.end_in(replace(source, model=model, output=output))  # type: ignore[operator]
    return other


class _Additions:
    """Nodes and constants added to a graph under names that it does not have yet."""

    def __init__(self, graph: Any) -> None:  # noqa: ANN401  # onnx.GraphProto
        self.graph = graph
        self.taken = {name for node in graph.node for name in node.output}
        self.taken |= {v.name for v in graph.input} | {t.name for t in graph.initializer}

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:  # noqa: ANN401
        """Add a node at the end and return the name of its output."""
        made = self._fresh(f"bitquota.{operator}")
        helper = import_onnx().helper
        self.graph.node.append(helper.make_node(operator, inputs, [made], **attributes))
        return made

    def to_float(self, value: str) -> str:
        """Add a cast to float32 and return the name of its output."""
        return self.node("Cast", [value], to=import_onnx().TensorProto.FLOAT)

    def constant(self, value: float) -> str:
        """Add a float32 number and return its name."""
        name = self._fresh("bitquota.constant")
        tensor = import_onnx().numpy_helper.from_array(np.float32(value), name)
        self.graph.initializer.append(tensor)
        return name

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _undone(added: _Additions, read: PlanOutput) -> str:
    """Return the name of an output whose softmax (up to a constant) or sigmoid is undone."""
    if not read.undone:
        return read.name
    value = added.to_float(read.name)
    if read.undone == "softmax":
        return added.node("Log", [added.node("Max", [value, added.constant(_TINY)])])
    if read.undone == "sigmoid":
        p = added.node("Min", [value, added.constant(1 - float(np.finfo(np.float32).eps) / 2)])
        p = added.node("Max", [p, added.constant(_TINY)])
        rest = added.node("Log", [added.node("Sub", [added.constant(1.0), p])])
        return added.node("Sub", [added.node("Log", [p]), rest])
    return value


def _axis(node: Any, read: PlanOutput, opset: int) -> int:  # noqa: ANN401  # onnx.NodeProto
    """Return over which axis a node goes, -1 for the last."""
    default = {"ArgMax": 0, "Softmax": -1 if opset >= 13 else 1}.get(node.op_type, -1)
    axis = next((int(a.i) for a in node.attribute if a.name == "axis"), default)
    rank = len(read.shape) + 1
    return -1 if axis in (-1, rank - 1) else axis
