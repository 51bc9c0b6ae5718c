"""What a model is known by: a digest of its tensors and of what is computed with them.

Two networks of equal tensors are two models if their graphs differ: measurements of the one say
nothing about the other. What is computed is described by the best that there is: the graph of an
ONNX file or of an exported program, the ``config.json`` of a Hugging Face folder, and for any other
module the graph that ``torch.fx`` traces without inputs. A network that cannot be traced is known
by the classes of its modules, their source text, and their state.

What does not change a result is left out: names of values, devices, training flags, documentation.

Design: docs/design/bytes.md
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from bitquota.canonical import digest_array, digest_bytes, digest_json
from bitquota.models.running import in_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_MAX_DEPTH = 8
"""How deep objects that modules hold are described."""

NOT_TRACED = (
    "the network could not be traced, so the digest of the model covers the classes, source text "
    "and state of its modules, but not other functions that they call"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """What a model computes, apart from the values of its tensors.

    Attributes:
        digest: Of its description.
        traced: Whether a graph or a config describes it, rather than source text.
        has_weights: Whether ``digest`` covers the values of the tensors, too.
    """

    digest: str
    traced: bool = True
    has_weights: bool = False


HALF_TYPES = frozenset({torch.float16, torch.bfloat16})
"""Types in which checkpoints are stored; models are measured, and known, in float32."""


def model_fingerprint(
    module: nn.Module,
    computation: Computation | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> str:
    """Return ``sha256:…`` of the tensors of ``module`` and of what it computes.

    Args:
        module: Any module, in eval mode.
        computation: What it computes, where that is known already.
        after: Called with each tensor when it has been read.

    Cost: one hash over all tensors, and two symbolic traces of a module that holds no graph.
    """
    known = computation_of(module) if computation is None else computation
    weights = None if known.has_weights else weights_fingerprint(module, after)
    return digest_json(["bitquota/model/2", known.digest, weights])


def weights_fingerprint(module: nn.Module, after: Callable[[Tensor], None] | None = None) -> str:
    """Return ``sha256:…`` over ``name|dtype|shape|bytes`` of all stored tensors, sorted by name.

    Half precision is hashed as the float32 that it is measured in.

    Tied weights are hashed under each of their names. Independent of the device. Plans of
    releases before 2026-11-28 name their model by this digest.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        dtype = torch.float32 if tensor.dtype in HALF_TYPES else tensor.dtype
        shape = "x".join(map(str, tensor.shape))
        state.update(f"{name}|{str(dtype).removeprefix('torch.')}|{shape}|".encode())
        for piece in in_pieces(tensor):
            state.update(piece.cpu().to(dtype).view(torch.uint8).numpy().data)
        if after is not None:
            after(tensor)
    return f"sha256:{state.hexdigest()}"


def computation_of(module: nn.Module) -> Computation:
    """Return what ``module`` computes, described by the graph or config that it holds, or traced.

    A module that knows says so in a method ``computation() -> Computation``.
    """
    own: Callable[[], Computation] | None = getattr(module, "computation", None)
    if callable(own) and isinstance(found := own(), Computation):
        return found
    if isinstance(module, fx.GraphModule):
        return Computation(digest=digest_json(_described_graph(module, module.graph)))
    first, second = _traced(module), _traced(module)
    # What changes from one call to the next (a counter, a clock) is no description.
    if first is not None and first == second:
        return Computation(digest=digest_json(first))
    return Computation(digest=digest_json(Description(sources=True).module(module)), traced=False)


def _traced(module: nn.Module) -> list[Any] | None:
    """Return the description of the traced graph, or ``None`` if there is none."""
    before = set(vars(module))
    try:
        # Constants that the forward pass makes are drawn from a fixed seed.
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            graph = fx.Tracer().trace(module)
            return _described_graph(module, graph)
    except Exception:  # noqa: BLE001  # the user's forward pass on symbols may raise anything
        return None
    finally:
        # The tracer keeps constants as attributes of the module.
        for name in set(vars(module)) - before:
            delattr(module, name)


def _described_graph(root: nn.Module, graph: fx.Graph) -> list[Any]:
    """Return the calls of ``graph`` in order; values are numbered, not named.

    Several inputs are named, because their names decide which samples go where.
    """
    index = {node: k for k, node in enumerate(graph.nodes)}
    stored = set(root.state_dict(keep_vars=True))
    describe = Description(values=index)
    rows: list[Any] = []
    n_inputs = sum(node.op == "placeholder" for node in graph.nodes)
    for node in graph.nodes:
        target: Any = node.target
        if node.op == "placeholder":
            target = "input" if n_inputs == 1 else ["input", str(target)]
        elif node.op == "get_attr":
            target = describe.tensor(root, str(target), stored)
        elif node.op == "call_module":
            target = [target, describe.module(root.get_submodule(str(target)))]
        elif node.op == "call_function":
            target = describe(target)
        rows.append([node.op, target, describe(node.args), describe(node.kwargs)])
    return rows


