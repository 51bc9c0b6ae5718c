"""Tiny problems that need every kernel, solved before anybody waits for a solution.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitquota.solver.dispatch import solve
from bitquota.solver.problem import Problem

_GROUPS = 8
_ROWS = 4
"""Of each group."""


def compile_kernels() -> None:
    """Compile every kernel of the solver, or read it from disk where it was compiled before.

    Compiled inside a call, they would use up its time limit, and in a sandbox they would be thrown
    away with it.

    Cost: about a minute of processor time on the first run, a second afterwards.
    """
    for problem in _problems():
        solve(problem)


def _problems() -> list[Problem]:
    n = _GROUPS * _ROWS
    generator = np.random.default_rng(1)
    group, bits = np.arange(n) // _ROWS, 1 + np.arange(n) % _ROWS
    diagonal = generator.random(n) / 4.0 ** (bits - 1)
    size = bits * generator.integers(3, 9, _GROUPS)[group]
    noise = generator.standard_normal((n, n)) * np.sqrt(np.outer(diagonal, diagonal))
    cross = 0.4 * np.where(group[:, None] == group[None, :], 0.0, noise + noise.T)
    neighbours = np.argwhere(np.triu(cross) * (np.abs(np.subtract.outer(group, group)) == 1))
    separable = Problem(
        diagonal=diagonal,
        offsets=np.arange(0, n + 1, _ROWS),
        costs=size[None, :],
        limits=np.array([int(size.sum()) // _ROWS]),
    )
    return [
        separable,
        replace(
            separable,
            costs=np.stack([size, size[::-1]]),
            limits=separable.limits.repeat(2),
            resources=("bytes", "time"),
        ),
        replace(separable, cross=cross),
        replace(separable, cross=cross, forbidden_pairs=neighbours[:1]),
        replace(separable, factor=np.sqrt(diagonal)[:, None] * noise[:, :3]),
        replace(separable, terms=neighbours, term_values=cross[neighbours[:, 0], neighbours[:, 1]]),
    ]
