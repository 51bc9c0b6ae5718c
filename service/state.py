"""What the endpoints of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends, Request

if TYPE_CHECKING:
    from bitquota.service.artifacts import ArtifactStore
    from bitquota.service.blobs import BlobStore
    from bitquota.service.database import Database
    from bitquota.service.jobs import JobStore
    from bitquota.service.settings import Settings
    from bitquota.service.supervisor import Supervisor

LOCAL_TENANT = "local"
"""Who uses a server on loopback that has no keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Stores and settings of one server."""

    settings: Settings
    database: Database
    blobs: BlobStore
    artifacts: ArtifactStore
    jobs: JobStore
    supervisor: Supervisor


def _state(request: Request) -> State:
    return cast("State", request.app.state.service)


def _tenant() -> str:
    return LOCAL_TENANT


Service = Annotated[State, Depends(_state)]
Tenant = Annotated[str, Depends(_tenant)]
