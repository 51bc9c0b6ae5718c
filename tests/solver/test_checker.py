"""The checker accepts what is proved and nothing else."""

from __future__ import annotations

import ast
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitquota.solver
from bitquota.errors import InvalidInput
from bitquota.solver import Limit, Problem, Solution, Status
from bitquota.solver.brute_force import enumerate_all, feasible_choices
from bitquota.solver.checker import METHODS, check_certificate, check_solution
from certificate_maker import make_certificate, with_fields, with_shape
from strategies import any_problems, changed, planted_problems

ROUNDING = 1e-7
"""Between the checker's value and the maker's plain float64 one, relative to ``1 + |value|``."""

NO_CUTS = {
    "cut_rows": np.zeros(0, dtype=np.int64),
    "cut_columns": np.zeros(0, dtype=np.int64),
    "cut_values": np.zeros(0),
}


def two_groups(**fields) -> Problem:
    given = {
        "diagonal": np.array([3.0, 1.0, 4.0, 0.5]),
        "cross": np.array([[0, 0, 1, -1], [0, 0, 2, 0.5], [1, 2, 0, 0], [-1, 0.5, 0, 0]]),
        "offsets": np.array([0, 2, 4]),
        "costs": np.array([[1, 2, 1, 4]]),
        "limits": np.array([6]),
    }
    return Problem(**given | fields)


def least(problem: Problem) -> Fraction | float:
    """Return the exact least objective, by enumeration in fractions."""
    values = [
        _exact(problem, choice) for choices, _ in feasible_choices(problem) for choice in choices
    ]
    return min(values, default=math.inf)


def _exact(problem: Problem, choice) -> Fraction:
    rows = (problem.offsets[:-1] + choice).tolist()
    value = Fraction(problem.constant) + sum(Fraction(float(problem.diagonal[p])) for p in rows)
    if problem.cross is not None:
        value += sum(Fraction(float(problem.cross[p, q])) for p in rows for q in rows) / 2
    return value


