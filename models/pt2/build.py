"""Rebuild a vetted ``.pt2`` graph as a module with ordinary layers.

The exported graph calls ``aten.conv2d`` and the like on bare parameters. Here those calls become
``nn.Conv2d``, ``nn.Linear``, ``nn.Embedding``, ``nn.BatchNorm2d`` … again, under the names that
their parameters have, so that the rest of Bitquota sees a ``.pt2`` as it sees any module.
Everything else stays a call of its operator.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bitquota.errors import BitquotaError, InvalidModel, UnsafeModel
from bitquota.models.layer_calls import RECURRENT, module_for_call, recurrent_for_call
from bitquota.models.pt2.module import OPERATOR, ExportedModel, GraphInput
from bitquota.models.pt2.operators import (
    FLOAT_WORDS,
    SIZE_OPERATORS,
    VALUE_NAME,
    schema_of,
    split_arguments,
    vet_call,
)
from bitquota.models.pt2.size_arithmetic import size_function
from bitquota.models.pt2.vetting import vet_parameter_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.models.pt2.vetting import Pt2Archive

_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
MAX_COPIES = 4
"""Bytes of tensors per byte of the file: views of one payload are copied, but not without end."""

_NO_VALUE = frozenset({"torch.ops.aten._assert_tensor_metadata.default"})
"""Checks that the exporter inserts; their result is not used."""

_TRAINING = ("training", "train")
"""Arguments of dropout and batch norm that are true in training mode only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pt2Model:
    """A rebuilt graph.

    Attributes:
        module: Takes the user inputs in order, returns one tensor, or a tuple of several.
        parameter_formats: Data type of each parameter as stored.
    """

    module: ExportedModel
    parameter_formats: dict[str, str]


def build_pt2(archive: Pt2Archive) -> Pt2Model:
    """Return the module of a vetted archive, in eval mode.

    Raises:
        InvalidModel: A graph that is inconsistent, returns no tensor, or was exported in training
            mode.
        UnsafeModel: A name or operator outside the allowlists.

    Cost: reads every tensor once.
    """
    try:
        try:
            return _Builder(archive).build()
        except _ReadElsewhere:
            return _Builder(archive, recurrent=False).build()
    except BitquotaError:
        raise
    except Exception as err:  # whatever the readers of a stranger's bytes raise
        msg = (
            f"the graph of '{archive.path.name}' must be consistent; reading it failed: "
            f"{type(err).__name__}: {err!s:.300}"
        )
        raise InvalidModel(msg, path=str(archive.path)) from err


class _ReadElsewhere(Exception):  # a reason to build it otherwise, no error
    """A weight of a recurrent module is also read by another operator."""


