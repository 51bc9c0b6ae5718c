"""Values to plain JSON and back, by their annotations: one codec for every document.

Reading is strict. ``"3"`` is no number, ``true`` is no integer, a member that the class does not
have is refused, one that has a default may be missing. A number keeps the type it had, so that
what is written again has the same bytes: an integer where a float may stand stays an integer.
Invariants are checked where they always are, in ``__post_init__``.

Design: docs/design/bytes.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from bitquota.canonical import JsonObject, digest_json, schema_of
from bitquota.errors import BitquotaError, InvalidInput

if TYPE_CHECKING:
    from cattrs import Converter
    from numpy.typing import NDArray

_SHOWN = 80
"""Characters of a value that an error shows."""


@dataclass(frozen=True, slots=True)
class NullFor:
    """Annotation of a number that JSON cannot hold where it is infinite: then it says ``null``."""

    value: float
    """What ``null`` is read as."""


OneOrMore = int | tuple[int, ...]
"""A number where there may be several."""

LowerBound = Annotated[float, NullFor(-math.inf)]
UpperBound = Annotated[float, NullFor(math.inf)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The digest of a document, which stands in it as ``digest``.

    Attributes:
        leaves_out: Members that it does not cover.
        may_lack: Whether a document without a digest may be read.
        remedy: What to do with a document that was edited.
    """

    leaves_out: tuple[str, ...] = ()
    may_lack: bool = False
    remedy: str

    def of(self, body: JsonObject) -> str:
        """Return the digest of a document, whether or not one stands in it."""
        apart = {"digest", *self.leaves_out}
        return digest_json({k: v for k, v in body.items() if k not in apart})

    def check(self, data: JsonObject, body: JsonObject, form: Form) -> None:
        """Raise unless ``data`` has the digest of what was read from it, ``body``."""
        got, computed = data.get("digest"), body["digest"]
        if got == computed or ("digest" not in data and self.may_lack):
            return
        msg = f"the digest of {form.what} must fit its content; this one was edited: {self.remedy}"
        raise form.error(msg, digest=got, computed=computed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a class stands in JSON beyond its members by name.

    Attributes:
        what: What a person calls it; empty takes the name of the class.
        error: What is raised for JSON that is none.
        advice: What to do about another schema.
        schema: Written into the document and demanded of it.
        schema_key: Under which name.
        names: The names of members in the document, where they are others.
        derived: Properties that are written too; where they are read they must hold.
        left_out: Members that are not written while they have their default.
        unwritten: Members that are never written.
        seal: Its digest, if it has one.
    """

    what: str = ""
    error: type[BitquotaError] = InvalidInput
    advice: str = ""
    schema: str = ""
    schema_key: str = "schema"
    names: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    seal: Seal | None = None


class Document:
    """Base of dataclasses that can be written as JSON and read again."""

    __slots__ = ()
    FORM: ClassVar[Form] = Form()

    def to_json(self) -> JsonObject:
        """Return the members, and what the class derives from them, as plain JSON."""
        body: JsonObject = _converter().unstructure(self)
        return body

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Rebuild from ``to_json``.

        Raises:
            BitquotaError: The class's own (``FORM.error``): another schema, a member that is
                missing, unknown or of another type, or an invariant that does not hold.
        """
        form = cls.FORM
        what = form.what or f"a {cls.__name__}"
        got = data.get(form.schema_key) if isinstance(data, dict) else None
        if form.schema and got != form.schema:
            found = schema_of(data)
            msg = f"{what} must be a JSON object of schema '{form.schema}'; got {found}"
            raise form.error(msg + (f": {form.advice}" if form.advice else ""))
        converter = _converter()
        try:
            made: Self = converter.structure(data, cls)
        except (ExceptionGroup, BitquotaError, ValueError, TypeError, RecursionError) as err:
            path, cause = _innermost(err)
            if isinstance(cause, form.error):
                raise cause from None
            place = f"'{path}'" if path else "it" if form.schema else what
            own = cause if isinstance(cause, BitquotaError) else None
            msg = f"{place}: {own.message}" if own else f"{place} {cause}"
            if form.schema:
                msg = f"{what} must have every member of '{form.schema}' with its type; {msg}"
            elif path:
                msg = f"{what}: {msg}"
            raise form.error(msg, **(own.details if own else {}) | {"at": path}) from err
        return made


@cache
def _converter() -> Converter:
    """Return the one converter; cattrs is loaded when the first value is read or written."""
    from cattrs import Converter
    from cattrs.cols import homogenous_tuple_structure_factory, is_frozenset

    def sequence(kind: Any) -> Callable[[Any, Any], Any]:  # noqa: ANN401
        if get_args(kind)[-1] is Ellipsis:
            return homogenous_tuple_structure_factory(kind, made)
        return made.gen_structure_hetero_tuple(kind)

    def mapping(kind: Any) -> Callable[[Any, Any], Any]:  # noqa: ANN401
        return made.gen_structure_mapping(kind)

    made = Converter(unstruct_collection_overrides={tuple: list}, forbid_extra_keys=True)
    for kind, allowed, name in (
        (bool, (bool,), "true or false"),
        (int, (int,), "an integer"),
        (float, (int, float), "a number"),
        (str, (str,), "text"),
    ):
        made.register_structure_hook(kind, _only(allowed, name))
    made.register_structure_hook(StrEnum, _choice)
    made.register_unstructure_hook(StrEnum, str)
    made.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _choice)  # type: ignore[comparison-overlap]
    made.register_structure_hook_factory(is_dataclass, lambda kind: _reader(kind, made))
    made.register_unstructure_hook_factory(is_dataclass, lambda kind: _writer(kind, made))
    made.register_unstructure_hook_factory(
        is_frozenset, lambda _kind: lambda members: sorted(map(str, members))
    )
    made.register_structure_hook_func(lambda kind: kind == OneOrMore | None, _one_or_more)
    made.register_structure_hook_func(_is_array, _array)
    made.register_unstructure_hook_func(_is_array, np.ndarray.tolist)
    # What cattrs does with lists and objects, once it is clear that it was given one.
    for origin, plain, name, factory in (
        (tuple, list, "a list", sequence),
        (dict, dict, "an object", mapping),
        (Mapping, dict, "an object", mapping),
    ):
        made.register_structure_hook_factory(*_given(origin, plain, name, factory))
    made.register_structure_hook_func(lambda kind: kind == JsonObject, _only((dict,), "an object"))
    made.register_unstructure_hook_func(lambda kind: kind == JsonObject, dict)
    return made


