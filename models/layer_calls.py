"""Turn a call of a layer's operator on bare parameters back into the layer's module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitquota.candidates.layers import LayerKind

_CONVOLUTIONS: dict[str, tuple[type[nn.Module], int]] = {
    "torch.ops.aten.conv1d.default": (nn.Conv1d, 1),
    "torch.ops.aten.conv1d.padding": (nn.Conv1d, 1),
    "torch.ops.aten.conv2d.default": (nn.Conv2d, 2),
    "torch.ops.aten.conv2d.padding": (nn.Conv2d, 2),
    "torch.ops.aten.conv3d.default": (nn.Conv3d, 3),
    "torch.ops.aten.conv3d.padding": (nn.Conv3d, 3),
}
_TRANSPOSED: dict[str, tuple[type[nn.Module], int]] = {
    "torch.ops.aten.conv_transpose1d.default": (nn.ConvTranspose1d, 1),
    "torch.ops.aten.conv_transpose2d.input": (nn.ConvTranspose2d, 2),
    "torch.ops.aten.conv_transpose3d.input": (nn.ConvTranspose3d, 3),
}
_BATCH_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
RECURRENT: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "torch.ops.aten.lstm.input": (nn.LSTM, {}),
    "torch.ops.aten.gru.input": (nn.GRU, {}),
    "torch.ops.aten.rnn_tanh.input": (nn.RNN, {"nonlinearity": "tanh"}),
    "torch.ops.aten.rnn_relu.input": (nn.RNN, {"nonlinearity": "relu"}),
    "torch.ops.aten.lstm_cell.default": (nn.LSTMCell, {}),
    "torch.ops.aten.gru_cell.default": (nn.GRUCell, {}),
    "torch.ops.aten.rnn_tanh_cell.default": (nn.RNNCell, {"nonlinearity": "tanh"}),
    "torch.ops.aten.rnn_relu_cell.default": (nn.RNNCell, {"nonlinearity": "relu"}),
}


class Conv1D(nn.Module):
    """A linear layer that stores its weight as ``[in, out]``, as GPT-2 does.

    Named like the class of transformers that it stands for.
    """

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        self.nf = n_outputs
        self.nx = n_inputs
        self.weight = nn.Parameter(torch.empty(n_inputs, n_outputs))
        self.bias = nn.Parameter(torch.empty(n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias`` for ``x: [..., n_inputs]``."""
        flat = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return flat.reshape(*x.shape[:-1], self.nf)


class MatrixOfOperator(nn.Linear):
    """A matrix ``[outputs, inputs]`` that an operator reads among others, as of an LSTM's gate.

    It holds the weight under a name and is never called.

    Attributes:
        kind: What the operator does with it.
    """

    def __init__(self, kind: LayerKind, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs, bias=False)
        self.kind = kind


def call_of_module(module: nn.Module, x: Any) -> tuple[str, tuple[Any, ...]] | None:  # noqa: ANN401
    """Return the call that ``module_for_call`` turned into ``module``: operator and arguments.

    Args:
        module: One of its modules.
        x: What stands for the module's input; it comes back among the arguments.

    Returns:
        ``None`` for every other module, and where hooks do more than the operator does.
    """
    kind, m = type(module), vars(module) | module._parameters | module._buffers  # noqa: SLF001
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001
        return None
    for target, (convolution, _) in (_CONVOLUTIONS | _TRANSPOSED).items():
        if kind is not convolution or target.endswith(".padding") != isinstance(m["padding"], str):
            continue
        if m["padding_mode"] != "zeros":
            return None
        transposed = target in _TRANSPOSED
        rest = ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
        return target, (x, *(m[n] for n in ["weight", "bias", "stride", "padding", *rest]))
    if kind is nn.Linear:
        return "torch.ops.aten.linear.default", (x, m["weight"], m["bias"])
    if kind is nn.Embedding and m["max_norm"] is None:
        return "torch.ops.aten.embedding.default", (m["weight"], x)
    if kind in _BATCH_NORMS.values() and not module.training and m["running_mean"] is not None:
        tensors = [m[n] for n in ["weight", "bias", "running_mean", "running_var"]]
        settings = (False, m["momentum"], m["eps"], torch.backends.cudnn.enabled)
        return "torch.ops.aten.batch_norm.default", (x, *tensors, *settings)
    if kind is Conv1D:
        return "torch.ops.aten.addmm.default", (m["bias"], x, m["weight"])
    return None


