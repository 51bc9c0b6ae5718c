"""Allocate: a model, a calibration set and budgets in; measured, certified plans out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import bitquota
from bitquota.corrections import Correction
from bitquota.errors import Infeasible, InvalidInput, StalePlan
from bitquota.formats import check_calibration
from bitquota.formats.targets import candidates_at
from bitquota.plan import SOLVER, Assignment, Baseline, MeasuredLoss, Plan, Proof
from bitquota.progress import Progress
from bitquota.sensitivity.baselines import baseline_choices, size_only, weight_mse
from bitquota.sensitivity.corrections import fold_batch_norm
from bitquota.sensitivity.evaluate import ChoiceLoss, measure_choice
from bitquota.sensitivity.gram import measure_differences
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measure import measure_by_name
from bitquota.sensitivity.moves import Limits
from bitquota.sensitivity.refine import RefineSettings, refine
from bitquota.sensitivity.robust import project
from bitquota.setting import Setting, choose_device, inventory_of, prepare
from bitquota.solver import Problem, Status, build_problem, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.budget import Budget
    from bitquota.candidates import Inventory
    from bitquota.canonical import JsonObject
    from bitquota.formats import LoadedModel
    from bitquota.matrix import SensitivityMatrix
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.request import PlanRequest
    from bitquota.sensitivity.calibration import CalibrationSet
    from bitquota.sensitivity.gram import OutputDifferences
    from bitquota.sensitivity.ledger import Ledger
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.moves import Choice
    from bitquota.sensitivity.runner import Runner
    from bitquota.solver import Solution

GRAM = "gram"
"""The measure that ``auto`` stands for."""

_REFINEMENT = {True: RefineSettings(), False: RefineSettings(iterations=0, swap_rounds=0)}
"""Without refinement what is left are the proposals from one matrix, measured."""

PROPOSAL_GAP = 1e-3
"""Proposals of the refinement are measured anyway: a proof of the last digits buys nothing."""

SOLVER_NODES = 50_000
"""Branch-and-bound nodes for one final solve; the gap that is left is reported."""

PROPOSAL_NODES = 200
"""Branch-and-bound nodes for one proposal; a count, so that plans do not depend on speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What ``allocate`` returns.

    Attributes:
        plans: One for each budget of the request.
        matrix: The sensitivity matrix around full precision.
        inventory: The model's tensors.
        passes: Full forward passes over the calibration samples that this call ran for the
            matrix; what the ledger already held is not counted.
    """

    plans: tuple[Plan, ...]
    matrix: SensitivityMatrix
    inventory: Inventory
    passes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss of one choice on a labelled set.

    Attributes:
        plan_index: Which of the plans, or ``None`` for full precision.
        name: ``full precision``, ``plan``, or the baseline's name.
        measured: Loss increase and accuracy.
    """

    plan_index: int | None
    name: str
    measured: MeasuredLoss

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "plan_index": self.plan_index,
            "name": self.name,
            "measured": self.measured.to_json(),
        }


