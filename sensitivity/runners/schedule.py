"""What a run of a graph executes, and which values it keeps.

Design: docs/design/runners.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import fx

    from bitquota.models.graph import Graph, Operation

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Which operations a run executes, and after which of them which values can go."""

    operations: tuple[Operation, ...]
    free: tuple[tuple[fx.Node, ...], ...]
    keep: frozenset[fx.Node]
    macs: float


def make_schedule(graph: Graph, known: Collection[fx.Node], wanted: frozenset[fx.Node]) -> Schedule:
    """Return what must run so that the outputs and ``wanted`` are there, if ``known`` is."""
    outputs = set(graph.output_nodes)
    needed = _needed(graph, outputs | wanted.difference(known), known)
    operations = tuple(op for op in graph.operations if op.node in needed)
    last_use = {s: op.index for op in operations for s in op.sources if s in needed}
    freeable = needed - outputs - wanted
    free = tuple(
        tuple(
            s
            for s in dict.fromkeys((*op.sources, op.node))
            if s in freeable and last_use.get(s, op.index) == op.index
        )
        for op in operations
    )
    return Schedule(operations, free, wanted & needed, sum(op.macs for op in operations))


def _needed(graph: Graph, targets: set[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """Return the operations behind ``known`` that ``targets`` depend on, walking backwards."""
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in graph.by_node and node not in known and node not in needed:
            needed.add(node)
            stack.extend(graph.by_node[node].sources)
    return needed


def thin_out(graph: Any, wanted: set[_Key], limit: int) -> frozenset[_Key]:  # noqa: ANN401
    """Return the subset of ``wanted`` to keep within ``limit`` bytes.

    ``graph`` has ``operations`` in order, each with its ``macs``, and ``by_node``: every value's
    ``index`` among them and its ``n_bytes``.

    Values are dropped in the order of what recomputing them from the kept value before costs per
    byte saved; the cheapest go first. Heuristic: costs are taken along the order of operations.
    """
    kept = sorted(wanted, key=lambda node: (graph.by_node[node].index, str(node)))
    total = sum(graph.by_node[node].n_bytes for node in kept)
    running = [0.0]
    for op in graph.operations:
        running.append(running[-1] + op.macs)
    while total > limit and kept:
        ends = [graph.by_node[node].index + 1 for node in kept]
        starts = [0, *ends[:-1]]

        def price(k: int, starts: list[int] = starts, ends: list[int] = ends) -> float:
            redo = running[ends[k]] - running[starts[k]]
            saved: int = graph.by_node[kept[k]].n_bytes
            return float(redo + 1.0) / max(1, saved)

        dropped = kept.pop(min(range(len(kept)), key=price))
        total -= graph.by_node[dropped].n_bytes
    return frozenset(kept)
