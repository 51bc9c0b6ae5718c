"""Endpoints for operators: health, readiness and Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

import bitquota
from bitquota.errors import StorageFull, Unavailable
from bitquota.service.api.problem_responses import problem_response
from bitquota.service.api.schemas import Problem
from bitquota.service.api.state import Service, caller_of

if TYPE_CHECKING:
    from bitquota.service.api.state import State

router = APIRouter(tags=["operations"])
_PROBE_BYTES = 4096


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
    now = request.app.state.clock()
    body = service.metrics.collect(service.database, now, service.blobs.free())
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
