"""The program of a rebuilt ``.pt2``: its own calls again, with the sizes of one batch.

``torch.export`` would find the same calls, but importing it takes as long as importing torch.

Design: docs/design/runners.md
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bitquota.models.layer_calls import call_of_module
from bitquota.models.pt2.module import ExportedModel

if TYPE_CHECKING:
    from torch import nn
    from torch.utils._pytree import TreeSpec

_UNKNOWN_BEFORE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operators that return sizes or numbers which other samples would change."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """The calls of a model for one batch size.

    Attributes:
        graph: Placeholders, calls of functions that change none of their arguments, and an output.
        constants: The tensors that stand for placeholders which are no inputs.
        out_spec: How the output's values are nested.
    """

    graph: fx.Graph
    constants: dict[fx.Node, Any]
    out_spec: TreeSpec


class _Elsewhere(Exception):  # a reason to let torch.export trace the model, no error
    """A call that is not plain: in place, of a recurrent module, or with sizes that data decide."""


def program_of(module: nn.Module, inputs: tuple[Tensor, ...]) -> Program | None:
    """Return the program of an ``ExportedModel``, or ``None`` where ``torch.export`` must trace.

    Args:
        module: The model, in eval mode.
        inputs: A batch; its sizes become constants of the program.

    Cost: one run of the model.
    """
    if type(module) is not ExportedModel or len(inputs) != len(module.declared):
        return None
    try:
        with torch.no_grad():
            return _Tracer(module).trace(inputs)
    except _Elsewhere:
        return None


class _Tracer:
    """Runs the steps of a model once and writes down the calls.

    A step's value is kept beside what later calls get as argument: its node or, for a size or
    another plain value, the value itself.
    """

    def __init__(self, module: ExportedModel) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Any] = {}
        self.nodes: dict[int, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}

    def trace(self, inputs: tuple[Tensor, ...]) -> Program:
        placed = [self.graph.placeholder(f"input_{k}") for k in range(len(inputs))]
        self.values.update(zip(placed, inputs, strict=True))
        found: dict[int, Any] = {}
        steps, result = self.module.calls()
        for index, step in enumerate(steps):
            args, kwargs = step.given(found)
            if step.kind == "input":
                found[index] = placed[step.target]
            elif step.kind == "tensor":
                owner, _, name = step.target.rpartition(".")
                found[index] = self._constant(getattr(self.module.get_submodule(owner), name))
            elif step.kind == "module":
                if kwargs or len(args) != 1:
                    raise _Elsewhere
                call = call_of_module(self.module.get_submodule(step.target), args[0])
                if call is None:
                    raise _Elsewhere
                found[index] = self._call(_overload(call[0]), call[1], {})
            else:
                function = _overload(step.operator) if step.operator else step.target
                found[index] = self._call(function, args, kwargs)
            for done in step.free:
                if isinstance(freed := found.pop(done), fx.Node):
                    self.values.pop(freed, None)
        returned = tuple(found[k] for k in result) if isinstance(result, tuple) else found[result]
        self.graph.output(returned if isinstance(returned, tuple) else (returned,))
        self.graph.eliminate_dead_code()
        nested = tuple(0 for _ in returned) if isinstance(returned, tuple) else 0
        spec = torch.utils._pytree.tree_structure(nested)  # noqa: SLF001
        return Program(graph=self.graph, constants=self.constants, out_spec=spec)

    def _constant(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.nodes:
            node = self.graph.get_attr(f"constant_{len(self.nodes)}")
            self.nodes[id(tensor)] = node
            self.constants[node] = tensor
        return self.nodes[id(tensor)]

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        args = torch.utils._pytree.tree_map_only(Tensor, self._constant, args)  # noqa: SLF001

        def value_of(node: fx.Node) -> Any:  # noqa: ANN401
            return self.constants[node] if node in self.constants else self.values[node]

        given = fx.node.map_arg((args, kwargs), value_of)
        value = function(*given[0], **given[1])
        if not _has_tensors(value):
            return value
        schema = getattr(function, "_schema", None)
        if schema is None and function is not operator.getitem:
            raise _Elsewhere
        node = self.graph.call_function(function, tuple(args), kwargs)
        self.values[node] = value
        return node


def _overload(name: str) -> Any:  # noqa: ANN401  # operators of torch have no public type
    """Return an operator by its full name, if it is plain."""
    *_, packet, overload = name.split(".")
    found = getattr(getattr(torch.ops.aten, packet), overload)
    if found._schema.is_mutable or _UNKNOWN_BEFORE.intersection(found.tags):  # noqa: SLF001
        raise _Elsewhere
    return found


def _has_tensors(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
