"""Costs of two rows together, as a budget of rows alone: one more group for each pair of groups.

A kernel that two layers share costs something else than both alone. For two groups ``g`` and ``h``
let ``t(p, q)`` be what rows ``p`` and ``q`` cost beyond the sum of both. With
``m(p) = max(0, max_q t(p, q))`` added to the cost of ``p``, what is left is a *saving*,
``s(p, q) = t(p, q) - m(p) <= 0``. A group of its own takes it: one row that saves nothing, and one
for each saving, which requires both of its rows. Whoever may save does, so a choice fits the
budget with the best row of that group exactly if it fits as written: nothing is approximated, in
chains of groups too. Costs must not be negative, so each such group costs its largest saving, and
all rows of the two groups cost that much less together; where they cost too little for that, the
limit is higher, and the resource's name says so.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Ints = NDArray[np.int64]

PairCosts = dict[tuple[int, int], int]
"""What two rows of different groups cost together beyond the sum of both."""
_LARGEST = 2**62


def with_pair_costs(problem: Problem, terms: Mapping[int, PairCosts]) -> Problem:
    """Return ``problem`` with the pair costs ``terms`` of each budget, linearised exactly.

    The groups that stand for pairs come last.

    Args:
        problem: Without them.
        terms: Budget's index to its pair costs, of any sign.

    Raises:
        InvalidProblem: A pair lies within one group, two rows cost less than nothing together, or
            sums exceed 64 bits.

    Cost: a row more per saving; with ``cross`` a matrix of all rows.
    """
    costs = [row.tolist() for row in problem.costs]
    limits, resources = problem.limits.tolist(), list(problem.resources)
    blocks: list[_Block] = []
    for k, pairs in sorted(terms.items()):
        found = [
            block
            for between, joined in _joined(problem, k, pairs).items()
            if (block := _block(problem, k, between, joined)) is not None
        ]
        for block in found:
            for row, more in block.more.items():
                costs[k][row] += more
        # What a group for a pair costs more than nothing, its two groups cost less.
        shift = 0
        for block in found:
            left = block.most
            for g in block.between:
                rows = slice(*problem.offsets[g : g + 2].tolist())
                less = min(left, *costs[k][rows])
                costs[k][rows] = [cost - less for cost in costs[k][rows]]
                left -= less
            shift += left
        if shift:
            resources[k] += f", plus {shift:,}"
        limits[k] += shift
        blocks += found
        if limits[k] >= _LARGEST or max(costs[k]) >= _LARGEST:
            msg = "limits and costs must stay below 2^62 with pair costs; use a larger unit"
            raise InvalidProblem(msg)
    table = np.array(costs, dtype=np.int64).reshape(problem.costs.shape)
    return replace(_extended(problem, table, limits, blocks), resources=tuple(resources))


def _joined(problem: Problem, k: int, pairs: PairCosts) -> dict[tuple[int, int], PairCosts]:
    """Return pair costs of budget ``k`` by the two groups that they join, the first one first."""
    group, costs = problem.group_of_row, problem.costs[k]
    joined: dict[tuple[int, int], PairCosts] = {}
    for (p, q), cost in sorted(pairs.items()):
        a, b = (p, q) if group[p] < group[q] else (q, p)
        if group[a] == group[b]:
            msg = f"a pair cost must join two groups; both rows are of '{_name(problem, a)}'"
            raise InvalidProblem(msg)
        if int(costs[a]) + int(costs[b]) + cost < 0:
            msg = (
                f"two rows must not cost less than nothing together; '{problem.labels[a]}' of "
                f"'{_name(problem, a)}' and '{problem.labels[b]}' of '{_name(problem, b)}' do"
            )
            raise InvalidProblem(msg)
        between = joined.setdefault((int(group[a]), int(group[b])), {})
        between[a, b] = between.get((a, b), 0) + cost
    return joined


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The group of one pair of groups: its budget, its savings, what its groups' rows cost more."""

    budget: int
    between: tuple[int, int]
    saved: dict[tuple[int, int], int]
    more: dict[int, int]
    most: int


def _block(problem: Problem, k: int, between: tuple[int, int], costs: PairCosts) -> _Block | None:
    """Return what stands for ``costs`` with the fewest savings; ``None`` when they are all zero."""
    found = []
    for side in range(2):
        near, far = between[side], between[1 - side]
        others = range(*problem.offsets[far : far + 2].tolist())
        saved: dict[tuple[int, int], int] = {}
        more: dict[int, int] = {}
        for p in range(*problem.offsets[near : near + 2].tolist()):
            row = {q: costs.get((p, q) if side == 0 else (q, p), 0) for q in others}
            if (top := max(0, *row.values())) > 0:
                more[p] = top
            saved |= {(p, q): top - cost for q, cost in row.items() if cost < top}
        found.append(
            _Block(
                budget=k, between=between, saved=saved, more=more,
                most=max(saved.values(), default=0),
            )
        )  # fmt: skip
    best = min(found, key=lambda block: len(block.saved))
    return best if best.saved or best.more else None


def _extended(
    problem: Problem, costs: Ints, limits: Sequence[int], blocks: Sequence[_Block]
) -> Problem:
    n = problem.n_rows
    offsets, labels, groups = problem.offsets.tolist(), list(problem.labels), list(problem.groups)
    required = problem.required_pairs.tolist()
    columns: list[Ints] = []
    for block in blocks:
        if not block.saved:
            continue
        names = [problem.groups[g] for g in block.between]
        groups.append(f"{names[0]} with {names[1]}: {problem.resources[block.budget]}")
        for rows, saving in [((), 0), *block.saved.items()]:
            column = np.zeros(len(limits), dtype=np.int64)
            column[block.budget] = block.most - saving
            required += [(n + len(columns), row) for row in rows]
            labels.append(" with ".join(problem.labels[row] for row in rows) or "nothing saved")
            columns.append(column)
        offsets.append(n + len(columns))
    more = len(columns)
    cross = problem.cross
    if cross is not None:
        cross = np.pad(cross, (0, more))
    factor = problem.factor
    if factor is not None:
        factor = np.pad(factor, ((0, more), (0, 0)))
    return replace(
        problem,
        diagonal=np.pad(problem.diagonal, (0, more)),
        cross=cross,
        factor=factor,
        offsets=np.array(offsets, dtype=np.int64),
        costs=np.concatenate([costs, *(c[:, None] for c in columns)], axis=1),
        limits=np.array(limits, dtype=np.int64),
        groups=tuple(groups),
        labels=tuple(labels),
        allowed=np.pad(problem.allowed, (0, more), constant_values=True),
        required_pairs=np.array(required, dtype=np.int64).reshape(-1, 2),
    )


def completed(problem: Problem, choice: Ints) -> Ints:
    """Return a choice of the first groups with the cheapest fitting rows of those for pairs.

    Args:
        problem: Of ``with_pair_costs``.
        choice: i64[k], of its first ``k`` groups.
    """
    full = list(choice.tolist())
    chosen = {int(problem.offsets[g]) + local for g, local in enumerate(full)}
    needs: dict[int, set[int]] = {}
    for row, other in problem.required_pairs.tolist():
        needs.setdefault(row, set()).add(other)
    for g in range(len(full), problem.n_groups):
        start, stop = problem.offsets[g : g + 2].tolist()
        fits = [p for p in range(start, stop) if needs.get(p, set()) <= chosen]
        full.append(min(fits, key=lambda p: int(problem.costs[:, p].sum())) - start)
    return np.array(full, dtype=np.int64)


def _name(problem: Problem, row: int) -> str:
    return problem.groups[int(problem.group_of_row[row])]
