"""The linear relaxation of a separable core with several budgets: prices, and where it stands.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Floats = NDArray[np.float64]


def linear_relaxation(core: Core) -> tuple[Floats, Floats]:
    """Return budget prices ``λ >= 0`` f64[m] and row weights f64[n] of the relaxation's optimum.

    Pairs are ignored. Prices of any size are valid in a bound, so that nothing depends on the
    precision of the linear solver; where it finds no optimum, prices are zero and weights even.
    At most ``2 m`` rows have weights other than 0 and 1.
    """
    import scipy.sparse as sp
    from scipy.optimize import linprog

    even = 1.0 / np.diff(core.off)[core.grp]
    if not len(core.b):
        return np.zeros(0), even
    scale = float(np.abs(core.d).max(initial=0.0)) or 1.0
    unit = np.maximum(core.b, 1).astype(np.float64)
    found = linprog(
        core.d / scale,
        A_ub=core.A / unit[:, None],
        b_ub=core.b / unit,
        A_eq=sp.csr_matrix((np.ones(core.n), (core.grp, np.arange(core.n)))),
        b_eq=np.ones(core.n_groups),
        bounds=(0.0, None),
        method="highs-ipm",  # five times less than the simplex method at 25,000 rows
    )
    if found.status != 0:
        return np.zeros(len(core.b)), even
    prices = np.maximum(-np.asarray(found.ineqlin.marginals), 0.0) * scale / unit
    return prices, np.clip(np.asarray(found.x), 0.0, 1.0)
