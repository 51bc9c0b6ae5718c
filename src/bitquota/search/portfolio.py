"""The portfolio: several matrices whose exact solutions are proposed, each cheap for what it sees.

No score ranks plans best everywhere, so nobody has to believe one: every matrix here is solved
within the budgets, and measurements choose among the solutions (``race.py``). A proposal that this
model or these samples cannot give is skipped, with its reason.

Design: docs/design/search.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bitquota.corrections import SAMPLES_REPAIR
from bitquota.errors import InvalidInput
from bitquota.search.baselines import size_only, weight_mse
from bitquota.search.projection import project
from bitquota.search.shares import scaled_by_shares, shared_plan
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.metrics import METRICS, Metric
from bitquota.sensitivity.metrics.stack_shares import SHARES
from bitquota.sensitivity.registry import measure_by_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.sensitivity.base import Measure
    from bitquota.sensitivity.measures.gram import OutputDifferences
    from bitquota.sensitivity.runners.base import Runner

GRAM, GRAM_WEIGHTED, WEIGHT_MSE = "gram", "gram_weighted", "weight_mse"

CHEAP = (GRAM_WEIGHTED,)
"""Metrics that always propose; in order of trust."""

FURTHER = ("output_fisher",)
"""Metrics that propose besides, unless the effort is quick."""

QUICK_SAMPLES = 256
"""Samples at most that scores and the race are measured on if the effort is quick.

A score averages over positions, too, and the race only has to tell bad proposals from good ones.
"""

MEASURES_OF_THE_LOSS = frozenset({GRAM, "pairs", "diagonal"})
"""Measures whose diagonal is the measured loss of single rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Portfolio:
    """Matrices around full precision, and what they stand for.

    Attributes:
        matrix: The one that the plan's proof and predictions are about.
        differences: Output differences around full precision, if they were measured and are small.
        proposals: Further matrices whose solutions are proposed, by name, in order of trust.
        scores: Simpler matrices whose solutions are also the baselines of the plan, by name.
        skipped: Proposals that this model or its samples cannot give, and why.
        scaled: Whether the matrix knows what rounding makes up for (``shares.py``).
    """

    matrix: SensitivityMatrix
    differences: OutputDifferences | None
    proposals: dict[str, SensitivityMatrix]
    scores: dict[str, SensitivityMatrix]
    skipped: dict[str, str] = field(default_factory=dict)
    scaled: bool = False


NORMAL_PASSES = 96.0
"""Passes that measuring every candidate may take if the effort is normal; else on fewer samples."""


def by_scores(setup: Setup) -> bool:
    """Whether cheap scores propose, measured swaps refine, and nothing is linearised.

    So for language models, whose passes are dear, and, unless the effort is thorough, where
    corrections repair what layers lose together: there cheap scores propose as good plans as
    output differences do, which see the rest of it only as noise.
    """
    repaired = SAMPLES_REPAIR & set(setup.request.corrections)
    return setup.stacked is not None or (setup.request.effort == "normal" and bool(repaired))


def measure_of(setup: Setup) -> Measure:
    """Return the measure that a request means, where the model allows it."""
    request = setup.request
    cheap = request.effort == "quick" or by_scores(setup)
    if setup.inventory.caches and setup.stacked is None:
        # Only a walk from part to part scores caches; here they are measured.
        cheap = False
    if request.measure == "auto":
        return measure_by_name(GRAM_WEIGHTED if cheap else GRAM)
    return measure_by_name(request.measure)


def measuring_runner(setup: Setup) -> Runner:
    """Return the runner that matrices are measured on: with less effort on fewer samples."""
    effort = setup.request.effort
    if setup.stacked is not None:
        return setup.runner()
    if effort == "quick":
        return setup.runner(setup.fit.first(min(QUICK_SAMPLES, len(setup.fit))))
    runner = setup.runner()
    if effort == "normal" and setup.request.measure == "auto":
        # Whole chunks from the first on: what is kept of them is that of a larger measurement.
        passes = measure_of(setup).cost(runner, setup.table)
        n_chunks = int(NORMAL_PASSES / max(passes, 1.0) * len(runner.chunks))
        if n_chunks < len(runner.chunks):
            return setup.runner(setup.fit.first(runner.chunks[max(1, n_chunks) - 1].stop))
    return runner


def raced_samples(setup: Setup) -> CalibrationSet:
    """Return the samples that proposals are compared on first."""
    quick = setup.request.effort == "quick" and setup.stacked is None
    return setup.holdout.first(min(QUICK_SAMPLES, len(setup.holdout))) if quick else setup.holdout


def leading_measure(setup: Setup, runner: Runner) -> Measure:
    """Return the measure of the matrix that the plan's proof is about.

    Where ``auto`` means a metric that this model does not allow, it is one of the weights alone.
    """
    measure = measure_of(setup)
    if setup.request.measure == "auto" and _refusal(setup, runner, measure):
        return _without_scores(setup)
    return measure


