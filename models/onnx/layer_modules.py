"""Torch modules and buffers for the tensors of an ONNX graph, under names that are free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitquota.candidates.layers import LayerKind
from bitquota.models.layer_calls import Conv1D, MatrixOfOperator
from bitquota.models.onnx.layers import CONVOLUTIONS, TRANSPOSED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.models.onnx.layers import OnnxLayer

_RESERVED = frozenset(
    {"onnx_source", "onnx_layers", "_weights", "_sessions", "output_name", "is_transposed", "nf"}
)
"""Attributes that a module gets later, or that others ask of any module."""


def add_layer(
    root: nn.Module, layer: OnnxLayer, array: NDArray[Any], bias: NDArray[Any] | None
) -> str:
    """Add the module of a layer at its name, or as near to it as is free; return the name.

    Args:
        root: Module of the whole graph.
        layer: Where the weight stands.
        array: The weight, ``[out, in, ...]`` or as the graph stores it.
        bias: ``[out]``, if the layer has one of its own.
    """
    module = _layer_module(layer, array)
    module.weight = nn.Parameter(torch.from_numpy(array.astype(np.float32)))
    if bias is not None:
        module.bias = nn.Parameter(torch.from_numpy(bias.astype(np.float32)))
    *parents, last = layer.name.split(".")
    owner, path = root, []
    for part in parents:
        owner, name = _part(owner, part)
        path.append(name)
    there = owner._modules.get(last)  # noqa: SLF001
    inner = {} if there is None else dict(there._modules)  # noqa: SLF001
    # A place that only holds other layers becomes this layer and keeps them.
    while (
        (there is not None and type(there) is not nn.Module)
        or (there is None and _is_taken(owner, last))
        or any(_is_taken(module, name) for name in inner)
    ):
        last += "_"
        there, inner = owner._modules.get(last), {}  # noqa: SLF001
    for name, child in inner.items():
        module.add_module(name, child)
    owner.add_module(last, module)
    return ".".join([*path, last])


def add_buffer(root: nn.Module, tensor: Any) -> str:  # noqa: ANN401  # onnx.TensorProto
    """Add a constant at its name, or as near to it as there is room; return where it is."""
    values = _values(tensor)
    *parents, last = [part for part in tensor.name.split(".") if part] or ["constant"]
    owner, path = root, []
    for part in parents:
        owner, found = _part(owner, part)
        path.append(found)
    while _is_taken(owner, last):
        # A layer registers "bias" as absent: a graph's own bias takes that place.
        if owner._parameters.get(last, values) is None:  # noqa: SLF001
            del owner._parameters[last]  # noqa: SLF001
            break
        last += "_"
    owner.register_buffer(last, values)
    return ".".join([*path, last])


def _layer_module(layer: OnnxLayer, array: NDArray[Any]) -> nn.Module:
    shape = array.shape
    with torch.device("meta"):
        if layer.kind in (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D):
            kind: Any = CONVOLUTIONS[array.ndim]
            groups = layer.groups
            return kind(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=False)  # type: ignore[no-any-return]
        if layer.kind.startswith("conv_transpose"):
            kind = TRANSPOSED[array.ndim]
            groups = layer.groups
            return kind(shape[0], shape[1] * groups, shape[2:], groups=groups, bias=False)  # type: ignore[no-any-return]
        if layer.kind is LayerKind.EMBEDDING:
            return nn.Embedding(shape[0], shape[1])
        if layer.kind in (LayerKind.RECURRENT, LayerKind.CONTRACTION):
            return MatrixOfOperator(layer.kind, shape[1], shape[0])
        if layer.kind is LayerKind.LINEAR:
            return nn.Linear(shape[1], shape[0], bias=False)
    module = Conv1D(shape[1], shape[0])
    # The bias of an ONNX graph is an Add of its own.
    module.register_parameter("bias", None)
    return module


def _part(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the child of ``owner`` called ``name``, made if need be, and what it is called.

    A name that a module uses for itself, such as ``train`` or ``weight``, gets a ``_`` behind it.
    """
    while name not in owner._modules and _is_taken(owner, name):  # noqa: SLF001
        name += "_"
    if name not in owner._modules:  # noqa: SLF001
        owner.add_module(name, nn.Module())
    child = owner._modules[name]  # noqa: SLF001
    assert child is not None  # noqa: S101  # added above
    return child, name


def _is_taken(owner: nn.Module, name: str) -> bool:
    return name in _RESERVED or hasattr(owner, name)


def _values(tensor: Any) -> Tensor:  # noqa: ANN401  # onnx.TensorProto
    """Return a tensor's values; what torch has no type for becomes bytes, so that it is counted."""
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype == object:
        array = np.frombuffer(b"".join(map(bytes, tensor.string_data)), np.uint8)
    elif array.dtype.kind not in "fiub":
        # Types of ml_dtypes: below eight bits several values share a byte.
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        narrow = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(name, bits)
        array = np.zeros(-(-array.size * narrow // 8), np.uint8)
        data = np.frombuffer(tensor.raw_data, np.uint8)
        array[: len(data)] = data[: len(array)]
    return torch.from_numpy(array.copy())
