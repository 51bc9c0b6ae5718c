"""How fast the solver proves, in process CPU seconds of one thread, beside other solvers.

Run ``python benchmarks/solver.py`` for the table, ``--quick`` for tiny sizes (what CI runs),
``--sections small,medium`` for parts of it, ``--others gurobi,cvxpy_scip`` to time other routes on
the same matrices in the same run (``solver_rivals.py``): what they take from the moment their
libraries are loaded, as ours are. Published instances are read from ``BITQUOTA_DATA`` (or
``../shared/data``) where they exist; larger ones are drawn here.
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import time  # noqa: E402  # threads first
from dataclasses import dataclass, field  # noqa: E402

import numpy as np  # noqa: E402

from bitquota.solver import (  # noqa: E402
    Problem,
    Solution,
    even_limits,
    frontier,
    hull,
    solve,
)
from bitquota.solver.loading import load_kernels  # noqa: E402
from solver_instances import DATA, Instance, drawn, noisy, published  # noqa: E402  # beside this file
from solver_large import factored, many  # noqa: E402
from solver_limits import kinds, overruns  # noqa: E402
from solver_rivals import ask  # noqa: E402

AVERAGES = (2.5, 3, 3.5, 4)
"""Budgets in bits per weight, in the order of the published instances."""
FACTOR = {"cvxpy_scip": 4.0}
"""How many times less CPU than another backend ours must take; 1 unless named."""


class Table:
    """Prints one line per measurement: what, figure, bar, ratio to the bar."""

    def __init__(self) -> None:
        self.missed = 0
        print(f"{'what':44} {'figure':>10} {'bar':>8} {'ratio':>7}  notes", flush=True)

    def line(self, what: str, figure: float, bar: float, notes: str = "") -> None:
        """Print a line; a ratio above 1 misses the bar."""
        ratio = figure / bar
        self.missed += ratio > 1
        mark = "" if ratio <= 1 else "  MISSED"
        print(f"{what:44} {figure:10.4g} {bar:8.4g} {ratio:7.3f}  {notes}{mark}", flush=True)


@dataclass(slots=True, kw_only=True)
class Others:
    """Other backends that are timed beside ours.

    Attributes:
        names: Of the backends.
        time_limit_s: Of each of their runs.
        ratios: Their CPU seconds over ours, where they finished, by backend.
        only: Proofs whose name does not contain it are left out.
    """

    names: tuple[str, ...]
    time_limit_s: float
    ratios: dict[str, list[float]] = field(default_factory=dict)
    only: str = ""

    def time(self, instance: Instance, solution: Solution, spent: float) -> None:
        """Print what each of them takes for ``instance``, which ours solved in ``spent``."""
        for name in self.names:
            try:
                other = ask(name, instance.G, instance.sizes, instance.limit, self.time_limit_s)
            except RuntimeError as error:
                print(f"    {name}: {str(error)[:90]}", flush=True)
                continue
            worth = "no choice"
            if other.choice is not None:
                problem = instance.problem
                excess = problem.evaluate(other.choice) / solution.objective - 1
                over = int(problem.spent(other.choice)[0]) - instance.limit
                worth = f"objective {excess:+.1e}" + (f", {over} OVER BUDGET" * (over > 0))
            print(
                f"    {name}: {'finished' if other.finished else other.status}, "
                f"{other.seconds:.3f} CPU s, {other.seconds / spent:.2f}x ours, {worth}",
                flush=True,
            )
            if other.finished:
                self.ratios.setdefault(name, []).append(other.seconds / spent)

    def summarise(self) -> None:
        """Print how often ours was faster by the factor asked for."""
        for name, ratios in self.ratios.items():
            factor = FACTOR.get(name, 1.0)
            print(
                f"{name} finished {len(ratios)}: ours takes {factor:g} times less on "
                f"{sum(r >= factor for r in ratios)}; median ratio {np.median(ratios):.2f}, "
                f"least {min(ratios):.2f}"
            )


def proved(
    table: Table, what: str, instance: Instance | None, bar: float, others: Others,
    gap: float = 1e-4,
) -> None:  # fmt: skip
    """Time one proof to ``gap``, and other backends on the same problem."""
    if others.only not in what:
        return
    if instance is None:
        print(f"{what:44} skipped: no {DATA}")
        return
    problem = instance.problem
    begin = time.process_time()
    solution = solve(problem, gap=gap, time_limit_s=20 * bar + 5, clock=time.process_time)
    spent = time.process_time() - begin
    notes = f"{solution.status} gap {solution.relative_gap:.1e} nodes {solution.stats.nodes}"
    table.line(what, spent if str(solution.status) == "optimal" else np.inf, bar, notes)
    others.time(instance, solution, spent)


def within(
    table: Table, what: str, instance: Instance | None, checks: list[tuple[float, float]],
    plan: tuple[float, float],
) -> None:  # fmt: skip
    """Run to the last time of ``checks`` (seconds, gap) and read the gap at each time.

    ``plan`` is (seconds, excess): how close to the final plan the incumbent is by then.
    """
    if instance is None:
        print(f"{what:44} skipped: no {DATA}")
        return
    problem, events = instance.problem, []
    begin = time.process_time()
    limit = checks[-1][0]
    solution = solve(
        problem,
        time_limit_s=limit,
        clock=time.process_time,
        on_event=lambda e: events.append((time.process_time() - begin, e.objective, e.bound)),
    )
    events.append((time.process_time() - begin, solution.objective, solution.bound))
    early = min((o for t, o, _ in events if t <= plan[0]), default=np.inf)
    excess = early / solution.objective - 1
    table.line(f"{what}: plan excess at {plan[0]:g} s", max(excess, 0.0) + 1e-12, plan[1])
    for seconds, bar in checks[:-1]:
        bound = max((b for t, _, b in events if t <= seconds), default=-np.inf)
        seen = min((o for t, o, _ in events if t <= seconds), default=np.inf)
        table.line(f"{what}: gap at {seconds:g} s", (seen - bound) / abs(seen), bar)
    spent = time.process_time() - begin
    table.line(
        f"{what}: gap at {limit:g} s", solution.relative_gap, checks[-1][1], f"{spent:.1f} s"
    )


def frontiers(
    table: Table, what: str, instance: Instance | None, points: int, bars: tuple[float, float]
) -> None:
    """Time a frontier without and with proofs."""
    if instance is None:
        print(f"{what:44} skipped: no {DATA}")
        return
    problem = instance.problem
    limits = even_limits(problem, points + 2)[1:-1]
    for certify, bar in zip((False, True), bars, strict=True):
        begin = time.process_time()
        found = frontier(problem, limits, certify=certify)
        spent = time.process_time() - begin
        kind = "proved" if certify else "heuristic"
        optimal = sum(str(p.solution.status) == "optimal" for p in found)
        table.line(f"{what}: {points} points {kind}", spent, bar, f"{optimal} proved")


def separable(table: Table, groups: int) -> None:
    """Time the hull and the exact knapsack."""
    rng = np.random.default_rng(1)
    bits = np.array([2, 3, 4, 6, 8])
    loss = rng.lognormal(0, 1.5, (groups, 1)) * 4.0**-bits * rng.uniform(0.8, 1.2, (groups, 5))
    weights = np.round(10 ** rng.uniform(3, 6, groups)).astype(np.int64)
    problem = Problem(
        diagonal=np.sort(loss, axis=1)[:, ::-1].ravel(),
        offsets=np.arange(groups + 1) * 5,
        costs=(weights[:, None] * bits).reshape(1, -1),
        limits=np.array([int(3.3 * weights.sum())]),
    )
    hull(problem), solve(problem, gap=0.0)
    begin = time.process_time()
    hull(problem)
    table.line(f"separable {groups} x 5: hull", time.process_time() - begin, 0.010)
    begin = time.process_time()
    solution = solve(problem, gap=0.0)
    spent = time.process_time() - begin
    table.line(f"separable {groups} x 5: exact", spent, 0.100, str(solution.status))


def alike(groups: int, correlation: float, diverged: float = 0.0) -> Instance:
    """Return equal layers, all of one correlation; one 2-bit candidate loses ``diverged``."""
    bits = np.array([2, 4, 8])
    between = np.full((groups, groups), correlation)
    np.fill_diagonal(between, 1.0)
    G = np.kron(between, np.outer(2.0**-bits, 2.0**-bits))
    G[0, 0] = max(G[0, 0], diverged)
    return Instance(G=G, sizes=np.tile(bits, (groups, 1)), limit=int(3.37 * groups))


def structure(table: Table, others: Others) -> None:
    """What a person sees at once: equal layers, no cross terms, a diverged candidate."""
    for groups in (20, 74):
        proved(table, f"{groups} identical layers", alike(groups, 0.5), 0.5, others)
    proved(table, "2,000 x 3 without cross terms", alike(2000, 0.0), 0.5, others)
    proved(table, "20 layers, one loss of 1e12", alike(20, 0.5, 1e12), 0.5, others)


def overrun(table: Table, what: str, instance: Instance | None, limit: float) -> None:
    """Measure by how much a time limit is exceeded, in CPU seconds."""
    if instance is None:
        print(f"{what:44} skipped: no {DATA}")
        return
    problem = instance.problem
    begin = time.process_time()
    solution = solve(problem, time_limit_s=limit, clock=time.process_time)
    over = max(time.process_time() - begin - limit, 1e-6)
    table.line(f"{what}: overrun of {limit:g} s", over, 0.2, f"gap {solution.relative_gap:.1e}")


def limits(table: Table, others: Others) -> None:  # noqa: ARG001
    """Time limits that strike in the midst of a step."""
    for limit in (0.3, 1.0, 3.0):
        overrun(table, "L224B5_psd", published("L224B5_psd", 1), limit)
    overrun(table, "drawn 560 x 5", drawn(560, 5, correlated=False, noise=0.0, seed=0), 4.0)


def calls(table: Table, others: Others, number: int = 500, largest: int = 1000) -> None:  # noqa: ARG001
    """Many calls with random limits on problems of all kinds."""
    overruns(table, kinds(largest), number)


def small(table: Table, others: Others) -> None:
    """All instances of 20 layers."""
    names = (
        "L20B3_psd", "L20B3_hard", "L20B3_indef", "real_r20b3_exact_m0", "real_r20b6_gram",
    )  # fmt: skip
    for name in names:
        for index, average in enumerate(AVERAGES):
            proved(table, f"{name} {average:g}", published(name, index), 0.5, others)


def medium(table: Table, others: Others) -> None:
    """53 and 74 layers with three candidates."""
    for name in ("L53B3_psd", "L53B3_hard", "L53B3_indef03"):
        for index, average in enumerate(AVERAGES):
            proved(table, f"{name} {average:g}", published(name, index), 2.5, others)
    for correlated, noise in ((False, 0.0), (True, 0.0), (False, 0.03)):
        kind = ("hard" if correlated else "psd") + (" 3 % noise" if noise else "")
        for average in AVERAGES:
            instance = drawn(74, 3, correlated=correlated, noise=noise, seed=1, average=average)
            proved(table, f"drawn 74 x 3 {kind} {average:g}", instance, 2.5, others)


def fresh(table: Table, others: Others) -> None:
    """Draw 200 problems of 50 to 74 layers with three candidates: seeds 1000 to 1199."""
    for seed in range(1000, 1200):
        kind = ("psd", "hard", "3 % noise")[seed % 3]
        groups, average = 50 + seed % 25, AVERAGES[seed % 4]
        instance = drawn(
            groups,
            3,
            correlated=kind == "hard",
            noise=0.03 if kind == "3 % noise" else 0.0,
            seed=seed,
            average=average,
        )
        proved(table, f"{groups} x 3 {kind} {average:g}, seed {seed}", instance, 2.5, others)


def six(table: Table, others: Others) -> None:
    """53 layers with six candidates."""
    for index, average in enumerate(AVERAGES):
        proved(table, f"L53B6_psd {average:g}", published("L53B6_psd", index), 10, others)


def curves(table: Table, others: Others) -> None:  # noqa: ARG001 - every section's
    """Frontiers of 64 points."""
    for name in ("L53B3_psd", "L53B3_hard", "L53B3_indef03"):
        frontiers(table, name, published(name, 1), 64, (0.5, 15.0))
    wide = drawn(74, 3, correlated=False, noise=0, seed=1)
    frontiers(table, "drawn 74 x 3", wide, 64, (0.5, 60.0))


def thousands(table: Table, others: Others) -> None:  # noqa: ARG001
    """5,000 layers without cross terms."""
    separable(table, 5000)


def factors(table: Table, others: Others) -> None:  # noqa: ARG001
    """Problems in factor form, with half the gaps that a prototype was published with."""
    factored(table, [
        (224, 5, 64, 0.00345, 0.15), (2000, 6, 128, 0.0022, 2.8), (100_000, 6, 64, 0.001, 93.0),
    ])  # fmt: skip


def millions(table: Table, others: Others) -> None:  # noqa: ARG001
    """A million layers without cross terms, and 100,000 with two budgets."""
    many(table, 1_000_000, 100_000)


def large(table: Table, others: Others) -> None:
    """224 layers with five candidates; the noisy ones at every budget."""
    for name in ("L224B5_psd", "L224B5_hard"):
        if others.only in name:
            within(table, name, published(name, 1), [(20, 0.025), (60, 0.005)], (1.0, 0.001))
    for index, average in enumerate(AVERAGES):
        name = f"L224B5_indef03 {average:g}"
        if others.only in name:
            checks = [(60, 0.03), (120, 0.01)]
            within(table, name, published("L224B5_indef03", index), checks, (1.0, 0.001))


def noise(table: Table, others: Others) -> None:
    """53 layers with three candidates and 15 % noise: a gap of 1 % in 20 s."""
    convex = [published("L53B3_psd", index) for index in range(len(AVERAGES))]
    for average, instance in zip(AVERAGES, convex, strict=True):
        if instance is not None:
            what = f"L53B3_psd {average:g}, 15 % noise"
            proved(table, what, noisy(instance, 0.15, 1), 20, others, gap=0.01)
            proved(table, f"{what}, to 1e-4", noisy(instance, 0.15, 1), 20, others)


def huge(table: Table, others: Others) -> None:
    """560 layers with five candidates, weakly and strongly correlated."""
    for correlated in (False, True):
        instance = drawn(560, 5, correlated=correlated, noise=0.0, seed=0)
        kind = "hard" if correlated else "psd"
        if others.only not in kind:
            continue
        within(table, f"drawn 560 x 5 {kind}", instance, [(120, 0.05)], (2.0, 0.01))


def quick(table: Table, others: Others) -> None:
    """Tiny sizes of everything."""
    instance = drawn(12, 3, correlated=True, noise=0.03, seed=1)
    proved(table, "drawn 12 x 3", instance, 0.5, others)
    frontiers(table, "drawn 12 x 3", instance, 8, (0.5, 5.0))
    within(table, "drawn 20 x 5", drawn(20, 5, correlated=False, noise=0, seed=1),
           [(5.0, 0.05), (10.0, 0.01)], (1.0, 0.05))  # fmt: skip
    separable(table, 200)
    proved(table, "6 identical layers", alike(6, 0.5), 0.5, others)
    overrun(table, "drawn 12 x 3", instance, 0.0)
    factored(table, [(24, 3, 6, 0.01, 1.0)])
    many(table, 2000, 300)
    calls(table, others, number=12, largest=53)


SECTIONS = {
    "structure": structure,
    "limits": limits,
    "calls": calls,
    "small": small,
    "medium": medium,
    "fresh": fresh,
    "six": six,
    "curves": curves,
    "thousands": thousands,
    "millions": millions,
    "factors": factors,
    "large": large,
    "huge": huge,
    "noise": noise,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds in all")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="parts of the table")
    parser.add_argument("--others", default="", help="backends to time beside ours")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each of these")
    parser.add_argument("--only", default="", help="of most rows, those with this in their name")
    parser.add_argument("--skip-large", action="store_true", help="leave out 224 and 560 layers")
    options = parser.parse_args()
    sections = ["quick"] if options.quick else options.sections.split(",")
    if options.skip_large:
        sections = [name for name in sections if name not in ("large", "huge")]
    names = tuple(name for name in options.others.split(",") if name)
    others = Others(names=names, time_limit_s=options.limit, only=options.only)
    load_kernels()
    table = Table()
    for name in sections:
        (SECTIONS | {"quick": quick})[name](table, others)
    others.summarise()
    print(f"{table.missed} bars missed")


if __name__ == "__main__":
    main()
