"""Linear constraints that the solvers which take matrices share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bitquota.solver.backends.answer import Task
    from bitquota.solver.backends.model import Model, Products

LARGEST_COEFFICIENT = 1e6
"""Budget rows are scaled down to this: larger numbers lose digits to a solver's tolerances."""
_RELATIVE_TOLERANCE = 1e-6


def objective_tolerance(model: Model) -> float:
    """Return by what order a float solver's bound may be off: 1e-6 of the typical objective."""
    spans = zip(model.offsets[:-1].tolist(), model.offsets[1:].tolist(), strict=True)
    typical = sum(float(np.median(np.abs(model.diagonal[a:b]))) for a, b in spans)
    return _RELATIVE_TOLERANCE * max(typical, abs(model.constant), 1.0)


@dataclass(slots=True)
class RowList:
    """Rows ``lower <= a·(x, y) <= upper``, collected one by one.

    Columns: the ``n`` rows of the model, then the products.
    """

    columns: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(
        self, columns: Iterable[int], values: Iterable[float], lower: float, upper: float
    ) -> None:
        """Append one row."""
        self.columns.append(np.fromiter(columns, dtype=np.int64))
        self.values.append(np.fromiter(values, dtype=np.float64))
        self.lower.append(lower)
        self.upper.append(upper)

    def matrix(self, width: int) -> sp.csr_matrix:
        """Return the rows as a sparse matrix with ``width`` columns."""
        counts = [len(c) for c in self.columns]
        pointer = np.concatenate([[0], np.cumsum(counts)])
        columns = np.concatenate(self.columns) if self.columns else np.zeros(0, dtype=np.int64)
        values = np.concatenate(self.values) if self.values else np.zeros(0)
        return sp.csr_matrix((values, columns, pointer), shape=(len(counts), width))

    @classmethod
    def of(cls, task: Task, products: Products | None) -> RowList:
        """Return one row per group, the budgets, pairs and covers, and what ties ``y`` to ``x``."""
        rows, model = cls(), task.model
        for start, stop in zip(
            model.offsets[:-1].tolist(), model.offsets[1:].tolist(), strict=True
        ):
            rows.add(range(start, stop), [1.0] * (stop - start), 1.0, 1.0)
        for cost, limit in zip(model.costs, model.limits.tolist(), strict=True):
            factor = min(1.0, LARGEST_COEFFICIENT / max(int(cost.max()), 1))
            used = np.flatnonzero(cost)
            rows.add(used, cost[used] * factor, -np.inf, limit * factor)
        for a, b in model.pairs.tolist():
            rows.add((a, b), (1.0, 1.0), -np.inf, 1.0)
        for cover in task.covers:
            rows.add(cover, [1.0] * len(cover), -np.inf, task.cover_limit(cover))
        if products is not None:
            rows.add_products(model, products)
        return rows

    def add_products(self, model: Model, products: Products) -> None:
        """Append what ``y = x_p x_q`` means for binary ``x``, as tight as first level gives.

        ``Σ_q y_pq <= x_p`` and ``Σ_p y_pq <= x_q`` over the rows of one other group; and, since the
        product of two references is not negative, ``Σ x_p + Σ x_q - Σ y_pq <= 1``. Sums over
        products that are missing because their weight is zero stay valid; there,
        ``y_pq >= x_p + x_q - 1`` is added one by one.
        """
        n, group = model.n_rows, model.group
        sides: dict[tuple[int, int], list[int]] = {}
        blocks: dict[tuple[int, int], list[int]] = {}
        for k, (p, q) in enumerate(
            zip(products.left.tolist(), products.right.tolist(), strict=True)
        ):
            g, h = int(group[p]), int(group[q])
            sides.setdefault((p, h), []).append(k)
            sides.setdefault((q, g), []).append(k)
            blocks.setdefault((g, h), []).append(k)
        for (p, _), members in sides.items():
            columns = [n + k for k in members]
            self.add([*columns, p], [1.0] * len(columns) + [-1.0], -np.inf, 0.0)
        sizes = np.diff(model.offsets)
        for (g, h), members in blocks.items():
            if len(members) == (sizes[g] - 1) * (sizes[h] - 1):
                plain = [
                    p
                    for s in (g, h)
                    for p in range(int(model.offsets[s]), int(model.offsets[s + 1]) - 1)
                ]
                self.add(
                    [*plain, *(n + k for k in members)],
                    [1.0] * len(plain) + [-1.0] * len(members),
                    -np.inf,
                    1.0,
                )
                continue
            for k in members:
                pair = (int(products.left[k]), int(products.right[k]), n + k)
                self.add(pair, (1.0, 1.0, -1.0), -np.inf, 1.0)
