"""A runner over the exported graph: re-executes only what lies behind a changed layer.

``torch.export`` gives the model as a list of operations. The operations *behind* a layer are
those that depend on its weight; everything else keeps its value from the state. What a later run
will read of a state (the cut in front of each layer, residual inputs and parallel branches
included) follows from the graph, so cut points need no knowledge of the architecture. Values that
do not fit the memory limit are left out and recomputed from what was kept.

The operations are those of the module, in the same order, on the same batch: the result equals
that of the module bit for bit.

Design: docs/design/runners.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx

from bitquota.candidates.layers import WITHOUT_BIAS
from bitquota.errors import InvalidInput, InvalidModel, MeasurementFailed
from bitquota.models.graph import Graph, Operation
from bitquota.models.running import (
    checked_output,
    cut,
    inputs_of,
    run_module,
)
from bitquota.quantizers.apply import input_quantizer
from bitquota.sensitivity.runners.base import (
    Change,
    RunnerFields,
    State,
    in_precision,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from bitquota.candidates.table import Candidate
    from bitquota.models.batch_norm import Moments

_Key = TypeVar("_Key")
_INPUT_FIRST = (
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "linear", "matmul", "mm", "bmm",
)  # fmt: skip
"""Operations whose first argument is the layer's input."""


@dataclass(slots=True, eq=False)
class GraphState:
    """A point of the model on one chunk: its change, output, and kept activations."""

    chunk: int
    change: dict[str, Candidate]
    output: Tensor
    store: dict[fx.Node, Any]
    signature: tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Observed:
    """What corrections compare with on one chunk in full precision.

    Attributes:
        means: Mean per channel of each layer's output that a bias could put right.
        moments: Of the input of each batch norm.
    """

    means: dict[fx.Node, Tensor] = field(default_factory=dict)
    moments: dict[fx.Node, Moments] = field(default_factory=dict)


