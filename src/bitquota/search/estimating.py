"""Estimate a job before it is run: its passes, time and memory, and what it is about.

Passes follow from the schedules and phases of the job itself (``search.phases``); seconds from a
few timed passes over one chunk; memory from what this process has taken by then and from counted
bytes.

Design: docs/design/progress.md
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS, Rounding
from bitquota.estimate import BudgetEstimate, JobEstimate, Refusal, StageEstimate
from bitquota.measurement_setup import build_setup
from bitquota.progress import peak_bytes
from bitquota.quantizers.stacked import SAMPLED_ROWS
from bitquota.search.comparing import (
    AFFORDABLE_PASSES,
    PLANS,
    Comparing,
    check_plans,
    checked_names,
)
from bitquota.search.phases import Phase, measure_phase, plan_phases, widest_choice
from bitquota.search.portfolio import GRAM, leading_measure, measuring_runner
from bitquota.sensitivity.measures.gram import KEPT_DIFFERENCE_BYTES
from bitquota.sensitivity.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.request import PlanRequest
    from bitquota.sensitivity.base import Measure
    from bitquota.sensitivity.runners.base import Runner

TIMED = 3
"""Passes over a chunk that are timed, after one that warms up."""

TIMING_S = 2.0
"""Once so many seconds were timed, no further pass is."""

TIMED_WEIGHTS = 2**22
"""Weights that are quantized to see how long that takes: a large model's would take minutes."""


