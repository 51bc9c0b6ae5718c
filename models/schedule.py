"""Which tensors are alive while each operation of a model runs: its cuts, from one run of it.

Design: docs/design/live-tensors.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from bitquota.candidates.layers import MATRICES
from bitquota.candidates.live import Cut, LiveTensor, Schedule
from bitquota.models.calls import layer_call, operator_name, tensor_key, tensors_in
from bitquota.models.onnx.program import source_of
from bitquota.models.running import tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.onnx.program import OnnxSource

IN_PLACE = frozenset(
    {
        "abs", "add", "batch_norm", "batchnormalization", "cast", "clamp", "clip", "clone",
        "contiguous", "div", "dropout", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish",
        "hardtanh", "identity", "leaky_relu", "leakyrelu", "log", "mish", "mul", "neg", "pow",
        "prelu", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "softplus", "sqrt", "sub",
        "tanh", "to", "truediv",
    }
)  # fmt: skip
"""Operations on single numbers: they write over a tensor that nothing reads later."""

VIEWS = frozenset({"reshape", "flatten", "squeeze", "unsqueeze", "identity"})
"""Nodes of ONNX whose output is their input in another shape."""


@dataclass(slots=True, kw_only=True)
class Operation:
    """One operation: what it reads and makes, by the memory that holds it.

    Attributes:
        name: What it does.
        sources: Memory that it reads, of samples alone.
        results: Memory that it fills, and numbers in it for one sample.
        layer: The layer whose weight it multiplies the first source with, if it does.
    """

    name: str
    sources: tuple[Hashable, ...]
    results: dict[Hashable, int]
    layer: str | None = None


@dataclass(slots=True)
class _Buffer:
    """Memory: its size, when it is filled, when last read, and by whom when."""

    elements: int
    first: int
    last: int
    reads: list[tuple[int, str | None]] = field(default_factory=list)


def schedule_of(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> Schedule | None:
    """Return the cuts of a model in the order in which it runs, or ``None`` if none is seen.

    A tensor is kept in the bits of its readers if all that still read it are layers that quantize
    it, and as it is otherwise (in front of a sum, say). Activation functions, batch norms and other
    operations on single numbers write over a tensor that nothing else reads later. Workspaces of
    kernels, and what goes on inside of one call (``nn.MultiheadAttention``), are not counted.

    Args:
        module: The model in eval mode.
        inventory: Its layers.
        inputs: Positional arguments of one forward pass, which is what it costs; tensors between
            operations are held until it ends.
    """
    source = source_of(module)
    if source is not None:
        return cuts_of(*_operations_of_graph(module, source, inventory, inputs))
    known = {
        tensor_key(tensor_of(module, la.weight_name)): la.name
        for la in inventory.layers
        if la.kind not in MATRICES
    }
    watching = _Recorder(known, inputs)
    with torch.no_grad(), watching:
        result = module(*inputs)
    outputs: set[Hashable] = {_memory(t) for t in tensors_in(_plain(result))}
    return cuts_of(watching.operations, watching.given, outputs)


def cuts_of(
    operations: Sequence[Operation], given: dict[Hashable, int], outputs: set[Hashable]
) -> Schedule | None:
    """Return the cut of each operation that fills memory of its own.

    Args:
        operations: In the order in which they run.
        given: Memory of the model's inputs, and numbers in it for one sample.
        outputs: Memory of what the model returns, which is read in full precision in the end.
    """
    last = {s: k for k, op in enumerate(operations) for s in op.sources}
    last |= dict.fromkeys(outputs, len(operations))
    # What is written over has the memory of what it takes the place of.
    stands_for: dict[Hashable, Hashable] = {}

    def place(memory: Hashable) -> Hashable:
        while memory in stands_for:
            memory = stands_for[memory]
        return memory

    buffers = {m: _Buffer(n, -1, last.get(m, -1)) for m, n in given.items()}
    steps: list[int] = []
    for k, op in enumerate(operations):
        sources = list(dict.fromkeys(map(place, op.sources)))
        new = [m for m in op.results if place(m) not in buffers]
        over = _written_over(op, k, sources, new, buffers)
        if over is not None:
            stands_for[new[0]] = over
            buffers[over].last = max(buffers[over].last, last.get(new[0], -1))
            new = []
        # An operation on one tensor alone is part of what made it.
        for at, memory in enumerate(sources):
            if over is None or len(sources) > 1:
                buffers[memory].reads.append((k, op.layer if at == 0 else None))
        for memory in new:
            buffers[memory] = _Buffer(op.results[memory], k, last.get(memory, -1))
        if new:
            steps.append(k)
    for memory in outputs:
        if place(memory) in buffers:
            buffers[place(memory)].reads.append((len(operations), None))
    return Schedule.of([_cut(k, operations[k].name, buffers.values()) for k in steps])


def _written_over(
    op: Operation,
    step: int,
    sources: list[Hashable],
    new: list[Hashable],
    buffers: dict[Hashable, _Buffer],
) -> Hashable | None:
    """Return the memory that an operation writes its result into, if that is one it reads."""
    if op.layer is not None or len(new) != 1:
        return None
    if op.name in VIEWS:
        return sources[0]
    fits = (
        s for s in sources if buffers[s].elements == op.results[new[0]] and buffers[s].last == step
    )
    return next(fits, None) if op.name in IN_PLACE else None


def _cut(step: int, name: str, buffers: Any) -> Cut:  # noqa: ANN401  # a view of a dictionary
    """Return what is alive at a step."""
    alive: dict[tuple[str, ...], int] = {}
    for buffer in buffers:
        later = [layer for at, layer in buffer.reads if at >= step]
        if buffer.first > step or not (later or buffer.first == step):
            continue
        known = [layer for layer in later if layer is not None]
        readers = tuple(sorted(set(known))) if known and len(known) == len(later) else ()
        alive[readers] = alive.get(readers, 0) + buffer.elements
    tensors = tuple(LiveTensor(elements=n, readers=readers) for readers, n in sorted(alive.items()))
    return Cut(operation=name, tensors=tensors)


def _memory(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor, which its views share."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # no public name


def _plain(result: Any) -> Any:  # noqa: ANN401  # what a model returns
    return dict(result) if hasattr(result, "keys") else result


class _Recorder(TorchFunctionMode):
    """Within the context, note every operation on what depends on the samples."""

    def __init__(self, known: dict[tuple[Any, ...], str], inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._known = known
        self._samples = len(inputs[0])
        self._alive: list[Any] = [inputs]
        self.given: dict[Hashable, int] = {_memory(t): t.numel() // self._samples for t in inputs}
        self._moving: set[Hashable] = set(self.given)
        self.operations: list[Operation] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run ``func`` and note what it read and made."""
        del types
        named = kwargs or {}
        call = layer_call(operator_name(func), args, named)
        # The first source of a layer is its input.
        read = [*([] if call is None else [call.inputs]), *tensors_in((args, named))]
        sources = tuple(dict.fromkeys(m for t in read if (m := _memory(t)) in self._moving))
        result = func(*args, **named)
        made = list(tensors_in(result))
        if not sources or not made:
            return result
        self._alive.append(result)
        name = operator_name(func).strip("_")
        layer = None if call is None else self._known.get(tensor_key(call.weight))
        self.operations.append(
            Operation(
                name=name,
                sources=sources,
                results={_memory(t): t.numel() // self._samples for t in made},
                layer=layer,
            )
        )
        self._moving.update(_memory(t) for t in made)
        return result


def _operations_of_graph(
    module: nn.Module, source: OnnxSource, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> tuple[list[Operation], dict[Hashable, int], set[Hashable]]:
    """Return operations, inputs and outputs of an ONNX graph, as ``cuts_of`` takes them."""
    program = source.program("eval")
    (piece, *_) = source.pieces(inputs)
    samples = source.fixed_batch or len(inputs[0])
    moving = program.behind(piece)
    kept = [name for name in program.kept_types if name in moving]
    values = program.run(program.needed(kept, ()), kept, {}, source.feeds(module) | piece) | piece
    elements = {name: value.size // samples for name, value in values.items()}
    fed = {tensor.path: tensor.name for tensor in source.fed}
    layer_of: dict[str, str] = {}
    for layer in inventory.layers:
        if (name := fed.get(layer.weight_name)) is not None:
            own = {name, *program.behind([name])} - moving
            layer_of |= dict.fromkeys(own, layer.name)
    operations: list[Operation] = []
    for node in program.nodes:
        results: dict[Hashable, int] = {r: elements[r] for r in node.results if r in elements}
        sources = tuple(dict.fromkeys(s for s in node.sources if s in elements))
        if not results or not sources:
            continue
        weights = [layer_of[s] for s in node.sources if s in layer_of]
        operations.append(
            Operation(
                name=node.proto.op_type.lower(),
                sources=sources,
                results=results,
                layer=weights[0] if weights and len(sources) == 1 else None,
            )
        )
    given: dict[Hashable, int] = {name: elements[name] for name in piece}
    outputs: set[Hashable] = set(source.outputs or (source.output,))
    return operations, given, outputs
