"""Find the quantizable weights of a graph of operators, as ``torch.export`` makes them.

The modules are gone and only the calls are left: the graph is run once, and each call that
multiplies with a parameter is a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bitquota.candidates.layers import LayerKind
from bitquota.models.calls import tensor_key
from bitquota.models.found_weight import FoundWeight, n_macs_of, n_samples_of

if TYPE_CHECKING:
    from torch import Tensor

_CALLS: dict[str, tuple[LayerKind, int, int]] = {
    # Operator: kind, position of the input, position of the weight.
    "aten.conv1d": (LayerKind.CONV1D, 0, 1),
    "aten.conv2d": (LayerKind.CONV2D, 0, 1),
    "aten.conv3d": (LayerKind.CONV3D, 0, 1),
    "aten.conv_transpose1d": (LayerKind.CONV_TRANSPOSE1D, 0, 1),
    "aten.conv_transpose2d": (LayerKind.CONV_TRANSPOSE2D, 0, 1),
    "aten.conv_transpose3d": (LayerKind.CONV_TRANSPOSE3D, 0, 1),
    "aten.linear": (LayerKind.LINEAR, 0, 1),
    "aten.embedding": (LayerKind.EMBEDDING, 1, 0),
    "aten.addmm": (LayerKind.LINEAR_TRANSPOSED, 1, 2),
    "aten.mm": (LayerKind.LINEAR_TRANSPOSED, 0, 1),
    "aten.matmul": (LayerKind.LINEAR_TRANSPOSED, 0, 1),
}
_CONVOLUTION_KINDS = {
    (False, 3): LayerKind.CONV1D,
    (False, 4): LayerKind.CONV2D,
    (False, 5): LayerKind.CONV3D,
    (True, 3): LayerKind.CONV_TRANSPOSE1D,
    (True, 4): LayerKind.CONV_TRANSPOSE2D,
    (True, 5): LayerKind.CONV_TRANSPOSE3D,
}


def is_exported(module: nn.Module) -> bool:
    """Return whether this is a graph of operators rather than of module calls."""
    if not isinstance(module, fx.GraphModule):
        return False
    return any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001
        for node in module.graph.nodes
    )


def search_operators(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    names: dict[tuple[Any, ...], list[str]],
) -> dict[tuple[Any, ...], FoundWeight]:
    """Return the quantizable weights of a graph, in the order of their first calls.

    Args:
        module: What ``is_exported`` accepts.
        example_inputs: What it is run on, once.
        names: Every name of every parameter, by its ``tensor_key``.
    """
    assert isinstance(module, fx.GraphModule)  # noqa: S101  # asked by the caller
    interpreter = _CountingInterpreter(module, names, n_samples_of(example_inputs))
    flat = torch.utils._pytree.tree_leaves(example_inputs)  # noqa: SLF001
    with torch.no_grad():
        interpreter.run(*flat, enable_io_processing=False)
    return interpreter.found


class _CountingInterpreter(fx.Interpreter):
    """Runs a graph of operators and finds the calls that multiply with a parameter."""

    def __init__(
        self, module: fx.GraphModule, names: dict[tuple[Any, ...], list[str]], n_samples: int
    ) -> None:
        super().__init__(module)
        self.names, self.n_samples = names, n_samples
        self.weight_of: dict[fx.Node, tuple[str, Tensor]] = {}
        self.found: dict[tuple[Any, ...], FoundWeight] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, nn.Parameter):
            self.weight_of[n] = (str(n.target), result)
        elif n.op == "call_function":
            self._look_at(n, result)
        return result

    def _look_at(self, node: fx.Node, result: Any) -> None:  # noqa: ANN401
        call = _layer_call(node)
        if call is None:
            return
        kind, input_node, weight_node = call
        if weight_node not in self.weight_of or not isinstance(result, torch.Tensor):
            return
        own_name, weight = self.weight_of[weight_node]
        if weight.ndim < 2:
            return
        if kind is LayerKind.CONV1D and (convolution := _decomposed_kind(node, weight)):
            kind = convolution
        key = tensor_key(weight)
        # The exporter keeps any one name of a tied weight; take the one that modules would give.
        full = self.names.get(key, [own_name])[0]
        groups = _groups(node, kind)
        if key not in self.found:
            owner, _, attribute = full.rpartition(".")
            self.found[key] = FoundWeight(
                name=(owner if attribute == "weight" else full) or full,
                kind=kind,
                weight_name=full,
                weight=weight,
                groups=groups,
                aliases=[name for name in self.names.get(key, []) if name != full],
            )
        item = self.found[key]
        given = self.env[input_node] if isinstance(input_node, fx.Node) else None
        n_in = given.numel() if isinstance(given, torch.Tensor) else 0
        if isinstance(given, torch.Tensor) and given.is_floating_point():
            item.n_inputs += n_in // self.n_samples
        item.n_macs += n_macs_of(kind, weight, groups, n_in, result.numel()) // self.n_samples


def _layer_call(node: fx.Node) -> tuple[LayerKind, Any, fx.Node] | None:
    """Return kind, input node and weight node of a call that multiplies with a weight."""
    name = str(node.target).rsplit(".", 1)[0] if "." in str(node.target) else str(node.target)
    if name == "aten.convolution":
        kind, at, weight_at = LayerKind.CONV1D, 0, 1  # the rank of the weight decides later
    elif name in _CALLS:
        kind, at, weight_at = _CALLS[name]
    else:
        return None
    if len(node.args) <= max(at, weight_at) or not isinstance(node.args[weight_at], fx.Node):
        return None
    weight = node.args[weight_at]
    # Decomposed linear layers multiply with the transpose of the parameter.
    if isinstance(weight, fx.Node) and str(weight.target) in {
        "aten.t.default",
        "aten.permute.default",
        "aten.numpy_T.default",
    }:
        inner = weight.args[0]
        if kind is LayerKind.LINEAR_TRANSPOSED and isinstance(inner, fx.Node):
            kind, weight = LayerKind.LINEAR, inner
    assert isinstance(weight, fx.Node)  # noqa: S101  # checked above
    return kind, node.args[at], weight


def _decomposed_kind(node: fx.Node, weight: Tensor) -> LayerKind | None:
    if str(node.target) != "aten.convolution.default":
        return None
    return _CONVOLUTION_KINDS.get((bool(node.args[6]), weight.ndim))


def _groups(node: fx.Node, kind: LayerKind) -> int:
    name = str(node.target)
    if name == "aten.convolution.default":
        return int(node.args[8])  # type: ignore[arg-type]
    if "CONV" not in kind.name:
        return 1
    # The seventh argument of all six convolutions.
    value = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    return int(value)  # type: ignore[arg-type]
