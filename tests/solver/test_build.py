"""From a matrix and wishes to a problem: every constraint binding, alone and all at once."""

from dataclasses import replace

import numpy as np
import pytest

from bitquota.candidates.budget import Budget
from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import CandidateTable, enumerate_candidates
from bitquota.errors import BudgetTooSmall, InvalidInput, InvalidProblem, UnknownLayer
from bitquota.matrix import SensitivityMatrix
from bitquota.solver import Status, build_problem, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution

BITS = (2, 4, 8)


def layer(name, columns, group=""):
    """Return a linear layer of four rows."""
    return Layer(
        name=name, kind=LayerKind.LINEAR, weight_name=f"{name}.weight", weight_shape=(4, columns),
        rows=4, columns=columns, n_weights=4 * columns, n_macs=40 * columns, group=group,
    )  # fmt: skip


@pytest.fixture(scope="module")
def matrix():
    """Seven layers, two of them tied, three rows each, indefinite cross terms."""
    layers = tuple(layer(f"l{k}", 8 * (1 + k % 4)) for k in range(7))
    inventory = Inventory(model_digest="sha256:x", layers=layers).tie([["l2", "l3"]])
    table = enumerate_candidates(inventory, BITS)
    rows = tuple(
        replace(
            row,
            candidates=tuple(
                replace(c, activation_size_bits=100 * c.weight_bits + 7 * k, bit_ops=bit_ops(c, k))
                for c in row.candidates
            ),
        )
        for k, row in enumerate(table.rows)
    )
    table = CandidateTable(rows=rows)
    rng = np.random.default_rng(5)
    bits = np.array([row.candidates[0].weight_bits for row in rows])
    diagonal = rng.lognormal(0, 1, 6).repeat(3) * 2.0**-bits
    cross = rng.normal(size=(18, 18)) * np.sqrt(np.outer(diagonal, diagonal)) * 0.3
    cross = cross + cross.T
    group = table.group_of_row
    cross[group[:, None] == group[None, :]] = 0.0
    return SensitivityMatrix(table=table, diagonal=diagonal, cross=cross)


def bit_ops(candidate, row):
    """Return bit operations that do not follow the sizes."""
    return candidate.weight_bits * (1000 - 50 * row)


def latencies():
    """Return nanoseconds that do not follow the sizes either."""
    return np.random.default_rng(9).integers(10, 60, 18) * np.tile([1, 2, 3], 6)


def latency(matrix, limit):
    """Return a budget of those nanoseconds."""
    costs = [
        LayerCost(layer=c.layer, candidate=c.label, cost=int(ns) if k == 0 else 0)
        for row, ns in zip(matrix.table.rows, latencies(), strict=True)
        for k, c in enumerate(row.candidates)
    ]
    prices = CostTable(resource="latency_ns", model_digest="", layers=tuple(costs))
    return Budget(resource="latency_ns", limit=limit, prices=prices)


def size(matrix, share=0.55):
    """Return a budget of stored bits between the smallest and the largest plan."""
    costs = matrix.table.costs("size_bits").reshape(-1, 3)
    least, most = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    return Budget(resource="size_bits", limit=least + int(share * (most - least)))