class Description:
    """Describes values as plain JSON that is equal in every process.

    Args:
        values: Numbers of the nodes of a graph.
        sources: Whether modules are described with the source text of their classes.
    """

    def __init__(
        self, *, values: Mapping[fx.Node, int] | None = None, sources: bool = False
    ) -> None:
        self._values = values or {}
        self._sources = sources
        self._inside: list[int] = []

    def module(self, module: nn.Module) -> Any:  # noqa: ANN401  # JSON
        """Return class, settings, hooks and children; stored tensors are hashed elsewhere."""
        kind = type(module)
        stored = set(module.state_dict(keep_vars=True))
        buffers = dict(module.named_buffers(recurse=False))
        described = {
            "class": _name(kind),
            "state": self._members(module, _OF_EVERY_MODULE),
            "rebuilt": {k: self(v) for k, v in sorted(buffers.items()) if k not in stored},
            "hooks": [self(list(getattr(module, name).values())) for name in _HOOKS],
            "children": [[name, self.module(child)] for name, child in module.named_children()],
        }
        if self._sources:
            described["source"] = [_source(base) for base in kind.__mro__ if not _is_known(base)]
        return described

    def tensor(self, root: nn.Module, path: str, stored: Collection[str]) -> Any:  # noqa: ANN401
        """Return the path of a stored tensor, or the contents of anything else."""
        if path in stored:
            return path
        return self(functools.reduce(getattr, path.split("."), root))

    def __call__(self, value: Any) -> Any:  # noqa: ANN401  # any value
        """Return ``value`` as JSON."""
        match value:
            case enum.Enum():
                return str(value)
            case None | bool() | int() | str():
                return value
            case float() | complex():
                return repr(value)
            case fx.Node():
                return ["value", self._values[value]]
            case bytes():
                return digest_bytes([value])
            case torch.Tensor():
                return ["tensor", str(value.dtype), list(value.shape), _contents(value)]
            case np.ndarray() if not value.dtype.hasobject:
                return ["array", digest_array(value)]
            case torch.device() | torch.Generator():
                return type(value).__name__
            case torch.dtype() | torch.layout() | torch.memory_format() | np.generic():
                return str(value)
            case torch.SymInt() | torch.SymFloat() | torch.SymBool() | torch._ops.OpOverload():  # noqa: SLF001  # there is no public name
                return ["symbol", str(value)]
        if id(value) in self._inside or len(self._inside) > _MAX_DEPTH:
            return ["again", _name(type(value))]
        self._inside.append(id(value))
        try:
            return self._compound(value)
        finally:
            self._inside.pop()

    def _compound(self, value: Any) -> Any:  # noqa: ANN401  # any value
        match value:
            case fx.GraphModule():
                return ["graph", _described_graph(value, value.graph)]
            case nn.Module():
                state = {k: self(v) for k, v in value.state_dict(keep_vars=True).items()}
                return ["module", self.module(value), state]
            case list() | tuple():
                return [self(member) for member in value]
            case set() | frozenset():
                return ["set", sorted(digest_json(self(member)) for member in value)]
            case slice():
                return ["slice", self(value.start), self(value.stop), self(value.step)]
            case Mapping():
                return {"mapping": [[self(k), self(v)] for k, v in value.items()]}
            case functools.partial():
                return ["partial", self(value.func), self(value.args), self(value.keywords)]
            case type():
                return _name(value)
        if inspect.ismethod(value):
            return ["method", _name(value.__func__), self(value.__self__)]
        if inspect.isfunction(value):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            source = None if _is_known(value) else _source(value)
            return ["function", _name(value), source, self(cells), self(value.__defaults__)]
        if inspect.isroutine(value):
            return ["builtin", _name(value)]
        if callable(as_dict := getattr(value, "to_dict", None)):
            return [_name(type(value)), self(as_dict())]  # a config of transformers
        return [_name(type(value)), self._members(value, frozenset())]

    def _members(self, value: Any, without: frozenset[str]) -> dict[str, Any]:  # noqa: ANN401
        held = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            names = vars(kind).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if name not in {"__dict__", "__weakref__"} and hasattr(value, name):
                    held[name] = getattr(value, name)
        return {str(k): self(v) for k, v in sorted(held.items()) if k not in without}


def _contents(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest_bytes([flat.view(torch.uint8).numpy().data] if flat.numel() else [])


def _name(value: Any) -> str:  # noqa: ANN401  # a class or function
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _is_known(value: Any) -> bool:  # noqa: ANN401  # a class or function
    """Whether the name says enough: code that no user writes."""
    package = str(getattr(value, "__module__", "")).partition(".")[0]
    return package in {"torch", "bitquota", "builtins", "_operator", "math"}


@functools.cache
def _source(value: Any) -> str:  # noqa: ANN401  # a class or function
    """Return the digest of a source text, or of the compiled code where there is none."""
    try:
        return digest_bytes([inspect.getsource(value).encode()])
    except (OSError, TypeError):
        members = vars(value).values() if isinstance(value, type) else [value]
        codes = (getattr(member, "__code__", None) for member in members)
        return digest_bytes(part for code in codes if code is not None for part in _code(code))


def _code(code: Any) -> Iterable[bytes]:  # noqa: ANN401  # types.CodeType
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _code(constant)
        elif isinstance(constant, (str, int, float, complex, bytes, bool, tuple, type(None))):
            yield repr(constant).encode()
