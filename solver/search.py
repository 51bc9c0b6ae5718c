"""Upper bounds: Lagrangian starts, swaps, tabu search, restarts. Deterministic for a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver import search_kernels as kernels
from bitquota.solver.core import first_least, propagated, reduce
from bitquota.solver.search_kernels import Space
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


def default_effort(rows: int) -> Effort:
    """Return how long to search before a proof: two CPU seconds at 224 x 5 and at 560 x 5.

    Small problems leave the rest to the trees of the proof, which look around, too.
    """
    if rows <= 700:
        return Effort(patience=10)
    return Effort(restarts=80 if rows <= 1500 else 12)


DENSE_ROWS = 3000
"""Separable problems of more rows never get a dense matrix of pair terms."""
LOOSE = 2**62  # a limit that no costs reach
PRICES = (1.0, 0.6, 1.6)
"""Parts of the price of the budgets at which choices are sought."""
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


def space_of(core: Core) -> Space:
    """Return what the kernels search."""
    return Space(core.d, penalised(core), core.off, core.grp, core.A, core.b, core.halt)


def lagrangian_start(
    core: Core, space: Space, effort: Effort
) -> tuple[list[tuple[float, Ints]], Floats]:
    """Return feasible starts along a bisection on the price of the budgets, and their values.

    Also f64[n], the price of each row's costs in the end.

    Each price is followed by single swaps that ignore the budgets, then by a repair. Several
    budgets share one price; a budget that the last point exceeds gets more weight.
    """
    starts = core.off[:-1]
    span = np.maximum(core.b - np.minimum.reduceat(core.A, starts, axis=1).sum(axis=1), 1)
    weight = 1.0 / span.astype(np.float64)
    cur = first_least(core.d, core.off)
    found: list[tuple[float, Ints]] = []

    def keep(at: kernels.Place) -> None:
        found.append((float(kernels.objective(space, at)), cur.copy()))

    def descend(price: float, *, kept: bool = True) -> bool:
        at = kernels.place(space, cur)
        kernels.relax_descent(space, at, price * (weight @ core.A))
        feasible = bool((at.used <= core.b).all())
        if feasible and kept:
            keep(at)
        return feasible

    def mend() -> None:
        at = kernels.place(space, cur)
        if kernels.repair(space, at, weight):
            keep(at)

    # A price at which the budgets hold.
    descend(0.0)
    if not len(core.b):
        return found, np.zeros(core.n)
    low, high = 0.0, float(np.abs(core.d).max(initial=0.0)) or 1.0
    for _ in range(60):
        if core.halt[0] or descend(high, kept=False):
            break
        low, high = high, high * 8.0
    # The least such price.
    for step in range(effort.bisections):
        if core.halt[0]:
            break
        # The price spans orders of magnitude: halve its logarithm once it is bounded below.
        middle = 0.5 * (low + high) if step > 40 else np.sqrt(max(low, high * 1e-6)) * np.sqrt(high)
        if descend(middle):
            high = middle
        else:
            low = middle
            over = core.A[:, cur].sum(axis=1) > core.b
            if len(core.b) > 1 and step % 4 == 3:
                weight[over] *= 1.5
            if step >= effort.bisections - 6:
                mend()
    mend()
    if not found:
        cur[:] = first_least(weight @ core.A, core.off)
        mend()
    return found, high * (weight @ core.A)


def rounded(core: Core, x: Floats) -> list[Ints]:
    """Return the heaviest row of every group by weights ``x``, brought within the budgets."""
    cur = first_least(-x, core.off)
    return [cur] if _repair(core, space_of(core), cur) else []


def _repair(core: Core, space: Space, cur: Ints) -> bool:
    """Bring ``cur`` within the budgets, in place; returns whether that succeeded."""
    weight = 1.0 / np.maximum(core.b, 1).astype(np.float64)
    return bool(kernels.repair(space, kernels.place(space, cur), weight))


def search(
    core: Core,
    *,
    effort: Effort,
    seed: int,
    starts: Iterable[Ints] = (),
    on_better: Callable[[Ints, float], object] = lambda _cur, _value: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Ints | None, float]:
    """Return the best feasible rows found and their objective, or ``(None, inf)``.

    A heuristic: nothing is proved. Ties between restarts are broken by order.
    """
    points = [s for s in starts if meets_all(core, s)]
    if (table := partners(core)) is not None:
        return _search_tied(
            core, table, points, effort=effort, seed=seed, on_better=on_better, stop=stop
        )
    space = space_of(core)
    if len(core.pairs) and not len(space.C):
        core = _pairs_as_budgets(core)
        space = space._replace(A=core.A, b=core.b)
    # Start.
    valued = [(_value(core, space, point), point) for point in points]
    found, price = lagrangian_start(core, space, effort)
    valued += found
    if not valued:
        return None, np.inf
    unique = {point.tobytes(): (value, point) for value, point in valued}
    ranked = [unique[key] for key in sorted(unique, key=lambda key: (unique[key][0], key))]
    best_value, best = ranked[0][0], ranked[0][1].copy()
    if meets_all(core, best):
        on_better(best, core.value(best))
    # Moves of two groups cost O(n²): large problems take them in the last polish only.
    large, huge = core.n > 700, core.n > SINGLE_ROWS
    tried = ranked[: 1 if huge else 3 if large else 4]
    for index in range(len(tried) + (0 if huge else effort.restarts)):
        if stop():
            break
        # Take the next start, or kick the best choice.
        if index < len(tried):
            cur = tried[index][1].copy()
        else:
            kicks = index - len(tried)
            cur = _kicked(space, best, price if large else None, kicks, seed * 7919 + index)
            if not meets_all(core, cur):
                continue
        # Descend.
        _descend(space, cur, 4 * effort.patience, 0, seed + index)
        if huge:
            value = _value(core, space, cur)
        else:
            value = _descend(space, cur, 3 if large else effort.patience, 1, seed + index)
        if value < best_value - 1e-12 * abs(best_value):
            best, best_value = cur.copy(), value
            if meets_all(core, best):
                on_better(best, core.value(best))
    return (best, core.value(best)) if meets_all(core, best) else (None, np.inf)


def found_alone(problem: Problem, keep: NDArray[np.bool_]) -> Ints | None:
    """Return feasible rows by what each row loses alone, or ``None``. Heuristic, and quick.

    Args:
        problem: Its cross terms do not count.
        keep: bool[n], rows that may be chosen.
    """
    none = problem.offsets[:0, None].repeat(2, axis=1)
    alone = replace(problem, cross=None, factor=None, terms=none, term_values=np.zeros(0))
    core = reduce(alone, keep)
    points = [(0.0, np.zeros(0, dtype=np.int64))]
    if core.n_groups:
        points, _ = lagrangian_start(core, space_of(core), Effort(bisections=16))
    for _, point in sorted(points, key=lambda found: (found[0], found[1].tobytes())):
        rows = core.lift(point)
        if problem.is_feasible(rows - problem.offsets[:-1]):
            return rows
    return None


def _search_tied(
    core: Core,
    table: Ints,
    starts: list[Ints],
    *,
    effort: Effort,
    seed: int,
    on_better: Callable[[Ints, float], object],
    stop: Callable[[], bool],
) -> tuple[Ints | None, float]:
    """Search the core whose tied groups (``ties.partners``) are one group each."""
    small = collapsed(core, table)
    row_of = np.zeros(core.n, dtype=np.int64)
    row_of[table[table >= 0]] = np.nonzero(table >= 0)[0]
    first = core.grp[table[small.off[:-1], 0]]

    def pass_on(inner: Ints, _value: float) -> None:
        cur = expanded(table, inner, core)
        on_better(cur, core.value(cur))

    inner, _ = search(
        small,
        effort=effort,
        seed=seed,
        starts=[row_of[s[first]] for s in starts],
        on_better=pass_on,
        stop=stop,
    )
    if inner is None:
        return None, np.inf
    cur = expanded(table, inner, core)
    return cur, core.value(cur)


def _kicked(space: Space, best: Ints, price: Floats | None, kicks: int, seed: int) -> Ints:
    """Return ``best`` with some groups changed at random.

    Few at a time: kicks of two to eight groups found the best known choice at 224 layers twice as
    fast as kicks of up to a sixth of the groups. Under noise, where a budget that is spent leaves
    hardly any moves, every other kick (if there is a ``price``) changes up to two fifths without
    regard to budgets; what follows are descents at a price, and a repair.
    """
    cur = best.copy()
    if price is None or kicks % 2 == 0:
        kernels.kick(space, cur, 2 + (kicks // (1 if price is None else 2)) % 7, seed)
        return cur
    loose = space._replace(b=np.full_like(space.b, LOOSE))
    kernels.kick(loose, cur, 4 + (kicks * 17) % (2 + 2 * len(cur) // 5), seed)
    at = kernels.place(space, cur)
    kernels.relax_descent(space, at, price * PRICES[kicks // 2 % len(PRICES)])
    kernels.repair(space, at, 1.0 / np.maximum(space.b, 1).astype(np.float64))
    return cur


def _descend(space: Space, cur: Ints, patience: int, pairs: int, seed: int) -> float:
    value: float = kernels.tabu_search(space, cur, patience, 100_000, pairs, seed)
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


def _value(core: Core, space: Space, cur: Ints) -> float:
    pair = float(space.C[np.ix_(cur, cur)].sum()) if len(space.C) else 0.0
    return float(core.d[cur].sum()) + 0.5 * pair


def repaired(problem: Problem, choice: Ints, seed: int) -> Ints | None:
    """Return ``choice`` brought within the budgets and improved, or ``None`` if that fails."""
    keep = propagated(problem, problem.allowed)
    if keep is None:
        return None
    core = reduce(problem, keep)
    if core.n_groups == 0 or not len(core.b):
        return None
    cur = core.lower(problem.rows(choice))
    # A row that went is replaced by its group's cheapest.
    cur = np.where(cur >= 0, cur, core.off[:-1])
    space = space_of(core)
    if not _repair(core, space, cur):
        return None
    _descend(space, cur, 12, 1, seed)
    return core.lift(cur) - problem.offsets[:-1] if meets_all(core, cur) else None
