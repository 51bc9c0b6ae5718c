"""Learn the bit-width of every layer by gradient, under a limit on size that is met exactly.

Two phases. First a recipe learns relaxed bit-widths together with the weights (``bit_learners``).
Then they are frozen: rounded down to what is on offer, raised again in the order of what was cut
off as long as the exact size permits, and the model is fine-tuned under that plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.candidates import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.plan import Assignment, Plan
from bitquota.sensitivity.discovery import model_fingerprint
from bitquota.storage import FULL_PRECISION_BITS, Granularity, Scheme
from bitquota.training.bit_learners import (
    BitLearner,
    EllipsoidLearner,
    PublishedLearner,
    StabilisedLearner,
)
from bitquota.training.finetune import TrainedModel, finetune, measure_trained
from bitquota.training.loop import TrainingRecord, train
from bitquota.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from bitquota.budget import Budget
    from bitquota.candidates import Inventory, Layer
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.sensitivity.calibration import CalibrationSet

RECIPES: dict[str, type[BitLearner]] = {
    "stabilised": StabilisedLearner,
    "ellipsoid": EllipsoidLearner,
    "uhlich2020": PublishedLearner,
}
"""Recipes by name, in order of preference."""

PRICES: dict[str, Callable[[Candidate], int]] = {
    "size_bits": lambda candidate: candidate.size_bits,
    "code_bits": lambda candidate: candidate.size.codes,
}
"""What a candidate takes of each resource that can be limited here."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnedBits:
    """What ``learn`` returns.

    Attributes:
        candidates: One for each layer, within the limit exactly.
        relaxed_bits: What the recipe learned, before rounding.
        plan: The same as a plan: of the *trained* weights (its digest is theirs), measured on the
            hold-out part of the training data, which also selected the epoch.
        learning: What the first phase did.
        before: The learned model before fine-tuning, its weights in full precision.
        trained: The fine-tuned model of the second phase.
    """

    candidates: tuple[Candidate, ...]
    relaxed_bits: tuple[float, ...]
    plan: Plan
    learning: TrainingRecord
    before: nn.Module
    trained: TrainedModel


def default_settings(recipe: str) -> TrainingSettings:
    """Return how a recipe is trained unless something else is asked for."""
    return TrainingSettings()


