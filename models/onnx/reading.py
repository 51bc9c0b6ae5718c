"""ONNX files in: vetted, and brought to the form in which weights are initializers of the graph.

Nothing of a file is run here. What it can make grow is bounded: local functions are inlined only
if the result is of bounded size, sparse tensors become dense within a limit.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidModel, UnsafeModel
from bitquota.models.onnx.branches import resolve_branches
from bitquota.models.onnx.folding import Stored, fold_weights
from bitquota.models.onnx.matrices import expose_matrices
from bitquota.models.onnx.rewrites import import_onnx
from bitquota.models.onnx.sessions import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bitquota.models.onnx.layers import Matrix

MAX_OPSET = 25
MAX_NODES = 200_000
"""Nodes of a graph after its local functions are inlined; the largest known has some 30,000."""

MAX_NESTING = 64
"""Functions that call one another."""

MAX_DENSE_BYTES = 2**30
"""Bytes of all sparse tensors of a file when they are dense."""

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def read_onnx(path: Path) -> Any:  # noqa: ANN401  # onnx.ModelProto
    """Return the checked ``onnx.ModelProto`` of ``path``, external data included.

    Raises:
        InvalidModel: Not an ONNX file, truncated, or above opset 25.
        UnsafeModel: Operators of unknown domains, or external data outside the file's folder.
        MissingDependency: onnx is not installed.
    """
    onnx = import_onnx()
    try:
        model = onnx.load(str(path))
    except onnx.checker.ValidationError as err:
        msg = f"external data of '{path.name}' must lie in its own folder: {first_line(err)}"
        raise UnsafeModel(msg) from err
    except Exception as err:  # protobuf and onnx raise kinds of their own
        msg = f"an ONNX model must be a whole file; '{path.name}' cannot be read: {first_line(err)}"
        raise InvalidModel(msg, source=str(path)) from err
    if _names_a_file(model):
        msg = (
            f"all tensors of an ONNX model must be in the file or be initializers beside it; "
            f"'{path.name}' names a file elsewhere in its graph: save it with its weights inside"
        )
        raise UnsafeModel(msg, source=str(path))
    opsets = {o.domain: o.version for o in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not model.graph.node or not 1 <= opset <= MAX_OPSET:
        msg = (
            f"an ONNX model must have nodes and an opset from 1 to {MAX_OPSET}; '{path.name}' has "
            f"{len(model.graph.node)} nodes and opset {opset}"
        )
        raise InvalidModel(msg, opset=opset)
    used = {node.domain for node in _all_nodes(model.graph)}
    used.update(n.domain for f in model.functions for n in _all_nodes(f))
    if foreign := sorted(used - _DOMAINS - {f.domain for f in model.functions}):
        msg = f"an ONNX model must use standard operators; '{path.name}' uses domain '{foreign[0]}'"
        raise UnsafeModel(msg, domains=foreign)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedGraph:
    """A graph whose weights are initializers that their operators read.

    Attributes:
        model: ``onnx.ModelProto``.
        stored: How the file stores initializers that were folded.
        matrices: Initializers that were taken out of weights of recurrent layers and contractions.
    """

    model: Any
    stored: dict[str, Stored]
    matrices: dict[str, Matrix]


def read_normalized(path: Path) -> NormalizedGraph:
    """Return the graph of ``path`` with every weight as an initializer that its operator reads.

    The same function for the same file wherever it is read: local functions are inlined, constants
    (of If and Loop bodies too) and sparse tensors become initializers of the graph, and casts,
    transposes and other arithmetic on a weight alone is done (see ``folding``), gates and tensors
    of contractions become matrices (see ``matrices``). Inputs, outputs and nodes keep their names;
    a node without a name of its own gets that of its first output.

    Raises:
        InvalidModel: Also if functions call themselves, or grow beyond ``MAX_NODES``.
        UnsafeModel: As ``read_onnx``.
    """
    return normalized(read_onnx(path))


def normalized(model: Any) -> NormalizedGraph:  # noqa: ANN401  # onnx.ModelProto
    """Return ``model``, which is changed, as ``read_normalized`` does; raises what it raises."""
    _densify(model)
    model = _flattened(model)
    stored = fold_weights(model)
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:
            node.name = _free(next(filter(None, node.output), node.op_type), taken)
            taken.add(node.name)
        seen.add(node.name)
    return NormalizedGraph(model=model, stored=stored, matrices=expose_matrices(model))


def _free(name: str, taken: set[str]) -> str:
    unique, k = name, 1
    while unique in taken:
        k += 1
        unique = f"{name}_{k}"
    return unique


def _all_nodes(graph: Any) -> Iterator[Any]:  # noqa: ANN401  # GraphProto or FunctionProto
    """Yield every node, those of the bodies of If, Loop and Scan included."""
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack.extend([attribute.g] if attribute.HasField("g") else [])
                stack.extend(attribute.graphs)


def _flattened(model: Any) -> Any:  # noqa: ANN401  # onnx.ModelProto
    """Return the model without local functions, Constant nodes, and initializers in bodies."""
    nodes = list(_all_nodes(model.graph))
    bodies = [n for n in nodes if any(a.HasField("g") or a.graphs for a in n.attribute)]
    constants = [n for n in nodes if n.op_type == "Constant"]
    if not (model.functions or constants or bodies):
        return model
    _check_growth(model)
    import onnx_ir
    from onnx_ir.passes import common

    converted = onnx_ir.from_proto(model)
    common.InlinePass()(converted)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
    common.LiftSubgraphInitializersToMainGraphPass()(converted)
    resolve_branches(converted)
    # A function that is called twice has one weight, not two.
    known: dict[int, Any] = {}
    held = converted.graph.initializers
    for name, value in list(held.items()):
        first = known.setdefault(id(value.const_value), value)
        if first is not value and not value.is_graph_output() and not value.is_graph_input():
            value.replace_all_uses_with(first)
            del held[name]
    return onnx_ir.to_proto(converted)


def _check_growth(model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
    """Raise ``InvalidModel`` if inlining does not end, or makes too many nodes.

    Cost: each function is counted once, whatever it grows to.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(graph: Any, path: tuple[tuple[str, str], ...]) -> int:  # noqa: ANN401
        total = 0
        for node in _all_nodes(graph):
            key = (node.domain, node.op_type)
            if key not in functions:
                total += 1
                continue
            if key in path or len(path) >= MAX_NESTING:
                msg = (
                    f"local functions must not call themselves, nor nest {MAX_NESTING} deep; "
                    f"'{node.op_type}' does: export the model without functions"
                )
                raise InvalidModel(msg, function=node.op_type)
            if key not in sizes:
                sizes[key] = size(functions[key], (*path, key))
            total += sizes[key]
        if total > MAX_NODES:
            msg = (
                f"a graph must have at most {MAX_NODES:,} nodes when its local functions are "
                f"inlined; it has more: export the model without functions"
            )
            raise InvalidModel(msg, limit=MAX_NODES)
        return total

    size(model.graph, ())


