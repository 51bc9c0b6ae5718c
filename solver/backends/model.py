"""The problem as external solvers see it: allowed rows only, small integers, sane scales.

It travels to a child process as ``.npz`` bytes, without pickle.

Design: docs/design/external-solvers.md
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_TYPICAL = 100.0
"""Scaled objectives are brought near this: solvers' absolute tolerances are about 1e-6."""
_LARGEST = 1e7
"""Scaled coefficients stay below this."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """Minimise ``scale · (constant + diagonal·x + ½ xᵀ cross x)`` over allowed rows.

    Attributes:
        diagonal: f64[n], scaled.
        cross: f64[n, n], scaled; f64[0, 0] for a separable problem.
        offsets: i64[G+1].
        costs: i64[m, n], divided by their common divisor; budgets that cannot bind are left out.
        limits: i64[m].
        pairs: i64[p, 2], rows that must not be chosen together.
        constant: Scaled.
        scale: What every number of the objective was multiplied with, a power of two.
        rows: i64[n], index within its group that each row has in the problem.
    """

    diagonal: Floats
    cross: Floats
    offsets: Ints
    costs: Ints
    limits: Ints
    pairs: Ints
    constant: float
    scale: float
    rows: Ints

    @classmethod
    def of(cls, problem: Problem) -> Model | None:
        """Return the model, or ``None`` when a group has no allowed row."""
        allowed, group = problem.allowed, problem.group_of_row
        kept = np.flatnonzero(allowed)
        counts = np.bincount(group[kept], minlength=problem.n_groups)
        if not counts.all():
            return None
        diagonal = problem.diagonal[kept]
        cross = problem.pair_terms(kept)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        index = np.full(problem.n_rows, -1, dtype=np.int64)
        index[kept] = np.arange(len(kept))
        pairs = index[problem.all_forbidden_pairs()].reshape(-1, 2)
        scale = _scale(diagonal, cross, offsets)
        costs, limits = _budgets(problem.costs[:, kept], problem.limits, offsets)
        return cls(
            diagonal=diagonal * scale,
            cross=cross * scale,
            offsets=offsets,
            costs=costs,
            limits=limits,
            pairs=pairs[(pairs >= 0).all(axis=1)],
            constant=problem.constant * scale,
            scale=scale,
            rows=kept - problem.offsets[group[kept]],
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.diagonal)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.offsets) - 1

    @property
    def group(self) -> Ints:
        """``i64[n]``: group of each row."""
        return np.repeat(np.arange(self.n_groups), np.diff(self.offsets))

    def choice(self, chosen: Ints) -> Ints:
        """Return the problem's choice for one chosen row of the model per group."""
        return self.rows[chosen]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row of every group, and the one after its last."""
        return list(itertools.pairwise(self.offsets.tolist()))

    @property
    def typical(self) -> float:
        """Size of a typical objective: the sum of the groups' median sizes."""
        return _typical(self.diagonal, self.offsets)

    def pick(self, x: Floats) -> Ints:
        """Return the row of every group with the largest entry of ``x``."""
        return np.array([a + int(np.argmax(x[a:b])) for a, b in self.spans], dtype=np.int64)

    def value(self, chosen: Ints) -> float:
        """Return the scaled objective of the chosen rows."""
        pair = float(self.cross[np.ix_(chosen, chosen)].sum()) if len(self.cross) else 0.0
        return self.constant + float(self.diagonal[chosen].sum()) + 0.5 * pair

    def cover(self, chosen: Ints) -> Ints | None:
        """Return rows of which at most all groups but one may be chosen, or ``None``.

        When ``chosen`` exceeds a budget, some of its rows alone already do, with the cheapest rows
        elsewhere. Rows that cost at least as much may replace them. The cut
        ``Σ x[rows] <= (number of their groups) - 1`` has small coefficients, so that no
        feasibility tolerance blurs it.
        """
        starts = self.offsets[:-1]
        for cost, limit in zip(self.costs, self.limits, strict=True):
            if int(cost[chosen].sum()) <= limit:
                continue
            least = np.minimum.reduceat(cost, starts)
            extra = cost[chosen] - least
            excess = int(least.sum()) - int(limit)
            needed: list[int] = []
            for g in np.argsort(-extra, kind="stable").tolist():
                needed.append(g)
                excess += int(extra[g])
                if excess > 0:
                    break
            inside = np.isin(self.group, needed) & (cost >= cost[chosen][self.group])
            return np.flatnonzero(inside)
        return None

    def to_bytes(self) -> bytes:
        """Return the fields as ``.npz`` bytes."""
        buffer = io.BytesIO()
        fields = {name: np.asarray(getattr(self, name)) for name in self.__slots__}
        np.savez(buffer, **fields)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Model:
        """Rebuild from ``to_bytes``."""
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files}
        for name in ("constant", "scale"):
            fields[name] = float(fields[name])
        return cls(**fields)


