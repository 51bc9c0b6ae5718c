"""From what was found for a budget to its plan: rounding settled, baselines measured, all noted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

import bitquota
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.table import spent_on
from bitquota.measurement_setup import Kept
from bitquota.models.blocks import repeated_blocks
from bitquota.plan import SOLVER, Assignment, Baseline, CacheAssignment, Plan, PlanTarget, Proof
from bitquota.quantizers.quantized_model import named
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import AUTO, LEARNED
from bitquota.search.baselines import uniform_mixes
from bitquota.search.evidence import gather_evidence
from bitquota.search.phases import choices_phase
from bitquota.search.problems import choice_of, limits_of
from bitquota.search.refinement import CLEARLY
from bitquota.sensitivity.recorder import standard_error
from bitquota.solver import Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.budget import Budget
    from bitquota.canonical import JsonObject
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.search.portfolio import Portfolio
    from bitquota.search.refine import Linearisation
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.solver import Problem, Solution


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What was found for one budget.

    Attributes:
        choice: The refined choice.
        baselines: Simpler choices within the budget, by name.
        optimum: The solver's answer for the matrix around full precision.
        last: The last linearisation of the refinement.
        raced: f64[n], what ``choice`` costs on the first hold-out samples where each layer is
            rounded apart; ``None`` where the effort is not quick, or it was not measured so.
    """

    choice: Choice
    baselines: dict[str, Choice]
    optimum: Solution
    last: Linearisation
    raced: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compared:
    """What was measured on the hold-out samples for one budget.

    Attributes:
        setup: The setup, with the rounding that was settled for this plan.
        choices: The refined choice, as ``SOLVER``, and the baselines, by name.
        measured: What each of them costs.
        best: Name of the choice with the smallest loss.
        rounding: What the plan says of how its weights are rounded; may be empty.
        uniform: What it says of a uniform choice that the hold-out samples could not tell from it;
            may be empty.
    """

    setup: Setup
    choices: dict[str, Choice]
    measured: dict[str, ChoiceLoss]
    best: str
    rounding: JsonObject
    uniform: JsonObject

    @property
    def choice(self) -> Choice:
        """The best choice."""
        return self.choices[self.best]


def measured_plan(
    setup: Setup,
    holdout: Runner,
    source: Portfolio,
    budgets: tuple[Budget, ...],
    problem: Problem,
    outcome: Outcome,
    others: Sequence[Choice],
    stage: str,
) -> tuple[Plan, bytes | None]:
    """Measure what was found and the baselines on the hold-out.

    Returns the best as a plan, with the file of its quantized weights if it has one.
    """
    setup.context.next_phase()
    found = _compare(setup, source, problem, outcome, others, stage)
    setup, choice = found.setup, found.choice

    # How well predictions agree with measurements around the plan.
    setup.context.next_phase()
    evidence = None
    if setup.request.effort != "quick":
        evidence = gather_evidence(
            holdout,
            setup.table,
            setup.loss,
            limits=limits_of(problem),
            choice=choice,
            predict=source.matrix.predict,
            seed=setup.request.seed,
            context=setup.context,
        ).to_json()

    # The weights that ship, and the plan that names them.
    quantized = setup.quantized_model(choice)
    weights, shipped = None, None
    if quantized is not None:
        weights = quantized.to_bytes()
        shipped = named(weights, quantized.rounding)
    by_layer = {candidate.layer: candidate for candidate in setup.table.decode(choice)}
    plan = Plan(
        model_digest=setup.inventory.model_digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=by_layer[layer.name])
            for layer in setup.inventory.layers
        ),
        caches=tuple(
            CacheAssignment(cache=cache, candidate=by_layer[cache.name])
            for cache in setup.inventory.caches
        ),
        unquantized=setup.inventory.unquantized,
        budgets=budgets,
        corrections=setup.request.corrections,
        selected=found.best,
        # A metric's score is in its own unit: no loss increase.
        predicted=source.matrix.predict(choice) if source.matrix.loss == setup.loss.name else None,
        measured=found.measured[found.best].measured,
        proof=_proof(
            problem,
            outcome.optimum,
            choice,
            gap=setup.request.gap,
            matrix_digest=source.matrix.digest(),
        ),
        baselines=_baselines(found),
        loss=setup.loss.name,
        provenance=_provenance(setup, source, found),
        target=None if setup.target is None else PlanTarget.of(setup.target),
        evidence=evidence,
        outputs=setup.measure_choice(choice, stage="evidence", with_outputs=True).outputs,
        weights=shipped,
    )
    return plan, weights


