"""The linear relaxation of a separable core with several budgets: prices, and where it stands.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.factor_relaxation import Terms, best_dual

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Floats = NDArray[np.float64]

TOLERANCE = 1e-9
"""What smoothing may cost the bound, relative to it."""


def linear_relaxation(core: Core) -> tuple[Floats, Floats]:
    """Return budget prices ``λ >= 0`` f64[m] and row weights f64[n] near the relaxation's optimum.

    Pairs are ignored. The relaxation is that of a factor without columns, and the dual has one
    number per budget. Prices of any size are valid in a bound, so nothing depends on how near.
    """
    terms = Terms(
        linear=core.d, U=np.zeros((core.n, 0)), off=core.off, ok=np.ones(core.n, dtype=np.bool_),
        A=core.A, b=core.b, constant=core.constant, halt=core.halt,
    )  # fmt: skip
    _, prices, weights = best_dual(terms, TOLERANCE)
    return prices, weights