def module_for_call(
    target: str,
    root: nn.Module,
    tensors: dict[str, str],
    arguments: dict[str, Any],
    rank: int,
) -> str | None:
    """Put a module into ``root`` that does what a call does, and return its path.

    Args:
        target: Full name of the operator.
        root: Holds the parameters under their names.
        tensors: Operator argument to the parameter or buffer it is given.
        arguments: The other arguments that are no tensors; left out where they are defaults.
        rank: Number of dimensions of the input activation, 0 if unknown.

    Returns:
        The path of the module, or ``None`` if the call is best left an operator. A second call
        with the same weight and settings gets the same module.
    """
    if any(not _is_plain(value) for value in arguments.values()):
        return None
    build = _layer(target, root, tensors, arguments, rank)
    if build is None:
        return None
    module, names = build
    path = _module_path(names["weight"] if "weight" in names else names["running_mean"])
    if _is_tensor(root, path):
        return None  # a bare parameter of this name: it stays the operator's argument
    place = _child(root, path)
    if place is not None and type(place) is not nn.Module:
        return path if _same(place, module, root, names) else None
    for attribute, name in names.items():
        tensor = _tensor(root, name)
        if isinstance(tensor, nn.Parameter):
            setattr(module, attribute, tensor)
        elif attribute in module._buffers:  # noqa: SLF001
            module._buffers[attribute] = tensor  # noqa: SLF001
        else:
            return None
    if place is not None:
        _keep_the_rest(place, module, names, path)
    parent, _, last = path.rpartition(".")
    owner = root.get_submodule(parent) if parent else root
    owner.add_module(last, module.eval())
    return path


def recurrent_for_call(
    target: str, root: nn.Module, weights: list[str], arguments: dict[str, Any]
) -> str | None:
    """Put an LSTM, GRU or RNN (or one cell of such) into ``root`` for a call, and return its path.

    Args:
        target: Full name of the operator.
        root: Holds the parameters under their names.
        weights: Those that the call reads, in its order.
        arguments: Its settings, where they are no tensors.

    Returns:
        The path, or ``None`` if this is no such call, or its weights are not those of one module
        under torch's own names.
    """
    if target not in RECURRENT:
        return None
    kind, settings = RECURRENT[target]
    owner = weights[0].rpartition(".")[0] if weights else ""
    path, names = owner or "layer", [name.rpartition(".")[2] for name in weights]
    source = _child(root, owner) if owner else root
    if source is None or weights != [f"{owner}.{name}".strip(".") for name in names]:
        return None
    tensors = dict(zip(names, (_tensor(root, name) for name in weights), strict=True))
    module = _recurrent(kind, settings, arguments, tensors)
    if module is None:
        return None
    if type(source) is kind:  # called before
        return path if source.extra_repr() == module.extra_repr() else None
    if type(source) is not nn.Module or (not owner and _is_tensor(root, path)):
        return None
    for name, tensor in tensors.items():
        setattr(module, name, tensor)
    if owner:
        _keep_the_rest(source, module, dict(zip(names, weights, strict=True)), path)
    else:
        for name in names:
            del root._parameters[name]  # noqa: SLF001
    parent, _, last = path.rpartition(".")
    (root.get_submodule(parent) if parent else root).add_module(last, module.eval())
    return path


def _recurrent(
    kind: type[nn.Module],
    settings: dict[str, Any],
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
) -> nn.Module | None:
    """Return a module of ``kind`` whose parameters have these names and shapes, if one has."""
    given = ("num_layers", "bidirectional", "batch_first")
    layers: dict[str, Any] = {name: arguments[name] for name in given if name in arguments}
    suffix = "_l0" if layers else ""
    matrices = [tensors.get(f"weight_{part}{suffix}") for part in ("ih", "hh", "hr")]
    if any(t is None or t.ndim != 2 for t in matrices[:2]):
        return None
    inputs, hidden, projection = matrices
    assert inputs is not None and hidden is not None  # noqa: S101, PT018  # looked at above
    width = hidden.shape[1]
    if projection is not None:
        layers["proj_size"], width = projection.shape
    bias = any(name.startswith("bias") for name in tensors)
    module = _on_meta(kind, inputs.shape[1], width, bias=bias, **settings, **layers)
    declared = {name: parameter.shape for name, parameter in module.named_parameters()}
    fits = list(declared) == list(tensors) and all(
        isinstance(t, nn.Parameter) and t.shape == declared[name] for name, t in tensors.items()
    )
    return module if fits else None


