"""What the endpoints of one server share, and who calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from bitquota.errors import Unauthorized
from bitquota.service.security.keys import HIGHEST_PRIORITY, Caller, Scope, is_key
from bitquota.service.security.sessions import COOKIE, CSRF_HEADER

if TYPE_CHECKING:
    import anyio

    from bitquota.service.api.event_streams import EventStreams
    from bitquota.service.api.metrics import Metrics
    from bitquota.service.jobs.job_store import JobStore
    from bitquota.service.jobs.quotas import AuditLog, Quotas
    from bitquota.service.jobs.webhooks import Webhooks
    from bitquota.service.security.keys import KeyStore
    from bitquota.service.security.oidc import TokenVerifier
    from bitquota.service.security.sessions import Sessions
    from bitquota.service.security.task_pool import TaskPool
    from bitquota.service.settings import Settings
    from bitquota.service.store.artifacts import ArtifactStore
    from bitquota.service.store.blobs import BlobStore
    from bitquota.service.store.database import Database
    from bitquota.service.telemetry import Tracing
    from bitquota.service.worker.supervisor import Supervisor

LOCAL_TENANT = "local"
"""Who uses a server on loopback that has no keys."""

_LOCAL = Caller(
    tenant=LOCAL_TENANT,
    actor="local",
    scopes=frozenset(Scope),
    max_priority=HIGHEST_PRIORITY,
)
_SAFE = frozenset({"GET", "HEAD"})
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_OTHER_SITES = frozenset({"cross-site", "same-site"})
"""What browsers say of requests from elsewhere; another port of this machine is the same site."""
_bearer = HTTPBearer(auto_error=False, description="An API key; none is needed while none exists.")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Stores and settings of one server."""

    settings: Settings
    database: Database
    blobs: BlobStore
    artifacts: ArtifactStore
    jobs: JobStore
    keys: KeyStore
    tokens: TokenVerifier | None
    """What verifies tokens of an OpenID Connect issuer, where one is set."""
    sessions: Sessions
    quotas: Quotas
    audit: AuditLog
    supervisor: Supervisor
    metrics: Metrics
    tracing: Tracing
    webhooks: Webhooks
    event_streams: EventStreams
    readers: TaskPool
    solvers: TaskPool
    writers: anyio.CapacityLimiter
    """Submissions at the same time; without it a flood of them that waits for the database would
    take every thread, and polls would wait behind them."""


async def state_of(request: Request) -> State:
    """Return the state of the server that a request came to."""
    return cast("State", request.app.state.service)


async def caller_of(
    request: Request,
    sent: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> Caller:
    """Return who calls: the holder of the key or token, or on loopback without keys the local user.

    A browser that signed in sends a session cookie instead of a key, and with every request that
    changes something the session's token.

    Raises:
        Unauthorized: No valid key or token was sent and one is needed.
        Forbidden: It lacks the scope that the method needs, or the session's token is missing.
        Unavailable: A token cannot be verified now.
    """
    state = await state_of(request)
    if sent is not None:
        caller = state.keys.remembered(sent.credentials)
        if caller is None:
            tokens = None if is_key(sent.credentials) else state.tokens
            verify = state.keys.verify if tokens is None else tokens.verify
            caller = await run_in_threadpool(verify, sent.credentials)
    elif state.settings.loopback and not await _any_key(state.keys):
        _check_local(request)
        caller = _LOCAL
    elif (cookie := request.cookies.get(COOKIE)) is not None:
        session = await run_in_threadpool(state.sessions.read, cookie)
        if request.method not in _SAFE:
            state.sessions.check_csrf(session, request.headers.get(CSRF_HEADER))
        caller = session.caller
    else:
        msg = "an API key must be sent as 'Authorization: Bearer bq_…'; none was"
        raise Unauthorized(msg)
    caller.require(Scope.READ if request.method in _SAFE else Scope.WRITE)
    request.scope["caller"] = caller
    return caller


async def _any_key(keys: KeyStore) -> bool:
    known = keys.any_remembered()
    return await run_in_threadpool(keys.any) if known is None else known


def _check_local(request: Request) -> None:
    """Refuse what a web page of somebody else could send to a server without keys."""
    host = request.url.hostname or ""
    if host not in _LOCAL_HOSTS or request.headers.get("sec-fetch-site") in _OTHER_SITES:
        msg = (
            "without API keys this server answers only to programs of this machine; the request "
            f"was for the host '{host}' or came from another site: create a key"
        )
        raise Unauthorized(msg)


async def request_id(request: Request) -> str:
    """Return the id of a request."""
    return str(request.scope.get("request_id", ""))


Service = Annotated[State, Depends(state_of)]
Calling = Annotated[Caller, Depends(caller_of)]
RequestId = Annotated[str, Depends(request_id)]
