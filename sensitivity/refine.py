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
        proposals: Choices measured per iteration, after the trust-region solutions.
        swap_rounds: Rounds of measured swaps at the end, at most.
        swaps: Swaps measured in each round.
        accept_errors: A step must improve by this many paired standard errors.
    """

    iterations: int = 3
    radii: tuple[float, ...] = (1.0, 0.4, 0.2)
    proposals: int = 6
    swap_rounds: int = 3
    swaps: int = 8
    accept_errors: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.iterations < 0 or self.swap_rounds < 0 or self.proposals < 1 or self.swaps < 1:
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
        passes: Forward-equivalents of the runner until then.
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
                passes=self.runner.passes.passes
                + (0.0 if self.judge is self.runner else self.judge.passes.passes),
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
    n_groups = len(current)
    for iteration in range(settings.iterations):
        matrix, differences = search.linearise(current, f"linearisation {iteration + 1}")
        offered: dict[Choice, str] = {}
        for share in settings.radii:
            radius = max(1, round(share * n_groups))
            inside = limits.within(table, current, radius)
            candidate = solve(matrix, inside)
            if candidate is not None and candidate != current:
                offered.setdefault(candidate, f"gram within {radius}")
            if differences is not None:
                for found_choice in predicted_descent(differences, inside, current):
                    if found_choice != current:
                        offered.setdefault(found_choice, f"sum of differences within {radius}")
        if len(offered) > settings.proposals:
            order = _ranked(list(offered), matrix, differences)[: settings.proposals]
            offered = {c: offered[c] for c in order}
        if not offered:
            break
        search.measure(list(offered), current, f"proposals {iteration + 1}")
        following = search.step("linearised", current, offered)
        if following == current:
            break
        current = following
    current = _swap(search, current, matrix, differences)
    return Refinement(
        choice=current,
        per_sample=search.losses[current],
        matrix=matrix,
        steps=tuple(search.steps),
        measured={c: float(v.mean()) for c, v in search.losses.items()},
    )


def _swap(
    search: _Search,
    current: Choice,
    matrix: SensitivityMatrix,
    differences: OutputDifferences | None,
) -> Choice:
    """Measure the most promising swaps and take the best while that is an improvement."""
    settings = search.settings
    for round_ in range(settings.swap_rounds):
        near = [
            c
            for c in neighbours(search.table, search.limits, current)
            if c not in search.losses
        ]  # fmt: skip
        if not near:
            break
        order = _ranked(near, matrix, differences)[: settings.swaps]
        search.measure(order, current, f"swaps {round_ + 1}")
        following = search.step("swap", current, dict.fromkeys(order, "swap"))
        if following == current:
            break
        current = following
    return current


def _diagonal(search: _Search, matrix: SensitivityMatrix) -> Choice | None:
    from dataclasses import replace

    return search.solve(replace(matrix, cross=None, cross_error=None), search.limits)


def _ranked(
    choices: Sequence[Choice],
    matrix: SensitivityMatrix,
    differences: OutputDifferences | None,
) -> list[Choice]:
    """Return ``choices`` by predicted loss, best first."""
    if differences is None:
        predicted = np.array([matrix.predict(c) for c in choices])
    else:
        predicted = differences.predict(choices)
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
