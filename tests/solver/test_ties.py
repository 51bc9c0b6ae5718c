"""Groups that pairs tie together: found, collapsed and expanded without changing any value."""

from dataclasses import replace

import numpy as np
import pytest

from bitquota.solver import Problem, solve
from bitquota.solver.core import reduce
from bitquota.solver.search import Effort, search
from bitquota.solver.ties import collapsed, expanded, partners


def tied(order=(0, 1, 2)):
    """Return four groups of three rows; groups 0, 1 and 3 must take matching rows."""
    rng = np.random.default_rng(3)
    cross = rng.normal(size=(12, 12))
    cross = cross + cross.T
    group = np.repeat(np.arange(4), 3)
    cross[group[:, None] == group[None, :]] = 0.0
    match = dict(enumerate(order))
    pairs = [(a, 3 + b) for a in range(3) for b in range(3) if match[a] != b]
    pairs += [(3 + a, 9 + b) for a in range(3) for b in range(3) if a != b]
    problem = Problem(
        diagonal=rng.normal(size=12),
        cross=cross,
        offsets=np.arange(5) * 3,
        costs=np.tile([1, 2, 4], 4).reshape(1, -1),
        limits=np.array([11]),
        forbidden_pairs=np.array([*pairs, (0, 6)]),
    )
    return reduce(problem, problem.allowed)


class TestPartners:
    def test_nothing_without_ties(self):
        """Pairs that leave a choice of partners tie nothing."""
        core = tied()
        core.pairs = core.pairs[1:]
        table = partners(core)
        assert table is not None
        assert table.shape == (9, 2)  # groups 1 and 3 are still tied
        core.pairs = core.pairs[:3]
        assert partners(core) is None

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_matching_rows_stand_together(self, order):
        """Three tied groups become one; its rows list one row of each, as the pairs allow."""
        core = tied(order)
        table = partners(core)
        assert table.shape == (6, 3)
        forbidden = {tuple(pair) for pair in core.pairs.tolist()}
        for members in table.tolist():
            rows = [p for p in members if p >= 0]
            assert len({int(core.grp[p]) for p in rows}) == len(rows)
            assert not any((min(p, q), max(p, q)) in forbidden for p in rows for q in rows if p < q)


def test_rows_that_ties_put_together_and_a_pair_forbids_are_left_out():
    """Groups 0 and 2 are tied, and 1 and 2; a pair of groups 0 and 1 rules out one row of them."""
    problem = Problem(
        diagonal=np.array([1.0, 5.0, 1.0, 5.0, 1.0, 5.0]),
        cross=np.array([[0.0, 0, 1, 0, 0, 0], [0.0] * 6, [1.0, 0, 0, 0, 0, 0], *[[0.0] * 6] * 3]),
        offsets=np.array([0, 2, 4, 6]),
        costs=np.zeros((1, 6), dtype=np.int64),
        limits=np.array([1]),
        forbidden_pairs=np.array([(0, 5), (1, 4), (2, 5), (3, 4), (0, 2)]),
    )
    core = reduce(problem, problem.allowed)
    table = partners(core)
    assert core.rows[table].tolist() == [[1, 3, 5]]
    assert collapsed(core, table).pairs.tolist() == []
    assert solve(problem).choice.tolist() == [1, 1, 1]
    more = np.concatenate([problem.forbidden_pairs, [(1, 3)]])
    assert partners(reduce(replace(problem, forbidden_pairs=more), problem.allowed)) is None


class TestCollapsed:
    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
    def test_values_and_costs_are_kept(self, order):
        """Every choice of the collapsed core is worth what it stands for, and costs the same."""
        core = tied(order)
        table = partners(core)
        small = collapsed(core, table)
        assert small.n_groups == 2
        for a in range(3):
            for b in range(3, 6):
                cur = np.array([a, b])
                whole = expanded(table, cur, core)
                assert sorted(core.grp[whole].tolist()) == [0, 1, 2, 3]
                assert small.value(cur) == pytest.approx(core.value(whole), rel=1e-12)
                assert small.A[:, cur].sum() == core.A[:, whole].sum()

    def test_the_search_finds_the_best(self):
        """The search moves tied groups as one and meets the pair that is no tie."""
        core = tied()
        cur, value = search(core, effort=Effort(), seed=0)
        table = partners(core)
        small = collapsed(core, table)
        banned = {tuple(sorted(pair)) for pair in small.pairs.tolist()}
        values = [
            small.value(np.array([a, b]))
            for a in range(3)
            for b in range(3, 6)
            if (a, b) not in banned and small.A[0, a] + small.A[0, b] <= small.b[0]
        ]
        assert value == pytest.approx(min(values), rel=1e-12)
        assert value == pytest.approx(core.value(cur), rel=1e-12)
