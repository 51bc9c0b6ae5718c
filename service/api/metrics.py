"""What a server counts for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bitquota.service.jobs.job import JobStatus
from bitquota.service.store.database import jobs

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from bitquota.service.store.database import Database


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

        self.free = Gauge(
            "bitquota_free_bytes", "Free bytes of the data folder's disk.", registry=self.registry
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)

    def collect(self, database: Database, now: float, free_bytes: int) -> bytes:
        """Return everything in Prometheus' text format; job counts come from the database."""

        def work(connection: Connection) -> tuple[dict[str, int], float | None]:
            counted = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
            waiting = sa.select(sa.func.min(jobs.c.created_at)).where(
                jobs.c.status == JobStatus.QUEUED.value
            )
            found = {str(row[0]): int(row[1]) for row in connection.execute(counted)}
            return found, connection.execute(waiting).scalar()

        counts, oldest = database.read(work)
        for status in JobStatus:
            self.jobs.labels(status.value).set(counts.get(status.value, 0))
        self.oldest.set(0.0 if oldest is None else max(0.0, now - oldest))
        self.free.set(free_bytes)
        return generate_latest(self.registry)
