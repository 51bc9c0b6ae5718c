"""Random small problems with the structure that a person sees: copies, constants, huge losses."""

from __future__ import annotations

import numpy as np

from bitquota.solver import Problem

SCALES = (1e-200, 1e-30, 1.0, 1.0, 1.0, 1e30, 1e150)
"""Of all numbers of a problem; squares of the largest still are finite."""


def structured(seed: int) -> Problem:
    """Return up to six groups of up to three rows, some of them alike, of any scale."""
    rng = np.random.default_rng(seed)
    kinds = [_kind(rng) for _ in range(int(rng.integers(1, 4)))]
    chosen = [kinds[int(k)] for k in rng.integers(0, len(kinds), int(rng.integers(2, 7)))]
    widths = [len(loss) for loss, _, _ in chosen]
    offsets = np.cumsum([0, *widths])
    group = np.repeat(np.arange(len(chosen)), widths)
    diagonal = np.concatenate([loss for loss, _, _ in chosen])
    factors = np.concatenate([factor for _, factor, _ in chosen])
    # Terms: of the factors, alike for groups that are; in some problems between some groups only.
    cross = 2 * factors @ factors.T
    style = int(rng.integers(0, 4))
    if style == 1:
        cross[:] = rng.normal()
    elif style == 2:
        cross = np.where((group[:, None] + group[None, :]) % 2 == 0, cross, rng.normal())
    elif style == 3:
        cross *= rng.integers(0, 2)
    # Candidates that diverged.
    for _ in range(int(rng.integers(0, 3))):
        row, size = int(rng.integers(0, len(group))), 10.0 ** rng.uniform(3, 14)
        diagonal[row] = size
        cross[row] *= rng.choice([1.0, np.sqrt(size)])
        cross[:, row] = cross[row]
    cross[group[:, None] == group[None, :]] = 0.0
    costs = np.concatenate([cost for _, _, cost in chosen])
    rows = offsets[:-1] + [int(rng.integers(0, w)) for w in widths]
    scale = float(rng.choice(SCALES))
    return Problem(
        diagonal=diagonal * scale,
        cross=(cross + cross.T) / 2 * scale,
        offsets=offsets,
        costs=costs[None],
        limits=np.array([int(costs[rows].sum()) + int(rng.integers(0, 2))]),
    )


def _kind(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return loss, factors and costs of a kind of group."""
    width = int(rng.integers(1, 4))
    size = 2.0 ** -np.arange(width) * np.exp(rng.normal())
    factors = rng.normal(size=(width, 2)) * size[:, None]
    loss = (factors**2).sum(axis=1) * rng.choice([1.0, 0.5])
    return loss, factors, np.arange(width) * int(rng.integers(0, 3)) + 1