def solved(problem):
    """Solve exactly; the answer must be that of enumeration and its certificate hold."""
    solution = solve(problem, gap=0.0)
    best = enumerate_all(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(best.objective, rel=1e-11)
    verdict = check_solution(problem, solution)
    assert verdict.holds, verdict.reason
    return solution


class TestBuildProblem:
    @pytest.mark.parametrize("resource", ["bit_ops", "code_bits", "activation_bits_total"])
    def test_second_budget_binds(self, matrix, resource):
        """A further budget, one unit below what the free optimum takes, changes the answer."""
        free = solved(build_problem(matrix, [size(matrix)]))
        costs = matrix.table.costs(resource)
        taken = int(costs[build_problem(matrix, []).rows(free.choice)].sum())
        tight = Budget(resource=resource, limit=taken - 1)
        problem = build_problem(matrix, [size(matrix), tight])
        bound = solved(problem)
        assert problem.resources == ("size_bits", resource)
        assert int(problem.spent(bound.choice)[1]) < taken
        assert bound.objective > free.objective

    def test_latency_table_binds(self, matrix):
        """Nanoseconds per row add up to a budget of their own."""
        free = solved(build_problem(matrix, [size(matrix)]))
        rows = build_problem(matrix, []).rows(free.choice)
        tight = latency(matrix, int(latencies()[rows].sum()) - 1)
        problem = build_problem(matrix, [size(matrix), tight])
        bound = solved(problem)
        assert int(problem.spent(bound.choice)[1]) <= tight.limit
        assert bound.objective > free.objective

    def test_largest_activation_forbids_rows(self, matrix):
        """The largest activation is no sum: each row above the limit goes."""
        free = solved(build_problem(matrix, []))
        sizes = matrix.table.costs("activation_bits_max")
        rows = build_problem(matrix, []).rows(free.choice)
        tight = Budget(resource="activation_bits_max", limit=int(sizes[rows].max()) - 1)
        problem = build_problem(matrix, [tight])
        bound = solved(problem)
        assert int(sizes[problem.rows(bound.choice)].max()) <= tight.limit
        assert problem.resources == ()
        assert bound.objective > free.objective

    def test_at_most_k_at_a_width(self, matrix):
        """No more than two groups at 8 bits where three and more would be better."""
        free = solved(build_problem(matrix, [size(matrix, 0.8)]))
        problem = build_problem(matrix, [size(matrix, 0.8)], at_most={8: 2})
        bound = solved(problem)
        assert (free.choice == 2).sum() > 2 == (bound.choice == 2).sum()

    def test_fixed_and_forbidden(self, matrix):
        """What the free optimum would do is taken away, group by group."""
        free = solved(build_problem(matrix, [size(matrix)]))
        labels = [matrix.table.rows[p].label for p in build_problem(matrix, []).rows(free.choice)]
        groups = matrix.table.groups
        problem = build_problem(
            matrix,
            [size(matrix)],
            fixed=[(groups[0], "W2" if labels[0] != "W2" else "W4")],
            forbidden=[(groups[5], labels[5])],
        )
        bound = solved(problem)
        chosen = [matrix.table.rows[p].label for p in problem.rows(bound.choice)]
        assert chosen[0] == ("W2" if labels[0] != "W2" else "W4")
        assert chosen[5] != labels[5]

    def test_tied_layers_take_one_candidate(self, matrix):
        """Two tied layers are one group of the problem; both get its bit-width."""
        problem = build_problem(matrix, [size(matrix)])
        assert problem.n_groups == 6
        decoded = matrix.table.decode(solved(problem).choice.tolist())
        bits = {c.layer: c.weight_bits for c in decoded}
        assert len(bits) == 7
        assert bits["l2"] == bits["l3"]

    def test_forbidden_pair_binds(self, matrix):
        """Two candidates of the free optimum must not go together."""
        free = solved(build_problem(matrix, [size(matrix)]))
        rows = build_problem(matrix, []).rows(free.choice)
        rules = [(matrix.table.groups[g], matrix.table.rows[rows[g]].label) for g in (1, 4)]
        problem = build_problem(matrix, [size(matrix)], forbidden_pairs=[(rules[0], rules[1])])
        bound = solved(problem)
        assert not {rows[1], rows[4]} <= set(problem.rows(bound.choice).tolist())
        assert bound.objective > free.objective

    def test_required_pair_binds(self, matrix):
        """The free optimum's candidate needs another one elsewhere."""
        free = solved(build_problem(matrix, [size(matrix)]))
        rows = build_problem(matrix, []).rows(free.choice)
        first = (matrix.table.groups[1], matrix.table.rows[rows[1]].label)
        other = next(b for b in BITS if matrix.table.rows[rows[4]].label != f"W{b}")
        problem = build_problem(
            matrix, [size(matrix)], required_pairs=[(first, (matrix.table.groups[4], f"W{other}"))]
        )
        bound = solved(problem)
        chosen = problem.rows(bound.choice)
        assert chosen[1] != rows[1] or matrix.table.rows[chosen[4]].label == f"W{other}"
        assert bound.objective > free.objective

    def test_all_together(self, matrix):
        """All of them at once: the optimum of enumeration, proved, dearer than with one budget."""
        groups = matrix.table.groups
        wishes = {
            "at_most": {8: 2},
            "fixed": [(groups[0], "W4")],
            "forbidden": [(groups[3], "W8")],
            "forbidden_pairs": [((groups[1], "W8"), (groups[4], "W8"))],
            "required_pairs": [((groups[2], "W4"), (groups[5], "W4"))],
        }
        budgets = [
            size(matrix, 0.6),
            Budget(resource="bit_ops", limit=16_000),
            latency(matrix, 430),
            Budget(resource="activation_bits_max", limit=910),
        ]
        problem = build_problem(matrix, budgets, **wishes)
        solution = solved(problem)
        assert len(problem.limits) == 4
        assert problem.is_feasible(solution.choice)
        relaxed = solved(build_problem(matrix, budgets[:1]))
        assert solution.objective > relaxed.objective

    def test_no_minimum_spend(self, matrix):
        """A budget that nothing needs leaves the answer as it is without one."""
        free = solved(build_problem(matrix, []))
        loose = solved(build_problem(matrix, [size(matrix, 5.0)]))
        assert loose.choice.tolist() == free.choice.tolist()

    def test_what_cannot_be_read(self, matrix):
        """Unknown groups, candidates and missing tables are named."""
        with pytest.raises(UnknownLayer, match="'nowhere' matches none"):
            build_problem(matrix, [], fixed=[("nowhere", "W4")])
        with pytest.raises(InvalidProblem, match="has no 'W16'"):
            build_problem(matrix, [], forbidden=[("*", "W16")])
        with pytest.raises(InvalidInput, match="a resource must be one of"):
            build_problem(matrix, [Budget(resource="latency_ns", limit=1000)])
        with pytest.raises(BudgetTooSmall, match="below the smallest plan"):
            build_problem(matrix, [size(matrix, -0.1)])
