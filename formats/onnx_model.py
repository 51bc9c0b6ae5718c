"""ONNX files as modules: run by ONNX Runtime, weights replaceable, layers named by their nodes.

The graph stays what it is and torch never interprets it. Every weight that counts becomes an
input of the session (an initializer may be overridden by an input of its name), so that a changed
parameter is seen by the next forward pass without building a session anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitquota.candidates import LayerKind
from bitquota.errors import InvalidModel, MeasurementFailed, MissingDependency, UnsafeModel
from bitquota.formats.layer_calls import Conv1D
from bitquota.formats.models import LoadedModel, finish

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAX_OPSET = 25
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_QUANTIZED = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "MatMulNBits", "QLinearConv", "QLinearMatMul",
     "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "GatherBlockQuantized"}
)  # fmt: skip
_FLOATS: dict[int, Any] = {1: np.float32, 10: np.float16, 11: np.float64}
_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {
    3: nn.ConvTranspose1d,
    4: nn.ConvTranspose2d,
    5: nn.ConvTranspose3d,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxLayer:
    """Where one quantizable weight stands in an ONNX graph.

    Attributes:
        name: Name of the layer: the initializer without ``.weight``, or the node's.
        kind: What the node does with it.
        initializer: The weight.
        nodes: Names (or output names) of all nodes that use it, in graph order.
        groups: Of a convolution.
    """

    name: str
    kind: LayerKind
    initializer: str
    nodes: tuple[str, ...]
    groups: int = 1


class _Session:
    """An ONNX Runtime session that copies of a module share."""

    def __init__(self, model: bytes) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as err:  # onnxruntime raises its own kinds
            msg = f"ONNX Runtime must be able to run the model; it says: {_first_line(err)}"
            raise InvalidModel(msg) from err

    def __deepcopy__(self, memo: dict[int, Any]) -> _Session:
        """Sessions hold no state between runs, so copies share one."""
        return self


class OnnxModule(nn.Module):
    """An ONNX graph with its weights as parameters of (never called) layer modules.

    Attributes:
        layers: Where each quantizable weight stands.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnx

        proto = read_onnx(path)
        self.layers = find_layers(proto)
        self._fixed_batch: int | None = None
        initializers = {t.name: t for t in proto.graph.initializer}
        given = [v for v in proto.graph.input if v.name not in initializers]
        self._inputs = [(v.name, _numpy_type(v, path)) for v in given]
        self._find_batch(given)
        outputs = [v.name for v in proto.graph.output]
        self._output = "logits" if "logits" in outputs else outputs[0]
        self._weights: list[tuple[str, str, Any]] = []
        declared = {v.name for v in proto.graph.input}
        for layer in self.layers:
            tensor = initializers[layer.initializer]
            array = onnx.numpy_helper.to_array(tensor)
            name = self._add_layer(layer, array)
            self._weights.append((layer.initializer, name, _FLOATS[tensor.data_type]))
            if layer.initializer not in declared:
                proto.graph.input.append(
                    onnx.helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, list(tensor.dims)
                    )
                )
        counted = {layer.initializer for layer in self.layers}
        for name, tensor in initializers.items():
            if name not in counted:
                _register(self, name, torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()))
        del proto.graph.output[:]
        proto.graph.output.append(
            next(v for v in read_onnx(path).graph.output if v.name == self._output)
        )
        try:
            self._session = _Session(proto.SerializeToString())
        except ValueError as err:
            if isinstance(err, InvalidModel):
                raise
            msg = f"an ONNX model must be below 2 GiB; '{path.name}' is not: {err}"
            raise InvalidModel(msg) from err

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the graph on ``inputs`` (in graph order) with the parameters as they are now."""
        self._refuse_hooks()
        if len(inputs) != len(self._inputs):
            names = ", ".join(name for name, _ in self._inputs)
            msg = f"the model takes {len(self._inputs)} inputs ({names}); got {len(inputs)}"
            raise ValueError(msg)
        feed = {name: self._weight(path, dtype) for name, path, dtype in self._weights}
        arrays = [
            np.ascontiguousarray(tensor.detach().cpu().numpy().astype(dtype, copy=False))
            for tensor, (_, dtype) in zip(inputs, self._inputs, strict=True)
        ]
        if self._fixed_batch is None:
            result = self._run(feed, arrays)
        else:
            result = self._run_in_pieces(feed, arrays, self._fixed_batch)
        return torch.from_numpy(result.astype(np.float32, copy=False)).to(inputs[0].device)

    def example_inputs(self, path: Path) -> tuple[Tensor, ...] | None:
        """Return zeros for two samples, if the file fixes every dimension but the first."""
        initializers = {t.name for t in read_onnx(path).graph.initializer}
        tensors = []
        for value in read_onnx(path).graph.input:
            if value.name in initializers:
                continue
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            if not dims or 0 in dims[1:]:
                return None
            dtype = torch.from_numpy(np.zeros(1, _numpy_type(value, path))).dtype
            dtype = torch.float32 if dtype.is_floating_point else torch.int64
            tensors.append(torch.zeros(2, *dims[1:], dtype=dtype))
        return tuple(tensors)

    def _weight(self, path: str, dtype: Any) -> NDArray[Any]:  # noqa: ANN401  # a numpy type
        owner, _, leaf = path.rpartition(".")
        data: Tensor = getattr(self.get_submodule(owner), leaf)
        return np.ascontiguousarray(data.detach().cpu().numpy().astype(dtype, copy=False))

    def _run(self, weights: dict[str, NDArray[Any]], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        feed = weights | {name: a for (name, _), a in zip(self._inputs, arrays, strict=True)}
        try:
            (result,) = self._session.session.run([self._output], feed)
        except Exception as err:  # onnxruntime raises its own kinds
            raise ValueError(_first_line(err)) from err
        if not isinstance(result, np.ndarray):
            msg = f"the model must return a tensor; '{self._output}' is none"
            raise TypeError(msg)
        return result

    def _run_in_pieces(
        self, weights: dict[str, NDArray[Any]], arrays: list[NDArray[Any]], batch: int
    ) -> NDArray[Any]:
        """Run a graph that was exported for one batch size; the last piece is padded."""
        n = len(arrays[0])
        pieces = []
        for start in range(0, n, batch):
            rows = [min(start + k, n - 1) for k in range(batch)]
            pieces.append(self._run(weights, [array[rows] for array in arrays]))
        return np.concatenate(pieces)[:n]

    def _find_batch(self, given: list[Any]) -> None:
        sizes = {
            v.type.tensor_type.shape.dim[0].dim_value for v in given if v.type.tensor_type.shape.dim
        } - {0}
        if len(sizes) == 1:
            self._fixed_batch = sizes.pop()

    def _refuse_hooks(self) -> None:
        """Layers here are never called, so a hook on one would silently do nothing."""
        for name, module in self.named_modules():
            if module is not self and (module._forward_pre_hooks or module._forward_hooks):  # noqa: SLF001
                msg = (
                    f"an ONNX model runs as a whole in ONNX Runtime: inputs and outputs of layer "
                    f"'{name}' cannot be quantized or corrected; leave out activation bits and "
                    "corrections, or hand in the model as .pt2"
                )
                raise MeasurementFailed(msg, layer=name)

    def _add_layer(self, layer: OnnxLayer, array: NDArray[Any]) -> str:
        module = _layer_module(layer, array)
        parameter = nn.Parameter(torch.from_numpy(array.astype(np.float32)))
        module.weight = parameter
        *parents, last = layer.name.split(".")
        owner: nn.Module = self
        for part in parents:
            if part not in owner._modules:  # noqa: SLF001
                owner.add_module(part, nn.Module())
            child = owner._modules[part]  # noqa: SLF001
            assert child is not None  # noqa: S101  # added above
            owner = child
        for name, child in getattr(owner._modules.get(last), "_modules", {}).items():  # noqa: SLF001
            module.add_module(name, child)
        owner.add_module(last, module)
        return f"{layer.name}.weight"


def load_onnx(path: Path) -> LoadedModel:
    """Load an ONNX file to be measured in ONNX Runtime.

    Raises:
        InvalidModel: Unreadable, above opset 25, already quantized, without quantizable weights,
            or ONNX Runtime cannot run it.
        UnsafeModel: Operators of unknown domains.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    import_onnxruntime()
    module = OnnxModule(path)
    halves = [d for _, _, d in module._weights if d is np.float16]  # noqa: SLF001  # our own
    return finish(
        module,
        source=str(path),
        architecture="ONNX graph",
        example_inputs=module.example_inputs(path),
        weight_format_bits=16 if 2 * len(halves) > len(module.layers) else 32,
    )


