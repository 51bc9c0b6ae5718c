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
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    GRID_BITS,
    PRUNED_BITS,
    Granularity,
    Grid,
    Scheme,
)
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.identity import model_fingerprint
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.activations import ACTIVATION_BITS
from bitquota.training.bit_learners import (
    BitLearner,
    BitPruningLearner,
    EllipsoidLearner,
    StabilisedLearner,
)
from bitquota.training.bit_sparsity import BitPlaneLearner, LastBitLearner
from bitquota.training.finetune import TrainedModel, finetune, measure_trained
from bitquota.training.gates import (
    GatedLearner,
    candidate_with,
    check_gates,
    gated_prices,
    has_gates,
)
from bitquota.training.input_quantizers import START_BITS, LearnedInputBits, calibrated_inputs
from bitquota.training.loop import TrainingRecord, train
from bitquota.training.prices import Prices
from bitquota.training.published_learners import PublishedLearner, PublishedPowersLearner
from bitquota.training.repair import repair
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trained_candidate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.gates import Kept

RECIPES: dict[str, type[BitLearner]] = {
    "stabilised": StabilisedLearner,
    "ellipsoid": EllipsoidLearner,
    "bitpruning": BitPruningLearner,
    "bsq": BitPlaneLearner,
    "msq": LastBitLearner,
    "djpq": GatedLearner,
    "uhlich2020": PublishedLearner,
    "uhlich2020_p3": PublishedPowersLearner,
}
"""Recipes by name, in order of preference."""

