"""Structure at every scale: enumeration agrees, and the certificates hold."""

import numpy as np
import pytest

from bitquota.solver import Status, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution
from structured_problems import structured


class TestSolve:
    @pytest.mark.parametrize("seed", range(80))
    def test_equals_enumeration(self, seed):
        """Copies, constants and diverged candidates, from 1e-200 to 1e150."""
        problem, gap = structured(seed), (1e-6, 1e-4)[seed % 2]
        best, found = enumerate_all(problem), solve(problem, gap=gap)
        rows = problem.rows(best.choice)
        # What rounding is relative to: the terms of the best choice, not of what diverged.
        terms = np.abs(problem.diagonal[rows]).sum()
        if problem.cross is not None:
            terms += np.abs(problem.cross[np.ix_(rows, rows)]).sum()
        assert Status.OPTIMAL == found.status
        assert found.objective <= best.objective + 1.01 * gap * abs(best.objective) + 1e-9 * terms
        assert found.bound <= best.objective + 1e-12 * terms
        assert check_solution(problem, found).holds