class TestCheckCertificate:
    @settings(max_examples=150, deadline=None)
    @given(any_problems(), st.integers(0, 10**6), st.integers(0, 4))
    @pytest.mark.parametrize("method", METHODS)
    def test_proves_what_plain_arithmetic_finds(self, method, problem, seed, depth):
        """The proved bound is that of the formula, and never above the true optimum."""
        certificate, value = make_certificate(problem, seed=seed, depth=depth)
        verdict = check_certificate(problem, certificate, method=method)
        assert verdict.holds, verdict.reason
        assert verdict.proved <= least(problem)
        if math.isfinite(value):
            # Domination, which the maker does not look for, may prove more.
            assert verdict.proved >= value - ROUNDING * (1 + abs(value))
        else:
            assert math.inf == verdict.proved

    @settings(max_examples=60, deadline=None)
    @given(any_problems(), st.integers(0, 10**6), st.integers(0, 3))
    def test_exact_and_outward_differ_by_rounding(self, problem, seed, depth):
        """Outward rounding proves a little less than exact arithmetic, never more."""
        certificate, _ = make_certificate(problem, seed=seed, depth=depth)
        exact = check_certificate(problem, certificate, method="exact").proved
        outward = check_certificate(problem, certificate, method="outward").proved
        assert outward <= exact
        if math.isfinite(exact):
            scale = 1 + abs(exact)
            assert exact - outward <= 1e-11 * scale

    @settings(max_examples=100, deadline=None)
    @given(any_problems(), st.integers(0, 10**6), st.integers(0, 3))
    def test_claim_just_above_the_proof_is_refused(self, problem, seed, depth):
        """The largest claim that holds is the proved bound itself."""
        certificate, _ = make_certificate(problem, seed=seed, depth=depth)
        proved = check_certificate(problem, certificate).proved
        assert check_certificate(problem, with_fields(certificate, bound=proved)).holds
        if math.isfinite(proved):
            more = math.nextafter(math.nextafter(proved, math.inf), math.inf)
            verdict = check_certificate(problem, with_fields(certificate, bound=more))
            assert not verdict.holds
            assert "bound" in verdict.reason

    @settings(max_examples=300, deadline=None)
    @given(any_problems(max_groups=4, max_rows=3), st.integers(0, 10**6), st.data())
    def test_no_tampering_proves_a_falsehood(self, problem, seed, data):
        """Whatever is done to a certificate, what the checker says is proved is true."""
        certificate, _ = make_certificate(problem, seed=seed, depth=data.draw(st.integers(0, 3)))
        for _ in range(data.draw(st.integers(1, 3))):
            certificate = _tampered(certificate, data)
        for method in METHODS:
            verdict = check_certificate(problem, certificate, method=method)
            assert verdict.proved <= least(problem), verdict

    @pytest.mark.parametrize("method", METHODS)
    def test_shift_too_small_is_refused(self, method):
        """A shift that leaves the objective non-convex proves nothing."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, seed=1, depth=0)
        # On differences of rows the matrix is [[2t, 1/2], [1/2, 2t]]: convex from t = 1/4 on.
        for t, holds in ((0.24, False), (0.26, True)):
            shift = np.zeros((4, 2))
            shift[[0, 1, 2, 3], [0, 1, 0, 1]] = t
            plain = with_shape(certificate, shift=shift, **NO_CUTS, products=np.zeros((1, 4)))
            verdict = check_certificate(problem, plain, method=method)
            assert holds == verdict.holds
            if not holds:
                assert "semidefinite" in verdict.reason
                assert -math.inf == verdict.proved

    def test_singular_matrix_is_accepted_exactly(self):
        """A shift that makes the matrix exactly singular is proved in rationals."""
        cross = np.array([[0, 0, 1.0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
        problem = two_groups(cross=cross)
        certificate, _ = make_certificate(problem, seed=3, depth=0)
        shift = np.zeros((4, 2))
        shift[0, 0] = shift[2, 0] = 1.0
        singular = with_shape(
            certificate,
            shift=shift,
            **NO_CUTS,
            products=np.zeros((1, 4)),
        )
        assert check_certificate(problem, singular, method="exact").holds
        assert not check_certificate(problem, singular, method="outward").holds
        nearly = with_shape(singular, shift=np.nextafter(shift, 0))
        assert not check_certificate(problem, nearly, method="exact").holds

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"multipliers": np.array([[-1.0]])}, "negative"),
            ({"multipliers": np.array([[np.nan]])}, "finite"),
            ({"parent": np.array([0])}, "parent"),
            ({"convexification": np.array([1])}, "convexification"),
            ({"point": np.zeros((1, 4), dtype=np.float32)}, "positive sum"),
            ({"point": np.array([[2, -1, 1, 0]], dtype=np.float32)}, "negative"),
            ({"point": np.ones((1, 3), dtype=np.float32)}, "shape"),
            ({"allowed": np.packbits(np.array([[1, 0, 1, 1]]), axis=1)}, "allow every row"),
            ({"bound": math.nan}, "NaN"),
        ],
    )
    def test_malformed_field_is_named(self, fields, word):
        """A certificate that breaks the format proves nothing; the reason names the field."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, seed=1, depth=0)
        verdict = check_certificate(problem, with_fields(certificate, **fields))
        assert not verdict.holds
        assert word in verdict.reason
        assert -math.inf == verdict.proved

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"shift": np.array([[1, 1], [0, 1], [1, 0], [0, 1]], dtype=float)}, "symmetric"),
            ({"shift": np.zeros((4, 3))}, "shape"),
            ({"products": np.array([[0, -1e-9, 0, 0]])}, "negative"),
            (
                {
                    "cut_rows": np.array([0]),
                    "cut_columns": np.array([1]),
                    "cut_values": np.array([1.0]),
                },
                "two groups",
            ),
            (
                {
                    "cut_rows": np.array([0, 0]),
                    "cut_columns": np.array([2, 2]),
                    "cut_values": np.array([0.1, 0.1]),
                },
                "once",
            ),
            (
                {
                    "cut_rows": np.array([0]),
                    "cut_columns": np.array([2]),
                    "cut_values": np.array([-0.1]),
                },
                "negative",
            ),
            ({"support": np.array([True, True, True, False])}, "support"),
        ],
    )
    def test_malformed_convexification_is_named(self, fields, word):
        """Wrong signs, shapes and supports of a convexification are refused by name."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, seed=1, depth=0)
        verdict = check_certificate(problem, with_shape(certificate, **fields))
        assert not verdict.holds
        assert word in verdict.reason

    def test_cut_of_either_sign_on_a_forbidden_pair(self):
        """On a pair that cannot be chosen together a cut may be negative."""
        fields = {
            "cut_rows": np.array([0]),
            "cut_columns": np.array([2]),
            "cut_values": np.array([-0.1]),
        }
        problem = two_groups(forbidden_pairs=np.array([[2, 0]]))
        certificate, _ = make_certificate(problem, seed=1, depth=0)
        assert check_certificate(problem, with_shape(certificate, **fields)).holds

    def test_required_pair_forbids_the_other_rows(self):
        """``a`` requires ``b``: a cut between ``a`` and ``b``'s sibling may be negative."""
        fields = {
            "cut_rows": np.array([0]),
            "cut_columns": np.array([3]),
            "cut_values": np.array([-0.1]),
        }
        problem = two_groups(required_pairs=np.array([[0, 2]]))
        certificate, _ = make_certificate(problem, seed=1, depth=0)
        assert check_certificate(problem, with_shape(certificate, **fields)).holds

    def test_missing_child_is_noticed(self):
        """Dropping a child leaves its rows unproved, unless they are dominated or excluded."""
        problem = two_groups(limits=np.array([100]))
        certificate = _split(problem)
        whole = check_certificate(problem, certificate)
        assert least(problem) == whole.proved
        fields = ("parent", "allowed", "convexification", "point", "multipliers")
        part = with_fields(certificate, **{n: getattr(certificate, n)[:-1] for n in fields})
        # The last leaf is the best choice: without it the rest proves nothing.
        assert -math.inf == check_certificate(problem, part).proved

    def test_dominated_row_needs_no_proof(self):
        """A row that costs more and loses more with every partner may be left out."""
        problem = two_groups(
            cross=None, diagonal=np.array([1.0, 3.0, 4.0, 0.5]), limits=np.array([100])
        )
        masks = np.array([[1, 1, 1, 1], [1, 0, 0, 1]], dtype=bool)
        certificate = _leaves(problem, masks, [-1, 0])
        # Row 1 is dominated by row 0 (cost 2 against 1); row 2 (cost 1, row 3 costs 4) is not.
        assert -math.inf == check_certificate(problem, certificate).proved
        cheap = two_groups(
            cross=None,
            diagonal=np.array([1.0, 3.0, 4.0, 0.5]),
            limits=np.array([100]),
            costs=np.array([[1, 2, 4, 4]]),
        )
        assert check_certificate(cheap, certificate).proved == pytest.approx(1.5)

    def test_dominance_respects_forbidden_pairs(self):
        """A row does not dominate when it has an enemy that the other row lacks."""
        fields = {
            "cross": None,
            "diagonal": np.array([1.0, 3.0, 4.0, 0.5]),
            "limits": np.array([100]),
            "costs": np.array([[1, 2, 4, 4]]),
        }
        masks = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]], dtype=bool)
        problem = two_groups(**fields, forbidden_pairs=np.array([[0, 3]]))
        certificate = _leaves(problem, masks, [-1, 0, 1])
        assert check_certificate(problem, certificate).proved <= least(problem)

    def test_infeasible_problem_is_proved_by_its_root(self):
        """A budget below the cheapest rows makes the root visibly empty."""
        problem = two_groups(limits=np.array([1]))
        certificate, _ = make_certificate(problem, depth=0)
        verdict = check_certificate(problem, with_fields(certificate, bound=math.inf))
        assert verdict.holds
        assert math.inf == verdict.proved

    def test_infinite_claim_on_a_feasible_problem_is_refused(self):
        """Infeasibility must be proved like everything else."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, depth=3)
        assert not check_certificate(problem, with_fields(certificate, bound=math.inf)).holds

    def test_falls_back_to_exact_where_rounding_hides_the_proof(self):
        """A claim between the outward and the exact value is accepted by ``auto`` only."""
        rng = np.random.default_rng(0)
        groups, rows = 20, 3
        n = groups * rows
        factors = rng.normal(size=(n, 5)) * 1e3
        cross = factors @ factors.T
        group = np.repeat(np.arange(groups), rows)
        cross[group[:, None] == group] = 0
        problem = Problem(
            diagonal=rng.normal(size=n),
            cross=(cross + cross.T) / 2,
            offsets=np.arange(0, n + 1, rows),
            costs=rng.integers(1, 9, (1, n)),
            limits=np.array([90]),
        )
        certificate, _ = make_certificate(problem, depth=0)
        # A constant that cancels the bound brings the rounding of its terms to light.
        constant = -check_certificate(problem, certificate).proved
        problem = changed(problem, constant=constant)
        outward = check_certificate(problem, certificate, method="outward").proved
        exact = check_certificate(problem, certificate, method="exact").proved
        assert outward < exact
        claim = with_fields(certificate, bound=exact)
        assert not check_certificate(problem, claim, method="outward").holds
        verdict = check_certificate(problem, claim)
        assert verdict.holds
        assert verdict.exact_nodes == 1

    def test_unknown_method_is_refused(self):
        """The message lists the methods."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, depth=0)
        with pytest.raises(InvalidInput, match="exact, outward"):
            check_certificate(problem, certificate, method="guess")

    def test_shares_no_code_with_the_solver(self):
        """The checker imports nothing of the solver at run time but its own arithmetic."""
        folder = Path(bitquota.solver.__file__).parent
        own = {
            "checker",
            "checker_bounds",
            "checker_recursion",
            "checker_factor",
            "checker_joint",
            "checker_regions",
            "exact",
            "outward",
        }
        for name in own:
            tree = ast.parse((folder / f"{name}.py").read_text())
            typing_only = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
                for inner in ast.walk(node)
            }
            imported = {
                node.module
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and id(node) not in typing_only
            }
            solver = {m for m in imported if m and m.startswith("bitquota.solver")}
            assert solver <= {f"bitquota.solver.{other}" for other in own}


