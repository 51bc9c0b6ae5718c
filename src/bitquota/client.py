"""The client of a Bitquota server: ``Client(url).submit(...).wait()``, then ``job.plan()``.

It needs httpx and nothing heavier. Every problem the server names comes back as the error of the
same slug in ``bitquota.errors``. Requests that are safe to repeat are repeated while the server
cannot be reached, so a wait outlives a restart of the server.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

from bitquota.errors import (
    BitquotaError,
    Cancelled,
    InvalidInput,
    MeasurementFailed,
    ServiceError,
    ServiceTimeout,
)
from bitquota.plan import Plan
from bitquota.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from bitquota.canonical import JsonObject
    from bitquota.request import PlanRequest

TYPE_PREFIX = "urn:bitquota:problem:"
_PIECE = 2**20
_CONNECT_S = 5.0
_ANSWER_S = 60.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


def error_of(problem: object, *, status: int = 500) -> BitquotaError:
    """Return the error that a problem+json body stands for; an unknown one is a ServiceError."""
    body = problem if isinstance(problem, dict) else {}
    slug = str(body.get("type", "")).removeprefix(TYPE_PREFIX)
    kind = _errors_by_slug().get(slug, ServiceError)
    message = body.get("detail") or f"the server answered {status} without saying why"
    details = body.get("details")
    named = {str(k): v for k, v in details.items()} if isinstance(details, dict) else {}
    named.pop("message", None)
    return kind(str(message), **named)


def _errors_by_slug() -> dict[str, type[BitquotaError]]:
    found: dict[str, type[BitquotaError]] = {}
    waiting: list[type[BitquotaError]] = [BitquotaError]
    while waiting:
        kind = waiting.pop()
        found.setdefault(kind.slug, kind)
        waiting += kind.__subclasses__()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job."""

    number: int
    kind: str
    data: JsonObject


