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
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bitquota.candidates.layers import WITHOUT_BIAS
from bitquota.errors import MeasurementFailed
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
    RunnerBase,
    Scheduled,
    State,
    in_precision,
    own_state,
)
from bitquota.sensitivity.runners.schedule import Schedule, make_schedule, thin_out

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

    from bitquota.candidates.table import Candidate
    from bitquota.models.batch_norm import Moments

_INPUT_FIRST = (
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "linear", "matmul", "mm", "bmm",
)  # fmt: skip
"""Operations whose first argument is the layer's input."""


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledRun:
    """What a run executes and keeps.

    Attributes:
        passes: What it takes, in passes over its chunk.
        schedule: The operations.
        signature: What the schedule follows from.
        carried: Values of the state before that stay valid and are kept.
    """

    passes: float
    schedule: Schedule
    signature: tuple[Any, ...]
    carried: frozenset[fx.Node]

    @property
    def kept(self) -> frozenset[fx.Node]:
        """Values that the state after the run has."""
        return self.schedule.keep | self.carried


@dataclass(slots=True, eq=False)
class GraphState:
    """A point of the model on one chunk: its change, output, and kept activations."""

    chunk: int
    change: dict[str, Candidate]
    output: Tensor
    store: dict[fx.Node, Any]
    run: ScheduledRun


@dataclass(slots=True, eq=False)
class Observed:
    """What corrections compare with on one chunk in full precision.

    Attributes:
        means: Mean per channel of each layer's output that a bias could correct.
        moments: Of the input of each batch norm.
    """

    means: dict[fx.Node, Tensor] = field(default_factory=dict)
    moments: dict[fx.Node, Moments] = field(default_factory=dict)


_NOTHING = Observed()

Graphs = dict[tuple[tuple[tuple[int, ...], torch.dtype], ...], Graph]
"""Graphs of one module by shapes and types of its inputs; valid while nobody changes the module."""


