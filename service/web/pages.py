"""The web pages: sign in, upload and submit, watch a job, look at a model, choose a plan.

They are HTML around the REST API: what they change, they change through it. Nothing is inline and
nothing comes from elsewhere, so the content security policy allows only our own files.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, RedirectResponse

from bitquota.candidates.storage import WEIGHT_BITS
from bitquota.candidates.targets import TARGETS
from bitquota.candidates.zero_bits import ALLOWED_WORDS
from bitquota.corrections import CORRECTION_WORDS
from bitquota.errors import BitquotaError, Forbidden, NotFound, Unauthorized
from bitquota.report.page import SCRIPTS
from bitquota.report.text import format_size
from bitquota.request import (
    AUTO_LOSS,
    DEFAULT_WEIGHT_BITS,
    EFFORTS,
    ITERATIONS,
    LOSSES,
    ROUNDINGS,
)
from bitquota.service.api.schemas import job_view
from bitquota.service.api.state import Calling, Service, State, caller_of, state_of
from bitquota.service.security.keys import Caller, Scope  # FastAPI reads them
from bitquota.service.security.sessions import COOKIE, FORM_COOKIE, LIFETIME_S
from bitquota.service.web import pages_data

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bitquota.canonical import JsonObject

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; worker-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOLDERS = (("bitquota", "assets"), ("bitquota.service.web", "static"))
_MAX_FORM_BYTES = 4096
_LISTED = 25
"""Jobs that the first page comes with; the stream of changes brings as many again."""

MOST_COMPARED = 6
"""Jobs whose frontiers one drawing shows: as many as it has colours and lines to tell apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewer:
    """Who looks at a page, and the token that its requests must carry."""

    caller: Caller
    csrf_token: str
    signed_in: bool


class PageRoute(APIRoute):
    """A route whose errors are pages too; who is not signed in is sent there."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route, with errors turned into pages."""
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                return await handle(request)
            except Unauthorized as error:
                state = await state_of(request)
                local = state.settings.loopback and not await run_in_threadpool(state.keys.any)
                if local or request.method != "GET":
                    return _problem(error)  # a key would not help
                target = request.url.path
                return RedirectResponse(f"/sign-in?next={quote(target)}", status_code=303)
            except BitquotaError as error:
                return _problem(error)

        return handle_page


router = APIRouter(include_in_schema=False, route_class=PageRoute)


async def viewer_of(request: Request, caller: Calling, service: Service) -> Viewer:
    """Return who looks at a page; raises ``Unauthorized`` like every request of the API."""
    cookie = request.cookies.get(COOKIE)
    token = ""
    if cookie is not None and caller.actor != "local" and "authorization" not in request.headers:
        token = (await run_in_threadpool(service.sessions.read, cookie)).csrf_token
    return Viewer(caller=caller, csrf_token=token, signed_in=bool(token))


Viewing = Annotated[Viewer, Depends(viewer_of)]


# -------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A file that pages load; its address changes with its content."""

    data: bytes
    media_type: str
    version: str


@cache
def assets() -> dict[str, Asset]:
    """Return every file that pages may load, by name."""
    found = {}
    for package, folder in _FOLDERS:
        for file in resources.files(package).joinpath(folder).iterdir():
            suffix = "." + file.name.rpartition(".")[2]
            if suffix in _TYPES:
                data = file.read_bytes()
                found[file.name] = Asset(
                    data=data,
                    media_type=_TYPES[suffix],
                    version=hashlib.sha256(data).hexdigest()[:12],
                )
    return found


def asset_url(name: str) -> str:
    """Return where a file is served, forever."""
    return f"/static/{assets()[name].version}/{name}"


