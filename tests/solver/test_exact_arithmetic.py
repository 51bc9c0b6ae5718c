"""The two arithmetics of the checker: exact integers and outward rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.solver.exact import dyadic, is_positive_semidefinite
from bitquota.solver.outward import is_positive_definite, round_down, wide

SMALL = st.integers(-6, 6)


class TestDyadic:
    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
    def test_reproduces_every_float(self, values):
        """Integer times power of two is the float, subnormal numbers included."""
        (integers,), exponent = dyadic(np.array(values))
        assert [Fraction(v) for v in values] == [
            Fraction(i) * Fraction(2) ** exponent for i in integers
        ]

    def test_shares_one_exponent(self):
        """Several arrays come back over the same power of two; integers stay exact."""
        (a, b), exponent = dyadic(np.array([0.5]), np.array([2**62 - 1]))
        assert (1 << -exponent) // 2 == a[0]
        assert (2**62 - 1) << -exponent == b[0]


class TestIsPositiveSemidefinite:
    @given(st.integers(1, 5), st.integers(1, 5), st.data())
    def test_accepts_every_gram_matrix(self, order, rank, data):
        """``F Fᵀ`` is positive semidefinite, of any rank."""
        F = np.array([[data.draw(SMALL) for _ in range(rank)] for _ in range(order)], dtype=object)
        assert is_positive_semidefinite(F @ F.T)

    @given(st.integers(2, 5), st.data())
    def test_agrees_with_eigenvalues(self, order, data):
        """Where the least eigenvalue is clearly off zero, its sign is the answer."""
        A = np.array([[data.draw(SMALL) for _ in range(order)] for _ in range(order)])
        A = A + A.T + data.draw(st.integers(0, 30)) * np.eye(order, dtype=int)
        smallest = float(np.linalg.eigvalsh(A).min())
        if abs(smallest) > 1e-9:
            assert (smallest > 0) == is_positive_semidefinite(A.astype(object))

    @pytest.mark.parametrize(
        ("matrix", "expected"),
        [
            ([[0, 0], [0, 5]], True),
            ([[0, 1], [1, 5]], False),
            ([[1, 1], [1, 1]], True),
            ([[10**40, 10**40], [10**40, 10**40 - 1]], False),
            ([[-1]], False),
        ],
    )
    def test_decides_borderline_cases(self, matrix, expected):
        """Zero pivots and differences in the last of forty digits are decided exactly."""
        assert expected == is_positive_semidefinite(np.array(matrix, dtype=object))


class TestIsPositiveDefinite:
    @given(st.integers(1, 8), st.integers(0, 1000))
    def test_accepts_well_conditioned_matrices(self, order, seed):
        """A Gram matrix plus a clear multiple of the identity is accepted, badly scaled too."""
        rng = np.random.default_rng(seed)
        F = rng.normal(size=(order, order))
        scale = 10.0 ** rng.uniform(-6, 6, order)
        A = (F @ F.T + 1e-6 * np.eye(order)) * scale * scale[:, None]
        A = (A + A.T) / 2
        assert is_positive_definite(wide(A), wide(np.zeros_like(A)))

    @given(st.integers(2, 8), st.integers(0, 1000))
    def test_never_accepts_a_negative_eigenvalue(self, order, seed):
        """A least eigenvalue of -1e-9 (of a matrix of norm 1) is always refused."""
        rng = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(rng.normal(size=(order, order)))
        values = np.concatenate([[-1e-9], rng.uniform(0.01, 1, order - 1)])
        A = (basis * values) @ basis.T
        A = (A + A.T) / 2
        assert not is_positive_definite(wide(A), wide(np.zeros_like(A)))

    def test_error_counts_against_the_matrix(self):
        """A matrix that its error could make indefinite is refused."""
        A = wide(np.array([[1.0, 0.9], [0.9, 1.0]]))
        assert is_positive_definite(A, wide(np.full((2, 2), 0.04)))
        assert not is_positive_definite(A, wide(np.full((2, 2), 0.06)))


class TestRoundDown:
    @given(st.floats(-1e300, 1e300), st.integers(-3, 3))
    def test_is_the_largest_float_not_above(self, value, steps):
        """The result is at most the value, and the next float is above it."""
        given_value = np.longdouble(value) * (1 + steps * np.finfo(np.longdouble).eps)
        down = round_down(given_value)
        assert down <= given_value
        assert np.nextafter(down, np.inf) > given_value
