"""The progress of a job as its clients see it: of the whole job, and never backwards.

An evaluator tells what fraction of the job is done; after a crash the next one begins again, and
finds in the ledger what was measured. Helpers are told of tasks alone.

Design: docs/design/progress.md
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bitquota.progress import ALMOST, Pace, Progress, stage_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject


class WholeJob:
    """Makes of what is told by the workers of one attempt what clients are told.

    Args:
        before: What clients were told last, if the job was begun before.
        clock: Seconds.
    """

    def __init__(
        self, before: JsonObject | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fraction = min(ALMOST, float((before or {}).get("fraction") or 0.0))
        self._told = Progress(stage="prepare", done=0, total=1)
        self._pace = Pace(clock)
        self._pace.told(self._fraction)

    def told(self, progress: Progress) -> JsonObject:
        """Return what clients are told when the evaluator of the job says ``progress``."""
        self._told = progress
        return self._said(progress, progress.fraction)

    def shared(self, stage: str, done: int, total: int) -> JsonObject:
        """Return it when so many of the tasks that a stage was divided into are done.

        The stage is the one that the evaluator told of before it waited for them.
        """
        told = self._told
        fraction = None
        if told.fraction is not None and told.until is not None:
            share = done / max(1, total)
            fraction = told.fraction + (told.until - told.fraction) * share
        return self._said(Progress(stage=stage, done=done, total=total), fraction)

    def aside(self, stage: str) -> JsonObject:
        """Return it while the driver itself does something that takes its time."""
        return self._said(Progress(stage=stage, done=0, total=1), None)

    @staticmethod
    def ended() -> JsonObject:
        """Return it when the job has succeeded."""
        words = stage_words("done")
        return {
            "stage": "done", "text": words, "done": 1, "total": 1, "fraction": 1.0, "left_s": 0.0,
        }  # fmt: skip

    def _said(self, progress: Progress, fraction: float | None) -> JsonObject:
        if fraction is not None:
            self._fraction = max(self._fraction, min(ALMOST, fraction))
            self._pace.told(self._fraction)
        left_s = self._pace.left_s
        return {
            "stage": progress.stage,
            "text": stage_words(progress.stage),
            "done": progress.done,
            "total": progress.total,
            "reused": progress.reused,
            "fraction": self._fraction,
            "left_s": None if left_s is None else round(left_s, 1),
        }