def learn(
    module: nn.Module,
    inventory: Inventory,
    data: CalibrationSet,
    budget: Budget,
    weight_bits: Sequence[int],
    *,
    scheme: Scheme | None = None,
    recipe: str = "stabilised",
    settings: TrainingSettings | None = None,
    finetuning: TrainingSettings | None = None,
    checkpoint_folder: Path | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
) -> LearnedBits:
    """Learn bit-widths and weights in one run.

    Args:
        module: The full-precision model.
        inventory: Its layers.
        data: Labelled training samples; a hold-out of them selects, never the test set.
        budget: Limit on ``size_bits`` (scales included) or ``code_bits``; it is met exactly.
        weight_bits: Bit-widths on offer, at least two of 2 to 16.
        scheme: How the final weights are stored; by default per output channel.
        recipe: ``stabilised``, ``ellipsoid``, or ``uhlich2020`` (as published).
        settings: The first phase; by default as ``TrainingSettings``.
        finetuning: The second phase; by default the same settings.
        checkpoint_folder: Folder for the checkpoints of both phases.
        on_progress: Called after every step.
        cancelled: Asked before every step.

    Raises:
        BudgetTooSmall: Even the smallest bit-widths do not fit.
        InvalidInput: An unknown recipe, bit-widths that cannot be learned, or a budget of another
            resource.
        InvalidCalibration: Labels are missing.
        MeasurementFailed: The loss is not finite.
        Cancelled: ``cancelled`` said so; the checkpoints continue the run.

    Cost: the training of both phases. The limit is met exactly; that the bit-widths are good is
    for a measurement to say.
    """
    if recipe not in RECIPES:
        msg = f"a recipe must be one of {', '.join(RECIPES)}; got '{recipe}'"
        raise InvalidInput(msg, recipe=recipe)
    widths = sorted(set(weight_bits) - {FULL_PRECISION_BITS})
    if len(widths) < 2 or widths[0] < 2:
        msg = f"learning needs at least two bit-widths of 2 or more; got {sorted(weight_bits)}"
        raise InvalidInput(msg, weight_bits=sorted(weight_bits))
    if budget.resource not in PRICES:
        known = " or ".join(PRICES)
        msg = f"bit-widths are learned under a limit on {known}; got '{budget.resource}'"
        raise InvalidInput(msg, resource=budget.resource)
    scheme = Scheme() if scheme is None else scheme
    settings = TrainingSettings() if settings is None else settings
    layers = inventory.layers
    table = {la.name: {b: Candidate.of(la, b, scheme) for b in widths} for la in layers}
    price = PRICES[budget.resource]
    smallest = sum(price(table[la.name][widths[0]]) for la in layers)
    if smallest > budget.available:
        msg = (
            f"a limit of {budget.available:,} bits for the layers is below the smallest plan "
            f"({smallest:,} bits: every layer at {widths[0]} bits); raise it or offer smaller "
            "bit-widths"
        )
        raise BudgetTooSmall(msg, limit_bits=budget.available, smallest_bits=smallest)
    overhead = smallest - sum(widths[0] * la.n_weights for la in layers)
    learner = RECIPES[recipe](
        module,
        layers,
        float(budget.available - overhead),
        least=float(widths[0]),
        most=float(widths[-1]),
        per_channel=scheme.granularity is not Granularity.TENSOR and recipe != "uhlich2020",
    )
    identity = {
        "model": inventory.model_digest,
        "recipe": recipe,
        "budget": budget.to_json(),
        "weight_bits": widths,
        "scheme": scheme.to_json(),
    }
    # While bits still move, the last state is the one to go on from: an early epoch may look
    # better only because it had not paid for the limit yet. The published recipe selects.
    phase = settings if recipe == "uhlich2020" else replace(settings, patience=None)
    record = train(
        learner,
        module,
        data,
        phase,
        identity=identity,
        checkpoint=None if checkpoint_folder is None else checkpoint_folder / "learn.safetensors",
        stage="learn",
        keep_last=recipe != "uhlich2020",
        on_progress=on_progress,
        cancelled=cancelled,
    )
    relaxed = tuple(learner.relaxed_bits().detach().tolist())
    chosen = repair(layers, relaxed, table, budget)
    trained = finetune(
        module,
        inventory,
        chosen,
        data,
        settings if finetuning is None else finetuning,
        start=learner.model,
        checkpoint=None
        if checkpoint_folder is None
        else checkpoint_folder / "finetune.safetensors",
        on_progress=on_progress,
        cancelled=cancelled,
    )
    settings = settings if finetuning is None else finetuning
    _, holdout = data.split(settings.holdout_fraction, settings.seed)
    plan = Plan(
        model_digest=model_fingerprint(trained.module),
        assignments=tuple(
            Assignment(layer=la, candidate=c) for la, c in zip(layers, chosen, strict=True)
        ),
        unquantized=inventory.unquantized,
        budgets=(budget,),
        selected=f"learned:{recipe}",
        measured=measure_trained(trained.module, module, holdout),
        provenance={**identity, "data": data.digest, "seed": settings.seed},
    )
    return LearnedBits(
        candidates=chosen,
        relaxed_bits=relaxed,
        plan=plan,
        learning=record,
        before=learner.model,
        trained=trained,
    )


def repair(
    layers: Sequence[Layer],
    relaxed: Sequence[float],
    table: dict[str, dict[int, Candidate]],
    budget: Budget,
) -> tuple[Candidate, ...]:
    """Return whole bit-widths near the relaxed ones, within the limit exactly.

    Every layer starts at the largest bit-width on offer that is not above its relaxed one. Over
    the limit, the layer with the most to give per bit of accuracy asked is lowered: the one whose
    width exceeds its relaxed width the most, the largest first. Under it, layers are raised, the
    one whose relaxed width exceeds its width the most first, as long as one fits. A heuristic;
    the limit holds exactly, and no single layer could be raised further.
    """
    price, limit = PRICES[budget.resource], budget.available
    widths = sorted(next(iter(table.values())))
    bits = [max([w for w in widths if w <= b + 1e-6], default=widths[0]) for b in relaxed]

    def size() -> int:
        return sum(price(table[la.name][b]) for la, b in zip(layers, bits, strict=True))

    def step(b: int, by: int) -> int | None:
        at = widths.index(b) + by
        return widths[at] if 0 <= at < len(widths) else None

    while size() > limit:
        lower = [k for k in range(len(bits)) if step(bits[k], -1) is not None]
        k = max(lower, key=lambda k: (bits[k] - relaxed[k], layers[k].n_weights, -k))
        bits[k] = step(bits[k], -1) or bits[k]
    while True:
        room = limit - size()
        raisable = []
        for k, layer in enumerate(layers):
            up = step(bits[k], 1)
            if up is None:
                continue
            more = price(table[layer.name][up]) - price(table[layer.name][bits[k]])
            if more <= room:
                raisable.append((relaxed[k] - bits[k], -k, up))
        if not raisable:
            break
        _, negative, up = max(raisable)
        bits[-negative] = up
    return tuple(table[la.name][b] for la, b in zip(layers, bits, strict=True))