class Client:
    """A connection to one server; close it, or use it in a ``with`` statement.

    Args:
        base_url: Such as ``http://127.0.0.1:8000``.
        api_key: Sent as a bearer token; a server on loopback may need none.
        retry_s: How long requests that are safe to repeat are repeated while the server cannot
            be reached.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, retry_s: float = 60.0) -> None:
        headers = {"User-Agent": "bitquota-client"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._retry_s = retry_s
        try:
            self._http = httpx.Client(
                base_url=base_url,
                headers=headers,
                timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
            )
        except (httpx.InvalidURL, TypeError) as err:
            msg = f"a server must be given as a URL such as http://127.0.0.1:8000; got {base_url!r}"
            raise InvalidInput(msg) from err

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
        self._http.close()

    def submit(
        self,
        *,
        model: Path | str,
        calibration: Path | str,
        request: PlanRequest,
        kind: str = "plan",
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Upload what the server does not have yet, and order a plan.

        Args:
            model: A file, or ``sha256:…`` of an upload.
            calibration: A file, or ``sha256:…`` of an upload.
            request: What to do.
            kind: ``plan``, or ``measure`` for the sensitivity matrix alone.
            labels: Names and values to find the job by.
            priority: Higher runs earlier.
            deadline_s: Seconds until the job must have ended.
            webhook: URL that is told when the job has ended.
            idempotency_key: Orders under one key are one job; the default is a new key.

        Raises:
            InvalidInput: The server cannot use what was handed in (the subclass says what).
            ServiceError: The server, or the way to it, failed.
        """
        body: JsonObject = {
            "kind": kind,
            "model": self.upload_model(model),
            "dataset": self.upload_dataset(calibration),
            "request": request.to_json(),
            "labels": dict(labels or {}),
            "priority": priority,
        }
        if deadline_s is not None:
            body["deadline_s"] = deadline_s
        if webhook is not None:
            body["webhook"] = webhook
        # The key makes a repeat after a lost answer harmless.
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        made = self._call("POST", "/v1/jobs", json=body, headers=headers).json()
        return Job(self, made["id"], made)

    def solve(
        self,
        *,
        budgets: Sequence[str],
        job: str | None = None,
        matrix: bytes | None = None,
        gap: float = 1e-4,
        time_limit_s: float = 0.1,
        seed: int = 0,
    ) -> list[JsonObject]:
        """Solve a measured matrix for each budget at once; nothing is measured.

        Args:
            budgets: What to solve for.
            job: A job that left a matrix.
            matrix: Or a matrix itself, as ``Job.sensitivity`` returns it.
            gap: Relative gap to stop at.
            time_limit_s: For each budget.
            seed: Of the search.
        """
        body: JsonObject = {
            "budgets": list(budgets), "gap": gap, "time_limit_s": time_limit_s, "seed": seed,
        }  # fmt: skip
        if job is not None:
            body["job"] = job
        if matrix is not None:
            body["matrix"] = base64.b64encode(matrix).decode()
        answer = self._call("POST", "/v1/solve", json=body).json()
        return [dict(entry) for entry in answer["data"]]

    def upload_model(self, model: Path | str) -> str:
        """Return the digest of a model after uploading it, if the server has it not."""
        return self._upload("/v1/models", model)

    def upload_dataset(self, calibration: Path | str) -> str:
        """Return the digest of a calibration set after uploading it, if the server has it not."""
        return self._upload("/v1/datasets", calibration)

    def job(self, job_id: str) -> Job:
        """Return a job by its id; raises ``NotFound``."""
        return Job(self, job_id, self._call("GET", f"/v1/jobs/{job_id}").json())

    def jobs(self, *, status: str | None = None) -> Iterator[Job]:
        """Yield all jobs, newest first."""
        parameters: dict[str, Any] = {} if status is None else {"status": status}
        while True:
            page = self._call("GET", "/v1/jobs", params=parameters).json()
            for body in page["data"]:
                yield Job(self, body["id"], body)
            if not page["has_more"]:
                return
            parameters["cursor"] = page["next_cursor"]

    def _upload(self, where: str, source: Path | str) -> str:
        if isinstance(source, str) and source.startswith("sha256:"):
            return source
        from pathlib import Path

        path = Path(source)
        if not path.is_file():
            msg = f"an upload must be a file; '{path}' is not: a folder is uploaded as a zip of it"
            raise InvalidInput(msg, path=str(path))
        digest = hashlib.sha256()
        for piece in _pieces(path):
            digest.update(piece)
        name = digest.hexdigest()
        known = self._send("GET", f"{where}/sha256:{name}")
        if known.status_code == 200:
            return f"sha256:{name}"
        return self._send_pieces(where, path, name)

    def _send_pieces(self, where: str, path: Path, name: str) -> str:
        """Upload a file; when the connection breaks, go on where the server has it."""
        total = path.stat().st_size
        until = time.monotonic() + self._retry_s
        while True:
            offset = int(self._call("GET", f"{where}/sha256:{name}/upload").json()["received"])
            parameters = {
                "sha256": name, "name": path.name, "offset": str(offset),
                "total": str(max(total, 1)),
            }  # fmt: skip
            headers = {"Content-Length": str(total - offset)}
            try:
                answer = self._http.put(
                    where, content=_pieces(path, offset), headers=headers, params=parameters
                )
            except httpx.TransportError as err:
                if time.monotonic() > until:
                    msg = f"the server must be reachable; {self._http.base_url} is not: {err}"
                    raise ServiceError(msg) from err
                time.sleep(_FIRST_PAUSE_S)
                continue
            if answer.status_code == 409 and time.monotonic() < until:
                time.sleep(_FIRST_PAUSE_S)  # the server has not noticed the broken connection yet
                continue
            if answer.status_code >= 400:
                raise _problem(answer)
            return str(answer.json()["id"])

    def _call(self, method: str, url: str, **values: Any) -> httpx.Response:  # noqa: ANN401
        """Send, repeat while the server is away, and turn a problem into its error."""
        answer = self._send(method, url, **values)
        if answer.status_code >= 400:
            raise _problem(answer)
        return answer

    def _send(self, method: str, url: str, **values: Any) -> httpx.Response:  # noqa: ANN401
        until = time.monotonic() + self._retry_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                answer = self._http.request(method, url, **values)
                if answer.status_code != 503:
                    return answer
                failure = _problem(answer)
            except httpx.TimeoutException as err:
                failure = ServiceTimeout(f"the server must answer; it did not in time: {err}")
                failure.__cause__ = err
            except httpx.HTTPError as err:
                if isinstance(err, httpx.UnsupportedProtocol):
                    msg = f"a server must be given as an http:// or https:// URL: {err}"
                    raise InvalidInput(msg) from err
                failure = ServiceError(
                    f"the server must be reachable; {self._http.base_url} is not: {err}"
                )
                failure.__cause__ = err
            if time.monotonic() + pause > until:
                raise failure
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class Job:
    """A job on a server.

    Attributes:
        id: Its id.
        body: The job as the server last described it.
    """

    def __init__(self, client: Client, job_id: str, body: JsonObject) -> None:
        self._client = client
        self.id = job_id
        self.body = body
        self._tag: str | None = None

    def __repr__(self) -> str:
        """Name the job and its status."""
        return f"<Job {self.id} {self.status}>"

    @property
    def status(self) -> str:
        """Status as last seen: queued, running, succeeded, failed, cancelled or expired."""
        return str(self.body["status"])

    @property
    def progress(self) -> Progress | None:
        """Progress as last seen."""
        seen = self.body.get("progress")
        return None if seen is None else _progress(seen)

    def refresh(self) -> Self:
        """Ask the server how the job stands."""
        headers = {} if self._tag is None else {"If-None-Match": self._tag}
        answer = self._client._call("GET", f"/v1/jobs/{self.id}", headers=headers)  # noqa: SLF001
        if answer.status_code == 200:
            self.body = answer.json()
            self._tag = answer.headers.get("ETag")
        return self

    def wait(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
        poll_s: float = 0.5,
    ) -> Self:
        """Return when the job has succeeded.

        Args:
            on_progress: Called whenever the progress has changed.
            timeout_s: Longest wait; the job goes on after it.
            poll_s: Pause between two looks.

        Raises:
            ServiceTimeout: The job had not ended after ``timeout_s``.
            Cancelled: The job was cancelled.
            BitquotaError: The job failed; the error that ended it.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        told: Progress | None = None
        while True:
            self.refresh()
            progress = self.progress
            if on_progress is not None and progress is not None and progress != told:
                on_progress(progress)
                told = progress
            if self.ended:
                self.raise_unless_succeeded()
                return self
            if until is not None and time.monotonic() + poll_s > until:
                raise self.still_running(timeout_s)
            time.sleep(poll_s)

    @property
    def ended(self) -> bool:
        """Whether the job had ended when last seen."""
        return self.status not in {"queued", "running"}

    def raise_unless_succeeded(self) -> None:
        """Raise the error that ended the job, if one did."""
        if self.status == "succeeded":
            return
        if self.body.get("error"):
            raise error_of(self.body["error"])
        if self.status == "cancelled":
            raise Cancelled("the job was cancelled", job=self.id)
        raise MeasurementFailed(f"the job {self.status}", job=self.id)

    def still_running(self, timeout_s: float | None) -> ServiceTimeout:
        """Return the error that says that a wait was too short."""
        msg = (
            f"the job must end within {timeout_s} s; it is {self.status}: wait again, or cancel it"
        )
        return ServiceTimeout(msg, job=self.id, status=self.status)

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """Yield what happens to the job until it has ended, over restarts of the server.

        Args:
            after: Number of the last event that is known already.
        """
        path, last, until = f"/v1/jobs/{self.id}/events", after, None
        http = self._client._http  # noqa: SLF001
        while True:
            try:
                with http.stream("GET", path, headers={"Last-Event-ID": str(last)}) as answer:
                    if answer.status_code >= 400:
                        answer.read()
                        raise _problem(answer)
                    for event in _events(answer.iter_lines()):
                        last, until = event.number, None
                        yield event
            except httpx.TransportError as err:
                until = until or time.monotonic() + self._client._retry_s  # noqa: SLF001
                if time.monotonic() > until:
                    msg = f"the server must be reachable; {http.base_url} is not: {err}"
                    raise ServiceError(msg) from err
                time.sleep(_FIRST_PAUSE_S)
                continue
            if self.refresh().ended:
                return
            time.sleep(_FIRST_PAUSE_S)

    def cancel(self) -> Self:
        """Ask the server to end the job; what was measured is kept there."""
        path = f"/v1/jobs/{self.id}/cancel"
        self.body = self._client._call("POST", path).json()  # noqa: SLF001
        self._tag = None
        return self

    def plan(self, budget: int = 0) -> Plan:
        """Return the plan of the budget at this position; raises ``Conflict`` before the end."""
        return Plan.from_json(json.loads(self.plan_text(budget)))

    def plan_text(self, budget: int = 0) -> str:
        """Return the plan as the canonical JSON text that the server keeps."""
        path = f"/v1/jobs/{self.id}/plan"
        answer = self._client._call("GET", path, params={"budget": budget})  # noqa: SLF001
        return answer.text

    def plans(self) -> tuple[Plan, ...]:
        """Return the plans of all budgets, in the order of the request."""
        body = self._client._call("GET", f"/v1/jobs/{self.id}/plan").json()  # noqa: SLF001
        return tuple(Plan.from_json(plan) for plan in body["data"])

    def sensitivity(self) -> bytes:
        """Return the sensitivity matrix as an ``.npz`` (see ``SensitivityMatrix.from_bytes``)."""
        return self._client._call("GET", f"/v1/jobs/{self.id}/sensitivity").content  # noqa: SLF001

    def report(self) -> str:
        """Return the report of all plans as Markdown."""
        return self._client._call("GET", f"/v1/jobs/{self.id}/report").text  # noqa: SLF001


def _progress(body: Mapping[str, Any]) -> Progress:
    return Progress(
        stage=body["stage"], done=body["done"], total=body["total"], reused=body.get("reused", 0)
    )


def _events(lines: Iterator[str]) -> Iterator[Event]:
    """Yield the events of a text/event-stream; each field of ours is one line."""
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name:
            fields[name] = value.removeprefix(" ")
        elif not line and "data" in fields:
            data = json.loads(fields["data"])
            yield Event(number=int(fields["id"]), kind=fields["event"], data=data)
            fields = {}


def _pieces(path: Path, offset: int = 0) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE):
            yield piece


def _problem(answer: httpx.Response) -> BitquotaError:
    try:
        body = answer.json()
    except ValueError:
        body = None
    return error_of(body, status=answer.status_code)


class AsyncClient:
    """The same client for ``async`` code: each call runs in a thread and can be awaited.

    ``async with AsyncClient(url) as client: job = await client.submit(...)``. Several calls may
    run at once. Cancelling a task stops the waiting, not the request that was sent; use
    ``AsyncJob.cancel`` to end a job.

    Args:
        base_url: As for ``Client``.
        api_key: As for ``Client``.
        retry_s: As for ``Client``.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, retry_s: float = 60.0) -> None:
        self._client = Client(base_url, api_key, retry_s=retry_s)

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
        await asyncio.to_thread(self._client.close)

    async def submit(self, **order: Any) -> AsyncJob:  # noqa: ANN401  # those of Client.submit
        """Order a job; arguments and errors of ``Client.submit``."""
        return AsyncJob(await asyncio.to_thread(self._client.submit, **order))

    async def job(self, job_id: str) -> AsyncJob:
        """Return a job by its id; raises ``NotFound``."""
        return AsyncJob(await asyncio.to_thread(self._client.job, job_id))

    async def solve(self, **order: Any) -> list[JsonObject]:  # noqa: ANN401  # of Client.solve
        """Solve a measured matrix; arguments and errors of ``Client.solve``."""
        return await asyncio.to_thread(self._client.solve, **order)