_NOTHING = Observed()


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Which operations a run executes, and after which of them which values can go."""

    operations: tuple[Operation, ...]
    free: tuple[tuple[fx.Node, ...], ...]
    keep: frozenset[fx.Node]
    macs: float


@dataclass(slots=True)
class GraphRunner(RunnerFields):
    """Runs the exported graph, suffix by suffix; see the module docstring."""

    engine: str = "graph"
    _graphs: dict[int, Graph] = field(default_factory=dict)
    _schedules: dict[Any, Schedule] = field(default_factory=dict)
    _keeps: dict[Any, frozenset[fx.Node]] = field(default_factory=dict)
    _observed: dict[int, Observed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Export the model and choose the chunk size."""
        RunnerFields.__post_init__(self)
        n = len(self.calibration)
        size = min(self.chunk_size, n)
        while True:
            graph = self._graph(size)
            kept = sum(graph.by_node[k].n_bytes for k in self._all_reads(graph))
            # A base state and one state on top of it are alive together.
            if 2 * kept <= self.memory_limit_bytes or size == 1 or self.batch_norm == "moved":
                break
            self._graphs.pop(size)
            size = max(1, min(size // 2, int(size * self.memory_limit_bytes / (2 * kept))))
        self.chunk_size = size
        self.chunks = cut(n, size)
        self.passes.macs_per_pass = graph.macs * n / size

    def start(self, chunk: int, change: Change) -> GraphState:
        """Run the whole model and keep what changes of single groups will read."""
        return self._run(None, chunk, dict(change), keep_for=None)

    def extend(self, state: State, change: Change, *, keep_for: Collection[str] = ()) -> GraphState:
        """Run behind ``change`` and keep what changes of ``keep_for`` will read."""
        return self._run(state, state.chunk, dict(change), keep_for=tuple(keep_for))

    def output(self, state: State, change: Change) -> Tensor:
        """Run behind ``change``."""
        return self._run(state, state.chunk, dict(change), keep_for=()).output

    def _full_precision(self, chunk: int) -> Tensor:
        if self._compares and chunk not in self._observed:
            return self._observe(chunk)
        rows = self.chunks[chunk]
        self.passes.calls += 1
        self.passes.macs += self._graph(len(rows)).macs
        with in_precision(self.precision, self._device):
            return run_module(self.module, inputs_of(self.calibration, rows))

    def share(self, layers: Collection[str]) -> float:
        """Return what re-running behind ``layers`` costs, as a share of a full pass."""
        graph = self._graph(len(self.chunks[0]))
        behind = graph.behind_all(layers)
        return sum(op.macs for op in graph.operations if op.node in behind) / graph.macs

    @property
    def _device(self) -> torch.device:
        return self.calibration.device or self.calibration.inputs[0].device

    def observed(self, chunk: int) -> Observed:
        """Return what corrections compare with on a chunk; nothing where there are none.

        Cost: with corrections a pass over the chunk in full precision, once.
        """
        if not self._compares:
            return _NOTHING
        if chunk not in self._observed:
            output = self._observe(chunk)
            self._references.get(chunk, lambda: output)
        return self._observed[chunk]

    @property
    def _compares(self) -> bool:
        return self.batch_norm == "moved" or self.bias_correction

    def _observe(self, chunk: int) -> Tensor:
        """Run in full precision, note what corrections compare with, return the output."""
        rows = self.chunks[chunk]
        graph = self._graph(len(rows))
        left_out = {
            node
            for la in self.inventory.layers
            if la.kind in WITHOUT_BIAS or not self.bias_correction
            for node in graph.weight_nodes[la.name]
        }
        values: dict[fx.Node, Any] = dict(
            zip(graph.input_nodes, inputs_of(self.calibration, rows), strict=True)
        )
        last = {s: op.index for op in graph.operations for s in op.sources}
        found = Observed()
        with torch.no_grad(), in_precision(self.precision, self._device):
            for op in graph.operations:
                if self.batch_norm == "moved":
                    moments = graph.moments(op, values.__getitem__, graph.constants)
                    if moments is not None:
                        found.moments[op.node] = moments
                value = graph.execute(op, values.__getitem__, graph.constants)
                values[op.node] = value
                axis = graph.channel_axes.get(op.node)
                if axis is not None and not left_out.intersection(op.sources):
                    found.means[op.node] = _channel_mean(value, axis)
                for source in op.sources:
                    if last[source] == op.index and source not in graph.output_nodes:
                        values.pop(source, None)
        everything = values | graph.constants
        results = {node: everything[node] for node in graph.output_nodes}
        self.passes.macs += graph.macs
        self.passes.calls += 1
        self._observed[chunk] = found
        return checked_output(graph.restore(results), len(rows))

    def linear_responses(
        self,
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
        size = len(self.chunks[chunk])
        graph = self._graph(size)
        constants = dict(graph.constants)
        for name, candidate in base.items():
            if candidate.activation_bits is not None:
                msg = (
                    "reverse-mode sensitivities need a base point without quantized inputs; layer "
                    f"'{name}' has {candidate.activation_bits} bits: use the measure 'gram'"
                )
                raise InvalidInput(msg, layer=name)
            for node in graph.weight_nodes[name]:
                constants[node] = self.weights(candidate)
        readers = {name: _readers(graph, name) for name in {n for row in rows for n in row}}
        watched = {op.node for ops in readers.values() for op in ops}
        values: dict[fx.Node, Any] = dict(
            zip(graph.input_nodes, inputs_of(self.calibration, self.chunks[chunk]), strict=True)
        )

        def lookup(node: fx.Node) -> Any:  # noqa: ANN401
            return values[node] if node in values else graph.static_values[node]

        products = dict[fx.Node, Any]()
        with torch.enable_grad(), in_precision(self.precision, self._device):
            for op in graph.operations:
                if op.node in graph.static_values:
                    continue
                value = graph.execute(op, lookup, constants)
                if op.node in watched:
                    products[op.node] = value if value.requires_grad else value.requires_grad_()
                values[op.node] = value
            results = {n: constants[n] if n in constants else lookup(n) for n in graph.output_nodes}
            output = checked_output(graph.restore(results), size)
        directions = seeds(output.detach())
        order = [op for ops in readers.values() for op in ops]
        responses = torch.zeros((len(directions), len(rows), size), dtype=torch.float64)
        responses = responses.to(output.device)
        gradients = [
            torch.autograd.grad(
                output,
                [products[op.node] for op in order],
                grad_outputs=direction.to(output.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            for direction in directions
        ]
        macs = graph.macs * (1 + len(directions))
        with torch.no_grad():
            for k, row in enumerate(rows):
                for name, candidate in row.items():
                    changed, quantizer = dict(constants), None
                    for node in graph.weight_nodes[name]:
                        changed[node] = self.weights(candidate)
                        if candidate.activation_bits is not None:
                            _consumers(graph, node, name)  # the input must be visible
                            quantizer = input_quantizer(
                                self.activations, name, candidate.activation_bits
                            )
                    for op in readers[name]:
                        moved = graph.execute(op, lookup, changed, quantizer) - products[op.node]
                        macs += op.macs
                        for r, gradient in enumerate(gradients):
                            felt = gradient[order.index(op)]
                            if felt is not None:
                                product = (felt * moved).reshape(size, -1)
                                responses[r, k] += product.sum(dim=1, dtype=torch.float64)
        self.passes.macs += macs
        self.passes.calls += 1 + len(directions)
        return output.detach(), responses

    def _graph(self, size: int) -> Graph:
        if size not in self._graphs:
            inputs = inputs_of(self.calibration, range(size))
            self._graphs[size] = Graph(self.module, self.inventory, inputs)
        return self._graphs[size]

    def _all_reads(self, graph: Graph) -> set[fx.Node]:
        groups: dict[str, list[str]] = {}
        for layer in self.inventory.layers:
            groups.setdefault(layer.group, []).append(layer.name)
        return set().union(*(graph.reads(names) for names in groups.values()))

    def _kept(self, graph: Graph, size: int, names: tuple[str, ...] | None) -> frozenset[fx.Node]:
        """Return the values to keep for later changes, as many as the memory limit allows."""
        key = (size, names)
        if key not in self._keeps:
            wanted = self._all_reads(graph)
            if names is not None:
                group_of = {la.name: la.group for la in self.inventory.layers}
                groups: dict[str, list[str]] = {}
                for name in names:
                    groups.setdefault(group_of[name], []).append(name)
                wanted = set().union(*(graph.reads(members) for members in groups.values()))
            limit = self.memory_limit_bytes // 2
            self._keeps[key] = thin_out(graph, wanted, limit)
        return self._keeps[key]

    def _run(
        self,
        state: State | None,
        chunk: int,
        change: dict[str, Candidate],
        keep_for: tuple[str, ...] | None,
    ) -> GraphState:
        if state is not None and not isinstance(state, GraphState):
            msg = f"a state must come from the runner it is given to; got {type(state).__name__}"
            raise TypeError(msg)
        rows = self.chunks[chunk]
        graph = self._graph(len(rows))
        both = change if state is None else {**state.change, **change}
        constants = dict(graph.constants)
        transforms: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        for name, candidate in both.items():
            weight = self.weights(candidate)
            for node in graph.weight_nodes[name]:
                constants[node] = weight
                if candidate.activation_bits is not None:
                    quantizer = input_quantizer(self.activations, name, candidate.activation_bits)
                    for op in _consumers(graph, node, name):
                        transforms[op.node] = quantizer
        changed = tuple(sorted(change))
        before: tuple[Any, ...] = ("start", len(rows)) if state is None else state.signature
        signature = (*before, changed, keep_for)
        schedule = self._schedules.get(signature)
        if schedule is None:
            stored = set() if state is None else set(state.store)
            schedule = self._plan(graph, len(rows), state is None, changed, stored, keep_for)
            self._schedules[signature] = schedule
        store = {} if state is None else state.store
        seen = self.observed(chunk)
        values: dict[fx.Node, Any] = {}
        inputs = inputs_of(self.calibration, rows)
        values.update(zip(graph.input_nodes, inputs, strict=True))

        def lookup(node: fx.Node) -> Any:  # noqa: ANN401
            if node in values:
                return values[node]
            return store[node] if node in store else graph.static_values[node]

        with torch.no_grad(), in_precision(self.precision, self._device):
            for op, free in zip(schedule.operations, schedule.free, strict=True):
                value = graph.execute(
                    op, lookup, constants, transforms.get(op.node), seen.moments.get(op.node)
                )
                if op.node in seen.means:
                    value = _with_mean(value, graph.channel_axes[op.node], seen.means[op.node])
                values[op.node] = value
                for node in free:
                    del values[node]
        self.passes.macs += schedule.macs
        self.passes.calls += 1
        results = {node: lookup(node) if node not in constants else constants[node]
                   for node in graph.output_nodes}  # fmt: skip
        output = checked_output(graph.restore(results), len(rows))
        kept = {node: values[node] for node in schedule.keep if node in values}
        if keep_for != ():
            behind = graph.behind_all(changed) if state is not None else frozenset()
            wanted = self._kept(graph, len(rows), keep_for)
            kept.update({n: v for n, v in store.items() if n in wanted and n not in behind})
        return GraphState(chunk, both, output, kept, signature)

    def _plan(
        self,
        graph: Graph,
        size: int,
        whole: bool,  # noqa: FBT001
        changed: tuple[str, ...],
        stored: set[fx.Node],
        keep_for: tuple[str, ...] | None,
    ) -> Schedule:
        """Find the operations that must run: backwards from the targets to what is known."""
        behind = frozenset(graph.by_node) if whole else graph.behind_all(changed)
        known = {node for node in stored if node not in behind}
        # A static value may depend on a weight's placeholder only if it is behind it.
        known.update(node for node in graph.static_values if whole or node not in behind)
        wanted: frozenset[fx.Node] = frozenset()
        if keep_for != ():
            wanted = self._kept(graph, size, keep_for)
        targets = set(graph.output_nodes) | {node for node in wanted if node not in known}
        needed: set[fx.Node] = set()
        stack = [node for node in targets if node in graph.by_node and node not in known]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(
                s
                for s in graph.by_node[node].sources
                if s in graph.by_node and s not in known and s not in needed
            )
        operations = tuple(op for op in graph.operations if op.node in needed)
        last_use = {s: op.index for op in operations for s in op.sources if s in needed}
        protected = set(graph.output_nodes) | wanted
        free = tuple(
            tuple(
                s
                for s in dict.fromkeys((*op.sources, op.node))
                if s in needed and s not in protected and last_use.get(s, op.index) == op.index
            )
            for op in operations
        )
        return Schedule(
            operations, free, frozenset(wanted & needed), sum(op.macs for op in operations)
        )


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


def _consumers(graph: Graph, weight: fx.Node, layer: str) -> list[Operation]:
    """Return the operations that multiply the layer's input with its weight."""
    found: list[Operation] = []
    for op in graph.operations:
        if weight in op.sources:
            name = getattr(op.target, "__name__", str(op.target)).split(".")[0]
            name = str(op.node.target).removeprefix("aten.").split(".")[0] or name
            if name not in _INPUT_FIRST:
                msg = (
                    f"the input of layer '{layer}' must be visible in the graph to be quantized; "
                    f"its weight goes into '{op.node.target}': use the engine 'eager'"
                )
                raise MeasurementFailed(msg, layer=layer)
            found.append(op)
    return found


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


def _channel_mean(value: Tensor, axis: int) -> Tensor:
    """Return the mean over everything but ``axis``, in a shape that adds to ``value``."""
    others = [k for k in range(value.ndim) if k != axis % value.ndim]
    return value.mean(dim=others, keepdim=True) if others else value


def _with_mean(value: Tensor, axis: int, wanted: Tensor) -> Tensor:
    """Return ``value`` with every channel shifted to the mean it should have."""
    return value + (wanted - _channel_mean(value, axis))
