"""What a comparison of metrics measures: matrices, refinements, and the plans of all.

Design: docs/design/evaluation.md
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.search.agreement import near_choices, random_choices
from bitquota.search.baselines import baseline_choices, size_only, uniform_mixes
from bitquota.search.phases import Phase, choices_phase, search_phase, widest_choice
from bitquota.search.problems import choice_of, limits_of, proposer, solved
from bitquota.search.refine import refine
from bitquota.search.threshold import threshold_within
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.metrics import METRICS, Metric
from bitquota.sensitivity.registry import measures
from bitquota.solver import build_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.sensitivity.runners.base import Runner

AFFORDABLE_PASSES = 500.0
"""A measure that nobody asked for by name is left out above this declared cost."""

MIXES = 3
"""Uniform mixes that are measured for each budget, at most."""

PLANS = 12
"""Random and near-good plans measured for each budget, half of each."""

REFINE, THRESHOLD, SIZE_ONLY = "refine", "mixquant_threshold", "size only"

_SOURCES = {REFINE: "gram", THRESHOLD: "relative_mse"}
"""Measures that names stand on which are none."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """An entry that is being made."""

    name: str
    kind: str
    cost: float | None = None
    passes: float = 0.0
    cpu_seconds: float = 0.0
    matrices: list[SensitivityMatrix | None]
    """What predicts under each budget."""
    choices: list[Choice | None]


@dataclass(slots=True, kw_only=True)
class Comparing:
    """A comparison under way.

    Attributes:
        setup: Model, samples, candidates.
        budgets: Of each plan.
        explicit: Whether the metrics were named, so that one that cannot run is an error.
        affordable: Passes above which a metric that was not named is left out.
        clock: What ``cpu_seconds`` is read from.
        runner: Executes the model on the samples that metrics see.
    """

    setup: Setup
    budgets: tuple[tuple[Budget, ...], ...]
    explicit: bool
    affordable: float
    clock: Callable[[], float] = time.process_time
    runner: Runner = field(init=False)

    def __post_init__(self) -> None:
        """Make the runner."""
        self.runner = self.setup.runner()

    def affordable_tasks(self, names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
        """Return what each of ``names`` costs in passes, and why others are left out.

        Raises:
            InvalidInput: One that was asked for by name cannot be measured here.
        """
        tasks: dict[str, float] = {}
        skipped: dict[str, str] = {}
        for name in names:
            measure = measures()[_SOURCES.get(name, name)]
            try:
                if isinstance(measure, Metric):
                    measure.check(self.runner, self.setup.loss)
                cost = measure.cost(self.runner, self.setup.table)
            except InvalidInput as err:
                if self.explicit:
                    raise
                skipped[name] = err.message
                continue
            # A refinement takes its matrix and several linearisations.
            asked = 4 * cost if name == REFINE else cost
            if self.explicit or asked <= self.affordable:
                tasks[name] = cost
            else:
                skipped[name] = (
                    f"it would take about {asked:,.0f} passes, more than "
                    f"{self.affordable:,.0f}; ask for it by name to have it"
                )
        return tasks, skipped

    def phases(self, tasks: Mapping[str, float], plans: int) -> list[Phase]:
        """Return the phases of the comparison: every metric, refinements, all plans measured."""
        setup, n = self.setup, len(self.budgets)
        fit = len(setup.fit)
        found = [
            Phase(stage=name, samples=cost * fit, most=cost * fit)
            for name, cost in tasks.items()
            if name != REFINE
        ]
        simple = len(baseline_choices(setup.table))
        if REFINE in tasks:
            cost = tasks[REFINE] * fit
            found.append(Phase(stage=f"{REFINE}, matrix", samples=cost, most=cost))
            for k, together in enumerate(self.budgets):
                point = widest_choice(setup, together)
                stage = f"{REFINE}, budget {k + 1} of {n}"
                n_starts = 1 + simple + len(_CHEAP_STARTS & tasks.keys())
                found.append(search_phase(setup, self.runner, stage, point, n_starts, on_fit=True))
        for k in range(n):
            stage = f"plans of budget {k + 1} of {n}"
            n_choices = len(tasks) + 1 + simple + MIXES + plans
            found.append(choices_phase(setup, stage, n_choices, full_precision=k == 0))
        return found

    def measure_all(self, tasks: Mapping[str, float], skipped: dict[str, str]) -> list[Draft]:
        """Measure every metric; what cannot be measured here is skipped with its reason."""
        setup, runner = self.setup, self.runner
        drafts: list[Draft] = []
        for name, cost in tasks.items():
            if name == REFINE:
                continue
            before, start = runner.passes.passes, self.clock()
            try:
                matrix = measures()[_SOURCES.get(name, name)].measure(
                    runner, setup.table, setup.loss, context=setup.context
                )
            except InvalidInput as err:
                if self.explicit:
                    raise
                skipped[name] = err.message
                continue
            finally:
                setup.context.next_phase()
            drafts.append(
                Draft(
                    name=name,
                    kind="rule" if name == THRESHOLD else "measure",
                    cost=cost,
                    passes=runner.passes.passes - before,
                    cpu_seconds=self.clock() - start,
                    matrices=[matrix] * len(self.budgets),
                    choices=[None] * len(self.budgets),
                )
            )
        return drafts

    def choose(self, drafts: Sequence[Draft]) -> None:
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

    def baselines(self) -> list[Draft]:
        """Return size-only, and the uniform plans that fit some budget."""
        table, n = self.setup.table, len(self.budgets)
        matrix = size_only(table)
        drafts = [Draft(name=SIZE_ONLY, kind="baseline", matrices=[matrix] * n, choices=[None] * n)]
        drafts[0].choices = [
            choice_of(solved(self.setup, build_problem(matrix, b))) for b in self.budgets
        ]
        limits = [limits_of(build_problem(matrix, b)) for b in self.budgets]
        for name, choice in baseline_choices(table).items():
            fitting = [choice if kept.allow(table, choice) else None for kept in limits]
            if any(c is not None for c in fitting):
                drafts.append(
                    Draft(name=name, kind="baseline", matrices=[None] * n, choices=fitting)
                )
        return drafts

    def mixes(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Return mixes of two uniform widths, as large as the largest plan of each budget.

        So a plan is not called better for a few bytes more than uniform; as ``allocate`` does.
        """
        table, n = self.setup.table, len(self.budgets)
        found: dict[str, list[Choice | None]] = {}
        for k, together in enumerate(self.budgets):
            limits = limits_of(build_problem(size_only(table), together))
            chosen = [c for d in drafts if d.kind != "baseline" and (c := d.choices[k])]
            sizes = [sum(c.size_bits for c in table.decode(choice)) for choice in chosen]
            for name, choice in uniform_mixes(table, max(sizes, default=0)).items():
                if limits.allow(table, choice):
                    found.setdefault(name, [None] * n)[k] = choice
        return [
            Draft(name=name, kind="baseline", matrices=[None] * n, choices=choices)
            for name, choices in found.items()
        ]

    def refined(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Refine the best starts on the fit samples, as ``allocate`` does.

        The hold-out samples stay unseen, so refinement is judged like everything else.
        """
        setup = self.setup
        runner = setup.runner()
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
            setup.context.next_phase()
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
        setup.context.next_phase()
        return [
            Draft(
                name=REFINE,
                kind="search",
                passes=runner.passes.passes,
                cpu_seconds=self.clock() - start,
                matrices=matrices,
                choices=choices,
            )
        ]

    def ranked_plans(self, k: int, drafts: Sequence[Draft], n: int) -> list[Choice]:
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
        self, k: int, drafts: Sequence[Draft], ranked: Sequence[Choice]
    ) -> dict[Choice, ChoiceLoss]:
        """Measure every distinct choice of budget ``k`` on the hold-out samples."""
        wanted = dict.fromkeys([c for d in drafts if (c := d.choices[k]) is not None])
        wanted |= dict.fromkeys(ranked)
        if k:
            self.setup.context.next_phase()
        return self.setup.measure_choices(
            wanted, stage=f"plans of budget {k + 1} of {len(self.budgets)}"
        )


_CHEAP_STARTS = frozenset({"gram", "diagonal", "weight_mse", "relative_mse", "empirical_fisher"})
"""Measures whose plans refinement starts from, besides baselines."""


def check_plans(n: int) -> None:
    """Raise ``InvalidInput`` unless rank correlations can stand on ``n`` plans."""
    if n < 0 or n in {1, 2}:
        msg = f"a rank correlation needs at least 3 plans for each budget, or 0 for none; got {n}"
        raise InvalidInput(msg, plans=n)


def checked_names(metrics: Sequence[str] | None) -> list[str]:
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
