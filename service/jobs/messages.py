"""What an evaluator may say to its driver: one type for each message, written and read here only.

An evaluator ran a stranger's model, so ``decode`` trusts nothing: a name that is not known, a
member that is missing, of another type or too many, a number that is none, an array that is not
finite, a name that is no name: each is refused with what must hold and what came.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.canonical import canonical_json
from bitquota.errors import (
    BitquotaError,
    Cancelled,
    ExportFailed,
    Infeasible,
    InvalidInput,
    MeasurementFailed,
    MissingDependency,
    SolverFailed,
)
from bitquota.progress import Progress
from bitquota.sensitivity.tasks import Task
from bitquota.service import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

MAX_KEYS = 1_000_000
MAX_TASKS = 1_000_000
MAX_NAME = 100
MAX_DETAIL = 4_000
"""Characters of an error's text."""
MAX_DETAILS = 16_000
"""Characters of the JSON of an error's values; larger ones are left out."""
_MAX_COUNT = 2**53
_KEY = re.compile(r"sha256:[0-9a-f]{64}")
_RAISED = (
    InvalidInput, Infeasible, MeasurementFailed, SolverFailed, ExportFailed, MissingDependency,
    Cancelled,
)  # fmt: skip
"""What work in an evaluator raises; it cannot say that a client lacks a key or the server fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerGet:
    """Asks for measurements."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPut:
    """Hands over new measurements; the answer says that they are kept."""

    entries: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSize:
    """Asks how many measurements there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Asks to have tasks done by all who help."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Asks for a task, after task number ``done`` if there was one."""

    done: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Tells how far the work is."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next bytes of a result, or of a checkpoint."""

    data: bytes = field(repr=False)
    checkpoint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The pieces so far are all of the result ``name``, or of the checkpoint."""

    name: str
    checkpoint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The work ended with an error."""

    error: BitquotaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The work is done and all of its results are there.

    Attributes:
        peak_bytes: The most memory that the evaluator took, as it says; shown and not relied on.
    """

    peak_bytes: int = 0


Message = (
    LedgerGet | LedgerPut | LedgerSize | Ahead | Idle | Progressed | Piece | Whole | Failed | Ended
)


def encode(message: Message) -> tuple[JsonObject, list[bytes]]:
    """Return head and parts of a message, for ``wire``."""
    match message:
        case LedgerGet(keys=keys):
            return {"type": "ledger_get", "keys": list(keys)}, []
        case LedgerPut(entries=entries):
            head, parts = wire.pack(entries)
            return {"type": "ledger_put"} | head, parts
        case LedgerSize():
            return {"type": "ledger_size"}, []
        case Ahead(tasks=tasks):
            return {"type": "ahead", "tasks": [task.to_json() for task in tasks]}, []
        case Idle(done=done):
            return {"type": "idle", "done": done}, []
        case Progressed(progress=progress):
            return {"type": "progress", "progress": progress.to_json()}, []
        case Piece(data=data, checkpoint=checkpoint):
            return {"type": "checkpoint_piece" if checkpoint else "piece"}, [data]
        case Whole(name=name, checkpoint=checkpoint):
            return {"type": "checkpoint" if checkpoint else "result", "name": name}, []
        case Failed(error=error):
            return {"type": "error", "error": _error_to_json(error)}, []
        case Ended(peak_bytes=peak_bytes):
            return {"type": "end", "peak_bytes": peak_bytes}, []


def decode(head: JsonObject, parts: Sequence[bytes]) -> Message:
    """Return the message that ``encode`` wrote.

    Raises:
        MeasurementFailed: It is none.
    """
    name = head.get("type")
    read = _READERS.get(name) if isinstance(name, str) else None
    if read is None:
        raise _refused(f"one of {', '.join(_READERS)}", name)
    try:
        return read(head, parts)
    except MeasurementFailed:
        raise
    except (BitquotaError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as err:
        why = err.message if isinstance(err, BitquotaError) else f"{type(err).__name__} in it"
        raise _refused(f"a whole message '{name}'", why) from err


def _read_ledger_get(head: JsonObject, parts: Sequence[bytes]) -> LedgerGet:
    _alone(head, parts, "keys")
    return LedgerGet(keys=_keys(head["keys"]))


def _read_ledger_put(head: JsonObject, parts: Sequence[bytes]) -> LedgerPut:
    _only(head, "entries")
    entries = wire.unpack(head, parts)
    _keys(list(entries))
    if len(entries) != len(head["entries"]):
        raise _refused("measurements under a key each", "the same key twice")
    for key, values in entries.items():
        if not np.isfinite(values).all():
            raise _refused("finite measurements", f"some under '{key}' that are not")
    return LedgerPut(entries=entries)


def _read_ledger_size(head: JsonObject, parts: Sequence[bytes]) -> LedgerSize:
    _alone(head, parts)
    return LedgerSize()


def _read_ahead(head: JsonObject, parts: Sequence[bytes]) -> Ahead:
    _alone(head, parts, "tasks")
    listed = head["tasks"]
    if not isinstance(listed, list) or len(listed) > MAX_TASKS:
        raise _refused(f"a list of at most {MAX_TASKS:,} tasks", listed)
    return Ahead(tasks=tuple(Task.from_json(task) for task in listed))


def _read_idle(head: JsonObject, parts: Sequence[bytes]) -> Idle:
    _alone(head, parts, "done")
    done = head["done"]
    return Idle(done=None if done is None else _count(done))


_OF_WHOLE = ("fraction", "until")


def _read_progress(head: JsonObject, parts: Sequence[bytes]) -> Progressed:
    _alone(head, parts, "progress")
    told = dict(head["progress"])
    of_whole = [name for name in _OF_WHOLE if name in told]
    _only({"type": "", **told}, "stage", "done", "total", "reused", *of_whole)
    counts = {name: _count(told[name]) for name in ("done", "total", "reused")}
    fraction, until = (_share(told[name]) if name in told else None for name in _OF_WHOLE)
    return Progressed(
        progress=Progress(
            stage=_name(told["stage"]),
            done=counts["done"],
            total=counts["total"],
            reused=counts["reused"],
            fraction=fraction,
            until=until,
        )
    )


def _read_piece(head: JsonObject, parts: Sequence[bytes]) -> Piece:
    _only(head)
    (data,) = parts
    return Piece(data=data, checkpoint=head["type"] == "checkpoint_piece")


def _read_whole(head: JsonObject, parts: Sequence[bytes]) -> Whole:
    _alone(head, parts, "name")
    return Whole(name=_name(head["name"]), checkpoint=head["type"] == "checkpoint")


def _read_error(head: JsonObject, parts: Sequence[bytes]) -> Failed:
    _alone(head, parts, "error")
    told = head["error"]
    _only({"type": "", **told}, "slug", "message", "details")
    slug, message, details = told["slug"], told["message"], told["details"]
    if not isinstance(message, str) or not isinstance(details, dict):
        raise _refused("an error with a text and values", told)
    if len(canonical_json(details)) > MAX_DETAILS:
        details = {}
    known = {kind.slug: kind for base in _RAISED for kind in _tree(base)}
    kind = known.get(slug, MeasurementFailed) if isinstance(slug, str) else MeasurementFailed
    return Failed(error=kind(_shortened(message), **details))


def _read_end(head: JsonObject, parts: Sequence[bytes]) -> Ended:
    _alone(head, parts, "peak_bytes")
    return Ended(peak_bytes=_count(head["peak_bytes"]))


_READERS: dict[str, Callable[[JsonObject, Sequence[bytes]], Message]] = {
    "ledger_get": _read_ledger_get,
    "ledger_put": _read_ledger_put,
    "ledger_size": _read_ledger_size,
    "ahead": _read_ahead,
    "idle": _read_idle,
    "progress": _read_progress,
    "piece": _read_piece,
    "result": _read_whole,
    "checkpoint_piece": _read_piece,
    "checkpoint": _read_whole,
    "error": _read_error,
    "end": _read_end,
}


def _error_to_json(error: BitquotaError) -> JsonObject:
    try:
        details = json.loads(canonical_json(error.details))
    except (TypeError, ValueError):
        details = {name: str(value) for name, value in error.details.items()}
    return {"slug": error.slug, "message": _shortened(error.message), "details": details}


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


def _tree(kind: type[BitquotaError]) -> list[type[BitquotaError]]:
    return [kind, *(k for sub in kind.__subclasses__() for k in _tree(sub))]


def _only(head: Mapping[str, Any], *members: str) -> None:
    """Raise unless a head has exactly these members beside its type."""
    if head.keys() != {"type", *members}:
        raise _refused(
            f"the members {', '.join(members) or 'none'}", sorted(head.keys() - {"type"})
        )


def _alone(head: JsonObject, parts: Sequence[bytes], *members: str) -> None:
    """Raise unless a message has exactly these members and no parts."""
    _only(head, *members)
    if parts:
        raise _refused("a message without parts", f"{len(parts)} parts")


def _keys(listed: Any) -> tuple[str, ...]:  # noqa: ANN401  # not trusted
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise _refused(f"a list of at most {MAX_KEYS:,} keys", listed)
    for key in listed:
        if not isinstance(key, str) or _KEY.fullmatch(key) is None:
            raise _refused("keys of measurements", key)
    return tuple(listed)


def _count(value: Any) -> int:  # noqa: ANN401  # not trusted
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise _refused("a count", value)
    return value


def _share(value: Any) -> float:  # noqa: ANN401  # not trusted
    if type(value) not in {int, float} or not 0 <= value <= 1:
        raise _refused("a number between 0 and 1", value)
    return float(value)


def _name(value: Any) -> str:  # noqa: ANN401  # not trusted
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise _refused(f"a name of at most {MAX_NAME} characters", value)
    return value


def _refused(must: str, got: object) -> MeasurementFailed:
    said = repr(got)
    if isinstance(got, float) and not math.isfinite(got):
        said = "a number that is not finite"
    msg = f"a worker must send {must}; it sent {said if len(said) <= 200 else said[:199] + '…'}"
    return MeasurementFailed(msg)
