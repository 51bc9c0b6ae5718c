"""Solve a problem by our own solver or by another one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidInput
from bitquota.solver.backends import BACKENDS, installed_backend
from bitquota.solver.control import Control, Options
from bitquota.solver.native import verified

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bitquota.solver.control import Cancelled, OnEvent
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

GAP = 1e-4
"""Relative gap that counts as solved unless told otherwise."""


def solve(
    problem: Problem,
    *,
    backend: str = "auto",
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    gap: float = GAP,
    seed: int = 0,
    on_event: OnEvent | None = None,
    cancelled: Cancelled | None = None,
    start: Sequence[int] | NDArray[np.int64] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Return the best choice and a bound that no choice is below.

    Exact when no limit strikes: the answer is within ``gap`` of the best possible. Deterministic
    for a ``seed`` as long as no time limit or cancellation strikes, whatever the thread count.

    Args:
        problem: What to solve.
        backend: ``auto`` or ``bitquota`` for this solver, else a name of ``backends.BACKENDS``.
        time_limit_s: Seconds by ``clock``; of wall clock for other backends. They begin when the
            solver is loaded: the first solves of a process take some .4 seconds longer, those on a
            machine half a minute, in which kernels are compiled.
        node_limit: Branch-and-bound nodes; refused for backends that do not count them.
        gap: Relative gap to prove.
        seed: For the search for good choices.
        on_event: Called with better choices and bounds as they are found.
        cancelled: Asked now and then; ``True`` stops with what is known.
        start: A choice to begin with; ignored when it is infeasible, and by other backends.
        clock: What ``time_limit_s`` is measured with.

    Raises:
        BudgetTooSmall: The cheapest rows exceed one budget.
        Infeasible: A group has no allowed row.
        InvalidProblem: A negative gap or limit.
        InvalidInput: No such backend, or one that cannot keep the node limit.
        MissingDependency: The backend's packages are not installed.
        SolverFailed: The answer does not survive the check from first principles.
    """
    options = Options(gap=gap, time_limit_s=time_limit_s, node_limit=node_limit, seed=seed)
    other = installed_backend(backend)
    if node_limit is not None and not other.counts_nodes:
        msg = (
            f"solver '{backend}' cannot keep a node limit: it does not count nodes; use a time "
            f"limit, or one of {', '.join(n for n, b in BACKENDS.items() if b.counts_nodes)}"
        )
        raise InvalidInput(msg, solver=backend, node_limit=node_limit)
    problem.check_budgets()
    control = Control(options=options, on_event=on_event, cancelled=cancelled, clock=clock)
    first = None if start is None else np.asarray(start, dtype=np.int64)
    return verified(problem, other.solve(problem, control, first))
