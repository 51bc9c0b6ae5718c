"""The outputs of a model by name, and modules that return what a loss is about.

A network may end in a softmax, a sigmoid or an arg-max, and may return several tensors. A loss is
about what stands before: ``measuring`` returns the same network with its weights under the same
names, whose output is one tensor in the space of the loss. What stood before a final softmax or
sigmoid is taken from the graph where it is seen there, and is computed from the logarithm where it
is not (a softmax changes nothing by a constant, so its logarithms are logits).

Design: docs/design/outputs.md
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitquota.errors import MeasurementFailed
from bitquota.models.calls import operator_name
from bitquota.models.onnx.outputs import measuring_onnx, onnx_outputs
from bitquota.models.onnx.program import source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from bitquota.plan import PlanOutput

_STATES = frozenset(
    {"past_key_values", "hidden_states", "attentions", "cross_attentions", "encoder_attentions",
     "decoder_attentions", "encoder_hidden_states", "decoder_hidden_states", "loss"}
)  # fmt: skip
"""Members of transformers' outputs that are no answers."""

End = tuple[str, Tensor, int, Tensor]
"""A softmax, sigmoid or arg-max: which, what it was given, over which axis, and its result."""

_UNDONE = {"softmax": "softmax", "_softmax": "softmax", "sigmoid": "sigmoid", "argmax": "argmax"}


def named_outputs(value: Any, prefix: str = "") -> dict[str, Tensor]:  # noqa: ANN401  # whatever a model returns
    """Return every tensor of an output by name: keys, or positions in a tuple."""
    if isinstance(value, Tensor):
        return {prefix or "output": value}
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = [(k, v) for k, v in value.items() if k not in _STATES]
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for name, member in pairs:
        found |= named_outputs(member, f"{prefix}.{name}" if prefix else str(name))
    return found


def outputs_of(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the outputs of ``module`` on ``inputs`` that have one row for each sample.

    Cost: one pass.
    """
    with torch.no_grad():
        if (source := source_of(module)) is not None:
            found = onnx_outputs(module, source, inputs)
        else:
            found = named_outputs(module(*inputs))
    n = len(inputs[0])
    if len(found) == 1:
        return {getattr(module, "output_name", name): v for name, v in found.items()}
    return {name: v for name, v in found.items() if v.ndim and len(v) == n}


def measuring(
    module: nn.Module, outputs: Sequence[PlanOutput], *, before: bool = True
) -> nn.Module:
    """Return ``module`` with an output in the space of the loss; parameters are shared.

    One output keeps its shape, with classes in the last dimension; several are flattened and
    joined, ``[N, E]``.

    Args:
        module: The model.
        outputs: Which outputs, and what is to be undone.
        before: Look for what stands before a softmax or sigmoid; otherwise it is computed back.
    """
    if (source := source_of(module)) is not None:
        return measuring_onnx(module, source, outputs, before=before)
    kind: Any = type(module)

    @functools.wraps(kind.forward)
    def forward(self: Any, *inputs: Any, **named: Any) -> Tensor:  # noqa: ANN401  # the module's own
        with _watching_ends() as ends:
            value = kind.forward(self, *inputs, **named)
        return joined(value, outputs, ends.made if before else {})

    other = copy.copy(module)
    other.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return other


def joined(
    value: Any,  # noqa: ANN401  # whatever a model returns
    outputs: Sequence[PlanOutput],
    made: Mapping[int, End] | None = None,
) -> Tensor:
    """Return what a model returned in the space of the loss, as one tensor; see ``measuring``.

    Outputs are found by name, or by position where a file has other names for as many.
    """
    found = named_outputs(value)
    names = [o.name for o in outputs]
    if len(names) == 1 and (len(found) == 1 or names[0] not in found):
        found = {names[0]: next(iter(found.values()))}
    elif not set(names) <= set(found) and len(found) == len(names):
        found = dict(zip(names, found.values(), strict=True))
    if missing := sorted(set(names) - set(found)):
        msg = f"a model must return the output '{missing[0]}'; it returns {', '.join(found)}"
        raise MeasurementFailed(msg, output=missing[0])
    tensors = [_undone(found[o.name], o, made or {}) for o in outputs]
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.float().reshape(len(t), -1) for t in tensors], dim=1)


class _watching_ends(TorchFunctionMode):  # noqa: N801  # used as a context manager
    """Within the context, remember what every softmax, sigmoid and arg-max was given."""

    def __init__(self) -> None:
        super().__init__()
        # The result is kept too, so that its identity stays its own.
        self.made: dict[int, End] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run the call, and note it."""
        del types
        named = kwargs or {}
        result = func(*args, **named)
        operator = _UNDONE.get(operator_name(func))
        given = args[0] if args else named.get("input")
        if operator and isinstance(result, Tensor) and isinstance(given, Tensor):
            dim = args[1] if len(args) > 1 else named.get("dim", -1)
            if operator == "sigmoid" or isinstance(dim, int):
                axis = dim if isinstance(dim, int) else -1
                self.made[id(result)] = operator, given, axis, result
        return result


def _undone(output: Tensor, read: PlanOutput, made: Mapping[int, End]) -> Tensor:
    """Return what stands before the end of the network, classes in the last dimension."""
    operator, given, dim, _ = made.get(id(output), ("", output, -1, output))
    if read.undone == "sigmoid":
        return given if operator == "sigmoid" else logit(output)
    if read.undone == "softmax":
        seen = operator == "softmax"
        values = given if seen else output.clamp_min(torch.finfo(torch.float32).tiny).log()
        return values.movedim(dim if seen else read.axis, -1)
    if read.undone == "argmax":
        if operator != "argmax":
            msg = f"the output '{read.name}' must be the arg-max of scores; they are not seen"
            raise MeasurementFailed(msg, output=read.name)
        return given.movedim(dim, -1)
    return output if read.axis == -1 else output.movedim(read.axis, -1)


def logit(probability: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)``, finite also where ``p`` was rounded to 0 or 1."""
    p = probability.clamp(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps / 2)
    return p.log() - torch.log1p(-p)
