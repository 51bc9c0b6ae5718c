"""Which tenant uploaded which model or dataset: rows over content-addressed files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.errors import NotFound
from bitquota.service.store.database import artifacts
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from sqlalchemy.engine import Connection

    from bitquota.service.store.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One upload of one tenant; times in seconds since 1970, size in bytes."""

    tenant: str
    kind: ArtifactKind
    digest: str
    format: str
    name: str
    size: int
    created_at: float
    used_at: float


class ArtifactStore:
    """Uploads in the database."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock

    def record(
        self,
        tenant: str,
        kind: ArtifactKind,
        digest: str,
        *,
        format_name: str,
        name: str,
        size: int,
    ) -> tuple[Artifact, bool]:
        """Store an upload and return it, with whether it is new to the tenant."""
        now = self._clock()

        def work(connection: Connection) -> tuple[Artifact, bool]:
            known = _find(connection, tenant, kind, digest)
            if known is not None:
                return known, False
            values = {
                "tenant": tenant, "kind": kind.value, "digest": digest, "format": format_name,
                "name": name, "size": size, "created_at": now, "used_at": now,
            }  # fmt: skip
            connection.execute(artifacts.insert().values(values))
            made = _find(connection, tenant, kind, digest)
            assert made is not None  # noqa: S101  # inserted above
            return made, True

        return self._db.write(work)

    def get(self, tenant: str, kind: ArtifactKind, digest: str) -> Artifact:
        """Return an upload of ``tenant``; raises ``NotFound``, also for another tenant's."""
        found = self._db.read(lambda connection: _find(connection, tenant, kind, digest))
        if found is None:
            msg = f"the {kind} must be uploaded; there is no {kind} '{digest}': PUT it first"
            raise NotFound(msg, kind=str(kind), digest=digest)
        return found

    def page(
        self, tenant: str, kind: ArtifactKind, *, limit: int, after: str | None
    ) -> Sequence[Artifact]:
        """Return up to ``limit`` uploads of ``tenant`` in order of digest, after ``after``."""
        query = sa.select(artifacts).where(
            artifacts.c.tenant == tenant, artifacts.c.kind == kind.value
        )
        if after is not None:
            query = query.where(artifacts.c.digest > after)
        query = query.order_by(artifacts.c.digest).limit(limit)
        return self._db.read(
            lambda connection: [_artifact(dict(r._mapping)) for r in connection.execute(query)]  # noqa: SLF001
        )

    def names(self, tenant: str, digests: Collection[str]) -> dict[tuple[str, str], str]:
        """Return the names of uploads that have one, by kind and digest."""
        if not digests:
            return {}
        query = sa.select(artifacts.c.kind, artifacts.c.digest, artifacts.c.name).where(
            artifacts.c.tenant == tenant, artifacts.c.digest.in_(digests), artifacts.c.name != ""
        )
        return self._db.read(
            lambda connection: {(r.kind, r.digest): r.name for r in connection.execute(query)}
        )


def _find(connection: Connection, tenant: str, kind: ArtifactKind, digest: str) -> Artifact | None:
    row = connection.execute(
        sa.select(artifacts).where(
            artifacts.c.tenant == tenant,
            artifacts.c.kind == kind.value,
            artifacts.c.digest == digest,
        )
    ).first()
    return None if row is None else _artifact(dict(row._mapping))  # noqa: SLF001


def _artifact(values: dict[str, object]) -> Artifact:
    return Artifact(**values | {"kind": ArtifactKind(str(values["kind"]))})  # type: ignore[arg-type]
