"""Limits strike within kernels and between the pieces of dense linear algebra."""

import numpy as np
import pytest

from bitquota.solver import Limit, Problem, solve
from bitquota.solver import search_kernels as kernels
from bitquota.solver.branch import Incumbent, Tree
from bitquota.solver.checker import check_solution
from bitquota.solver.control import Control, Options
from bitquota.solver.convex import convexify
from bitquota.solver.core import reduce
from bitquota.solver.interruptible import Interrupted, cholesky, inverse, product
from bitquota.solver.lifted import Lifted
from bitquota.solver.search import space_of
from bitquota.solver.semidefinite import flat_point, interior_point
from waiting import wait_for


def dense(groups, width=3, seed=0):
    """Return a problem with cross terms of low rank between all layers."""
    rng = np.random.default_rng(seed)
    bits = np.arange(2, 2 + width)
    size = (2.0**-bits * np.exp(rng.normal(size=(groups, 1)))).ravel()
    errors = rng.normal(size=(groups, 1, 8)) + 0.3 * rng.normal(size=(groups, width, 8))
    errors = errors.reshape(groups * width, 8) * size[:, None]
    cross = 2 * errors @ errors.T
    group = np.repeat(np.arange(groups), width)
    cross[group[:, None] == group[None, :]] = 0.0
    return Problem(
        diagonal=(errors**2).sum(axis=1) + 0.1 * size**2,
        cross=(cross + cross.T) / 2,
        offsets=np.arange(groups + 1) * width,
        costs=np.tile(bits, groups)[None],
        limits=np.array([int(2.7 * groups)]),
    )


def core_of(problem, *, halted):
    """Return the whole core, with its flag raised or not."""
    core = reduce(problem, problem.allowed, np.zeros(1, dtype=np.uint8))
    core.halt[0] = halted
    return core


def tree_of(core):
    """Return a tree whose root is bounded."""
    halted = core.halt[0]
    core.halt[0] = 0
    convex = convexify(core, flat_point(core))
    tree, incumbent = Tree(core, convex), Incumbent(gap=0.0, floor=0.0)
    tree.root(incumbent, convex.point.row_values, convex.point.multipliers)
    core.halt[0] = halted
    return tree, incumbent


class TestKernels:
    def test_search_takes_no_move(self):
        """A halted search leaves the choice as it is."""
        core = core_of(dense(12), halted=True)
        cur = core.off[:-1].copy()
        kernels.tabu_search(space_of(core), cur, 1000, 100_000, 1, 0)
        assert core.off[:-1].tolist() == cur.tolist()
        assert 0 == kernels.relax_descent(
            space_of(core), kernels.place(space_of(core), cur), np.zeros(core.n)
        )

    def test_repair_gives_up(self):
        """A halted repair says that it found nothing."""
        core = core_of(dense(12), halted=True)
        space, dearest = space_of(core), core.off[1:] - 1
        assert not kernels.repair(space, kernels.place(space, dearest.copy()), np.ones(1))

    @pytest.mark.parametrize(("halted", "grows"), [(False, True), (True, False)])
    def test_tree_does_not_grow(self, halted, grows):
        """No node is made, and no row tried alone, once a limit struck."""
        tree, incumbent = tree_of(core_of(dense(12), halted=halted))
        before = tree.n_nodes
        tree.grow(incumbent, 64)
        assert grows == (tree.n_nodes > before)
        incumbent.offer(1e-9, np.zeros(0, dtype=np.int64))  # every row is cut off
        tree.ok[:] = 1
        assert grows == bool(tree.probe(incumbent, 12))

    def test_a_halted_bound_is_a_bound(self):
        """The root of a halted tree is still bounded by a whole formula."""
        problem = dense(12)
        core = core_of(problem, halted=False)
        convex = convexify(core, flat_point(core))
        core.halt[0] = 1
        tree, incumbent = Tree(core, convex), Incumbent(gap=0.0, floor=0.0)
        tree.root(incumbent, convex.point.row_values, convex.point.multipliers)
        assert -np.inf < tree.bound[0] <= solve(problem).objective


class TestLinearAlgebra:
    def test_pieces_give_the_whole(self):
        """At 1,600 rows, where matrices are worked on in pieces."""
        rng, go = np.random.default_rng(0), np.zeros(1, dtype=np.uint8)
        n = 1600
        A = rng.normal(size=(n, n)) / np.sqrt(n)
        assert np.abs(product(A, A, go) - A @ A).max() < 1e-12
        S = A @ A.T + np.eye(n)
        L = cholesky(S, go)
        assert np.abs(L - np.linalg.cholesky(S)).max() < 1e-12
        assert np.abs(inverse(L, go) @ S - np.eye(n)).max() < 1e-10
        S[0, 0] = -1.0
        with pytest.raises(np.linalg.LinAlgError):
            cholesky(S, go)

    @pytest.mark.parametrize("function", [cholesky, inverse])
    def test_a_limit_strikes_between_them(self, function):
        """Large matrices are not finished."""
        with pytest.raises(Interrupted):
            function(np.eye(1600), np.ones(1, dtype=np.uint8))

    def test_interior_point_keeps_the_last_iterate(self):
        """What it has by then is a valid point."""
        problem = dense(12)
        core = core_of(problem, halted=True)
        state, iterations = interior_point(
            Lifted(core, products=False), tolerance=1e-2, stop=lambda _value: False
        )
        assert 0 == iterations
        assert float(state.y[0]) + core.constant <= solve(problem).objective


class TestWatched:
    def test_the_flag_rises_by_itself(self):
        """While a kernel runs, nobody asks; the flag rises all the same."""
        control = Control(options=Options(), cancelled=lambda: True)
        with control.watched():
            wait_for(lambda: bool(control.halt[0]), "the flag")
        assert Limit.CANCELLED == control.limit

    def test_by_any_clock(self):
        """The time limit is that of the clock that was given."""
        ticks = iter(range(10**9))
        control = Control(options=Options(time_limit_s=50), clock=lambda: float(next(ticks)))
        with control.watched():
            wait_for(lambda: bool(control.halt[0]), "the flag")
        assert Limit.TIME == control.limit

    def test_an_error_is_raised_where_the_solve_asks(self):
        """Not lost in the thread that watches."""

        def broken():
            message = "no connection"
            raise ConnectionError(message)

        with pytest.raises(ConnectionError, match="no connection"):
            solve(dense(12), cancelled=broken)

    @pytest.mark.parametrize("groups", [12, 300])
    def test_cancelled_at_once(self, groups):
        """A bound is left at either size, and it holds."""
        problem = dense(groups)
        solution = solve(problem, cancelled=lambda: True)
        assert (Limit.CANCELLED, 0) == (solution.limit, solution.stats.bound_iterations)
        if groups < 100:
            assert check_solution(problem, solution).holds

    def test_nodes_are_counted_within_batches(self):
        """A node limit is kept to the last branching, which makes two."""
        problem = dense(40, seed=3)
        for limit in (5, 6, 17):
            assert limit <= solve(problem, gap=0.0, node_limit=limit).nodes <= limit + 2
