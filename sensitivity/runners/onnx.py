"""A runner over an ONNX graph: ONNX Runtime re-executes only what lies behind a changed layer.

The graph may hold any operator that ONNX Runtime runs; torch never interprets it. Forward only:
measures that need gradients are refused with a sentence that names those that do not.

Design: docs/design/runners.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import InvalidInput, InvalidModel, MeasurementFailed
from bitquota.models.onnx.program import check_batch, macs_of, source_of
from bitquota.models.onnx.rewrites import mean_input, no_shifts
from bitquota.models.running import (
    checked_output,
    cut,
    inputs_of,
)
from bitquota.sensitivity.runners.base import (
    Change,
    RunnerBase,
    Scheduled,
    State,
    own_state,
)
from bitquota.sensitivity.runners.schedule import thin_out

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from bitquota.candidates.table import Candidate
    from bitquota.models.onnx.program import Arrays, OnnxProgram, OnnxSource


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledNodes:
    """What a run takes, in passes over its chunk, and the values that its state keeps."""

    passes: float
    kept: frozenset[str]


@dataclass(slots=True, eq=False)
class OnnxState:
    """A point of the model on one chunk: its change, output, and kept values of each piece."""

    chunk: int
    change: dict[str, Candidate]
    output: Tensor
    store: list[Arrays]


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """A value that a state may keep."""

    index: int
    n_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """One node's share of a pass."""

    macs: float


@dataclass(slots=True, eq=False)
class _Costs:
    """Multiply-accumulates and bytes of a graph, per sample.

    Attributes:
        operations: One for each node.
        by_node: Every value that can be kept, for one piece of a chunk.
        macs: Of a whole pass over one sample.
    """

    operations: list[_Work]
    by_node: dict[str, _Value]
    macs: float

    def of(self, nodes: Collection[int]) -> float:
        """Return the multiply-accumulates of some nodes for one sample."""
        return sum(self.operations[k].macs for k in sorted(nodes))


