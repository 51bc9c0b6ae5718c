"""Upper bounds: Lagrangian starts, swaps, tabu search, restarts. Deterministic for a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver import search_kernels as kernels
from bitquota.solver.core import propagate_steps, reduce
from bitquota.solver.ties import collapsed, expanded, partners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to search, in counts (never in seconds: a seed gives one answer).

    Attributes:
        restarts: Kicks after the first descent.
        patience: Tabu moves without improvement before a descent ends.
        bisections: Steps of the bisection on the budget price.
    """

    restarts: int = 6
    patience: int = 30
    bisections: int = 30


DENSE_ROWS = 3000
"""Separable problems of more rows never get a dense matrix of pair terms."""
SINGLE_ROWS = 4000
"""Above so many rows there is one descent by moves of one group: the bound is to come soon."""


def penalised(core: Core) -> Floats:
    """Return ``C`` with a price on forbidden pairs that no gain can outweigh.

    Large separable problems keep their empty ``C``.
    """
    if not len(core.pairs) or (not len(core.C) and core.n > DENSE_ROWS):
        return core.C
    C = core.C.copy() if len(core.C) else np.zeros((core.n, core.n))
    span = float(np.ptp(core.d)) * core.n_groups + float(np.abs(C).max()) * core.n_groups**2
    price = max(span, 1.0)
    C[core.pairs[:, 0], core.pairs[:, 1]] += price
    C[core.pairs[:, 1], core.pairs[:, 0]] += price
    return C


def meets_all(core: Core, cur: Ints) -> bool:
    """Return whether the rows ``cur`` meet the budgets and no forbidden pair."""
    if bool((core.A[:, cur].sum(axis=1) > core.b).any()):
        return False
    chosen = np.zeros(core.n, dtype=np.bool_)
    chosen[cur] = True
    return not bool((chosen[core.pairs[:, 0]] & chosen[core.pairs[:, 1]]).any())


def lagrangian_start(
    core: Core, C: Floats, effort: Effort, start: Ints | None = None
) -> list[Ints]:
    """Return feasible starts along a bisection on the price of the budgets.

    Each price is followed by single swaps that ignore the budgets, then by a repair. Several
    budgets share one price; a budget that the last point exceeds gets more weight.
    """
    n, m, G = core.n, len(core.b), core.n_groups
    h, used = np.empty(n), np.empty(m, dtype=np.int64)
    span = np.maximum(core.b - np.minimum.reduceat(core.A, core.off[:-1], axis=1).sum(axis=1), 1)
    weight = 1.0 / span.astype(np.float64)
    cur = np.array(
        [core.off[g] + int(np.argmin(core.d[core.off[g] : core.off[g + 1]])) for g in range(G)],
        dtype=np.int64,
    )
    if start is not None:
        cur = start.copy()
    found: list[Ints] = []

    def descend(price: float) -> bool:
        kernels.fields(core.d, C, core.A, cur, h, used)
        kernels.relax_descent(price * (weight @ core.A), C, core.off, core.A, cur, h, used)
        return bool((used <= core.b).all())

    def keep() -> None:
        kernels.fields(core.d, C, core.A, cur, h, used)
        if kernels.repair(C, core.off, core.A, core.b, cur, h, used, weight):
            found.append(cur.copy())

    if descend(0.0):
        found.append(cur.copy())
    if m == 0:
        return found
    scale = float(np.abs(core.d).max(initial=0.0)) or 1.0
    low, high = 0.0, scale
    for _ in range(60):
        if descend(high):
            break
        low, high = high, high * 8.0
    for step in range(effort.bisections):
        # The price spans orders of magnitude: halve its logarithm once it is bounded below.
        middle = 0.5 * (low + high) if step > 40 else np.sqrt(max(low, high * 1e-6) * high)
        if descend(middle):
            high = middle
            found.append(cur.copy())
        else:
            low = middle
            over = used > core.b
            if m > 1 and step % 4 == 3:
                weight[over] *= 1.5
            if step >= effort.bisections - 6:
                keep()
    keep()
    if not found:
        cheapest = [
            core.off[g] + int(np.argmin((weight @ core.A)[core.off[g] : core.off[g + 1]]))
            for g in range(G)
        ]
        cur[:] = cheapest
        keep()
    return found


def _pass_on(core: Core, cur: Ints, on_better: Callable[[Ints, float], None]) -> None:
    on_better(cur, core.value(cur))


def rounded(core: Core, x: Floats) -> list[Ints]:
    """Return the heaviest row of every group by weights ``x``, brought within the budgets."""
    cur = np.lexsort((-x, core.grp))[core.off[:-1]].astype(np.int64)
    C = penalised(core)
    h, used = np.empty(core.n), np.empty(len(core.b), dtype=np.int64)
    kernels.fields(core.d, C, core.A, cur, h, used)
    weight = 1.0 / np.maximum(core.b, 1).astype(np.float64)
    return [cur] if kernels.repair(C, core.off, core.A, core.b, cur, h, used, weight) else []