def _without_scores(setup: Setup) -> Measure:
    """Return the measure for a model that shows no gradients of its layers' outputs."""
    # What weights lose in squares cannot be set against what caches lose.
    return measure_by_name("diagonal" if setup.inventory.caches else WEIGHT_MSE)


def proposing_metrics(setup: Setup, runner: Runner) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return the metrics that propose besides the leading measure, and why others do not."""
    quick = setup.request.effort == "quick" or setup.stacked is not None
    names: tuple[str, ...] = CHEAP if quick else (*CHEAP, *FURTHER)
    if setup.inventory.caches:
        # They see weights alone.
        names = ()
    leading = leading_measure(setup, runner).name
    found: dict[str, Metric] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name == leading:
            continue
        if reason := _refusal(setup, runner, METRICS[name]):
            skipped[name] = reason
        else:
            found[name] = METRICS[name]
    return found, skipped


def _refusal(setup: Setup, runner: Runner, measure: Measure) -> str:
    """Return why a metric cannot score this model on these samples, or nothing."""
    if isinstance(measure, Metric):
        try:
            measure.check(runner, setup.loss)
        except InvalidInput as err:
            return err.message
    return ""


def gather_portfolio(
    setup: Setup,
    runner: Runner,
    holdout: Runner | None = None,
    budgets: Sequence[Sequence[Budget]] = (),
) -> Portfolio:
    """Measure every matrix that the effort of the request allows.

    Args:
        setup: Model, samples, candidates.
        runner: On the samples that are measured on.
        holdout: On samples that decide; without it nothing is scaled to shares.
        budgets: Of each plan.

    Raises:
        InvalidInput: The measure that the request names cannot be had; nothing else is an error.
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so.

    Cost: that of the leading measure, and a few passes and one run of its own layer per candidate
    for each further metric.
    """
    measured, differences = measure_leading(setup, runner)
    uniform = None if holdout is None else shared_plan(setup, budgets)
    scaled, skipped = False, {}
    if uniform is not None and holdout is not None:
        setup.context.next_phase()
        try:
            measured, scaled = scaled_by_shares(setup, measured, holdout, *uniform), True
        except InvalidInput as err:
            skipped[SHARES] = err.message
    matrix = measured.robust(setup.request.robust)
    metrics, refused = proposing_metrics(setup, runner)
    skipped |= refused
    proposals: dict[str, SensitivityMatrix] = {}
    for name, metric in metrics.items():
        setup.context.next_phase()
        try:
            proposals[name] = metric.measure(runner, setup.table, setup.loss, context=setup.context)
        except InvalidInput as err:
            skipped[name] = err.message
    if matrix.cross is not None:
        # The exact optimum of a noisy matrix stacks its errors; that of the tamer projection is
        # often better in truth.
        proposals["projected"] = project(measured)
    scores = {"size only": size_only(setup.table)}
    if not setup.inventory.caches:
        scores["weight MSE"] = _weight_mse(setup)
    alone = replace(measured, cross=None, cross_error=None)
    named = matrix.provenance["measure"]
    if named in MEASURES_OF_THE_LOSS:
        scores[f"one-layer {setup.loss.name}"] = alone
    elif setup.request.measure != "auto":
        scores[named] = alone
    return Portfolio(
        matrix=matrix,
        differences=differences,
        proposals=proposals,
        scores=scores,
        skipped=skipped,
        scaled=scaled,
    )


def _weight_mse(setup: Setup) -> SensitivityMatrix:
    """Return the squared changes of the weights; a stack has looked at its candidates before."""
    squares = None
    if setup.stacked is not None:
        setup.stacked.prepare(setup.context)
        squares = setup.stacked.squares
    return weight_mse(
        setup.module, setup.inventory, setup.table, weights=setup.fitted.weights, squares=squares
    )


def measure_leading(
    setup: Setup, runner: Runner
) -> tuple[SensitivityMatrix, OutputDifferences | None]:
    """Measure the matrix that the plan's proof is about; errors as ``gather_portfolio``."""
    given = runner, setup.table, setup.loss
    measure = leading_measure(setup, runner)
    if measure.name == GRAM:
        return measure_differences(*given, context=setup.context)
    try:
        return measure.measure(*given, context=setup.context), None
    except InvalidInput:
        if setup.request.measure != "auto":
            raise
        return _without_scores(setup).measure(*given, context=setup.context), None


__all__ = [
    "GRAM",
    "Portfolio",
    "by_scores",
    "gather_portfolio",
    "leading_measure",
    "measure_leading",
    "measure_of",
    "measuring_runner",
    "proposing_metrics",
    "raced_samples",
]
