"""What can be asked of a server, written once for both clients (see ``bitquota.client.effects``).

Design: docs/design/client.md
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
import time
import uuid
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bitquota.client.effects import Answer, Call, Compute, Give, Pause, Send, Steps, Unreachable
from bitquota.client.requests import BUSY, FIRST_PAUSE_S, Requests, error_in
from bitquota.client.sources import source_of
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.cost_table import CostTable
    from bitquota.canonical import JsonObject
    from bitquota.client.job_calls import JobCalls
    from bitquota.client.sources import Source, Upload
    from bitquota.request import PlanRequest

J = TypeVar("J", bound="JobCalls")
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
        tables: Sequence[CostTable] = (),
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
            tables: What prices budgets of time and energy.
            gap: Relative gap to stop at.
            time_limit_s: For each budget, reading what was sent included.
            seed: Of the search.
        """
        body: JsonObject = {
            "budgets": list(budgets), "gap": gap, "time_limit_s": time_limit_s, "seed": seed,
        }  # fmt: skip
        if tables:
            body["tables"] = [table.to_json() for table in tables]
        if job is not None:
            body["job"] = job
        if matrix is not None:
            text = matrix if isinstance(matrix, str) else base64.b64encode(matrix).decode()
            body["matrix"] = text
        send = Send(method="POST", path="/v1/solve", json=body)
        answer = yield from self.sent(send)
        return [dict(entry) for entry in json.loads(answer.content)["data"]]

    @Call
    def solve_problem(
        self,
        problem: JsonObject,
        *,
        explain: bool = False,
        gap: float = 1e-4,
        time_limit_s: float = 0.1,
        seed: int = 0,
    ) -> Steps[JsonObject]:
        """Solve a problem at once: what ``bitquota solve --json`` prints for the same document.

        Args:
            problem: A problem document (``bitquota solve --schema``); its ``matrix`` is the id of
                a job, the digest of an upload, or base64 of the file.
            explain: Add what the bits of each group cost and buy.
            gap: Relative gap to stop at.
            time_limit_s: For each solve.
            seed: Of the search.
        """
        body = {
            "problem": problem, "explain": explain, "gap": gap, "time_limit_s": time_limit_s,
            "seed": seed,
        }  # fmt: skip
        answer = yield from self.sent(Send(method="POST", path="/v1/solve", json=body))
        found: JsonObject = json.loads(answer.content)
        return {name: value for name, value in found.items() if name != "object"}

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
        with tempfile.TemporaryDirectory(prefix="bitquota-") as scratch:
            source = yield Compute(function=partial(source_of, upload, Path(scratch)))
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
            wait = FIRST_PAUSE_S
            try:
                answer: Answer = yield send
                if answer.status < 400:
                    return str(json.loads(answer.content)["id"])
                failure = error_in(answer)
                # 409: the server has not noticed the broken connection yet.
                if answer.status not in BUSY | {409}:
                    raise failure
                with contextlib.suppress(ValueError):
                    wait = max(wait, float(answer.headers.get("retry-after", "")))
            except Unreachable as err:
                failure = self.unreachable(err)
                failure.__cause__ = err
            if time.monotonic() + wait > until:
                raise failure
            yield Pause(seconds=wait)
