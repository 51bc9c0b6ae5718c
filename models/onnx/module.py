"""ONNX files as modules: run by ONNX Runtime, weights replaceable, layers named by their nodes.

The graph stays what it is and torch never interprets it. Every weight that counts becomes an
input of the session (an initializer may be overridden by an input of its name), so that a changed
parameter is seen by the next forward pass without building a session anew.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitquota.candidates.layers import LayerKind
from bitquota.errors import (
    BitquotaError,
    InvalidModel,
    MeasurementFailed,
)
from bitquota.models.identity import Computation
from bitquota.models.layer_calls import MatrixOfOperator
from bitquota.models.loaded import LoadedModel, finish
from bitquota.models.onnx.identity import graph_digest
from bitquota.models.onnx.layer_modules import add_buffer, add_layer
from bitquota.models.onnx.layers import FLOATS, FedTensor, find_layers, readers, reason_of
from bitquota.models.onnx.program import OnnxSource, as_array, padded
from bitquota.models.onnx.reading import normalized, read_onnx
from bitquota.models.onnx.sessions import first_line, import_onnxruntime, make_session
from bitquota.models.onnx.shifts import added_of, scales_of, shift_of, statistics_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.models.onnx.layers import OnnxLayer


class _Sessions:
    """The ONNX Runtime sessions of one graph; copies of a module share them.

    A session holds no state between runs: all weights that count are inputs.
    """

    def __init__(self, model: Any, observed: tuple[str, ...]) -> None:  # noqa: ANN401
        self.model = model
        self.observed = observed
        self.plain = make_session(model)
        self._watched: Any = None

    @property
    def watched(self) -> Any:  # noqa: ANN401  # onnxruntime.InferenceSession
        """A session that also returns what the layers take and give; built when first asked."""
        if self._watched is None:
            import onnx

            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            names = {v.name for v in model.graph.output}
            for name in self.observed:
                if name not in names:
                    model.graph.output.append(onnx.ValueInfoProto(name=name))
            self._watched = make_session(model)
        return self._watched

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sessions:
        """Return the same object."""
        return self


class OnnxModule(nn.Module):
    """An ONNX graph, run whole; its layers hold weights and biases but compute nothing.

    Forward hooks on layers are served with the tensors of the graph (for counting, or for
    collecting inputs and outputs). What would change a layer's input or output is refused.

    Attributes:
        onnx_layers: Where each quantizable weight stands.
        reasons: Why other tensors are no layers, by their names in the module.
        onnx_source: The graph, as the ONNX Runtime runner takes it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        proto = read_onnx(path)
        self._computation = Computation(digest=graph_digest(proto), has_weights=True)
        graph = normalized(proto)
        proto, self.stored = graph.model, graph.stored
        found = find_layers(proto, graph.matrices)
        initializers = {t.name: t for t in proto.graph.initializer}
        given = [v for v in proto.graph.input if v.name not in initializers]
        self._inputs = [(v.name, _numpy_type(v, path)) for v in given]
        self._fixed_batch = _fixed_batch(given)
        self._example = _example(given, [dtype for _, dtype in self._inputs])
        outputs = [v.name for v in proto.graph.output]
        self._output = "logits" if "logits" in outputs else outputs[0]
        nodes = {n.name: n for n in proto.graph.node}
        used = readers(proto.graph)

        # Layers hold the weights, under names that are free in a module.
        self._calls: list[tuple[str, str, str]] = []
        self.reasons: dict[str, str] = {}
        fed: dict[str, str] = {}
        self.onnx_layers = tuple(
            self._place_layer(item, nodes, initializers, fed) for item in found
        )
        # Statistics of batch norms may be estimated anew: they are inputs like weights.
        # So are what is added behind layers, which corrections move, and scales of norms.
        movable = (
            statistics_of(proto, initializers)
            | added_of(self.onnx_layers, nodes, used, initializers)
            | scales_of(proto.graph, used, initializers)
        )
        places = self._place_constants(initializers, fed, used)
        fed |= {name: where for name, where in places.items() if name in movable}
        self._weights = [(k, v, FLOATS[initializers[k].data_type]) for k, v in fed.items()]

        # What the module holds becomes an input of the graph, which returns one value.
        _make_inputs(proto.graph, [initializers[name] for name in fed])
        _return_only(proto.graph, self._output)
        self._sessions = _Sessions(proto, self._hook_values())
        self.onnx_source = OnnxSource(
            model=proto,
            inputs=tuple(self._inputs),
            output=self._output,
            outputs=tuple(outputs),
            fixed_batch=self._fixed_batch,
            fed=tuple(FedTensor(name=k, path=v, dtype=d) for k, v, d in self._weights),
            shifts={
                layer.name: shift
                for layer in self.onnx_layers
                if (shift := shift_of(layer, nodes, used, fed, {self._output})) is not None
            },
        )

    def _place_layer(
        self,
        item: OnnxLayer,
        nodes: dict[str, Any],
        initializers: dict[str, Any],
        fed: dict[str, str],
    ) -> OnnxLayer:
        """Add the module of a layer with its weight, its bias and the values that hooks get.

        Args:
            item: The layer, under the name that it would like.
            nodes: Of the graph, by name.
            initializers: Of the graph, by name.
            fed: Where the module holds which initializer; weight and bias are added to it.

        Returns:
            The layer under the name that it got.
        """
        import onnx

        users = [nodes[name] for name in item.nodes]
        biases = {_bias(node, initializers) for node in users}
        bias = biases.pop() if len(biases) == 1 else None
        bias = None if bias in fed else bias
        array = onnx.numpy_helper.to_array(initializers[item.initializer])
        values = None if bias is None else onnx.numpy_helper.to_array(initializers[bias])
        layer = replace(item, name=add_layer(self, item, array, values))
        fed[layer.initializer] = f"{layer.name}.weight"
        if bias is not None:
            fed[bias] = f"{layer.name}.bias"
        for node, data in zip(users, layer.inputs, strict=True):
            made = data if layer.kind is LayerKind.RECURRENT else node.output[0]
            self._calls.append((layer.name, data, made))
        return layer

    def _place_constants(
        self, initializers: dict[str, Any], fed: dict[str, str], used: dict[str, list[Any]]
    ) -> dict[str, str]:
        """Add every initializer that is not in ``fed`` as a buffer; return where each is."""
        places = {name: add_buffer(self, t) for name, t in initializers.items() if name not in fed}
        for name, where in places.items():
            self.reasons[where] = reason_of(name, used.get(name, []))
        return places

    def _hook_values(self) -> tuple[str, ...]:
        """Return the values that layers take and give, the inputs of the graph left out."""
        inputs = {name for name, _ in self._inputs}
        names = (name for _, given, made in self._calls for name in (given, made))
        return tuple(dict.fromkeys(name for name in names if name not in inputs))

    def end_in(self, source: OnnxSource) -> None:
        """Return another value of the same graph from now on; see ``models.onnx.outputs``."""
        self._output, self.onnx_source = source.output, source
        self._sessions = _Sessions(source.model, self._sessions.observed)

    def computation(self) -> Computation:
        """Return what the file computes, with the weights that it was loaded with."""
        return self._computation

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the graph on ``inputs`` (in graph order) with the parameters as they are now.

        Raises:
            MeasurementFailed: A hook wants to change a layer's input or output.
            ValueError: ONNX Runtime does not take the inputs.
        """
        if len(inputs) != len(self._inputs):
            names = ", ".join(name for name, _ in self._inputs)
            msg = f"the model takes {len(self._inputs)} inputs ({names}); got {len(inputs)}"
            raise ValueError(msg)
        weights = {name: self._weight(path, dtype) for name, path, dtype in self._weights}
        arrays = [
            as_array(tensor, dtype) for tensor, (_, dtype) in zip(inputs, self._inputs, strict=True)
        ]
        batch = len(arrays[0]) if self._fixed_batch is None else self._fixed_batch
        pieces = []
        for start in range(0, len(arrays[0]), max(batch, 1)):
            # The last piece of a graph with a fixed batch is padded with its last sample.
            rows = slice(start, start + batch)
            pieces.append(self._run(weights, [padded(a[rows], batch) for a in arrays]))
        result = np.concatenate(pieces)[: len(arrays[0])] if len(pieces) > 1 else pieces[0]
        if self._fixed_batch is not None:
            result = result[: len(arrays[0])]
        return torch.from_numpy(result.astype(np.float32, copy=False)).to(inputs[0].device)

    def _run(self, weights: dict[str, NDArray[Any]], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        feed = weights | {name: a for (name, _), a in zip(self._inputs, arrays, strict=True)}
        watched = self._hooked()
        session = self._sessions.watched if watched else self._sessions.plain
        wanted = [self._output, *(self._sessions.observed if watched else ())]
        try:
            results = dict(zip(wanted, session.run(wanted, feed), strict=True))
        except Exception as err:  # onnxruntime raises its own kinds
            raise ValueError(first_line(err)) from err
        if watched:
            self._serve_hooks(watched, feed | results)
        result = results[self._output]
        if not isinstance(result, np.ndarray):
            msg = f"the model must return a tensor; '{self._output}' is none"
            raise TypeError(msg)
        return result

    def _hooked(self) -> frozenset[str]:
        names = set()
        for layer in self.onnx_layers:
            module = self.get_submodule(layer.name)
            if module._forward_pre_hooks:  # noqa: SLF001  # there is no public way to ask
                raise _cannot_change(layer.name)
            if module._forward_hooks:  # noqa: SLF001
                names.add(layer.name)
        return frozenset(names)

    def _serve_hooks(self, watched: frozenset[str], values: dict[str, NDArray[Any]]) -> None:
        for name, given, made in self._calls:
            if name not in watched:
                continue
            module = self.get_submodule(name)
            taken, result = torch.from_numpy(values[given]), torch.from_numpy(values[made])
            if isinstance(module, MatrixOfOperator) and module.kind is LayerKind.RECURRENT:
                # What a gate takes and gives at each step is not seen: only how much it is.
                steps = math.prod(taken.shape[:2])
                taken = torch.zeros(1).expand(steps, module.in_features)
                result = torch.zeros(1).expand(steps, module.out_features)
            # Calling the module runs its hooks; what it would compute, the graph has computed.
            module.forward = lambda *_, result=result: result
            try:
                returned = module(taken)
            finally:
                del module.forward
            if returned is not result:
                raise _cannot_change(name)

    def fed_value(self, initializer: str) -> NDArray[Any] | None:
        """Return the current value of an initializer that is a layer's weight or bias."""
        for name, path, dtype in self._weights:
            if name == initializer:
                return self._weight(path, dtype)
        return None

    def example_inputs(self) -> tuple[Tensor, ...] | None:
        """Return zeros for two samples, if the file fixes every dimension but the first."""
        return self._example

    def stored_bits(self) -> int:
        """Return the bits per weight that the file stores most layers' weights in: 16 or 32."""
        types = {k: d for k, _, d in self._weights}
        halves = 0
        for layer in self.onnx_layers:
            kept = self.stored.get(layer.initializer)
            half = types[layer.initializer] is np.float16 if kept is None else kept.is_half
            halves += half
        return 16 if 2 * halves > len(self.onnx_layers) else 32

    def _weight(self, path: str, dtype: Any) -> NDArray[Any]:  # noqa: ANN401  # a numpy type
        owner, _, leaf = path.rpartition(".")
        data: Tensor = getattr(self.get_submodule(owner), leaf)
        return as_array(data, dtype)


