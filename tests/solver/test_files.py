"""Problems from plain archives: what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from bitquota.errors import InvalidBudget, InvalidMatrix
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
