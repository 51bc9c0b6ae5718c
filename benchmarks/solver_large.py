"""Problems in factor form and separable problems of many layers, for ``benchmarks/solver.py``.

Where ``../shared/cases/solver/factor.py`` exists, a prototype in numba (coordinate descent and
Frank-Wolfe, no certificate), it solves the same instances in the same run, and the bar is half its
gap in the time that it took.
"""

from __future__ import annotations

import importlib.util
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bitquota.solver import Problem, solve
from bitquota.solver.checker import check_certificate

PROTOTYPE = Path(__file__).resolve().parents[2] / "shared" / "cases" / "solver" / "factor.py"


class Lines(Protocol):
    """The table of ``solver.py``."""

    def line(self, what: str, figure: float, bar: float, notes: str = "") -> None:
        """Print a line."""


class Drawn(NamedTuple):
    """Minimise ``d·x + ‖Uᵀx‖²`` with ``S·x`` at most ``limit`` (the prototype's convention)."""

    d: np.ndarray[Any, Any]
    U: np.ndarray[Any, Any]
    S: np.ndarray[Any, Any]
    limit: int

    def problem(self, groups: int) -> Problem:
        """The problem, in ours."""
        return Problem(
            diagonal=self.d + np.einsum("ij,ij->i", self.U, self.U),
            factor=_frozen(np.sqrt(2) * self.U),
            offsets=np.arange(groups + 1) * (len(self.d) // groups),
            costs=self.S[None],
            limits=np.array([self.limit]),
        )


def _frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def drawn_factor(groups: int, width: int, rank: int, seed: int, average: float = 3.5) -> Drawn:
    """Draw layers whose errors have a direction: three common ones, and neighbours alike."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8, 10, 12])[:width].astype(float)
    weights = rng.choice([1, 1, 2, 4, 4, 8], size=groups) * 2**20
    sensitivity = np.exp(rng.normal(0, 1.3, groups))
    common = rng.normal(size=(3, rank))
    V = 0.6 * rng.normal(size=(groups, 3)) @ common + rng.normal(size=(groups, rank))
    V = 0.6 * V + 0.4 * np.roll(V, 1, 0)
    V /= np.linalg.norm(V, axis=1)[:, None]
    U, d = np.empty((groups * width, rank)), np.empty(groups * width)
    S = np.empty(groups * width, dtype=np.int64)
    for j, b in enumerate(bits):
        error = sensitivity * 4.0**-b * np.exp(rng.normal(0, 0.1, groups))
        noise = rng.normal(size=(groups, rank))
        noise /= np.linalg.norm(noise, axis=1)[:, None]
        directions = V + 0.3 * noise
        directions /= np.linalg.norm(directions, axis=1)[:, None]
        U[j::width] = np.sqrt(0.5 * error)[:, None] * directions
        d[j::width] = 0.5 * error
        S[j::width] = (weights * b).astype(np.int64)
    return Drawn(d, U, S, int(average * weights.sum()))


def prototype(drawn: Drawn, width: int) -> tuple[float, float] | None:
    """Return gap and CPU seconds of the prototype, or ``None`` where it is missing."""
    if not PROTOTYPE.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:  # numba writes beside what it compiles
        copy = Path(shutil.copy(PROTOTYPE, folder))
        spec = importlib.util.spec_from_file_location("factor_prototype", copy)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _run(module, drawn, width)


def _run(module: Any, drawn: Drawn, width: int) -> tuple[float, float]:  # noqa: ANN401
    """Return gap and CPU seconds of the prototype, once it is compiled."""
    small = drawn_factor(20, 3, 4, 0, 3.0)
    module.run(small.d, small.U, small.S, small.limit, 3, say=lambda *_: None)
    begin = time.process_time()
    value, bound, _ = module.run(drawn.d, drawn.U, drawn.S, drawn.limit, width, say=lambda *_: None)
    return (value - bound) / value, time.process_time() - begin


def factored(table: Lines, sizes: list[tuple[int, int, int, float, float]]) -> None:
    """Solve problems in factor form: groups, width, rank, and bars (gap, CPU seconds)."""
    solve(drawn_factor(30, 3, 4, 0, 3.0).problem(30), time_limit_s=5)
    for groups, width, rank, gap, seconds in sizes:
        drawn = drawn_factor(groups, width, rank, 1)
        notes = "published bars"
        if (other := prototype(drawn, width)) is not None:
            gap, seconds = other[0] / 2, other[1]  # noqa: PLW2901
            notes = f"prototype {other[0]:.2e} in {other[1]:.2f} s"
        problem = drawn.problem(groups)
        del drawn
        begin = time.process_time()
        found = solve(problem, time_limit_s=seconds, clock=time.process_time)
        spent = time.process_time() - begin
        what = f"factor {groups} x {width} rank {rank}"
        table.line(f"{what}: gap", found.relative_gap, gap, notes)
        table.line(f"{what}: time", spent, seconds + 0.05, f"{found.status} {_peak()}")
        begin = time.process_time()
        assert found.certificate is not None
        verdict = check_certificate(problem, found.certificate)
        table.line(
            f"{what}: check", time.process_time() - begin if verdict.holds else np.inf, 10.0,
            f"{verdict.nodes} nodes",
        )  # fmt: skip


def _peak() -> str:
    return f"peak so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def layers(groups: int, budgets: int) -> dict[str, Any]:
    """Draw the arrays of a separable problem of ``groups`` x 6, whose budgets all bind."""
    rng = np.random.default_rng(1)
    bits = np.array([2, 3, 4, 5, 6, 8])
    loss = rng.lognormal(0, 1.5, (groups, 1)) * 4.0**-bits * rng.uniform(0.8, 1.2, (groups, 6))
    weights = np.round(10 ** rng.uniform(3, 6, groups)).astype(np.int64)
    rates = np.round(10 ** rng.uniform(0, 2, groups)).astype(np.int64)
    costs = np.stack([np.outer(w, bits).ravel() for w in (weights, weights * rates)[:budgets]])
    return {
        "diagonal": np.sort(loss, axis=1)[:, ::-1].ravel(),
        "offsets": np.arange(groups + 1) * 6,
        "costs": costs,
        "limits": np.array([int(3.3 * w.sum()) for w in (weights, weights * rates)[:budgets]]),
    }


def many(table: Lines, million: int, several: int) -> None:
    """Build and solve separable problems of many layers."""
    solve(Problem(**layers(50, 1))), solve(Problem(**layers(50, 2)))
    for groups, budgets, bar, gap in ((several, 2, 5.0, 1e-4), (million, 1, 3.0, 1e-4)):
        arrays = layers(groups, budgets)
        begin = time.process_time()
        found = solve(Problem(**arrays), time_limit_s=60.0, clock=time.process_time)
        spent = time.process_time() - begin
        notes = f"{found.status} gap {found.relative_gap:.1e} {_peak()}"
        what = f"separable {groups} x 6, {budgets} budget{'s' * (budgets > 1)}"
        table.line(what, spent if found.relative_gap <= gap else np.inf, bar, notes)