def _layer(
    target: str, root: nn.Module, tensors: dict[str, str], arguments: dict[str, Any], rank: int
) -> tuple[nn.Module, dict[str, str]] | None:
    names = {k: v for k, v in tensors.items() if k in {"weight", "bias"}}
    if target in _CONVOLUTIONS or target in _TRANSPOSED:
        if "weight" not in names:
            return None
        return _convolution(target, root, names, arguments), names
    if target == "torch.ops.aten.linear.default" and "weight" in names:
        rows, columns = _tensor(root, names["weight"]).shape
        return _on_meta(nn.Linear, columns, rows, bias="bias" in names), names
    if target == "torch.ops.aten.addmm.default" and {"self", "mat2"} <= set(tensors):
        if arguments.get("beta", 1) != 1 or arguments.get("alpha", 1) != 1:
            return None
        names = {"weight": tensors["mat2"], "bias": tensors["self"]}
        columns, rows = _tensor(root, names["weight"]).shape
        if tuple(_tensor(root, names["bias"]).shape) != (rows,):
            return None
        return _on_meta(Conv1D, rows, columns), names
    if target == "torch.ops.aten.embedding.default" and "weight" in names:
        rows, columns = _tensor(root, names["weight"]).shape
        # The padding index only matters for gradients.
        return _on_meta(nn.Embedding, rows, columns), names
    if target == "torch.ops.aten.batch_norm.default":
        return _batch_norm(root, tensors, arguments, rank)
    return None


def _convolution(
    target: str, root: nn.Module, names: dict[str, str], arguments: dict[str, Any]
) -> nn.Module:
    transposed = target in _TRANSPOSED
    kind, dims = (_TRANSPOSED if transposed else _CONVOLUTIONS)[target]
    shape = _tensor(root, names["weight"]).shape
    groups = arguments.get("groups", 1)
    padding = arguments.get("padding", 0)
    settings: dict[str, Any] = {
        "kernel_size": tuple(shape[2:]),
        "stride": _spread(arguments.get("stride", 1), dims),
        "padding": padding if isinstance(padding, str) else _spread(padding, dims),
        "dilation": _spread(arguments.get("dilation", 1), dims),
        "groups": groups,
        "bias": "bias" in names,
    }
    if transposed:
        settings["output_padding"] = _spread(arguments.get("output_padding", 0), dims)
        return _on_meta(kind, shape[0], shape[1] * groups, **settings)
    return _on_meta(kind, shape[1] * groups, shape[0], **settings)


def _batch_norm(
    root: nn.Module, tensors: dict[str, str], arguments: dict[str, Any], rank: int
) -> tuple[nn.Module, dict[str, str]] | None:
    wanted = {"weight", "bias", "running_mean", "running_var"}
    if not {"running_mean", "running_var"} <= set(tensors) or arguments.get("training"):
        return None
    if rank not in _BATCH_NORMS or ("weight" in tensors) != ("bias" in tensors):
        return None
    names = {k: v for k, v in tensors.items() if k in wanted}
    features = _tensor(root, names["running_mean"]).shape[0]
    module = _BATCH_NORMS[rank](
        features,
        eps=arguments.get("eps", 1e-5),
        momentum=arguments.get("momentum", 0.1),
        affine="weight" in names,
    )
    return module, names


def _on_meta(kind: type[nn.Module], *args: object, **settings: object) -> nn.Module:
    # The weights are replaced at once: do not fill them with random numbers.
    with torch.device("meta"):
        return kind(*args, **settings)


def _module_path(weight: str) -> str:
    owner, _, attribute = weight.rpartition(".")
    if attribute in {"weight", "running_mean"}:
        return owner or "layer"
    # 'attn.in_proj_weight' becomes the weight of 'attn.in_proj'.
    name = attribute.removesuffix("weight").rstrip("_") or attribute
    return f"{owner}.{name}_layer" if name == attribute and owner else f"{owner}.{name}".strip(".")


def _keep_the_rest(place: nn.Module, module: nn.Module, names: dict[str, str], path: str) -> None:
    used = {name.removeprefix(path + ".") for name in names.values()}
    for name, parameter in place._parameters.items():  # noqa: SLF001
        if name not in used and name not in module._parameters:  # noqa: SLF001
            module.register_parameter(name, parameter)
    for name, buffer in place._buffers.items():  # noqa: SLF001
        if name not in used:
            module.register_buffer(name, buffer)
    for name, child in place._modules.items():  # noqa: SLF001
        module.add_module(name, child)


def _same(there: nn.Module, built: nn.Module, root: nn.Module, names: dict[str, str]) -> bool:
    if type(there) is not type(built) or there.extra_repr() != built.extra_repr():
        return False
    for attribute in ("weight", "bias"):
        have = getattr(there, attribute, None)
        want = _tensor(root, names[attribute]) if attribute in names else None
        if have is not want:
            return False
    return True


def _is_tensor(root: nn.Module, path: str) -> bool:
    parent, _, last = path.rpartition(".")
    owner = _child(root, parent) if parent else root
    return owner is not None and (last in owner._parameters or last in owner._buffers)  # noqa: SLF001


def _child(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _tensor(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(root.get_submodule(owner) if owner else root, attribute)
    assert isinstance(tensor, Tensor)  # noqa: S101  # registered by the builder
    return tensor


def _spread(value: int | list[int] | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (int, float, bool, str))
