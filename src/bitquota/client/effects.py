"""What a call of the client asks of its transport: send, wait, read; and how one call serves both.

A call is written once, as a generator that yields effects and is sent their outcomes. A blocking
and an asynchronous transport carry effects out; neither knows any endpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping
    from pathlib import Path
    from typing import Self

    from bitquota.canonical import JsonObject

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said.

    Attributes:
        status: HTTP status.
        headers: Their names are in lower case.
        content: The whole body; empty where it was streamed.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send one request; the outcome is an ``Answer``.

    Attributes:
        method: GET, POST, PUT.
        path: Below the base URL.
        params: Of the query.
        headers: Besides those of every request.
        json: Body, as JSON.
        pieces: Body in pieces, if it is a file.
        save_to: File that a good answer's body is written to, instead of being held.
    """

    method: str
    path: str
    params: Mapping[str, str | int | list[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: JsonObject | None = None
    pieces: Callable[[], Iterator[bytes]] | None = None
    save_to: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open a stream of lines; the outcome is an ``Answer``, without content if it is good."""

    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextLine:
    """Read a line of the open stream; the outcome is a text, or ``None`` at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Close the open stream; no outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Wait; no outcome."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run a function that takes long (hashing a file); the outcome is what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Give:
    """Hand a value to who iterates over the call; no outcome."""

    value: Any


class Unreachable(Exception):
    """No answer came: the outcome of an effect that a transport could not carry out.

    Attributes:
        timed_out: Whether the server was reached and was too slow.
    """

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


Effect = Send | Open | NextLine | Close | Pause | Compute | Give
Steps = Generator[Effect, Any, T]


class Blocking:
    """Base of what carries effects out at once."""

    def run_steps(self, steps: Steps[T]) -> T:
        """Return what ``steps`` return."""
        raise NotImplementedError


class Awaited:
    """Base of what carries effects out without blocking."""

    def run_steps(self, steps: Steps[T]) -> Coroutine[Any, Any, T]:
        """Return what ``steps`` return, once it is awaited."""
        raise NotImplementedError


class Call(Generic[P, T]):
    """A method written as steps: it returns on a blocking client and is awaited on another."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self.steps = steps
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, T]: ...

    @overload
    def __get__(self, instance: Awaited, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self

        @functools.wraps(self.steps)
        def bound(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401  # see the overloads
            return instance.run_steps(self.steps(instance, *args, **kwargs))

        return bound
