"""Evidence: how far predictions can be trusted, from a few plans measured for that purpose.

Design: docs/design/search.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.codec import Document
from bitquota.errors import InvalidInput
from bitquota.search.agreement import cheapest_choice, prices, spearman
from bitquota.search.neighborhood import Choice, neighbours
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.recorder import standard_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.search.neighborhood import Limits
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


SAMPLES = 256
"""Samples at most that evidence is measured on: it ranks plans, some of them far apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Document):
    """One plan, predicted and measured.

    Attributes:
        kind: ``plan``, ``near`` (one or two groups away) or ``random``.
        choice: Row within each group.
        predicted: Predicted loss increase.
        measured: Measured mean loss increase.
        error: Its standard error over samples.
    """

    kind: str
    choice: Choice
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence(Document):
    """What a few measured plans say about the predictions and about the plan.

    Attributes:
        points: The plans, the chosen one first.
        rank_correlation: Spearman's, predicted against measured, over all points; ``None`` if
            either is constant.
        near_correlation: The same over the plan and its neighbours.
        random_band: Smallest, median and largest measured loss of random plans of the budget.
        better_than_random: Share of the random plans that measured worse than the plan.
    """

    points: tuple[Point, ...]
    rank_correlation: float | None
    near_correlation: float | None
    random_band: tuple[float, float, float]
    better_than_random: float


def random_choices(table: CandidateTable, limits: Limits, n: int, seed: int) -> list[Choice]:
    """Return ``n`` random choices that use up the limits: no single group could take more.

    From the cheapest rows, groups are raised in random order to random affordable rows until
    nothing more fits. Not uniform over all such choices. Duplicates are possible in small spaces.

    Raises:
        InvalidInput: Not even the cheapest rows keep the limits.
    """
    rng = np.random.default_rng(seed)
    offsets = table.offsets
    total = prices(limits)
    cheapest = list(cheapest_choice(table, limits))
    if not limits.allow(table, cheapest):
        msg = "random plans need limits that the cheapest candidates keep; these do not"
        raise InvalidInput(msg)
    found: list[Choice] = []
    for _ in range(n):
        choice = list(cheapest)
        spent = limits.spent(table, choice)
        while True:
            moves = []
            for g, k in enumerate(choice):
                now = offsets[g] + k
                for row in range(offsets[g], offsets[g + 1]):
                    added = limits.costs[:, row] - limits.costs[:, now]
                    if total[row] > total[now] and (spent + added <= limits.limits).all():
                        moves.append((g, int(row - offsets[g]), added))
            if not moves:
                break
            g, k, added = moves[int(rng.integers(len(moves)))]
            choice[g] = k
            spent = spent + added
        found.append(tuple(choice))
    return found


def drawn_choices(
    table: CandidateTable,
    limits: Limits,
    choice: Choice,
    *,
    n_random: int = 8,
    n_near: int = 8,
    seed: int = 0,
) -> tuple[list[Choice], list[Choice]]:
    """Return ``choice`` with neighbours drawn at random, and random choices."""
    rng = np.random.default_rng(seed)
    close = neighbours(table, limits, choice)
    drawn = sorted(rng.permutation(len(close))[:n_near].tolist())
    near = [choice, *(close[k] for k in drawn)]
    return near, random_choices(table, limits, n_random, seed)


def gather_evidence(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    limits: Limits,
    choice: Choice,
    predict: Callable[[Choice], float],
    n_random: int = 8,
    n_near: int = 8,
    seed: int = 0,
    context: Context | None = None,
) -> Evidence:
    """Measure the plan, some neighbours and some random plans, and compare with predictions.

    Args:
        runner: Executes the model, best on hold-out samples.
        table: What choices speak of.
        loss: The loss.
        limits: The budget that random plans use up.
        choice: The plan.
        predict: Predicted loss increase of a choice, such as ``matrix.predict``.
        n_random: Random plans.
        n_near: Neighbours (drawn at random among the feasible ones).
        seed: Of the draws.
        context: Where measurements are kept, whom to tell, when to stop.

    Cost: a pass over at most ``SAMPLES`` samples for each random plan, about half a pass for each
    neighbour.
    """
    # Plans near the chosen one, and random ones: measured.
    near, distant = drawn_choices(
        table, limits, choice, n_random=n_random, n_near=n_near, seed=seed
    )
    # The first chunk, and all that are within the samples.
    chunks = range(max(1, sum(chunk.stop <= SAMPLES for chunk in runner.chunks)))
    values = [
        measure_choices(
            runner,
            table,
            loss,
            chosen,
            centre=centre,
            context=context,
            stage="evidence",
            chunks=chunks,
        )
        for chosen, centre in ((near, choice), (distant, None))
        if chosen
    ]
    losses = np.concatenate(values)

    # Each with what was predicted for it.
    kinds = ["plan", *["near"] * (len(near) - 1), *["random"] * len(distant)]
    points = tuple(
        Point(
            kind=kind,
            choice=tuple(int(c) for c in chosen),
            predicted=float(predict(chosen)),
            measured=float(row.mean()),
            error=float(standard_error(row)),
        )
        for kind, chosen, row in zip(kinds, [*near, *distant], losses, strict=True)
    )

    # How predictions and losses rank, and where the plan stands among random ones.
    around = [p for p in points if p.kind != "random"]
    random = np.array([p.measured for p in points if p.kind == "random"] or [np.nan])
    own = points[0].measured
    band = (float(random.min()), float(np.median(random)), float(random.max()))
    return Evidence(
        points=points,
        rank_correlation=spearman(
            [p.predicted for p in points], [p.measured for p in points], least=2
        ),
        near_correlation=spearman(
            [p.predicted for p in around], [p.measured for p in around], least=2
        ),
        random_band=band if distant else (own, own, own),
        better_than_random=float((random > own).mean()),
    )