@router.get("/static/{version}/{name}")
async def static(version: str, name: str) -> Response:
    """Return a file of the pages; it may be kept for ever under this address."""
    asset = assets().get(name)
    if asset is None or asset.version != version:
        msg = f"the file must be one of this version; there is no '{name}' of version '{version}'"
        raise NotFound(msg)
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(asset.data, media_type=asset.media_type, headers=headers)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("bitquota.service.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(asset=asset_url, drawing_scripts=SCRIPTS)
    environment.filters["size"] = format_size
    return environment


def _render(name: str, *, viewer: Viewer | None, status: int = 200, **values: object) -> Response:
    text = _templates().get_template(name).render(viewer=viewer, **values)
    return HTMLResponse(
        text, status_code=status, headers={"Content-Security-Policy": _POLICY, "Vary": "Cookie"}
    )


def _problem(error: BitquotaError) -> Response:
    title = (type(error).__doc__ or "").strip().splitlines()[0]
    return _render(
        "problem.html", viewer=None, status=error.http_status, title=title, detail=error.message
    )


# -------------------------------------------------------------------------------- sign in


@router.get("/sign-in")
async def sign_in_form(
    request: Request, service: Service, target: Annotated[str, Query(alias="next")] = "/"
) -> Response:
    """Ask for an API key; on loopback without keys nobody is asked."""
    try:
        await caller_of(request)
    except BitquotaError:
        return _sign_in_page(request, service, target)
    return RedirectResponse(_inside(target), status_code=303)


def _sign_in_page(
    request: Request, service: State, target: str, problem: str = "", status: int = 200
) -> Response:
    nonce = secrets.token_urlsafe(24)
    page = _render(
        "sign_in.html",
        viewer=None,
        status=status,
        target=_inside(target),
        token=service.sessions.form_token(nonce),
        problem=problem,
    )
    page.set_cookie(
        FORM_COOKIE,
        nonce,
        max_age=3600,
        path="/sign-in",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return page


@router.post("/sign-in")
async def sign_in(request: Request, service: Service) -> Response:
    """Start a session for the holder of an API key."""
    form = await _form(request)
    nonce = request.cookies.get(FORM_COOKIE, "")
    expected = service.sessions.form_token(nonce)
    if not nonce or not secrets.compare_digest(form.get("token", "").encode(), expected.encode()):
        msg = "The form was open for too long, or came from another site. Please try again."
        return _sign_in_page(request, service, form.get("next", "/"), msg, 403)
    try:
        cookie = await run_in_threadpool(service.sessions.open, form.get("key", "").strip())
    except Unauthorized:
        msg = "This is not a valid API key. Keys begin with bq_ and are shown once, when made."
        return _sign_in_page(request, service, form.get("next", "/"), msg, 401)
    answer = RedirectResponse(_inside(form.get("next", "/")), status_code=303)
    answer.set_cookie(
        COOKIE,
        cookie,
        max_age=int(LIFETIME_S),
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    answer.delete_cookie(FORM_COOKIE, path="/sign-in")
    return answer


@router.post("/sign-out")
async def sign_out(request: Request, service: Service) -> Response:
    """End the session of this browser: its cookie is worth nothing any more."""
    form = await _form(request)
    cookie = request.cookies.get(COOKIE)
    # One that is over already is only forgotten.
    with contextlib.suppress(Unauthorized):
        if cookie is not None:
            session = await run_in_threadpool(service.sessions.read, cookie)
            service.sessions.check_csrf(session, form.get("token"))
            await run_in_threadpool(service.sessions.end, cookie)
    answer = RedirectResponse("/sign-in", status_code=303)
    answer.delete_cookie(COOKIE)
    return answer


async def _form(request: Request) -> dict[str, str]:
    body = await request.body()
    if len(body) > _MAX_FORM_BYTES:
        msg = f"a form must be at most {_MAX_FORM_BYTES:,} bytes; got {len(body):,}"
        raise Forbidden(msg)
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


def _inside(target: str) -> str:
    """Return ``target`` if it is a path of this server, else the first page."""
    parts = urlsplit(target)
    inside = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if inside and not parts.scheme and not parts.netloc else "/"


# -------------------------------------------------------------------------------- pages


@router.get("/")
def home(viewer: Viewing, service: Service) -> Response:
    """Show the form for a new job, and the jobs."""
    tenant = viewer.caller.tenant
    found = service.jobs.page(tenant, limit=_LISTED)
    return _render(
        "jobs.html",
        viewer=viewer,
        may_write=Scope.WRITE in viewer.caller.scopes,
        rows=pages_data.job_rows(service, tenant, found),
        listed=_LISTED,
        most_compared=MOST_COMPARED,
        widths=DEFAULT_WEIGHT_BITS,
        all_widths=WEIGHT_BITS,
        targets=TARGETS,
        losses=(AUTO_LOSS, *LOSSES),
        efforts=EFFORTS,
        roundings=ROUNDINGS,
        corrections=CORRECTION_WORDS,
        allowed=ALLOWED_WORDS,
        iterations=ITERATIONS,
        limit=format_size(8 * service.settings.max_upload_bytes).partition(" (")[0],
    )


@router.get("/jobs/{job_id}")
def job_page(job_id: str, viewer: Viewing, service: Service) -> Response:
    """Show how a job stands: progress, log, results."""
    job = service.jobs.get(viewer.caller.tenant, job_id)
    log = pages_data.log_of(service, job_id)
    return _render(
        "job.html",
        viewer=viewer,
        may_write=Scope.WRITE in viewer.caller.scopes,
        job=json.loads(job_view(job).model_dump_json()),
        row=pages_data.job_rows(service, viewer.caller.tenant, [job])[0],
        ordered=pages_data.ordered(job),
        log=log,
        links=pages_data.result_links(job),
        last=log[-1]["number"] if log else 0,
        has_charts=pages_data.has_charts(job),
        estimate=pages_data.estimate_of(service, job),
    )


@router.get("/compare")
async def compare_page(
    viewer: Viewing,
    service: Service,
    job: Annotated[list[str], Query(min_length=1, max_length=MOST_COMPARED)],
) -> Response:
    """Show the plans of several jobs in one table, and their frontiers in one drawing."""
    runs = await pages_data.runs(service, viewer.caller.tenant, list(dict.fromkeys(job)))
    return _render("compare.html", viewer=viewer, runs=runs)


@router.get("/plans")
def plans_page(viewer: Viewing) -> Response:
    """Show the plans of all jobs in one table with filters."""
    return _render("plans.html", viewer=viewer)


@router.get("/jobs/{job_id}/model")
async def model_page(job_id: str, viewer: Viewing, service: Service) -> Response:
    """Show what a job measured and planned."""
    tenant = viewer.caller.tenant
    known = await run_in_threadpool(pages_data.model_file, service, tenant, job_id)
    found, _ = await pages_data.draw(service, tenant, job_id, "model_page", **known)
    return await run_in_threadpool(_model_page, job_id, viewer, service, found)


def _model_page(job_id: str, viewer: Viewer, service: State, found: JsonObject) -> Response:
    tenant = viewer.caller.tenant
    job = service.jobs.get(tenant, job_id)
    return _render(
        "model.html",
        viewer=viewer,
        may_write=Scope.WRITE in viewer.caller.scopes,
        job=json.loads(job_view(job).model_dump_json()),
        row=pages_data.job_rows(service, tenant, [job])[0],
        plans=found["plans"],
        links=pages_data.result_links(job),
        exports=found["exports"],
        plan_uploads=(job.results or {}).get("plans", ()),
        quantized_uploads=(job.results or {}).get("quantized", ()),
    )