def allocate(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    ledger: Ledger,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    device: str = "auto",
    loss: Loss | None = None,
) -> Allocation:
    """Measure the model, solve for every budget, verify by measuring, and return the best.

    The plan of a budget is the choice with the smallest *measured* loss on the hold-out part of
    the calibration set among the solver's choice and all baselines that fit the same budget, so
    it never loses to one of its own baselines there.

    Args:
        model: From ``bitquota.formats.load_model``.
        calibration: From ``bitquota.formats.load_calibration``.
        request: Budgets, candidates and how to measure.
        ledger: Where measurements are kept; what it holds is not measured again.
        on_progress: Called after every step.
        cancelled: Asked between steps; once it answers true, ``Cancelled`` is raised.
        device: ``auto`` takes a GPU where there is one.
        loss: A loss of your own (such as ``CustomLoss``) instead of the one that the request
            names; its ``name`` must change whenever what it computes does.

    Raises:
        InvalidInput: The request does not fit the model or the calibration set.
        BudgetTooSmall: A budget is below the smallest plan; nothing was measured.
        MeasurementFailed: A loss is not finite.
        Cancelled: ``cancelled`` answered true; the ledger keeps what was measured.

    Cost: that of the measure around full precision once; for each budget about ten passes of
    measured proposals and ten over the hold-out samples; with ``request.refine`` up to a few more
    linearisations (one run behind one group per row each) and some thirty measured swaps.
    """
    if not request.budgets:
        msg = "at least one budget must be given, such as '3 bits' or '12 MiB'; got none"
        raise InvalidInput(msg)
    setting = prepare(
        model, calibration, request, ledger=ledger, device=device, on_progress=on_progress,
        cancelled=cancelled, loss=loss,
    )  # fmt: skip
    budgets = [setting.budgets(text) for text in request.budgets]
    runner = setting.runner()
    source = _measure(setting, runner)
    plans: list[Plan] = []
    found: dict[str, Choice] = {}
    for k, together in enumerate(budgets):
        stage = f"budget {k + 1} of {len(budgets)}"
        plan, choice = _plan(setting, runner, source, together, found, stage)
        plans.append(plan)
        found[f"plan {k + 1}"] = choice
    return Allocation(
        plans=tuple(plans),
        matrix=source.matrix,
        inventory=setting.inventory,
        passes=runner.passes.passes,
    )


def measure_matrix(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    ledger: Ledger,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    device: str = "auto",
    loss: Loss | None = None,
) -> SensitivityMatrix:
    """Measure the sensitivity matrix of ``request`` alone; arguments and errors of ``allocate``."""
    setting = prepare(
        model, calibration, request, ledger=ledger, device=device, on_progress=on_progress,
        cancelled=cancelled, loss=loss,
    )  # fmt: skip
    return _measure(setting, setting.runner()).matrix


