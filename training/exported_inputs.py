"""Input quantizers as part of an exported program, so that a ``.pt2`` runs as it was trained.

Design: docs/design/training.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bitquota.errors import InvalidPlan
from bitquota.models.calls import LAYER_OPERATORS, operator_name, tensor_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from bitquota.quantizers.activations import ActivationQuantizer


def hold_input_quantizers(
    program: ExportedProgram, quantizers: Mapping[str, ActivationQuantizer]
) -> None:
    """Quantize the inputs of layers inside of ``program``, which is changed in place.

    Each multiplication with one of the weights gets ``s round(clamp(x / s, low - z, high - z))`` of
    its input, with the trained step, zero point and codes: the bits of training. The gradient is
    straight-through within the range, as there, so that what is read back can be trained. It is
    written in plain arithmetic, because torch can neither export nor convert to ONNX what it calls
    ``fake_quantize``.

    Args:
        program: Weights are its parameters.
        quantizers: By name of the weight, as the state dictionary has it.

    Raises:
        InvalidPlan: The program does not multiply with a weight that has a quantizer.
    """
    wanted = {tensor_key(program.state_dict[name]): name for name in quantizers}
    held: dict[str, Any] = program.graph_signature.inputs_to_parameters
    weights = {
        placeholder: wanted[key]
        for placeholder, name in held.items()
        if (key := tensor_key(program.state_dict[name])) in wanted
    }
    found = set()
    for node in list(program.graph.nodes):
        places = LAYER_OPERATORS.get(operator_name(node.target)) if _is_call(node) else None
        if places is None:
            continue
        source, weight = (node.args[at] for at in places)
        name = weights.get(weight.name) if isinstance(weight, fx.Node) else None
        if name is not None:
            found.add(name)
            node.update_arg(places[0], _quantized(program.graph, node, source, quantizers[name]))
    if missing := sorted(set(quantizers) - found):
        msg = (
            "a .pt2 must contain the quantizer of every input; the exported program does not "
            "multiply "
            f"with {', '.join(missing[:3])} as a layer does: take trained.safetensors, which has "
            "them all"
        )
        raise InvalidPlan(msg, weights=missing)
    program.graph_module.recompile()


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _quantized(
    graph: fx.Graph, user: fx.Node, source: fx.Node, quantizer: ActivationQuantizer
) -> fx.Node:
    known = {k: v for k, v in source.meta.items() if k in ("val", "tensor_meta")}

    def call(operator: Callable[..., object], *args: object) -> fx.Node:
        made = graph.call_function(operator, args)  # type: ignore[arg-type]
        made.meta = dict(known)  # every value has the shape of the input
        return made

    step, zero = quantizer.scale, quantizer.zero_point
    aten = torch.ops.aten
    with graph.inserting_before(user):
        if step <= 0:  # an input that was always zero
            return call(aten.mul.Scalar, source, 0.0)
        ratio = call(aten.div.Scalar, source, step)
        low, high = float(quantizer.lowest - zero), float(quantizer.highest - zero)
        clipped = call(aten.clamp.default, ratio, low, high)
        rounded = call(aten.round.default, clipped)
        # Straight-through: the sum is the rounded value to the last bit, the gradient the other's.
        cut = call(aten.detach.default, call(aten.sub.Tensor, rounded, clipped))
        return call(aten.mul.Scalar, call(aten.add.Tensor, clipped, cut), step)
