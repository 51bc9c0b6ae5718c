"""What can be asked of a job, written once for both clients (see ``bitquota.client.effects``).

Design: docs/design/client.md
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bitquota.client.effects import (
    Answer,
    Call,
    Close,
    Give,
    NextLine,
    Open,
    Pause,
    Send,
    Steps,
    Unreachable,
)
from bitquota.client.requests import FIRST_PAUSE_S, Requests, error_in
from bitquota.errors import Cancelled, InvalidInput, MeasurementFailed, ServiceTimeout
from bitquota.estimate import JobEstimate
from bitquota.plan import Plan
from bitquota.problems import error_of
from bitquota.progress import Progress
from bitquota.report.comparison import Comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bitquota.canonical import JsonObject

_DEFAULT_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job."""

    number: int
    kind: str
    data: JsonObject


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
        pause = FIRST_PAUSE_S
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
                yield Pause(seconds=FIRST_PAUSE_S)
                continue
            yield from self._refreshed()
            if self.ended:
                return
            yield Pause(seconds=FIRST_PAUSE_S)

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
