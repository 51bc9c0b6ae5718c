"""A module that executes a list of calls: a rebuilt graph, without generating any code."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from bitquota.canonical import digest_json
from bitquota.models.identity import Computation, Description

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


OPERATOR = "operator"
"""Key of a node's metadata under which the name of its function stands."""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """An input that an exported graph declares.

    Attributes:
        name: As the forward pass called it.
        dtype: Of its tensor.
        n_samples: The only first dimension that it was exported for, if there is one.
    """

    name: str
    dtype: torch.dtype
    n_samples: int | None


@dataclass(frozen=True, slots=True)
class _Value:
    """The result of an earlier step."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call.

    Attributes:
        kind: ``input``, ``tensor`` (a parameter or buffer), ``module`` or ``function``.
        target: Position of an input, path of a tensor or module, or the function.
        args: Constants and earlier values.
        kwargs: Likewise.
        free: Values that nothing after this step reads.
        operator: Name of the function, where it does not know its own.
    """

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any]
    free: tuple[int, ...] = ()
    operator: str = ""

    def given(self, values: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments, with what ``values`` has for each earlier result."""

        def resolve(arg: Any) -> Any:  # noqa: ANN401  # an operator's argument
            if isinstance(arg, _Value):
                return values[arg.index]
            if isinstance(arg, (list, tuple)):
                return [resolve(a) for a in arg]
            return arg

        return [resolve(a) for a in self.args], {n: resolve(a) for n, a in self.kwargs.items()}


def dynamic_axes(module: nn.Module, n_inputs: int, axes: Mapping[int, Any]) -> tuple[Any, ...]:
    """Return ``dynamic_shapes`` of torch's exporters: the same ``axes`` for each input.

    A module rebuilt from a graph takes ``*inputs``, which torch counts as one nested argument.
    """
    each = tuple(dict(axes) for _ in range(n_inputs))
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return (each,) if kinds[:1] == [inspect.Parameter.VAR_POSITIONAL] else each


class ExportedModel(nn.Module):
    """Holds the layers and tensors of a graph under their names, and runs its calls in order.

    Attributes:
        declared: What it takes, in order.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, declared: tuple[GraphInput, ...]) -> None:
        """Take over what ``root`` holds and the calls of ``graph``."""
        super().__init__()
        self.declared = declared
        used = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
        for name, child in root.named_children():
            if any(target == name or target.startswith(name + ".") for target in used):
                self.add_module(name, child)
        for name, parameter in root.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in root.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._steps, self._result = _steps(graph)

    def calls(self) -> tuple[tuple[Step, ...], int | tuple[int, ...]]:
        """Return the steps, and which of their values are the output."""
        return self._steps, self._result

    def computation(self) -> Computation:
        """Return what the calls compute, for the digest of the model."""
        describe, stored = Description(), set(self.state_dict(keep_vars=True))
        rows = []
        for step in self._steps:
            target = step.target
            if step.kind == "tensor":
                target = describe.tensor(self, target, stored)
            elif step.kind == "module":
                target = [target, describe.module(self.get_submodule(target))]
            name = step.operator or describe(target)
            rows.append([step.kind, name, describe(step.args), describe(step.kwargs)])
        described: list[Any] = [rows, self._result]
        if len(self.declared) > 1:  # their names decide which samples go where
            described.append([entry.name for entry in self.declared])
        return Computation(digest=digest_json(described))

    def forward(self, *inputs: Tensor) -> Any:  # noqa: ANN401  # a tensor, or a tuple of them
        """Run all calls on ``inputs`` and return the graph's output, or a tuple of several."""
        values: dict[int, Any] = {}
        if len(inputs) != len(self.declared):
            names = ", ".join(entry.name for entry in self.declared)
            msg = f"the model takes {len(self.declared)} inputs ({names}); got {len(inputs)}"
            raise TypeError(msg)
        for index, step in enumerate(self._steps):
            if step.kind == "input":
                values[index] = inputs[step.target]
            elif step.kind == "tensor":
                owner, _, name = step.target.rpartition(".")
                values[index] = getattr(self.get_submodule(owner), name)
            else:
                call: Callable[..., Any] = step.target
                if step.kind == "module":
                    call = self.get_submodule(step.target)
                args, kwargs = step.given(values)
                values[index] = call(*args, **kwargs)
            for done in step.free:
                del values[done]
        if isinstance(self._result, tuple):
            return tuple(values[k] for k in self._result)
        result: Tensor = values[self._result]
        return result


def _steps(graph: fx.Graph) -> tuple[tuple[Step, ...], int | tuple[int, ...]]:
    nodes = [node for node in graph.nodes if node.op != "output"]
    index = {node: k for k, node in enumerate(nodes)}
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    returned = output if isinstance(output, (tuple, list)) else (output,)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    n_inputs = 0
    steps = []
    for node in nodes:
        kind = {"placeholder": "input", "get_attr": "tensor", "call_module": "module"}
        target: Any = node.target
        if node.op == "placeholder":
            target = n_inputs
            n_inputs += 1
        steps.append(
            Step(
                kind=kind.get(node.op, "function"),
                target=target,
                args=tuple(_refer(arg, index) for arg in node.args),
                kwargs={name: _refer(arg, index) for name, arg in node.kwargs.items()},
                free=tuple(index[done] for done in _freed(node, last_use, returned)),
                operator=node.meta.get(OPERATOR, ""),
            )
        )
    if returned is output:
        return tuple(steps), tuple(index[node] for node in returned)
    return tuple(steps), index[output]


def _freed(
    node: fx.Node, last_use: Mapping[fx.Node, fx.Node], returned: Sequence[fx.Node]
) -> list[fx.Node]:
    """Return the values that nothing needs once ``node`` is computed."""
    inputs = dict.fromkeys(node.all_input_nodes)
    freed = [s for s in inputs if last_use[s] is node and s not in returned]
    if node not in last_use and node not in returned:
        freed.append(node)  # computed for nothing
    return freed


def _refer(arg: Any, index: dict[fx.Node, int]) -> Any:  # noqa: ANN401  # an operator's argument
    if isinstance(arg, fx.Node):
        return _Value(index[arg])
    if isinstance(arg, (list, tuple)):
        return tuple(_refer(a, index) for a in arg)
    return arg
