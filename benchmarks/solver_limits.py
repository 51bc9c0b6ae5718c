"""Random time limits on problems of all kinds, for ``benchmarks/solver.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.solver import Problem, solve
from solver_instances import drawn
from solver_large import drawn_factor, layers

if TYPE_CHECKING:
    from solver_large import Lines

Kinds = dict[str, Callable[[], Problem]]
"""Problems by what they are; each is made when its turn comes."""


def kinds(largest: int) -> Kinds:
    """Return problems of up to ``largest`` groups with a matrix, and ten times as many without."""
    found: Kinds = {}
    for groups, width, noise in (
        (20, 3, 0.0), (53, 5, 0.15), (74, 3, 0.03), (120, 5, 0.03), (224, 5, 0.0), (224, 5, 0.15),
        (400, 5, 0.0), (560, 5, 0.0), (560, 5, 0.03), (1000, 8, 0.0),
    ):  # fmt: skip
        if groups <= largest:
            found[f"{groups} x {width}, noise {noise}"] = _matrix(groups, width, noise)
    for groups, width, rank in ((40, 4, 8), (224, 5, 64), (600, 5, 64), (2000, 6, 128)):
        if groups <= 10 * largest:
            found[f"{groups} x {width}, rank {rank}"] = _factor(groups, width, rank)
    for groups, budgets in ((500, 1), (5000, 2), (60_000, 1), (60_000, 2)):
        if groups <= 100 * largest:
            found[f"{groups} x 6, {budgets} budgets, separable"] = _separable(groups, budgets)
    for groups, width, budgets, pairs in ((74, 3, 3, 0), (224, 5, 2, 20), (400, 5, 4, 0)):
        if groups <= largest:
            what = f"{groups} x {width}, {budgets} budgets, {pairs} pairs"
            found[what] = _several(groups, width, budgets, pairs)
    for groups, width, size, rank in (
        (40, 3, 4, 0),
        (224, 4, 7, 0),
        (2000, 4, 2, 0),
        (224, 5, 2, 64),
    ):
        if groups <= 10 * largest:
            found[f"{groups} x {width}, blocks of {size}, rank {rank}"] = _blocks(
                groups, width, size, rank
            )
    return found


def _matrix(groups: int, width: int, noise: float) -> Callable[[], Problem]:
    if width != 8:
        return lambda: (
            drawn(groups, width, correlated=groups % 2 == 0, noise=noise, seed=groups).problem
        )

    def wide() -> Problem:
        rng = np.random.default_rng(0)
        bits = np.arange(2, 2 + width)
        error = np.exp(rng.normal(0, 0.6, (groups, 1))) * 2.0**-bits
        low = rng.normal(size=(groups, 12))
        low /= np.linalg.norm(low, axis=1)[:, None]
        between = 2.0 * (0.2 * low @ low.T + 0.8 * np.eye(groups))
        cross = np.kron(between, np.ones((width, width))) * np.outer(error, error)
        diagonal = np.diag(cross) / 2
        for at in range(0, len(cross), width):
            cross[at : at + width, at : at + width] = 0.0
        weights = np.round(10 ** rng.uniform(5, 8, groups)).astype(np.int64)
        return Problem(
            diagonal=diagonal,
            cross=cross,
            offsets=np.arange(groups + 1) * width,
            costs=(weights[:, None] * bits).reshape(1, -1),
            limits=np.array([int(4 * weights.sum())]),
        )

    return wide


def _factor(groups: int, width: int, rank: int) -> Callable[[], Problem]:
    return lambda: drawn_factor(groups, width, rank, 1).problem(groups)


def _separable(groups: int, budgets: int) -> Callable[[], Problem]:
    return lambda: Problem(**layers(groups, budgets))


def _several(groups: int, width: int, budgets: int, pairs: int) -> Callable[[], Problem]:
    def several() -> Problem:
        one = drawn(groups, width, correlated=True, noise=0.03, seed=groups + 1).problem
        rng = np.random.default_rng(groups)
        costs, limits = [one.costs[0]], [int(one.limits[0])]
        for _ in range(budgets - 1):
            costs.append(one.costs[0] * np.repeat(rng.integers(1, 20, groups), width) // 4)
            limits.append(int(0.8 * costs[-1].reshape(groups, width).mean(axis=1).sum()))
        apart = np.arange(pairs)[:, None] * width
        return replace(
            one, costs=np.stack(costs), limits=np.array(limits), resources=(),
            forbidden_pairs=np.concatenate([apart, apart + width + 1], axis=1),
        )  # fmt: skip

    return several


def _blocks(groups: int, width: int, size: int, rank: int) -> Callable[[], Problem]:
    def joined() -> Problem:
        rng = np.random.default_rng(groups)
        one = drawn_factor(groups, width, max(rank, 1), 1).problem(groups)
        terms: list[Any] = [
            (g * width + i, h * width + j)
            for g in range(groups) for h in range(g - g % size, g)
            for i in range(width) for j in range(width)
        ]  # fmt: skip
        pairs = np.array(terms)
        root = np.sqrt(one.diagonal)
        return replace(
            one, factor=one.factor if rank else None, terms=pairs,
            term_values=0.4 * rng.normal(size=len(pairs)) * root[pairs].prod(axis=1),
        )  # fmt: skip

    return joined


def overruns(table: Lines, problems: Kinds, number: int) -> None:
    """Solve with random limits of 3 ms to 1 s and seeds: the worst overrun, in CPU seconds.

    The first solve of each kind counts as the others do: kernels are loaded before, as the first
    solve of a process does before its limit begins.
    """
    rng = np.random.default_rng(0)
    names = list(problems)
    calls = sorted(
        (int(rng.integers(len(names))), float(10 ** rng.uniform(-2.5, 0.0)), int(rng.integers(100)))
        for _ in range(number)
    )
    over: list[tuple[float, str]] = []
    at = -1
    for kind, limit, seed in calls:
        if kind != at:
            problem, at = problems[names[kind]](), kind
        begin = time.process_time()
        solve(problem, time_limit_s=limit, clock=time.process_time, seed=seed)
        over.append((max(time.process_time() - begin - limit, 1e-6), names[kind]))
    worst, what = max(over)
    often = float(np.quantile([seconds for seconds, _ in over], 0.99))
    table.line(
        f"{number} calls with random limits: overrun",
        worst,
        0.2,
        f"{what}; 99 %: {often:.3f}",
    )
