"""Endpoints for operators: health, readiness and Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

import bitquota
from bitquota.errors import StorageFull, Unavailable
from bitquota.service.database import jobs
from bitquota.service.job import JobStatus
from bitquota.service.problems import problem_response
from bitquota.service.schemas import Problem
from bitquota.service.state import Service, caller_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from bitquota.service.state import State

router = APIRouter(tags=["operations"])
_PROBE_BYTES = 4096
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


class Metrics:
    """What one server counts; a registry of its own, so that two servers can share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter(
            "bitquota_requests", "Requests by route template.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "bitquota_request_seconds",
            "Seconds until the answer began, by route template.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.uploaded = Counter(
            "bitquota_uploaded_bytes", "Bytes of uploads that were kept.", registry=self.registry
        )
        self.jobs = Gauge(
            "bitquota_jobs", "Jobs in the database.", ("status",), registry=self.registry
        )
        self.oldest = Gauge(
            "bitquota_oldest_queued_seconds",
            "Age of the oldest job that waits.",
            registry=self.registry,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)

    def collect(self, state: State, now: float) -> bytes:
        """Return everything in Prometheus' text format; job counts come from the database."""

        def work(connection: Connection) -> tuple[dict[str, int], float | None]:
            counted = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
            waiting = sa.select(sa.func.min(jobs.c.created_at)).where(
                jobs.c.status == JobStatus.QUEUED.value
            )
            found = {str(row[0]): int(row[1]) for row in connection.execute(counted)}
            return found, connection.execute(waiting).scalar()

        counts, oldest = state.database.read(work)
        for status in JobStatus:
            self.jobs.labels(status.value).set(counts.get(status.value, 0))
        self.oldest.set(0.0 if oldest is None else max(0.0, now - oldest))
        return generate_latest(self.registry)


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok", "version": bitquota.__version__}


@router.get(
    "/readyz", responses={503: {"model": Problem}}, response_model=dict[str, str | dict[str, bool]]
)
def readyz(service: Service, request: Request) -> Response:
    """Say whether jobs can be taken: database, data folder and supervisor; 503 if not."""
    wrong = {
        "database": service.database.unready(),
        "data_dir": _why_not_written(service),
        "supervisor": None if _supervised(service) else "the supervisor has ended",
    }
    checks = {name: why is None for name, why in wrong.items()}
    if all(checks.values()):
        return JSONResponse({"status": "ready", "checks": checks})
    said = "; ".join(f"{name}: {why}" for name, why in wrong.items() if why is not None)
    error = Unavailable(f"the server must be able to take jobs; it cannot: {said}", **checks)
    return problem_response(error, status=503, request=request)


@router.get(
    "/metrics",
    response_class=Response,
    dependencies=[Depends(caller_of)],
    responses={
        200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."},
        401: {"model": Problem},
    },
)
def metrics(request: Request, service: Service) -> Response:
    """Return what this server counts; a key with the scope `read` is needed where keys exist."""
    body = service.metrics.collect(service, request.app.state.clock())
    return Response(body, media_type=CONTENT_TYPE_LATEST)


def _supervised(service: State) -> bool:
    return service.supervisor.alive and not service.supervisor.stopping


def _why_not_written(service: State) -> str | None:
    """Return why nothing can be written to the data folder, or ``None`` if it can."""
    try:
        service.blobs.check_room(0, service.settings.min_free_bytes)
        incoming = service.blobs.incoming(_PROBE_BYTES)
        try:
            incoming.write(bytes(_PROBE_BYTES))
            incoming.flush()
        finally:
            incoming.discard()
    except StorageFull:
        return f"the disk is full; {service.blobs.free():,} bytes are free"
    except Unavailable:
        return "it is read-only"
    except OSError as err:
        return err.strerror or str(err)
    return None
