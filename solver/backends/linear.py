"""Linear constraints that the solvers which take matrices share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.backends.answer import Task
    from bitquota.solver.backends.model import Model

LARGEST_COEFFICIENT = 1e6
"""Budget rows are scaled down to this: larger numbers lose digits to a solver's tolerances."""
_RELATIVE_TOLERANCE = 1e-6


def objective_tolerance(model: Model) -> float:
    """Return by what order a float solver's bound may be off: 1e-6 of the typical objective."""
    return _RELATIVE_TOLERANCE * max(model.typical, abs(model.constant), 1.0)


def constraints(task: Task) -> tuple[sp.csr_matrix, sp.csr_matrix, NDArray[np.float64]]:
    """Return ``E``, ``A`` and ``b``: choices are the binary ``x`` with ``Ex = 1``, ``Ax <= b``.

    ``E`` has one line per group; ``A`` has the budgets, the pairs and the covers.
    """
    model, n = task.model, task.model.n_rows
    one_each = sp.csr_matrix((np.ones(n), (model.group, np.arange(n))))
    factor = np.minimum(1.0, LARGEST_COEFFICIENT / model.costs.max(axis=1, initial=1))
    sets = [*model.pairs, *task.covers]
    line = np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
    column = np.concatenate([np.zeros(0, dtype=np.int64), *sets])
    together = sp.csr_matrix((np.ones(len(line)), (line, column)), shape=(len(sets), n))
    limits = [1.0] * len(model.pairs) + [task.cover_limit(cover) for cover in task.covers]
    return (
        one_each,
        sp.vstack([sp.csr_matrix(model.costs * factor[:, None]), together], format="csr"),
        np.concatenate([model.limits * factor, limits]),
    )
