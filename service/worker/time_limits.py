"""How long a job may take: until its deadline, in all, and in one stage without progress.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from bitquota.errors import ServiceTimeout
from bitquota.progress import stage_words

if TYPE_CHECKING:
    from bitquota.service.jobs.job import Job
    from bitquota.service.settings import Settings


class TimeLimits:
    """The time limits of one attempt of a job, by the monotonic clock.

    The first stage begins with the first word of the evaluator: before, it may have to wait for a
    free node, and no model runs.

    Args:
        settings: Of the server.
        job: As it was claimed.
    """

    def __init__(self, settings: Settings, job: Job) -> None:
        self._job_s, self._stage_s = settings.max_job_s, settings.max_stage_s
        now = time.monotonic()
        self._deadline = None if job.deadline is None else now + job.deadline - time.time()
        self._worker_s = job.worker_s
        self._stage, self._progressed_at = "start", math.inf

    def progressed(self, stage: object = None) -> None:
        """Note that something was done, in ``stage`` where that is known."""
        self._progressed_at = time.monotonic()
        if stage is not None:
            self._stage = str(stage)[:100]

    def worked(self, worker_s: float) -> None:
        """Note how many worker seconds the job has used, earlier attempts included."""
        self._worker_s = worker_s

    def passed(self) -> ServiceTimeout | None:
        """Return which limit has passed, if one has."""
        now, words = time.monotonic(), stage_words(self._stage)
        if self._deadline is not None and now > self._deadline:
            msg = "a job must end before its deadline; this one did not: give it more time"
            return ServiceTimeout(msg)
        if 0 < self._job_s < self._worker_s:
            msg = (
                f"a job must end within {self._job_s:,.0f} worker seconds; this one was in the "
                f"stage '{words}' then: ask for less, or have the operator raise BITQUOTA_MAX_JOB_S"
            )
            return ServiceTimeout(msg, stage=self._stage, limit_s=self._job_s)
        if 0 < self._stage_s < now - self._progressed_at:
            msg = (
                f"a stage of a job must make progress within {self._stage_s:,.0f} s; the stage "
                f"'{words}' made none. The model may not terminate; if it is only slow, have "
                "the operator raise BITQUOTA_MAX_STAGE_S"
            )
            return ServiceTimeout(msg, stage=self._stage, limit_s=self._stage_s)
        return None