def _reader(kind: type, converter: Converter) -> Callable[[Any, Any], Any]:
    """Return what makes a ``kind`` of JSON."""
    from cattrs.gen import make_dict_structure_fn

    form: Form = getattr(kind, "FORM", Form())
    members: Callable[..., Any] = make_dict_structure_fn(kind, converter, **_overrides(kind, form))
    derived = _derived(kind, form, converter)
    apart = {*derived, *([form.schema_key] if form.schema else ())}
    apart |= {"digest"} if form.seal else set()

    def read(data: Any, _kind: Any) -> Any:  # noqa: ANN401  # any JSON
        _hold(data, (dict,), "an object")
        made = members({k: v for k, v in data.items() if k not in apart}, kind)
        for name, write in derived.items():
            if name in data and data[name] != (holds := write(getattr(made, name))):
                got = _shown(data[name])
                msg = f"must have the {name} that its members give, {_shown(holds)}; got {got}"
                raise ValueError(msg)
        if form.seal is not None:
            form.seal.check(data, converter.unstructure(made), form)
        return made

    return read


def _writer(kind: type, converter: Converter) -> Callable[[Any], JsonObject]:
    """Return what makes JSON of a ``kind``."""
    from cattrs.gen import make_dict_unstructure_fn

    form: Form = getattr(kind, "FORM", Form())
    members: Callable[[Any], JsonObject] = make_dict_unstructure_fn(
        kind, converter, **_overrides(kind, form)
    )
    derived = _derived(kind, form, converter)
    defaults = {f.name: f.default for f in fields(kind) if f.name in form.left_out}

    def write(value: Any) -> JsonObject:  # noqa: ANN401  # a ``kind``
        body = members(value)
        if form.schema:
            body = {form.schema_key: form.schema} | body
        for name in form.left_out:
            if getattr(value, name) == defaults[name]:
                del body[name]
        for name, write_one in derived.items():
            body[name] = write_one(getattr(value, name))
        if form.seal is not None:
            body["digest"] = form.seal.of(body)
        return body

    return write


def _overrides(kind: type, form: Form) -> dict[str, Any]:
    """Return what cattrs must know of members that are not written by their type alone."""
    from cattrs.gen import override

    # cattrs drops ``Annotated`` from the members of a dataclass, so what it says is handed over.
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: override(
            rename=form.names.get(name),
            omit=True if name in form.unwritten else None,
            struct_hook=_number_or(hint.__metadata__[0]) if _may_be_null(hint) else None,
            unstruct_hook=_finite if _may_be_null(hint) else None,
        )
        for name, hint in hints.items()
        if name in form.names or name in form.unwritten or _may_be_null(hint)
    }