def _compare(
    setup: Setup,
    source: Portfolio,
    problem: Problem,
    outcome: Outcome,
    others: Sequence[Choice],
    stage: str,
) -> _Compared:
    """Settle the rounding, and measure the refined choice, the baselines and a uniform mix.

    ``others`` are the refined choices of all budgets: those that fit count as refined here too.
    """
    # Rounding a chain of blocks costs little memory, which two plans of it would not.
    setup = replace(setup, kept=Kept(most=2 if setup.stacked is None else 1))
    quick = setup.request.effort == "quick"
    refined = (outcome.choice,) if quick else (outcome.choice, *others)
    if source.scaled:
        # Measured swaps saw layers that are rounded apart.
        refined += (choice_of(outcome.optimum),)
    own = {f"refined {k}": c for k, c in enumerate(dict.fromkeys(refined))}
    own = {name: choice for name, choice in own.items() if problem.is_feasible(choice)}
    simple = dict(outcome.baselines)
    if not quick:
        simple |= _uniform_mix(setup, source, problem, outcome)
    compared = own | simple
    setup, known, rounding = _with_rounding(setup, compared, outcome.raced, stage)
    measured = _measure_choices(setup, compared, stage, known)
    leading = _trusted(measured, list(own))
    choices = {SOLVER: own[leading], **simple}
    measured[SOLVER] = measured[leading]
    # Rounding is learned for the best choice alone.
    best, uniform = _best(setup, choices, measured, stage)
    if setup.request.rounding == LEARNED and setup.fitted.order is not None:
        setup, learned, rounding = _with_learning(setup, choices[best], measured[best], stage)
        measured |= {name: learned for name in choices if choices[name] == choices[best]}
    return _Compared(
        setup=setup,
        choices=choices,
        measured=measured,
        best=best,
        rounding=rounding,
        uniform=uniform,
    )


def _trusted(measured: Mapping[str, ChoiceLoss], names: Sequence[str]) -> str:
    """Return the first of the names, or the best of those that are clearly better."""
    first = measured[names[0]]

    def clearly_better(name: str) -> bool:
        worse_by, error = first.paired(measured[name])
        return worse_by > CLEARLY * error

    better = filter(clearly_better, names[1:])
    return min(better, key=lambda name: measured[name].mean, default=names[0])


def _best(
    setup: Setup, choices: Mapping[str, Choice], measured: Mapping[str, ChoiceLoss], stage: str
) -> tuple[str, JsonObject]:
    """Return the choice that ships, and what the plan says of a uniform one beside it.

    Nobody should have to take a mix that is worse than uniform. Where the hold-out samples cannot
    tell the two apart, further ones are asked: those that nothing was measured on, then those that
    sensitivities were. In a chain of blocks each would have to be rounded once more.
    """
    uniform = [name for name in choices if name.startswith("uniform")]
    trusted = _trusted(measured, [name for name in choices if name not in uniform])
    if not uniform:
        return trusted, {}
    rival = min(uniform, key=lambda name: measured[name].mean)
    worse_by, error = first = measured[trusted].paired(measured[rival])
    differences = [measured[trusted].per_sample - measured[rival].per_sample]
    pair = {name: choices[name] for name in (trusted, rival)}
    further = () if setup.stacked is not None else (*setup.spare, setup.fit)
    for samples in further:
        if abs(worse_by) > CLEARLY * error or choices[trusted] == choices[rival]:
            break
        on_these = setup.on_samples(samples)
        found = _measure_choices(on_these, pair, f"{stage}, {len(samples)} further samples")
        differences.append(found[trusted].per_sample - found[rival].per_sample)
        together = np.concatenate(differences)
        worse_by, error = float(together.mean()), float(standard_error(together))
    about: JsonObject = {}
    if len(differences) > 1:
        about = {
            "beside": rival,
            "worse_by": [first[0], worse_by],
            "standard_error": [first[1], error],
            "samples": [len(differences[0]), sum(map(len, differences))],
        }
    return rival if worse_by > 0 else trusted, about


def _uniform_mix(
    setup: Setup, source: Portfolio, problem: Problem, outcome: Outcome
) -> dict[str, Choice]:
    """Return a mix of two widths at the refined choice's size, unless it is a baseline already.

    Of a few, the one with the smallest predicted loss: each is rounded and run as it would ship.
    """
    size = sum(c.size_bits for c in setup.table.decode(outcome.choice))
    mixes = {
        name: choice
        for name, choice in uniform_mixes(setup.table, size).items()
        if problem.is_feasible(choice)
    }
    best = min(mixes, key=lambda name: source.matrix.predict(mixes[name]), default=None)
    if best is None or mixes[best] in outcome.baselines.values():
        return {}
    return {best: mixes[best]}


