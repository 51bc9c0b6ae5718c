"""How effects reach the server: blocking, or without blocking. Neither knows any endpoint.

Design: docs/design/client.md
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from bitquota.client.effects import (
    Answer,
    Awaited,
    Blocking,
    Close,
    Compute,
    Effect,
    Give,
    NextLine,
    Open,
    Pause,
    Send,
    Steps,
    Unreachable,
)
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

T = TypeVar("T")

CONNECT_S = 5.0
ANSWER_S = 60.0


def options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """Return the arguments that both kinds of httpx client take."""
    headers = {"User-Agent": "bitquota-client"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "base_url": base_url,
        "headers": headers,
        "timeout": httpx.Timeout(ANSWER_S, connect=CONNECT_S),
    }


@contextmanager
def as_unreachable() -> Iterator[None]:
    """Turn what httpx raises into ``Unreachable``, or ``InvalidInput`` for what is no URL."""
    try:
        yield
    except httpx.TimeoutException as err:
        raise Unreachable(str(err), timed_out=True) from err
    except httpx.UnsupportedProtocol as err:
        msg = f"a server must be given as an http:// or https:// URL: {err}"
        raise InvalidInput(msg) from err
    except httpx.HTTPError as err:
        raise Unreachable(str(err)) from err


def checked_url(base_url: str, error: Exception) -> InvalidInput:
    """Return the error that says that a server's URL is none."""
    msg = f"a server must be given as a URL such as http://127.0.0.1:8000; got {base_url!r}"
    made = InvalidInput(msg)
    made.__cause__ = error
    return made


def _request(send: Send) -> dict[str, Any]:
    values: dict[str, Any] = {"params": dict(send.params), "headers": dict(send.headers)}
    if send.json is not None:
        values["json"] = send.json
    return values


def _answer(answer: httpx.Response, content: bytes = b"") -> Answer:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Answer(status=answer.status_code, headers=headers, content=content)


class BlockingTransport(Blocking):
    """Carries effects out at once. One stream is open at a time for each run of steps."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def run_steps(self, steps: Steps[T]) -> T:
        """Return what ``steps`` return."""
        walk = self.iterate(steps)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                result: T = end.value
                return result

    def iterate(self, steps: Steps[T]) -> Iterator[Any]:
        """Yield what ``steps`` give."""
        with contextlib.ExitStack() as streams:
            lines: Iterator[str] = iter(())
            outcome: Any = None
            failure: Exception | None = None
            while True:
                try:
                    effect: Effect = (
                        steps.send(outcome) if failure is None else steps.throw(failure)
                    )
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                outcome = failure = None
                try:
                    match effect:
                        case Give():
                            yield effect.value
                        case Open():
                            outcome, lines = self._open(effect, streams)
                        case NextLine():
                            with as_unreachable():
                                outcome = next(lines, None)
                        case Close():
                            streams.close()
                        case _:
                            outcome = self._carry_out(effect)
                except (Unreachable, InvalidInput) as err:
                    failure = err

    def _open(self, effect: Open, streams: contextlib.ExitStack) -> tuple[Answer, Iterator[str]]:
        with as_unreachable():
            opened = streams.enter_context(
                self.http.stream("GET", effect.path, headers=dict(effect.headers))
            )
            content = opened.read() if opened.status_code >= 400 else b""
        return _answer(opened, content), opened.iter_lines()

    def _carry_out(self, effect: Send | Pause | Compute) -> Any:  # noqa: ANN401  # by effect
        match effect:
            case Pause():
                time.sleep(effect.seconds)
                return None
            case Compute():
                return effect.function()
            case Send(save_to=None):
                content = None if effect.pieces is None else effect.pieces()
                with as_unreachable():
                    answer = self.http.request(
                        effect.method, effect.path, content=content, **_request(effect)
                    )
                return _answer(answer, answer.content)
            case Send():
                return self._save(effect)

    def _save(self, effect: Send) -> Answer:
        assert effect.save_to is not None  # noqa: S101  # its caller matched it
        with (
            as_unreachable(),
            self.http.stream(effect.method, effect.path, **_request(effect)) as answer,
        ):
            if answer.status_code >= 400:
                return _answer(answer, answer.read())
            with effect.save_to.open("wb") as file:
                for piece in answer.iter_bytes():
                    file.write(piece)
            return _answer(answer)


class AwaitedTransport(Awaited):
    """Carries effects out without blocking the event loop: files and hashes go to threads."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def run_steps(self, steps: Steps[T]) -> T:
        """Return what ``steps`` return."""
        results: list[T] = []
        async for _ in self.iterate(steps, results):
            pass
        return results[0]

    async def iterate(self, steps: Steps[T], results: list[T]) -> AsyncIterator[Any]:
        """Yield what ``steps`` give; what they return is added to ``results``."""
        async with contextlib.AsyncExitStack() as streams:
            lines: AsyncIterator[str] | None = None
            outcome: Any = None
            failure: Exception | None = None
            while True:
                try:
                    effect: Effect = (
                        steps.send(outcome) if failure is None else steps.throw(failure)
                    )
                except StopIteration as end:
                    results.append(end.value)
                    return
                outcome = failure = None
                try:
                    match effect:
                        case Give():
                            yield effect.value
                        case Open():
                            outcome, lines = await self._open(effect, streams)
                        case NextLine():
                            assert lines is not None  # noqa: S101  # opened before
                            with as_unreachable():
                                outcome = await anext(lines, None)
                        case Close():
                            await streams.aclose()
                        case _:
                            outcome = await self._carry_out(effect)
                except (Unreachable, InvalidInput) as err:
                    failure = err

    async def _open(
        self, effect: Open, streams: contextlib.AsyncExitStack
    ) -> tuple[Answer, AsyncIterator[str]]:
        with as_unreachable():
            opened = await streams.enter_async_context(
                self.http.stream("GET", effect.path, headers=dict(effect.headers))
            )
            content = await opened.aread() if opened.status_code >= 400 else b""
        return _answer(opened, content), opened.aiter_lines()

    async def _carry_out(self, effect: Send | Pause | Compute) -> Any:  # noqa: ANN401  # by effect
        match effect:
            case Pause():
                await asyncio.sleep(effect.seconds)
                return None
            case Compute():
                return await asyncio.to_thread(effect.function)
            case Send(save_to=None):
                content = None if effect.pieces is None else _in_thread(effect.pieces())
                with as_unreachable():
                    answer = await self.http.request(
                        effect.method, effect.path, content=content, **_request(effect)
                    )
                return _answer(answer, answer.content)
            case Send():
                return await self._save(effect)

    async def _save(self, effect: Send) -> Answer:
        assert effect.save_to is not None  # noqa: S101  # its caller matched it
        with as_unreachable():
            async with self.http.stream(effect.method, effect.path, **_request(effect)) as answer:
                if answer.status_code >= 400:
                    return _answer(answer, await answer.aread())
                with effect.save_to.open("wb") as file:  # writes go to threads
                    async for piece in answer.aiter_bytes():
                        await asyncio.to_thread(file.write, piece)
                return _answer(answer)


async def _in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