def _cannot_change(layer: str) -> MeasurementFailed:
    msg = (
        f"an ONNX model runs as a whole in ONNX Runtime, so the input and output of layer "
        f"'{layer}' cannot be changed: leave out activation bits, or provide the model as .pt2"
    )
    return MeasurementFailed(msg, layer=layer)


def _fixed_batch(given: list[Any]) -> int | None:
    """Return the batch size that a graph was exported for, or ``None`` if any will do.

    Some exporters write -1 where any size will do.
    """
    shapes = [v.type.tensor_type.shape.dim for v in given]
    sizes = {dims[0].dim_value for dims in shapes if dims and dims[0].dim_value > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _example(given: list[Any], dtypes: list[Any]) -> tuple[Tensor, ...] | None:
    tensors = []
    for value, kind in zip(given, dtypes, strict=True):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if not dims or min(dims[1:], default=1) < 1:
            return None
        floating = torch.from_numpy(np.zeros(1, kind)).dtype.is_floating_point
        dtype = torch.float32 if floating else torch.int64
        tensors.append(torch.zeros(2, *dims[1:], dtype=dtype))
    return tuple(tensors)


def _make_inputs(graph: Any, tensors: list[Any]) -> None:  # noqa: ANN401  # onnx.GraphProto
    """Make inputs of the initializers ``tensors``, whose values the graph then no longer holds."""
    import onnx

    declared = {v.name for v in graph.input}
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in tensors
        if t.name not in declared
    )
    names = {t.name for t in tensors}
    kept = [t for t in graph.initializer if t.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _return_only(graph: Any, name: str) -> None:  # noqa: ANN401  # onnx.GraphProto
    kept = [v for v in graph.output if v.name == name]
    del graph.output[:]
    graph.output.extend(kept)


def _bias(node: Any, initializers: dict[str, Any]) -> str | None:  # noqa: ANN401  # onnx.NodeProto
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3:
        return None
    tensor = initializers.get(node.input[2])
    plain = tensor is not None and len(tensor.dims) == 1 and tensor.data_type in FLOATS
    return node.input[2] if plain else None


def load_onnx(path: Path) -> LoadedModel:
    """Load an ONNX file to be measured in ONNX Runtime.

    Raises:
        InvalidModel: Unreadable or inconsistent, above opset 25, already quantized, without
            quantizable weights, or ONNX Runtime cannot run it.
        UnsafeModel: Operators of unknown domains, or data in other files of other folders.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    import_onnxruntime()
    try:
        return _load(path)
    except BitquotaError:
        raise
    except Exception as err:  # whatever the readers of a stranger's bytes raise
        msg = (
            f"the graph of an ONNX model must be consistent; reading '{path.name}' failed: "
            f"{type(err).__name__}: {first_line(err):.300}"
        )
        raise InvalidModel(msg, source=str(path)) from err


def _load(path: Path) -> LoadedModel:
    module = OnnxModule(path)
    bits = module.stored_bits()
    return finish(
        module,
        source=str(path),
        architecture="ONNX graph",
        example_inputs=module.example_inputs(),
        weight_format_bits=bits,
    )


def _numpy_type(value: Any, path: Path) -> np.dtype[Any]:  # noqa: ANN401  # onnx.ValueInfoProto
    import onnx

    kind = value.type.tensor_type.elem_type
    if kind in (0, onnx.TensorProto.STRING):
        msg = f"inputs of '{path.name}' must be numeric tensors; '{value.name}' is not"
        raise InvalidModel(msg, input=value.name)
    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    return dtype
