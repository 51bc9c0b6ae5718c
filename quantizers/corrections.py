"""Repair steps after post-training quantization that need no training.

References:
    [Nagel19] M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through
    Weight Equalization and Bias Correction", 2019, arXiv 1906.04721 (bias correction).

Design: docs/design/corrections.md
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx, nn

from bitquota.candidates.layers import WITHOUT_BIAS
from bitquota.errors import InvalidInput
from bitquota.models.batch_norm import (
    Followed,
    batch_statistics,
    moved_batch_norms,
    observed_statistics,
)
from bitquota.models.calibration import CalibrationSet
from bitquota.models.calls import (
    BatchNormCall,
    Event,
    LayerCall,
    LayerWatcher,
    Trace,
    operator_name,
    parameter_owners,
    tensor_key,
    tensors_in,
)
from bitquota.models.onnx.program import source_of
from bitquota.quantizers.onnx_corrections import bias_correct_onnx, reestimate_onnx, refuse_folding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from bitquota.candidates.layers import Inventory, Layer

DEFAULT_BATCH = 256
"""Samples per pass when statistics are re-estimated: enough that a batch stands for the set."""

Batches = CalibrationSet | Iterable[tuple["Tensor", ...]]
"""Samples: a calibration set, or batches of positional arguments."""


def fold_batch_norm(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> nn.Module:
    """Return a copy whose batch norms are multiplied into the layers before them.

    A batch norm is folded if its input is the output of a convolution or linear layer that
    nothing else reads; which layer that is is found by running the model, not by where modules
    stand. ``w' = w g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``, computed in
    float64. Batch norms behind anything else stay as they are.

    Args:
        module: The model; it is not changed. Ordinary modules, or a module of ``torch.export``.
        example_inputs: Positional arguments for one pass.

    Returns:
        A copy in eval mode with outputs equal up to rounding. Folded batch norms become
        ``nn.Identity``; layers without a bias get one.

    Cost: one forward pass.
    """
    if source_of(module) is not None:
        refuse_folding(module)
        return copy.deepcopy(module)
    with warnings.catch_warnings():
        # torch 2.13 warns about its own tree specifications when an exported graph is copied.
        warnings.simplefilter("ignore", FutureWarning)
        folded = copy.deepcopy(module)
    for part in folded.modules():
        part.training = False  # exported modules refuse eval()
    trace = Trace()
    with torch.no_grad(), trace:
        result = folded(*example_inputs)
    for tensor in tensors_in(result):
        trace.uses[id(tensor)] = trace.uses.get(id(tensor), 0) + 1
    owners = parameter_owners(folded)
    for layer, norm in _foldable_pairs(trace):
        assert norm.running_mean is not None  # noqa: S101  # _foldable_pairs
        assert norm.running_var is not None  # noqa: S101
        weight_owners = owners.get(tensor_key(layer.weight), [])
        norm_owners = owners.get(tensor_key(norm.running_mean), [])
        if len(weight_owners) != 1 or len(norm_owners) != 1:
            continue  # tied: another place would be changed too
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        with torch.no_grad():
            if layer.bias is not None:
                shift = shift + layer.bias.double() * scale
            per_weight = _scale_of_weight(layer, scale)
            layer.weight.copy_((layer.weight.double() * per_weight).to(layer.weight.dtype))
            bias = ensure_bias(folded, *weight_owners[0], rows=len(scale))
            bias.copy_(shift.to(bias.dtype))
        _remove_batch_norm(folded, *norm_owners[0])
    return folded


def _foldable_pairs(trace: Trace) -> Iterator[tuple[LayerCall, BatchNormCall]]:
    producers: dict[int, Event] = {}
    calls: dict[tuple[Any, ...], int] = {}
    for event in trace.events:
        if event.layer is not None:
            assert event.output is not None  # noqa: S101  # Trace records outputs only
            producers[id(event.output)] = event
            key = tensor_key(event.layer.weight)
            calls[key] = calls.get(key, 0) + 1
        if event.batch_norm is not None and event.batch_norm.running_mean is not None:
            key = tensor_key(event.batch_norm.running_mean)
            calls[key] = calls.get(key, 0) + 1
    for event in trace.events:
        norm = event.batch_norm
        if norm is None or norm.training or norm.running_mean is None:
            continue
        before = producers.get(id(norm.inputs))
        if before is None or before.layer is None or trace.uses[id(norm.inputs)] != 1:
            continue
        layer = before.layer
        once = calls[tensor_key(layer.weight)] == 1 and calls[tensor_key(norm.running_mean)] == 1
        # Batch norm counts channels on axis 1; a linear layer does so only on [N, C].
        same_axis = layer.channel_axis % norm.inputs.ndim == 1
        if once and same_axis:
            yield layer, norm


def _scale_of_weight(layer: LayerCall, scale: Tensor) -> Tensor:
    """Return ``scale`` (one per output channel) in a shape that multiplies the weight."""
    weight = layer.weight
    if layer.operator == "addmm":
        return scale[None, :]
    if layer.operator.startswith("conv_transpose"):
        per_group = weight.shape[1]
        groups = len(scale) // per_group
        spread = scale.reshape(groups, 1, per_group).expand(-1, weight.shape[0] // groups, -1)
        flat = spread.reshape(weight.shape[0], per_group)
        return flat.reshape(*flat.shape, *([1] * (weight.ndim - 2)))
    return scale.reshape(-1, *([1] * (weight.ndim - 1)))


def _remove_batch_norm(root: nn.Module, owner: nn.Module, attribute: str, name: str) -> None:
    path = name.rpartition(".")[0]
    if isinstance(owner, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
        parent = root.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], nn.Identity())
        return
    assert isinstance(root, fx.GraphModule)  # noqa: S101  # functional calls come from a graph
    for node in list(root.graph.nodes):
        reads = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
        if node.op == "call_function" and name in reads:
            source = node.args[0]
            users = list(node.users)
            if operator_name(node.target) != "batch_norm":
                # Decomposed batch norm returns a tuple.
                for user in users:
                    user.replace_all_uses_with(source)
                    root.graph.erase_node(user)
            else:
                node.replace_all_uses_with(source)
            root.graph.erase_node(node)
    del attribute
    root.graph.eliminate_dead_code()
    root.delete_all_unused_submodules()
    root.recompile()
    _drop_unused_tensors(root, path)


def _drop_unused_tensors(root: fx.GraphModule, path: str) -> None:
    """Remove what a folded batch norm of an exported graph leaves behind."""
    used = {str(node.target) for node in root.graph.nodes if node.op == "get_attr"}
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        return
    for store in (owner._parameters, owner._buffers):  # noqa: SLF001
        for attribute in list(store):
            if f"{path}.{attribute}" not in used:
                del store[attribute]


def ensure_bias(root: nn.Module, owner: nn.Module, attribute: str, name: str, rows: int) -> Tensor:
    """Return the bias of the layer whose weight is ``owner.attribute``, created if missing.

    Args:
        root: The model.
        owner: The module that holds the weight.
        attribute: Name of the weight in ``owner``.
        name: Full name of the weight.
        rows: Output channels.

    Raises:
        InvalidInput: The layer has no place for a bias.
    """
    weight = getattr(owner, attribute)
    if isinstance(root, fx.GraphModule):
        for node in root.graph.find_nodes(op="get_attr"):
            parameter = _attribute(root, str(node.target))
            if parameter is not None and tensor_key(parameter) == tensor_key(weight):
                return _ensure_bias_of_call(root, node, owner, name, rows)
    if not hasattr(owner, "bias"):
        msg = f"the layer of '{name}' has no bias and no place for one; leave it out"
        raise InvalidInput(msg, weight=name)
    bias = owner._parameters.get("bias")  # noqa: SLF001  # typed, unlike getattr
    if bias is None:
        bias = nn.Parameter(weight.new_zeros(rows))
        owner.register_parameter("bias", bias)
    return bias


def _attribute(root: nn.Module, name: str) -> Tensor | None:
    try:
        value = getattr(root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _ensure_bias_of_call(
    root: fx.GraphModule, weight: fx.Node, owner: nn.Module, name: str, rows: int
) -> Tensor:
    call = next(iter(weight.users))
    at = 0 if operator_name(call.target) == "addmm" else 2
    old = call.args[at] if len(call.args) > at else call.kwargs.get("bias")
    if isinstance(old, fx.Node):
        return root.get_parameter(str(old.target))
    bias = nn.Parameter(owner.get_parameter(name.rpartition(".")[2]).new_zeros(rows))
    owner.register_parameter("bias", bias)
    with root.graph.inserting_before(call):
        node = root.graph.get_attr(f"{name.rpartition('.')[0]}.bias".lstrip("."))
    args = [*call.args, *([None] * (at + 1 - len(call.args)))]
    args[at] = node
    call.args = tuple(args)
    root.recompile()
    return bias


def reestimate_batch_norm(
    module: nn.Module,
    data: Batches,
    *,
    reference: nn.Module | None = None,
    known: dict[int, Any] | None = None,
    batch_size: int = DEFAULT_BATCH,
) -> None:
    """Set running mean and variance of every batch norm after quantization, in place.

    With a ``reference`` the stored statistics are moved by what quantization did to each batch
    norm's input on ``data`` (see ``batch_norm``); every batch runs with statistics moved to fit
    itself. Without one they are replaced by exact mean and unbiased variance over all batches,
    while each batch is normalised with its own, as in training. With a single batch either equals
    one batch norm after the other; with several they differ by how much the batches differ.

    Args:
        module: The model, already quantized; run in eval mode. Unlabelled samples are enough.
        data: Samples, or batches of positional arguments.
        reference: The same model in full precision, whose stored statistics are those of training.
        known: What was seen of the reference, by batch of the same ``data``; filled by the first
            call, so that others need not run it again.
        batch_size: Samples per pass when ``data`` is a calibration set.

    Cost: one forward pass over ``data``, and one of the reference. Does nothing to a model without
    batch norm.
    """
    known = {} if known is None else known
    if source_of(module) is not None:
        if reference is None:
            msg = (
                "correcting the statistics of an ONNX graph needs the full-precision model: "
                "provide it"
            )
            raise InvalidInput(msg)
        reestimate_onnx(module, _batches(data, batch_size), reference, known)
        return
    followed: dict[tuple[Any, ...], Followed] = {}
    with torch.no_grad(), _eval_mode(module):
        for k, inputs in enumerate(_batches(data, batch_size)):
            within: AbstractContextManager[object] = batch_statistics(followed)
            if reference is not None:
                if k not in known:
                    with _eval_mode(reference), observed_statistics() as observed:
                        reference(*inputs)
                    known[k] = observed.calls
                within = moved_batch_norms(known[k], followed)
            with within:
                module(*inputs)
        for statistics in followed.values():
            statistics.store()


class _eval_mode:  # noqa: N801  # used as a context manager
    def __init__(self, module: nn.Module) -> None:
        self._modes = [(part, part.training) for part in module.modules()]

    def __enter__(self) -> None:
        for part, _ in self._modes:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, mode in self._modes:
            part.training = mode


def _batches(data: Batches, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    if isinstance(data, CalibrationSet):
        for part in data.batches(batch_size):
            yield part.inputs
    else:
        yield from data


class _OutputMeans(LayerWatcher[str]):
    """Sums the outputs of named layers per channel, and may shift them on the way."""

    def __init__(
        self,
        names: dict[tuple[Any, ...], str],
        shift: Callable[[str, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(names)
        self.shift = shift
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def around(
        self,
        known: str,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        axis = call.channel_axis % output.ndim
        per_channel = output.double().movedim(axis, 0).flatten(1)
        self.calls[known] = self.calls.get(known, 0) + 1
        self.counts[known] = self.counts.get(known, 0) + per_channel.shape[1]
        self.sums[known] = self.sums.get(known, 0) + per_channel.sum(dim=1)
        if self.shift is None:
            return output
        mean = self.sums[known] / max(self.counts[known], 1)
        change = self.shift(known, mean, output)
        shape = [1] * output.ndim
        shape[axis] = -1
        return output + change.to(output.dtype).reshape(shape)


class output_means(contextlib.AbstractContextManager["output_means"]):  # noqa: N801  # a context manager
    """Within the context, note the mean per channel of every layer's output, or put it right.

    Args:
        module: The model that runs in the context, its weights already in place.
        inventory: Its layers; embeddings, experts and layers that run more than once are left
            alone.
        wanted: Means by weight name, as ``means`` of another context; every output is shifted to
            them, as ``bias_correction`` would on the samples at hand.
    """

    def __init__(
        self, module: nn.Module, inventory: Inventory, wanted: dict[str, Tensor] | None = None
    ) -> None:
        self._watch = _OutputMeans(
            _weights_by_key(module, _with_bias(inventory)),
            None if wanted is None else partial(_shift_to, wanted),
        )
        self._within = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Watch what runs."""
        self._within.enter_context(self._watch)
        return self

    def __exit__(self, *error: object) -> None:
        """Watch no longer."""
        del error
        self._within.close()

    @property
    def means(self) -> dict[str, Tensor]:
        """``f64[channels]`` of each layer that ran once, by weight name.

        Experts that no token was sent to have none.
        """
        watch = self._watch
        once = [n for n, k in watch.calls.items() if k == 1 and watch.counts[n]]
        return {n: watch.sums[n] / watch.counts[n] for n in once}


