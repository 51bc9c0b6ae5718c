"""Learn the bit-width of every layer by gradient, under limits on size that are met exactly.

Two phases. First a recipe learns relaxed bit-widths together with the weights (``bit_learners``).
Then they are frozen: rounded down to what is on offer, raised again in the order of what was cut
off as long as the exact size permits, and the model is fine-tuned under that plan.

Design: docs/design/training.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import FULL_PRECISION_BITS, Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.models.identity import model_fingerprint
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.activations import ACTIVATION_BITS
from bitquota.training.bit_learners import (
    BitLearner,
    BitPruningLearner,
    BitSparsityLearner,
    EllipsoidLearner,
    PublishedLearner,
    StabilisedLearner,
)
from bitquota.training.finetune import TrainedModel, finetune, measure_trained
from bitquota.training.input_quantizers import START_BITS, LearnedInputBits, calibrated_inputs
from bitquota.training.loop import TrainingRecord, train
from bitquota.training.repair import PRICES, repair, whole_widths
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trained_candidate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from bitquota.candidates.layers import Inventory
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet

RECIPES: dict[str, type[BitLearner]] = {
    "stabilised": StabilisedLearner,
    "ellipsoid": EllipsoidLearner,
    "bitpruning": BitPruningLearner,
    "bsq": BitSparsityLearner,
    "uhlich2020": PublishedLearner,
}
"""Recipes by name, in order of preference."""

INPUT_RESOURCES = ("activation_bits_total", "activation_bits_max")
"""Limits on inputs: of all layers together, and of the largest."""

INPUT_WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnedBits:
    """What ``learn`` returns.

    Attributes:
        candidates: One for each layer, within the limits exactly.
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
    """Return how a recipe learns unless something else is asked for.

    ``uhlich2020`` as published: momentum SGD, a tenth of the rate at half and at three quarters,
    decay of quantizers like of weights, labels only; the rate is one of those that the paper tried
    for fine-tuning. The others: AdamW, and bit-widths that move four times as fast as steps.
    """
    if recipe == "uhlich2020":
        return TrainingSettings(
            optimizer="sgd",
            schedule="steps",
            learning_rate=0.01,
            quantizer_learning_rate=0.01,
            weight_decay=2e-4,
            quantizer_weight_decay=2e-4,
            distillation=0.0,
        )
    return TrainingSettings(quantizer_learning_rate=2e-2)


def following_settings(settings: TrainingSettings) -> TrainingSettings:
    """Return how to fine-tune after learning with ``settings``: length and data alike."""
    usual = TrainingSettings()
    return replace(
        settings,
        optimizer=usual.optimizer,
        schedule=usual.schedule,
        learning_rate=settings.learning_rate
        if settings.optimizer == usual.optimizer
        else usual.learning_rate,
        quantizer_learning_rate=usual.quantizer_learning_rate,
        quantizer_weight_decay=0.0,
    )


class LearnOptions(TypedDict, total=False):
    """How bit-widths are learned; what is left out has its default.

    Attributes:
        scheme: How the final weights are stored; by default per output channel.
        recipe: ``stabilised`` (default), ``ellipsoid``, ``bitpruning``, ``bsq``, or ``uhlich2020``
            (as published).
        method: How the second phase trains (``finetune``), by default ``lsq``.
        activation_bits: Bit-widths on offer to layers' inputs; by default 2, 3, 4, 5, 6 and 8 where
            a budget limits them, otherwise inputs stay in full precision.
        settings: The first phase; by default ``default_settings``.
        finetuning: The second phase; by default ``following_settings`` of the first.
        checkpoint_folder: Folder for the checkpoints of both phases.
        context: Whom to tell, when to stop, and where to run.
    """

    scheme: Scheme | None
    recipe: str
    method: str
    activation_bits: Sequence[int]
    settings: TrainingSettings | None
    finetuning: TrainingSettings | None
    checkpoint_folder: Path | None
    context: Context | None