def _densify(model: Any) -> None:  # noqa: ANN401  # onnx.ModelProto
    """Turn sparse initializers and sparse Constant nodes into dense tensors."""
    left = MAX_DENSE_BYTES
    graphs = [model.graph]
    for node in [*_all_nodes(model.graph), *(n for f in model.functions for n in _all_nodes(f))]:
        for attribute in node.attribute:
            graphs.extend([attribute.g] if attribute.HasField("g") else [])
            graphs.extend(attribute.graphs)
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                dense = _dense(attribute.sparse_tensor, left)
                left -= len(dense.raw_data)
                attribute.Clear()
                attribute.name, attribute.type = "value", 4  # AttributeProto.TENSOR
                attribute.t.CopyFrom(dense)
    for graph in graphs:
        for sparse in graph.sparse_initializer:
            dense = _dense(sparse, left)
            left -= len(dense.raw_data)
            graph.initializer.append(dense)
        del graph.sparse_initializer[:]


def _dense(sparse: Any, limit: int) -> Any:  # noqa: ANN401  # SparseTensorProto to TensorProto
    to_array = import_onnx().numpy_helper.to_array
    values, indices, dims = to_array(sparse.values), to_array(sparse.indices), list(sparse.dims)
    n = math.prod(dims)
    if min(dims, default=0) < 1 or n * values.dtype.itemsize > limit:
        msg = (
            f"a sparse tensor must have dimensions from 1, and all of them at most "
            f"{MAX_DENSE_BYTES:,} bytes when dense; '{sparse.values.name}' has {dims}: save the "
            "model with dense weights"
        )
        raise InvalidModel(msg, tensor=sparse.values.name)
    flat = np.zeros(n, values.dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dims)
    flat[indices] = values
    return import_onnx().numpy_helper.from_array(flat.reshape(dims), sparse.values.name)


def _names_a_file(message: Any) -> bool:  # noqa: ANN401  # a protobuf message
    """Whether a tensor is still to be read from a file, or from an address of the process.

    ``onnx.load`` has read those of initializers and attributes, under its checks; ONNX Runtime
    would read the others, in function bodies or sparse tensors, with fewer.
    """
    if getattr(message, "data_location", 0) == 1:  # TensorProto.EXTERNAL
        return True
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.name != "metadata_props":
            value = getattr(message, field.name)
            if field.is_repeated:
                if any(_names_a_file(member) for member in value):
                    return True
            elif message.HasField(field.name) and _names_a_file(value):
                return True
    return False