def _shift_to(wanted: dict[str, Tensor], name: str, mean: Tensor, _: Tensor) -> Tensor:
    return wanted[name] - mean if name in wanted else torch.zeros_like(mean)


def _with_bias(inventory: Inventory) -> dict[str, Layer]:
    """Return the layers whose bias can be corrected, by weight name."""
    return {la.weight_name: la for la in inventory.layers if la.kind not in WITHOUT_BIAS}


def bias_correction(
    module: nn.Module,
    quantized: nn.Module,
    inventory: Inventory,
    data: CalibrationSet,
) -> None:
    """Shift the biases of ``quantized`` so that every layer's mean output is right again.

    For each layer, in order of execution, the bias moves by the mean over samples and positions
    of (full-precision output - quantized output), per output channel, all earlier layers being
    corrected already [Nagel19, section 4.2, empirical variant]. Layers without a bias get one.
    Embeddings, experts, and layers that run more than once per pass are left alone.

    Args:
        module: The full-precision model.
        quantized: The same model with quantized weights; changed in place.
        inventory: The layers.
        data: Unlabelled samples. They run as one batch, which makes a single pass sequential.

    Cost: one forward pass of each model over ``data``, in a single batch.
    """
    if source_of(module) is not None:
        bias_correct_onnx(module, quantized, data)
        return
    layers = _with_bias(inventory)
    names = _weights_by_key(module, layers)
    reference = _OutputMeans(names)
    with torch.no_grad(), _eval_mode(module), reference:
        module(*data.inputs)
    once = {name for name, calls in reference.calls.items() if calls == 1}
    owners = {
        full: (owner, attribute)
        for places in parameter_owners(quantized).values()
        for owner, attribute, full in places
    }
    biases: dict[str, Tensor] = {}
    for name in sorted(once):
        owner, attribute = owners[name]
        if attribute == "weight":
            biases[name] = ensure_bias(quantized, owner, attribute, name, rows=layers[name].rows)

    def shift(name: str, mean: Tensor, output: Tensor) -> Tensor:
        if name not in biases or not (reference.counts[name] and output.numel()):
            return output.new_zeros(len(mean))  # or an expert that no token was sent to
        change = reference.sums[name] / reference.counts[name] - mean
        biases[name].add_(change.to(biases[name].dtype))
        return change

    correcting = _OutputMeans(_weights_by_key(quantized, layers), shift)
    with torch.no_grad(), _eval_mode(quantized), correcting:
        quantized(*data.inputs)


def _weights_by_key(module: nn.Module, wanted: Iterable[str]) -> dict[tuple[Any, ...], str]:
    return {tensor_key(module.get_parameter(name)): name for name in wanted}
