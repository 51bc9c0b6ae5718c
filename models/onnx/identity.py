"""What an ONNX graph computes, as a digest that names and order do not change.

Every value of the graph has a digest: that of its node's operator, version, attributes and inputs,
or of the bytes of an initializer. Values of equal digests are equal, so the digests of the outputs
say what is computed. Names of nodes and values, the order of nodes and initializers, documentation,
metadata, the producer, and where bytes lie (in the file or beside it) do not count; names, types
and shapes of inputs and names of outputs do, because samples and options refer to them.

Design: docs/design/bytes.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from bitquota.canonical import digest_array, digest_bytes, digest_json
from bitquota.errors import InvalidModel
from bitquota.models.onnx.layers import sources_of
from bitquota.models.onnx.rewrites import import_onnx

if TYPE_CHECKING:
    from collections.abc import Sequence

Digests = dict[str, str]
"""Digest of every value that is known, by name."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """What nodes refer to beside their inputs.

    Attributes:
        versions: Of operators, by domain.
        functions: Local functions, by domain and name.
        known: Digests of those already described.
        depth: How many graphs surround the nodes.
    """

    versions: dict[str, int]
    functions: dict[tuple[str, str], Any]
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    depth: int = 0


def graph_digest(model: Any) -> str:  # noqa: ANN401  # onnx.ModelProto
    """Return ``sha256:…`` of what ``model`` computes, the values of its weights included.

    Initializers that no node reads are counted too: they take bytes.

    Raises:
        InvalidModel: The nodes of a graph form a ring.

    Cost: one hash over all tensors. Exact: equal digests mean equal computations.
    """
    graph = model.graph
    functions = {(f.domain, f.name): f for f in model.functions}
    scope = _Scope(_versions(model.opset_import), functions)
    values = {t.name: _tensor_digest(t) for t in graph.initializer}
    values |= {s.values.name: _sparse_digest(s) for s in graph.sparse_initializer}
    weights = sorted(values.values())
    inputs = []
    for value in graph.input:
        kind = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        described = [value.name, kind.elem_type, sizes]
        if value.name not in values:  # an initializer may be overridden by an input
            inputs.append(described)
            values[value.name] = digest_json(["input", described])
    _describe(graph.node, values, scope)
    outputs = [[v.name, values.get(v.name)] for v in graph.output]
    return digest_json(["bitquota/onnx/1", inputs, weights, outputs])


def _versions(imports: Any) -> dict[str, int]:  # noqa: ANN401  # of onnx.OperatorSetIdProto
    return {_plain(o.domain): o.version for o in imports}


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _describe(nodes: Sequence[Any], values: Digests, scope: _Scope) -> None:
    """Add the digest of everything that ``nodes`` make to ``values``."""
    maker = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    order = TopologicalSorter(
        {k: {maker[s] for s in sources_of(n) if s in maker} for k, n in enumerate(nodes)}
    )
    try:
        ordered = list(order.static_order())
    except CycleError as err:
        msg = "the nodes of an ONNX graph must not depend on themselves; some do: export it again"
        raise InvalidModel(msg) from err
    for k in ordered:
        node = nodes[k]
        made = digest_json(
            [
                _operator(node, scope),
                [values.get(name, "?") if name else None for name in _given(node.input)],
                sorted(_attribute(a, values, scope) for a in node.attribute),
                [bool(name) for name in _given(node.output)],
            ]
        )
        for at, name in enumerate(node.output):
            if name:
                values[name] = digest_json([made, at])


def _given(names: Sequence[str]) -> list[str]:
    """Return the names without optional ones that are left out at the end."""
    given = list(names)
    while given and not given[-1]:
        given.pop()
    return given


def _operator(node: Any, scope: _Scope) -> Any:  # noqa: ANN401  # onnx.NodeProto to JSON
    key = (node.domain, node.op_type)
    if key not in scope.functions:
        domain = _plain(node.domain)
        return [domain, node.op_type, scope.versions.get(domain)]
    if key not in scope.known:
        function = scope.functions[key]
        scope.known[key] = "again"  # what calls itself is refused by ONNX
        within = _Scope(_versions(function.opset_import), scope.functions, scope.known)
        values = {name: digest_json(["argument", k]) for k, name in enumerate(function.input)}
        _describe(function.node, values, within)
        defaults = sorted(_attribute(a, values, within) for a in function.attribute_proto)
        results = [values.get(name) for name in function.output]
        scope.known[key] = digest_json([results, list(function.attribute), defaults])
    return scope.known[key]


def _attribute(attribute: Any, values: Digests, scope: _Scope) -> str:  # noqa: ANN401  # onnx.AttributeProto
    kinds = import_onnx().AttributeProto
    kind = attribute.type
    described: Any
    if attribute.ref_attr_name:
        described = ["reference", attribute.ref_attr_name]
    elif kind == kinds.TENSOR:
        described = _tensor_digest(attribute.t)
    elif kind == kinds.TENSORS:
        described = [_tensor_digest(t) for t in attribute.tensors]
    elif kind == kinds.SPARSE_TENSOR:
        described = _sparse_digest(attribute.sparse_tensor)
    elif kind == kinds.SPARSE_TENSORS:
        described = [_sparse_digest(t) for t in attribute.sparse_tensors]
    elif kind == kinds.GRAPH:
        described = _subgraph(attribute.g, values, scope)
    elif kind == kinds.GRAPHS:
        described = [_subgraph(g, values, scope) for g in attribute.graphs]
    elif kind in (kinds.FLOAT, kinds.FLOATS):
        numbers = [attribute.f] if kind == kinds.FLOAT else list(attribute.floats)
        described = struct.pack(f"<{len(numbers)}f", *numbers).hex()
    elif kind in (kinds.INT, kinds.INTS):
        described = attribute.i if kind == kinds.INT else list(attribute.ints)
    elif kind in (kinds.STRING, kinds.STRINGS):
        texts = [attribute.s] if kind == kinds.STRING else list(attribute.strings)
        described = [text.hex() for text in texts]
    else:  # types
        described = digest_bytes([attribute.SerializeToString(deterministic=True)])
    return digest_json([attribute.name, kind, described])


def _subgraph(graph: Any, outer: Digests, scope: _Scope) -> str:  # noqa: ANN401  # onnx.GraphProto
    """Return the digest of a body of If, Loop or Scan, which sees the values around it."""
    within = _Scope(scope.versions, scope.functions, scope.known, scope.depth + 1)
    values = dict(outer)
    values |= {t.name: _tensor_digest(t) for t in graph.initializer}
    values |= {s.values.name: _sparse_digest(s) for s in graph.sparse_initializer}
    for k, value in enumerate(graph.input):
        values[value.name] = digest_json(["bound", within.depth, k])
    _describe(graph.node, values, within)
    return digest_json([len(graph.input), [values.get(v.name, "?") for v in graph.output]])


def _tensor_digest(tensor: Any) -> str:  # noqa: ANN401  # onnx.TensorProto
    onnx = import_onnx()
    if tensor.data_type == onnx.TensorProto.STRING:
        return digest_json(["strings", list(tensor.dims), [s.hex() for s in tensor.string_data]])
    # numpy has one type for several of ONNX's narrow ones.
    return digest_json([tensor.data_type, digest_array(onnx.numpy_helper.to_array(tensor))])


def _sparse_digest(tensor: Any) -> str:  # noqa: ANN401  # onnx.SparseTensorProto
    parts = [_tensor_digest(tensor.values), _tensor_digest(tensor.indices)]
    return digest_json(["sparse", *parts, list(tensor.dims)])
