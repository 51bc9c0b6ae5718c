"""The child process of an external backend: ``python -m bitquota.solver.backends.child NAME``.

Standard input: one line of JSON (goal and limits), then the model as ``.npz`` bytes. Standard
output: one JSON object per line: ``{"ready": true, "cpu_seconds": ...}`` once the libraries are
loaded, ``{"incumbent": [rows]}`` any number of times and ``{"answer": {...}, "cpu_seconds": ...}``
last. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bitquota.solver.backends.answer import Answer, Task
from bitquota.solver.backends.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

MOST_ROUNDS = 50
"""Solutions that break a budget by less than a tolerance are cut off at most this often."""


def main() -> None:
    """Read the task, solve it, write the answer."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answer

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    options = json.loads(sys.stdin.buffer.readline())
    task = Task(
        model=Model.from_bytes(sys.stdin.buffer.read()),
        report=lambda chosen: send({"incumbent": chosen.tolist()}),
        **options,
    )
    # A backend's module loads its libraries; the time limit begins then.
    optimise = importlib.import_module(f"bitquota.solver.backends.{sys.argv[1]}").optimise
    send({"ready": True, "cpu_seconds": time.process_time()})
    answer = solve_with_covers(optimise, task)
    send({"answer": answer.to_json(), "cpu_seconds": time.process_time()})


def solve_with_covers(
    optimise: Callable[[Task], Answer],
    task: Task,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Call ``optimise`` until its choice meets the budgets in integers.

    A solver's feasibility tolerance (about 1e-6 of the budget) lets choices through that take a
    few bytes too many. Each is cut off by a cover inequality, which all feasible choices obey, so
    the bound stays a bound.
    """
    model, begin = task.model, clock()
    report, limit = task.report, task.time_limit_s
    best: NDArray[np.int64] | None = None
    best_value = float("inf")

    def offer(chosen: NDArray[np.int64]) -> None:
        nonlocal best, best_value
        pairs = model.pairs
        chosen_set = set(chosen.tolist())
        if model.cover(chosen) is not None or any(
            a in chosen_set and b in chosen_set for a, b in pairs.tolist()
        ):
            return
        value = model.value(chosen)
        if value < best_value:
            best, best_value = chosen, value
            report(chosen)

    # Solve, cut off what exceeds a budget, solve again.
    covers: list[NDArray[np.int64]] = []
    bound, nodes = -float("inf"), 0
    for rounds in range(MOST_ROUNDS):
        left = None if limit is None else max(limit - (clock() - begin), 0.0)
        task = replace(task, covers=tuple(covers), time_limit_s=left, report=offer)
        answer = optimise(task)
        bound, nodes = max(bound, answer.bound), nodes + answer.nodes
        details = answer.details | {"cover_rounds": float(rounds)}
        answer = replace(answer, bound=bound, nodes=nodes, details=details)
        if answer.chosen is None:
            break
        offer(answer.chosen)
        cover = model.cover(answer.chosen)
        if cover is None:
            return answer
        covers.append(cover)
        if answer.limit is not None:
            break
    # Stopped before a choice that meets the budgets was optimal: the best of those on the way.
    if best is None:
        status = answer.status if answer.chosen is None else "unknown"
        return replace(answer, status=status, chosen=None)
    return replace(answer, status="feasible", chosen=best)


if __name__ == "__main__":
    main()
