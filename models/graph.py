"""The program of a model: its operations as ``torch.export`` lists them, and what depends on what.

A program is made for one batch size. It knows which operations lie behind each layer's weight,
what re-running those reads of everything else, and what each operation costs.

Design: docs/design/runners.md
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from bitquota.errors import InvalidModel
from bitquota.models.batch_norm import Moments, as_returned, observed, run_moved
from bitquota.models.calls import batch_norm_call, layer_call, operator_name
from bitquota.models.outlines import OperatorWatcher
from bitquota.models.pt2.program import Program, program_of
from bitquota.models.running import tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from bitquota.candidates.layers import Inventory


@dataclass(slots=True, eq=False)
class Operation:
    """One operation of the graph and what it costs on one chunk."""

    index: int
    node: fx.Node
    target: Callable[..., Any]
    sources: tuple[fx.Node, ...]
    macs: float = 0.0
    n_bytes: int = 0


class Graph:
    """The operations of a model for one batch size."""

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        inputs: tuple[Tensor, ...],
    ) -> None:
        program = program_of(module, inputs) or _export(module, inputs)
        self.input_nodes: list[fx.Node] = []
        self.weight_nodes: dict[str, list[fx.Node]] = {la.name: [] for la in inventory.layers}
        owner = {id(tensor_of(module, la.weight_name)): la.name for la in inventory.layers}
        for node, value in program.constants.items():
            if id(value) in owner:
                self.weight_nodes[owner[id(value)]].append(node)
        self.constants = {
            node: value.detach() if isinstance(value, torch.Tensor) else value
            for node, value in program.constants.items()
        }
        self.operations: list[Operation] = []
        for node in program.graph.nodes:
            if node.op == "placeholder" and node not in self.constants:
                self.input_nodes.append(node)
            elif node.op == "call_function":
                self.operations.append(
                    Operation(
                        index=len(self.operations),
                        node=node,
                        target=node.target,
                        sources=tuple(node.all_input_nodes),
                    )
                )
            elif node.op == "output":
                self.results = node.args[0]
        self.out_spec = program.out_spec
        self.by_node = {op.node: op for op in self.operations}
        self.output_nodes = _nodes(self.results)
        self.channel_axes: dict[fx.Node, int] = {}
        self._find_what_is_behind_each_layer()
        self._measure(inputs)

    def _find_what_is_behind_each_layer(self) -> None:
        self.behind: dict[str, frozenset[fx.Node]] = {}
        for name, weights in self.weight_nodes.items():
            if not weights:
                msg = f"the exported graph does not use the weight of layer '{name}'"
                raise InvalidModel(msg, layer=name)
            reached: set[fx.Node] = set(weights)
            for op in self.operations:
                if any(source in reached for source in op.sources):
                    reached.add(op.node)
            self.behind[name] = frozenset(reached.difference(weights))
        # Values that depend on nothing but untouched constants (masks, positions) are computed
        # once and never again.
        moving: set[fx.Node] = {n for ns in self.weight_nodes.values() for n in ns}
        moving.update(self.input_nodes)
        self.static: list[Operation] = []
        for op in self.operations:
            if any(source in moving for source in op.sources):
                moving.add(op.node)
            else:
                self.static.append(op)
        self.static_values: dict[fx.Node, Any] = {}

    def _measure(self, inputs: tuple[Tensor, ...]) -> None:
        """Run once, counting multiply-accumulates and bytes of every operation."""
        values: dict[fx.Node, Any] = dict(zip(self.input_nodes, inputs, strict=True))
        last_use = {s: op.index for op in self.operations for s in op.sources}
        static = {op.node for op in self.static}
        weights = {node: name for name, nodes in self.weight_nodes.items() for node in nodes}
        multiplied: dict[str, list[tuple[fx.Node, int]]] = {}
        with torch.no_grad():
            for op in self.operations:
                with _FlopCounter() as counter:
                    value = self.execute(op, values.__getitem__, self.constants)
                if isinstance(value, torch.Tensor):
                    product = self._layer_product(op, values.__getitem__, weights)
                    if product is not None:
                        layer, axis = product
                        multiplied.setdefault(layer, []).append((op.node, axis))
                op.macs = counter.flops / 2
                op.n_bytes = _n_bytes(value)
                values[op.node] = value
                if op.node in static:
                    self.static_values[op.node] = value
                for source in op.sources:
                    if last_use[source] == op.index and source not in self.output_nodes:
                        values.pop(source, None)
        # Where a layer multiplies once per pass, its output has a mean that a bias can correct.
        self.channel_axes = dict(calls[0] for calls in multiplied.values() if len(calls) == 1)
        self.macs = sum(op.macs for op in self.operations)
        if not self.macs:
            # A model without a countable operation: every operation costs the same.
            for op in self.operations:
                op.macs = 1.0
            self.macs = float(len(self.operations))

    def _layer_product(
        self, op: Operation, lookup: Callable[[fx.Node], Any], weights: dict[fx.Node, str]
    ) -> tuple[str, int] | None:
        """Return the layer that an operation computes, if it does, and its axis of channels.

        Args:
            op: The operation.
            lookup: Values of earlier operations.
            weights: The layer of each weight.
        """
        args, kwargs = self.arguments(op, lookup, self.constants)
        call = layer_call(operator_name(op.node.target), args, kwargs)
        used = [weights[source] for source in op.sources if source in weights]
        return (used[0], call.channel_axis) if call is not None and used else None

    @staticmethod
    def arguments(
        op: Operation,
        lookup: Callable[[fx.Node], Any],
        constants: dict[fx.Node, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what an operation is called with."""

        def value_of(node: fx.Node) -> Any:  # noqa: ANN401
            return constants[node] if node in constants else lookup(node)

        args: Any = fx.node.map_arg(op.node.args, value_of)
        kwargs: Any = fx.node.map_arg(op.node.kwargs, value_of)
        return tuple(args), dict(kwargs)

    @classmethod
    def execute(
        cls,
        op: Operation,
        lookup: Callable[[fx.Node], Any],
        constants: dict[fx.Node, Any],
        quantizer: Callable[[Tensor], Tensor] | None = None,
        moments: Moments | None = None,
    ) -> Any:  # noqa: ANN401  # an operation may return anything
        """Run one operation.

        Its first argument goes through ``quantizer`` if there is one; a batch norm whose input had
        ``moments`` in full precision moves its statistics.
        """
        args, kwargs = cls.arguments(op, lookup, constants)
        if quantizer is not None:
            args = (quantizer(args[0]), *args[1:])
        if moments is not None:
            name = operator_name(op.node.target)
            call = batch_norm_call(name, args, kwargs)
            assert call is not None  # noqa: S101  # it had moments
            return as_returned(name, run_moved(call, moments)[0])
        return op.target(*args, **kwargs)

    def moments(
        self, op: Operation, lookup: Callable[[fx.Node], Any], constants: dict[fx.Node, Any]
    ) -> Moments | None:
        """Return the moments of a batch norm's input; ``None`` for every other operation."""
        args, kwargs = self.arguments(op, lookup, constants)
        call = batch_norm_call(operator_name(op.node.target), args, kwargs)
        return None if call is None else observed(call)

    def reads(self, layers: Iterable[str]) -> set[fx.Node]:
        """Return the values that re-running behind ``layers`` takes from a state."""
        behind = self.behind_all(layers)
        return {
            source
            for op in self.operations
            if op.node in behind
            for source in op.sources
            if source in self.by_node and source not in behind and source not in self.static_values
        }

    def behind_all(self, layers: Iterable[str]) -> frozenset[fx.Node]:
        """Return the operations behind any of ``layers``."""
        return frozenset().union(*(self.behind[name] for name in layers))

    def restore(self, values: dict[fx.Node, Any]) -> Any:  # noqa: ANN401
        """Return the model's output in the structure that the module returns."""
        flat = fx.node.map_arg(self.results, values.__getitem__)
        return torch.utils._pytree.tree_unflatten(list(flat), self.out_spec)  # noqa: SLF001


