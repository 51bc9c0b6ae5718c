"""The operators that a ``.pt2`` may call, and a check of every call against its schema.

``aten_operators.txt`` lists them as torch declares them, one schema a line; nothing else can be
called, and a name from a file is only ever looked up in that list. ``tests/aten_operators.py``
writes it from the schemas of the installed torch. This module imports no torch.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from bitquota.errors import UnsafeModel

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

HIGHER_ORDER = frozenset(
    {
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "torch.ops.higher_order.wrap_with_autocast",
    }
)
"""Wrappers around a subgraph, which is vetted like the graph itself and inlined."""

SIZE_OPERATORS = {
    **{f"_operator.{name}": 2 for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "pow",
        "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
    )},
    **{f"_operator.{name}": 1 for name in ("neg", "pos", "not_")},
    **{f"math.{name}": 1 for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.sym_{name}": 1 for name in ("float", "int", "not", "sqrt", "sum")},
    **{f"torch.sym_{name}": 2 for name in ("max", "min")},
    "torch.sym_ite": 3,
}  # fmt: skip
"""Arithmetic on sizes, with its number of arguments; ``size_arithmetic`` computes it."""

VALUE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

MAX_ELEMENTS = 2**40
"""Elements that the sizes in one list may multiply to: a tebi, more than any machine holds."""

MAX_LIST = 2**16
"""Members of a list of constants; longer ones are tensors in real graphs."""

MAX_TEXT = 1000
"""Characters of a text argument: a mode, an equation, the message of an assertion."""

FLOAT_WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""How torch.export writes numbers that JSON lacks."""

_TENSOR = {"as_tensor", "as_optional_tensor"}
_INT = {"as_int", "as_sym_int"}
_BOOL = {"as_bool", "as_sym_bool"}
_NUMBER = _INT | _BOOL | {"as_float", "as_sym_float"}
_KINDS: dict[str, set[str]] = {
    # Operators take a number where a tensor is declared: x * 2.0 is exported as mul.Tensor.
    "Tensor": _TENSOR | _NUMBER,
    "int": _INT,
    "SymInt": _INT,
    "float": _NUMBER - _BOOL,
    "bool": _BOOL,
    "Scalar": _NUMBER,
    "str": {"as_string"},
    "ScalarType": {"as_scalar_type"},
    "Layout": {"as_layout"},
    "Device": {"as_device"},
    "MemoryFormat": {"as_memory_format"},
    "Generator": set(),
}
_LIST_KINDS: dict[str, set[str]] = {
    "Tensor": {"as_tensors", "as_optional_tensors"},
    "int": {"as_ints", "as_sym_ints"},
    "SymInt": {"as_ints", "as_sym_ints"},
    "float": {"as_floats", "as_sym_floats", "as_ints", "as_sym_ints"},
    "bool": {"as_bools", "as_sym_bools"},
    "Scalar": {"as_ints", "as_floats", "as_sym_ints", "as_sym_floats"},
}
_TYPE = re.compile(r"([A-Za-z]+)(?:\([^)]*\))?(\?)?(\[\d*\])?(\?)?")
_SIZES = frozenset({"size", "output_size", "repeats", "dims", "s", "normalized_shape"})
"""Lists whose members multiply to a number of elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One argument that an operator declares.

    Attributes:
        kinds: Kinds of values, as ``torch.export`` names them, that it takes.
        required: Whether it has no default.
        keyword_only: Whether it must be given by name.
    """

    kinds: frozenset[str]
    required: bool
    keyword_only: bool


def vet_operator(target: object) -> None:
    """Raise ``UnsafeModel`` unless ``target`` is an operator that a graph may call."""
    if isinstance(target, str) and (
        target in SIZE_OPERATORS or target in HIGHER_ORDER or schema_of(target) is not None
    ):
        return
    shown = f"'{target:.120}'" if isinstance(target, str) else f"{target!r:.120}"
    msg = (
        f"a .pt2 may only call aten operators of a forward pass and arithmetic on sizes; got "
        f"{shown}: export the model in eval mode and without custom operators, or provide a "
        "Hugging Face folder"
    )
    raise UnsafeModel(msg, operator=str(target)[:200])