PUBLISHED = ("uhlich2020", "uhlich2020_p3")
"""Recipes that keep the published selection and settings, with one step per tensor."""

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

    ``uhlich2020`` and ``uhlich2020_p3`` as published: momentum SGD, a tenth of the rate at half and
    at three quarters, decay of quantizers like of weights, labels only; the rate is one of those
    that the paper tried for fine-tuning. The others: AdamW, and bit-widths that move four times as
    fast as steps.
    """
    if recipe in PUBLISHED:
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
        recipe: ``stabilised`` (default), ``ellipsoid``, ``bitpruning``, ``bsq``, ``msq``,
            ``djpq`` (output channels too), ``uhlich2020`` (as published), ``uhlich2020_p3`` (with
            powers of two).
        method: How the second phase trains (``finetune``), by default ``lsq``.
        activation_bits: Bit-widths on offer to layers' inputs; by default 2, 3, 4, 5, 6 and 8 where
            a budget limits them, otherwise inputs stay in full precision.
        settings: The first phase; by default ``default_settings``.
        finetuning: The second phase; by default ``following_settings`` of the first.
        distance: To the full-precision output, by default the divergence.
        kind: What is scored besides on the hold-out (``evaluate.metrics.compare_models``).
        checkpoint_folder: Folder for the checkpoints of both phases.
        context: Whom to tell, when to stop, and where to run.
    """

    scheme: Scheme | None
    recipe: str
    method: str
    activation_bits: Sequence[int]
    settings: TrainingSettings | None
    finetuning: TrainingSettings | None
    distance: Loss | None
    kind: str
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
        data: Training samples, labelled unless the recipe only distils; a hold-out of them selects,
            never the test set.
        budget: Limits, of which at least one is on weights: sizes, bit operations, times and
            energies by a cost table, and the inputs of layers (``activation_bits_total``,
            ``activation_bits_max``). All are met exactly.
        weight_bits: Bit-widths on offer, at least two of 2 to 16.
        start: A plan's candidates to start from, by default the recipe's own bit-widths.
        **options: How; see ``LearnOptions``.

    Raises:
        BudgetTooSmall: Even the smallest bit-widths do not fit.
        InvalidInput: An unknown recipe, bit-widths that cannot be learned, budgets that the recipe
            cannot hold, or a cost table without some candidate.
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
    if recipe == "uhlich2020_p3":
        scheme = replace(scheme, grid=Grid.POWER_OF_TWO)
        weight_bits = [b for b in weight_bits if b in GRID_BITS[Grid.POWER_OF_TWO]]
    settings = options.get("settings") or default_settings(recipe)
    finetuning = options.get("finetuning") or following_settings(settings)
    folder, context = options.get("checkpoint_folder"), options.get("context")
    budgets = (budget,) if isinstance(budget, Budget) else tuple(budget)
    inputs, input_widths = _inputs(
        module, inventory, data, settings, budgets, options.get("activation_bits", ())
    )
    gated = issubclass(RECIPES[recipe], GatedLearner)
    if gated:
        check_gates(scheme, compiled=settings.compiled)

    def price(kept: Kept, *, floor: bool = False) -> Prices:
        return _prices(
            inventory, budgets, weight_bits, inputs, input_widths, scheme, method, kept, floor=floor
        )

    prices = price({}, floor=gated)
    prices.check_weights_limited()
    learner = RECIPES[recipe](
        module,
        prices,
        per_channel=scheme.granularity is not Granularity.TENSOR and recipe not in PUBLISHED,
        start_bits=_start_bits(inventory, start),
        inputs=inputs,
    )
    identity = {
        "model": inventory.model_digest,
        "recipe": recipe,
        "budgets": [b.to_json() for b in budgets],
        "weight_bits": list(prices.widths),
        "activation_bits": input_widths,
        "scheme": scheme.to_json(),
        "start": None if start is None else [c.label for c in start],
    }
    # While bits still move, the last state is the one to go on from: an early epoch may look
    # better only because it had not paid for the limit yet. The published recipes select.
    phase = settings if recipe in PUBLISHED else replace(settings, patience=None)
    record = train(
        learner,
        module,
        data,
        phase,
        identity=identity,
        checkpoint=None if folder is None else folder / "learn.safetensors",
        stage="learn",
        loss=options.get("distance"),
        keep_last=recipe not in PUBLISHED,
        context=context,
    )
    learner.finish()
    relaxed = tuple(learner.relaxed_bits().detach().tolist())
    at = {la.name: k for k, la in enumerate(inventory.layers)}
    relaxed_inputs = {}
    if inputs is not None:
        learned = inputs.relaxed_bits().detach().tolist()
        relaxed_inputs = {at[la.name]: b for la, b in zip(inputs.layers, learned, strict=True)}
    if isinstance(learner, GatedLearner):
        prices = gated_prices(learner, price, scheme)
    chosen = repair(prices, relaxed, relaxed_inputs)
    trained = finetune(
        module,
        inventory,
        chosen,
        data,
        finetuning,
        method=method,
        start=learner.model,
        loss=options.get("distance"),
        checkpoint=None if folder is None else folder / "finetune.safetensors",
        context=context,
    )
    _, holdout = data.split(finetuning.holdout_fraction, finetuning.seed)
    digest = model_fingerprint(trained.module)
    plan = Plan(
        model_digest=digest,
        assignments=tuple(
            Assignment(layer=la, candidate=c)
            for la, c in zip(inventory.layers, trained.candidates, strict=True)
        ),
        unquantized=inventory.unquantized,
        budgets=tuple(b.of_model(digest) for b in budgets),
        selected=f"learned:{recipe}",
        measured=measure_trained(
            trained,
            module,
            holdout,
            loss=options.get("distance"),
            kind=options.get("kind", "logits"),
            batch_size=finetuning.micro_batch or 64,
        ),
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


def _inputs(
    module: nn.Module,
    inventory: Inventory,
    data: CalibrationSet,
    settings: TrainingSettings,
    budgets: Sequence[Budget],
    activation_bits: Sequence[int],
) -> tuple[LearnedInputBits | None, list[int]]:
    """Return the learned bit-widths of inputs, if there are any, and those on offer."""
    limited = any(b.resource in INPUT_RESOURCES for b in budgets)
    offered = sorted(set(activation_bits or (INPUT_WIDTHS if limited else ())))
    if unknown := [b for b in offered if b not in ACTIVATION_BITS]:
        allowed = ", ".join(map(str, ACTIVATION_BITS))
        msg = f"an activation bit-width must be one of {allowed}; got {unknown}"
        raise InvalidInput(msg, activation_bits=unknown)
    if not offered:
        return None, []
    fit, _ = data.split(settings.holdout_fraction, settings.seed)
    high = min(offered[-1], START_BITS)
    names = [la.name for la in inventory.layers]
    grids = calibrated_inputs(module, inventory, fit, dict.fromkeys(names, high))
    watched = [la for la in inventory.layers if la.name in grids]
    starts = [grids[la.name] for la in watched]
    inputs = LearnedInputBits(watched, starts, least=offered[0], most=offered[-1])
    inputs.channel_weight = settings.channel_weight
    return inputs, offered


def _prices(
    inventory: Inventory,
    budgets: Sequence[Budget],
    weight_bits: Sequence[int],
    inputs: LearnedInputBits | None,
    input_widths: Sequence[int],
    scheme: Scheme,
    method: str,
    kept: Kept,
    *,
    floor: bool,
) -> Prices:
    """Return what may be chosen, priced as it is stored in the end.

    Channels that are not ``kept`` have zero bits; with ``floor``, budgets may be as small as layers
    of zeros make them.
    """
    widths = sorted(set(weight_bits) - {FULL_PRECISION_BITS})
    if len(widths) < 2 or widths[0] < 2:
        msg = f"learning needs at least two bit-widths of 2 or more; got {sorted(weight_bits)}"
        raise InvalidInput(msg, weight_bits=sorted(weight_bits))
    learned = {} if inputs is None else inputs.at

    def candidate(layer: Layer, width: int, input_width: int | None) -> Candidate:
        # An integer input stays as it is and counts at 32 bits, like everywhere.
        at = input_width if layer.name in learned else None
        return trained_candidate(method, layer, candidate_with(layer, width, scheme, at, kept))

    def zeros(layer: Layer) -> Candidate:
        if has_gates(layer):
            return Candidate.of(layer, PRUNED_BITS, scheme)
        return candidate(layer, widths[0], None)

    return Prices.of(
        inventory.layers, budgets, widths, input_widths or (None,), candidate,
        zeros if floor else None,
    )  # fmt: skip


def _start_bits(inventory: Inventory, start: Sequence[Candidate] | None) -> list[float] | None:
    if start is None:
        return None
    started = {c.layer: float(c.weight_bits) for c in start}
    if missing := [la.name for la in inventory.layers if la.name not in started]:
        msg = f"the plan to start from must have every layer; it lacks {', '.join(missing)}"
        raise InvalidInput(msg, layers=missing)
    return [started[la.name] for la in inventory.layers]