@dataclass(slots=True)
class GraphRunner(RunnerBase):
    """Runs the exported graph, suffix by suffix; see the module docstring.

    Attributes:
        graphs: What was exported of the same module, also for other runners.
    """

    engine: str = "graph"
    graphs: Graphs = field(default_factory=dict)
    _graphs: dict[int, Graph] = field(default_factory=dict)
    _scheduled: dict[Any, ScheduledRun] = field(default_factory=dict)
    _keeps: dict[Any, frozenset[fx.Node]] = field(default_factory=dict)
    _observed: dict[int, Observed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Export the model and choose the chunk size."""
        RunnerBase.__post_init__(self)
        n = len(self.calibration)
        size = min(self.chunk_size, n)
        while True:
            graph = self.graph(size)
            kept = sum(graph.by_node[k].n_bytes for k in self._all_reads(graph))
            # A base state and one state on top of it are alive together.
            if 2 * kept <= self.memory_limit_bytes or size == 1 or self.batch_norm == "moved":
                break
            self.graphs.pop(self._shapes(size))
            self._graphs.pop(size)
            size = max(1, min(size // 2, int(size * self.memory_limit_bytes / (2 * kept))))
        self.chunk_size = size
        self.chunks = cut(n, size)
        self.passes.macs_per_pass = graph.macs * n / size

    def _full_precision(self, chunk: int) -> Tensor:
        if self._compares and chunk not in self._observed:
            return self._observe(chunk)
        rows = self.chunks[chunk]
        self.passes.calls += 1
        self.passes.macs += self.graph(len(rows)).macs
        with in_precision(self.precision, self.device):
            return run_module(self.module, inputs_of(self.calibration, rows))

    def share(self, layers: Collection[str]) -> float:
        """Return what re-running behind ``layers`` costs, as a share of a full pass."""
        graph = self.graph(len(self.chunks[0]))
        behind = graph.behind_all(layers)
        return sum(op.macs for op in graph.operations if op.node in behind) / graph.macs

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
        graph = self.graph(len(rows))
        left_out = {
            node
            for la in self.inventory.layers
            if la.kind in WITHOUT_BIAS or not self.bias_correction
            for node in graph.weight_nodes[la.name]
        }
        values = self.fed(graph, chunk)
        last = {s: op.index for op in graph.operations for s in op.sources}
        found = Observed()
        with torch.no_grad(), in_precision(self.precision, self.device):
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

    def graph(self, size: int) -> Graph:
        """Return the exported graph for chunks of ``size`` samples."""
        if size not in self._graphs:
            key = self._shapes(size)
            if key not in self.graphs:
                inputs = inputs_of(self.calibration, range(size))
                self.graphs[key] = Graph(self.module, self.inventory, inputs)
            self._graphs[size] = self.graphs[key]
        return self._graphs[size]

    def _shapes(self, size: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        inputs = inputs_of(self.calibration, range(size))
        return tuple((tuple(x.shape), x.dtype) for x in inputs)

    def fed(self, graph: Graph, chunk: int) -> dict[fx.Node, Any]:
        """Return the inputs of the graph on a chunk."""
        inputs = inputs_of(self.calibration, self.chunks[chunk])
        return dict(zip(graph.input_nodes, inputs, strict=True))

    def _all_reads(self, graph: Graph, names: Collection[str] | None = None) -> set[fx.Node]:
        return set().union(*(graph.reads(group) for group in self._groups(names)))

    def _kept(self, graph: Graph, size: int, names: tuple[str, ...] | None) -> frozenset[fx.Node]:
        """Return the values to keep for later changes, as many as the memory limit allows."""
        key = (size, names)
        if key not in self._keeps:
            limit = self.memory_limit_bytes // 2
            self._keeps[key] = thin_out(graph, self._all_reads(graph, names), limit)
        return self._keeps[key]

    def schedule(
        self,
        before: Scheduled | None,
        layers: Collection[str],
        keep_for: Collection[str] | None = (),
    ) -> ScheduledRun:
        """Return what a run of the first chunk would take."""
        assert before is None or isinstance(before, ScheduledRun)  # noqa: S101  # made here
        names = None if keep_for is None else tuple(keep_for)
        return self._schedule(before, len(self.chunks[0]), tuple(sorted(layers)), names)

    def _schedule(
        self,
        before: ScheduledRun | None,
        n_rows: int,
        changed: tuple[str, ...],
        keep_for: tuple[str, ...] | None,
    ) -> ScheduledRun:
        """Return what follows from where a run starts, what changes and what is kept."""
        start: tuple[Any, ...] = ("start", n_rows) if before is None else before.signature
        signature = (*start, changed, keep_for)
        if signature in self._scheduled:
            return self._scheduled[signature]
        graph = self.graph(n_rows)
        wanted = self._kept(graph, n_rows, keep_for) if keep_for != () else frozenset()
        behind = frozenset(graph.by_node) if before is None else graph.behind_all(changed)
        stored: frozenset[fx.Node] = frozenset() if before is None else before.kept
        # A static value may depend on a weight's placeholder only if it is behind it.
        static = graph.static_values.keys() - (frozenset() if before is None else behind)
        schedule = make_schedule(graph, (stored - behind) | static, wanted)
        carried = (stored & wanted) - behind
        run = ScheduledRun(schedule.macs / graph.macs, schedule, signature, carried)
        self._scheduled[signature] = run
        return run

    def _run(
        self,
        given: State | None,
        chunk: int,
        change: Change,
        keep_for: tuple[str, ...] | None,
    ) -> GraphState:
        state = own_state(given, GraphState)
        rows = self.chunks[chunk]
        graph = self.graph(len(rows))
        both = dict(change) if state is None else {**state.change, **change}

        before = None if state is None else state.run
        run = self._schedule(before, len(rows), tuple(sorted(change)), keep_for)
        schedule, store = run.schedule, {} if state is None else state.store

        # Run, and drop values after their last use.
        constants, quantizers = self._replaced(graph, both)
        seen = self.observed(chunk)
        values = self.fed(graph, chunk)

        def lookup(node: fx.Node) -> Any:  # noqa: ANN401
            if node in values:
                return values[node]
            return store[node] if node in store else graph.static_values[node]

        with torch.no_grad(), in_precision(self.precision, self.device):
            for op, free in zip(schedule.operations, schedule.free, strict=True):
                value = graph.execute(
                    op, lookup, constants, quantizers.get(op.node), seen.moments.get(op.node)
                )
                if op.node in seen.means:
                    value = _with_mean(value, graph.channel_axes[op.node], seen.means[op.node])
                values[op.node] = value
                for node in free:
                    del values[node]
        self.passes.macs += schedule.macs
        self.passes.calls += 1

        # The new state: the output, what was computed to be kept, and what stays valid.
        results = {node: lookup(node) if node not in constants else constants[node]
                   for node in graph.output_nodes}  # fmt: skip
        output = checked_output(graph.restore(results), len(rows))
        kept = {node: values[node] for node in schedule.keep}
        kept.update({node: store[node] for node in run.carried})
        return GraphState(chunk, both, output, kept, run)

    def _replaced(
        self, graph: Graph, change: Change
    ) -> tuple[dict[fx.Node, Any], dict[fx.Node, Callable[[Tensor], Tensor]]]:
        """Return the constants of the graph with changed weights, and its input quantizers."""
        constants = dict(graph.constants)
        quantizers: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
        for name, candidate in change.items():
            weight = self.weights(candidate)
            for node in graph.weight_nodes[name]:
                constants[node] = weight
                if candidate.activation_bits is not None:
                    quantizer = input_quantizer(self.activations, name, candidate.activation_bits)
                    for op in consumers(graph, node, name):
                        quantizers[op.node] = quantizer
        return constants, quantizers


def consumers(graph: Graph, weight: fx.Node, layer: str) -> list[Operation]:
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


def _channel_mean(value: Tensor, axis: int) -> Tensor:
    """Return the mean over everything but ``axis``, in a shape that adds to ``value``."""
    others = [k for k in range(value.ndim) if k != axis % value.ndim]
    return value.mean(dim=others, keepdim=True) if others else value


def _with_mean(value: Tensor, axis: int, wanted: Tensor) -> Tensor:
    """Return ``value`` with every channel shifted to the mean it should have."""
    return value + (wanted - _channel_mean(value, axis))
