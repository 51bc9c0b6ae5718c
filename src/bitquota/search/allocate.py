"""Allocate: a model, a calibration set and budgets in; measured, certified plans out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidInput
from bitquota.measurement_setup import build_setup
from bitquota.search.baselines import baseline_choices, largest
from bitquota.search.idle import without_idle_layers
from bitquota.search.measured_plan import Outcome, measured_plan
from bitquota.search.phases import course_of, measure_phase, plan_phases, refinement_settings
from bitquota.search.portfolio import (
    by_scores,
    gather_portfolio,
    leading_measure,
    measure_leading,
    measuring_runner,
    raced_samples,
)
from bitquota.search.problems import choice_of, limits_of, proposer, solved
from bitquota.search.refine import refine
from bitquota.search.refinement import Linearisation
from bitquota.solver import build_problem
from bitquota.solver.archive import certificate_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.candidates.layers import Inventory
    from bitquota.context import Context
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.request import PlanRequest
    from bitquota.search.neighborhood import Choice
    from bitquota.search.portfolio import Portfolio
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.solver import Problem


HOPELESS = 2.0
"""A choice of a language model that is predicted to lose so many times what the best one does is
not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What ``allocate`` returns.

    Attributes:
        plans: One for each budget of the request.
        certificates: For each plan the file that proves its bound (``bitquota verify``); ``None``
            from solvers that give no certificate.
        weights: For each plan the file of its quantized weights, which the plan names by digest;
            ``None`` where weights are rounded to nearest.
        matrix: The sensitivity matrix around full precision.
        inventory: The model's tensors.
        passes: Forward-equivalents that this call ran for matrix, refinement and evidence, in
            passes over the calibration samples; what the ledger already held is not counted.
    """

    plans: tuple[Plan, ...]
    certificates: tuple[bytes | None, ...]
    weights: tuple[bytes | None, ...]
    matrix: SensitivityMatrix
    inventory: Inventory
    passes: float

    def with_weights(self, model: LoadedModel) -> LoadedModel:
        """Return the model with the quantized weights of the plans, to evaluate and export them."""
        return replace(model, weights=tuple(w for w in self.weights if w is not None))


def allocate(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    context: Context | None = None,
    loss: Loss | None = None,
) -> Allocation:
    """Measure the model, solve for every budget, verify by measuring, and return the best.

    The plan of a budget is the refined choice, unless a uniform plan that fits the same budget has
    a smaller *measured* loss on the hold-out part of the calibration set (and, where that cannot
    tell the two apart, on further samples), or another baseline one that is smaller by more than
    two paired standard errors: the best of many measured ones is lucky. The hold-out part has also
    decided between the steps of the refinement: its figures are
    a little better than those of new samples.

    Args:
        model: From ``bitquota.models.load_model``.
        calibration: From ``bitquota.models.load_calibration``.
        request: Budgets, candidates and how to measure.
        context: Where measurements are kept, whom to tell, when to stop.
        loss: A loss of your own (such as ``CustomLoss``) instead of the one that the request
            names; its ``name`` must change whenever what it computes does.

    Raises:
        InvalidInput: The request does not fit the model or the calibration set.
        BudgetTooSmall: A budget is below the smallest plan; nothing was measured.
        MeasurementFailed: A loss is not finite.
        Cancelled: ``cancelled`` answered true; the ledger keeps what was measured.

    Cost: that of the portfolio (``gather_portfolio``) once; for each budget a race of about ten
    choices, and at least two choices over the hold-out samples. Unless ``request.effort`` is
    ``quick`` also thirteen passes of evidence and about ten choices over the hold-out samples for
    each budget, and with ``request.refine`` what ``refinement.EFFORTS`` allows for linearisations
    around plans and measured swaps.
    """
    if not request.budgets:
        msg = "at least one budget must be given, such as '3 bits' or '12 MiB'; got none"
        raise InvalidInput(msg)
    setup = build_setup(model, calibration, request, context=context, loss=loss)
    budgets = [setup.budgets(text) for text in request.budgets]
    runner = measuring_runner(setup)
    setup = setup.on_course(lambda: course_of(plan_phases(setup, runner, budgets)))
    made = [runner]

    def runner_on(samples: CalibrationSet) -> Runner:
        made.append(setup.runner(samples))
        return made[-1]

    # Samples that decide: the hold-out part, then further ones, then those of the measurement.
    holdout = runner_on(raced_samples(setup))
    further: list[Callable[[], Runner]] = [cache(partial(runner_on, s)) for s in setup.spare]
    source = gather_portfolio(setup, runner, holdout, budgets)
    deciding: tuple[Runner | Callable[[], Runner], ...] = (holdout, *further, runner)
    if request.effort == "quick":
        deciding = (holdout,)
    problems = [build_problem(source.matrix, together) for together in budgets]
    outcomes: dict[int, Outcome] = {}
    warm: Linearisation | None = None
    # Downwards: what was measured around the plan of a larger budget proposes one for the next.
    for k in sorted(range(len(budgets)), key=lambda k: -_room(problems[k])):
        setup.context.next_phase()
        known = [outcome.choice for outcome in outcomes.values()]
        outcomes[k] = _search(setup, runner, deciding, source, budgets[k], problems[k], known, warm)
        warm = outcomes[k].last
    choices = [outcomes[k].choice for k in range(len(budgets))]
    made_plans = [
        measured_plan(
            setup, holdout, source, together, problems[k], outcomes[k], choices,
            f"budget {k + 1} of {len(budgets)}",
        )
        for k, together in enumerate(budgets)
    ]  # fmt: skip
    if setup.stacked is not None:
        setup.stacked.journal.finish()
    digest = source.matrix.digest()
    certificates = tuple(
        None if (proof := outcomes[k].optimum.certificate) is None
        else certificate_file(proof, problem, digest)
        for k, problem in enumerate(problems)
    )  # fmt: skip
    return Allocation(
        plans=tuple(plan for plan, _ in made_plans),
        certificates=certificates,
        weights=tuple(weights for _, weights in made_plans),
        matrix=source.matrix,
        inventory=setup.inventory,
        passes=sum(r.passes.passes * len(r.calibration) for r in made) / len(setup.fit),
    )


def measure_matrix(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    context: Context | None = None,
    loss: Loss | None = None,
) -> SensitivityMatrix:
    """Measure the sensitivity matrix of ``request`` alone; arguments and errors of ``allocate``."""
    setup = build_setup(model, calibration, request, context=context, loss=loss)
    runner = setup.runner()
    measure = leading_measure(setup, runner)
    setup = setup.on_course(lambda: course_of([measure_phase(setup, runner, measure)]))
    matrix = measure_leading(setup, runner)[0]
    if setup.stacked is not None:
        setup.stacked.journal.finish()
    return matrix


def _room(problem: Problem) -> float:
    """Return how much a budget allows: the smallest limit as a share of the highest cost."""
    starts = problem.offsets[:-1]
    dearest = np.maximum.reduceat(problem.costs, starts, axis=1).sum(axis=1)
    return float(min(problem.limits / np.maximum(dearest, 1), default=1.0))


def _search(
    setup: Setup,
    runner: Runner,
    deciding: Sequence[Runner | Callable[[], Runner]],
    source: Portfolio,
    budgets: tuple[Budget, ...],
    problem: Problem,
    known: Sequence[Choice],
    warm: Linearisation | None,
) -> Outcome:
    """Solve one budget, and refine the best of that and of all simpler choices."""
    optimum = solved(setup, problem)
    quick = setup.request.effort == "quick"
    simple = baseline_choices(setup.table)
    baselines = {name: choice for name, choice in simple.items() if problem.is_feasible(choice)}
    if quick and source.scaled:
        # A race of layers that are rounded apart does not see what rounding makes up for.
        choice, rows = choice_of(optimum), tuple(range(len(setup.table.rows)))
        last = Linearisation(point=None, matrix=source.matrix, differences=None, rows=rows)
        least = _widest(setup, source.matrix, baselines)
        return Outcome(choice=choice, baselines=least, optimum=optimum, last=last)
    for name, score in source.scores.items():
        baselines[name] = choice_of(solved(setup, build_problem(score, budgets)))
    # In order of trust: among choices that measurements cannot tell apart the first one leads.
    starts = {
        name: choice_of(solved(setup, build_problem(matrix, budgets)))
        for name, matrix in source.proposals.items()
    }
    leading = {"matrix": choice_of(optimum)}
    starts = (leading | starts if by_scores(setup) else starts | leading) | baselines
    starts |= {f"of another budget {k + 1}": choice for k, choice in enumerate(known)}
    if setup.request.allow and setup.stacked is None:
        starts |= {
            f"{name} without idle layers": without_idle_layers(
                setup, runner, source.matrix, problem, choice
            )
            for name, choice in starts.items()
        }
    if setup.stacked is not None:
        starts = _promising(setup, source.matrix, starts)
    found = refine(
        runner,
        setup.table,
        setup.loss,
        limits=limits_of(problem),
        solve=proposer(setup, problem),
        starts=starts,
        holdout=deciding,
        first=(source.matrix, source.differences),
        warm=warm,
        settings=refinement_settings(setup),
        context=setup.context,
    )
    if quick or by_scores(setup):
        least = _widest(setup, source.matrix, {n: c for n, c in baselines.items() if n in simple})
        # What the race dropped is not rounded as it would ship.
        scored = () if quick else (n for n in source.scores if baselines[n] in found.measured)
        baselines = least | {n: baselines[n] for n in scored}
    return Outcome(
        choice=found.choice,
        baselines=baselines,
        optimum=optimum,
        last=found.last,
        raced=found.per_sample if quick else None,
    )


def _promising(
    setup: Setup, matrix: SensitivityMatrix, choices: dict[str, Choice]
) -> dict[str, Choice]:
    """Return the choices that a matrix of the loss does not predict to be hopeless.

    A pass of a language model over the hold-out samples is too much to see that.
    """
    if matrix.loss != setup.loss.name:
        return choices
    predicted = {name: matrix.predict(choice) for name, choice in choices.items()}
    limit = HOPELESS * min(predicted.values())
    return {name: choice for name, choice in choices.items() if predicted[name] <= limit}


def _widest(
    setup: Setup, matrix: SensitivityMatrix, choices: dict[str, Choice]
) -> dict[str, Choice]:
    """Return the largest uniform one of ``choices``, or the largest, if there is one.

    With a KV cache that is the one with the least predicted loss: bytes of caches and bytes of
    weights are not worth the same.
    """
    uniform = {name: choice for name, choice in choices.items() if name.startswith("uniform")}
    offered = uniform or choices
    if setup.inventory.caches:
        return {
            n: choices[n] for n in sorted(offered, key=lambda n: matrix.predict(offered[n]))[:1]
        }
    return largest(setup.table, offered)
