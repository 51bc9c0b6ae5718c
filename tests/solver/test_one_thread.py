"""Answers do not depend on how many threads the linear algebra may use."""

import threading

import numpy as np
import threadpoolctl

from bitquota.solver import Problem, solve
from bitquota.solver.one_thread import one_thread
from waiting import PATIENCE_S


def threads():
    """Return the thread counts of numpy's and scipy's libraries."""
    return {
        library["filepath"]: library["num_threads"]
        for library in threadpoolctl.threadpool_info()
        if library["internal_api"] == "openblas"
    }


def correlated(groups, width):
    """Return a problem large enough for its matrix products to be shared among threads."""
    rng = np.random.default_rng(2)
    n = groups * width
    errors = rng.normal(size=(n, groups)) + rng.normal(size=groups)
    errors *= (2.0 ** -np.arange(width))[np.arange(n) % width, None]
    cross = 2 * errors @ errors.T
    diagonal = np.diag(cross).copy() / 2
    group = np.arange(n) // width
    cross[group[:, None] == group[None, :]] = 0.0
    weights = rng.integers(50, 5000, groups)
    costs = np.repeat(weights, width) * (2 + np.arange(n) % width)
    return Problem(
        diagonal=diagonal,
        cross=(cross + cross.T) / 2,
        offsets=np.arange(groups + 1) * width,
        costs=costs.reshape(1, -1),
        limits=np.array([int(weights.sum() * 3.3)]),
    )


class TestOneThread:
    def test_holds_and_gives_back(self):
        """One thread inside, also of nested holders; the former number after the last."""
        with threadpoolctl.threadpool_limits(limits=2):
            before = threads()
            with one_thread():
                assert set(threads().values()) == {1}
                with one_thread():
                    assert set(threads().values()) == {1}
                assert set(threads().values()) == {1}
            assert threads() == before

    def test_overlapping_holders_of_two_threads(self):
        """Whoever ends first, both see one thread all along; the last gives the number back."""
        inside, leave, seen = threading.Event(), threading.Event(), []

        def hold():
            with one_thread():
                seen.append(threads())
                inside.set()
                leave.wait(PATIENCE_S)
                seen.append(threads())

        with threadpoolctl.threadpool_limits(limits=2):
            before = threads()
            with one_thread():
                other = threading.Thread(target=hold)
                other.start()
                assert inside.wait(PATIENCE_S)
                assert set(threads().values()) == {1}
                leave.set()
                other.join()
                assert set(threads().values()) == {1}
            assert threads() == before
        assert all(set(counts.values()) == {1} for counts in seen)


class TestSolve:
    def test_same_answer_for_one_and_two_threads(self):
        """Choice, bound, nodes and proof agree to the last bit."""
        problem = correlated(60, 4)
        answers = []
        for count in (1, 2):
            with threadpoolctl.threadpool_limits(limits=count):
                answers.append(solve(problem, seed=3, node_limit=200))
        one, two = answers
        assert one.choice.tolist() == two.choice.tolist()
        assert one.bound == two.bound
        assert one.stats.nodes == two.stats.nodes
        assert np.array_equal(one.certificate.point, two.certificate.point)
        assert np.array_equal(one.certificate.multipliers, two.certificate.multipliers)
