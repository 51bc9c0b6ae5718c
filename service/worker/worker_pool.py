"""The worker pool of one job: who measures which chunk, and what happens when one of them is lost.

The evaluator that carries out the job asks for a list of tasks to be done at once. It takes part
itself; helpers are started at the first list and take the next task whenever they are idle. A
task whose helper is lost goes back to the others. One that costs two helpers is left to the
evaluator, whose own end the job's count of fruitless attempts sees.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError, ServiceError
from bitquota.service.jobs.messages import MAX_TASKS
from bitquota.service.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.service.worker.engines import Worker

_log = logger("worker_pool")
_LOSSES_OF_A_TASK = 2


@dataclass(slots=True, kw_only=True)
class _Task:
    number: int
    what: JsonObject
    lost: int = 0


class WorkerPool:
    """Shares out tasks.

    Args:
        size: Workers that measure at the same time, the evaluator of the job included.
        start: Starts one helper; it asks for its first task by itself.
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
        self._todo: deque[_Task] = deque()
        self._doing: dict[Worker, _Task] = {}
        self._main_waits = False
        self._total = self._done = 0
        self._stopped = False
        self.shares: Counter[str] = Counter()
        """Tasks done, by place."""

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

    def begin(self, main: Worker, tasks: list[JsonObject]) -> None:
        """Take a list of tasks from the evaluator of the job.

        Raises:
            ServiceError: The list before is not done, or this one is no list.
        """
        if self._todo or self._doing or not isinstance(tasks, list):
            msg = "an evaluator must ask for one list of tasks at a time; it did not"
            raise ServiceError(msg)
        self._main = main
        self._total, self._done = len(tasks), 0
        if not self._stopped:
            self._todo.extend(
                _Task(number=k, what=what) for k, what in enumerate(tasks[:MAX_TASKS])
            )
        # The last task would be done before a helper for it has started.
        self.recruit(len(tasks) - 1)
        for helper in self._waiting[:]:
            if self._todo:
                self._waiting.remove(helper)
                self._give(helper)
        self._next_for_main()

    def idle(self, worker: Worker, done: object) -> tuple[str, int, int] | None:
        """Note that ``worker`` is through with task number ``done``, if it had one.

        Returns what is measured, and how many of how many tasks are done, if anything was.
        """
        task = self._doing.pop(worker, None)
        if task is not None and task.number == done:
            self._done += 1
            self.shares[worker.place] += 1
            self._log.debug("task done", place=worker.place, number=task.number)
        if worker is self._main:
            self._next_for_main()
        elif self._todo:
            self._give(worker)
        else:
            self._waiting.append(worker)
            self._release_main()
        if task is None:
            return None
        done_now = min(self._done, self._total)
        return str(task.what.get("measure")), done_now, self._total

    def lost(self, worker: Worker, why: str) -> None:
        """Note that a helper has died or failed; what it did is done again by others."""
        if worker not in self._helpers:
            return
        worker.end()
        self._helpers.remove(worker)
        if worker in self._waiting:
            self._waiting.remove(worker)
        task = self._doing.pop(worker, None)
        self._log.warning("helper lost", place=worker.place, why=why, busy=task is not None)
        if task is not None:
            task.lost += 1
            if task.lost < _LOSSES_OF_A_TASK and not self._stopped:
                self._todo.appendleft(task)
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
        task = self._todo.popleft()
        self._doing[worker] = task
        worker.send({"type": "task", "number": task.number, "task": task.what})

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