def _proof(
    problem: Problem, solution: Solution, choice: Choice, *, gap: float, matrix_digest: str
) -> Proof:
    """Return how good ``choice`` is for the matrix; it need not be the solver's own."""
    objective = problem.evaluate(choice)
    status = solution.status
    if choice != choice_of(solution):
        # A choice that measured better need not be the optimum of the matrix.
        within = objective - solution.bound <= gap * abs(objective)
        status = Status.OPTIMAL if within else Status.FEASIBLE
    return Proof(
        status=str(status),
        limit=None if solution.limit is None else str(solution.limit),
        objective=objective,
        bound=solution.bound,
        solver=solution.backend,
        matrix_digest=matrix_digest,
        certified=solution.certificate is not None,
    )


def _provenance(setup: Setup, source: Portfolio, found: _Compared) -> JsonObject:
    """Return what a plan was made from; what does not apply is left out."""
    always: JsonObject = {
        # Budgets name the cost tables that price them.
        "request": replace(setup.request, tables=()).to_json(),
        "fit": setup.fit.to_json(),
        "holdout": setup.holdout.to_json(),
        "correcting": setup.correcting.to_json() if setup.request.corrections else None,
        "matrix": source.matrix.provenance,
        "bitquota": bitquota.__version__,
    }
    where_it_applies: JsonObject = {
        "skipped": source.skipped,
        "importance": setup.importance.digest if setup.importance else "",
        "identity": setup.identity_note,
        "smoothing": setup.smoothing.to_json() if setup.smoothing else {},
        "rotation": setup.rotated.to_json() if setup.rotated else {},
        "rounding": found.rounding,
        "uniform": found.uniform,
    }
    return always | {key: value for key, value in where_it_applies.items() if value}


def _with_rounding(
    setup: Setup,
    choices: dict[str, Choice],
    raced: NDArray[np.float64] | None,
    stage: str,
) -> tuple[Setup, dict[Choice, ChoiceLoss], JsonObject]:
    """Settle how the weights of a plan are rounded, where the request leaves that to us.

    The first of ``choices`` decides, which is measured rounded to nearest too, unless feeding
    errors on has clearly gained over layers that are rounded apart, as ``raced`` has it. Returns
    the setup that rounds so, what was measured with it, and what the plan says of it.
    """
    if setup.request.rounding != AUTO:
        return setup, {}, {}
    if setup.fitted.order is None:
        return setup, {}, {"to": str(Rounder.NEAREST)}
    measured = _measure_choices(setup, choices, stage)
    known = {choices[name]: found for name, found in measured.items()}
    choice, to_nearest = next(iter(choices.values())), setup.rounded_to_nearest()
    fed = known[choice]
    if raced is not None:
        gains = raced - fed.per_sample[: len(raced)]
        gain, error = float(gains.mean()), float(standard_error(gains))
        if gain > error:
            about = {"apart_worse_by": gain, "standard_error": error}
            return setup, known, {"to": setup.fitted.order.rounding, **about}
    (plain,) = _measure_choices(to_nearest, {SOLVER: choice}, f"{stage}, to nearest").values()
    worse_by, error = plain.paired(fed)
    about = {"nearest_worse_by": worse_by, "standard_error": error}
    if worse_by < 0:
        return to_nearest, {choice: plain}, {"to": str(Rounder.NEAREST), **about}
    return setup, known, {"to": setup.fitted.order.rounding, **about}


def _with_learning(
    setup: Setup, choice: Choice, measured: ChoiceLoss, stage: str
) -> tuple[Setup, ChoiceLoss, JsonObject]:
    """Learn the rounding of the choice that was found, and keep that if it measures better.

    Returns the setup that rounds so, what was measured with it, and what the plan says of it.
    """
    order = setup.fitted.order
    assert order is not None  # noqa: S101  # callers ask first
    rounded = {
        c.layer
        for c in setup.table.decode(choice)
        if c.weight_bits < FULL_PRECISION_BITS and not c.cached
    }
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


def _baselines(found: _Compared) -> tuple[Baseline, ...]:
    """Return what the plan was measured beside, and the refined choice if a baseline was better."""
    return tuple(
        _baseline(found, name) for name in found.choices if name != SOLVER or found.best != SOLVER
    )


def _baseline(found: _Compared, name: str) -> Baseline:
    setup, measured = found.setup, found.measured[name]
    candidates = {c.layer: c for c in setup.table.decode(found.choices[name])}
    difference, error = measured.paired(found.measured[found.best])
    rows = tuple(candidates[la.name].row_bits for la in setup.inventory.layers)
    return Baseline(
        name=name,
        weight_bits=tuple(candidates[la.name].weight_bits for la in setup.inventory.layers),
        size_bits=spent_on("weight_size_bits", tuple(candidates.values())),
        measured=measured.measured,
        paired_difference=difference,
        paired_error=error,
        cache_bits=tuple(candidates[c.name].weight_bits for c in setup.inventory.caches),
        cache_size_bits=spent_on("cache_bits", tuple(candidates.values())),
        row_bits=rows if any(rows) else (),
        sparse=tuple(la.name for la in setup.inventory.layers if candidates[la.name].sparse),
    )
