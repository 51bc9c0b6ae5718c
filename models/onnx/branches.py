"""If nodes whose condition follows from declared shapes and constants, replaced by their branch.

Exporters leave them behind for questions that a file's own inputs answer ("is there a state?").
What a branch multiplies with is then found, counted and exported as in any graph. Only arithmetic
on a few integers is done here, of shapes that ONNX Runtime insists on; everything else is unknown.

Design: docs/design/models.md
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ROUNDS = 64
"""Branches that are inlined one within another."""

_MAX_VALUES = 64

_PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": operator.eq, "Greater": operator.gt, "GreaterOrEqual": operator.ge,
    "Less": operator.lt, "LessOrEqual": operator.le, "Add": operator.add, "Sub": operator.sub,
    "Mul": operator.mul,
    "And": lambda a, b: bool(a and b), "Or": lambda a, b: bool(a or b), "Xor": operator.ne,
}  # fmt: skip
_SAME = frozenset({"Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten"})
_INTEGERS = frozenset({2, 3, 4, 5, 6, 7, 12, 13})
_BOOL = 9


def resolve_branches(model: Any) -> None:  # noqa: ANN401  # onnx_ir.Model
    """Replace every such If of the graph by its branch, in place; names of outputs stay.

    Args:
        model: Its constants are initializers of the graph, also those of bodies.

    Cost: one inference of shapes for each depth of nesting, if there is an If at all.
    """
    graph = model.graph
    for _ in range(MAX_ROUNDS):
        branches = [node for node in graph if node.op_type == "If" and not node.domain]
        if not branches:
            return
        known = _known_numbers(model)
        chosen = []
        for node in branches:
            condition = known.get(node.inputs[0]) if node.inputs else None
            if condition is not None and len(condition) == 1 and condition[0] is not None:
                body = node.attributes.get("then_branch" if condition[0] else "else_branch")
                if body is not None and len(body.as_graph().outputs) == len(node.outputs):
                    chosen.append((node, body.as_graph()))
        if not chosen:
            return
        for node, body in chosen:
            _inline(model, node, body)


def _known_numbers(model: Any) -> dict[Any, list[int | None]]:  # noqa: ANN401  # onnx_ir
    """Return what is known of small integers and flags in the graph, by value.

    A scalar or vector is a list, with ``None`` where a number is not known.
    """
    from onnx_ir.passes import common

    graph = model.graph
    stated = [(value, value.shape, value.type) for value in _all_values(model)]
    for value, _, _ in stated:
        # Shapes in between that a file states bind nobody: they are inferred anew, and put back.
        if value.producer() is not None:
            value.shape = None
    # Where shapes cannot be inferred, nothing is known.
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        common.ShapeInferencePass(strict_mode=False, data_prop=True)(model)
        known: dict[Any, list[int | None]] = {}
        for value in graph.initializers.values():
            if (found := _constant(value)) is not None:
                known[value] = found
        for node in graph:
            found = None if node.domain or len(node.outputs) != 1 else _result(node, known)
            if found is not None and len(found) <= _MAX_VALUES:
                known[node.outputs[0]] = found
        return known
    finally:
        logger.setLevel(level)
        for value, shape, kind in stated:
            value.shape, value.type = shape, kind


def _constant(value: Any) -> list[int | None] | None:  # noqa: ANN401  # onnx_ir.Value
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or len(tensor.shape) > 1:
        return None
    if tensor.size > _MAX_VALUES or int(tensor.dtype) not in {*_INTEGERS, _BOOL}:
        return None
    return [int(v) for v in tensor.numpy().reshape(-1)]


def _result(node: Any, known: dict[Any, list[int | None]]) -> list[int | None] | None:  # noqa: ANN401
    """Return what a node makes of known numbers, or ``None`` if that is not known."""
    kind = node.op_type
    if kind == "Shape":
        return _shape(node)
    inputs = [known.get(value) for value in node.inputs if value is not None]
    # The second input of a view only says which axes have one element.
    needed = inputs[:1] if kind in _SAME else inputs
    if not needed or any(numbers is None for numbers in needed):
        return None
    first: list[int | None] = inputs[0] or []
    if kind in _SAME:
        return first
    if kind == "Cast":
        return _cast(node, first)
    if kind == "Not":
        return _each(operator.not_, first)
    if kind == "Concat":
        return [v for numbers in inputs for v in numbers or ()]
    return _of_two(kind, first, inputs[1] or []) if len(inputs) == 2 else None


def _shape(node: Any) -> list[int | None] | None:  # noqa: ANN401  # onnx_ir.Node
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) and size > 0 else None for size in value.shape]
    bounds = {n: node.attributes[n].as_int() for n in ("start", "end") if n in node.attributes}
    return list(sizes[bounds.get("start", 0) : bounds.get("end", len(sizes))])


def _cast(node: Any, numbers: list[int | None]) -> list[int | None] | None:  # noqa: ANN401
    to = node.attributes["to"].as_int() if "to" in node.attributes else 0
    if to == _BOOL:
        return _each(bool, numbers)
    return numbers if to in _INTEGERS else None


def _each(function: Callable[[Any], bool], numbers: list[int | None]) -> list[int | None]:
    return [None if v is None else int(function(v)) for v in numbers]


def _of_two(
    kind: str, first: list[int | None], second: list[int | None]
) -> list[int | None] | None:
    if kind == "Gather":
        return _gathered(first, second)
    return _pairwise(_PAIRS[kind], first, second) if kind in _PAIRS else None


def _gathered(numbers: list[int | None], places: list[int | None]) -> list[int | None] | None:
    n = len(numbers)
    if any(k is None or not -n <= k < n for k in places):
        return None
    return [numbers[k] for k in places if k is not None]


def _pairwise(
    function: Callable[[Any, Any], Any], a: list[int | None], b: list[int | None]
) -> list[int | None] | None:
    n = max(len(a), len(b))
    if {len(a), len(b)} - {1, n}:
        return None
    pairs = zip(a * n if len(a) == 1 else a, b * n if len(b) == 1 else b, strict=False)
    return [None if x is None or y is None else int(function(x, y)) for x, y in pairs]


def _all_values(model: Any) -> list[Any]:  # noqa: ANN401  # onnx_ir
    """Return the values of the graph and of all bodies."""
    import onnx_ir

    mappings = map(onnx_ir.convenience.create_value_mapping, model.graphs())
    return list({id(v): v for found in mappings for v in found.values()}.values())


def _inline(model: Any, node: Any, body: Any) -> None:  # noqa: ANN401  # onnx_ir
    """Put the nodes of a branch in the place of an If."""
    import onnx_ir

    formal, actual, graph = list(body.outputs), list(node.outputs), model.graph
    body.outputs.clear()
    nodes = list(body)
    body.remove(nodes)
    # Bodies beside one another may use the same names, but none of those around them.
    taken = {value.name for value in _all_values(model)}
    for value in (value for inner in nodes for value in inner.outputs):
        while value.name in taken:
            value.name += "_"
        taken.add(value.name)
    graph.insert_before(node, nodes)
    for made, wanted in zip(formal, actual, strict=True):
        name = wanted.name
        if not name:
            continue
        step = onnx_ir.node("Identity", [made])
        graph.insert_before(node, step)
        wanted.replace_all_uses_with(step.outputs[0], replace_graph_outputs=True)
        wanted.name, step.outputs[0].name = f"{name}_", name
        step.outputs[0].shape, step.outputs[0].type = wanted.shape, wanted.type
    graph.remove(node, safe=True)