class _FlopCounter(OperatorWatcher):
    """Counts as ``torch.utils.flop_counter.FlopCounterMode`` does, which imports the compiler."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        del types
        named = kwargs or {}
        with self:
            parts = func.decompose(*args, **named)
        if parts is not NotImplemented:
            return parts
        value = func(*args, **named)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **named, out_val=value)
        return value


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    try:
        # The exporter warns about its own internals; its errors are wrapped below.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, strict=False)
            _replace_last_uses(program.graph_module)
            if not _is_functional(program):
                program = program.run_decompositions({})
    except Exception as err:
        first = (str(err).splitlines() or [type(err).__name__])[0]
        msg = (
            f"the model must be exportable by torch.export to be run as a graph; it failed: {first}"
        )
        raise InvalidModel(msg, error=str(err)) from err
    if not _is_functional(program) or program.graph_signature.buffers_to_mutate:
        msg = "the model must not change its tensors in place in eval mode to be run as a graph"
        raise InvalidModel(msg)
    return Program(
        graph=program.graph,
        constants=dict(_constants(program, module)),
        out_spec=program.call_spec.out_spec,
    )


def _constants(program: ExportedProgram, module: nn.Module) -> Iterator[tuple[fx.Node, Any]]:
    """Yield each node of the program that stands for a tensor of the model, and that tensor."""
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.name in tensors:
            yield node, tensor_of(module, tensors[node.name])
        elif node.name in lifted:
            yield node, program.constants[lifted[node.name]]
        elif node.op == "get_attr":
            yield node, getattr(program.graph_module, str(node.target))


def _replace_last_uses(module: fx.GraphModule) -> None:
    """Replace operations in place, such as ``relu_``, whose input nothing else reads.

    Most operations in place are of this kind. Where all are, the program need not be
    functionalized, which takes the exporter four times as long as the export.
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        plain, changed = _out_of_place(node.target), node.args[0]
        if plain is None or not isinstance(changed, fx.Node) or set(changed.users) != {node}:
            continue
        schema = getattr(changed.target, "_schema", None)
        if schema is None or any(given.alias_info for given in schema.returns):
            continue  # an input, a parameter, or a view of something else
        # In place nothing is promoted; between values of one type nothing would be.
        values = (other.meta.get("val") for other in (node, *node.all_input_nodes))
        if len({value.dtype for value in values if isinstance(value, torch.Tensor)}) == 1:
            node.target = plain
    module.recompile()


def _out_of_place(target: Any) -> Any:  # noqa: ANN401  # operators of torch have no public type
    """Return the operator that computes what ``target`` writes into its first argument."""
    schema = getattr(target, "_schema", None)
    if schema is None or [k for k, given in enumerate(schema.arguments) if given.is_write] != [0]:
        return None
    if not schema.name.endswith("_"):
        return None
    namespace, name = schema.name.removesuffix("_").split("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    plain = getattr(packet, schema.overload_name or "default", None)
    known = getattr(plain, "_schema", None)
    if known is None or known.is_mutable:
        return None
    kinds = [[str(given.type) for given in each.arguments] for each in (schema, known)]
    return plain if kinds[0] == kinds[1] else None


def _is_functional(program: ExportedProgram) -> bool:
    """Whether every operation is a plain one that changes none of its arguments."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):  # noqa: SLF001
            return False
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return False
    return True


def _nodes(structure: Any) -> tuple[fx.Node, ...]:  # noqa: ANN401
    found: list[fx.Node] = []
    fx.node.map_arg(structure, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return tuple(dict.fromkeys(found))


def _n_bytes(value: Any) -> int:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_n_bytes(item) for item in value)
    return 0