def vet_call(node: JsonObject) -> None:
    """Raise ``UnsafeModel`` unless a node of a graph is a call that its operator declares.

    Arguments must be there under their declared names, of the declared types, each once, and
    bounded. Subgraphs of higher-order operators are for the caller to vet.
    """
    target, inputs = node.get("target"), node.get("inputs")
    vet_operator(target)
    assert isinstance(target, str)  # noqa: S101  # vetted
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise _bad_call(target, "its inputs must be a list of named arguments")
    arguments = [_single(target, item.get("arg")) for item in inputs]
    for kind, value in arguments:
        if not (kind == "as_graph" and target in HIGHER_ORDER):
            _vet_value(target, kind, value)
    if target in HIGHER_ORDER:
        return
    if target in SIZE_OPERATORS:
        allowed = {"as_ints", "as_sym_ints"} if target == "torch.sym_sum" else _NUMBER
        if len(arguments) != SIZE_OPERATORS[target] or any(k not in allowed for k, _ in arguments):
            raise _bad_call(target, f"it takes {SIZE_OPERATORS[target]} numbers")
        return
    _vet_arguments(target, [item.get("name") for item in inputs], arguments)


def _vet_arguments(target: str, given: list[Any], arguments: list[tuple[str, Any]]) -> None:
    """Check names, types and sizes of arguments against what the operator declares."""
    parameters = parameters_of(target)
    for name, (kind, value) in zip(given, arguments, strict=True):
        parameter = parameters.get(name) if isinstance(name, str) else None
        if parameter is None or given.count(name) > 1:
            raise _bad_call(target, f"it has no argument {name!r:.80}, or got it twice")
        if kind not in parameter.kinds:
            raise _bad_call(target, f"its argument '{name}' cannot be {kind!r:.80}")
        numbers = _constants(kind, value, parameters)
        product = math.prod(max(n, 1) for n in numbers) if name in _SIZES else 0
        if max([product, *numbers]) > MAX_ELEMENTS:
            raise _bad_call(target, f"'{name}' must be at most 2**40; got {value!r:.80}")
    missing = sorted(n for n, p in parameters.items() if p.required and n not in given)
    if missing:
        raise _bad_call(target, f"it needs {', '.join(missing)}")


def split_arguments(target: str, names: list[str]) -> tuple[list[str], list[str]]:
    """Return which of ``names`` a call gives by position, in order, and which by name."""
    positional = []
    for name, parameter in parameters_of(target).items():
        if name not in names or parameter.keyword_only:
            break
        positional.append(name)
    return positional, [name for name in names if name not in positional]


def schema_of(target: str) -> str | None:
    """Return how torch declares the operator ``torch.ops.aten.NAME.OVERLOAD``, if listed."""
    return _schemas().get(target)


@cache
def parameters_of(target: str) -> dict[str, Parameter]:
    """Return the arguments that a listed operator declares, by name, in order."""
    schema = _schemas()[target]
    declared = schema[schema.index("(") + 1 : schema.index(") -> ")]
    parameters: dict[str, Parameter] = {}
    keyword_only = False
    for part in re.split(r", (?![^\[]*\])", declared) if declared else []:
        if part == "*":
            keyword_only = True
            continue
        left, equals, _ = part.partition("=")
        type_, _, name = left.rpartition(" ")
        found = _TYPE.fullmatch(type_)
        assert found is not None, schema  # noqa: S101  # our own file; a test reads all of it
        base, optional_member, listed, optional = found.groups()
        kinds = set(_LIST_KINDS[base] if listed else _KINDS[base])
        if listed and listed != "[]":
            kinds |= _KINDS[base] - _TENSOR  # int[2] also takes one number
        if optional or (optional_member and not listed):
            kinds.add("as_none")
        parameters[name] = Parameter(
            kinds=frozenset(kinds), required=not equals, keyword_only=keyword_only
        )
    return parameters


