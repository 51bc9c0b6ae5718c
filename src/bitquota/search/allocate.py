"""Allocate: a model, a calibration set and budgets in; measured, certified plans out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

import bitquota
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidInput
from bitquota.evaluate.choice import ChoiceLoss
from bitquota.measurement_setup import Kept, Setup, build_setup
from bitquota.models.blocks import repeated_blocks
from bitquota.plan import SOLVER, Assignment, Baseline, Plan, PlanTarget, Proof
from bitquota.quantizers.quantized_model import named
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import AUTO, LEARNED
from bitquota.search.baselines import baseline_choices, uniform_mixes
from bitquota.search.evidence import gather_evidence
from bitquota.search.phases import (
    choices_phase,
    course_of,
    measure_phase,
    plan_phases,
    refinement_settings,
)
from bitquota.search.portfolio import (
    gather_portfolio,
    leading_measure,
    measure_leading,
    measuring_runner,
    raced_samples,
)
from bitquota.search.problems import choice_of, limits_of, proposer, solved
from bitquota.search.refine import refine
from bitquota.solver import Problem, Status, build_problem
from bitquota.solver.archive import certificate_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.candidates.layers import Inventory
    from bitquota.canonical import JsonObject
    from bitquota.context import Context
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.matrix import SensitivityMatrix
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.request import PlanRequest
    from bitquota.search.neighborhood import Choice
    from bitquota.search.portfolio import Portfolio
    from bitquota.search.refine import Linearisation
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.solver import Solution


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

    The plan of a budget is the choice with the smallest *measured* loss on the hold-out part of
    the calibration set among the refined choice and all baselines that fit the same budget, so
    it never loses to one of its own baselines there. The hold-out part has also decided between
    the steps of the refinement: its figures are a little better than those of new samples.

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
    source = gather_portfolio(setup, runner)
    made = [runner]

    def runner_on(samples: CalibrationSet) -> Runner:
        made.append(setup.runner(samples))
        return made[-1]

    # Samples that decide: the hold-out part, then further ones, then those of the measurement.
    holdout = runner_on(raced_samples(setup))
    further: list[Callable[[], Runner]] = [cache(partial(runner_on, s)) for s in setup.spare]
    deciding: tuple[Runner | Callable[[], Runner], ...] = (holdout, *further, runner)
    if request.effort == "quick":
        deciding = (holdout,)
    problems = [build_problem(source.matrix, together) for together in budgets]
    outcomes: dict[int, _Outcome] = {}
    warm: Linearisation | None = None
    # Downwards: what was measured around the plan of a larger budget proposes one for the next.
    for k in sorted(range(len(budgets)), key=lambda k: -_room(problems[k])):
        setup.context.next_phase()
        known = [outcome.choice for outcome in outcomes.values()]
        outcomes[k] = _search(setup, runner, deciding, source, budgets[k], problems[k], known, warm)
        warm = outcomes[k].last
    choices = [outcomes[k].choice for k in range(len(budgets))]
    made_plans = [
        _plan(setup, holdout, source, together, problems[k], outcomes[k], choices,
              f"budget {k + 1} of {len(budgets)}")
        for k, together in enumerate(budgets)
    ]  # fmt: skip
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
    return measure_leading(setup, runner)[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Outcome:
    """What was found for one budget.

    Attributes:
        choice: The refined choice.
        baselines: Simpler choices within the budget, by name.
        optimum: The solver's answer for the matrix around full precision.
        last: The last linearisation of the refinement.
    """

    choice: Choice
    baselines: dict[str, Choice]
    optimum: Solution
    last: Linearisation


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
) -> _Outcome:
    """Solve one budget, and refine the best of that and of all simpler choices."""
    optimum = solved(setup, problem)
    simple = baseline_choices(setup.table)
    baselines = {name: choice for name, choice in simple.items() if problem.is_feasible(choice)}
    for name, score in source.scores.items():
        baselines[name] = choice_of(solved(setup, build_problem(score, budgets)))
    # In order of trust: among choices that measurements cannot tell apart the first one leads.
    starts = {
        name: choice_of(solved(setup, build_problem(matrix, budgets)))
        for name, matrix in source.proposals.items()
    }
    starts |= {"matrix": choice_of(optimum)} | baselines
    starts |= {f"of another budget {k + 1}": choice for k, choice in enumerate(known)}
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
    if setup.request.effort == "quick":
        baselines = _widest(setup, {n: c for n, c in baselines.items() if n in simple})
    return _Outcome(choice=found.choice, baselines=baselines, optimum=optimum, last=found.last)


def _widest(setup: Setup, choices: dict[str, Choice]) -> dict[str, Choice]:
    """Return the largest uniform one of ``choices``, or the largest, if there is one."""
    uniform = {name: choice for name, choice in choices.items() if name.startswith("uniform")}
    offered = uniform or choices
    sizes = {n: sum(c.size_bits for c in setup.table.decode(k)) for n, k in offered.items()}
    return {n: choices[n] for n in sorted(sizes, key=lambda n: -sizes[n])[:1]}


def _plan(
    setup: Setup,
    holdout: Runner,
    source: Portfolio,
    budgets: tuple[Budget, ...],
    problem: Problem,
    outcome: _Outcome,
    others: Sequence[Choice],
    stage: str,
) -> tuple[Plan, bytes | None]:
    """Measure what was found and the baselines on the hold-out.

    Returns the best as a plan, with the file of its quantized weights if it has one.
    """
    setup.context.next_phase()
    setup = replace(setup, kept=Kept())
    quick = setup.request.effort == "quick"
    setup, first, rounding = _with_rounding(setup, outcome.choice, stage)
    found = (outcome.choice,) if quick else (outcome.choice, *others)
    own = {f"refined {k}": c for k, c in enumerate(dict.fromkeys(found))}
    own = {name: choice for name, choice in own.items() if problem.is_feasible(choice)}
    measured = _measure_choices(setup, own | outcome.baselines, stage, first)
    # Ties go to the refined choice, which comes first.
    refined = min(own, key=lambda name: measured[name].mean)
    choices = {SOLVER: own[refined], **outcome.baselines}
    measured[SOLVER] = measured[refined]
    # What is uniform at the same bytes: the best of a few mixes of two widths.
    size = sum(c.size_bits for c in setup.table.decode(own[refined]))
    mixes = {
        name: choice
        for name, choice in ({} if quick else uniform_mixes(setup.table, size)).items()
        if problem.is_feasible(choice) and choice not in choices.values()
    }
    if mixes:
        losses = _measure_choices(setup, mixes, f"{stage}, uniform mixes")
        mix = min(mixes, key=lambda name: losses[name].mean)
        choices[mix], measured[mix] = mixes[mix], losses[mix]
    best = min(choices, key=lambda name: measured[name].mean)
    if setup.request.rounding == LEARNED and setup.fitted.order is not None:
        setup, learned, rounding = _with_learning(setup, choices[best], measured[best], stage)
        measured |= {name: learned for name in choices if choices[name] == choices[best]}
    solution = outcome.optimum
    objective = problem.evaluate(choices[best])
    status = solution.status
    if choices[best] != choice_of(solution):
        # A choice that measured better need not be the optimum of the matrix.
        within = objective - solution.bound <= setup.request.gap * abs(objective)
        status = Status.OPTIMAL if within else Status.FEASIBLE
    setup.context.next_phase()
    evidence = (
        None
        if quick
        else gather_evidence(
            holdout,
            setup.table,
            setup.loss,
            limits=limits_of(problem),
            choice=choices[best],
            predict=source.matrix.predict,
            seed=setup.request.seed,
            context=setup.context,
        )
    )
    chosen = setup.table.decode(choices[best])
    by_layer = {candidate.layer: candidate for candidate in chosen}
    quantized = setup.quantized_model(choices[best])
    weights, shipped = None, None
    if quantized is not None:
        weights = quantized.to_bytes()
        shipped = named(weights, quantized.rounding)
    plan = Plan(
        model_digest=setup.inventory.model_digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=by_layer[layer.name])
            for layer in setup.inventory.layers
        ),
        unquantized=setup.inventory.unquantized,
        budgets=budgets,
        corrections=setup.request.corrections,
        selected=best,
        # A metric's score is in its own unit: no loss increase.
        predicted=(
            source.matrix.predict(choices[best]) if source.matrix.loss == setup.loss.name else None
        ),
        measured=measured[best].measured,
        proof=Proof(
            status=str(status),
            limit=None if solution.limit is None else str(solution.limit),
            objective=objective,
            bound=solution.bound,
            solver=solution.backend,
            matrix_digest=source.matrix.digest(),
            certified=solution.certificate is not None,
        ),
        baselines=tuple(
            _baseline(setup, name, choices[name], measured[name], measured[best])
            for name in choices
            if name != SOLVER or best != SOLVER
        ),
        loss=setup.loss.name,
        provenance={
            "request": setup.request.to_json(),
            "fit": setup.fit.to_json(),
            "holdout": setup.holdout.to_json(),
            "correcting": setup.correcting.to_json() if setup.request.corrections else None,
            "matrix": source.matrix.provenance,
            "bitquota": bitquota.__version__,
        }
        | ({"skipped": source.skipped} if source.skipped else {})
        | ({"importance": setup.importance.digest} if setup.importance else {})
        | ({"identity": setup.identity_note} if setup.identity_note else {})
        | ({"smoothing": setup.smoothing.to_json()} if setup.smoothing else {})
        | ({"rounding": rounding} if rounding else {}),
        target=None if setup.target is None else PlanTarget.of(setup.target),
        evidence=None if evidence is None else evidence.to_json(),
        outputs=setup.measure_choice(choices[best], stage="evidence", with_outputs=True).outputs,
        weights=shipped,
    )
    return plan, weights


def _with_rounding(
    setup: Setup, choice: Choice, stage: str
) -> tuple[Setup, dict[Choice, ChoiceLoss], JsonObject]:
    """Settle how the weights of a plan are rounded, where the request leaves that to us.

    Returns the setup that rounds so, what was measured with it, and what the plan says of it.
    """
    if setup.request.rounding != AUTO:
        return setup, {}, {}
    if setup.fitted.order is None:
        return setup, {}, {"to": str(Rounder.NEAREST)}
    to_nearest = setup.rounded_to_nearest()
    (fed,) = _measure_choices(setup, {SOLVER: choice}, stage).values()
    (plain,) = _measure_choices(to_nearest, {SOLVER: choice}, f"{stage}, to nearest").values()
    worse_by, error = plain.paired(fed)
    about = {"nearest_worse_by": worse_by, "standard_error": error}
    if worse_by < 0:
        return to_nearest, {choice: plain}, {"to": str(Rounder.NEAREST), **about}
    return setup, {choice: fed}, {"to": setup.fitted.order.rounding, **about}


def _with_learning(
    setup: Setup, choice: Choice, measured: ChoiceLoss, stage: str
) -> tuple[Setup, ChoiceLoss, JsonObject]:
    """Learn the rounding of the choice that was found, and keep that if it measures better.

    Returns the setup that rounds so, what was measured with it, and what the plan says of it.
    """
    order = setup.fitted.order
    assert order is not None  # noqa: S101  # callers ask first
    rounded = {c.layer for c in setup.table.decode(choice) if c.weight_bits < FULL_PRECISION_BITS}
    layers = {layer.name: layer for layer in setup.inventory.layers if layer.name in rounded}
    blocks = repeated_blocks(setup.module, layers, tuple(t[:2] for t in order.batches[0]))
    if not blocks:
        return setup, measured, {"to": order.name, "blocks": 0}
    learning = setup.learning()
    (learned,) = _measure_choices(learning, {SOLVER: choice}, f"{stage}, learned").values()
    worse_by, error = measured.paired(learned)
    about = {"blocks": len(blocks), "unlearned_worse_by": worse_by, "standard_error": error}
    if worse_by <= 0:
        return setup, measured, {"to": order.name, **about}
    return learning, learned, {"to": LEARNED, **about}


def _measure_choices(
    setup: Setup,
    choices: dict[str, Choice],
    stage: str,
    known: Mapping[Choice, ChoiceLoss] | None = None,
) -> dict[str, ChoiceLoss]:
    """Measure every distinct choice on the hold-out samples that is not known, by name."""
    stage = f"hold-out, {stage}"
    found = dict(known or {})
    new = set(choices.values()) - found.keys()
    weight = choices_phase(setup, stage, len(new)).samples
    found |= setup.measure_choices(
        (choice for choice in choices.values() if choice in new), stage=stage, weight=weight
    )
    return {name: found[choice] for name, choice in choices.items()}


def _baseline(
    setup: Setup,
    name: str,
    choice: Choice,
    measured: ChoiceLoss,
    best: ChoiceLoss,
) -> Baseline:
    candidates = {c.layer: c for c in setup.table.decode(choice)}
    difference, error = measured.paired(best)
    return Baseline(
        name=name,
        weight_bits=tuple(candidates[la.name].weight_bits for la in setup.inventory.layers),
        size_bits=sum(c.size_bits for c in candidates.values()),
        measured=measured.measured,
        paired_difference=difference,
        paired_error=error,
    )
