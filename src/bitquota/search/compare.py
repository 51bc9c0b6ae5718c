"""Compare metrics on the user's own model: every one's plan, measured, at every budget.

Design: docs/design/evaluation.md
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import bitquota
from bitquota.errors import InvalidInput
from bitquota.measurement_setup import build_setup
from bitquota.report.comparison import Comparison, Entry, Measured
from bitquota.search.agreement import near_choices, random_choices, spearman
from bitquota.search.baselines import baseline_choices, size_only
from bitquota.search.problems import choice_of, limits_of, proposer, solved
from bitquota.search.refine import refine
from bitquota.search.threshold import threshold_within
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.metrics import METRICS, find_flags
from bitquota.sensitivity.registry import measures
from bitquota.solver import build_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.canonical import JsonObject
    from bitquota.context import Context
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.request import PlanRequest
    from bitquota.search.neighborhood import Choice

AFFORDABLE_PASSES = 500.0
"""A measure that nobody asked for by name is left out above this declared cost."""

PLANS = 12
"""Random and near-good plans measured for each budget, half of each."""

REFINE, THRESHOLD, SIZE_ONLY = "refine", "mixquant_threshold", "size only"

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
    layers first, and the uniform plans that fit. All are measured on the hold-out samples, which
    no metric saw, with the request's corrections.

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
    if plans < 0 or plans in {1, 2}:
        msg = (
            f"a rank correlation needs at least 3 plans for each budget, or 0 for none; got {plans}"
        )
        raise InvalidInput(msg, plans=plans)
    names = _checked_names(metrics)
    setup = build_setup(
        model,
        calibration,
        request,
        context=context,
    )

    # Matrices of all measures, and what each would choose.
    work = _Comparing(
        setup=setup,
        budgets=tuple(setup.budgets(text) for text in request.budgets),
        explicit=metrics is not None,
        affordable=affordable_passes,
        clock=cpu_clock,
    )
    drafts, skipped = work.measure_all(names)
    work.choose(drafts)
    if REFINE in names:
        drafts += work.refined(drafts, skipped)
    drafts += work.baselines()

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


@dataclass(slots=True, kw_only=True)
class _Draft:
    """An entry that is being made."""

    name: str
    kind: str
    cost: float | None = None
    passes: float = 0.0
    cpu_seconds: float = 0.0
    matrices: list[SensitivityMatrix | None]
    """What predicts under each budget."""
    choices: list[Choice | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparing:
    setup: Setup
    budgets: tuple[tuple[Budget, ...], ...]
    explicit: bool
    affordable: float
    clock: Callable[[], float]

    def measure_all(self, names: Sequence[str]) -> tuple[list[_Draft], dict[str, str]]:
        """Measure every metric; what cannot be measured here is skipped with its reason."""
        setup, offered = self.setup, measures()
        runner = setup.runner()
        skipped: dict[str, str] = {}
        drafts: list[_Draft] = []
        for name in names:
            source = {REFINE: None, THRESHOLD: "relative_mse"}.get(name, name)
            if source is None:
                continue
            measure = offered[source]
            try:
                cost = measure.cost(runner, setup.table)
                if self._too_expensive(name, cost, skipped):
                    continue
                before, start = runner.passes.passes, self.clock()
                matrix = measure.measure(
                    runner,
                    setup.table,
                    setup.loss,
                    context=setup.context,
                )
            except InvalidInput as err:
                if self.explicit:
                    raise
                skipped[name] = err.message
                continue
            drafts.append(
                _Draft(
                    name=name,
                    kind="rule" if name == THRESHOLD else "measure",
                    cost=cost,
                    passes=runner.passes.passes - before,
                    cpu_seconds=self.clock() - start,
                    matrices=[matrix] * len(self.budgets),
                    choices=[None] * len(self.budgets),
                )
            )
        return drafts, skipped

    def _too_expensive(self, name: str, cost: float, skipped: dict[str, str]) -> bool:
        if self.explicit or cost <= self.affordable:
            return False
        skipped[name] = (
            f"it would take about {cost:,.0f} passes, more than {self.affordable:,.0f}; ask for it "
            "by name to have it"
        )
        return True

    def choose(self, drafts: Sequence[_Draft]) -> None:
        """Give every draft its choice under every budget."""
        for draft in drafts:
            start = self.clock()
            for k in range(len(self.budgets)):
                matrix = draft.matrices[k]
                assert matrix is not None  # noqa: S101  # a measure's draft has one
                problem = build_problem(matrix, self.budgets[k])
                if draft.kind == "rule":
                    found = threshold_within(matrix, limits_of(problem))
                    draft.choices[k] = None if found is None else found[0]
                else:
                    draft.choices[k] = choice_of(solved(self.setup, problem))
            draft.cpu_seconds += self.clock() - start

    def baselines(self) -> list[_Draft]:
        """Return size-only and the uniform plans that fit some budget."""
        table, n = self.setup.table, len(self.budgets)
        matrix = size_only(table)
        drafts = [
            _Draft(name=SIZE_ONLY, kind="baseline", matrices=[matrix] * n, choices=[None] * n)
        ]
        drafts[0].choices = [
            choice_of(solved(self.setup, build_problem(matrix, b))) for b in self.budgets
        ]
        limits = [limits_of(build_problem(matrix, b)) for b in self.budgets]
        for name, choice in baseline_choices(table).items():
            fitting = [choice if kept.allow(table, choice) else None for kept in limits]
            if any(c is not None for c in fitting):
                drafts.append(
                    _Draft(name=name, kind="baseline", matrices=[None] * n, choices=fitting)
                )
        return drafts

    def refined(self, drafts: Sequence[_Draft], skipped: dict[str, str]) -> list[_Draft]:
        """Refine the best starts on the fit samples, as ``allocate`` does.

        The hold-out samples stay unseen, so refinement is judged like everything else.
        """
        setup = self.setup
        runner = setup.runner()
        cost = measures()["gram"].cost(runner, setup.table)
        if self._too_expensive(REFINE, 4 * cost, skipped):
            return []
        start = self.clock()

        # One measurement serves all budgets.
        first = measure_differences(
            runner,
            setup.table,
            setup.loss,
            context=setup.context,
        )

        # Budget by budget: refine from the starts that cost nothing.
        matrices: list[SensitivityMatrix | None] = []
        choices: list[Choice | None] = []
        simple = baseline_choices(setup.table)
        for k, together in enumerate(self.budgets):
            problem = build_problem(size_only(setup.table), together)
            starts = {SIZE_ONLY: choice_of(solved(self.setup, problem)), **simple}
            starts |= {d.name: c for d in drafts if d.name in _CHEAP_STARTS and (c := d.choices[k])}
            refinement = refine(
                runner,
                setup.table,
                setup.loss,
                limits=limits_of(problem),
                solve=proposer(setup, problem),
                starts=starts,
                first=first,
                context=setup.context,
            )
            matrices.append(first[0])
            choices.append(refinement.choice)
        return [
            _Draft(
                name=REFINE,
                kind="search",
                passes=runner.passes.passes,
                cpu_seconds=self.clock() - start,
                matrices=matrices,
                choices=choices,
            )
        ]

    def ranked_plans(self, k: int, drafts: Sequence[_Draft], n: int) -> list[Choice]:
        """Return random and near-good plans within budget ``k``; none of them is a draft's."""
        if not n:
            return []
        table, seed = self.setup.table, self.setup.request.seed
        limits = limits_of(build_problem(size_only(table), self.budgets[k]))
        good = list(dict.fromkeys(c for d in drafts if (c := d.choices[k]) is not None))
        found = random_choices(table, limits, n - n // 2, seed + k)
        near = near_choices(table, limits, good, n // 2, seed + k)
        taken = set(good)
        return [c for c in dict.fromkeys((*found, *near)) if c not in taken]

    def measured(
        self, k: int, drafts: Sequence[_Draft], ranked: Sequence[Choice]
    ) -> dict[Choice, ChoiceLoss]:
        """Measure every distinct choice of budget ``k`` on the hold-out samples."""
        wanted = dict.fromkeys([c for d in drafts if (c := d.choices[k]) is not None])
        wanted |= dict.fromkeys(ranked)
        stage = f"plans of budget {k + 1} of {len(self.budgets)}"
        return {
            choice: self.setup.measure_choice(choice, stage=f"{stage}, {done + 1}/{len(wanted)}")
            for done, choice in enumerate(wanted)
        }


_CHEAP_STARTS = frozenset({"gram", "diagonal", "weight_mse", "relative_mse", "empirical_fisher"})
"""Measures whose plans refinement starts from, besides baselines."""


def _checked_names(metrics: Sequence[str] | None) -> list[str]:
    """Return names in the order in which they are measured.

    Raises:
        InvalidInput: Unknown, twice, or none.
    """
    # One-layer losses come first: the Gram finds them in the ledger.
    first = [REFINE, "diagonal"]
    known = [*first, *(n for n in measures() if n not in {*METRICS, *first}), *METRICS]
    known.insert(known.index("relative_mse") + 1, THRESHOLD)
    if metrics is None:
        return known
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics or len(set(metrics)) < len(metrics):
        got = ", ".join(metrics) or "none"
        msg = f"metrics must be some of {', '.join(known)}, each once; got {got}"
        raise InvalidInput(msg, metrics=list(metrics))
    return [name for name in known if name in metrics]


def _entry(
    setup: Setup,
    draft: _Draft,
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