@cache
def _schemas() -> dict[str, str]:
    text = (resources.files("bitquota.models") / "aten_operators.txt").read_text("utf-8")
    schemas = {}
    for line in text.splitlines():
        name, _, overload = line[: line.index("(")].removeprefix("aten::").partition(".")
        schemas[f"torch.ops.aten.{name}.{overload or 'default'}"] = line
    return schemas


def _constants(kind: str, value: Any, parameters: dict[str, Parameter]) -> list[int]:  # noqa: ANN401
    """Return the magnitudes of the ints in an argument that could be numbers of elements."""
    if kind == "as_ints":
        return [abs(v) for v in value]
    if kind == "as_sym_ints":
        return [abs(v["as_int"]) for v in value if v.get("as_int") is not None]
    # A single number is often the end of a slice, 2**63 - 1; only factories make elements of it.
    factory = not any(p.kinds & {"as_tensor", "as_tensors"} for p in parameters.values())
    return [abs(value)] if kind == "as_int" and factory else []


def _single(target: str, arg: object) -> tuple[str, Any]:
    present = [(k, v) for k, v in arg.items() if v is not None] if isinstance(arg, dict) else []
    if len(present) != 1:
        raise _bad_call(target, "each argument must be of exactly one kind")
    return present[0]


def _vet_value(target: str, kind: str, value: object) -> None:
    """Raise ``UnsafeModel`` unless ``value`` is what ``kind`` says, and bounded."""
    member = kind.removesuffix("s")
    check = _CHECKS.get(kind)
    if check is not None:
        holds = check(value)
    elif member != kind and member in _CHECKS:
        holds = (
            isinstance(value, list)
            and len(value) <= MAX_LIST
            # 'as_tensors' and their like hold the members' content without its kind.
            and all(_CHECKS[member](v) for v in value)
        )
    else:
        holds = False
    if not holds:
        raise _bad_call(target, f"an argument is not a plain value of kind '{kind:.40}'")


def _is_int(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_float(value: object) -> bool:
    return isinstance(value, float) or _is_int(value) or value in FLOAT_WORDS


def _is_name(value: object) -> bool:
    return isinstance(value, str) and VALUE_NAME.fullmatch(value) is not None


def _is_reference(value: object) -> bool:
    return isinstance(value, dict) and _is_name(value.get("name"))


def _one_of(value: object, **checks: Any) -> bool:  # noqa: ANN401  # predicates by key
    present = [k for k, v in value.items() if v is not None] if isinstance(value, dict) else []
    return len(present) == 1 and present[0] in checks and checks[present[0]](value[present[0]])  # type: ignore[index]


_CHECKS: dict[str, Any] = {
    "as_none": lambda v: v is True,
    "as_tensor": _is_reference,
    "as_optional_tensor": lambda v: _one_of(
        v, as_tensor=_is_reference, as_none=lambda n: n is True
    ),
    "as_int": _is_int,
    "as_float": _is_float,
    "as_bool": lambda v: isinstance(v, bool),
    "as_string": lambda v: isinstance(v, str) and len(v) <= MAX_TEXT,
    "as_sym_int": lambda v: _one_of(v, as_name=_is_name, as_int=_is_int),
    "as_sym_float": lambda v: _one_of(v, as_name=_is_name, as_float=_is_float),
    "as_sym_bool": lambda v: _one_of(v, as_name=_is_name, as_bool=lambda b: isinstance(b, bool)),
    "as_scalar_type": _is_int,
    "as_layout": _is_int,
    "as_memory_format": _is_int,
    "as_device": lambda v: isinstance(v, dict),
}


def _bad_call(target: str, what: str) -> UnsafeModel:
    msg = (
        f"a .pt2 must call operators as torch declares them; in a call of '{target}', {what}: "
        "export the model again with torch.export.save"
    )
    return UnsafeModel(msg, operator=target)