class AsyncJob:
    """A job on a server, for ``async`` code.

    Attributes:
        job: The job itself.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def id(self) -> str:
        """Its id."""
        return self.job.id

    @property
    def status(self) -> str:
        """Status as last seen."""
        return self.job.status

    async def wait(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
        poll_s: float = 0.5,
    ) -> Self:
        """Return when the job has succeeded; errors of ``Job.wait``. Looks without blocking.

        Args:
            on_progress: Called whenever the progress has changed.
            timeout_s: Longest wait; the job goes on after it.
            poll_s: Pause between two looks.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        told: Progress | None = None
        while True:
            await asyncio.to_thread(self.job.refresh)
            progress = self.job.progress
            if on_progress is not None and progress is not None and progress != told:
                on_progress(progress)
                told = progress
            if self.job.ended:
                self.job.raise_unless_succeeded()
                return self
            if until is not None and time.monotonic() + poll_s > until:
                raise self.job.still_running(timeout_s)
            await asyncio.sleep(poll_s)

    async def cancel(self) -> None:
        """Ask the server to end the job."""
        await asyncio.to_thread(self.job.cancel)

    async def plans(self) -> tuple[Plan, ...]:
        """Return the plans of all budgets."""
        return await asyncio.to_thread(self.job.plans)

    async def plan(self, budget: int = 0) -> Plan:
        """Return the plan of the budget at this position."""
        return await asyncio.to_thread(self.job.plan, budget)
