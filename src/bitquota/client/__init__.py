"""The client of a Bitquota server: ``Client(url).submit(...).wait()``, then ``job.plan()``.

It needs httpx and nothing heavier. Every problem the server names comes back as the error of the
same slug in ``bitquota.errors``. Requests are repeated while the server cannot be reached or is
busy, so a wait outlives a restart of the server. ``AsyncClient`` has the same calls, awaited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import httpx

from bitquota.client.job_calls import Event, JobCalls
from bitquota.client.server_calls import ServerCalls
from bitquota.client.sources import Upload
from bitquota.client.transports import AwaitedTransport, BlockingTransport, checked_url, options
from bitquota.problems import TYPE_PREFIX, error_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from types import TracebackType

    from bitquota.canonical import JsonObject

__all__ = [
    "TYPE_PREFIX",
    "AsyncClient",
    "AsyncJob",
    "Client",
    "Event",
    "Job",
    "Upload",
    "error_of",
]


class Job(JobCalls, BlockingTransport):
    """A job on a server.

    Attributes:
        id: Its id.
        body: The job as the server last described it.
    """

    def __init__(self, client: Client, body: JsonObject) -> None:
        JobCalls.__init__(self, client, body)
        BlockingTransport.__init__(self, client.http)

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """Yield what happens to the job until it has ended, over restarts of the server.

        Args:
            after: Number of the last event that is known already.
        """
        yield from self.iterate(self.event_steps(after))


class Client(ServerCalls[Job], BlockingTransport):
    """A connection to one server; close it, or use it in a ``with`` statement.

    Args:
        base_url: Such as ``http://127.0.0.1:8000``.
        api_key: Sent as a bearer token; a server on loopback may need none.
        retry_s: How long requests are repeated while the server cannot be reached or is busy.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, retry_s: float = 60.0) -> None:
        self.base_url = base_url
        self.retry_s = retry_s
        try:
            BlockingTransport.__init__(self, httpx.Client(**options(base_url, api_key)))
        except (httpx.InvalidURL, TypeError) as err:
            raise checked_url(base_url, err) from err

    def make_job(self, body: JsonObject) -> Job:
        """Return the job that a body describes."""
        return Job(self, body)

    def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[Job]:
        """Yield all jobs, or those of a status, a kind and labels, newest first."""
        yield from self.iterate(self.job_steps(status, kind, labels))

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.http.close()


class AsyncJob(JobCalls, AwaitedTransport):
    """A job on a server, for ``async`` code: every call of ``Job``, awaited.

    Attributes:
        id: Its id.
        body: The job as the server last described it.
    """

    def __init__(self, client: AsyncClient, body: JsonObject) -> None:
        JobCalls.__init__(self, client, body)
        AwaitedTransport.__init__(self, client.http)

    async def events(self, *, after: int = 0) -> AsyncIterator[Event]:
        """Yield what happens to the job until it has ended, over restarts of the server.

        Args:
            after: Number of the last event that is known already.
        """
        ends: list[Any] = []
        async for event in self.iterate(self.event_steps(after), ends):
            yield event


class AsyncClient(ServerCalls[AsyncJob], AwaitedTransport):
    """The same client for ``async`` code; use it in an ``async with`` statement.

    Several calls may run at once. Cancelling a task stops the waiting; ``AsyncJob.cancel`` ends a
    job.

    Args:
        base_url: As for ``Client``.
        api_key: As for ``Client``.
        retry_s: As for ``Client``.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, retry_s: float = 60.0) -> None:
        self.base_url = base_url
        self.retry_s = retry_s
        try:
            AwaitedTransport.__init__(self, httpx.AsyncClient(**options(base_url, api_key)))
        except (httpx.InvalidURL, TypeError) as err:
            raise checked_url(base_url, err) from err

    def make_job(self, body: JsonObject) -> AsyncJob:
        """Return the job that a body describes."""
        return AsyncJob(self, body)

    async def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncIterator[AsyncJob]:
        """Yield all jobs, or those of a status, a kind and labels, newest first."""
        ends: list[Any] = []
        async for job in self.iterate(self.job_steps(status, kind, labels), ends):
            yield job

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()
