"""The problem's invariants and its three questions."""

import numpy as np
import pytest

from bitquota.errors import BudgetTooSmall, Infeasible, InvalidProblem
from bitquota.solver import Problem

CROSS = np.zeros((4, 4))
CROSS[0, 2] = CROSS[2, 0] = 0.5


def problem(**fields):
    given = {
        "diagonal": np.array([3.0, 1.0, 4.0, 0.5]),
        "cross": CROSS,
        "offsets": np.array([0, 2, 4]),
        "costs": np.array([[2, 4, 2, 4]]),
        "limits": np.array([6]),
    }
    return Problem(**given | fields)


class TestProblem:
    def test_evaluate(self):
        """A choice is worth the constant, its diagonal and each pair once."""
        assert problem(constant=0.25).evaluate([0, 0]) == 0.25 + 3.0 + 4.0 + 0.5

    def test_spent_is_integer(self):
        """What a choice takes is counted in integers."""
        spent = problem().spent([1, 0])
        assert spent.dtype == np.int64
        assert spent.tolist() == [6]

    @pytest.mark.parametrize(
        ("fields", "choice", "expected"),
        [
            ({}, [1, 0], True),
            ({}, [1, 1], False),
            ({"allowed": np.array([True, False, True, True])}, [1, 0], False),
            ({"forbidden_pairs": np.array([[1, 2]])}, [1, 0], False),
            ({"required_pairs": np.array([[1, 3]])}, [1, 0], False),
            ({"required_pairs": np.array([[1, 2]])}, [1, 0], True),
        ],
    )
    def test_is_feasible(self, fields, choice, expected):
        """Budgets, forbidden rows and both kinds of pairs all count."""
        assert problem(**fields).is_feasible(choice) is expected

    def test_required_pairs_become_forbidden_ones(self):
        """A required pair forbids its first row with all others of the second's group."""
        pairs = problem(required_pairs=np.array([[2, 1]])).all_forbidden_pairs()
        assert pairs.tolist() == [[0, 2]]

    @pytest.mark.parametrize(
        "fields",
        [
            {"diagonal": np.array([1.0, np.nan, 0.0, 0.0])},
            {"diagonal": np.zeros(3)},
            {"offsets": np.array([0, 2, 2, 4])},
            {"offsets": np.array([1, 4])},
            {"cross": CROSS + np.triu(np.ones((4, 4)))},
            {"cross": np.ones((4, 4))},
            {"costs": np.array([[1, 1, 1, -1]])},
            {"costs": np.array([[1.5, 1, 1, 1]])},
            {"costs": np.array([[2**62, 1, 1, 1]])},
            {"limits": np.array([6, 6])},
            {"constant": float("inf")},
            {"allowed": np.ones(3, dtype=bool)},
            {"forbidden_pairs": np.array([[0, 1]])},
            {"forbidden_pairs": np.array([[0, 9]])},
            {"groups": ("a",)},
        ],
    )
    def test_refuses(self, fields):
        """Whatever breaks an invariant is refused with a sentence."""
        with pytest.raises(InvalidProblem, match="got"):
            problem(**fields)

    @pytest.mark.parametrize("choice", [[0], [0, 2], [-1, 0]])
    def test_refuses_a_choice_outside(self, choice):
        """A choice names one row in each group."""
        with pytest.raises(InvalidProblem, match="one row index"):
            problem().evaluate(choice)

    def test_arrays_are_read_only(self):
        """Nobody changes a problem behind the solver's back."""
        with pytest.raises(ValueError, match="read-only"):
            problem().diagonal[0] = 1.0


class TestCheckBudgets:
    def test_names_the_smallest_plan(self):
        """A budget below the cheapest rows says what would be enough."""
        with pytest.raises(BudgetTooSmall, match="at least 4") as caught:
            problem(limits=np.array([3])).check_budgets()
        assert caught.value.details["smallest"] == 4

    def test_names_the_empty_group(self):
        """A group whose rows are all forbidden is named."""
        allowed = np.array([False, False, True, True])
        with pytest.raises(Infeasible, match="group0"):
            problem(allowed=allowed).check_budgets()
