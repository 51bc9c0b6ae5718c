"""Hypothesis strategies that build valid allocation problems; nothing is filtered away.

Every problem is built around a *planted* choice: budgets, forbidden rows and pairs are drawn so
that it stays feasible, unless an infeasible problem is asked for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bitquota.solver import Problem

KINDS = ("separable", "psd", "noisy", "indefinite", "wide", "tied_values", "negative", "zero")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A problem and a choice that is feasible for it."""

    problem: Problem
    choice: tuple[int, ...]


def matrices(
    kind: str, offsets: np.ndarray[Any, Any], rng: np.random.Generator
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return a diagonal and a cross matrix of one family."""
    n, groups = int(offsets[-1]), len(offsets) - 1
    group = np.repeat(np.arange(groups), np.diff(offsets))
    # Within a group, later rows cost more bits and lose less, as real candidates do.
    rank = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(offsets)])
    size = 4.0**-rank * np.exp(rng.normal(0, 1, groups))[group]
    factors = rng.normal(size=(n, max(2, n // 3))) + 0.6
    gram = factors @ factors.T * np.sqrt(np.outer(size, size))
    noise = rng.normal(size=(n, n))
    noise = (noise + noise.T) / 2
    if kind == "noisy":
        gram = gram * (1 + 0.03 * noise)
    elif kind == "indefinite":
        gram = gram * (1 + noise)
    elif kind == "wide":
        scale = 10.0 ** rng.uniform(-4, 3, groups)[group]
        gram = gram * np.sqrt(np.outer(scale, scale)) * (1 + 0.1 * noise)
    elif kind == "tied_values":
        gram = rng.integers(-2, 3, size=(n, n)).astype(float)
        gram = gram + gram.T
    elif kind == "negative":
        gram = -np.abs(gram) + np.diag(rng.normal(size=n))
    elif kind == "zero":
        gram = np.zeros((n, n))
    diagonal = np.diag(gram).copy()
    if kind == "separable":
        return diagonal, None
    cross = 2 * gram
    cross[group[:, None] == group[None, :]] = 0.0
    return diagonal, (cross + cross.T) / 2


@st.composite
def planted_problems(
    draw: st.DrawFn,
    *,
    max_groups: int = 5,
    max_rows: int = 4,
    max_budgets: int = 3,
    kinds: tuple[str, ...] = KINDS,
    constraints: bool = True,
) -> Planted:
    """Build a problem with a random mix of constraints, and a choice that meets them all.

    Budgets are drawn just above what the planted choice takes, so that they bind. Ties are two
    groups merged into one, as the candidate table merges tied layers.
    """
    counts = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=max_groups))
    offsets = np.cumsum([0, *counts])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    diagonal, cross = matrices(draw(st.sampled_from(kinds)), offsets, rng)
    diagonal, cross, offsets = _tie(draw, diagonal, cross, offsets)
    counts = np.diff(offsets).tolist()
    n, groups = int(offsets[-1]), len(counts)
    choice = tuple(draw(st.integers(0, c - 1)) for c in counts)
    rows = offsets[:-1] + np.array(choice)
    costs, limits = [], []
    for _ in range(draw(st.integers(0 if constraints else 1, max_budgets))):
        cost = _costs(draw, offsets, rng)
        slack = int(cost.max() * draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 2.0])))
        costs.append(cost)
        limits.append(int(cost[rows].sum()) + slack)
    allowed = np.ones(n, dtype=bool)
    pairs: dict[str, list[tuple[int, int]]] = {"forbidden_pairs": [], "required_pairs": []}
    if constraints:
        if draw(st.booleans()):  # at most k groups at the last of their rows
            counted = np.zeros(n, dtype=np.int64)
            counted[offsets[1:] - 1] = 1
            costs.append(counted)
            limits.append(int(counted[rows].sum()) + draw(st.integers(0, 1)))
        for row in draw(st.lists(st.integers(0, n - 1), max_size=3)):
            allowed[row] = row in rows
        if groups > 1:
            _pairs(draw, offsets, rows, pairs)
    problem = Problem(
        diagonal=diagonal,
        cross=cross,
        offsets=offsets,
        costs=np.array(costs, dtype=np.int64).reshape(-1, n),
        limits=np.array(limits, dtype=np.int64),
        constant=draw(st.sampled_from([0.0, 0.25, -1.0])),
        allowed=allowed,
        forbidden_pairs=np.array(pairs["forbidden_pairs"], dtype=np.int64).reshape(-1, 2),
        required_pairs=np.array(pairs["required_pairs"], dtype=np.int64).reshape(-1, 2),
    )
    return Planted(problem=problem, choice=choice)


def problems(**options: Any) -> st.SearchStrategy[Problem]:
    """Build feasible problems; options as in ``planted_problems``."""
    return planted_problems(**options).map(lambda planted: planted.problem)


SCALES = (1.0, 1.0, 1.0, 1e-200, 1e-100, 1e-9, 1e9, 1e100, 1e200)
HOPELESS = 1e12
"""How many times as large as all other terms the loss of a diverged row is."""


@st.composite
def any_problems(draw: st.DrawFn, **options: Any) -> Problem:
    """Build problems of which some are infeasible: budgets may be cut, pairs added at will.

    Some have two groups that can be exchanged, a row that diverged, or terms of another scale.
    """
    planted = draw(planted_problems(**options))
    problem = planted.problem
    if not draw(st.integers(0, 3)):
        problem = _with_copy(problem, planted.choice, draw(st.integers(0, problem.n_groups - 1)))
    if not draw(st.integers(0, 3)):
        problem = _with_diverged(problem, planted.choice, draw(st.integers(0, 2**32 - 1)))
    problem = scaled(problem, draw(st.sampled_from(SCALES)))
    if draw(st.integers(0, 3)):
        return problem
    limits = problem.limits.copy()
    for k in range(len(limits)):
        limits[k] -= int(limits[k] * draw(st.sampled_from([0.0, 0.1, 0.3, 0.6])))
    extra = []
    group = problem.group_of_row
    if problem.n_groups > 1:
        for a in draw(st.lists(st.integers(0, problem.n_rows - 1), max_size=6)):
            others = np.flatnonzero(group != group[a])
            extra.append((a, int(others[draw(st.integers(0, len(others) - 1))])))
    return changed(
        problem,
        limits=limits,
        forbidden_pairs=np.array([*problem.forbidden_pairs.tolist(), *extra]).reshape(-1, 2),
    )


def scaled(problem: Problem, factor: float) -> Problem:
    """Return the problem with all terms of the objective ``factor`` times as large."""
    cross = None if problem.cross is None else problem.cross * factor
    return changed(
        problem,
        diagonal=problem.diagonal * factor,
        cross=cross,
        constant=problem.constant * factor,
    )


def _with_copy(problem: Problem, choice: tuple[int, ...], g: int) -> Problem:
    """Return the problem with a last group that can be exchanged with group ``g``."""
    a, b = problem.offsets[g : g + 2].tolist()
    rows = np.concatenate([np.arange(problem.n_rows), np.arange(a, b)])
    cross = problem.cross
    if cross is not None:
        cross = cross[np.ix_(rows, rows)]
        between = -np.sqrt(np.abs(np.outer(problem.diagonal[a:b], problem.diagonal[a:b])))
        cross[a:b, problem.n_rows :] = cross[problem.n_rows :, a:b] = between
    return changed(
        problem,
        diagonal=problem.diagonal[rows],
        cross=cross,
        offsets=np.append(problem.offsets, len(rows)),
        costs=problem.costs[:, rows],
        limits=problem.limits + problem.costs[:, a + choice[g]],
        groups=(*problem.groups, "copy"),
        labels=tuple(problem.labels[p] for p in rows),
        allowed=problem.allowed[rows],
    )


def _with_diverged(problem: Problem, choice: tuple[int, ...], seed: int) -> Problem:
    """Return the problem with one row, none of ``choice``, that loses more than all others."""
    rows = set(problem.rows((*choice, *[0] * (problem.n_groups - len(choice)))).tolist())
    others = sorted(set(range(problem.n_rows)) - rows)
    if not others:
        return problem
    diagonal = problem.diagonal.copy()
    most = float(np.abs(diagonal).max())
    if problem.cross is not None:
        most += float(np.abs(problem.cross).sum())
    diagonal[others[seed % len(others)]] = HOPELESS * (most or 1.0)
    return changed(problem, diagonal=diagonal)


def changed(problem: Problem, **fields: Any) -> Problem:
    """Return ``problem`` with some fields replaced."""
    names = [name for name in Problem.__slots__ if name not in fields]
    given = {name: getattr(problem, name) for name in names} | fields
    if "forbidden_pairs" in fields or "required_pairs" in fields:
        for name in ("forbidden_pairs", "required_pairs"):
            given[name] = np.asarray(given[name], dtype=np.int64).reshape(-1, 2)
    return Problem(**given)


def permuted(problem: Problem, order: list[int]) -> tuple[Problem, np.ndarray[Any, Any]]:
    """Return the problem with its groups in another order, and the old row of every new row."""
    spans = [np.arange(*problem.offsets[g : g + 2].tolist()) for g in order]
    rows = np.concatenate(spans)
    new = np.empty_like(rows)
    new[rows] = np.arange(len(rows))
    cross = None if problem.cross is None else problem.cross[np.ix_(rows, rows)]
    result = Problem(
        diagonal=problem.diagonal[rows],
        cross=cross,
        offsets=np.cumsum([0, *(len(s) for s in spans)]),
        costs=problem.costs[:, rows],
        limits=problem.limits,
        resources=problem.resources,
        groups=tuple(f"renamed {problem.groups[g]}" for g in order),
        labels=tuple(problem.labels[p] for p in rows),
        constant=problem.constant,
        allowed=problem.allowed[rows],
        forbidden_pairs=new[problem.forbidden_pairs].reshape(-1, 2),
        required_pairs=new[problem.required_pairs].reshape(-1, 2),
    )
    return result, rows


def _tie(
    draw: st.DrawFn,
    diagonal: np.ndarray[Any, Any],
    cross: np.ndarray[Any, Any] | None,
    offsets: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None, np.ndarray[Any, Any]]:
    """Perhaps merge the first two groups with equally many rows into one."""
    counts = np.diff(offsets).tolist()
    twins = [(g, h) for h in range(len(counts)) for g in range(h) if counts[g] == counts[h]]
    if not twins or draw(st.integers(0, 2)):
        return diagonal, cross, offsets
    g, h = twins[0]
    a = np.arange(offsets[g], offsets[g + 1])
    b = np.arange(offsets[h], offsets[h + 1])
    diagonal = diagonal.copy()
    diagonal[a] += diagonal[b]
    keep = np.setdiff1d(np.arange(offsets[-1]), b)
    if cross is not None:
        diagonal[a] += cross[a, b]
        cross = cross.copy()
        cross[a] += cross[b]
        cross[:, a] += cross[:, b]
        cross[np.ix_(a, a)] = 0.0
        cross = cross[np.ix_(keep, keep)]
    del counts[h]
    return diagonal[keep], cross, np.cumsum([0, *counts])


def _costs(
    draw: st.DrawFn, offsets: np.ndarray[Any, Any], rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Return one cost per row: sizes that grow with the bits, a latency table, or large bytes."""
    n = int(offsets[-1])
    kind = draw(st.sampled_from(["bits", "latency", "bytes"]))
    if kind == "latency":
        return rng.integers(0, 30, n)
    weights = np.repeat(rng.integers(1, 40, len(offsets) - 1), np.diff(offsets))
    rank = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(offsets)])
    bits = np.array([2, 3, 4, 8, 16, 32])[rank]
    if kind == "bits":
        return weights * bits
    return (weights * 1_048_576 + rng.integers(0, 4096, n)) * bits


def _pairs(
    draw: st.DrawFn,
    offsets: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    pairs: dict[str, list[tuple[int, int]]],
) -> None:
    """Draw forbidden and required pairs that the chosen ``rows`` respect."""
    chosen = set(rows.tolist())
    groups = len(offsets) - 1
    for _ in range(draw(st.integers(0, 3))):
        g = draw(st.integers(0, groups - 1))
        h = (g + draw(st.integers(1, groups - 1))) % groups
        a = draw(st.integers(int(offsets[g]), int(offsets[g + 1]) - 1))
        b = draw(st.integers(int(offsets[h]), int(offsets[h + 1]) - 1))
        if draw(st.booleans()):
            if not {a, b} <= chosen:
                pairs["forbidden_pairs"].append((a, b))
        elif a not in chosen or b in chosen:
            pairs["required_pairs"].append((a, b))
