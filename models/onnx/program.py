"""Parts of an ONNX graph, run by ONNX Runtime: only what lies between known values and wanted ones.

A session is built for each distinct set of nodes and kept; it holds no weights. Every weight that
may change is an input of the graph (an initializer may be overridden by an input of its name), so
a changed candidate costs no new session. Graph optimisations are off: a fusion across a cut would
make a value depend on where the graph was cut, and with weights as inputs there is nothing to
pack in advance (ResNet-20, 64 images, one thread: 81 ms without, 79 ms with all of them).

Design: docs/design/runners.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bitquota.errors import (
    InvalidCalibration,
    InvalidInput,
)
from bitquota.models.onnx.layers import sources_of
from bitquota.models.onnx.rewrites import (
    BatchNormValues,
    import_onnx,
    with_moved_statistics,
    with_right_means,
)
from bitquota.models.onnx.sessions import first_line, make_session
from bitquota.models.running import (
    DEFAULT_CHUNK,
    tensor_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.models.onnx.layers import FedTensor, Shift

Arrays = dict[str, "NDArray[Any]"]
"""Values of the graph by name."""

_LARGE = 2**16
"""Bytes from which a constant is handed in instead of copied into every session."""

_MAX_SESSIONS = 1024
_TENSOR_TYPES = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(uint16)": 4,
    "tensor(int16)": 5, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(bool)": 9,
    "tensor(float16)": 10, "tensor(double)": 11, "tensor(uint32)": 12, "tensor(uint64)": 13,
}  # fmt: skip
"""What numpy can hold, and so what a state can keep: ONNX Runtime's name to ONNX's number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxSource:
    """An ONNX graph whose weights are those of a module; attribute ``onnx_source`` of the module.

    Attributes:
        model: ``onnx.ModelProto`` with all fed tensors as inputs.
        inputs: Name and numpy type of what a sample consists of.
        output: Name of the primary output.
        outputs: Names of all that the file declares.
        fixed_batch: Batch size that the graph was exported for, or ``None`` if any will do.
        fed: Tensors of the module that are inputs.
        shifts: Where bias correction can act, by layer.
    """

    model: Any
    inputs: tuple[tuple[str, Any], ...]
    output: str
    fixed_batch: int | None
    fed: tuple[FedTensor, ...]
    outputs: tuple[str, ...] = ()
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    _programs: dict[tuple[str, bool], OnnxProgram] = field(default_factory=dict, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxSource:
        """Return the same object: the graph holds no values that change."""
        return self

    def program(
        self, batch_norm: Literal["eval", "moved"], *, right_means: bool = False
    ) -> OnnxProgram:
        """Return the graph ready to be run in parts; made once.

        Args:
            batch_norm: Whether batch norms use stored statistics as they are, or moved to fit the
                batch; then ``moments`` are handed in.
            right_means: Whether each layer with a shift takes the mean that is handed in as
                ``mean_input(layer)``.

        Raises:
            InvalidInput: A correction was asked for that finds nothing to act on.
        """
        key = (batch_norm, right_means)
        if key not in self._programs:
            self._programs[key] = OnnxProgram(self, batch_norm, right_means=right_means)
        return self._programs[key]

    def layer_outputs(self, program: OnnxProgram) -> dict[str, str]:
        """Return, for each layer with a shift, the name of its output in ``program``."""
        made = {node.proto.name: node for node in program.nodes}
        return {layer: made[shift.node].results[0] for layer, shift in self.shifts.items()}

    def moments(self, module: nn.Module, piece: Arrays) -> Arrays:
        """Return the moments of every batch norm's input on ``piece``, as they are handed in.

        ``piece`` is one of ``pieces``, ``module`` the model in full precision. Cost: one pass.
        """
        norms, plain = self.program("moved").statistics, self.program("eval")
        targets = sorted({norm.inputs for norm in norms}.intersection(plain.maker))
        seen = plain.run(plain.needed(targets, ()), targets, {}, self.feeds(module) | piece) | piece
        found = {}
        for norm in norms:
            x = seen[norm.inputs]
            values = x.reshape(len(x), x.shape[1], -1)
            mean = values.mean(axis=(0, 2), dtype=np.float64, keepdims=True)
            variance = np.square(values - mean).mean(axis=(0, 2), keepdims=True)
            found[norm.before_mean] = mean.astype(x.dtype)
            found[norm.before_variance] = variance.astype(x.dtype)
        return found

    def feeds(self, module: nn.Module, names: Container[str] | None = None) -> Arrays:
        """Return the fed tensors, or those of ``names``, as they are in ``module`` now."""
        return {
            fed.name: as_array(tensor_of(module, fed.path), fed.dtype)
            for fed in self.fed
            if names is None or fed.name in names
        }

    def pieces(self, inputs: Sequence[Tensor]) -> list[Arrays]:
        """Return inputs as the graph takes them: in one piece, or in pieces of the fixed batch.

        The last piece of a graph with a fixed batch is padded with its last sample.

        Raises:
            InvalidCalibration: Another number of inputs.
        """
        if len(inputs) != len(self.inputs):
            names = ", ".join(name for name, _ in self.inputs)
            msg = f"the model takes {len(self.inputs)} inputs ({names}); got {len(inputs)}"
            raise InvalidCalibration(msg, inputs=len(inputs))
        arrays = {
            name: as_array(tensor, dtype)
            for tensor, (name, dtype) in zip(inputs, self.inputs, strict=True)
        }
        if self.fixed_batch is None:
            return [arrays]
        size, n = self.fixed_batch, len(inputs[0])
        return [
            {name: padded(array[start : start + size], size) for name, array in arrays.items()}
            for start in range(0, n, size)
        ]


def source_of(module: nn.Module) -> OnnxSource | None:
    """Return the ONNX graph that ``module`` runs, if it runs one."""
    found = getattr(module, "onnx_source", None)
    return found if isinstance(found, OnnxSource) else None


def as_array(tensor: Tensor, dtype: Any) -> NDArray[Any]:  # noqa: ANN401  # a numpy type
    """Return ``tensor`` as a contiguous array of ``dtype``; a view where that is possible."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy().astype(dtype, copy=False))


def padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Return ``array`` with its last sample repeated until there are ``size``."""
    missing = size - len(array)
    return array if missing <= 0 else np.concatenate([array, array[-1:].repeat(missing, axis=0)])


@dataclass(slots=True, eq=False)
class OnnxNode:
    """One node: what it reads (subgraphs included) and what it makes."""

    index: int
    proto: Any
    sources: tuple[str, ...]
    results: tuple[str, ...]


class OnnxProgram:
    """The nodes of one graph, and sessions for parts of it.

    Attributes:
        nodes: In an order in which they can run.
        maker: Value name to the node that makes it.
        static: Values that depend on constants only.
        kept_types: Values that can be kept in a state, with their ONNX element type.
        statistics: For moved statistics: for each replaced batch norm the values that hold mean
            and biased variance of the batch, and the names of those that are stored and handed in.
    """

    def __init__(
        self,
        source: OnnxSource,
        batch_norm: Literal["eval", "moved"],
        *,
        right_means: bool = False,
    ) -> None:
        self.source = source
        self.statistics: list[BatchNormValues] = []
        self._model = source.model
        if batch_norm == "moved":
            self._model, self.statistics = with_moved_statistics(
                source.model, {tensor.name: tensor for tensor in source.fed}
            )
        if right_means:
            self._model = with_right_means(self._model, source.shifts)
        graph = self._model.graph
        self.nodes = [
            OnnxNode(k, node, sources_of(node), tuple(name for name in node.output if name))
            for k, node in enumerate(graph.node)
        ]
        self.maker = {name: node for node in self.nodes for name in node.results}
        self._constants = {t.name: t for t in graph.initializer}
        # An initializer that the file also declares as an input is no input.
        self._given = {v.name: v for v in graph.input if v.name not in self._constants}
        self.static = frozenset(self.maker).difference(self._given, self.behind(self._given))
        self._large = {
            name: _to_array(tensor)
            for name, tensor in self._constants.items()
            if math.prod(tensor.dims) * 4 > _LARGE
        }
        self._sessions: dict[Any, Any] = {}
        everything = [name for name in self.maker if name not in self.static]
        self.kept_types: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        session = self._session(frozenset(n.index for n in self.nodes), tuple(everything))
        for value in session.get_outputs():
            if value.type in _TENSOR_TYPES:
                self.kept_types[value.name] = _TENSOR_TYPES[value.type]
                self._ranks[value.name] = len(value.shape)

    def is_constant(self, name: str) -> bool:
        """Whether ``name`` is an initializer that never changes."""
        return name in self._constants

    def constant(self, name: str) -> NDArray[Any]:
        """Return the value of an initializer that never changes."""
        return self._large[name] if name in self._large else _to_array(self._constants[name])

    def behind(self, names: Iterable[str]) -> frozenset[str]:
        """Return every value that depends on any of the graph's inputs ``names``."""
        reached = set(names)
        start = set(reached)
        for node in self.nodes:
            if reached.intersection(node.sources):
                reached.update(node.results)
        return frozenset(reached - start)

    def reads(self, behind: frozenset[str]) -> set[str]:
        """Return the values that running ``behind`` again takes from what is in front of it."""
        again = {self.maker[name].index for name in behind}
        return {
            source
            for node in self.nodes
            if node.index in again
            for source in node.sources
            if source in self.kept_types and source not in behind
        }

    def needed(self, targets: Collection[str], known: Collection[str]) -> frozenset[int]:
        """Return the nodes that make ``targets`` when the values ``known`` are there."""
        nodes: set[int] = set()
        stack = [name for name in targets if name not in known]
        while stack:
            node = self.maker.get(stack.pop())
            if node is None or node.index in nodes:
                continue
            nodes.add(node.index)
            stack.extend(source for source in node.sources if source not in known)
        return frozenset(nodes)

    def run(
        self, nodes: frozenset[int], targets: Sequence[str], known: Arrays, feeds: Arrays
    ) -> Arrays:
        """Run ``nodes`` and return ``targets``; what they read is taken from the other two.

        Raises:
            InvalidCalibration: ONNX Runtime does not take the values.
        """
        wanted = [name for name in targets if name not in known]
        if not wanted:
            return {}
        session = self._session(nodes, tuple(wanted))
        feed = {}
        for value in session.get_inputs():
            name = value.name
            feed[name] = known[name] if name in known else feeds.get(name, self._large.get(name))
        try:
            return dict(zip(wanted, session.run(wanted, feed), strict=True))
        except Exception as err:  # onnxruntime raises its own kinds
            msg = f"the model must accept the samples; ONNX Runtime says: {first_line(err)}"
            raise InvalidCalibration(msg, error=str(err)) from err

    def _session(self, nodes: frozenset[int], targets: tuple[str, ...]) -> Any:  # noqa: ANN401
        key = (nodes, targets)
        if key not in self._sessions:
            if len(self._sessions) >= _MAX_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[key] = make_session(self._part(nodes, targets), optimize=False)
        return self._sessions[key]

    def _part(self, indices: frozenset[int], targets: tuple[str, ...]) -> Any:  # noqa: ANN401
        """Return a model of these nodes; whatever they do not make themselves is an input."""
        onnx = import_onnx()
        nodes = [self.nodes[k] for k in sorted(indices)]
        made = {name for node in nodes for name in node.results}
        read = dict.fromkeys(s for node in nodes for s in node.sources if s not in made)
        model = onnx.ModelProto()
        model.ir_version = self._model.ir_version
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = "part"
        model.graph.node.extend(node.proto for node in nodes)
        for name in read:
            if name in self._given:
                model.graph.input.append(self._given[name])
            elif name in self._constants and name not in self._large:
                model.graph.initializer.append(self._constants[name])
            else:
                model.graph.input.append(self._declared(name))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in targets)
        return model

    def _declared(self, name: str) -> Any:  # noqa: ANN401  # onnx.ValueInfoProto
        """Return type and, where it is known, rank of a value that is handed in."""
        make = import_onnx().helper.make_tensor_value_info
        if name in self._large:
            return make(name, self._constants[name].data_type, list(self._constants[name].dims))
        # ONNX Runtime gives an unknown rank as 0; the body of a Scan needs to be told.
        rank = self._ranks[name]
        return make(name, self.kept_types[name], [None] * rank if rank else None)


