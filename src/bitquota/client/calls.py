"""Every call of the client, written once (see ``bitquota.client.effects``).

Design: docs/design/client.md
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
import uuid
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from bitquota.client.effects import (
    Answer,
    Call,
    Close,
    Compute,
    Give,
    NextLine,
    Open,
    Pause,
    Send,
    Steps,
    Unreachable,
)
from bitquota.client.problems import error_in, error_of
from bitquota.client.sources import source_of
from bitquota.errors import Cancelled, InvalidInput, MeasurementFailed, ServiceError, ServiceTimeout
from bitquota.estimate import JobEstimate
from bitquota.plan import Plan
from bitquota.progress import Progress
from bitquota.report.comparison import Comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.client.sources import Source, Upload
    from bitquota.errors import BitquotaError
    from bitquota.request import PlanRequest

J = TypeVar("J", bound="JobCalls")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_DEFAULT_POLL_S = 0.5
_BUSY = frozenset({429, 503})
_PLACES = {
    "model": "models",
    "original": "models",
    "dataset": "datasets",
    "correction_data": "datasets",
    "plan": "plans",
    "plans": "plans",
    "matrix": "matrices",
    "quantized": "quantized",
}
"""Where the uploads of a submission's inputs go, by role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job."""

    number: int
    kind: str
    data: JsonObject


