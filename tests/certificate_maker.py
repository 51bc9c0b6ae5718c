"""Certificates made in the plainest way, to test the checker without the solver.

One eigenvalue shift, random cuts, products, points and prices, and a random tree. The bound is
computed here in plain float64, so a test knows what the checker must find, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitquota.solver import Certificate, Convexification, Problem


@dataclass
class _Tree:
    parent: list[int]
    allowed: list[np.ndarray[Any, Any]]
    convexification: list[int]
    point: list[np.ndarray[Any, Any]]
    multipliers: list[np.ndarray[Any, Any]]
    value: list[float]


def make_certificate(
    problem: Problem, *, seed: int = 0, depth: int = 2
) -> tuple[Certificate, float]:
    """Return a certificate with an open bound (``-inf``) and what it proves, in float64."""
    rng = np.random.default_rng(seed)
    shape, Q, linear = _convexification(problem, rng)
    tree = _Tree([], [], [], [], [], [])
    value = _grow(problem, tree, rng, Q, linear, problem.allowed.copy(), -1, depth)
    certificate = Certificate(
        bound=-np.inf,
        convexifications=(shape,),
        parent=np.array(tree.parent, dtype=np.int64),
        allowed=np.packbits(np.array(tree.allowed), axis=1),
        convexification=np.array(tree.convexification, dtype=np.int64),
        point=np.array(tree.point, dtype=np.float32),
        multipliers=np.array(tree.multipliers).reshape(len(tree.parent), len(problem.limits)),
    )
    return certificate, value


def with_fields(certificate: Certificate, **fields: Any) -> Certificate:
    """Return ``certificate`` with some fields replaced."""
    return Certificate(
        **{name: getattr(certificate, name) for name in Certificate.__slots__} | fields
    )


def with_shape(certificate: Certificate, **fields: Any) -> Certificate:
    """Return ``certificate`` with some fields of its first convexification replaced."""
    first, *rest = certificate.convexifications
    given = {name: getattr(first, name) for name in Convexification.__slots__} | fields
    return with_fields(certificate, convexifications=(Convexification(**given), *rest))


def _convexification(
    problem: Problem, rng: np.random.Generator
) -> tuple[Convexification, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    n, m = problem.n_rows, len(problem.limits)
    group = problem.group_of_row
    cross = np.zeros((n, n)) if problem.cross is None else problem.cross
    scale = float(np.abs(cross).max(initial=0.0)) or 1.0
    Y = np.zeros((n, n))
    cuts = []
    for i in range(n):
        for j in range(i + 1, n):
            if group[i] != group[j] and rng.random() < 0.1:
                Y[i, j] = Y[j, i] = value = float(rng.random()) * scale * 0.1
                cuts.append((i, j, value))
    costs = problem.costs.astype(float)
    largest = np.maximum(costs.max(axis=1, initial=1.0), 1.0)
    products = rng.random((m, n)) * scale * 0.01 / largest[:, None] * (rng.random((m, n)) < 0.3)
    Q = cross - Y + products.T @ costs + costs.T @ products
    least = float(np.linalg.eigvalsh(Q).min())
    t = max(0.0, -least) + 1e-6 * scale
    width = int(np.diff(problem.offsets).max())
    shift = np.zeros((n, width))
    shift[np.arange(n), np.arange(n) - problem.offsets[group]] = t
    Q = Q + t * np.eye(n)
    linear = problem.diagonal - t / 2 - problem.limits @ products
    shape = Convexification(
        support=np.ones(n, dtype=bool),
        shift=shift,
        cut_rows=np.array([c[0] for c in cuts], dtype=np.int64),
        cut_columns=np.array([c[1] for c in cuts], dtype=np.int64),
        cut_values=np.array([c[2] for c in cuts]),
        products=products,
    )
    return shape, Q, linear


def _grow(
    problem: Problem,
    tree: _Tree,
    rng: np.random.Generator,
    Q: np.ndarray[Any, Any],
    linear: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    parent: int,
    depth: int,
) -> float:
    starts, group = problem.offsets[:-1], problem.group_of_row
    node = len(tree.parent)
    point = np.where(mask, rng.random(problem.n_rows) + 0.01, 0.0).astype(np.float32)
    multipliers = rng.random(len(problem.limits)) * 0.01 * (rng.random() < 0.7)
    multipliers = multipliers / np.maximum(problem.costs.max(axis=1, initial=1), 1)
    tree.parent.append(parent)
    tree.allowed.append(mask.copy())
    tree.convexification.append(0)
    tree.point.append(point)
    tree.multipliers.append(multipliers)
    counts = np.add.reduceat(mask.astype(int), starts)
    if not counts.all() or _too_dear(problem, mask):
        return np.inf
    single = np.flatnonzero(mask & (counts[group] == 1)).tolist()
    pairs = {tuple(p) for p in problem.all_forbidden_pairs().tolist()}
    if any((p, q) in pairs for p in single for q in single):
        return np.inf
    if (counts == 1).all():
        return problem.evaluate(np.flatnonzero(mask) - starts)
    z = point.astype(float) / np.add.reduceat(point.astype(float), starts)[group]
    rows = linear + Q @ z + multipliers @ problem.costs
    least = np.minimum.reduceat(np.where(mask, rows, np.inf), starts)
    own = float(problem.constant - 0.5 * z @ Q @ z - multipliers @ problem.limits + least.sum())
    if depth == 0:
        return own
    g = int(rng.choice(np.flatnonzero(counts > 1)))
    inside = np.flatnonzero(mask & (group == g))
    kind = rng.integers(0, 3)
    if kind == 0:  # one child; a removed row is proved by the node's own formula
        p = int(rng.choice(inside))
        child = mask.copy()
        child[p] = False
        below = _grow(problem, tree, rng, Q, linear, child, node, depth - 1)
        forced = mask & ((group != g) | (np.arange(len(mask)) == p))
        alone = own - float(least[g]) + float(rows[p])
        if _too_dear(problem, forced) or any(tuple(sorted((p, q))) in pairs for q in single):
            alone = np.inf
        return max(own, min(below, alone))
    cut = int(rng.integers(1, len(inside)))
    values = []
    for part in (inside[:cut], inside[cut:]) if kind == 1 else [[p] for p in inside]:
        child = mask & (group != g)
        child[part] = True
        values.append(_grow(problem, tree, rng, Q, linear, child, node, depth - 1))
    return max(own, min(values))


def _too_dear(problem: Problem, mask: np.ndarray[Any, Any]) -> bool:
    costs = np.where(mask, problem.costs, np.iinfo(np.int64).max)
    least = np.minimum.reduceat(costs, problem.offsets[:-1], axis=1).sum(axis=1)
    return bool((least > problem.limits).any())