class TestCheckSolution:
    @settings(max_examples=80, deadline=None)
    @given(planted_problems(), st.integers(0, 10**6))
    def test_true_solution_holds(self, planted, seed):
        """A feasible choice, its objective and a proved bound are accepted."""
        certificate, _ = make_certificate(planted.problem, seed=seed, depth=2)
        proved = check_certificate(planted.problem, certificate).proved
        solution = Solution(
            status=Status.FEASIBLE,
            limit=Limit.NODE,
            choice=np.array(planted.choice),
            objective=planted.problem.evaluate(planted.choice),
            bound=min(proved, planted.problem.evaluate(planted.choice)),
            certificate=with_fields(certificate, bound=proved),
        )
        verdict = check_solution(planted.problem, solution)
        assert verdict.holds, verdict.reason

    def test_wrong_objective_is_refused(self):
        """The objective must be that of the choice."""
        problem = two_groups()
        solution = self._solution(problem, np.array([0, 0]), objective=7.0)
        assert "objective" in check_solution(problem, solution).reason

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"limits": np.array([4])}, "within 4"),
            ({"allowed": np.array([True, False, True, True])}, "allowed"),
            ({"forbidden_pairs": np.array([[3, 1]])}, "together"),
            ({"required_pairs": np.array([[1, 2]])}, "together"),
        ],
    )
    def test_broken_constraint_is_named(self, fields, word):
        """A choice that breaks a constraint is refused, whatever its objective."""
        problem = two_groups(**fields)
        choice = np.array([1, 1])
        solution = self._solution(problem, choice, objective=problem.evaluate(choice))
        verdict = check_solution(problem, solution)
        assert not verdict.holds
        assert word in verdict.reason

    def test_bound_beyond_the_certificate_is_refused(self):
        """The solution may not claim more than its certificate."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, depth=0)
        best = enumerate_all(problem)
        solution = Solution(
            status=Status.OPTIMAL,
            choice=best.choice,
            objective=best.objective,
            bound=best.objective,
            certificate=certificate,
        )
        assert "bound" in check_solution(problem, solution).reason

    def test_infeasibility_needs_an_infinite_bound(self):
        """A finite bound proves no infeasibility, however high."""
        problem = two_groups()
        certificate, _ = make_certificate(problem, depth=0)
        proved = check_certificate(problem, certificate).proved
        solution = Solution(
            status=Status.INFEASIBLE,
            bound=math.inf,
            certificate=with_fields(certificate, bound=proved),
        )
        assert "+inf" in check_solution(problem, solution).reason

    def test_bound_without_certificate_is_not_proved(self):
        """A bound alone is a claim."""
        problem = two_groups()
        assert "certificate" in check_solution(problem, enumerate_all(problem)).reason

    def _solution(self, problem, choice, objective):
        return Solution(
            status=Status.FEASIBLE, limit=Limit.METHOD, choice=choice, objective=objective
        )


def _leaves(problem: Problem, masks, parent):
    certificate, _ = make_certificate(problem, depth=0)
    count = len(masks)
    return with_fields(
        certificate,
        convexifications=(),
        parent=np.array(parent),
        allowed=np.packbits(masks, axis=1),
        convexification=np.full(count, -1),
        point=np.zeros((count, problem.n_rows), dtype=np.float32),
        multipliers=np.zeros((count, len(problem.limits))),
    )


def _split(problem: Problem):
    """Split both groups into single rows: the leaves are the four choices, the best one last."""
    masks = np.zeros((7, 4), dtype=bool)
    masks[0] = True
    masks[1, [0, 2, 3]] = masks[2, [1, 2, 3]] = True
    masks[3, [0, 2]] = masks[4, [1, 2]] = masks[5, [1, 3]] = masks[6, [0, 3]] = True
    if problem.evaluate([1, 1]) < problem.evaluate([0, 1]):
        masks[[5, 6]] = masks[[6, 5]]
        return _leaves(problem, masks, [-1, 0, 0, 1, 2, 1, 2])
    return _leaves(problem, masks, [-1, 0, 0, 1, 2, 2, 1])


def _tampered(certificate, data):
    """Return the certificate with one thing changed at random."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.integers(0, 10))
    nodes = certificate.n_nodes
    shape = certificate.convexifications[0] if certificate.convexifications else None
    factor = data.draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 100.0]))
    if kind == 0:
        allowed = certificate.allowed.copy()
        allowed[rng.integers(nodes), rng.integers(allowed.shape[1])] ^= 1 << rng.integers(8)
        return with_fields(certificate, allowed=allowed)
    if kind == 1 and nodes > 1:
        parent = certificate.parent.copy()
        node = rng.integers(1, nodes)
        parent[node] = rng.integers(-1, node + 1)
        return with_fields(certificate, parent=parent)
    if kind == 2 and nodes > 1:
        keep = np.arange(nodes) != rng.integers(1, nodes)
        names = ("allowed", "convexification", "point", "multipliers")
        fields = {name: getattr(certificate, name)[keep] for name in names}
        parent = np.minimum(certificate.parent[keep], np.arange(nodes - 1) - 1)
        return with_fields(certificate, parent=parent, **fields)
    if kind == 3:
        return with_fields(certificate, multipliers=certificate.multipliers * factor)
    if kind == 4:
        point = certificate.point * rng.random(certificate.point.shape).astype(np.float32)
        return with_fields(certificate, point=point)
    if kind == 10:
        return with_fields(certificate, recursion=True)
    if kind == 5:
        return with_fields(certificate, convexification=certificate.convexification - 1)
    if shape is None:
        return certificate
    if kind == 6:
        return with_shape(certificate, shift=shape.shift * factor)
    if kind == 7:
        return with_shape(certificate, cut_values=shape.cut_values * factor)
    if kind == 8:
        return with_shape(certificate, products=shape.products * factor)
    return with_shape(certificate, shift=shape.shift + rng.normal(size=shape.shift.shape) * 0.1)
