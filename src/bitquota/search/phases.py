"""What each phase of a job will take, from the schedules that the job itself follows.

The measurement around full precision is scheduled exactly. A search is not: it ends when nothing
improves, and its limit is what it takes at most. Everything counts in forward-equivalents of single
samples, because phases run on different sets of them.

Design: docs/design/progress.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.corrections import SAMPLES_REPAIR
from bitquota.progress import Course
from bitquota.quantizers.stack_rounding import ROUNDING
from bitquota.search.baselines import baseline_choices, size_only
from bitquota.search.evidence import SAMPLES as EVIDENCE_SAMPLES
from bitquota.search.evidence import drawn_choices
from bitquota.search.portfolio import by_scores, leading_measure, proposing_metrics, raced_samples
from bitquota.search.problems import choice_of, limits_of, solved
from bitquota.search.refine import expected_passes
from bitquota.search.refinement import EFFORTS, RefineSettings
from bitquota.search.shares import shared_plan
from bitquota.sensitivity.measures.choices import passes_of
from bitquota.sensitivity.metrics.stack_shares import FORWARD_AND_BACK, SHARES
from bitquota.solver import build_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.sensitivity.base import Measure
    from bitquota.sensitivity.runners.base import Runner

SCORES = 3
"""Simpler matrices that ``allocate`` solves for its baselines."""

PROPOSED = 6
"""Choices that the matrices of a search propose to begin with, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a job.

    Attributes:
        stage: What it does, as ``progress.stage_words`` reads it.
        samples: Forward-equivalents of single samples that it is expected to take.
        most: Those that it takes at most; equal where they are known beforehand.
        counted: Whether the runners' counters see its passes; corrected models run apart from them.
        rounding: What the rounding of language models takes beside, in the same unit.
    """

    stage: str
    samples: float
    most: float
    counted: bool = True
    rounding: float = 0.0


def course_of(phases: Sequence[Phase]) -> Course:
    """Return the course of a job of these phases."""
    return Course([phase.samples + phase.rounding for phase in phases])


def refinement_settings(setup: Setup) -> RefineSettings:
    """Return how much a search may do: around a plan without alternatives there is nothing."""
    if setup.request.refine and len(setup.table.rows) > len(setup.table.groups):
        settings = EFFORTS[setup.request.effort]
        return replace(settings, iterations=0) if by_scores(setup) else settings
    # What is left are the proposals, measured.
    return EFFORTS["quick"]


def measure_phase(setup: Setup, runner: Runner, measure: Measure) -> Phase:
    """Return the measurement around full precision; exact where no candidate is full precision."""
    passes = measure.cost(runner, setup.table)
    samples = passes * len(runner.calibration)
    return Phase(stage=measure.name, samples=samples, most=samples)


def widest_choice(setup: Setup, budgets: Sequence[Budget]) -> Choice:
    """Return the choice with the most bits within budgets, for what depends on no measurement.

    Raises:
        Infeasible: There is none.
    """
    return choice_of(solved(setup, build_problem(size_only(setup.table), budgets)))


def plan_phases(
    setup: Setup, runner: Runner, budgets: Sequence[Sequence[Budget]]
) -> tuple[Phase, ...]:
    """Return the phases of ``allocate`` in their order.

    Raises:
        Infeasible: No choice keeps the budgets of one plan.
    """
    n = len(budgets)
    problems = [build_problem(size_only(setup.table), together) for together in budgets]
    simple = baseline_choices(setup.table).values()
    metrics, _ = proposing_metrics(setup, runner)
    fitting = [sum(p.is_feasible(choice) for choice in simple) for p in problems]
    known = [SCORES + n_simple for n_simple in fitting]
    quick = setup.request.effort == "quick"
    settings = refinement_settings(setup)
    points = [widest_choice(setup, together) for together in budgets]
    labels = [f"budget {k + 1} of {n}" for k in range(n)]
    shared = shared_plan(setup, budgets) is not None
    searches = [
        Phase(stage=f"search, {labels[k]}", samples=0.0, most=0.0)
        if quick and shared
        else search_phase(
            setup,
            runner,
            f"search, {labels[k]}",
            points[k],
            known[k] + len(metrics) + PROPOSED + n - 1,
            settings,
        )
        for k in range(n)
    ]
    checks: list[Phase] = []
    for k, (problem, point) in enumerate(zip(problems, points, strict=True)):
        # The refined choices of all budgets, the baselines, a mix of the plan's size; one choice
        # twice where the rounding is to be settled.
        n_choices = 1 + min(1, fitting[k]) if quick else n + known[k] + 1 + shared
        n_choices += setup.request.rounding in {"auto", "learned"}
        compared = choices_phase(setup, f"hold-out, {labels[k]}", n_choices, full_precision=k == 0)
        if setup.stacked is None and fitting[k]:
            # Plan and best uniform one, where the hold-out samples cannot tell them apart.
            further = 3 * sum(len(samples) for samples in (*setup.spare, setup.fit))
            compared = replace(compared, most=compared.most + further)
        checks.append(compared)
        if quick:
            checks.append(Phase(stage=f"evidence, {labels[k]}", samples=0.0, most=0.0))
            continue
        near, distant = drawn_choices(
            setup.table, limits_of(problem), point, seed=setup.request.seed
        )
        passes = passes_of(runner, setup.table, near, near[0])
        few = min(EVIDENCE_SAMPLES, len(setup.holdout))
        samples = (passes + passes_of(runner, setup.table, distant, None)) * few
        # Where the plan stands is not known yet, and so not what its neighbours re-run.
        most = (1 + len(near) + len(distant)) * few
        checks.append(Phase(stage=f"evidence, {labels[k]}", samples=samples, most=most))
    first = [measure_phase(setup, runner, leading_measure(setup, runner))]
    if shared:
        # One uniform plan is rounded, and walked through on the hold-out samples.
        samples = 2.0 * len(setup.fit) + FORWARD_AND_BACK * len(setup.holdout)
        beside = ROUNDING * len(setup.fit)
        first.append(Phase(stage=SHARES, samples=samples, most=samples, rounding=beside))
    first += [measure_phase(setup, runner, metric) for metric in metrics.values()]
    return (*first, *searches, *checks)


def choices_phase(
    setup: Setup, stage: str, n_choices: int, *, full_precision: bool = False
) -> Phase:
    """Return the measurement of so many choices as they ship, corrections included.

    ``full_precision`` says whether that is still to be run on the samples too.
    """
    repaired = [c for c in setup.request.corrections if c in SAMPLES_REPAIR]
    each = len(setup.holdout) + len(repaired) * len(setup.correcting)
    samples = float((n_choices + full_precision) * each)
    # The widest uniform plan was rounded before.
    beside = 0.0 if setup.stacked is None else ROUNDING * len(setup.fit) * max(1, n_choices - 2)
    return Phase(stage=stage, samples=samples, most=samples, counted=False, rounding=beside)


def search_phase(
    setup: Setup,
    runner: Runner,
    stage: str,
    point: Choice,
    n_starts: int,
    settings: RefineSettings | None = None,
    *,
    on_fit: bool = False,
) -> Phase:
    """Return a refinement from so many starts, of which ``point`` may be one.

    ``on_fit`` says that the samples of the measurement also decide.
    """
    fit = len(runner.calibration)
    holdout = fit if on_fit else len(raced_samples(setup))
    usual, most = expected_passes(
        settings or RefineSettings(),
        runner,
        setup.table,
        point,
        starts=n_starts,
        share=holdout / fit,
    )
    # Each block of deciding samples is run in full precision once.
    once = runner.passes_before * holdout
    alone = on_fit or setup.request.effort == "quick"
    blocks = once * (1 if alone else 1 + len(setup.spare))
    return Phase(stage=stage, samples=usual * fit + once, most=most * fit + blocks)