def evaluate_plans(
    model: LoadedModel,
    data: CalibrationSet,
    plans: Sequence[Plan],
    *,
    correction_data: CalibrationSet | None = None,
    with_baselines: bool = False,
    loss: str = "kl",
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> list[Evaluation]:
    """Run the model in full precision and under each plan on ``data``.

    Args:
        model: The model that the plans were made for.
        data: Samples, labelled if accuracies are wanted.
        plans: What to evaluate.
        correction_data: Unlabelled samples for the plans' corrections; ``data`` itself is never
            used for them.
        with_baselines: Also evaluate every baseline of every plan, with the plan's corrections.
        loss: Name of the loss.
        device: ``auto`` takes a GPU where there is one.
        on_progress: Called after every batch.

    Raises:
        StalePlan: A plan was made for another model.
        InvalidInput: A plan has corrections and ``correction_data`` is missing.

    Cost: two forward passes over ``data`` for each choice.
    """
    where = choose_device(device)
    function = loss_by_name(loss)
    check_calibration(model, data)
    samples = data.to(where)
    correcting = None if correction_data is None else correction_data.to(where)
    plain = copy.deepcopy(model.module).to(where).eval()
    inventory = inventory_of(plain, model, samples)
    reference = measure_choice(plain, inventory, (), samples, function, on_progress=on_progress)
    found = [Evaluation(plan_index=None, name="full precision", measured=reference.measured)]
    for k, plan in enumerate(plans):
        check_model(plan, model)
        module, described = plain, inventory
        if Correction.FOLD_BATCH_NORM in plan.corrections:
            module = fold_batch_norm(plain, samples.first(2).inputs)
            described = inventory_of(module, model, samples)
        measure = partial(
            measure_choice,
            module,
            described,
            calibration=samples,
            loss=function,
            corrections=plan.corrections,
            correction_data=correcting,
            on_progress=on_progress,
        )
        chosen = [a.candidate for a in plan.assignments]
        found.append(
            Evaluation(plan_index=k, name="plan", measured=measure(candidates=chosen).measured)
        )
        for baseline in plan.baselines if with_baselines else ():
            measured = measure(candidates=candidates_at(plan, baseline.weight_bits)).measured
            found.append(Evaluation(plan_index=k, name=baseline.name, measured=measured))
    return found


def check_model(plan: Plan, model: LoadedModel) -> None:
    """Raise ``StalePlan`` unless ``plan`` was made for exactly this model."""
    if plan.model_digest != model.digest:
        msg = (
            f"a plan must be used with the model it was made for, {plan.model_digest}; "
            f"'{model.source}' is {model.digest}: make a new plan for it"
        )
        raise StalePlan(msg, plan=plan.model_digest, model=model.digest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """What was measured around full precision.

    Attributes:
        matrix: Singles, and cross terms if the measure has them.
        differences: Output differences, when refinement will want them.
        scores: Simpler matrices whose solutions are the baselines, by name.
    """

    matrix: SensitivityMatrix
    differences: OutputDifferences | None
    scores: dict[str, SensitivityMatrix]


def _measure(setting: Setting, runner: Runner) -> _Source:
    differences = None
    if setting.request.measure in ("auto", GRAM):
        matrix, differences = measure_differences(
            runner,
            setting.table,
            setting.loss,
            ledger=setting.ledger,
            on_progress=setting.on_progress,
            cancelled=setting.cancelled,
        )
    else:
        matrix = measure_by_name(setting.request.measure).measure(
            runner,
            setting.table,
            setting.loss,
            ledger=setting.ledger,
            on_progress=setting.on_progress,
            cancelled=setting.cancelled,
        )
    scores = {
        "size only": size_only(setting.table),
        "weight MSE": weight_mse(
            setting.module, setting.inventory, setting.table, weights=setting.weights
        ),
        f"one-layer {setting.loss.name}": replace(matrix, cross=None, cross_error=None),
    }
    return _Source(matrix=matrix, differences=differences, scores=scores)


def _solve(setting: Setting, problem: Problem) -> Solution:
    solution = solve(
        problem,
        backend=setting.request.solver,
        gap=setting.request.gap,
        node_limit=SOLVER_NODES,
        time_limit_s=setting.request.time_limit_s,
        seed=setting.request.seed,
        cancelled=setting.cancelled,
    )
    if solution.choice is None:
        msg = (
            f"some choice must satisfy all budgets together; the solver ended "
            f"'{solution.status}': raise a budget, or give the solver more time"
        )
        raise Infeasible(msg, status=str(solution.status))
    return solution


def _choice(solution: Solution) -> Choice:
    assert solution.choice is not None  # noqa: S101  # _solve raises otherwise
    return tuple(int(c) for c in solution.choice)


def _refine(
    setting: Setting,
    runner: Runner,
    source: _Source,
    problem: Problem,
    starts: dict[str, Choice],
) -> tuple[SensitivityMatrix, Choice]:
    """Return the refined choice and the matrix around the last point of the way."""
    # Rows that are forbidden outright become one more integer limit: none may be taken.
    everything = Limits(
        costs=np.vstack([problem.costs, ~problem.allowed[None, :]]).astype(np.int64),
        limits=np.append(problem.limits, np.int64(0)),
    )

    def propose(matrix: SensitivityMatrix, limits: Limits) -> Choice | None:
        solution = solve(
            _with_matrix(problem, matrix, limits),
            backend=setting.request.solver,
            gap=max(PROPOSAL_GAP, setting.request.gap),
            node_limit=PROPOSAL_NODES,
            seed=setting.request.seed,
            cancelled=setting.cancelled,
        )
        return None if solution.choice is None else _choice(solution)

    found = refine(
        runner,
        setting.table,
        setting.loss,
        limits=everything,
        solve=propose,
        starts=starts,
        first=(source.matrix, source.differences),
        settings=_REFINEMENT[setting.request.refine],
        ledger=setting.ledger,
        on_progress=setting.on_progress,
        cancelled=setting.cancelled,
    )
    return found.matrix, found.choice


def _with_matrix(problem: Problem, matrix: SensitivityMatrix, limits: Limits) -> Problem:
    """Return the problem of another matrix over the same groups within other limits."""
    return Problem(
        diagonal=matrix.diagonal,
        cross=matrix.cross,
        offsets=problem.offsets,
        costs=limits.costs,
        limits=limits.limits,
        groups=problem.groups,
        labels=problem.labels,
        constant=matrix.constant,
    )


def _plan(
    setting: Setting,
    runner: Runner,
    source: _Source,
    budgets: tuple[Budget, ...],
    known: dict[str, Choice],
    stage: str,
) -> tuple[Plan, Choice]:
    """Solve one budget, measure solution and baselines on the hold-out, return the best."""
    problem = build_problem(source.matrix, budgets)
    simple = baseline_choices(setting.table)
    baselines = {name: choice for name, choice in simple.items() if problem.is_feasible(choice)}
    for name, score in source.scores.items():
        baselines[name] = _choice(_solve(setting, build_problem(score, budgets)))
    starts = baselines | known
    if source.matrix.cross is not None:
        # The exact optimum of a noisy matrix stacks its errors; that of the tamer projection is
        # often better in truth. Both are only proposals: measurements decide.
        tamed = _solve(setting, build_problem(project(source.matrix), budgets))
        starts["projected"] = _choice(tamed)
    matrix, found = _refine(setting, runner, source, problem, starts)
    problem = build_problem(matrix, budgets)
    solution = _solve(setting, problem)
    choices = {SOLVER: found, **baselines}
    measured = _measure_choices(setting, choices, stage)
    # Ties go to the solver's plan, which comes first.
    best = min(choices, key=lambda name: measured[name].mean)
    chosen = setting.table.decode(choices[best])
    by_layer = {candidate.layer: candidate for candidate in chosen}
    objective = problem.evaluate(choices[best])
    status = solution.status
    if choices[best] != _choice(solution):
        # A choice that measured better need not be the optimum of the matrix.
        within = objective - solution.bound <= setting.request.gap * abs(objective)
        status = Status.OPTIMAL if within else Status.FEASIBLE
    plan = Plan(
        model_digest=setting.inventory.model_digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=by_layer[layer.name])
            for layer in setting.inventory.layers
        ),
        unquantized=setting.inventory.unquantized,
        budgets=budgets,
        corrections=setting.request.corrections,
        selected=best,
        predicted=matrix.predict(choices[best]),
        measured=measured[best].measured,
        proof=Proof(
            status=str(status),
            limit=None if solution.limit is None else str(solution.limit),
            objective=objective,
            bound=solution.bound,
            solver=solution.backend,
            matrix_digest=matrix.digest(),
            certified=solution.certificate is not None,
        ),
        baselines=tuple(
            _baseline(setting, name, choices[name], measured[name], measured[best])
            for name in choices
            if name != SOLVER or best != SOLVER
        ),
        loss=setting.loss.name,
        provenance={
            "request": setting.request.to_json(),
            "fit": setting.fit.to_json(),
            "holdout": setting.holdout.to_json(),
            "correcting": setting.correcting.to_json() if setting.request.corrections else None,
            "matrix": matrix.provenance,
            "bitquota": bitquota.__version__,
        },
        target=None if setting.target is None else setting.target.record(),
    )
    return plan, choices[best]