def learn(
    module: nn.Module,
    inventory: Inventory,
    data: CalibrationSet,
    budget: Budget | Sequence[Budget],
    weight_bits: Sequence[int],
    *,
    start: Sequence[Candidate] | None = None,
    **options: Unpack[LearnOptions],
) -> LearnedBits:
    """Learn bit-widths and weights in one run.

    Args:
        module: The full-precision model.
        inventory: Its layers; those of one group get one bit-width.
        data: Labelled training samples; a hold-out of them selects, never the test set.
        budget: Limit on ``size_bits`` (scales included) or ``code_bits``, and besides it limits on
            the inputs of layers: ``activation_bits_total``, ``activation_bits_max``. All are met
            exactly.
        weight_bits: Bit-widths on offer, at least two of 2 to 16.
        start: A plan's candidates to start from, by default the recipe's own bit-widths.
        **options: How; see ``LearnOptions``.

    Raises:
        BudgetTooSmall: Even the smallest bit-widths do not fit.
        InvalidInput: An unknown recipe, bit-widths that cannot be learned, or a budget of another
            resource.
        InvalidCalibration: Labels are missing.
        MeasurementFailed: The loss is not finite.
        Cancelled: The context said so; the checkpoints continue the run.

    Cost: the training of both phases. The limits are met exactly; that the bit-widths are good is
    for a measurement to say.
    """
    recipe, method = options.get("recipe", "stabilised"), options.get("method", "lsq")
    if recipe not in RECIPES:
        msg = f"a recipe must be one of {', '.join(RECIPES)}; got '{recipe}'"
        raise InvalidInput(msg, recipe=recipe)
    scheme = options.get("scheme") or Scheme()
    settings = options.get("settings") or default_settings(recipe)
    finetuning = options.get("finetuning") or following_settings(settings)
    folder, context = options.get("checkpoint_folder"), options.get("context")
    inputs = options.get("activation_bits", ())
    offer = _offer(inventory, budget, weight_bits, inputs, scheme, method)
    learner = _learner(module, inventory, offer, recipe, start, data, settings)
    identity = {
        "model": inventory.model_digest,
        "recipe": recipe,
        "budgets": [b.to_json() for b in offer.budgets],
        "weight_bits": offer.widths,
        "activation_bits": offer.input_widths,
        "scheme": scheme.to_json(),
        "start": None if start is None else [c.label for c in start],
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
        checkpoint=None if folder is None else folder / "learn.safetensors",
        stage="learn",
        keep_last=recipe != "uhlich2020",
        context=context,
    )
    relaxed = tuple(learner.relaxed_bits().detach().tolist())
    chosen = repair(inventory.layers, relaxed, offer.table, offer.weights)
    if learner.inputs is not None:
        chosen = _with_inputs(inventory, chosen, learner.inputs, offer, method)
    trained = finetune(
        module,
        inventory,
        chosen,
        data,
        finetuning,
        method=method,
        start=learner.model,
        checkpoint=None if folder is None else folder / "finetune.safetensors",
        context=context,
    )
    _, holdout = data.split(finetuning.holdout_fraction, finetuning.seed)
    plan = Plan(
        model_digest=model_fingerprint(trained.module),
        assignments=tuple(
            Assignment(layer=la, candidate=c)
            for la, c in zip(inventory.layers, trained.candidates, strict=True)
        ),
        unquantized=inventory.unquantized,
        budgets=offer.budgets,
        selected=f"learned:{recipe}",
        measured=measure_trained(trained, module, holdout),
        provenance={
            **identity,
            "method": method,
            "learned_from": inventory.model_digest,
            "data": data.digest,
            "seed": settings.seed,
        },
    )
    return LearnedBits(
        candidates=trained.candidates,
        relaxed_bits=relaxed,
        plan=plan,
        learning=record,
        before=learner.model,
        trained=trained,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """What may be chosen, and within which limits.

    Attributes:
        budgets: All of them.
        weights: The one on weights.
        total: Limit on the bits of all inputs, or ``None``.
        largest: Limit on the bits of each input, or ``None``.
        widths: Bit-widths of weights.
        input_widths: Bit-widths of inputs; empty for full precision.
        table: Candidates of each layer by bit-width, as they are stored in the end.
        scheme: How weights are stored.
    """

    budgets: tuple[Budget, ...]
    weights: Budget
    total: int | None
    largest: int | None
    widths: list[int]
    input_widths: list[int]
    table: dict[str, dict[int, Candidate]]
    scheme: Scheme


def _offer(
    inventory: Inventory,
    budget: Budget | Sequence[Budget],
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    scheme: Scheme,
    method: str,
) -> _Offer:
    budgets = (budget,) if isinstance(budget, Budget) else tuple(budget)
    widths = sorted(set(weight_bits) - {FULL_PRECISION_BITS})
    if len(widths) < 2 or widths[0] < 2:
        msg = f"learning needs at least two bit-widths of 2 or more; got {sorted(weight_bits)}"
        raise InvalidInput(msg, weight_bits=sorted(weight_bits))
    limits = {
        resource: min((b.available for b in budgets if b.resource == resource), default=None)
        for resource in INPUT_RESOURCES
    }
    limited = any(limit is not None for limit in limits.values())
    offered = sorted(set(activation_bits or (INPUT_WIDTHS if limited else ())))
    if unknown := [b for b in offered if b not in ACTIVATION_BITS]:
        allowed = ", ".join(map(str, ACTIVATION_BITS))
        msg = f"an activation bit-width must be one of {allowed}; got {unknown}"
        raise InvalidInput(msg, activation_bits=unknown)
    offer = _Offer(
        budgets=budgets,
        weights=_weight_budget(budgets),
        total=limits["activation_bits_total"],
        largest=limits["activation_bits_max"],
        widths=widths,
        input_widths=offered,
        table={
            la.name: {b: trained_candidate(method, la, Candidate.of(la, b, scheme)) for b in widths}
            for la in inventory.layers
        },
        scheme=scheme,
    )
    _check_smallest(offer, inventory)
    return offer


def _weight_budget(budgets: Sequence[Budget]) -> Budget:
    """Return the one budget on weights; the others must be on inputs."""
    of_weights = [b for b in budgets if b.resource in PRICES]
    others = [b.resource for b in budgets if b.resource not in (*PRICES, *INPUT_RESOURCES)]
    if others or len(of_weights) != 1:
        got = ", ".join(f"'{b.resource}'" for b in budgets) or "none"
        msg = (
            f"bit-widths are learned under one limit on {' or '.join(PRICES)}, and limits on "
            f"{' or '.join(INPUT_RESOURCES)} besides; got {got}"
        )
        raise InvalidInput(msg, resources=[b.resource for b in budgets])
    return of_weights[0]


def _check_smallest(offer: _Offer, inventory: Inventory) -> None:
    """Raise ``BudgetTooSmall`` if the smallest bit-widths exceed a limit."""
    price, width = PRICES[offer.weights.resource], offer.widths[0]
    smallest = sum(price(offer.table[la.name][width]) for la in inventory.layers)
    available = offer.weights.available
    if smallest > available:
        msg = (
            f"a limit of {available:,} bits for the layers is below the smallest plan "
            f"({smallest:,} bits: every layer at {width} bits); raise it or offer smaller "
            "bit-widths"
        )
        raise BudgetTooSmall(msg, limit_bits=available, smallest_bits=smallest)
    if not offer.input_widths:
        return
    counts, width = [la.n_inputs for la in inventory.layers], offer.input_widths[0]
    for limit, taken, what in (
        (offer.total, sum(counts) * width, "all inputs together"),
        (offer.largest, max(counts) * width, "the largest input"),
    ):
        if limit is not None and taken > limit:
            msg = (
                f"a limit of {limit:,} bits for {what} is below what {width} bits take, "
                f"{taken:,} bits; raise it or offer smaller activation bit-widths"
            )
            raise BudgetTooSmall(msg, limit_bits=limit, smallest_bits=taken)


def _learner(
    module: nn.Module,
    inventory: Inventory,
    offer: _Offer,
    recipe: str,
    start: Sequence[Candidate] | None,
    data: CalibrationSet,
    settings: TrainingSettings,
) -> BitLearner:
    layers = inventory.layers
    least, most = offer.widths[0], offer.widths[-1]
    price = PRICES[offer.weights.resource]
    smallest = sum(price(offer.table[la.name][least]) for la in layers)
    overhead = smallest - least * inventory.n_weights
    started = None if start is None else {c.layer: float(c.weight_bits) for c in start}
    if started is not None and (missing := [la.name for la in layers if la.name not in started]):
        msg = f"the plan to start from must have every layer; it lacks {', '.join(missing)}"
        raise InvalidInput(msg, layers=missing)
    inputs = None
    if offer.input_widths:
        fit, _ = data.split(settings.holdout_fraction, settings.seed)
        high = min(offer.input_widths[-1], START_BITS)
        grids = calibrated_inputs(module, inventory, fit, dict.fromkeys(offer.table, high))
        watched = [la for la in layers if la.name in grids]
        inputs = LearnedInputBits(
            watched,
            [grids[la.name] for la in watched],
            least=offer.input_widths[0],
            most=offer.input_widths[-1],
        )
    return RECIPES[recipe](
        module,
        layers,
        float(offer.weights.available - overhead),
        least=float(least),
        most=float(most),
        per_channel=offer.scheme.granularity is not Granularity.TENSOR and recipe != "uhlich2020",
        start_bits=None if started is None else [started[la.name] for la in layers],
        inputs=inputs,
        input_limits=(offer.total, offer.largest),
    )


def _with_inputs(
    inventory: Inventory,
    chosen: Sequence[Candidate],
    inputs: LearnedInputBits,
    offer: _Offer,
    method: str,
) -> tuple[Candidate, ...]:
    """Return the candidates with whole input bit-widths within the limits exactly.

    An integer input stays as it is and counts at 32 bits, like everywhere.
    """
    relaxed = dict(zip(inputs.at, inputs.relaxed_bits().detach().tolist(), strict=True))
    prices = []
    for la in inputs.layers:
        allowed = [
            b for b in offer.input_widths
            if offer.largest is None or la.n_inputs * b <= offer.largest
        ]  # fmt: skip
        prices.append({b: la.n_inputs * b for b in allowed})
    untouched = sum(
        la.n_inputs * FULL_PRECISION_BITS for la in inventory.layers if la.name not in relaxed
    )
    limit = None if offer.total is None else offer.total - untouched
    bits = whole_widths([relaxed[la.name] for la in inputs.layers], prices, limit)
    by_layer = dict(zip(relaxed, bits, strict=True))
    return tuple(
        trained_candidate(
            method,
            la,
            Candidate.of(la, c.weight_bits, c.scheme, by_layer.get(la.name)),
        )
        for la, c in zip(inventory.layers, chosen, strict=True)
    )
