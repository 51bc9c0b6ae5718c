"""Mean plus standard errors: the objective that noise cannot make look better."""

from dataclasses import replace

import numpy as np
import pytest

from bitquota.candidates.budget import Budget
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.solver import build_problem, solve
from bitquota.solver.checker import check_solution
from refusals import refused
from seeded_jobs import inventory_of, matrix_of


class TestRobust:
    def test_noise_is_not_taken_for_gain(self):
        """A term that only noise makes small loses to one that is known well."""
        table = matrix_of(inventory_of(2)).table
        n = len(table.rows)
        sure, vague = 1, 2
        diagonal = np.full(n, 1.0)
        diagonal[[sure, vague]] = 0.2, 0.1
        error = np.full(n, 0.01)
        error[vague] = 0.3
        matrix = SensitivityMatrix(table=table, diagonal=diagonal, diagonal_error=error)
        everything = [Budget(resource="size_bits", limit=10**12)]
        chosen = [
            solve(build_problem(matrix.robust(kappa), everything)).choice[0] for kappa in (0.0, 1.0)
        ]
        assert [vague, sure] == chosen

    def test_proof_is_about_the_pessimistic_matrix(self):
        """The optimum is exact, and not above what any choice is worth with errors added."""
        matrix = matrix_of(inventory_of(5))
        problem = build_problem(matrix.robust(2.0), [Budget(resource="size_bits", limit=10**12)])
        solution = solve(problem, gap=1e-9)
        expected = matrix.predict(solution.choice) + 2.0 * replace(
            matrix, diagonal=matrix.diagonal_error, cross=matrix.cross_error
        ).predict(solution.choice)
        assert pytest.approx(expected) == solution.objective
        assert check_solution(problem, solution).holds

    @pytest.mark.parametrize("kappa", [-1.0, float("nan"), float("inf")])
    def test_numbers_that_are_none(self, kappa):
        """Standard errors to add are a number from 0 on."""
        with refused(InvalidInput):
            matrix_of(inventory_of(2)).robust(kappa)

    def test_needs_standard_errors(self):
        """Zero of them change nothing; without any there is nothing to add."""
        matrix = replace(matrix_of(inventory_of(2)), cross_error=None)
        assert matrix.robust(0.0) is matrix
        with refused(InvalidInput, robust=1.0):
            matrix.robust(1.0)