def _measure_choices(
    setting: Setting, choices: dict[str, Choice], stage: str
) -> dict[str, ChoiceLoss]:
    """Measure every distinct choice on the hold-out samples."""
    distinct: dict[Choice, ChoiceLoss] = {}
    n_distinct = len(set(choices.values()))
    # One bar over all choices says more than one for each.
    quiet = replace(setting, on_progress=None)
    for choice in choices.values():
        if choice not in distinct:
            distinct[choice] = quiet.measure_choice(choice, stage=stage)
            if setting.on_progress is not None:
                step = Progress(stage=f"hold-out, {stage}", done=len(distinct), total=n_distinct)
                setting.on_progress(step)
    return {name: distinct[choice] for name, choice in choices.items()}


def _baseline(
    setting: Setting,
    name: str,
    choice: Choice,
    measured: ChoiceLoss,
    best: ChoiceLoss,
) -> Baseline:
    candidates = {c.layer: c for c in setting.table.decode(choice)}
    difference, error = measured.paired(best)
    return Baseline(
        name=name,
        weight_bits=tuple(candidates[la.name].weight_bits for la in setting.inventory.layers),
        size_bits=sum(c.size_bits for c in candidates.values()),
        measured=measured.measured,
        paired_difference=difference,
        paired_error=error,
    )
