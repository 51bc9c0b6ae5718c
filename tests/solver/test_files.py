"""Problems from plain archives: what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from bitquota.errors import InvalidBudget, InvalidMatrix, InvalidProblem
from bitquota.solver import read_problem
from refusals import refused


def write(path, **changed):
    """Write a problem of two groups of two candidates, with some arrays replaced."""
    arrays = {
        "G": np.diag([4.0, 1.0, 3.0, 1.0]), "sizes": np.array([[2, 4], [2, 4]]),
        "params": np.array([1, 1]), "budgets": np.array([6.5]),
    }  # fmt: skip
    np.savez(path, **arrays | changed)
    return path


class TestReadProblem:
    def test_budgets(self, tmp_path):
        """By index, as an average, or an integer limit."""
        path = write(tmp_path / "p.npz")
        assert [int(read_problem(path, **given).limits[0]) for given in (
            {"budget_index": 0}, {"budget": "3 bits"}, {"budget": "7"},
        )] == [6, 6, 7]  # fmt: skip

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
    def test_budgets_that_are_no_limit(self, tmp_path, value):
        """Whether they stand in the file or are given."""
        path = write(tmp_path / "p.npz", budgets=np.array([value]))
        with refused(InvalidBudget, budget=str(np.float64(value))):
            read_problem(path, budget_index=0)
        for given in (str(value), f"{value} bits"):
            with refused(InvalidBudget, budget=given):
                read_problem(path, budget=given)

    @pytest.mark.parametrize("name", ["G", "sizes", "params", "budgets"])
    def test_arrays_that_are_no_numbers(self, tmp_path, name):
        """The array is named."""
        with refused(InvalidMatrix, array=name):
            read_problem(write(tmp_path / "p.npz", **{name: np.array(["a"])}), budget_index=0)

    def test_whole_numbers_beyond_floats(self, tmp_path):
        """Sizes and budgets of more than 2^53 are taken to the last unit."""
        big = 2**53
        path = write(
            tmp_path / "p.npz",
            sizes=np.array([[big + 1, 2 * big + 1], [1, 3]]),
            budgets=np.array([2 * big + 3]),
        )
        problem = read_problem(path, budget_index=0)
        assert [[big + 1, 2 * big + 1, 1, 3]] == problem.costs.tolist()
        assert [2 * big + 3] == problem.limits.tolist()

    @pytest.mark.parametrize(
        ("text", "limit"), [("4.1 bits", 8_200_000_000), ("4.35 bits", 8_700_000_000), ("6.7", 6)]
    )
    def test_decimals_are_exact(self, tmp_path, text, limit):
        """A budget is the decimal that is written, not the float nearest to it."""
        given = write(tmp_path / "p.npz", params=np.array([10**9, 10**9]))
        assert limit == int(read_problem(given, budget=text).limits[0])

    @pytest.mark.parametrize(
        ("value", "error"),
        [
            (np.nan, InvalidMatrix),
            (np.inf, InvalidMatrix),
            (1e308, InvalidProblem),
            (-1e308, InvalidProblem),
            (5e-324, InvalidProblem),
        ],
    )
    def test_terms_out_of_range(self, tmp_path, value, error):
        """Infinite ones, those whose sum would be, and those too small to have all their digits."""
        G = np.diag([4.0, 1.0, 3.0, 1.0])
        G[0, 2] = value
        with refused(error):
            read_problem(write(tmp_path / "p.npz", G=G), budget_index=0)

    @pytest.mark.parametrize("dtype", [np.complex128, object])
    def test_numbers_of_another_kind(self, tmp_path, dtype):
        """Complex ones are refused, and objects unread."""
        with refused(InvalidMatrix):
            read_problem(write(tmp_path / "p.npz", G=np.eye(4).astype(dtype)), budget_index=0)
