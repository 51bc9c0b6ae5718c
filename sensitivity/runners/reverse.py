"""Reverse-mode differentiation of an exported graph: how its output answers to changed weights.

Design: docs/design/runners.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.running import checked_output
from bitquota.quantizers.apply import input_quantizer
from bitquota.sensitivity.runners.base import in_precision
from bitquota.sensitivity.runners.graph import consumers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, fx

    from bitquota.candidates.table import Candidate
    from bitquota.models.graph import Graph, Operation
    from bitquota.sensitivity.runners.base import Change
    from bitquota.sensitivity.runners.graph import GraphRunner


def linear_responses(
    runner: GraphRunner,
    chunk: int,
    base: Change,
    rows: Sequence[Change],
    seeds: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Differentiate the output with respect to every row's change of weights, in reverse.

    Without corrections, which make samples depend on each other.

    The output of every operation that reads a changed weight moves, to first order, by
    ``op(a; W + ΔW) - op(a; W)``. One backward pass per seed ``v`` gives ``v·J`` at all these
    operations at once, whatever their number.

    Args:
        runner: Runs the model.
        chunk: Which chunk.
        base: The point at which to differentiate.
        rows: Changes on top of it.
        seeds: Output ``[n, ...]`` to ``f[r, n, ...]``, directions in output space.

    Returns:
        The output at the base point and ``f64[r, k, n]``: seed times response of each row.

    Raises:
        InvalidModel: A weight is transformed before it meets the data.
        InvalidInput: The base point quantizes inputs: rounding has no derivative.

    Cost: one forward pass, one operation per row and layer, ``r`` backward passes.
    """
    size = len(runner.chunks[chunk])
    graph = runner.graph(size)
    constants = _constants(runner, graph, base)
    readers = {name: _readers(graph, name) for name in {n for row in rows for n in row}}

    # Forward at the base point, with gradients from the operations that read changed weights on.
    values = runner.fed(graph, chunk)

    def lookup(node: fx.Node) -> Any:  # noqa: ANN401
        return values[node] if node in values else graph.static_values[node]

    watched = {op.node for ops in readers.values() for op in ops}
    products = dict[Any, Any]()
    with torch.enable_grad(), in_precision(runner.precision, runner.device):
        for op in graph.operations:
            if op.node in graph.static_values:
                continue
            value = graph.execute(op, lookup, constants)
            if op.node in watched:
                products[op.node] = value if value.requires_grad else value.requires_grad_()
            values[op.node] = value
        results = {n: constants[n] if n in constants else lookup(n) for n in graph.output_nodes}
        output = checked_output(graph.restore(results), size)

    # Backward, once for each direction.
    directions = seeds(output.detach())
    gradients = [
        torch.autograd.grad(
            output,
            list(products.values()),
            grad_outputs=direction.to(output.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        for direction in directions
    ]
    felt = [dict(zip(products, gradient, strict=True)) for gradient in gradients]
    runner.passes.macs += graph.macs * (1 + len(directions))
    runner.passes.calls += 1 + len(directions)

    # What each row's weights change at these operations, times the gradients there.
    responses = torch.zeros((len(directions), len(rows), size), dtype=torch.float64)
    responses = responses.to(output.device)
    with torch.no_grad():
        for k, row in enumerate(rows):
            for name, candidate in row.items():
                changed = constants | dict.fromkeys(
                    graph.weight_nodes[name], runner.weights(candidate)
                )
                quantizer = _quantizer(runner, graph, name, candidate)
                for op in readers[name]:
                    moved = graph.execute(op, lookup, changed, quantizer) - products[op.node]
                    runner.passes.macs += op.macs
                    for r, gradient in enumerate(felt):
                        if gradient[op.node] is not None:
                            product = (gradient[op.node] * moved).reshape(size, -1)
                            responses[r, k] += product.sum(dim=1, dtype=torch.float64)
    return output.detach(), responses


def local_passes(runner: GraphRunner, layers: Sequence[str]) -> float:
    """Return the passes of running the operations of each of ``layers`` once, by themselves.

    Raises:
        InvalidModel: A weight is transformed before it meets the data.
    """
    graph = runner.graph(len(runner.chunks[0]))
    own = {name: sum(op.macs for op in _readers(graph, name)) for name in set(layers)}
    return sum(own[name] for name in layers) / graph.macs


def _constants(runner: GraphRunner, graph: Graph, base: Change) -> dict[fx.Node, Any]:
    """Return the constants of the graph at the base point."""
    constants = dict(graph.constants)
    for name, candidate in base.items():
        if candidate.activation_bits is not None:
            msg = (
                "reverse-mode sensitivities need a base point without quantized inputs; layer "
                f"'{name}' has {candidate.activation_bits} bits: use the measure 'gram'"
            )
            raise InvalidInput(msg, layer=name)
        for node in graph.weight_nodes[name]:
            constants[node] = runner.weights(candidate)
    return constants


def _quantizer(
    runner: GraphRunner, graph: Graph, name: str, candidate: Candidate
) -> Callable[[Tensor], Tensor] | None:
    """Return what quantizes the layer's input, which must be visible in the graph."""
    if candidate.activation_bits is None:
        return None
    for node in graph.weight_nodes[name]:
        consumers(graph, node, name)
    return input_quantizer(runner.activations, name, candidate.activation_bits)


def _readers(graph: Graph, layer: str) -> list[Operation]:
    """Return the operations in which the layer's weight meets the data."""
    weights = set(graph.weight_nodes[layer])
    moving = set(graph.input_nodes)
    for op in graph.operations:
        if any(source in moving for source in op.sources):
            moving.add(op.node)
    found = []
    for op in graph.operations:
        if not any(source in weights for source in op.sources):
            continue
        if op.node not in moving:
            msg = (
                f"for reverse-mode sensitivities the weight of layer '{layer}' must meet the data "
                f"as it is stored; '{op.node.target}' transforms it first: use the measure 'gram'"
            )
            raise InvalidModel(msg, layer=layer)
        found.append(op)
    return found
