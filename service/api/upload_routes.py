"""Endpoints for models, datasets, plans and matrices: streamed in, named by their content."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from bitquota.errors import InvalidInput, TooLarge, UnsafeModel
from bitquota.service.api.job_routes import stored_file
from bitquota.service.api.schemas import (
    DIGEST,
    ArtifactPage,
    ArtifactView,
    Problem,
    ReceivedView,
    artifact_view,
)
from bitquota.service.api.state import Calling, RequestId, Service, State  # noqa: TC001  # FastAPI reads them
from bitquota.service.api.streaming import write_body
from bitquota.service.jobs.kinds.kind import BINARY, JSON
from bitquota.service.security.sandbox import sandbox_of
from bitquota.service.store.formats import ArtifactKind, ModelFormat
from bitquota.service.worker.maintenance import remove_upload

if TYPE_CHECKING:
    from pathlib import Path as FilePath

    from bitquota.service.security.keys import Caller
    from bitquota.service.store.artifacts import Artifact
    from bitquota.service.store.blobs import Incoming

MOST_BYTES = 2**62
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_MEDIA = dict.fromkeys(ArtifactKind, BINARY) | {ArtifactKind.PLAN: JSON}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 404, 409, 413, 422, 429, 503, 507)
}

router = APIRouter(prefix="/v1")


def _add(kind: ArtifactKind, path: str) -> None:
    """Add the endpoints of one kind of upload."""

    @router.put(
        f"/{path}",
        name=f"put_{kind}",
        tags=[path],
        status_code=201,
        openapi_extra=_BODY,
        responses=_PROBLEMS | {200: {"model": ArtifactView, "description": "It was there."}},
    )
    async def put(
        request: Request,
        response: Response,
        service: Service,
        caller: Calling,
        request_id: RequestId,
        name: Annotated[str, Query(max_length=255, description="For people.")] = "",
        sha256: Annotated[
            str | None, Query(pattern=r"^[0-9a-f]{64}$", description="What must arrive.")
        ] = None,
        offset: Annotated[
            int, Query(ge=0, le=MOST_BYTES, description="Where this piece begins; needs `total`.")
        ] = 0,
        total: Annotated[
            int | None,
            Query(
                ge=1,
                le=MOST_BYTES,
                description="Bytes of the whole; what arrives is kept for a next piece.",
            ),
        ] = None,
        content_length: Annotated[int | None, Header(ge=0, include_in_schema=False)] = None,
    ) -> ArtifactView:
        """Upload raw bytes; the answer's `id` is their digest. Sending them again is harmless.

        With `sha256` and `total` an upload that breaks off can be resumed: `/upload` below its
        digest says how much arrived, and the next request begins there.
        """
        # Receive, check and keep the bytes; a broken upload may keep what arrived.
        incoming = await run_in_threadpool(_begin, service, caller, kind, sha256, offset, total)
        try:
            if content_length is not None:
                incoming.expect(content_length)
                await run_in_threadpool(
                    service.quotas.check_upload, caller.tenant, incoming.size + content_length
                )
            service.blobs.check_room(content_length or 0, service.settings.min_free_bytes)
            await write_body(request, incoming)
            if total is not None and incoming.size < total:
                raise _unfinished(incoming.size, total)
            incoming.kept_when_broken = False
            size = incoming.size
            await run_in_threadpool(_check_digest, incoming, sha256)
            found = await _format_of(service, caller, kind, incoming.path)
            artifact, new = await run_in_threadpool(
                _keep, service, caller, kind, incoming, name, found
            )
            service.metrics.uploaded.inc(size)
            if new:
                await run_in_threadpool(
                    service.audit.add, caller, f"upload.{kind}", artifact.digest, request_id
                )
        finally:
            end = incoming.flush if incoming.kept_when_broken else incoming.discard
            await run_in_threadpool(end)
        response.status_code = 201 if new else 200
        response.headers["Location"] = f"/v1/{path}/{artifact.digest}"
        return artifact_view(artifact)

    @router.get(
        f"/{path}/{{digest}}/upload", name=f"received_{kind}", tags=[path], responses=_PROBLEMS
    )
    def received(
        service: Service, caller: Calling, digest: Annotated[str, Path(pattern=DIGEST)]
    ) -> ReceivedView:
        """Say how many bytes of an upload that broke off are there."""
        name = f"{kind}/{digest.removeprefix('sha256:')}"
        return ReceivedView(received=service.blobs.received(caller.tenant, name))

    @router.get(f"/{path}", name=f"list_{path}", tags=[path], responses=_PROBLEMS)
    def page(
        service: Service,
        caller: Calling,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(pattern=DIGEST)] = None,
    ) -> ArtifactPage:
        """List uploads in order of digest."""
        found = service.artifacts.page(caller.tenant, kind, limit=limit + 1, after=cursor)
        more = len(found) > limit
        return ArtifactPage(
            data=[artifact_view(a) for a in found[:limit]],
            has_more=more,
            next_cursor=found[limit - 1].digest if more else None,
        )

    @router.get(f"/{path}/{{digest}}", name=f"get_{kind}", tags=[path], responses=_PROBLEMS)
    def get(
        service: Service,
        caller: Calling,
        digest: Annotated[str, Path(pattern=DIGEST)],
    ) -> ArtifactView:
        """Say what is known of one upload."""
        return artifact_view(service.artifacts.get(caller.tenant, kind, digest))

    @router.get(
        f"/{path}/{{digest}}/content",
        name=f"content_{kind}",
        tags=[path],
        responses=_PROBLEMS
        | {
            200: {"content": {_MEDIA[kind]: {}}, "description": "The bytes."},
            304: {"description": "As in the client's copy."},
        },
        response_class=Response,
    )
    def content(
        service: Service,
        caller: Calling,
        digest: Annotated[str, Path(pattern=DIGEST)],
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """Return the bytes as they were uploaded, or left by a job."""
        found = service.artifacts.get(caller.tenant, kind, digest)
        named = None if kind is ArtifactKind.PLAN else f"{digest[7:19]}.{found.format}"
        return stored_file(service, digest, _MEDIA[kind], named, if_none_match)

    @router.delete(
        f"/{path}/{{digest}}", name=f"delete_{kind}", tags=[path], status_code=204,
        responses=_PROBLEMS ,
    )  # fmt: skip
    def delete(
        service: Service,
        caller: Calling,
        request_id: RequestId,
        digest: Annotated[str, Path(pattern=DIGEST)],
    ) -> None:
        """Remove one upload, unless a job that has not ended needs it."""
        service.artifacts.get(caller.tenant, kind, digest)
        remove_upload(service.database, caller.tenant, kind.value, digest)
        service.audit.add(caller, f"delete.{kind}", digest, request_id)


def _begin(
    service: State,
    caller: Caller,
    kind: ArtifactKind,
    sha256: str | None,
    offset: int,
    total: int | None,
) -> Incoming:
    limit = service.settings.max_upload_bytes
    if total is None:
        if offset:
            msg = f"a piece that begins at byte {offset} must come with the 'total' of the upload"
            raise InvalidInput(msg)
        return service.blobs.incoming(limit)
    if sha256 is None:
        msg = "an upload in pieces must be named by its 'sha256'"
        raise InvalidInput(msg)
    if total > limit:
        msg = f"an upload must be at most {limit:,} bytes; this one has {total:,}"
        raise TooLarge(msg, limit=limit)
    name = f"{kind}/{sha256}"
    # What others of the tenant's uploads left half-way counts too, until it is collected.
    pending = service.blobs.partial_bytes(caller.tenant, but=name)
    service.quotas.check_upload(caller.tenant, pending + total)
    return service.blobs.resume(caller.tenant, name, offset, total)


def _unfinished(size: int, total: int) -> InvalidInput:
    msg = f"an upload must arrive whole; {size:,} of {total:,} bytes have: send the rest from there"
    return InvalidInput(msg, received=size, total=total)


def _check_digest(incoming: Incoming, sha256: str | None) -> None:
    """Bring a whole upload to the disk; raises unless it has the digest that was announced."""
    incoming.flush()
    if sha256 is not None and incoming.digest != f"sha256:{sha256}":
        msg = (
            f"the bytes that arrive must have the announced digest; got {incoming.digest}: "
            "send them again"
        )
        raise InvalidInput(msg, announced=f"sha256:{sha256}", got=incoming.digest)


async def _format_of(service: State, caller: Caller, kind: ArtifactKind, path: FilePath) -> str:
    """Return the format of a file that may be taken; raises what is wrong with it."""
    settings = service.settings
    order = {
        "kind": kind.value,
        "path": str(path),
        "max_ratio": settings.max_unpacked_ratio,
        "max_bytes": settings.max_calibration_bytes,
    }
    verdict, _ = await service.readers.run(caller.tenant, "inspect", order, what="an upload")
    found: str = verdict["format"]
    if found == ModelFormat.PT2 and not await run_in_threadpool(_may_run_pt2, service):
        msg = (
            "a .pt2 holds a program, and this server has no sandbox to run it in; upload "
            "a zip of config.json and safetensors files, or have its operator install "
            "bubblewrap"
        )
        raise UnsafeModel(msg, format="pt2")
    return found


def _keep(
    service: State,
    caller: Caller,
    kind: ArtifactKind,
    incoming: Incoming,
    name: str,
    found: str,
) -> tuple[Artifact, bool]:
    size = incoming.size
    service.quotas.check_upload(caller.tenant, size)
    digest = service.blobs.keep(incoming)
    shown = re.sub(r"[^\w.\- ]", "_", name)
    return service.artifacts.record(
        caller.tenant, kind, digest, format_name=found, name=shown, size=size
    )


def _may_run_pt2(service: State) -> bool:
    """Return whether a stranger's ``.pt2`` is contained, or there are no strangers."""
    alone = service.settings.loopback and not service.keys.any()
    settings = service.settings
    if alone or settings.dangerously_run_code_of_strangers:
        return True
    # Where no models run, the host that runs one refuses what it cannot contain.
    elsewhere = settings.slots == 0 or settings.engine != "local"
    return elsewhere or sandbox_of(settings) is not None


_add(ArtifactKind.MODEL, "models")
_add(ArtifactKind.DATASET, "datasets")
_add(ArtifactKind.PLAN, "plans")
_add(ArtifactKind.MATRIX, "matrices")
_add(ArtifactKind.QUANTIZED, "quantized")
