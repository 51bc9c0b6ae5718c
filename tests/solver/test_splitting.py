"""Cuts for all pairs of rows: their multipliers give bounds, high ones where terms are noisy."""

from dataclasses import replace

import numpy as np
import pytest

from bitquota.solver import Problem, quadratic, solve, splitting
from bitquota.solver.archive import certificate_from_bytes, certificate_to_bytes
from bitquota.solver.branch import Incumbent, Tree
from bitquota.solver.checker import check_certificate, check_solution
from bitquota.solver.convex import convexify
from bitquota.solver.core import reduce
from bitquota.solver.interruptible import Interrupted
from bitquota.solver.lifted import Lifted
from bitquota.solver.semidefinite import dual_point, interior_point
from bitquota.solver.splitting import Splitting, continued


def noisy(groups=20, *, width=5, noise=0.4, limits=1, pairs=(), seed=1):
    """Return a Gram matrix whose terms are multiplied by one plus noise: an indefinite one."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 6, 8])[:width]
    factors = rng.normal(size=(groups, 6))
    factors /= np.linalg.norm(factors, axis=1, keepdims=True)
    near = 0.8 ** np.abs(np.subtract.outer(np.arange(groups), np.arange(groups)))
    between = 0.35 * factors @ factors.T + 0.24 * near + 0.41 * np.eye(groups)
    error = np.exp(0.6 * rng.normal(size=(groups, 1)) + 0.1 * rng.normal(size=(groups, width)))
    error = (error * 2.0**-bits).ravel()
    gram = np.kron(between, np.ones((width, width))) * np.outer(error, error)
    gram *= np.tile(0.9 + 0.1 * np.eye(width), (groups, groups))
    factor = noise * np.triu(rng.normal(size=gram.shape), 1)
    cross = 2.0 * gram * (1.0 + factor + factor.T)
    group = np.repeat(np.arange(groups), width)
    cross[group[:, None] == group[None, :]] = 0.0
    sizes = (10.0 ** rng.uniform(2, 4, (limits, groups))).astype(np.int64)
    costs = (sizes[:, :, None] * bits).reshape(limits, -1)
    return Problem(
        diagonal=np.diag(gram).copy(),
        cross=cross,
        offsets=np.arange(groups + 1) * width,
        costs=costs,
        limits=(3 * sizes.sum(axis=1)).astype(np.int64),
        forbidden_pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
    )


def bound_of(core, run=None):
    """Return what the interior point's shift proves at the root, with a splitting's multipliers."""
    lifted = Lifted(core if run is None else run.relaxed(), products=False)
    state, _ = interior_point(lifted, tolerance=1e-4, stop=lambda _: False)
    point = dual_point(lifted, state)
    if run is not None:
        run.complete(point)
    tree = Tree(core, convexify(core, point))
    tree.root(Incumbent(gap=0.0, floor=0.0), np.maximum(point.row_values, 1e-6), point.multipliers)
    return float(tree.bound[0])


@pytest.mark.parametrize(("limits", "noise"), [(1, 0.4), (2, 0.6)])
def test_closes_most_of_the_gap(limits, noise):
    """Below the optimum, and nearer to it by more than half than the semidefinite bound."""
    problem = noisy(limits=limits, noise=noise)
    optimum, core = solve(problem).objective, reduce(problem, problem.allowed)
    plain = bound_of(core)
    higher = bound_of(core, continued(None, core))
    assert plain < higher <= optimum * (1 + 1e-12)
    assert optimum - higher < 0.5 * (optimum - plain)


def test_eigenvectors_are_followed(monkeypatch):
    """What is followed from step to step ends where all eigenvalues lead."""
    problem = noisy(12)
    core = reduce(problem, problem.allowed)
    whole = bound_of(core, continued(None, core))
    monkeypatch.setattr(splitting, "WHOLE", 0)
    followed = continued(None, core)
    assert followed.basis is not None
    assert bound_of(core, followed) == pytest.approx(whole, rel=1e-3)


def test_continues(monkeypatch):
    """Further steps, also where rows have gone; rows that came anew begin from nothing."""
    monkeypatch.setattr(splitting, "ROUNDS", 0)
    problem = noisy(8)
    core = reduce(problem, problem.allowed)
    first = continued(None, core)
    done = first.done
    assert continued(first, replace(core)) is first
    assert done + splitting.FURTHER == first.done
    fewer = problem.allowed.copy()
    fewer[[0, 7, 8, 9, 10, 11, 20]] = False  # group 1 has one row left
    less = continued(first, reduce(problem, fewer))
    assert done + 2 * splitting.FURTHER == less.done
    assert bound_of(less.core, less) <= less.core.value(less.core.off[:-1])
    assert done == continued(less, core).done


@pytest.mark.parametrize(
    ("part", "steps"), [(-1.0, splitting.MOST_STEPS), (np.inf, splitting.STEPS)]
)
def test_settles(monkeypatch, part, steps):
    """The first steps go on while the value changes by more than a part of it, up to a number."""
    problem = noisy(6)
    monkeypatch.setattr(splitting, "SETTLED", part)
    run = Splitting(reduce(problem, problem.allowed))
    run.settle()
    assert steps == run.done


def test_without_prices():
    """A budget that everything fits, and rows that lose nothing, divide nothing by zero."""
    problem = noisy(8)
    loose = replace(problem, limits=problem.costs.sum(axis=1), diagonal=0.0 * problem.diagonal)
    core = reduce(loose, loose.allowed)
    assert bound_of(core, continued(None, core)) <= solve(loose).objective


def test_stops():
    """No step is taken once a limit struck."""
    problem = noisy(8)
    core = reduce(problem, problem.allowed, np.zeros(1, dtype=np.uint8))
    run = Splitting(core)
    core.halt[0] = 1
    with pytest.raises(Interrupted):
        run.run(1)
    assert 0 == run.done


@pytest.mark.parametrize("pairs", [(), ((0, 6), (4, 8), (7, 12))])
def test_certificate(monkeypatch, pairs):
    """The checker accepts bounds with cuts for all pairs, forbidden ones among them."""
    problem = noisy(pairs=pairs)
    # Few rows are worked on as many are, and neither probing nor trees close them before.
    for name, value in (("FIRST_ROWS", 8), ("TREE_NODES", 2), ("PROMISING", 0), ("PROBE_ROWS", 0)):
        monkeypatch.setattr(quadratic, name, value)
    monkeypatch.setattr(quadratic.Quadratic, "first_nodes", 2)
    solution = solve(problem)
    assert any(len(c.cut_rows) > 500 for c in solution.certificate.convexifications)
    verdict = check_solution(problem, solution)
    assert verdict.holds, verdict.reason


def test_triangles_raise_the_bound(monkeypatch):
    """Triples gain a part of what noise takes."""
    problem = noisy(noise=0.9, seed=3)
    core = reduce(problem, problem.allowed)
    monkeypatch.setattr(splitting, "MOST_STEPS", splitting.STEPS)  # more gain as much, here
    with monkeypatch.context() as without:
        without.setattr(splitting, "ROUNDS", 0)
        lower = bound_of(core, continued(None, core))
    run = continued(None, core)
    assert len(run.triples)
    optimum = solve(problem).objective
    assert lower + 0.05 * (optimum - lower) < bound_of(core, run) <= optimum * (1 + 1e-12)


def test_triangles_are_checked(monkeypatch):
    """The checker takes triples, exactly and in floats, and no false ones."""
    problem = noisy(12, width=4, noise=0.9, seed=3)
    for name, value in (("FIRST_ROWS", 8), ("TREE_NODES", 2), ("PROMISING", 0), ("PROBE_ROWS", 0)):
        monkeypatch.setattr(quadratic, name, value)
    monkeypatch.setattr(quadratic.Quadratic, "first_nodes", 2)
    certificate = solve(problem, node_limit=8).certificate
    assert certificate_from_bytes(certificate_to_bytes(certificate)).bound == certificate.bound
    found = [c for c in certificate.convexifications if len(c.triples)]
    assert found
    for method in ("outward", "exact"):
        assert check_certificate(problem, certificate, method=method).holds
    i, j, _ = found[0].triples[0]
    for changed in (
        {"triple_values": -found[0].triple_values},
        {"triple_values": 1.5 * found[0].triple_values},
        {"triples": found[0].triples[:, ::-1]},
        {"triples": np.tile([i, j, j], (len(found[0].triples), 1))},
        {"triples": np.tile([i, j, problem.n_rows], (len(found[0].triples), 1))},
        {"triples": found[0].triples[1:]},
    ):
        worse = tuple(
            replace(c, **changed) if c is found[0] else c for c in certificate.convexifications
        )
        forged = replace(certificate, convexifications=worse)
        assert not check_certificate(problem, forged).holds