@dataclass(slots=True)
class OnnxRunner(RunnerBase):
    """Runs an ONNX graph, suffix by suffix; see the module docstring."""

    engine: str = "onnxruntime"
    _source: OnnxSource = field(init=False)
    _program: OnnxProgram = field(init=False)
    _costs: _Costs = field(init=False)
    _behind: dict[str, frozenset[str]] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _schedules: dict[Any, frozenset[int]] = field(default_factory=dict)
    _keeps: dict[Any, frozenset[str]] = field(default_factory=dict)
    _means: dict[int, Arrays] = field(default_factory=dict)
    _moments: dict[int, list[Arrays]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the graph, count what it costs, and choose the chunk size.

        Raises:
            InvalidInput: A correction that finds nothing to act on, or a small fixed batch.
            InvalidModel: The module runs no ONNX graph.
        """
        RunnerBase.__post_init__(self)
        source = source_of(self.module)
        if source is None:
            msg = "the engine 'onnxruntime' runs ONNX files: provide an .onnx file, or use 'auto'"
            raise InvalidModel(msg)
        self._source = source
        self._program = source.program(self.batch_norm, right_means=self.bias_correction)
        names = {fed.path: fed.name for fed in source.fed}
        for la in self.inventory.layers:
            if la.weight_name not in names:
                msg = f"the graph must have the weight '{la.weight_name}' of its inventory"
                raise InvalidModel(msg, weight=la.weight_name)
            self._names[la.name] = names[la.weight_name]
        for layer, name in self._names.items():
            self._behind[layer] = self._program.behind([name])
        n = len(self.calibration)
        if self.batch_norm == "moved":
            check_batch(source, min(n, self.chunk_size))
        if self.bias_correction and source.fixed_batch is not None:
            raise InvalidInput(no_shifts(f"has a fixed batch of {source.fixed_batch}"))
        self._costs = self._measured_costs()
        size = min(self.chunk_size, n)
        fixed = source.fixed_batch
        per_sample = sum(self._costs.by_node[v].n_bytes for v in self._all_reads())
        # A base state and one state on top of it are alive together. Statistics of a chunk fix it.
        free = self.batch_norm == "eval" and not self.bias_correction
        if free and 2 * per_sample * size > self.memory_limit_bytes:
            size = max(1, self.memory_limit_bytes // (2 * per_sample))
            if fixed is not None:
                size = max(fixed, size - size % fixed)
        self.chunk_size = size
        self.chunks = cut(n, size)
        self.passes.macs_per_pass = self._costs.macs * n

    def _full_precision(self, chunk: int) -> Tensor:
        program, source = self._source.program("eval"), self._source
        everything = program.needed([source.output], ())
        feeds = source.feeds(self.module)
        rows = self.chunks[chunk]
        pieces = [
            program.run(everything, [source.output], {}, feeds | piece)[source.output]
            for piece in source.pieces(inputs_of(self.calibration, rows))
        ]
        self.passes.calls += 1
        self.passes.macs += self._costs.macs * len(rows)
        return self._joined(pieces, len(rows))

    def schedule(
        self,
        before: Scheduled | None,
        layers: Collection[str],
        keep_for: Collection[str] | None = (),
    ) -> ScheduledNodes:
        """Return what a run of the first chunk would take."""
        assert before is None or isinstance(before, ScheduledNodes)  # noqa: S101  # made here
        names = None if keep_for is None else tuple(keep_for)
        wanted = self._kept(len(self.chunks[0]), names) if names != () else frozenset()
        if before is None:
            return ScheduledNodes(1.0, wanted)
        known = before.kept - self._behind_all(layers)
        nodes = self._schedule(known, (self._source.output, *sorted(wanted)))
        return ScheduledNodes(self._costs.of(nodes) / self._costs.macs, wanted)

    @property
    def passes_before(self) -> float:
        """The reference, and what each correction compares with."""
        return 1.0 + (self.batch_norm == "moved") + self.bias_correction

    def share(self, layers: Collection[str]) -> float:
        """Return what re-running behind ``layers`` costs, as a share of a full pass."""
        behind = self._behind_all(layers)
        nodes = {self._program.maker[name].index for name in behind}
        return self._costs.of(nodes) / self._costs.macs

    def means(self, chunk: int) -> Arrays:
        """Return the mean that each layer's output should have on a chunk, as it is handed in.

        Empty without bias correction. Cost: a pass over the chunk, once.
        """
        if self.bias_correction and chunk not in self._means:
            source, rows = self._source, self.chunks[chunk]
            program = source.program("eval")
            outputs = source.layer_outputs(program)
            (piece,) = source.pieces(inputs_of(self.calibration, rows))
            feeds, targets = source.feeds(self.module) | piece, sorted(set(outputs.values()))
            seen = program.run(program.needed(targets, ()), targets, {}, feeds)
            self.passes.macs += self._costs.macs * len(rows)
            self.passes.calls += 1
            found = {}
            for layer, name in outputs.items():
                axis = source.shifts[layer].channel_axis
                channels = np.moveaxis(seen[name], axis, 0)
                mean = channels.reshape(len(channels), -1).mean(axis=1, dtype=np.float64)
                shape = (1, -1, 1) if axis == 1 else (1, -1)
                found[mean_input(layer)] = mean.astype(np.float32).reshape(shape)
            self._means[chunk] = found
        return self._means.get(chunk, {})

    def moments(self, chunk: int) -> list[Arrays]:
        """Return what moves the statistics of batch norms on each piece of a chunk.

        Nothing where they are not moved. Cost: a pass over the chunk, once.
        """
        if chunk not in self._moments:
            source, rows = self._source, self.chunks[chunk]
            pieces = source.pieces(inputs_of(self.calibration, rows))
            if self.batch_norm == "moved":
                self._moments[chunk] = [source.moments(self.module, piece) for piece in pieces]
                self.passes.macs += self._costs.macs * len(rows)
                self.passes.calls += 1
            else:
                self._moments[chunk] = [{} for _ in pieces]
        return self._moments[chunk]

    def _behind_all(self, layers: Collection[str]) -> frozenset[str]:
        return frozenset().union(*(self._behind[name] for name in layers))

    def _measured_costs(self) -> _Costs:
        """Run the smallest batch once and look at every value."""
        program, source = self._program, self._source
        n = source.fixed_batch or min(2, len(self.calibration))
        inputs = inputs_of(self.calibration, range(n))
        (piece,) = source.pieces(inputs)
        feeds = source.feeds(self.module) | piece
        for norm in program.statistics:
            channels = (1, feeds[norm.stored_mean].size, 1)
            feeds[norm.before_mean] = np.zeros(channels, feeds[norm.stored_mean].dtype)
            feeds[norm.before_variance] = np.ones(channels, feeds[norm.stored_mean].dtype)
        for layer in self.inventory.layers if self.bias_correction else ():
            if (shift := source.shifts.get(layer.name)) is not None:
                shape = (1, layer.rows, 1) if shift.channel_axis == 1 else (1, layer.rows)
                feeds[mean_input(layer.name)] = np.zeros(shape, np.float32)
        seen = program.run(
            frozenset(range(len(program.nodes))), tuple(program.kept_types), {}, feeds
        )
        constants = {name: program.constant(name) for node in program.nodes
                     for name in node.proto.input if program.is_constant(name)}  # fmt: skip
        values = constants | feeds | seen
        static = program.static
        work = [
            _Work(0.0 if static.issuperset(node.results) else macs_of(node, values) / n)
            for node in program.nodes
        ]
        total = sum(w.macs for w in work)
        if not total:
            # A model without a countable node: every node costs the same.
            work, total = [_Work(1.0) for _ in program.nodes], float(len(program.nodes))
        kept = {
            name: _Value(program.maker[name].index, -(-array.nbytes // n))
            for name, array in seen.items()
        }
        return _Costs(work, kept, total)

    def _all_reads(self, names: Collection[str] | None = None) -> set[str]:
        reads = [self._program.reads(self._behind_all(g)) for g in self._groups(names)]
        return set().union(*reads)

    def _kept(self, n_rows: int, names: tuple[str, ...] | None) -> frozenset[str]:
        """Return the values to keep for later changes, as many as the memory limit allows."""
        key = (n_rows, names)
        if key not in self._keeps:
            limit = self.memory_limit_bytes // (2 * n_rows)
            self._keeps[key] = thin_out(self._costs, self._all_reads(names), limit)
        return self._keeps[key]

    def _run(
        self,
        given: State | None,
        chunk: int,
        change: Change,
        keep_for: tuple[str, ...] | None,
    ) -> OnnxState:
        state = own_state(given, OnnxState)
        source, rows = self._source, self.chunks[chunk]
        both = dict(change) if state is None else {**state.change, **change}
        program, feeds = self._program, source.feeds(self.module) | self.means(chunk)
        for name, candidate in both.items():
            if candidate.activation_bits is not None:
                raise _no_activations(name)
            weight = self.weights(candidate).detach().cpu().numpy()
            fed = self._names[name]
            feeds[fed] = np.ascontiguousarray(weight.astype(feeds[fed].dtype, copy=False))
        behind = frozenset(program.maker) if state is None else self._behind_all(change)
        wanted = self._kept(len(rows), keep_for) if keep_for != () else frozenset()
        targets = (source.output, *sorted(wanted))
        outputs, store = [], []
        for k, piece in enumerate(source.pieces(inputs_of(self.calibration, rows))):
            before = {} if state is None else state.store[k]
            known = {name: value for name, value in before.items() if name not in behind}
            nodes = self._schedule(frozenset(known), targets)
            made = program.run(nodes, targets, known, feeds | piece | self.moments(chunk)[k])
            outputs.append(made[source.output] if source.output in made else known[source.output])
            store.append(
                {name: made[name] if name in made else known[name] for name in targets[1:]}
            )
            n = min(len(rows), source.fixed_batch or len(rows))
            work = self._costs.macs if state is None else self._costs.of(nodes)
            self.passes.macs += work * min(n, len(rows) - k * n)
        self.passes.calls += 1
        return OnnxState(chunk, both, self._joined(outputs, len(rows)), store)

    def _schedule(self, known: frozenset[str], targets: tuple[str, ...]) -> frozenset[int]:
        key = (known, targets)
        if key not in self._schedules:
            self._schedules[key] = self._program.needed(targets, known)
        return self._schedules[key]

    def _joined(self, pieces: list[Any], n_rows: int) -> Tensor:
        joined = np.concatenate(pieces)[:n_rows] if len(pieces) > 1 else pieces[0][:n_rows]
        tensor = torch.from_numpy(joined.astype(np.float32, copy=False))
        return checked_output(tensor.to(self.device), n_rows)


def _no_activations(layer: str) -> MeasurementFailed:
    msg = (
        f"the input of layer '{layer}' cannot be quantized in an ONNX graph: leave out activation "
        "bits, or provide the model as .pt2"
    )
    return MeasurementFailed(msg, layer=layer)
