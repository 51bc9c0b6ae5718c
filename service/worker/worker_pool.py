"""The crew of one job: who measures which chunk, and what happens when one of them is lost.

The evaluator that carries out the job asks for a list of errands to be done at once. It takes part
itself; helpers are started at the first list and take the next errand whenever they are idle. An
errand whose helper is lost goes back to the others. One that costs two helpers is left to the
evaluator, whose own end the job's count of fruitless attempts sees.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError, ServiceError
from bitquota.service.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.service.worker.engines import Worker

_log = logger("crew")
_LOSSES_OF_AN_ERRAND = 2
_MAX_ERRANDS = 1_000_000


@dataclass(slots=True, kw_only=True)
class _Errand:
    number: int
    what: JsonObject
    lost: int = 0


class Crew:
    """Shares out errands.

    Args:
        size: Workers that measure at the same time, the evaluator of the job included.
        start: Starts one helper; it asks for its first errand by itself.
        restarts: Helpers that may be replaced in the course of the job.
        job: Its id, for logs.
    """

    def __init__(
        self, size: int, start: Callable[[], Worker], *, restarts: int = 3, job: str = ""
    ) -> None:
        self._size = size
        self._start = start
        self._log = _log.bind(job=job)
        self._starts_left = size - 1 + restarts
        self._main: Worker | None = None
        self._helpers: list[Worker] = []
        self._waiting: list[Worker] = []
        self._todo: deque[_Errand] = deque()
        self._doing: dict[Worker, _Errand] = {}
        self._main_waits = False
        self._total = self._done = 0
        self._stopped = False
        self.shares: Counter[str] = Counter()
        """Errands done, by place."""

    @property
    def helpers(self) -> int:
        """How many helpers there are."""
        return len(self._helpers)

    def recruit(self, wanted: int) -> None:
        """Start helpers until there are ``wanted``, as far as size and restarts allow."""
        while len(self._helpers) < min(self._size - 1, wanted) and self._starts_left:
            self._starts_left -= 1
            try:
                self._helpers.append(self._start())
            except BitquotaError as error:  # the job goes on with those there are
                self._log.warning("no helper", why=error.message)
                self._starts_left = 0

    def begin(self, main: Worker, errands: list[JsonObject]) -> None:
        """Take a list of errands from the evaluator of the job.

        Raises:
            ServiceError: The list before is not done, or this one is no list.
        """
        if self._todo or self._doing or not isinstance(errands, list):
            msg = "an evaluator must ask for one list of errands at a time; it did not"
            raise ServiceError(msg)
        self._main = main
        self._total, self._done = len(errands), 0
        if not self._stopped:
            self._todo.extend(
                _Errand(number=k, what=what) for k, what in enumerate(errands[:_MAX_ERRANDS])
            )
        # The last errand would be done before a helper for it has started.
        self.recruit(len(errands) - 1)
        for helper in self._waiting[:]:
            if self._todo:
                self._waiting.remove(helper)
                self._give(helper)
        self._next_for_main()

    def idle(self, worker: Worker, done: object) -> JsonObject | None:
        """Note that ``worker`` is through with errand number ``done``, if it had one.

        Returns what to tell of the progress, if anything was done.
        """
        errand = self._doing.pop(worker, None)
        if errand is not None and errand.number == done:
            self._done += 1
            self.shares[worker.place] += 1
            self._log.debug("errand done", place=worker.place, number=errand.number)
        if worker is self._main:
            self._next_for_main()
        elif self._todo:
            self._give(worker)
        else:
            self._waiting.append(worker)
            self._release_main()
        if errand is None:
            return None
        done_now = min(self._done, self._total)
        return {"stage": str(errand.what.get("measure")), "done": done_now, "total": self._total}

    def lost(self, worker: Worker, why: str) -> None:
        """Note that a helper has died or failed; what it did is done again by others."""
        if worker not in self._helpers:
            return
        worker.end()
        self._helpers.remove(worker)
        if worker in self._waiting:
            self._waiting.remove(worker)
        errand = self._doing.pop(worker, None)
        self._log.warning("helper lost", place=worker.place, why=why, busy=errand is not None)
        if errand is not None:
            errand.lost += 1
            if errand.lost < _LOSSES_OF_AN_ERRAND and not self._stopped:
                self._todo.appendleft(errand)
        if self._todo:
            self.recruit(len(self._helpers) + 1)
        self._release_main()

    def stop(self) -> None:
        """Hand out nothing more: the job is to end."""
        self._stopped = True
        self._todo.clear()
        for helper in self._helpers:
            helper.send({"type": "cancel"})
        self._release_main(whatever=True)

    def _give(self, worker: Worker) -> None:
        errand = self._todo.popleft()
        self._doing[worker] = errand
        worker.send({"type": "errand", "number": errand.number, "errand": errand.what})

    def _next_for_main(self) -> None:
        assert self._main is not None  # noqa: S101  # it has begun
        if self._todo:
            self._give(self._main)
        else:
            self._main_waits = True
            self._release_main()

    def _release_main(self, *, whatever: bool = False) -> None:
        """Let the evaluator go on when nothing is left, or give it what came back."""
        if not self._main_waits or self._main is None:
            return
        if self._todo:
            self._main_waits = False
            self._give(self._main)
        elif not self._doing or whatever:
            self._main_waits = False
            self._doing.clear()
            self._main.send({"type": "go_on"})
