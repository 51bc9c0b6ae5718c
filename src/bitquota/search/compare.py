"""Compare metrics on the user's own model: every one's plan, measured, at every budget.

Design: docs/design/evaluation.md
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import bitquota
from bitquota.errors import InvalidInput
from bitquota.measurement_setup import build_setup
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import AUTO
from bitquota.report.comparison import Comparison, Entry, Measured
from bitquota.search.agreement import spearman
from bitquota.search.comparing import (
    AFFORDABLE_PASSES,
    PLANS,
    REFINE,
    SIZE_ONLY,
    THRESHOLD,
    Comparing,
    check_plans,
    checked_names,
)
from bitquota.search.phases import course_of
from bitquota.sensitivity.metrics import METRICS, find_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.context import Context
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.request import PlanRequest
    from bitquota.search.comparing import Draft
    from bitquota.search.neighborhood import Choice

_KNOWN_AS = {
    "gram": "output-difference Gram (Bitquota)",
    "pairs": "exact pairs (CLADO)",
    "diagonal": "one-layer loss (ZeroQ)",
    "tangent": "reverse-mode tangents",
    REFINE: "refinement on measured loss (Bitquota)",
    THRESHOLD: "error threshold (MixQuant)",
    SIZE_ONLY: "fill the smallest layers first",
}


def compare(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    metrics: Sequence[str] | None = None,
    *,
    context: Context | None = None,
    plans: int = PLANS,
    affordable_passes: float = AFFORDABLE_PASSES,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Measure with every metric, solve every budget with each, and measure all the plans.

    Each metric's plan is the solver's answer for its matrix; besides there are MixQuant's
    threshold rule on the relative weight error, refinement on measured loss, filling the smallest
    layers first, the uniform plans that fit, and mixes of two widths at the largest plan's bytes.
    All are measured on the hold-out samples, which no metric saw, with the request's corrections.

    Args:
        model: From ``bitquota.models.load_model``.
        calibration: From ``bitquota.models.load_calibration``; labelled for accuracy and for the
            metrics that need labels.
        request: Budgets, candidates, samples, loss, corrections; its ``measure`` is ignored.
        metrics: Names of measures, ``refine`` and ``mixquant_threshold``; by default all that can
            be measured here and declare at most ``affordable_passes``.
        context: Where measurements are kept, whom to tell, when to stop, and where to run.
        plans: Random and near-good plans for each budget that rank correlations stand on; at
            least 3, or 0 for none.
        affordable_passes: See ``metrics``; in passes over the calibration samples.
        cpu_clock: What ``cpu_seconds`` is read from.

    Raises:
        InvalidInput: An unknown metric; a metric asked for by name that this model or these
            samples do not allow; no budget.
        BudgetTooSmall: A budget is below the smallest plan; nothing was measured.
        Infeasible: Budgets conflict.
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so; the ledger keeps what was measured.

    Cost: the metrics' declared passes, and for each budget about one pass over the hold-out
    samples for every distinct plan.
    """
    if not request.budgets:
        msg = "at least one budget must be given, such as '3 bits' or '12 MiB'; got none"
        raise InvalidInput(msg)
    if request.kv_bits:
        msg = "metrics are compared on weights alone; got bits of the KV cache: leave kv_bits out"
        raise InvalidInput(msg, kv_bits=list(request.kv_bits))
    check_plans(plans)
    names = checked_names(metrics)
    if request.rounding == AUTO:
        # Dozens of plans are measured, to judge metrics: rounding all in order would cost more.
        request = replace(request, rounding=Rounder.NEAREST)
    setup = build_setup(model, calibration, request, context=context)

    # Matrices of all measures, and what each would choose.
    work = Comparing(
        setup=setup,
        budgets=tuple(setup.budgets(text) for text in request.budgets),
        explicit=metrics is not None,
        affordable=affordable_passes,
        clock=cpu_clock,
    )
    tasks, skipped = work.affordable_tasks(names)
    setup = work.setup = setup.on_course(lambda: course_of(work.phases(tasks, plans)))
    drafts = work.measure_all(tasks, skipped)
    work.choose(drafts)
    if REFINE in tasks:
        drafts += work.refined(drafts)
    drafts += [*work.baselines(), *work.mixes(drafts)]

    # Losses of the choices and of further plans, for rank correlations.
    ranked = [work.ranked_plans(k, drafts, plans) for k in range(len(work.budgets))]
    losses = [work.measured(k, drafts, ranked[k]) for k in range(len(work.budgets))]
    return Comparison(
        model_digest=setup.inventory.model_digest,
        budgets=work.budgets,
        full_precision=setup.measure_choice(None, stage="full precision").measured,
        loss=setup.loss.name,
        entries=tuple(_entry(setup, draft, ranked, losses) for draft in drafts),
        skipped=skipped,
        n_ranked=tuple(len(found) for found in ranked),
        provenance={
            "request": request.to_json(),
            "fit": setup.fit.to_json(),
            "holdout": setup.holdout.to_json(),
            "correcting": setup.correcting.to_json() if request.corrections else None,
            "plans": plans,
            "bitquota": bitquota.__version__,
        }
        | ({"identity": setup.identity_note} if setup.identity_note else {}),
    )


def _entry(
    setup: Setup,
    draft: Draft,
    ranked: Sequence[Sequence[Choice]],
    losses: Sequence[dict[Choice, ChoiceLoss]],
) -> Entry:
    # Budget by budget: the plan, and how the predictions rank.
    plans: list[Measured | None] = []
    predicted: list[float] = []
    measured: list[float] = []
    for k, choice in enumerate(draft.choices):
        matrix = draft.matrices[k]
        within: list[float] = []
        true = [losses[k][c].mean for c in ranked[k]]
        if matrix is not None:
            within = [matrix.predict(c) for c in ranked[k]]
            predicted += within
            measured += true
        if choice is None:
            plans.append(None)
            continue
        best = min((losses[k][c] for c in losses[k] if c not in ranked[k]), key=lambda c: c.mean)
        worse_by, worse_error = losses[k][choice].paired(best)
        candidates = {c.layer: c for c in setup.table.decode(choice)}
        plans.append(
            Measured(
                choice=choice,
                labels=tuple(candidates[la.name].label for la in setup.inventory.layers),
                size_bits=sum(c.size_bits for c in candidates.values()),
                predicted=None if matrix is None else matrix.predict(choice),
                loss=losses[k][choice].measured,
                worse_by=worse_by,
                worse_error=worse_error,
                rank_correlation=spearman(within, true) if within else None,
            )
        )

    # What a reader should know of the measure itself.
    flags: tuple[JsonObject, ...] = ()
    if draft.kind == "measure" and draft.matrices[0] is not None:
        flags = tuple(flag.to_json() for flag in find_flags(draft.matrices[0]))
    known = METRICS[draft.name].known_as if draft.name in METRICS else None
    return Entry(
        name=draft.name,
        known_as=known or _KNOWN_AS.get(draft.name, ""),
        kind=draft.kind,
        cost=draft.cost,
        passes=draft.passes,
        cpu_seconds=draft.cpu_seconds,
        flags=flags,
        rank_correlation=spearman(predicted, measured) if predicted else None,
        plans=tuple(plans),
    )
