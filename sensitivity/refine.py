"""Refinement: measure the plan, measure again around it, solve again, until nothing improves.

A quadratic around full precision does not hold for plans with many 2-bit layers. So the plan is
found by steps, each from a plan whose true loss was measured: candidates are proposed by cheap
predictions around it (a Gram matrix solved within a trust region, sums of output differences),
their true loss is measured, and the best is accepted only if it is better by more than the
standard error of the paired difference. The predictions propose; only measurements decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitquota.errors import Infeasible, InvalidInput
from bitquota.sensitivity.choices import measure_choices
from bitquota.sensitivity.gram import measure_differences
from bitquota.sensitivity.measure import standard_error
from bitquota.sensitivity.moves import Choice, Limits, distance, neighbours
from bitquota.sensitivity.pairs import DiagonalMeasure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates import CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.matrix import SensitivityMatrix
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.sensitivity.gram import OutputDifferences
    from bitquota.sensitivity.ledger import Ledger
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runner import Runner


class Solve(Protocol):
    """What refinement needs of a solver."""

    def __call__(self, matrix: SensitivityMatrix, limits: Limits) -> Choice | None:
        """Return the best choice for ``matrix`` within ``limits``, or ``None`` if there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """How much work refinement may do.

    Attributes:
        iterations: Linearisations at most (each costs one run per row).
        radii: Trust regions, as shares of the groups that may change in one step.
        proposals: Choices measured per linearisation.
        swap_rounds: Rounds of measured swaps, at most, each time linearisation is stuck.
        patience: Rounds of swaps in a row that may fail before the search ends.
        swaps: Swaps measured in each round.
        accept_errors: A step must improve by this many paired standard errors.
        max_passes: No linearisation or round of swaps is begun that would lead beyond this many
            forward-equivalents (what the ledger holds costs nothing); ``None`` for no limit.
    """

    iterations: int = 3
    radii: tuple[float, ...] = (1.0, 0.4, 0.2)
    proposals: int = 6
    swap_rounds: int = 6
    patience: int = 2
    swaps: int = 8
    accept_errors: float = 1.0
    max_passes: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = self.iterations, self.swap_rounds, self.proposals - 1, self.swaps - 1
        if min(*counts, self.patience - 1) < 0:
            msg = f"refinement settings must be positive; got {self}"
            raise InvalidInput(msg)
        if not self.radii or not all(0 < r <= 1 for r in self.radii):
            msg = f"trust radii must be shares between 0 and 1; got {self.radii}"
            raise InvalidInput(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One accepted or rejected step.

    Attributes:
        kind: ``start``, ``linearised`` or ``swap``.
        origin: Where the best proposal came from.
        choice: The best proposal.
        loss: Its measured mean loss increase on the deciding samples.
        gain: By how much it is better than the choice before it (paired mean).
        gain_error: Standard error of ``gain``.
        accepted: Whether it became the new choice.
        passes: Forward-equivalents since the refinement began.
    """

    kind: str
    origin: str
    choice: Choice
    loss: float
    gain: float
    gain_error: float
    accepted: bool
    passes: float

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "kind": self.kind,
            "origin": self.origin,
            "choice": list(self.choice),
            "loss": self.loss,
            "gain": self.gain,
            "gain_error": self.gain_error,
            "accepted": self.accepted,
            "passes": self.passes,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """The result of ``refine``.

    Attributes:
        choice: The best measured choice.
        per_sample: f64[N], its loss increase on the deciding samples.
        matrix: The last matrix, around ``matrix.base_point``.
        steps: What happened.
        measured: Mean loss increase of every choice that was measured, in order.
    """

    choice: Choice
    per_sample: NDArray[np.float64]
    matrix: SensitivityMatrix
    steps: tuple[Step, ...]
    measured: dict[Choice, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean measured loss increase."""
        return float(self.per_sample.mean())


@dataclass(slots=True, kw_only=True)
class _Search:
    """The state of one refinement."""

    runner: Runner
    judge: Runner
    table: CandidateTable
    loss: Loss
    limits: Limits
    solve: Solve
    settings: RefineSettings
    ledger: Ledger | None
    on_progress: OnProgress | None
    cancelled: IsCancelled | None
    losses: dict[Choice, NDArray[np.float64]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    passes_before: float = 0.0

    def measure(self, choices: Sequence[Choice], centre: Choice | None, stage: str) -> None:
        """Measure the true loss of those ``choices`` that are new."""
        new = [c for c in dict.fromkeys(choices) if c not in self.losses]
        if not new:
            return
        values = measure_choices(
            self.judge,
            self.table,
            self.loss,
            new,
            centre=centre,
            ledger=self.ledger,
            on_progress=self.on_progress,
            cancelled=self.cancelled,
            stage=stage,
        )
        self.losses.update(zip(new, values, strict=True))

    @property
    def passes(self) -> float:
        """Forward-equivalents spent so far on both sets of samples."""
        own = self.runner.passes.passes
        return own if self.judge is self.runner else own + self.judge.passes.passes

    def affords(self, passes: float) -> bool:
        """Whether that many more passes stay within the limit."""
        limit = self.settings.max_passes
        return limit is None or self.passes - self.passes_before + passes <= limit

    def mean(self, choice: Choice) -> float:
        """Return the measured mean loss increase."""
        return float(self.losses[choice].mean())

    def step(self, kind: str, current: Choice, proposals: Mapping[Choice, str]) -> Choice:
        """Accept the best measured proposal if it is clearly better than ``current``."""
        best = min(proposals, key=lambda c: (self.mean(c), c))
        difference = self.losses[current] - self.losses[best]
        gain, error = float(difference.mean()), float(standard_error(difference))
        accepted = gain > 0 and gain > self.settings.accept_errors * error
        self.steps.append(
            Step(
                kind=kind,
                origin=proposals[best],
                choice=best,
                loss=self.mean(best),
                gain=gain,
                gain_error=error,
                accepted=accepted,
                passes=self.passes - self.passes_before,
            )
        )
        return best if accepted else current

    def linearise(
        self, point: Choice | None, stage: str
    ) -> tuple[SensitivityMatrix, OutputDifferences | None]:
        """Measure singles and Gram terms around ``point``."""
        return measure_differences(
            self.runner,
            self.table,
            self.loss,
            base_point=point,
            ledger=self.ledger,
            on_progress=self.on_progress,
            cancelled=self.cancelled,
            stage=stage,
        )


def refine(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    limits: Limits,
    solve: Solve,
    starts: Mapping[str, Choice],
    judge: Runner | None = None,
    first: tuple[SensitivityMatrix, OutputDifferences | None] | None = None,
    settings: RefineSettings | None = None,
    ledger: Ledger | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
) -> Refinement:
    """Improve the best of ``starts`` step by step, on measured loss; a heuristic.

    Args:
        runner: Executes the model on the samples that predictions are fitted to.
        table: What may become of each group.
        loss: What to minimise.
        limits: Budgets.
        solve: The solver.
        starts: Choices to begin with, by name; those beyond the limits are ignored.
        judge: Executes the model on the samples that decide (a hold-out part); by default those
            of ``runner``.
        first: Matrix and differences around full precision, if they are measured already.
        settings: How much work.
        ledger: Where measurements are kept.
        on_progress: Called after each unit of work.
        cancelled: Asked between units of work.

    Raises:
        Infeasible: No start keeps the limits.

    Cost: one linearisation (``n + 1`` runs behind one group) for each iteration, and about one
    pass for each choice that is measured.
    """
    settings = settings or RefineSettings()
    search = _Search(
        runner=runner,
        judge=judge or runner,
        table=table,
        loss=loss,
        limits=limits,
        solve=solve,
        settings=settings,
        ledger=ledger,
        on_progress=on_progress,
        cancelled=cancelled,
    )
    search.passes_before = search.passes
    cost_of_linearisation = DiagonalMeasure().cost(runner, table)
    matrix, differences = first or search.linearise(None, "linearisation 0")
    proposals = {c: name for name, c in starts.items() if limits.allow(table, c)}
    for name, candidate in (
        ("gram", solve(matrix, limits)),
        ("diagonal", _diagonal(search, matrix)),
    ):
        if candidate is not None:
            proposals.setdefault(candidate, name)
    if differences is not None and proposals:
        found = predicted_descent(differences, limits, _best_predicted(differences, proposals))
        proposals.setdefault(found[0], "sum of differences")
    if not proposals:
        msg = "refinement needs a start within the limits; none of the given ones is"
        raise Infeasible(msg)
    search.measure(list(proposals), None, "starts")
    current = min(proposals, key=lambda c: (search.mean(c), c))
    search.step("start", current, {current: proposals[current]})
    left = settings.iterations
    while True:
        before = current
        if left and search.affords(cost_of_linearisation):
            left -= 1
            number = settings.iterations - left
            matrix, differences = search.linearise(current, f"linearisation {number}")
            offered = _proposals(search, current, matrix, differences)
            if offered:
                search.measure(list(offered), current, f"proposals {number}")
                current = search.step("linearised", current, offered)
        if current == before:
            current = _swap(search, current, matrix, differences)
        if current == before:
            break
    return Refinement(
        choice=current,
        per_sample=search.losses[current],
        matrix=matrix,
        steps=tuple(search.steps),
        measured={c: float(v.mean()) for c, v in search.losses.items()},
    )


def _proposals(
    search: _Search,
    current: Choice,
    matrix: SensitivityMatrix,
    differences: OutputDifferences | None,
) -> dict[Choice, str]:
    """Return what the predictions around ``current`` offer, the best predicted ones."""
    offered: dict[Choice, str] = {}
    for share in search.settings.radii:
        radius = max(1, round(share * len(current)))
        inside = search.limits.within(search.table, current, radius)
        candidate = search.solve(matrix, inside)
        if candidate is not None:
            offered.setdefault(candidate, f"gram within {radius}")
        if differences is not None:
            (end,) = predicted_descent(differences, inside, current)
            offered.setdefault(end, f"sum of differences within {radius}")
    offered = {choice: origin for choice, origin in offered.items() if choice != current}
    order = _ranked(list(offered), current, matrix, differences)
    return {choice: offered[choice] for choice in order[: search.settings.proposals]}


def _swap(
    search: _Search,
    current: Choice,
    matrix: SensitivityMatrix,
    differences: OutputDifferences | None,
) -> Choice:
    """Measure the most promising swaps, a few at a time, and move while that is an improvement."""
    settings, failed = search.settings, 0
    for round_ in range(settings.swap_rounds):
        near = neighbours(search.table, search.limits, current)
        near = [c for c in near if c not in search.losses]
        if not near or failed == settings.patience or not search.affords(settings.swaps + 1.0):
            break
        order = _ranked(near, current, matrix, differences)[: settings.swaps]
        search.measure(order, current, f"swaps {round_ + 1}")
        following = search.step("swap", current, dict.fromkeys(order, "swap"))
        failed = failed + 1 if following == current else 0
        current = following
    return current


def _diagonal(search: _Search, matrix: SensitivityMatrix) -> Choice | None:
    from dataclasses import replace

    return search.solve(replace(matrix, cross=None, cross_error=None), search.limits)


def _ranked(
    choices: Sequence[Choice],
    current: Choice,
    matrix: SensitivityMatrix,
    differences: OutputDifferences | None,
) -> list[Choice]:
    """Return ``choices`` by predicted loss, best first."""
    if differences is None:
        predicted = np.array([matrix.predict(c) for c in choices])
    else:
        predicted = differences.predict_near(current, choices)
    return [choices[k] for k in np.argsort(predicted, kind="stable")]


def _best_predicted(differences: OutputDifferences, choices: Mapping[Choice, str]) -> Choice:
    listed = list(choices)
    return listed[int(differences.predict(listed).argmin())]


def predicted_descent(
    differences: OutputDifferences, limits: Limits, start: Choice, *, max_steps: int = 64
) -> list[Choice]:
    """Walk downhill on the sum-of-differences prediction by one- and two-group moves.

    Returns:
        The end of the walk; ``start`` itself where no move is predicted to improve.

    Cost: one prediction per neighbour and step; no passes.
    """
    current = start
    value = float(differences.predict([current])[0])
    for _ in range(max_steps):
        near = neighbours(differences.table, limits, current)
        if not near:
            break
        predicted = differences.predict_near(current, near)
        best = int(predicted.argmin())
        if not predicted[best] < value - 1e-12:
            break
        current, value = near[best], float(predicted[best])
    return [current]


__all__ = [
    "Choice",
    "Limits",
    "RefineSettings",
    "Refinement",
    "Solve",
    "Step",
    "distance",
    "predicted_descent",
    "refine",
]
