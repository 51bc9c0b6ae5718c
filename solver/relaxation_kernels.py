"""Compiled relaxation of one node: coordinate descent, prices of budgets, and a safe bound.

Shared notation, here and in ``tree_kernels``: the fields of ``Relaxed``, ``s = l + Qz`` f64[n],
``ok`` u8[n] rows of a node's region, ``lam`` f64[m] multipliers.

Small functions take single arrays: all fields of a ``Relaxed`` would be handed over at each call,
which cost a tenth of the time of a node.

A bound computed here subtracts an allowance for its own rounding (see ``node_bound``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

EPS = 2.3e-16


class Relaxed(NamedTuple):
    """A core under one convex function ``q(x) = const + l·x + ½ xᵀQx``, as kernels read it.

    Attributes:
        Q: f64[n, n]; f64[0, 0] stands for zeros.
        l: f64[n].
        const: Constant of ``q``.
        e: f64[n], rounding allowance of one entry of ``s``.
        off: i64[G+1], first row of each group.
        grp: i64[n], group of each row.
        F: f64[m, n], costs.
        f: f64[m], limits.
        A: i64[m, n], the same costs.
        b: i64[m], the same limits.
        pairs: i64[p, 2], forbidden pairs.
        C: f64[n, n], the core's own cross terms; f64[0, 0] stands for zeros.
        P: ``C`` with forbidden pairs priced.
        d: f64[n], the core's own diagonal.
        constant: The core's own constant.
        lost: f64[n], what rounding has done to an entry of ``d``, and for each choice to it.
        halt: u8[1], not 0 once a limit was reached: what is found by then is still bounded.
    """

    Q: Floats
    l: Floats  # noqa: E741  # as in the formula
    const: float
    e: Floats
    off: Ints
    grp: Ints
    F: Floats
    f: Floats
    A: Ints
    b: Ints
    pairs: Ints
    C: Floats
    P: Floats
    d: Floats
    constant: float
    lost: Floats
    halt: Bytes


@compiled
def priced(F: Floats, s: Floats, lam: Floats, p: int) -> float:
    """Return ``s_p + λF_p``."""
    value: float = s[p]
    for j in range(len(lam)):
        value += lam[j] * F[j, p]
    return value


@compiled
def lagrangian(
    off: Ints, F: Floats, f: Floats, s: Floats, ok: Bytes, lam: Floats, k: int
) -> tuple[float, float]:
    """Return ``Σ_g min(s + λF) - λ·f`` and its slope in ``lam[k]`` (the least on ties)."""
    total, use = 0.0, 0.0
    for g in range(len(off) - 1):
        best, best_cost = np.inf, 0.0
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                value, cost = priced(F, s, lam, p), F[k, p]
                if value < best or (value == best and cost < best_cost):
                    best, best_cost = value, cost
        total += best
        use += best_cost
    for j in range(len(f)):
        total -= lam[j] * f[j]
    return total, use - f[k]


@compiled
def best_multiplier(
    off: Ints, F: Floats, f: Floats, s: Floats, ok: Bytes, lam: Floats, k: int, halt: Bytes
) -> float:
    """Maximise ``lagrangian`` over ``lam[k] >= 0`` in place and return the maximum.

    The function is concave and piecewise linear: a bracket's two lines meet above the maximum,
    and the meeting point is the next trial (finitely many, usually below ten).
    """
    high = lam[k]
    lam[k] = 0.0
    low = 0.0
    v_low, g_low = lagrangian(off, F, f, s, ok, lam, k)
    if g_low <= 0.0:
        return v_low
    # Bracket the maximum: the slope is positive at low and not at high.
    if high <= 0.0:
        spread = 0.0
        for p in range(len(s)):
            if ok[p]:
                spread = max(spread, abs(s[p]))
        high = (spread + 1e-300) / (f[k] + 1.0)
    v_high, g_high = 0.0, 1.0
    for _ in range(200):
        lam[k] = high
        v_high, g_high = lagrangian(off, F, f, s, ok, lam, k)
        if g_high <= 0.0 or halt[0]:
            break
        low, v_low, g_low = high, v_high, g_high
        high *= 4.0
    if g_high > 0.0:
        return v_high
    # Narrow it.
    best, best_lam = v_high, high
    if v_low > best:
        best, best_lam = v_low, low
    for _ in range(60):
        if g_low - g_high <= 0.0 or halt[0]:
            break
        middle = (v_high - v_low + g_low * low - g_high * high) / (g_low - g_high)
        if not (low < middle < high):
            break
        lam[k] = middle
        value, slope = lagrangian(off, F, f, s, ok, lam, k)
        if value > best:
            best, best_lam = value, middle
        top = v_low + g_low * (middle - low)
        if value >= top - 1e-12 * (abs(top) + 1e-300):
            break
        if slope > 0.0:
            low, v_low, g_low = middle, value, slope
        else:
            high, v_high, g_high = middle, value, slope
    lam[k] = best_lam
    return best


@compiled
def gradient(core: Relaxed, z: Floats, s: Floats) -> None:
    """Fill ``s = l + Qz``."""
    n = len(s)
    for p in range(n):
        s[p] = core.l[p]
    if not len(core.Q):
        return
    for q in range(n):
        if z[q] != 0.0:
            weight, row = z[q], core.Q[q]
            for p in range(n):
                s[p] += weight * row[p]


@compiled
def extremes(
    off: Ints, F: Floats, s: Floats, z: Floats, ok: Bytes, lam: Floats, g: int
) -> tuple[int, int, float]:
    """Return the row of a group that is worth most weight, the one worth least, and the slope.

    The second row is one with weight, or -1.
    """
    low, low_value, high, high_value = -1, np.inf, -1, -np.inf
    for p in range(off[g], off[g + 1]):
        if ok[p]:
            value = priced(F, s, lam, p)
            if value < low_value:
                low, low_value = p, value
            if z[p] > 0.0 and value > high_value:
                high, high_value = p, value
    return low, high, high_value - low_value


@compiled
def descend(core: Relaxed, s: Floats, z: Floats, ok: Bytes, lam: Floats, sweeps: int) -> None:
    """Lower ``q(z) + λ·Fz`` by moving weight between two rows of a group at a time.

    Exact line search for each pair; ``s`` is kept up to date.
    """
    Q, off, F, n = core.Q, core.off, core.F, len(s)
    for _ in range(sweeps):
        gain = 0.0
        for g in range(len(off) - 1):
            if core.halt[0]:
                return
            for _inner in range(3):
                low, high, slope = extremes(off, F, s, z, ok, lam, g)
                if high < 0 or low == high or slope <= 0.0:
                    break
                # Step to the minimum along the line, or until the row has no weight left.
                curve = 0.0
                if len(Q):
                    curve = Q[low, low] + Q[high, high] - 2.0 * Q[low, high]
                step = z[high]
                if curve > 0.0 and slope < curve * step:
                    step = slope / curve
                decrease = step * (slope - 0.5 * curve * step)
                # Steps that change nothing visible cost as much as others: leave them out.
                if decrease <= 0.02 * gain / (g + 1.0) * 0.1 and step < z[high]:
                    break
                z[low] += step
                z[high] -= step
                if len(Q):
                    row_low, row_high = Q[low], Q[high]
                    for p in range(n):
                        s[p] += step * (row_low[p] - row_high[p])
                gain += decrease


@compiled
def node_bound(core: Relaxed, z: Floats, s: Floats, ok: Bytes, lam: Floats, work: Floats) -> float:
    """Return a bound on the node, best over multipliers (set in ``lam``), rounding allowed for.

    ``const + ½ (l - s)·z + Σ_g min_p (s_p - e_p + λF_p) - λf``, less an allowance for summation.
    """
    l, e, off, F, f = core.l, core.e, core.off, core.F, core.f  # noqa: E741
    n, m = len(l), len(f)
    # The part that does not depend on multipliers.
    base, size = core.const, abs(core.const)
    for p in range(n):
        work[p] = s[p] - e[p]
        if z[p] != 0.0:
            term = 0.5 * (l[p] - s[p]) * z[p]
            base += term
            size += abs(term) + 0.5 * e[p] * z[p] / EPS / (n + 10.0)
    # The best multipliers, one budget after the other.
    total = 0.0
    if m == 0:
        for g in range(len(off) - 1):
            best = np.inf
            for p in range(off[g], off[g + 1]):
                if ok[p] and work[p] < best:
                    best = work[p]
            total += best
    for _ in range(3 if m > 1 else m):
        before = total
        for k in range(m):
            total = best_multiplier(off, F, f, work, ok, lam, k, core.halt)
        if total - before <= 1e-9 * abs(total):
            break
    # What rounding may have done.
    for j in range(m):
        size += 3.0 * lam[j] * f[j]
    size += abs(total)
    # The last term covers numbers so small that rounding is no longer relative to them.
    return base + total - EPS * (n + 10.0) * size - 1e-300


@compiled
def restrict(z: Floats, s: Floats, ok: Bytes, off: Ints) -> None:
    """Move the weight of rows that are out onto allowed rows of their group (``s`` unchanged)."""
    for g in range(len(off) - 1):
        total, best = 0.0, -1
        for p in range(off[g], off[g + 1]):
            if not ok[p]:
                z[p] = 0.0
            else:
                total += z[p]
                if best < 0 or s[p] < s[best]:
                    best = p
        if total <= 1e-9:
            for p in range(off[g], off[g + 1]):
                z[p] = 0.0
            z[best] = 1.0
        else:
            for p in range(off[g], off[g + 1]):
                z[p] /= total


@compiled
def store(z: Floats, ok: Bytes, off: Ints, point: Singles) -> None:
    """Round ``z`` to float32 into ``point`` and set ``z`` to its exact-quotient reading."""
    for g in range(len(off) - 1):
        total = 0.0
        for p in range(off[g], off[g + 1]):
            value = np.float32(z[p]) if ok[p] else np.float32(0.0)
            if value < np.float32(1e-7):
                value = np.float32(0.0)
            point[p] = value
            total += np.float64(value)
        for p in range(off[g], off[g + 1]):
            z[p] = np.float64(point[p]) / total


@compiled
def relax(
    core: Relaxed, ok: Bytes, z: Floats, s: Floats, lam: Floats, cutoff: float, rounds: int,
    point: Singles, work: Floats,
) -> float:  # fmt: skip
    """Bound one node: coordinate descent and multiplier steps until it is cut off or stalls.

    ``z`` and ``lam`` are warm starts and hold the certificate's values afterwards; ``s`` is the
    gradient at ``z``.
    """
    restrict(z, s, ok, core.off)
    gradient(core, z, s)
    trial, best_lam, best_z = lam.copy(), lam.copy(), z.copy()
    best = -np.inf
    stalled = 0
    for step in range(rounds):
        # Descend at the trial multipliers, then take the best ones there.
        if step > 0:
            descend(core, s, z, ok, trial, 2)
        lam[:] = trial
        bound = node_bound(core, z, s, ok, lam, work)
        stalled += 1
        if bound > best:
            if bound > best + 0.05 * (cutoff - best):
                stalled = 0
            best = bound
            best_lam[:], best_z[:] = lam, z
        if best >= cutoff or stalled >= 3 or core.halt[0]:
            break
        for k in range(len(lam)):
            trial[k] += 0.5 * (lam[k] - trial[k])
    # Bound again at the point as the certificate will hold it.
    lam[:], z[:] = best_lam, best_z
    store(z, ok, core.off, point)
    gradient(core, z, s)
    return node_bound(core, z, s, ok, lam, work)
