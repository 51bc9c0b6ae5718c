"""Triangle inequalities among the products of three rows, within the splitting method.

For one-hot ``x``, ``x_i - X_ij - X_ik + X_jk >= 0``. Violated ones are found over all triples of
rows whose products are not small, and kept by Hildreth's method: each correction moves the four
entries of one triple, and a multiplier that is never negative remembers by how much.

References:
    [H57] C. Hildreth: A quadratic programming procedure, 1957.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]


@compiled
def violated(X: Floats, grp: Ints, least: float, most: int, halt: Bytes) -> tuple[Ints, Floats]:
    """Return up to ``most`` triples ``(i, j, k)`` violated by more than ``least``, and by how much.

    ``X`` f64[n, n] has ``x`` on its diagonal. ``O(n³)`` at most, less where products are small.
    """
    n, count = len(X), 0
    triples, values = np.zeros((most, 3), np.int64), np.zeros(most)
    near = np.zeros(n, np.int64)
    for i in range(n):
        if halt[0]:
            break
        size = 0
        for j in range(n):
            if grp[j] != grp[i] and X[i, j] > least:
                near[size] = j
                size += 1
        for a in range(size):
            j = near[a]
            for b in range(a + 1, size):
                k = near[b]
                value = X[i, j] + X[i, k] - X[j, k] - X[i, i]
                if value > least and grp[k] != grp[j] and count < most:
                    triples[count, 0], triples[count, 1], triples[count, 2] = i, j, k
                    values[count] = value
                    count += 1
    return triples[:count], values[:count]


@compiled
def correct(
    triples: Ints,
    held: Floats,
    M: Singles,
    x: Floats,
    s: Floats,
    weight: Floats,
    again: bool,  # noqa: FBT001
) -> None:
    """Move the scaled entries ``M`` f32[n + 2, n + 2] and ``x`` f64[n] by the triples, in place.

    With ``again``, only by what they ``held`` f64[t]; otherwise to where each of them holds in
    turn, which changes ``held``. ``weight`` f64[n] is that of a change of ``x``, against one of
    an entry.
    """
    for t in range(len(triples)):
        i, j, k = triples[t, 0], triples[t, 1], triples[t, 2]
        ij, ik, jk = 1.0 / (s[i] * s[j]), 1.0 / (s[i] * s[k]), 1.0 / (s[j] * s[k])
        change = held[t]
        if not again:
            above = max(M[1 + i, 1 + j], 0.0) * ij + max(M[1 + i, 1 + k], 0.0) * ik
            above -= max(M[1 + j, 1 + k], 0.0) * jk + x[i]
            length = 0.5 * (ij * ij + ik * ik + jk * jk) + 1.0 / weight[i]
            after = max(0.0, held[t] + above / length)
            change = after - held[t]
            held[t] = after
        if change != 0.0:
            M[1 + i, 1 + j] -= 0.5 * change * ij
            M[1 + i, 1 + k] -= 0.5 * change * ik
            M[1 + j, 1 + k] += 0.5 * change * jk
            M[1 + j, 1 + i], M[1 + k, 1 + i] = M[1 + i, 1 + j], M[1 + i, 1 + k]
            M[1 + k, 1 + j] = M[1 + j, 1 + k]
            x[i] += change / weight[i]