class Requests:
    """Sends requests, and repeats them while the server cannot be reached or is busy.

    Every request of this client may be repeated: submissions carry a key, uploads their offset.

    Attributes:
        base_url: Of the server.
        retry_s: How long requests are repeated.
    """

    base_url: str
    retry_s: float

    def sent(self, send: Send, *, quiet: frozenset[int] = frozenset()) -> Steps[Answer]:
        """Return a good answer, or one with a status in ``quiet``; else raise its error."""
        until = time.monotonic() + self.retry_s
        pause = _FIRST_PAUSE_S
        while True:
            failure: BitquotaError
            wait = pause
            try:
                answer: Answer = yield send
                if answer.status < 400 or answer.status in quiet:
                    return answer
                failure = error_in(answer)
                if answer.status not in _BUSY:
                    raise failure
                with contextlib.suppress(ValueError):
                    wait = max(pause, float(answer.headers.get("retry-after", "")))
            except Unreachable as err:
                failure = self.unreachable(err)
                failure.__cause__ = err
            if time.monotonic() + wait > until:
                raise failure
            yield Pause(seconds=wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def unreachable(self, err: Unreachable) -> BitquotaError:
        """Return the error that a missing answer is for the user."""
        if err.timed_out:
            return ServiceTimeout(f"the server must answer; it did not in time: {err}")
        return ServiceError(
            f"the server must be reachable; {self.base_url} is not: {err}; check the address, or "
            "start one with 'bitquota serve'"
        )

    def got(self, path: str, **params: Any) -> Steps[Answer]:  # noqa: ANN401  # of a query
        """Return the answer to a GET."""
        return (yield from self.sent(Send(method="GET", path=path, params=params)))


class ServerCalls(Requests, Generic[J]):
    """What can be asked of a server."""

    @abstractmethod
    def make_job(self, body: JsonObject) -> J:
        """Return the job that a body describes."""

    @Call
    def reach(self) -> Steps[None]:
        """Return once the server answers; raises ``ServiceError`` when it does not."""
        yield from self.got("/healthz")

    @Call
    def order(
        self,
        /,
        kind: str,
        request: Mapping[str, Any] | PlanRequest,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
        **inputs: Upload | Sequence[Upload] | None,
    ) -> Steps[J]:
        """Upload what the server does not have yet, and submit a job of any kind.

        Args:
            kind: plan, measure, solve, frontier, evaluate, export, compare, …
            request: What to do, as the kind's schema says.
            labels: Names and values to find the job by.
            priority: Higher runs earlier.
            deadline_s: Seconds until the job must have ended.
            webhook: URL that is told when the job has ended.
            idempotency_key: Submissions under one key are one job; the default is a new key.
            **inputs: Uploads by role: ``model``, ``original``, ``dataset``,
                ``correction_data``, ``plan``, ``plans``, ``matrix``, ``quantized``; each a
                file, ``sha256:…``, bytes or a plan.

        Raises:
            InvalidInput: The server cannot use what was handed in (the subclass says what).
            ServiceError: The server, or the way to it, failed.
        """
        body: JsonObject = {
            "kind": kind,
            "request": dict(request) if not hasattr(request, "to_json") else request.to_json(),
            "labels": dict(labels or {}),
            "priority": priority,
        }
        for role, given in inputs.items():
            if given is None:
                continue
            if role not in _PLACES:
                msg = f"the inputs of a job are {', '.join(_PLACES)}; got '{role}'"
                raise InvalidInput(msg, role=role)
            where = f"/v1/{_PLACES[role]}"
            if isinstance(given, list | tuple):
                body[role] = []
                for one in given:
                    body[role].append((yield from self._uploaded(where, one)))
            else:
                body[role] = yield from self._uploaded(where, given)  # type: ignore[arg-type]
        if deadline_s is not None:
            body["deadline_s"] = deadline_s
        if webhook is not None:
            body["webhook"] = webhook
        # The key makes a repeat after a lost answer harmless.
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        send = Send(method="POST", path="/v1/jobs", json=body, headers=headers)
        return self.make_job(json.loads((yield from self.sent(send)).content))

    @Call
    def submit(
        self,
        /,
        *,
        model: Upload,
        calibration: Upload,
        request: PlanRequest,
        kind: str = "plan",
        **options: Any,  # noqa: ANN401  # those of order
    ) -> Steps[J]:
        """Submit a job that plans.

        Args:
            model: A file, or ``sha256:…`` of an upload.
            calibration: A file, or ``sha256:…`` of an upload.
            request: What to do.
            kind: ``plan``, or ``measure`` for the sensitivity matrix alone.
            **options: Those of ``order``.
        """
        return (
            yield from ServerCalls.order.steps(
                self, kind, request, model=model, dataset=calibration, **options
            )
        )

    @Call
    def estimate(
        self,
        /,
        *,
        model: Upload,
        calibration: Upload,
        request: PlanRequest,
        job: str = "plan",
        **options: Any,  # noqa: ANN401  # those of order
    ) -> Steps[J]:
        """Submit a job that says what another would take; ``Job.estimate`` fetches the answer.

        Args:
            model: A file, or ``sha256:…`` of an upload.
            calibration: A file, or ``sha256:…`` of an upload.
            request: What the other job would do.
            job: The other job: ``plan``, ``measure`` or ``compare``.
            **options: Those of ``order``.
        """
        body = {"job": job, "plan": request.to_json()}
        return (
            yield from ServerCalls.order.steps(
                self, "estimate", body, model=model, dataset=calibration, **options
            )
        )

    @Call
    def solve(
        self,
        *,
        budgets: Sequence[str],
        job: str | None = None,
        matrix: bytes | str | None = None,
        gap: float = 1e-4,
        time_limit_s: float = 0.1,
        seed: int = 0,
    ) -> Steps[list[JsonObject]]:
        """Solve a measured matrix for each budget at once; nothing is measured.

        Args:
            budgets: What to solve for.
            job: A job that left a matrix.
            matrix: Or ``sha256:…`` of an uploaded matrix, or the matrix itself, as
                ``Job.sensitivity`` returns it.
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
            text = matrix if isinstance(matrix, str) else base64.b64encode(matrix).decode()
            body["matrix"] = text
        send = Send(method="POST", path="/v1/solve", json=body)
        answer = yield from self.sent(send)
        return [dict(entry) for entry in json.loads(answer.content)["data"]]

    @Call
    def upload(self, kind: str, upload: Upload) -> Steps[str]:
        """Return the digest of an upload after sending it, if the server has it not.

        Args:
            kind: ``model``, ``dataset``, ``plan`` or ``matrix``.
            upload: A file, bytes or a plan.
        """
        if kind not in _PLACES:
            msg = f"an upload must be a model, dataset, plan or matrix; got '{kind}'"
            raise InvalidInput(msg)
        return (yield from self._uploaded(f"/v1/{_PLACES[kind]}", upload))

    @Call
    def download(self, kind: str, digest: str) -> Steps[bytes]:
        """Return the bytes of an upload, or of a plan or matrix that a job left."""
        answer = yield from self.got(f"/v1/{_PLACES[kind]}/{digest}/content")
        return answer.content

    @Call
    def job(self, job_id: str) -> Steps[J]:
        """Return a job by its id; raises ``NotFound``."""
        answer = yield from self.got(f"/v1/jobs/{job_id}")
        return self.make_job(json.loads(answer.content))

    def job_steps(
        self, status: str | None, kind: str | None, labels: Mapping[str, str] | None
    ) -> Steps[None]:
        """Give all jobs, newest first."""
        given = {"status": status, "kind": kind}
        parameters: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        parameters["label"] = [f"{name}={value}" for name, value in (labels or {}).items()]
        while True:
            page = json.loads((yield from self.got("/v1/jobs", **parameters)).content)
            for body in page["data"]:
                yield Give(value=self.make_job(body))
            if not page["has_more"]:
                return
            parameters["cursor"] = page["next_cursor"]

    def _uploaded(self, where: str, upload: Upload) -> Steps[str]:
        if isinstance(upload, str) and upload.startswith("sha256:"):
            return upload
        source = source_of(upload)
        name: str = yield Compute(function=source.sha256)
        send = Send(method="GET", path=f"{where}/sha256:{name}")
        known = yield from self.sent(send, quiet=frozenset({404}))
        if known.status < 400:
            return f"sha256:{name}"
        return (yield from self._send_pieces(where, source, name))

    def _send_pieces(self, where: str, source: Source, name: str) -> Steps[str]:
        """Upload; when the connection breaks, go on where the server has it."""
        until = time.monotonic() + self.retry_s
        while True:
            there = yield from self.got(f"{where}/sha256:{name}/upload")
            offset = int(json.loads(there.content)["received"])
            parameters: dict[str, str | int] = {
                "sha256": name, "name": source.name, "offset": offset,
                "total": max(source.size, 1),
            }  # fmt: skip
            send = Send(
                method="PUT",
                path=where,
                params=parameters,
                headers={"Content-Length": str(source.size - offset)},
                pieces=lambda offset=offset: source.pieces(offset),  # type: ignore[misc]
            )
            wait = _FIRST_PAUSE_S
            try:
                answer: Answer = yield send
                if answer.status < 400:
                    return str(json.loads(answer.content)["id"])
                failure = error_in(answer)
                # 409: the server has not noticed the broken connection yet.
                if answer.status not in _BUSY | {409}:
                    raise failure
                with contextlib.suppress(ValueError):
                    wait = max(wait, float(answer.headers.get("retry-after", "")))
            except Unreachable as err:
                failure = self.unreachable(err)
                failure.__cause__ = err
            if time.monotonic() + wait > until:
                raise failure
            yield Pause(seconds=wait)


class JobCalls:
    """A job on a server.

    Attributes:
        id: Its id.
        body: The job as the server last described it.
    """

    def __init__(self, requests: Requests, body: JsonObject) -> None:
        self.requests = requests
        self.id = str(body["id"])
        self.body = body
        self._tag: str | None = None

    def __repr__(self) -> str:
        """Name the job and its status."""
        return f"<{type(self).__name__} {self.id} {self.status}>"

    @property
    def page(self) -> str:
        """Address of the page that shows it to a person."""
        return f"{self.requests.base_url.rstrip('/')}/jobs/{self.id}"

    @property
    def status(self) -> str:
        """Status as last seen: queued, running, succeeded, failed, cancelled or expired."""
        return str(self.body["status"])

    @property
    def progress(self) -> Progress | None:
        """Progress as last seen."""
        seen = self.body.get("progress")
        return None if seen is None else _progress(seen)

    @property
    def ended(self) -> bool:
        """Whether the job had ended when last seen."""
        return self.status not in {"queued", "running"}

    @property
    def results(self) -> JsonObject:
        """Digests of what the job left, by name."""
        return dict(self.body.get("results") or {})

    def raise_unless_succeeded(self) -> None:
        """Raise the error that ended the job, if one did."""
        if self.status == "succeeded":
            return
        if self.body.get("error"):
            raise error_of(self.body["error"])
        if self.status == "cancelled":
            raise Cancelled("the job was cancelled", job=self.id)
        raise MeasurementFailed(f"the job {self.status}", job=self.id)

    def _refreshed(self) -> Steps[Answer]:
        headers = {} if self._tag is None else {"If-None-Match": self._tag}
        send = Send(method="GET", path=f"/v1/jobs/{self.id}", headers=headers)
        answer = yield from self.requests.sent(send)
        if answer.status == 200:
            self.body = json.loads(answer.content)
            self._tag = answer.headers.get("etag")
        return answer

    @Call
    def refresh(self) -> Steps[Self]:
        """Ask the server how the job stands."""
        yield from self._refreshed()
        return self

    @Call
    def wait(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
        poll_s: float | None = None,
        by_events: bool = False,
    ) -> Steps[Self]:
        """Return when the job has succeeded.

        Args:
            on_progress: Called whenever the progress has changed.
            timeout_s: Longest wait; the job goes on after it. Not with ``by_events``.
            poll_s: Pause between two looks; by default short at first, and then what the server
                asks for.
            by_events: Follow the job's events instead of looking again and again.

        Raises:
            ServiceTimeout: The job had not ended after ``timeout_s``.
            Cancelled: The job was cancelled.
            BitquotaError: The job failed; the error that ended it.
        """
        if by_events:
            if timeout_s is not None:
                msg = "waiting for events has no time limit: leave out timeout_s or by_events"
                raise InvalidInput(msg)
            yield from self._wait_by_events(on_progress)
        else:
            yield from self._wait_by_looks(on_progress, timeout_s, poll_s)
        self.raise_unless_succeeded()
        return self

    def _wait_by_looks(
        self,
        on_progress: Callable[[Progress], None] | None,
        timeout_s: float | None,
        poll_s: float | None,
    ) -> Steps[None]:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        told: Progress | None = None
        pause = _FIRST_PAUSE_S
        while True:
            answer = yield from self._refreshed()
            progress = self.progress
            if on_progress is not None and progress is not None and progress != told:
                on_progress(progress)
                told = progress
            if self.ended:
                return
            asked = _DEFAULT_POLL_S
            with contextlib.suppress(ValueError):
                asked = float(answer.headers.get("retry-after", ""))
            pause = min(1.5 * pause, asked)
            wait = pause if poll_s is None else poll_s
            if until is not None and time.monotonic() + wait > until:
                msg = (
                    f"the job must end within {timeout_s} s; it is {self.status}: wait again, or "
                    "cancel it"
                )
                raise ServiceTimeout(msg, job=self.id, status=self.status)
            yield Pause(seconds=wait)

    def _wait_by_events(self, on_progress: Callable[[Progress], None] | None) -> Steps[None]:
        steps = self.event_steps(0)
        outcome: Any = None
        failure: BaseException | None = None
        while True:
            try:
                effect = steps.send(outcome) if failure is None else steps.throw(failure)
            except StopIteration:
                return
            outcome = failure = None
            if isinstance(effect, Give):
                event: Event = effect.value
                if on_progress is not None and event.kind == "progress":
                    on_progress(_progress(event.data))
                continue
            try:
                outcome = yield effect
            except Unreachable as err:
                failure = err

    def event_steps(self, after: int) -> Steps[None]:
        """Give what happens to the job until it has ended, over restarts of the server."""
        last, until = after, None
        while True:
            try:
                answer: Answer = yield Open(
                    path=f"/v1/jobs/{self.id}/events", headers={"Last-Event-ID": str(last)}
                )
                if answer.status >= 400:
                    raise error_in(answer)
                try:
                    fields: dict[str, str] = {}
                    while (line := (yield NextLine())) is not None:
                        event = _event(line, fields)
                        if event is not None:
                            last, until = event.number, None
                            yield Give(value=event)
                finally:
                    yield Close()
            except Unreachable as err:
                until = until or time.monotonic() + self.requests.retry_s
                if time.monotonic() > until:
                    raise self.requests.unreachable(err) from err
                yield Pause(seconds=_FIRST_PAUSE_S)
                continue
            yield from self._refreshed()
            if self.ended:
                return
            yield Pause(seconds=_FIRST_PAUSE_S)

    @Call
    def cancel(self) -> Steps[Self]:
        """Ask the server to end the job; what was measured is kept there."""
        send = Send(method="POST", path=f"/v1/jobs/{self.id}/cancel")
        self.body = json.loads((yield from self.requests.sent(send)).content)
        self._tag = None
        return self

    def _below(self, last: str, **params: int) -> Steps[Answer]:
        return (yield from self.requests.got(f"/v1/jobs/{self.id}/{last}", **params))

    @Call
    def plan(self, budget: int = 0) -> Steps[Plan]:
        """Return the plan of the budget at this position; raises ``Conflict`` before the end."""
        answer = yield from self._below("plan", budget=budget)
        return Plan.from_json(json.loads(answer.content))

    @Call
    def plan_text(self, budget: int = 0) -> Steps[str]:
        """Return the plan as the canonical JSON text that the server keeps."""
        return (yield from self._below("plan", budget=budget)).content.decode()

    @Call
    def plans(self) -> Steps[tuple[Plan, ...]]:
        """Return the plans of all budgets, in the order of the request."""
        body = json.loads((yield from self._below("plan")).content)
        return tuple(Plan.from_json(plan) for plan in body["data"])

    @Call
    def sensitivity(self) -> Steps[bytes]:
        """Return the sensitivity matrix as an ``.npz`` (see ``SensitivityMatrix.from_bytes``)."""
        return (yield from self._below("sensitivity")).content

    @Call
    def certificate(self, budget: int = 0) -> Steps[bytes]:
        """Return the certificate of a plan's or a solution's bound, for ``bitquota verify``."""
        return (yield from self._below("certificate", budget=budget)).content

    @Call
    def quantized(self, budget: int = 0) -> Steps[bytes]:
        """Return the quantized weights of a plan that names some, as a safetensors file."""
        return (yield from self._below("quantized", budget=budget)).content

    @Call
    def report(self) -> Steps[str]:
        """Return the report as Markdown."""
        return (yield from self._below("report")).content.decode()

    @Call
    def result(self, path: str) -> Steps[Any]:
        """Return a result that is JSON: ``solution``, ``frontier``, ``evaluation``, ``receipt``."""
        return json.loads((yield from self._below(path)).content)

    @Call
    def comparison(self) -> Steps[Comparison]:
        """Return what a compare job found."""
        return Comparison.from_json(json.loads((yield from self._below("comparison")).content))

    @Call
    def estimate(self) -> Steps[JobEstimate]:
        """Return what an estimate job found."""
        return JobEstimate.from_json(json.loads((yield from self._below("estimate")).content))

    @Call
    def save(self, path: str, target: Path | str) -> Steps[Path]:
        """Write a result of any size to a file, such as the ``archive`` of an export."""
        place = Path(target)
        send = Send(method="GET", path=f"/v1/jobs/{self.id}/{path}", save_to=place)
        yield from self.requests.sent(send)
        return place


def _progress(body: Mapping[str, Any]) -> Progress:
    return Progress(
        stage=body["stage"],
        done=body["done"],
        total=body["total"],
        reused=body.get("reused", 0),
        fraction=body.get("fraction"),
        left_s=body.get("left_s"),
    )


def _event(line: str, fields: dict[str, str]) -> Event | None:
    """Take one line of a text/event-stream; each field of ours is one line."""
    name, colon, value = line.partition(":")
    if colon and name:
        fields[name] = value.removeprefix(" ")
    elif not line and "data" in fields:
        data = json.loads(fields["data"])
        event = Event(number=int(fields["id"]), kind=fields["event"], data=data)
        fields.clear()
        return event
    return None
