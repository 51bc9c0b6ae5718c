"""Record what every layer multiplies: its input, the gradient at its output, and its feature.

One pass of the full-precision model, batch norm in eval mode, watched operator by operator, so
that ordinary modules and exported graphs look alike. A layer is linear in its weight, so what a
changed weight does to the layer's own output is the same operator on the same input with the
change in the weight's place.

It sees more than a ``quantizers.calls.LayerWatcher``, products and embeddings without a bias and
what becomes of outputs, and so is not one.

Design: docs/design/measures.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bitquota.errors import InvalidModel
from bitquota.models.calls import batch_norm_call, layer_call, operator_name, tensor_key, tensors_in
from bitquota.models.running import checked_output, inputs_of, labels_of
from bitquota.sensitivity.metrics.gradients import gradients_at

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.metrics.metric import TorchRunner

_WITH_BIAS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
     "linear", "addmm"}
)  # fmt: skip
_WITHOUT_BIAS = frozenset({"mm", "matmul", "embedding"})


@dataclass(slots=True, kw_only=True, eq=False)
class TracedCall:
    """One multiplication of a layer's weight with its input.

    Attributes:
        layer: Name of the layer.
        operator: Bare name, such as ``conv2d``.
        inputs: Copy of what the weight is multiplied with.
        channel_axis: Axis of the output that counts output channels.
        gradient: Of the summed loss with respect to the output, ``[n, ...]``, if asked for.
        feature: What the model made of the output before the next layer ran, ``[n, ...]``.
        output_dims: Number of dimensions of the output.
        normalised: Whether a batch norm is the next to read the output.
    """

    layer: str
    operator: str
    inputs: Tensor
    channel_axis: int
    output_dims: int
    gradient: Tensor | None = None
    feature: Tensor | None = None
    normalised: bool = False
    _function: Callable[..., Any]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]

    def respond(self, weight: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what the operator gives for ``weight`` and no bias.

        Args:
            weight: Any tensor in the shape of the layer's weight (a change, for instance), or
                with another number of output channels.
            inputs: Instead of the traced input.
        """
        # ``addmm`` insists on a bias; every other operator takes none.
        bias = weight.new_zeros(()) if self.operator == "addmm" else None
        given = {
            _Place.WEIGHT: weight,
            _Place.INPUTS: self.inputs if inputs is None else inputs,
            _Place.BIAS: bias,
        }

        def put(value: Any) -> Any:  # noqa: ANN401  # any argument
            return given[value] if isinstance(value, _Place) else value

        args, kwargs = tree_map(put, (self._args, self._kwargs))
        with torch.no_grad():
            result: Tensor = self._function(*args, **kwargs)
        return result


class _Place(Enum):
    """Stands in the arguments of a traced call for what may be replaced."""

    WEIGHT = "weight"
    INPUTS = "inputs"
    BIAS = "bias"


