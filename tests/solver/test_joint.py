"""Terms that join few groups: against enumeration and the matrix of all terms, and the checker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Status, solve
from bitquota.solver.archive import (
    certificate_from_bytes,
    certificate_to_bytes,
    problem_digest,
    problem_from_bytes,
    problem_to_bytes,
)
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_certificate, check_solution
from bitquota.solver.elimination import eliminated
from bitquota.solver.frontiers import even_limits, frontier
from bitquota.solver.native import is_sparse
from bitquota.solver.problem_document import ProblemDocument
from solver_claims import assert_equals_brute_force


def drawn(
    groups: int, rows: int, joined: list[tuple[int, int]], seed: int, *, rank: int = 0,
    budgets: int = 1,
) -> Problem:  # fmt: skip
    """Return layers whose errors fall with their bits; terms of any sign between ``joined``."""
    rng = np.random.default_rng(seed)
    bits = np.arange(2, 2 + rows)
    loss = np.exp(rng.normal(0, 1, (groups, 1)) + rng.normal(0, 0.1, (groups, rows))) * 4.0**-bits
    terms = np.array(
        [(g * rows + i, h * rows + j) for g, h in joined for i in range(rows) for j in range(rows)],
        dtype=np.int64,
    ).reshape(-1, 2)
    root = np.sqrt(loss.ravel())
    costs = rng.integers(1, 99, (budgets, groups, 1)) * bits
    factor = root[:, None] * rng.normal(size=(groups * rows, rank)) / np.sqrt(max(rank, 1))
    return Problem(
        diagonal=loss.ravel(),
        factor=factor if rank else None,
        terms=terms,
        term_values=0.6 * rng.normal(size=len(terms)) * root[terms].prod(axis=1),
        offsets=np.arange(groups + 1) * rows,
        costs=costs.reshape(budgets, groups * rows),
        limits=costs[:, :, rows // 2].sum(axis=1),
    )


def ring(groups: int) -> list[tuple[int, int]]:
    """Return neighbours along a ring."""
    return [(g, (g + 1) % groups) for g in range(groups)]


def blocks(groups: int, size: int) -> list[tuple[int, int]]:
    """Return all pairs within blocks."""
    return [(g, h) for g in range(groups) for h in range(g) if g // size == h // size]


ALL = [(g, h) for g in range(12) for h in range(g)]


class TestSmall:
    """Problems that can be enumerated."""

    @pytest.mark.parametrize("rank", [0, 2])
    @pytest.mark.parametrize("joined", [ring(7), blocks(7, 3), [(0, 6), (0, 3), (1, 3), (2, 5)]])
    @pytest.mark.parametrize("budgets", [0, 1, 2])
    def test_equals_enumeration(self, joined, rank, budgets):
        """A ring, blocks and a few pairs, alone and beside a factor; the checker agrees."""
        problem = drawn(7, 3, joined, len(joined) + rank, rank=rank, budgets=budgets)
        found, best = solve(problem, gap=1e-6), enumerate_all(problem)
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(best.objective, rel=1.01e-6)
        assert not found.certificate.convexifications
        for method in ("exact", "outward", "auto"):
            assert check_solution(problem, found, method=method).holds

    def test_pairs(self):
        """Forbidden and required pairs are kept, and the proof knows of them."""
        problem = replace(
            drawn(6, 3, ring(6), 3),
            forbidden_pairs=np.array([[0, 4], [7, 10]]),
            required_pairs=np.array([[1, 17]]),
        )
        found, best = solve(problem, gap=1e-6), enumerate_all(problem)
        assert found.objective == pytest.approx(best.objective, rel=1.01e-6)
        assert check_solution(problem, found).holds

    @pytest.mark.parametrize("joined", [[], ring(40)])
    def test_pairs_are_eliminated(self, joined):
        """Groups tied one to one, and rows that exclude each other, in a few regions."""
        problem = drawn(40, 3, joined, 4)
        tied = [(6 * g + 3 * a + j, 6 * g + 3 * (1 - a) + j)
                for g in range(12) for a in range(2) for j in range(3)]  # fmt: skip
        best = problem.rows(solve(problem).choice)
        problem = replace(
            problem, required_pairs=np.array(tied), forbidden_pairs=best[26:40].reshape(7, 2)
        )
        found = solve(problem)
        assert found.status is Status.OPTIMAL
        assert found.certificate.joint
        assert found.nodes < 20
        assert check_solution(problem, found).holds
        # Without the pairs there are better choices, and the same nodes prove less.
        free = replace(problem, required_pairs=best[:0], forbidden_pairs=best[:0])
        assert not check_certificate(free, found.certificate).holds

    @pytest.mark.parametrize("rank", [0, 2])
    def test_diverged_candidate(self, rank):
        """It sets neither the scale of prices nor the gap that counts as none."""
        problem = drawn(7, 3, ring(7), 4, rank=rank, budgets=2)
        for row, loss in ((0, 1e12), (4, 1e16), (8, 8.4e22)):
            diagonal = problem.diagonal.copy()
            diagonal[row] = loss
            assert_equals_brute_force(replace(problem, diagonal=diagonal))

    def test_entangled(self):
        """Terms between all groups, beside a factor, are taken as one matrix; so alone."""
        problem = drawn(12, 4, ALL, 5, rank=3)
        assert eliminated(problem) is None
        found = solve(problem, gap=1e-3)
        assert found.certificate.convexifications
        assert found.status is Status.OPTIMAL
        assert check_solution(problem, found).holds
        alone = replace(problem, factor=None)
        ours, theirs = solve(alone, gap=1e-3), solve(alone.dense(), gap=1e-3)
        assert ours.objective == theirs.objective
        assert check_solution(alone, ours).holds

    def test_a_sparse_matrix_is_seen(self):
        """A matrix with few blocks gets the same bound without being asked."""
        problem = drawn(24, 3, blocks(24, 4), 7)
        whole = problem.dense()
        assert is_sparse(whole)
        ours, theirs = solve(problem), solve(whole)
        assert not theirs.certificate.convexifications
        assert ours.bound == theirs.bound
        assert check_solution(whole, theirs).holds
        assert not is_sparse(drawn(12, 4, ALL, 5).dense())


class TestBound:
    """What is proved, and what is not."""

    problem = drawn(60, 4, [*blocks(40, 5), *ring(60)[41:58]], 11, rank=4)

    def test_holds_at_its_bound_and_not_above(self):
        """Neither a visibly higher bound nor other numbers are proved."""
        found = solve(self.problem)
        certificate = found.certificate
        assert found.relative_gap < 1.01e-4
        assert check_certificate(self.problem, certificate).holds
        higher = replace(certificate, bound=certificate.bound + 2e-4 * abs(certificate.bound))
        assert not check_certificate(self.problem, higher).holds
        changed = replace(certificate, w=certificate.w * 1.5)
        assert not check_certificate(self.problem, changed).holds

    def test_terms_count(self):
        """A certificate does not hold for a problem with other terms."""
        certificate = solve(self.problem).certificate
        values = self.problem.term_values - 0.1 * np.abs(self.problem.term_values)
        assert not check_certificate(replace(self.problem, term_values=values), certificate).holds

    def test_noise_costs_nothing(self):
        """Blocks of random terms close in a few nodes."""
        found = solve(drawn(60, 4, blocks(60, 4), 2))
        assert found.status is Status.OPTIMAL
        assert found.stats.nodes <= 20

    def test_limits(self):
        """Limits of nothing still leave a choice and a bound that holds."""
        for wish in ({"time_limit_s": 0.0}, {"cancelled": lambda: True}, {"node_limit": 1}):
            found = solve(self.problem, gap=0.0, **wish)
            assert found.limit in (Limit.TIME, Limit.CANCELLED, Limit.NODE)
            assert np.isfinite(found.bound)
            assert check_solution(self.problem, found).holds

    def test_many(self):
        """4,000 rows in a chain, more than a matrix is bounded for, close at the root."""
        problem = drawn(1000, 4, ring(1000)[:-1], 4, budgets=2)
        found = solve(problem, gap=1e-3)
        assert found.status is Status.OPTIMAL
        assert found.stats.nodes == 1
        assert check_certificate(problem, found.certificate).holds

    def test_frontier(self):
        """More budget, less loss; every point has a bound."""
        problem = drawn(24, 3, blocks(24, 4), 7)
        points = frontier(problem, even_limits(problem, 5)[1:4])
        losses = [point.solution.objective for point in points]
        assert losses == sorted(losses, reverse=True)
        assert all(point.solution.relative_gap < 1.01e-4 for point in points)


class TestProblem:
    """What such a problem must be, and its forms."""

    def test_forms(self):
        """List and matrix are worth the same, and come from each other."""
        problem = drawn(5, 3, ring(5), 1)
        choice = [0, 1, 2, 1, 0]
        assert problem.dense().evaluate(choice) == pytest.approx(problem.evaluate(choice))
        again = problem.dense().listed()
        assert np.array_equal(again.terms, problem.terms)
        assert np.array_equal(again.term_values, problem.term_values)
        assert problem_digest(again) == problem_digest(problem)

    def test_order_and_zeros(self):
        """Terms are sorted, the lower row first, and zeros are none."""
        problem = drawn(3, 2, [], 0)
        given = replace(
            problem, terms=np.array([[4, 0], [2, 1], [0, 2]]), term_values=np.array([1.0, 2.0, 0.0])
        )
        assert [[0, 4], [1, 2]] == given.terms.tolist()
        assert [1.0, 2.0] == given.term_values.tolist()
        assert replace(given, term_values=np.zeros(2)).separable

    @pytest.mark.parametrize(
        ("terms", "values", "must"),
        [
            ([[0, 1]], [1.0], "rows of different groups"),
            ([[0, 2], [2, 0]], [1.0, 1.0], "each pair of rows once"),
            ([[0, 9]], [1.0], "must name rows 0 to 5"),
            ([[0, 2]], [1.0, 2.0], r"shape \[1\]"),
            ([[0, 2]], [np.nan], "must be finite"),
            ([[0, 2]], [1e308], "must sum to less"),
        ],
    )
    def test_bad_terms(self, terms, values, must):
        """What cannot be terms ends in a sentence."""
        with pytest.raises(InvalidProblem, match=must):
            replace(drawn(3, 2, [], 0), terms=np.array(terms), term_values=np.array(values))

    def test_both_forms(self):
        """A matrix beside a list is refused."""
        problem = drawn(3, 2, ring(3), 0)
        with pytest.raises(InvalidProblem, match="not both"):
            replace(problem, cross=problem.dense().cross)

    def test_too_entangled(self):
        """Many rows with terms between all groups end in a sentence."""
        joined = [(g, h) for g in range(14) for h in range(g)]
        problem = drawn(900, 4, joined, 0)
        with pytest.raises(InvalidProblem, match="must have terms that join few groups"):
            solve(problem)

    def test_archive(self):
        """Problem and certificate survive their files."""
        problem = drawn(6, 3, ring(6), 2, rank=2)
        again = problem_from_bytes(problem_to_bytes(problem))
        kept = certificate_from_bytes(certificate_to_bytes(solve(problem).certificate))
        assert check_certificate(again, kept).holds

    def test_document(self):
        """A document may state vectors and a few terms beside them."""
        rng = np.random.default_rng(0)
        groups = [
            {
                "name": f"g{g}",
                "candidates": [
                    {
                        "label": f"W{bits}", "loss": 4.0**-bits, "costs": {"size_bits": bits},
                        "factor": (2.0**-bits * rng.normal(size=2)).tolist(),
                    }
                    for bits in (2, 4)
                ],
            }
            for g in range(4)
        ]  # fmt: skip
        document = ProblemDocument.from_json(
            {
                "schema": "bitquota/problem/1", "groups": groups,
                "cross": [{"first": ["g3", "W2"], "second": ["g0", "W2"], "loss": -0.25}],
                "budgets": [{"limit": 12}],
            }
        )  # fmt: skip
        from bitquota.solver.posed_problem import posed

        problem = posed(document, lambda _: pytest.fail("no matrix is named")).problem
        assert [[0, 6]] == problem.terms.tolist()
        assert problem.factor.shape == (8, 2)
        found = solve(problem, gap=1e-9)
        assert found.objective == pytest.approx(enumerate_all(problem).objective)
        assert [0, 6] == problem.rows(found.choice)[[0, 3]].tolist()
