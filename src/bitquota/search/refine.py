"""Refinement: measure the plan, measure again around it, solve again, until nothing improves.

A quadratic around full precision does not hold for plans with many 2-bit layers. So the plan is
found by steps, each from a plan whose true loss was measured: candidates are proposed by cheap
predictions around it (a Gram matrix solved within a trust region, sums of output differences),
their true loss is measured, and the best is accepted only if it is better by more than the
standard error of the paired difference. The predictions propose; only measurements decide.

Design: docs/design/search.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import Infeasible
from bitquota.search.descent import predicted_descent
from bitquota.search.neighborhood import Choice, Limits, neighbours, rows_near
from bitquota.search.race import leader, race
from bitquota.search.refinement import (
    Linearisation,
    Refinement,
    RefineSettings,
    Solve,
    Step,
)
from bitquota.search.validation import HoldOut
from bitquota.sensitivity.measures.gram import GramMeasure, measure_differences

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.measures.gram import OutputDifferences
    from bitquota.sensitivity.runners.base import Runner


@dataclass(slots=True, kw_only=True)
class _Search:
    """The state of one refinement."""

    runner: Runner
    holdout: HoldOut
    table: CandidateTable
    loss: Loss
    limits: Limits
    solve: Solve
    settings: RefineSettings
    context: Context | None
    steps: list[Step] = field(default_factory=list)
    n_linearised: int = 0
    linearised: float = 0.0
    passes_before: float = 0.0
    limit: float = np.inf
    best: Choice | None = None

    @property
    def passes(self) -> float:
        """Forward-equivalents spent so far, in passes over the samples of ``runner``."""
        own = self.runner.passes.passes - self.passes_before
        n = len(self.runner.calibration)
        return own + self.holdout.samples_run(besides=self.runner) / n

    @property
    def so_far(self) -> str:
        """What the stages of the search tell of the best plan so far."""
        return "" if self.best is None else f", best so far {self.holdout.mean(self.best):.3g}"

    def affords(self, passes: float) -> bool:
        """Whether that many more passes stay within the limit.

        What was asked counts, not what had to be run: a plan must not depend on what the ledger
        held.
        """
        asked = self.linearised + self.holdout.asked / len(self.runner.calibration)
        return asked + passes <= self.limit

    def step(self, kind: str, current: Choice, proposals: Mapping[Choice, str]) -> Choice:
        """Accept the best measured proposal if it is clearly better than ``current``.

        Where the best ones are neither clearly better nor clearly worse, they are measured on
        further samples, as long as there are any.
        """
        holdout, errors = self.holdout, self.settings.accept_errors
        contenders = list(proposals)
        best = holdout.best(contenders)
        gain, error = holdout.gain(best, current)
        for block in range(1, min(len(holdout.blocks), 1 + _MORE_BLOCKS)):
            contenders = sorted(contenders, key=lambda c: (-holdout.gain(c, current)[0], c))
            contenders = [c for c in contenders if _open(holdout.gain(c, best), errors)]
            contenders = [best, *(c for c in contenders if c != best)][:_CONTENDERS]
            again = list(dict.fromkeys([current, *contenders]))
            if not _open((gain, error), errors) or len(again) == 1:
                break
            if not self.affords(len(again) + 1.0):
                break
            stage = f"{kind}, more samples{self.so_far}"
            holdout.measure(again, current, stage, blocks=block + 1)
            best = holdout.best(contenders)
            gain, error = holdout.gain(best, current)
        accepted = gain > 0 and gain > errors * error
        self.steps.append(
            Step(
                kind=kind,
                origin=proposals[best],
                choice=best,
                loss=holdout.mean(best),
                gain=gain,
                gain_error=error,
                accepted=accepted,
                passes=self.passes,
            )
        )
        self.best = best if accepted else current
        return self.best

    def linearise(self, point: Choice | None, number: int, *, far: bool = True) -> Linearisation:
        """Measure singles and Gram terms around ``point``, the ``number``-th of the refinement."""
        rows, taken = _extent(self.settings, self.runner, self.table, point, far=far)
        n = len(self.runner.chunks)
        chunks = [(k + number * taken) % n for k in range(taken)]
        matrix, differences = measure_differences(
            self.runner,
            self.table,
            self.loss,
            base_point=point,
            context=self.context,
            stage=f"linearisation {number}{self.so_far}",
            only=rows,
            chunks=None if point is None else chunks,
        )
        return Linearisation(point=point, matrix=matrix, differences=differences, rows=tuple(rows))


_CONTENDERS = 2
"""Proposals at most that are measured on more samples, so that the best of many is not luck."""

_MORE_BLOCKS = 2
"""Further blocks at most for one decision: what they leave open matters less than another step."""


_NOT_MUCH_WORSE = 2.0
"""A start with more than so many times the loss of the best is not worth a linearisation."""


def _extent(
    settings: RefineSettings,
    runner: Runner,
    table: CandidateTable,
    point: Choice | None,
    *,
    far: bool,
) -> tuple[list[int], int]:
    """Return the rows that a linearisation measures, and the number of chunks."""
    n, everything = len(runner.chunks), list(range(len(table.rows)))
    if point is None:
        return everything, n
    chunks = min(n, max(1, round((settings.far_share if far else settings.near_share) * n)))
    if far or settings.reach is None:
        return everything, chunks
    return rows_near(table, point, settings.reach), chunks


def _cost_of_linearisation(
    settings: RefineSettings, runner: Runner, table: CandidateTable, point: Choice, *, far: bool
) -> float:
    """Return an upper estimate of the passes that linearising at ``point`` takes."""
    rows, chunks = _extent(settings, runner, table, point, far=far)
    others = set(rows).difference(_rows_of(table, point))
    layers = [[c.layer for c in table.rows[row].candidates] for row in others]
    return (2.0 + sum(runner.share(names) for names in layers)) * chunks / len(runner.chunks)


def _limit(settings: RefineSettings, runner: Runner, table: CandidateTable) -> float:
    """Return the passes beyond which no linearisation and no round of swaps is begun."""
    if settings.effort is None:
        return np.inf
    return max(settings.least, settings.effort * GramMeasure().cost(runner, table))


def expected_passes(
    settings: RefineSettings,
    runner: Runner,
    table: CandidateTable,
    point: Choice,
    *,
    starts: int,
    share: float,
) -> tuple[float, float]:
    """Return what a refinement usually takes and what it takes at most, before anything is known.

    Usually: every step is tried once and nothing improves. In passes over the samples of
    ``runner``.

    Args:
        settings: How much work.
        runner: Executes the model on the samples that predictions are fitted to.
        table: What may become of each group.
        point: A choice within the limits, to linearise around.
        starts: Number of its starts, which are measured in any case.
        share: Samples of a block that decides, as a share of those of ``runner``.
    """
    # A start that the first block leaves open is measured on further ones, beside its rivals.
    least, open_ = starts * share, _MORE_BLOCKS * (2 + _CONTENDERS) * share
    if not settings.iterations and not settings.swap_rounds:
        return least, least + open_
    far, near = (
        _cost_of_linearisation(settings, runner, table, point, far=far) for far in (True, False)
    )
    proposed, swapped = (1 + settings.proposals) * share, (1 + settings.swaps) * share
    n_far = min(settings.starts, settings.iterations)
    usual = least + n_far * (far + proposed) + near + proposed + settings.patience * swapped
    # What is begun within the limit still measures its proposals.
    last = max(proposed, swapped + 3 * share)
    most = max(_limit(settings, runner, table), least + open_) + last
    return min(usual, most), most


def _open(gain: tuple[float, float], errors: float) -> bool:
    """Whether more samples may decide otherwise: for what measured a little worse, hardly."""
    return -errors / 2 * gain[1] <= gain[0] <= errors * gain[1]


def refine(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    limits: Limits,
    solve: Solve,
    starts: Mapping[str, Choice],
    holdout: Sequence[Runner | Callable[[], Runner]] = (),
    first: tuple[SensitivityMatrix, OutputDifferences | None] | None = None,
    warm: Linearisation | None = None,
    settings: RefineSettings | None = None,
    context: Context | None = None,
) -> Refinement:
    """Improve the best of ``starts`` step by step, on measured loss; a heuristic.

    Args:
        runner: Executes the model on the samples that predictions are fitted to.
        table: What may become of each group.
        loss: What to minimise.
        limits: Budgets.
        solve: The solver.
        starts: Choices to begin with, by name; those beyond the limits are ignored.
        holdout: Execute the model on the samples that decide, block by block: a hold-out part, and
            further ones for what that leaves open; or make such a runner when it is needed. By
            default those of ``runner`` decide.
        first: Matrix and differences around full precision, if they are measured already.
        warm: The last linearisation of a larger budget; its predictions propose a start.
        settings: How much work.
        context: Where measurements are kept, whom to tell, when to stop.

    Raises:
        Infeasible: No start keeps the limits.

    Cost: one linearisation (``n + 1`` runs behind one group) for each iteration, and about one
    pass for each choice that is measured.
    """
    settings = settings or RefineSettings()
    search = _Search(
        runner=runner,
        holdout=HoldOut(
            blocks=tuple(holdout) or (runner,),
            table=table,
            loss=loss,
            context=context,
        ),
        table=table,
        loss=loss,
        limits=limits,
        solve=solve,
        settings=settings,
        context=context,
    )
    search.passes_before = runner.passes.passes
    search.limit = _limit(settings, runner, table)
    if first is None:
        at = search.linearise(None, 0)
    else:
        everything = tuple(range(len(table.rows)))
        at = Linearisation(point=None, matrix=first[0], differences=first[1], rows=everything)

    # Where to begin: the best of the given starts and of what the matrices propose.
    proposals = _first_choices(search, starts, at, warm)
    alive = race(search.holdout, proposals, keep=search.settings.starts)
    current = leader(search.holdout, alive, proposals)
    current = search.step("start", current, {choice: proposals[choice] for choice in alive})

    # The best start need not lead to the best end: far from several, then near to the best.
    for point in _promising(search, alive):
        at, current = _move(search, point, current, at, far=True)
    while True:
        before = current
        if at.point != current:
            at, current = _move(search, current, current, at, far=False)
        if current == before:
            current = _swap(search, current, at)
        if current == before:
            break
    return Refinement(
        choice=current,
        per_sample=search.holdout.per_sample(current),
        last=at,
        steps=tuple(search.steps),
        measured={c: search.holdout.mean(c) for c in search.holdout.losses},
    )


def _first_choices(
    search: _Search,
    starts: Mapping[str, Choice],
    at: Linearisation,
    warm: Linearisation | None,
) -> dict[Choice, str]:
    """Return the choices to begin with, each with its name.

    Raises:
        Infeasible: There is none within the limits.
    """
    limits, solve = search.limits, search.solve
    proposals: dict[Choice, str] = {}
    for name, choice in starts.items():
        if limits.allow(search.table, choice):
            proposals.setdefault(choice, name)
    if (diagonal := solve(replace(at.matrix, cross=None, cross_error=None), limits)) is not None:
        proposals.setdefault(diagonal, "diagonal")
    for known, prefix in ((at, ""), (warm, "larger budget, ")):
        if known is None:
            continue
        inside = limits.only(known.rows)
        if (solved := solve(known.matrix, inside)) is not None:
            proposals.setdefault(solved, f"{prefix}gram")
        offered = [c for c in proposals if inside.allow(search.table, c)]
        if known.differences is not None and offered:
            start = _best_predicted(known.differences, offered)
            end = predicted_descent(known.differences, inside, start)
            proposals.setdefault(end, f"{prefix}sum of differences")
    if not proposals:
        msg = "refinement needs a start within the limits; none of the given ones is"
        raise Infeasible(msg)
    return proposals


def _promising(search: _Search, starts: Sequence[Choice]) -> list[Choice]:
    """Return the starts to linearise around: the best, and others that are not much worse."""
    mean = search.holdout.mean
    order = sorted(starts, key=lambda c: (mean(c), c))
    near = [c for c in order if mean(c) <= _NOT_MUCH_WORSE * mean(order[0])]
    return (near or order)[: search.settings.starts]


def _move(
    search: _Search, point: Choice, current: Choice, at: Linearisation, *, far: bool
) -> tuple[Linearisation, Choice]:
    """Linearise around ``point`` if that may still be afforded, and step to what it proposes."""
    number = search.n_linearised + 1
    cost = _cost_of_linearisation(search.settings, search.runner, search.table, point, far=far)
    if number > search.settings.iterations or not search.affords(cost):
        return at, current
    search.n_linearised = number
    search.linearised += cost
    at = search.linearise(point, number, far=far)
    around = _proposals(search, point, at)
    if around:
        search.holdout.measure(list(around), point, f"proposals {number}{search.so_far}")
        current = search.step("linearised", current, around)
    return at, current


def _proposals(search: _Search, current: Choice, at: Linearisation) -> dict[Choice, str]:
    """Return what the predictions around ``current`` offer, the best predicted ones."""
    offered: dict[Choice, str] = {}
    limits = search.limits.only(at.rows)
    for share in search.settings.radii:
        radius = max(1, round(share * len(current)))
        inside = limits.within(search.table, current, radius)
        candidate = search.solve(at.matrix, inside)
        if candidate is not None:
            offered.setdefault(candidate, f"gram within {radius}")
        if at.differences is not None:
            end = predicted_descent(at.differences, inside, current)
            offered.setdefault(end, f"sum of differences within {radius}")
    offered = {choice: origin for choice, origin in offered.items() if choice != current}
    order = _ranked(list(offered), current, at)
    return {choice: offered[choice] for choice in order[: search.settings.proposals]}


def _swap(search: _Search, current: Choice, at: Linearisation) -> Choice:
    """Measure the most promising swaps, a few at a time, and move while that is an improvement.

    Only rows that were measured in the linearisation are swapped in.
    """
    settings, failed = search.settings, 0
    limits = search.limits.only([*at.rows, *_rows_of(search.table, current)])
    for round_ in range(settings.swap_rounds):
        near = neighbours(search.table, limits, current)
        near = [c for c in near if c not in search.holdout.losses]
        if not near or failed == settings.patience or not search.affords(settings.swaps + 1.0):
            break
        order = _ranked(near, current, at)[: settings.swaps]
        search.holdout.measure(order, current, f"swaps {round_ + 1}{search.so_far}")
        offered = dict.fromkeys(order, "swap")
        if together := _together(search, current, order):
            search.holdout.measure(together, current, f"swaps {round_ + 1} together{search.so_far}")
            offered |= dict.fromkeys(together, "swaps together")
        following = search.step("swap", current, offered)
        failed = failed + 1 if following == current else 0
        current = following
    return current


def _together(search: _Search, current: Choice, swaps: Sequence[Choice]) -> list[Choice]:
    """Return unions of those swaps that measured better, the best first: of two, and of all."""
    gains = {c: search.holdout.gain(c, current)[0] for c in swaps}
    better = sorted((c for c in swaps if gains[c] > 0), key=lambda c: (-gains[c], c))
    unions: list[Choice] = []
    union = current
    for choice in better:
        moved = {g for g, (a, b) in enumerate(zip(current, choice, strict=True)) if a != b}
        if any(union[g] != current[g] for g in moved):
            continue
        both = tuple(
            c if g in moved else u for g, (u, c) in enumerate(zip(union, choice, strict=True))
        )
        if search.limits.allow(search.table, both):
            union = both
            unions.append(union)
    return list(dict.fromkeys([*unions[1:2], *unions[2:][-1:]]))


def _rows_of(table: CandidateTable, choice: Choice) -> list[int]:
    return [int(a + k) for a, k in zip(table.offsets[:-1], choice, strict=True)]


def _ranked(choices: Sequence[Choice], current: Choice, at: Linearisation) -> list[Choice]:
    """Return ``choices`` by predicted loss, best first."""
    if at.differences is None:
        predicted = np.array([at.matrix.predict(c) for c in choices])
    else:
        predicted = at.differences.predict_near(current, choices)
    return [choices[k] for k in np.argsort(predicted, kind="stable")]


def _best_predicted(differences: OutputDifferences, choices: Sequence[Choice]) -> Choice:
    return choices[int(differences.predict(choices).argmin())]


__all__ = [
    "Linearisation",
    "RefineSettings",
    "Refinement",
    "Solve",
    "Step",
    "refine",
]