def search(
    core: Core,
    *,
    effort: Effort,
    seed: int,
    starts: Iterable[Ints] = (),
    on_better: Callable[[Ints, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Ints | None, float]:
    """Return the best feasible rows found and their objective, or ``(None, inf)``.

    A heuristic: nothing is proved. Ties between restarts are broken by order.
    """
    table = partners(core)
    if table is not None:
        row_of = np.zeros(core.n, dtype=np.int64)
        row_of[table[table >= 0]] = np.nonzero(table >= 0)[0]
        small = collapsed(core, table)
        first = core.grp[table[small.off[:-1], 0]]
        inner, _ = search(
            small,
            effort=effort,
            seed=seed,
            starts=[row_of[s[first]] for s in starts if meets_all(core, s)],
            on_better=None
            if on_better is None
            else lambda cur, _: _pass_on(core, expanded(table, cur, core), on_better),
            stop=stop,
        )
        if inner is None:
            return None, np.inf
        cur = expanded(table, inner, core)
        return cur, core.value(cur)
    C = penalised(core)
    if len(core.pairs) and not len(C):
        core = _pairs_as_budgets(core)
    # Moves of two groups cost O(n²): large problems take them in the last polish only.
    large, huge = core.n > 700, core.n > SINGLE_ROWS
    points = [s for s in starts if meets_all(core, s)]
    points += lagrangian_start(core, C, effort)
    if not points:
        return None, np.inf
    unique = {point.tobytes(): point for point in points}
    ranked = sorted(unique.values(), key=lambda p: (_value(core, C, p), p.tobytes()))
    best, best_value = ranked[0].copy(), _value(core, C, ranked[0])
    if on_better is not None and meets_all(core, best):
        on_better(best, core.value(best))
    tried = ranked[: 1 if huge else 3 if large else 4]
    for index in range(len(tried) + (0 if huge else effort.restarts)):
        if stop is not None and stop():
            break
        if index < len(tried):
            cur = tried[index].copy()
        else:
            cur = best.copy()
            # Few changes at a time: kicks of two to eight groups found the best known choice at
            # 224 layers twice as fast as kicks of up to a sixth of the groups.
            strength = 2 + (index - len(tried)) % 7
            kernels.kick(core.off, core.A, core.b, cur, strength, seed * 7919 + index)
        _run(core, C, cur, 4 * effort.patience, 0, seed + index)
        if huge:
            value = _value(core, C, cur)
        else:
            value = _run(core, C, cur, 3 if large else effort.patience, 1, seed + index)
        if value < best_value - 1e-12 * abs(best_value):
            best, best_value = cur.copy(), value
            if on_better is not None and meets_all(core, best):
                on_better(best, core.value(best))
    if not meets_all(core, best):
        return None, np.inf
    return best, core.value(best)


def _run(core: Core, C: Floats, cur: Ints, patience: int, pairs: int, seed: int) -> float:
    value: float = kernels.tabu_search(
        core.d, C, core.off, core.grp, core.A, core.b, cur, patience, 100_000, pairs, seed
    )
    return value


def _pairs_as_budgets(core: Core) -> Core:
    """Return ``core`` with one more budget per pair, of which one row may be chosen."""
    together = np.zeros((len(core.pairs), core.n), dtype=np.int64)
    for column in core.pairs.T:
        together[np.arange(len(core.pairs)), column] = 1
    return replace(
        core,
        A=np.concatenate([core.A, together]),
        b=np.concatenate([core.b, np.ones(len(core.pairs), dtype=np.int64)]),
        pairs=core.pairs[:0],
    )


def _value(core: Core, C: Floats, cur: Ints) -> float:
    pair = float(C[np.ix_(cur, cur)].sum()) if len(C) else 0.0
    return float(core.d[cur].sum()) + 0.5 * pair


def repaired(problem: Problem, choice: Ints, seed: int) -> Ints | None:
    """Return ``choice`` brought within the budgets and improved, or ``None`` if that fails."""
    keep = problem.allowed
    for step in propagate_steps(problem, keep):
        if step is None:
            return None
        keep = step
    core = reduce(problem, keep)
    index = np.full(problem.n_rows, -1, dtype=np.int64)
    index[core.rows] = np.arange(core.n)
    cur = index[problem.rows(choice)[core.full < 0]]
    if core.n_groups == 0 or not len(core.b):
        return None
    # A row that went is replaced by its group's cheapest.
    cheapest = core.off[:-1]
    cur = np.where(cur >= 0, cur, cheapest)
    C = penalised(core)
    h, used = np.empty(core.n), np.empty(len(core.b), dtype=np.int64)
    kernels.fields(core.d, C, core.A, cur, h, used)
    weight = 1.0 / np.maximum(core.b, 1).astype(np.float64)
    if not kernels.repair(C, core.off, core.A, core.b, cur, h, used, weight):
        return None
    _run(core, C, cur, 12, 1, seed)
    if not meets_all(core, cur):
        return None
    return core.lift(cur) - problem.offsets[:-1]