def macs_of(node: OnnxNode, values: Mapping[str, NDArray[Any]]) -> float:
    """Return the multiply-accumulates of one node, given its inputs and outputs.

    Convolutions, matrix products, recurrent layers and attention count; all else is free.
    """
    proto = node.proto
    if any(name and name not in values for name in proto.input[:3]) or not node.results:
        return 0.0
    sizes = [values[name].shape if name else () for name in proto.input]
    out = values.get(node.results[0])
    flags = {a.name: a.i for a in proto.attribute}
    if out is None:
        return 0.0
    n_out = float(out.size)
    operator = proto.op_type.removeprefix("Fused")
    if operator == "Conv":
        return n_out * math.prod(sizes[1][1:])
    if proto.op_type == "ConvTranspose":
        return float(math.prod(sizes[0])) * math.prod(sizes[1][1:])
    if operator in {"MatMul", "Gemm"}:
        return n_out * int(sizes[0][-2 if flags.get("transA") else -1])
    if proto.op_type in {"LSTM", "GRU", "RNN"}:
        steps = math.prod(sizes[0][:2])
        return float(steps) * (math.prod(sizes[1]) + math.prod(sizes[2]))
    if proto.op_type == "Attention" and len(sizes) > 2 and len(sizes[1]) > 2:
        return float(sizes[1][-2]) * (math.prod(sizes[0]) + n_out)
    return 0.0


def _to_array(tensor: Any) -> NDArray[Any]:  # noqa: ANN401  # onnx.TensorProto
    array: NDArray[Any] = import_onnx().numpy_helper.to_array(tensor)
    return array


def check_batch(source: OnnxSource, wanted: int) -> None:
    """Raise ``InvalidInput`` if a fixed batch is too small to stand for the whole set.

    Args:
        source: The graph.
        wanted: Samples that a batch should have.
    """
    fixed = source.fixed_batch
    if fixed is not None and fixed < min(DEFAULT_CHUNK, wanted):
        msg = (
            f"batch statistics need batches of at least {min(DEFAULT_CHUNK, wanted)} samples; the "
            f"graph was exported for batches of {fixed}: export it with a dynamic first dimension"
        )
        raise InvalidInput(msg, fixed_batch=fixed)