class _Builder:
    """Builds one module.

    Attributes:
        recurrent: Whether LSTM, GRU and RNN become modules, whose weights nothing else can read.
    """

    def __init__(self, archive: Pt2Archive, *, recurrent: bool = True) -> None:
        self.archive = archive
        self.recurrent = recurrent
        self.weights_inside: set[str] = set()
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}
        self.ranks: dict[str, int] = {}
        self.parameter_of_value: dict[str, str] = {}
        self.device: fx.Node | None = None

    def build(self) -> Pt2Model:
        formats = self._register_tensors()
        graph_module = self.archive.program["graph_module"]
        signature, graph = graph_module["signature"], graph_module["graph"]
        declared = self._add_inputs(signature["input_specs"], graph["tensor_values"])
        self._add_nodes(graph)
        self.graph.output(self._output(signature["output_specs"]))
        read = {n.target for n in self.graph.nodes if n.op == "get_attr" and n.users}
        if read & self.weights_inside:
            raise _ReadElsewhere
        self.graph.lint()
        module = ExportedModel(self.root, self.graph, declared).eval()
        return Pt2Model(module=module, parameter_formats=formats)

    def _register_tensors(self) -> dict[str, str]:
        files = {}
        for name, data in self.archive.read_payloads():
            files[name] = bytearray(data)  # a writable buffer of its own for torch.frombuffer
        shared: dict[tuple[object, ...], torch.Tensor] = {}
        formats = {}
        # Views of one payload become tensors of their own: many of them would fill the memory.
        room = MAX_COPIES * sum(map(len, files.values()))
        for config in (self.archive.weights, self.archive.constants):
            for name, payload in config.items():
                meta = payload["tensor_meta"]
                layout = [meta["dtype"], *_ints(meta["sizes"]), -1, *_ints(meta["strides"])]
                layout.append(_int(meta["storage_offset"]))
                key = (payload["path_name"], *layout)
                if key not in shared:
                    tensor = _tensor(name, meta, files[payload["path_name"]])
                    room -= tensor.nbytes
                    if room < 0:
                        msg = "the tensors of a .pt2 must not share their bytes over and over"
                        raise UnsafeModel(msg, tensor=name)
                    if tensor.is_floating_point():
                        formats[name] = str(tensor.dtype).removeprefix("torch.")
                        tensor = tensor.float()
                    if payload.get("is_param"):
                        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
                    shared[key] = tensor
                owner, attribute = _owner(self.root, name)
                tensor = shared[key]
                if isinstance(tensor, nn.Parameter):
                    owner.register_parameter(attribute, tensor)
                else:
                    owner.register_buffer(attribute, tensor)
        return formats

    def _add_inputs(self, specs: list[JsonObject], tensors: JsonObject) -> tuple[GraphInput, ...]:
        declared: list[GraphInput] = []
        for spec in specs:
            (kind, body), *_ = [(k, v) for k, v in spec.items() if v is not None]
            if kind in ("parameter", "buffer", "tensor_constant"):
                target = body[f"{kind}_name"]
                vet_parameter_name(target)
                if target not in self.archive.weights and target not in self.archive.constants:
                    msg = f"a graph must use tensors that the file holds; it lacks '{target}'"
                    raise InvalidModel(msg, tensor=target)
                self.parameter_of_value[_value_name(body["arg"]["name"])] = target
            elif kind == "user_input" and "as_tensor" in body["arg"]:
                name = _value_name(body["arg"]["as_tensor"]["name"])
                self.values[name] = self.graph.placeholder(f"input_{len(declared)}")
                dtype = _computed_in(_DTYPES[tensors[name]["dtype"]])
                first = (tensors[name]["sizes"] or [{}])[0].get("as_int")
                declared.append(GraphInput(name, dtype, first if isinstance(first, int) else None))
            elif kind not in ("user_input", "constant_input", "token"):
                msg = f"a model must take tensors; this one has an input of kind '{kind}'"
                raise InvalidModel(msg, kind=kind)
        if not declared:
            msg = "a model must take at least one tensor; this one takes none"
            raise InvalidModel(msg)
        return tuple(declared)

    def _add_nodes(self, graph: JsonObject) -> None:
        for name, meta in graph["tensor_values"].items():
            self.ranks[name] = len(meta["sizes"])
        for node in graph["nodes"]:
            target = node["target"]
            vet_call(node)
            if target in _NO_VALUE:
                continue
            if any(i["name"] in _TRAINING and i["arg"].get("as_bool") for i in node["inputs"]):
                raise _training_mode(target)
            if target.startswith("torch.ops.higher_order."):
                self._inline(node)
                continue
            call = self._recurrent_call(node) or self._layer_call(node) or self._call(node)
            self._bind(node["outputs"], call)

    def _call(self, node: JsonObject) -> fx.Node:
        target, inputs = node["target"], node["inputs"]
        if target in SIZE_OPERATORS:
            operands = tuple(self._value(i["arg"]) for i in inputs)
            return self.graph.call_function(size_function(target), operands)
        values = {i["name"]: self._value(i["arg"]) for i in inputs}
        positional, named = split_arguments(target, list(values))
        args = tuple(values[name] for name in positional)
        call = self.graph.call_function(_operator(target), args, {n: values[n] for n in named})
        call.meta[OPERATOR] = target  # the dispatcher's functions have no name
        return call

    def _layer_call(self, node: JsonObject) -> fx.Node | None:
        """Call a module instead of an operator where a layer's weight is a parameter."""
        tensors: dict[str, str] = {}
        rank = 0
        arguments: dict[str, Any] = {}
        data: Any = None
        for item in node["inputs"]:
            name, arg = item["name"], item["arg"]
            source = _tensor_name(arg)
            if source in self.parameter_of_value:
                tensors[name] = self.parameter_of_value[source]
            elif source is not None:
                rank, data = self.ranks.get(source, 0), self._value(arg)
            else:
                arguments[name] = self._value(arg)
        if not tensors or data is None:
            return None
        call = module_for_call(node["target"], self.root, tensors, arguments, rank)
        return None if call is None else self.graph.call_module(call, (data,))

    def _recurrent_call(self, node: JsonObject) -> fx.Node | None:
        """Call an LSTM, GRU or RNN (or a cell) where the weights of an operator are all its own."""
        if not self.recurrent or node["target"] not in RECURRENT:
            return None
        given = {item["name"]: item["arg"] for item in node["inputs"]}
        parts = [given[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if n in given]
        read = [_tensor_name(arg) for arg in parts]
        read += [tensor["name"] for tensor in given.get("params", {}).get("as_tensors") or ()]
        weights = [self.parameter_of_value.get(str(name), "") for name in read if name is not None]
        plain = {n: self._value(a) for n, a in given.items() if n not in ("input", "hx", "params")
                 and a not in parts}  # fmt: skip
        if "" in weights:
            return None
        path = recurrent_for_call(node["target"], self.root, weights, plain)
        if path is None:
            return None
        self.weights_inside.update(weights)
        states = self._value(given["hx"])
        hidden = tuple(states) if isinstance(states, list) else states
        call = self.graph.call_module(path, (self._value(given["input"]), hidden))
        # The module returns the states of an LSTM as a pair, the operator one by one.
        return self.graph.call_function(_flattened, (call,))

    def _inline(self, node: JsonObject) -> None:
        """Inline a subgraph that only switches gradients or autocast off."""
        subgraph = None
        operands = []
        for item in node["inputs"]:
            arg = item["arg"]
            if arg.get("as_graph") is not None:
                subgraph = arg["as_graph"]["graph"]
            elif subgraph is not None:
                operands.append(_tensor_name(arg) or self._value(arg))
            elif arg.get("as_bool") and "autocast" in node["target"] and item["name"] != "arg_3":
                msg = "a .pt2 must not switch autocast on; export the model outside of autocast"
                raise InvalidModel(msg)
        if subgraph is None:
            msg = f"'{node['target']}' must have a subgraph; got none"
            raise InvalidModel(msg)
        outer_values, outer_parameters = dict(self.values), dict(self.parameter_of_value)
        for argument, operand in zip(subgraph["inputs"], operands, strict=True):
            inner = _tensor_name(argument)
            inner = _value_name(inner if inner is not None else _named(argument))
            if isinstance(operand, str) and operand in outer_parameters:
                self.parameter_of_value[inner] = outer_parameters[operand]
            else:
                value = outer_values[operand] if isinstance(operand, str) else operand
                self.values[inner] = value
                self.parameter_of_value.pop(inner, None)
        self._add_nodes(subgraph)
        results = [self._value(output) for output in subgraph["outputs"]]
        self.values, self.parameter_of_value = outer_values, outer_parameters
        names = [n for output in node["outputs"] for n in _output_names(output)]
        for name, result in zip(names, results, strict=True):
            self.values[_value_name(name)] = result

    def _bind(self, outputs: list[JsonObject], result: fx.Node) -> None:
        listed = len(outputs) == 1 and outputs[0].get("as_tensors") is not None
        names = [name for output in outputs for name in _output_names(output)]
        if len(names) == 1 and not listed:
            self.values[_value_name(names[0])] = result
            return
        for k, name in enumerate(names):
            if name:
                item = self.graph.call_function(operator.getitem, (result, k))
                self.values[_value_name(name)] = item

    def _value(self, arg: JsonObject) -> Any:  # noqa: ANN401  # an operator's argument
        kind, value = _single(arg)
        if kind == "as_none":
            return None
        if kind in ("as_tensor", "as_name"):
            name = value["name"] if kind == "as_tensor" else value
            if name in self.parameter_of_value:
                return self.graph.get_attr(self.parameter_of_value[name])
            return self.values[name]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float", "as_optional_tensor"):
            return self._value(value)
        if kind in (
            "as_tensors", "as_sym_ints", "as_sym_bools", "as_sym_floats", "as_optional_tensors",
        ):  # fmt: skip
            wrap = kind == "as_tensors"
            return [self._value({"as_tensor": v} if wrap else v) for v in value]
        if kind == "as_scalar_type":
            return _computed_in(_DTYPES[value])
        if kind == "as_memory_format":
            return _MEMORY_FORMATS[value]
        if kind == "as_layout":
            return torch.strided
        if kind == "as_device":
            return self._device()
        return _literal(kind, value)

    def _device(self) -> fx.Node:
        """Where the first input lies: the graph runs on any device, not where it was traced."""
        if self.device is None:
            first = next(n for n in self.graph.nodes if n.op == "placeholder")
            with self.graph.inserting_after(list(self.graph.find_nodes(op="placeholder"))[-1]):
                self.device = self.graph.call_function(_device_of, (first,))
        return self.device

    def _output(self, specs: list[JsonObject]) -> fx.Node | tuple[fx.Node, ...]:
        tensors = []
        for spec in specs:
            (kind, body), *_ = [(k, v) for k, v in spec.items() if v is not None]
            if kind == "user_output" and "as_tensor" in body["arg"]:
                tensors.append(self._value(body["arg"]))
            elif kind in ("buffer_mutation", "parameter_mutation", "user_input_mutation"):
                raise _training_mode(kind)
        if not tensors:
            msg = "a model must return a tensor; this one returns none: export it with an output"
            raise InvalidModel(msg, outputs=0)
        assert all(isinstance(t, fx.Node) for t in tensors)  # noqa: S101  # _value of a tensor
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _training_mode(where: str) -> InvalidModel:
    msg = (
        f"a model must not change its own state; this one was exported in training mode "
        f"({where}): call model.eval() before torch.export.export"
    )
    return InvalidModel(msg, operator=where)


def _tensor(name: str, meta: JsonObject, data: bytearray) -> torch.Tensor:
    if meta["dtype"] not in _DTYPES:
        msg = f"tensor '{name}' has data type {meta['dtype']}, which cannot be measured"
        raise InvalidModel(msg, tensor=name)
    dtype = _DTYPES[meta["dtype"]]
    sizes, strides = _ints(meta["sizes"]), _ints(meta["strides"])
    offset = _int(meta["storage_offset"])
    width = dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min([0, offset, *sizes, *strides]) < 0:
        msg = f"tensor '{name}' must have sizes and strides of at least 0; got {sizes}, {strides}"
        raise InvalidModel(msg, tensor=name)
    empty = 0 in sizes
    if not empty and ((last + 1) * width > len(data) or math.prod(sizes) * width > len(data)):
        msg = (
            f"tensor '{name}' of shape {sizes} must have {math.prod(sizes) * width:,} bytes; the "
            f"archive holds {len(data):,}: the file was cut short or altered"
        )
        raise InvalidModel(msg, tensor=name)
    if empty:
        return torch.zeros(sizes, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=len(data) // width)
    return flat.as_strided(sizes, strides, offset).contiguous()


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *parents, attribute = name.split(".")
    module = root
    for part in parents:
        if part not in module._modules:  # noqa: SLF001  # also finds names such as 'training'
            module.add_module(part, nn.Module())
        child = module._modules[part]  # noqa: SLF001
        assert child is not None  # noqa: S101  # added above
        module = child
    return module, attribute


def _operator(target: str) -> Callable[..., Any]:
    """Return the listed operator ``target`` from torch's dispatcher, which looks it up by name."""
    schema = schema_of(target)
    assert schema is not None  # noqa: S101  # vetted
    name, _, overload = schema[: schema.index("(")].partition(".")
    # No public function looks an operator up; the stubs do not say that this one may find none.
    found: Any = torch._C._get_operation_overload(name, overload)  # noqa: SLF001
    if found is None:
        msg = f"this torch ({torch.__version__}) has no operator '{target}'"
        raise InvalidModel(msg, operator=target)
    return found[0]  # type: ignore[no-any-return]


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which ``dtype`` is computed: half precision became float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _flattened(result: torch.Tensor | tuple[Any, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return ``(output, (hidden, cell))`` as ``(output, hidden, cell)``, and a tensor as it is."""
    if isinstance(result, torch.Tensor):
        return result
    first, last = result
    return (first, *last) if isinstance(last, (tuple, list)) else (first, last)


def _device_of(tensor: torch.Tensor) -> torch.device:
    return tensor.device


def _single(arg: JsonObject) -> tuple[str, Any]:
    present = [(k, v) for k, v in arg.items() if v is not None]
    if len(present) != 1:
        msg = f"an argument must be of exactly one kind; got {sorted(arg)}"
        raise InvalidModel(msg)
    return present[0]


def _literal(kind: str, value: Any) -> Any:  # noqa: ANN401  # vetted constants of any kind
    if kind in ("as_int", "as_bool", "as_string"):
        return value
    if kind == "as_float":
        return FLOAT_WORDS[value] if isinstance(value, str) else value
    if kind in ("as_ints", "as_bools", "as_floats"):
        return [_literal(kind.removesuffix("s"), member) for member in value]
    msg = f"an operator's argument must be a tensor, number, flag or text; got '{kind}'"
    raise InvalidModel(msg, kind=kind)


def _tensor_name(arg: JsonObject) -> str | None:
    tensor = arg.get("as_tensor") or (arg.get("as_optional_tensor") or {}).get("as_tensor")
    return None if tensor is None else str(tensor["name"])


def _named(arg: JsonObject) -> str:
    _, value = _single(arg)
    return str(value["as_name"])


def _output_names(output: JsonObject) -> list[str]:
    kind, value = _single(output)
    if kind == "as_tensor":
        return [value["name"]]
    if kind == "as_tensors":
        return [tensor["name"] for tensor in value]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return [value["as_name"]]
    if kind == "as_none":
        return [""]
    msg = f"an operator must return tensors or sizes; got '{kind}'"
    raise InvalidModel(msg, kind=kind)


def _value_name(name: str) -> str:
    if not VALUE_NAME.fullmatch(name):
        msg = f"a value's name in a graph must be an identifier; got {name!r}"
        raise UnsafeModel(msg)
    return name


def _int(value: JsonObject) -> int:
    number = value["as_int"]
    if not isinstance(number, int):
        msg = f"a stored tensor must have fixed sizes; got {value}"
        raise InvalidModel(msg)
    return number


def _ints(values: list[JsonObject]) -> list[int]:
    return [_int(value) for value in values]
