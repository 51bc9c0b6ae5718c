"""``bitquota admin doctor``: everything that a server with these settings needs, looked at."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.canonical import nearest_existing
from bitquota.errors import BitquotaError
from bitquota.service.security.limits import group_of, limits_of
from bitquota.service.security.sandbox import bubblewrap, kernel_folders
from bitquota.service.store.blobs import storage_of
from bitquota.service.store.database import Database
from bitquota.service.telemetry import described
from bitquota.service.worker.engines import ENGINES
from bitquota.service.worker.engines.ray_cluster import connect

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from bitquota.service.settings import Settings


_TO_COME = "none yet: the first start makes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a health check."""

    what: str
    good: bool
    detail: str


def doctor(settings: Settings) -> list[Finding]:
    """Look at everything that a server needs and say what is there; nothing is made or changed.

    Cost: with the engine ``ray`` a connection to the cluster, with S3 a listing.
    """
    program = bubblewrap()
    kernels = kernel_folders()
    return [
        _database(settings),
        _data_folder(settings),
        _blobs(settings),
        _engine(settings),
        Finding(
            what="sandbox",
            good=program is not None,
            detail=program
            or "none: install bubblewrap and allow user namespaces; models run as plain processes",
        ),
        _limits(settings),
        Finding(
            what="compiled kernels",
            good=bool(kernels),
            detail="compiled" if kernels else "not compiled yet: the first job waits for that",
        ),
        Finding(what="telemetry", good=described()[0], detail=described()[1]),
    ]


def _database(settings: Settings) -> Finding:
    if not settings.has_database:
        return Finding(what="database", good=True, detail=f"sqlite, {_TO_COME}")
    try:
        with contextlib.closing(Database(settings.url)) as database:
            version = database.read(_schema)
            kind = database.engine.dialect.name
    except BitquotaError as error:
        return Finding(what="database", good=False, detail=error.message)
    detail = f"{kind}, {_TO_COME}" if version is None else f"{kind}, schema {version}"
    return Finding(what="database", good=True, detail=detail)


def _schema(connection: Connection) -> str | None:
    """Return the schema's number, or nothing of a database that no server has seen."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(
        sa.text("SELECT version_num FROM alembic_version")
    ).scalar()
    return version


def _data_folder(settings: Settings) -> Finding:
    # Of a folder that a server will make, the nearest that is there.
    nearest = nearest_existing(settings.data_dir)
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    free = shutil.disk_usage(nearest).free
    made = "" if settings.data_dir.exists() else f", {_TO_COME}"
    return Finding(
        what="data folder",
        good=writable and free > 2**30,
        detail=f"{settings.data_dir}: {'' if writable else 'not '}writable, {free:,} B free{made}",
    )


def _blobs(settings: Settings) -> Finding:
    try:
        storage = storage_of(settings)
        if storage is None:
            return Finding(what="blob store", good=True, detail="in the data folder")
        sizes = [entry.size for entry in storage.entries()]
    except BitquotaError as error:
        return Finding(what="blob store", good=False, detail=error.message)
    detail = f"{storage.place}: {len(sizes):,} files, {sum(sizes):,} B"
    return Finding(what="blob store", good=True, detail=detail)


def _engine(settings: Settings) -> Finding:
    workers = f"{settings.slots} x {settings.workers} workers"
    if settings.engine == "ray":
        try:
            ray = connect(settings)
        except BitquotaError as error:
            return Finding(what="engine", good=False, detail=f"ray: {error.message}")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        ray.shutdown()
        detail = (
            f"ray {ray.__version__} at {settings.ray_address}: {len(nodes)} nodes, "
            f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs; {workers}"
        )
        return Finding(what="engine", good=True, detail=detail)
    known = settings.engine in ENGINES
    torch = importlib.util.find_spec("torch") is not None
    detail = f"{settings.engine}: {workers}"
    if not known:
        detail = f"{settings.engine}: there is no such engine: choose one of {', '.join(ENGINES)}"
    elif settings.slots and not torch:
        detail += "; torch is missing: pip install 'bitquota[worker]', or BITQUOTA_SLOTS=0"
    return Finding(what="engine", good=known and (torch or not settings.slots), detail=detail)


def _limits(settings: Settings) -> Finding:
    limits = limits_of(settings)
    detail = f"{limits.memory_bytes:,} B of memory and {limits.processes:,} processes for each job"
    try:
        group = group_of(settings)
    except BitquotaError as error:
        return Finding(what="limits", good=False, detail=error.message)
    if group is None:
        return Finding(what="limits", good=True, detail=f"{detail}; no control group")
    held = ", ".join(group.holds)
    group.remove()
    return Finding(what="limits", good=True, detail=f"{detail}; control group holds {held}")