def _scale(diagonal: Floats, cross: Floats, offsets: Ints) -> float:
    largest = max(float(np.abs(diagonal).max()), float(np.abs(cross).max(initial=0.0)))
    if largest == 0.0:
        return 1.0
    typical = _typical(diagonal, offsets)
    wanted = min(_TYPICAL / typical if typical > 0 else math.inf, _LARGEST / largest)
    return 2.0 ** min(math.floor(math.log2(wanted)), 1000)


def _typical(diagonal: Floats, offsets: Ints) -> float:
    spans = itertools.pairwise(offsets.tolist())
    return sum(float(np.median(np.abs(diagonal[a:b]))) for a, b in spans)


def _budgets(costs: Ints, limits: Ints, offsets: Ints) -> tuple[Ints, Ints]:
    kept_costs, kept_limits = [], []
    for cost, limit in zip(costs, limits.tolist(), strict=True):
        if int(np.maximum.reduceat(cost, offsets[:-1]).sum()) <= limit:
            continue
        divisor = int(np.gcd.reduce(cost)) or 1
        kept_costs.append(cost // divisor)
        kept_limits.append(limit // divisor)
    return (
        np.array(kept_costs, dtype=np.int64).reshape(-1, costs.shape[1]),
        np.array(kept_limits, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """The objective as a linear one over ``x`` and products ``y = x_p x_q``.

    One row of every group (its *reference*, the last) is left out of the products: since the rows
    of a group sum to one, ``c_pq - c_pr - c_sq + c_sr`` per pair and changed linear terms say the
    same.

    Attributes:
        linear: f64[n].
        constant: Objective of the reference rows and of the model.
        left: i64[k], right: i64[k]: the rows of each product, ``group(left) < group(right)``.
        weight: f64[k], of each product; never zero.
    """

    linear: Floats
    constant: float
    left: Ints
    right: Ints
    weight: Floats

    @classmethod
    def of(cls, model: Model) -> Products:
        """Return the linear form of ``model``'s objective."""
        group, C = model.group, model.cross
        reference = model.offsets[1:] - 1
        if not len(C):
            none, weight = np.zeros(0, dtype=np.int64), np.zeros(0)
            return cls(
                linear=model.diagonal, constant=model.constant, left=none, right=none, weight=weight
            )
        r = reference[group]
        reduced = C - C[r, :] - C[:, r] + C[np.ix_(r, r)]
        # x_p alone meets the references of all other groups; C is zero inside a group, but a
        # reference row's own group must not count: C[p, r(g)] with p in g is 0 already.
        to_references = C[:, reference]
        own = to_references[np.arange(len(group)), group]
        linear = model.diagonal + to_references.sum(axis=1) - own
        base = C[np.ix_(reference, reference)]
        linear = linear - base.sum(axis=1)[group]
        constant = model.constant + 0.5 * float(base.sum())
        plain = np.ones(len(group), dtype=np.bool_)
        plain[reference] = False
        upper = (group[:, None] < group[None, :]) & plain[:, None] & plain[None, :]
        tiny = 1e-13 * float(np.abs(C).max(initial=0.0))
        left, right = np.nonzero(upper & (np.abs(reduced) > tiny))
        return cls(
            linear=linear,
            constant=constant,
            left=left,
            right=right,
            weight=reduced[left, right],
        )