def estimate_plan(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    context: Context | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> JobEstimate:
    """Return what ``allocate`` would take; arguments and errors as there.

    Cost: looks at a few samples, and some passes over one chunk.
    """
    setup = build_setup(model, calibration, request, context=context, fit=False)
    budgets = [setup.budgets(text) for text in request.budgets]
    runner = measuring_runner(setup)
    _checked_measure(setup, runner)
    phases = plan_phases(setup, runner, budgets)
    return _estimate("plan", setup, runner, phases, clock)


def estimate_measure(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    context: Context | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> JobEstimate:
    """Return what ``measure_matrix`` would take; see ``estimate_plan``."""
    setup = build_setup(model, calibration, request, context=context, fit=False)
    runner = setup.runner()
    phases = [measure_phase(setup, runner, _checked_measure(setup, runner))]
    return _estimate("measure", setup, runner, phases, clock)


def estimate_compare(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    metrics: Sequence[str] | None = None,
    *,
    context: Context | None = None,
    plans: int = PLANS,
    affordable_passes: float = AFFORDABLE_PASSES,
    clock: Callable[[], float] = time.perf_counter,
) -> JobEstimate:
    """Return what ``compare`` would take; see ``estimate_plan``."""
    check_plans(plans)
    names = checked_names(metrics)
    setup = build_setup(model, calibration, request, context=context, fit=False)
    work = Comparing(
        setup=setup,
        budgets=tuple(setup.budgets(text) for text in request.budgets),
        explicit=metrics is not None,
        affordable=affordable_passes,
    )
    tasks, skipped = work.affordable_tasks(names)
    phases = work.phases(tasks, plans)
    return _estimate("compare", setup, work.runner, phases, clock, skipped)


def _checked_measure(setup: Setup, runner: Runner) -> Measure:
    measure = leading_measure(setup, runner)
    if isinstance(measure, Metric):
        measure.check(runner, setup.loss)
    return measure


def _estimate(
    job: str,
    setup: Setup,
    runner: Runner,
    phases: Sequence[Phase],
    clock: Callable[[], float],
    skipped: Mapping[str, str] | None = None,
) -> JobEstimate:
    grams = job == "compare" or leading_measure(setup, runner).name == GRAM
    timed = _timed(setup, runner, clock)
    n, table, inventory = len(setup.fit), setup.table, setup.inventory
    counts = [int(b - a) for a, b in zip(table.offsets, table.offsets[1:], strict=False)]
    stages = [
        StageEstimate(
            stage=phase.stage,
            passes=phase.samples / n,
            most_passes=phase.most / n,
            seconds=phase.samples * timed.sample_s,
        )
        for phase in phases
    ]
    if stages:
        # Every candidate is quantized once, the first time that it is run.
        first = replace(stages[0], seconds=stages[0].seconds + timed.quantizing_s)
        stages[0] = first
    refused = [Refusal(what=name, reason=why) for name, why in (skipped or {}).items()]
    refused += sorted(
        (
            Refusal(
                what=tensor.name, reason=tensor.reason or "no layer", size_bits=tensor.size_bits
            )
            for tensor in inventory.unquantized
        ),
        key=lambda refusal: -refusal.size_bits,
    )
    return JobEstimate(
        job=job,  # type: ignore[arg-type]  # one of ours
        model_digest=inventory.model_digest,
        engine=runner.engine,
        device=str(setup.fit.device or setup.fit.inputs[0].device),
        n_layers=len(inventory.layers),
        n_groups=len(table.groups),
        n_candidates=len(table.rows),
        n_pairs=(sum(counts) ** 2 - sum(c * c for c in counts)) // 2,
        samples=n,
        holdout_samples=0 if job == "measure" else len(setup.holdout),
        model_bits=inventory.full_precision_bits,
        quantizable_bits=inventory.full_precision_bits - inventory.unquantized_bits,
        budgets=_budgets(setup) if job != "measure" else (),
        stages=tuple(stages),
        seconds_per_pass=timed.sample_s * n,
        peak_bytes=peak_bytes() + _counted_bytes(setup, runner, grams=grams),
        refused=tuple(refused),
        outputs=setup.outputs,
    )


def _budgets(setup: Setup) -> tuple[BudgetEstimate, ...]:
    found = []
    for text in setup.request.budgets:
        chosen = setup.table.decode(widest_choice(setup, setup.budgets(text)))
        size = sum(c.size_bits for c in chosen) + setup.inventory.unquantized_bits
        found.append(BudgetEstimate(text=text, model_bits=size))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What was timed.

    Attributes:
        sample_s: Seconds of a forward pass of one sample in a chunk, its loss included.
        quantizing_s: Seconds of quantizing every candidate once.
    """

    sample_s: float
    quantizing_s: float


def _timed(setup: Setup, runner: Runner, clock: Callable[[], float]) -> _Timed:
    """Time passes of a quantized model, and what quantizing takes.

    Which layers are quantized does not matter to a pass; as many are as are quantized quickly.
    """
    # A narrow candidate of each layer, and how long it takes to make.
    change: dict[str, Candidate] = {}
    weights = 0
    start = clock()
    for group in range(len(setup.table.groups)):
        for candidate in setup.table.rows[setup.table.offsets[group]].candidates:
            if candidate.cached:
                continue
            plain = replace(
                candidate,
                activation_bits=None,
                scheme=replace(candidate.scheme, rounding=Rounding.NEAREST),
            )
            n = setup.inventory.layer(candidate.layer).n_weights
            if plain.weight_bits != FULL_PRECISION_BITS and weights + n <= TIMED_WEIGHTS:
                setup.fitted.weights(plain)
                change[candidate.layer] = plain
                weights += n
    took = clock() - start
    if setup.stacked is not None:
        # No weight of a chain is rounded before its inputs have been looked at.
        change = {}
    everything = sum(
        _rounded(setup, c.layer)
        for row in setup.table.rows
        for c in row.candidates
        if c.weight_bits != FULL_PRECISION_BITS and not c.cached
    )

    # A pass over a chunk: one to warm up, then the median of a few.
    reference, labels = runner.reference(0), runner.labels(0)
    times: list[float] = []
    for k in range(TIMED + 1):
        start = clock()
        output = runner.start(0, change).output
        setup.loss.per_sample(output, reference, labels).sum().item()
        times.append(clock() - start)
        setup.context.report("estimate", k + 1, TIMED + 1)
        setup.context.check("estimate")
        if sum(times) > TIMING_S:
            break
    passes = statistics.median(times[1:] or times)
    return _Timed(
        sample_s=passes / len(runner.chunks[0]),
        quantizing_s=took * everything / weights if weights else 0.0,
    )


def _rounded(setup: Setup, name: str) -> int:
    """Return how many weights of a layer are rounded to tell what a candidate loses."""
    layer = setup.inventory.layer(name)
    rows = layer.rows if setup.stacked is None else min(layer.rows, SAMPLED_ROWS)
    return rows * layer.columns


def _counted_bytes(setup: Setup, runner: Runner, *, grams: bool) -> int:
    """Return the bytes that a job takes beyond what timing a pass took."""
    if setup.stacked is not None:
        # Activations, candidates and batches keep to the limit.
        return setup.context.memory_bytes
    n_chunk = len(runner.chunks[0])
    elements = runner.reference(0).numel() // n_chunk
    rows = len(setup.table.rows)
    layers = setup.inventory.layers
    weights = 4 * sum(layer.n_weights for layer in layers)
    # Every candidate's weights are kept, and a plan is measured on a copy of the model.
    kept = sum(
        4 * setup.inventory.layer(c.layer).n_weights
        for row in setup.table.rows
        for c in row.candidates
        if c.weight_bits != FULL_PRECISION_BITS and not c.cached
    )
    # Outputs of all rows on a chunk, beyond the limit in a file; then what is computed of their
    # differences, a few samples at a time.
    limit, sample = setup.context.memory_bytes // 4, 32 * rows * elements
    outputs = min(limit, 4 * rows * n_chunk * elements)
    outputs += min(n_chunk * sample, max(limit, sample))
    # Differences on all samples, where they are kept, and while they are joined.
    differences = 4 * (rows + 1) * len(setup.fit) * elements
    if differences > KEPT_DIFFERENCE_BYTES:
        differences = 0
    cross = 6 * 8 * rows * rows
    if not grams:
        outputs = differences = 0
    return kept + weights + outputs + 3 * differences + cross