def _derived(kind: type, form: Form, converter: Converter) -> dict[str, Callable[[Any], Any]]:
    """Return what writes each derived property, by the annotation of what it returns."""
    hints = {
        name: get_type_hints(getattr(kind, name).fget, include_extras=True)["return"]
        for name in form.derived
    }
    return {
        name: _finite if _may_be_null(hint) else converter.get_unstructure_hook(hint)
        for name, hint in hints.items()
    }


def _may_be_null(hint: Any) -> bool:  # noqa: ANN401  # an annotation
    return get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], NullFor)


def _number_or(null: NullFor) -> Callable[[Any, Any], Any]:
    number = _only((int, float), "a number or null")
    return lambda data, kind: null.value if data is None else number(data, kind)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _only(kinds: tuple[type, ...], name: str) -> Callable[[Any, Any], Any]:
    """Return what lets JSON of some types through as it is."""

    def read(data: Any, _kind: Any) -> Any:  # noqa: ANN401  # any JSON
        _hold(data, kinds, name)
        return data

    return read


def _one_or_more(data: Any, _kind: Any) -> OneOrMore | None:  # noqa: ANN401  # any JSON
    """Return a whole number, several of them, or nothing."""
    _hold(data, (int, list, type(None)), "an integer, a list of integers, or null")
    if not isinstance(data, list):
        return data  # type: ignore[no-any-return]
    for member in data:
        _hold(member, (int,), "an integer")
    return tuple(data)


def _hold(data: object, kinds: tuple[type, ...], name: str) -> None:
    if type(data) not in kinds:
        msg = f"must be {name}; got {_shown(data)}"
        raise ValueError(msg)


@cache
def _choices(kind: Any) -> dict[str, Any]:  # noqa: ANN401  # a StrEnum, or a Literal of texts
    return {str(member): member for member in get_args(kind) or kind}


def _choice(data: Any, kind: Any) -> Any:  # noqa: ANN401  # any JSON, and as above
    allowed = _choices(kind)
    if type(data) is not str or data not in allowed:
        msg = f"must be one of {', '.join(allowed)}; got {_shown(data)}"
        raise ValueError(msg)
    return allowed[data]


def _is_array(kind: Any) -> bool:  # noqa: ANN401  # an annotation
    return get_origin(kind) is np.ndarray


def _array(data: Any, kind: Any) -> NDArray[Any]:  # noqa: ANN401  # any JSON, an annotation
    _hold(data, (list,), "a list")
    for entry in data:
        _hold(entry, (int, float), "a list of numbers")
    return np.array(data, dtype=get_args(get_args(kind)[1])[0])


def _given(
    origin: type, plain: type, name: str, factory: Callable[[Any], Callable[[Any, Any], Any]]
) -> tuple[Callable[[Any], bool], Callable[[Any], Callable[[Any, Any], Any]]]:
    """Return the hook factory of a collection that first holds the JSON to its type."""

    def make(kind: Any) -> Callable[[Any, Any], Any]:  # noqa: ANN401  # an annotation
        members = factory(kind)

        def read(data: Any, _kind: Any) -> Any:  # noqa: ANN401  # any JSON
            _hold(data, (plain,), name)
            return members(data, kind)

        return read

    return lambda kind: get_origin(kind) is origin, make


def _shown(data: object) -> str:
    """Return JSON as an error shows it: in full where that is short."""
    if isinstance(data, (dict, list)):
        return "an object" if isinstance(data, dict) else "a list"
    text = json.dumps(data, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _innermost(err: Exception) -> tuple[str, Exception]:
    """Return where in a document the first fault is, and the fault, in words where it has none."""
    from cattrs.errors import (
        AttributeValidationNote,
        BaseValidationError,
        ForbiddenExtraKeysError,
        IterableValidationNote,
    )

    path = ""
    while isinstance(err, BaseValidationError):
        names = getattr(err.cl, "FORM", Form()).names
        err = err.exceptions[0]
        for note in getattr(err, "__notes__", ()):
            if isinstance(note, AttributeValidationNote):
                name = names.get(note.name, note.name)
                path += f".{name}" if path else name
            elif isinstance(note, IterableValidationNote):
                path += f"[{note.index!r}]"
    if isinstance(err, ForbiddenExtraKeysError):
        form = getattr(err.cl, "FORM", Form())
        known = ", ".join(form.names.get(f.name, f.name) for f in fields(err.cl))
        unknown = ", ".join(sorted(map(str, err.extra_fields)))
        return path, ValueError(f"has the members {known}; got also {unknown}")
    if isinstance(err, KeyError):
        return path, ValueError("is missing")
    return path, err
