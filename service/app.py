"""The REST application: ``uvicorn bitquota.service.app:create_app --factory``.

It holds no state of its own and imports no torch: jobs live in the database, files in the blob
store, and models are only ever opened in an evaluator process.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI

import bitquota
from bitquota.service.api import job_routes, operations, plan_rows
from bitquota.service.api import problem_responses as problems
from bitquota.service.api import solve_routes as solving
from bitquota.service.api import upload_routes as uploads
from bitquota.service.api.event_streams import EventStreams
from bitquota.service.api.metrics import Metrics
from bitquota.service.api.middleware import Envelope
from bitquota.service.api.state import State
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.quotas import AuditLog, Quotas
from bitquota.service.jobs.webhooks import Webhooks
from bitquota.service.security.keys import KeyStore
from bitquota.service.security.oidc import token_verifier
from bitquota.service.security.sessions import Sessions
from bitquota.service.security.task_pool import TaskPool
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.blobs import blob_store
from bitquota.service.store.database import Database
from bitquota.service.store.storage_errors import require_writable
from bitquota.service.telemetry import TracedRequests, Tracing
from bitquota.service.web import pages, pages_data
from bitquota.service.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ORDERS_AT_ONCE = 8
_DESCRIPTION = """Certified mixed-precision bit allocation: upload a model and a calibration set,
submit a job with budgets, get the best bit-width of every layer with proof of how good it is."""


def create_app(settings: Settings | None = None, *, tracing: Tracing | None = None) -> FastAPI:
    """Return the application; settings come from ``BITQUOTA_*`` variables when not given.

    ``tracing`` is what the standard ``OTEL_…`` variables say, when not given.
    """
    chosen = Settings.from_environment() if settings is None else settings
    require_writable(chosen.data_dir)
    database = Database(chosen.url)
    database.create()
    jobs = JobStore(database, time.time)
    keys = KeyStore(database, time.time)

    # Everything that requests share.
    state = State(
        settings=chosen,
        database=database,
        blobs=blob_store(chosen),
        artifacts=ArtifactStore(database, time.time),
        jobs=jobs,
        keys=keys,
        tokens=token_verifier(chosen),
        sessions=Sessions(chosen.data_dir / "session-secret", keys, database, time.time),
        quotas=Quotas(database, chosen, time.time),
        audit=AuditLog(database, time.time),
        supervisor=Supervisor(chosen, database, jobs),
        metrics=Metrics(),
        tracing=Tracing() if tracing is None else tracing,
        webhooks=Webhooks(chosen, database, time.time),
        event_streams=EventStreams(chosen.max_event_streams),
        readers=TaskPool(
            chosen.readers,
            memory_bytes=chosen.reader_memory_bytes,
            time_limit_s=chosen.reader_limit_s,
            nice=chosen.nice,
        ),
        solvers=TaskPool(
            chosen.solvers,
            memory_bytes=chosen.reader_memory_bytes,
            time_limit_s=chosen.solver_limit_s,
            nice=0,
        ),
        writers=anyio.CapacityLimiter(_ORDERS_AT_ONCE),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        from starlette.concurrency import run_in_threadpool

        state.supervisor.start()
        state.webhooks.start()
        yield
        state.readers.close()
        state.solvers.close()
        await run_in_threadpool(state.webhooks.stop)
        await run_in_threadpool(state.supervisor.stop)
        await run_in_threadpool(state.tracing.close)
        database.close()

    # The application: middleware around routers.
    app = FastAPI(
        title="Bitquota",
        version=bitquota.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.service = state
    app.state.clock = time.time
    problems.install(app)
    app.add_middleware(TracedRequests, tracing=state.tracing)
    app.add_middleware(
        Envelope,
        max_body_bytes=chosen.max_body_bytes,
        streamed=frozenset({solving.PATH}),
        observe=state.metrics.observe,
    )
    app.include_router(plan_rows.router)  # before the path of one job
    app.include_router(job_routes.router)  # early: polls are most of all requests
    app.include_router(uploads.router)
    app.include_router(solving.router)
    app.include_router(operations.router)
    app.include_router(pages_data.router)
    app.include_router(pages.router)

    describe_problems(app)
    return app


def describe_problems(app: FastAPI) -> None:
    """Have the OpenAPI document say that errors are problem+json, which FastAPI takes for JSON."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
            for path in document["paths"].values():
                for operation in path.values():
                    answers = operation["responses"]
                    # Any request can be malformed or too large.
                    for status in ("413", "422"):
                        answers.setdefault(status, {"description": HTTPStatus(int(status)).phrase})
                    for status, answer in answers.items():
                        if status >= "400":
                            answer["content"] = {problems.MEDIA_TYPE: problem}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