@dataclass(slots=True, eq=False)
class _Recorder(TorchFunctionMode):
    names: dict[tuple[Any, ...], str]
    gradients: bool
    features: bool
    calls: list[TracedCall] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)
    _tainted: dict[int, Tensor] = field(default_factory=dict)
    _last: Tensor | None = None
    _output: Tensor | None = None
    _copied: tuple[Tensor, int, Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run ``func``; keep what a layer's call needs."""
        del types
        named = kwargs or {}
        name = operator_name(func)
        weight = None
        if name in _WITH_BIAS or name in _WITHOUT_BIAS:
            weight = next((t for t in tensors_in((args, named)) if self._layer_of(t)), None)
        if weight is not None and self.features:
            self._end_feature()
        normalisation = None if self._output is None else batch_norm_call(name, args, named)
        if normalisation is not None and normalisation.inputs is self._output:
            self.calls[-1].normalised = True
        result = func(*args, **named)
        if weight is not None:
            result = self._output = self._layer(func, name, args, named, weight, result)
        elif self.features and self._tainted:
            self._follow(args, named, result)
        return result

    def finish(self) -> None:
        """Close the last layer's feature."""
        self._end_feature()
        self._output = self._copied = None

    def _layer_of(self, tensor: Tensor) -> str | None:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.grad_fn is not None:
            return None
        return self.names.get(tensor_key(tensor)) if tensor.numel() else None

    def _layer(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weight: Tensor,
        result: Tensor,
    ) -> Tensor:
        known = layer_call(name, args, kwargs)
        others = [t for t in tensors_in((args, kwargs)) if t is not weight]
        inputs = others[0] if known is None else known.inputs
        layer = self._layer_of(weight)
        assert layer is not None  # noqa: S101  # the caller looked
        bias = None if known is None else known.bias

        def take_out(value: Any) -> Any:  # noqa: ANN401  # any argument
            if value is weight:
                return _Place.WEIGHT
            if value is inputs:
                return _Place.INPUTS
            return _Place.BIAS if value is bias and bias is not None else value

        emptied, emptied_named = tree_map(take_out, (args, kwargs))
        self.calls.append(
            TracedCall(
                layer=layer,
                operator=name,
                # A copy: the model may change the tensor in place later on.
                inputs=self._copy(inputs),
                channel_axis=_channel_axis(name, args, weight)
                if known is None
                else known.channel_axis,
                output_dims=result.ndim,
                _function=func,
                _args=emptied,
                _kwargs=emptied_named,
            )
        )
        if self.gradients:
            probe = torch.zeros_like(result, requires_grad=True)
            self.probes.append(probe)
            result = result + probe
        if self.features:
            self._tainted, self._last = {id(result): result}, result
        return result

    def _copy(self, inputs: Tensor) -> Tensor:
        """Return a copy; layers that are given the same tensor, such as q, k and v, share one."""
        version = inputs._version  # noqa: SLF001  # counts writes
        last = self._copied
        if last is None or last[0] is not inputs or last[1] != version:
            last = self._copied = inputs, version, inputs.detach().clone()
        return last[2]

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        if not any(id(t) in self._tainted for t in tensors_in((args, kwargs))):
            return
        for tensor in tensors_in(result):
            self._tainted[id(tensor)] = tensor
            samples = self._last is not None and tensor.ndim and len(tensor) == len(self._last)
            if tensor.is_floating_point() and samples:
                self._last = tensor

    def _end_feature(self) -> None:
        if self._last is not None:
            self.calls[-1].feature = self._last.detach().clone()
        self._tainted, self._last = {}, None


def _channel_axis(name: str, args: tuple[Any, ...], weight: Tensor) -> int:
    """Return the axis of output channels, from the end: the rows of a product begin with it."""
    first = name in {"mm", "matmul"} and bool(args) and args[0] is weight
    return -2 if first else -1


def trace_layers(
    runner: TorchRunner,
    chunk: int,
    layers: Sequence[str],
    metric: str,
    *,
    loss: Loss | None = None,
    features: bool = False,
) -> dict[str, list[TracedCall]]:
    """Run full precision on a chunk and return the calls of each of ``layers``, as they first ran.

    A layer that runs several times (tied weights) has several calls.

    Args:
        runner: Has the model and the samples.
        chunk: Which samples.
        layers: What to watch.
        metric: Whom to name in an error.
        loss: Take the gradient of its sum over the chunk's samples at every layer's output.
            Samples do not mix in eval mode, so each sample's slice is its own gradient.
        features: Also keep each layer's feature: the last value that the model computes from the
            layer's output before the next layer runs (for a convolution in a residual network:
            after batch norm, addition and ReLU).

    Raises:
        InvalidModel: A layer's multiplication is not visible, or no gradient reaches it.

    Cost: one forward pass, and a backward pass with ``loss``; keeps a copy of every layer's
    input on the chunk.
    """
    module, span = runner.module, runner.chunks[chunk]
    names = {tensor_key(runner.weights.original(name)): name for name in layers}
    recorder = _Recorder(names, gradients=loss is not None, features=features)
    module.eval()
    with torch.set_grad_enabled(loss is not None):
        with recorder:
            value = module(*inputs_of(runner.calibration, span))
        recorder.finish()
        if loss is not None:
            output = checked_output(value, len(span))
            labels = labels_of(runner.calibration, span)
            total = loss.per_sample(output, output.detach(), labels).sum()
            _take_gradients(recorder, total, metric)
    found: dict[str, list[TracedCall]] = {}
    for call in recorder.calls:
        found.setdefault(call.layer, []).append(call)
    check_all_seen(found, layers, metric)
    return found


def trace_gradients(
    run: Callable[..., Tensor],
    values: Sequence[Tensor],
    direction: Callable[[Tensor], Tensor],
    names: dict[tuple[Any, ...], str],
    metric: str,
    *,
    at_input: bool,
) -> tuple[list[TracedCall], Tensor]:
    """Run part of a model, and return its layers' calls with gradients, and that at its input.

    Args:
        run: Runs the part.
        values: What it is called with.
        direction: Returns the gradient at the output, given the output.
        names: Layers by ``tensor_key`` of their weights.
        metric: Whom to name in an error.
        at_input: Whether a gradient at the first of ``values`` is wanted; else it is empty.

    Cost: one pass forwards and backwards; keeps a copy of every layer's input.
    """
    recorder = _Recorder(names, gradients=True, features=False)
    first, *others = values
    leaf = first.detach().requires_grad_(at_input)
    with torch.enable_grad():
        with recorder:
            output = run(leaf, *others)
        recorder.finish()
        total = (output * direction(output.detach()).to(output.dtype)).sum()
    leaves = [*recorder.probes, *([leaf] if at_input else [])]
    gradients = gradients_at(total, leaves, metric)
    for call, gradient in zip(recorder.calls, gradients, strict=False):
        call.gradient = gradient
    back = gradients[-1] if at_input else None
    return recorder.calls, torch.zeros_like(first) if back is None else back


def check_all_seen(seen: Collection[str], layers: Sequence[str], metric: str) -> None:
    """Raise ``InvalidModel`` if one of ``layers`` was not seen to multiply its weight."""
    if missing := [name for name in layers if name not in seen]:
        msg = (
            f"the metric '{metric}' must see every layer multiply its weight; it does not see "
            f"{', '.join(missing[:3])} (experts, fused attention, or a model that runs outside "
            "torch): use 'diagonal', 'gram' or 'pairs', or exclude the layer"
        )
        raise InvalidModel(msg, measure=metric, layers=missing)


def _take_gradients(recorder: _Recorder, total: Tensor, metric: str) -> None:
    if not recorder.probes:
        return
    gradients = gradients_at(total, recorder.probes, metric)
    for call, probe, gradient in zip(recorder.calls, recorder.probes, gradients, strict=True):
        call.gradient = torch.zeros_like(probe) if gradient is None else gradient
