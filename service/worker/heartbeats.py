"""Heartbeats of a job whose driver is busy with something that takes its time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from bitquota.service.jobs.job import LeaseLost
from bitquota.service.logs import logger

if TYPE_CHECKING:
    from types import TracebackType

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.job import Job
    from bitquota.service.jobs.job_store import JobStore
    from bitquota.service.settings import Settings

_log = logger("heartbeats")


class Heartbeats:
    """Renews the lease of a job from a thread while the context lasts.

    For connecting to a cluster, fetching a model from a bucket, or putting it into an object
    store. A lease that is lost meanwhile is noticed by the next write of the driver.

    Args:
        store: Where the lease is.
        job: As it was claimed.
        settings: Say how often.
        progress: What clients are told meanwhile.
    """

    def __init__(self, store: JobStore, job: Job, settings: Settings, progress: JsonObject) -> None:
        self._store, self._job, self._settings = store, job, settings
        self._progress = progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(self._settings.heartbeat_s):
            try:
                self._store.heartbeat(
                    self._job.id,
                    self._job.epoch,
                    lease_s=self._settings.lease_s,
                    progress=self._progress if beats == 1 else None,  # what is quick is no news
                    measured=0,
                    worker_s=0.0,
                )
            except LeaseLost:
                return
            except Exception:  # noqa: BLE001  # the database may be away for a moment
                _log.warning("no heartbeat", job=self._job.id)
            beats += 1