def read_onnx(path: Path) -> Any:  # noqa: ANN401  # onnx.ModelProto
    """Return the checked ``onnx.ModelProto`` of ``path``, external data included.

    Raises:
        InvalidModel: Not an ONNX file, truncated, or above opset 25.
        UnsafeModel: Operators of unknown domains, or external data outside the file's folder.
        MissingDependency: onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as err:
        msg = "an ONNX model needs onnx; install it with: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    try:
        model = onnx.load(str(path))
    except onnx.checker.ValidationError as err:
        msg = f"external data of '{path.name}' must lie in its own folder: {_first_line(err)}"
        raise UnsafeModel(msg) from err
    except (DecodeError, OSError, ValueError, RuntimeError) as err:
        msg = (
            f"an ONNX model must be a whole file; '{path.name}' cannot be read: {_first_line(err)}"
        )
        raise InvalidModel(msg, source=str(path)) from err
    opsets = {o.domain: o.version for o in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not model.graph.node or not 1 <= opset <= MAX_OPSET:
        msg = (
            f"an ONNX model must have nodes and an opset from 1 to {MAX_OPSET}; '{path.name}' has "
            f"{len(model.graph.node)} nodes and opset {opset}"
        )
        raise InvalidModel(msg, opset=opset)
    foreign = sorted({n.domain for n in model.graph.node} - _DOMAINS)
    local = {f.domain for f in model.functions}
    if foreign := [domain for domain in foreign if domain not in local]:
        msg = f"an ONNX model must use standard operators; '{path.name}' uses domain '{foreign[0]}'"
        raise UnsafeModel(msg, domains=foreign)
    return model


def find_layers(model: Any) -> tuple[OnnxLayer, ...]:  # noqa: ANN401  # onnx.ModelProto
    """Return the quantizable weights of a graph: Conv, ConvTranspose, Gemm, MatMul, Gather.

    Raises:
        InvalidModel: The graph is already quantized, or has none.
    """
    import onnx

    graph = model.graph
    if quantized := sorted({n.op_type for n in graph.node} & _QUANTIZED):
        msg = (
            f"a model must be in floating point to be measured; this one has {quantized[0]} nodes: "
            "hand in the model from before quantization"
        )
        raise InvalidModel(msg, operators=quantized)
    floats = {t.name: t for t in graph.initializer if t.data_type in _FLOATS}
    transposed: dict[str, str] = {}
    found: dict[str, tuple[LayerKind, list[str], int]] = {}
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Identity", "Transpose") and node.input[0] in floats:
            source = floats[node.input[0]]
            swaps = node.op_type == "Transpose" and len(source.dims) == 2
            if swaps and list(attributes.get("perm", [1, 0])) == [1, 0]:
                transposed[node.output[0]] = node.input[0]
            continue
        place = _weight_place(node, attributes, floats, transposed)
        if place is None:
            continue
        kind, initializer = place
        label = node.name or node.output[0]
        known = found.setdefault(initializer, (kind, [], int(attributes.get("group", 1))))
        known[1].append(label)
    if not found:
        msg = (
            "an ONNX model must have Conv, ConvTranspose, Gemm, MatMul or Gather nodes with "
            "constant weights; found none"
        )
        raise InvalidModel(msg)
    taken: set[str] = set()
    layers = []
    for initializer, (kind, nodes, groups) in found.items():
        name = _layer_name(initializer, nodes[0], taken)
        taken.add(name)
        layers.append(
            OnnxLayer(
                name=name, kind=kind, initializer=initializer, nodes=tuple(nodes), groups=groups
            )
        )
    return tuple(layers)


def _weight_place(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    attributes: dict[str, Any],
    floats: dict[str, Any],
    transposed: dict[str, str],
) -> tuple[LayerKind, str] | None:
    inputs = list(node.input)
    if node.op_type in ("Conv", "ConvTranspose") and len(inputs) > 1 and inputs[1] in floats:
        rank = len(floats[inputs[1]].dims)
        if rank not in _CONVOLUTIONS:
            return None
        prefix = "conv" if node.op_type == "Conv" else "conv_transpose"
        return LayerKind(f"{prefix}{rank - 2}d"), inputs[1]
    if node.op_type in ("Gemm", "MatMul"):
        for place in (1, 0):
            name = inputs[place]
            # A weight on the right is [in, out] unless it is transposed on the way.
            swapped = name in transposed
            name = transposed.get(name, name)
            if name not in floats or len(floats[name].dims) != 2:
                continue
            swapped ^= bool(attributes.get("transB" if place else "transA", 0))
            outputs_first = swapped if place else not swapped
            return LayerKind.LINEAR if outputs_first else LayerKind.LINEAR_TRANSPOSED, name
    if node.op_type == "Gather" and inputs[0] in floats:
        dims = floats[inputs[0]].dims
        if len(dims) == 2 and attributes.get("axis", 0) == 0:
            return LayerKind.EMBEDDING, inputs[0]
    return None


def _layer_name(initializer: str, node: str, taken: set[str]) -> str:
    """Name a layer after its parameter where that has a name, else after its node."""
    name = initializer.removesuffix(".weight") if initializer.endswith(".weight") else node
    parts = [part for part in name.split(".") if part]
    name = ".".join(parts) or "layer"
    unique, k = name, 1
    while unique in taken:
        k += 1
        unique = f"{name}_{k}"
    return unique


def _layer_module(layer: OnnxLayer, array: NDArray[Any]) -> nn.Module:
    shape = array.shape
    with torch.device("meta"):
        if layer.kind in (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D):
            kind: Any = _CONVOLUTIONS[array.ndim]
            groups = layer.groups
            return kind(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=False)  # type: ignore[no-any-return]
        if layer.kind.startswith("conv_transpose"):
            kind = _TRANSPOSED[array.ndim]
            groups = layer.groups
            return kind(shape[0], shape[1] * groups, shape[2:], groups=groups, bias=False)  # type: ignore[no-any-return]
        if layer.kind is LayerKind.EMBEDDING:
            return nn.Embedding(shape[0], shape[1])
        if layer.kind is LayerKind.LINEAR:
            return nn.Linear(shape[1], shape[0], bias=False)
    module = Conv1D(shape[1], shape[0])
    # The bias of an ONNX graph is an Add of its own.
    module.register_parameter("bias", None)
    return module


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, last = [part for part in name.split(".") if part] or ["constant"]
    owner = root
    for part in parents:
        if part in owner._parameters or part in owner._buffers:  # noqa: SLF001
            break
        if part not in owner._modules:  # noqa: SLF001
            owner.add_module(part, nn.Module())
        child = owner._modules[part]  # noqa: SLF001
        assert child is not None  # noqa: S101  # added above
        owner = child
    while last in owner._parameters or last in owner._modules or hasattr(owner, last):  # noqa: SLF001
        # A layer registers "bias" as absent: a graph's own bias takes that place.
        if owner._parameters.get(last, tensor) is None:  # noqa: SLF001
            del owner._parameters[last]  # noqa: SLF001
            break
        last += "_"
    owner.register_buffer(last, tensor)


def _numpy_type(value: Any, path: Path) -> np.dtype[Any]:  # noqa: ANN401  # onnx.ValueInfoProto
    import onnx

    kind = value.type.tensor_type.elem_type
    if kind in (0, onnx.TensorProto.STRING):
        msg = f"inputs of '{path.name}' must be numeric tensors; '{value.name}' is not"
        raise InvalidModel(msg, input=value.name)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def import_onnxruntime() -> Any:  # noqa: ANN401  # a module
    """Return the onnxruntime module.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as err:
        msg = "an ONNX model needs onnxruntime; install it with: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    return onnxruntime


def _first_line(err: BaseException) -> str:
    text = str(err).strip()
    return text.splitlines()[0] if text else type(err).__name__
