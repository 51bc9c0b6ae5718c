"""The bridge between plans and training: from a plan to trained weights, and back to a plan.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Unpack

import torch

import bitquota
from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme
from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.candidates.zero_bits import PRUNE
from bitquota.corrections import Correction
from bitquota.errors import BudgetTooSmall, InvalidInput, InvalidPlan
from bitquota.evaluate.metrics import BATCH, measure_module
from bitquota.models.identity import model_fingerprint
from bitquota.models.load import load_model
from bitquota.models.loaded import LoadedModel, check_model, inventory_of
from bitquota.models.pt2.module import dynamic_axes
from bitquota.plan import Assignment, Baseline, Plan
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.quantizers.planned import full_precision_module, quantized_module
from bitquota.request import AUTO_LOSS, PlanRequest
from bitquota.search.allocate import allocate
from bitquota.training.exported_inputs import hold_input_quantizers
from bitquota.training.finetune import TrainedModel, finetune, measure_trained
from bitquota.training.learn import LearnOptions, learn
from bitquota.training.prepared import prepared
from bitquota.training.saved import save_trained
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trained_candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from bitquota.candidates.cost_table import CostTable
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.quantizers.activations import ActivationQuantizer
    from bitquota.quantizers.channel_fit import ChannelRule
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.loop import TrainingRecord
    from bitquota.training.prepared import Prepared

BEFORE = "before training"
"""Name of the baseline that is the plan without training."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """Trained weights and the plan that they keep.

    Attributes:
        plan: Of the trained weights, measured on the hold-out part of the training data.
        model: The trained model.
        learning: What the phase that learned bit-widths did, if there was one.
    """

    plan: Plan
    model: TrainedModel
    learning: TrainingRecord | None = None

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` and ``trained.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.model, folder / "trained.safetensors")
        self.plan.save(folder / "plan.json")


def finetune_plan(
    model: LoadedModel,
    plan: Plan,
    data: CalibrationSet,
    settings: TrainingSettings | None = None,
    *,
    method: str = "lsq",
    symmetric: bool = False,
    input_rule: ChannelRule | None = None,
    start: nn.Module | None = None,
    loss: str | Loss | None = None,
    checkpoint: Path | None = None,
    context: Context | None = None,
) -> Trained:
    """Train ``model`` under ``plan``; the result's plan is of the trained weights.

    A plan with folded batch norms is trained folded. Statistics of batch norms that the plan would
    move are trained, and ship with the weights. The new plan has the old one without
    training as its baseline ``before training``, on the same hold-out samples.

    Args:
        model: The model that the plan was made for.
        plan: What to train under.
        data: Training samples; without labels the full-precision model is all that is followed.
            Never the test set.
        settings: How to train.
        method: ``lsq``, ``tqt`` or ``direct`` (``training.finetune.finetune``).
        symmetric: Keep the levels of codebooks mirrored.
        input_rule: How the first grids of quantized inputs weigh channels.
        start: Where the weights start; by default at the quantized weights beside the plan, or at
            the model's where there are none.
        loss: Distance to the full-precision output: a name as in ``PlanRequest`` or a loss of
            one's own (``CustomLoss``); by default what the plan was measured by.
        checkpoint: File for resuming.
        context: Whom to tell, when to stop, and where to run.

    Raises:
        StalePlan: The plan was made for another model.
        BudgetTooSmall: The format that ``direct`` stores takes more than the plan's budget.
        InvalidInput: See ``finetune``.
        Cancelled: The context said so; the checkpoint continues the run.

    Cost: that of the training, and two passes over the hold-out samples.
    """
    check_trainable(plan, model)
    settings = TrainingSettings() if settings is None else settings
    ready = prepared(
        model, data, loss=loss or AUTO_LOSS, known=None if loss else plan.outputs, context=context
    )
    placed, samples = ready.model, ready.samples
    module, inventory = full_precision_module(placed, plan, samples), plan.inventory
    stored = tuple(_stored_assignment(a, method) for a in plan.assignments)
    _check_budgets(plan, stored, method)
    if start is None and plan.weights is not None and model.weights:
        # Rounding to nearest would throw away what better rounding gained.
        start = quantized_module(placed, plan)

    # Train under the plan.
    trained = finetune(
        module,
        inventory,
        [a.candidate for a in plan.assignments],
        samples,
        settings,
        method=method,
        symmetric=symmetric,
        input_rule=input_rule,
        start=start,
        loss=ready.loss,
        checkpoint=checkpoint,
        context=context,
    )
    fit, holdout = samples.split(settings.holdout_fraction, settings.seed)
    batch_size = settings.micro_batch or BATCH
    measured = measure_trained(
        trained, module, holdout, loss=ready.loss, kind=ready.kind, batch_size=batch_size
    )
    trained = ready.as_it_returns(trained)

    # The plan of what was trained, measured on the hold-out part.
    digest = model_fingerprint(trained.module)
    made = Plan(
        model_digest=digest,
        assignments=stored,
        unquantized=plan.unquantized,
        budgets=tuple(b.of_model(digest) for b in plan.budgets),
        selected=f"trained:{method}",
        measured=measured,
        baselines=(_before(ready, plan, fit, holdout, batch_size),),
        loss=ready.loss.name,
        outputs=ready.found(),
        target=plan.target if _same_grids(plan.assignments, stored) else None,
        provenance={
            "plan": plan.digest(),
            "trained_from": plan.model_digest,
            "method": method,
            "settings": asdict(settings),
            "data": data.digest,
            "request": plan.provenance.get("request"),
            "bitquota": bitquota.__version__,
        },
    )
    return Trained(plan=made, model=trained)


def learn_plan(
    model: LoadedModel,
    data: CalibrationSet,
    budgets: Sequence[str],
    weight_bits: Sequence[int],
    *,
    start: Plan | None = None,
    ties: Sequence[Sequence[str]] = (),
    exclude: Sequence[str] = (),
    tables: Sequence[CostTable] = (),
    loss: str | Loss = AUTO_LOSS,
    outputs: Sequence[str] = (),
    **options: Unpack[LearnOptions],
) -> Trained:
    """Learn bit-widths for ``model`` within ``budgets``, and fine-tune under what was learned.

    Args:
        model: From ``bitquota.models.load_model``.
        data: Training samples; never the test set.
        budgets: One or more on weights, such as ``2.5 bits``, ``2 GBitOps`` or ``5 ms``, and
            perhaps on inputs, such as ``act total 96 KiB``; they hold together.
        weight_bits: Bit-widths on offer.
        start: A solved plan of the same model to start from.
        ties: Layers that must share a bit-width.
        exclude: Layers that stay in full precision.
        tables: Cost tables of the model, for budgets of time or energy.
        loss: Distance to the full-precision output: a name as in ``PlanRequest``, or a loss of
            one's own (``CustomLoss``).
        outputs: Which outputs count, as in ``PlanRequest``.
        **options: How; see ``training.learn.LearnOptions``.

    Raises:
        StalePlan: ``start`` is a plan of another model.
        InvalidBudget: A budget that cannot be read.
        BudgetTooSmall: Even the smallest bit-widths do not fit.
        InvalidInput: See ``training.learn.learn``.
        Cancelled: The context said so; the checkpoints continue the run.
    """
    if start is not None:
        check_model(start, model)
    ready = prepared(model, data, loss=loss, outputs=outputs, context=options.get("context"))
    module, samples = ready.model.module, ready.samples
    inventory = inventory_of(ready.plain.module, model, samples)
    if exclude:
        inventory = inventory.exclude(exclude)
    if ties:
        inventory = inventory.tie(ties)

    # Learn and train.
    texts = [part for text in budgets for part in text.split("+")]
    options["distance"], options["kind"] = ready.loss, ready.kind
    learned = learn(
        module,
        inventory,
        samples,
        [Budget.parse(text, inventory, tables) for text in texts],
        weight_bits,
        start=None if start is None else [a.candidate for a in start.assignments],
        **options,
    )

    # The request that would make such a plan, for solving again.
    request = PlanRequest(
        budgets=("+".join(texts),),
        weight_bits=tuple(weight_bits),
        scheme=options.get("scheme") or Scheme(),
        ties=tuple(tuple(tie) for tie in ties),
        exclude=tuple(exclude),
        loss=loss if isinstance(loss, str) else AUTO_LOSS,
        outputs=tuple(outputs),
        tables=tuple(tables),
        allow=(PRUNE,) if options.get("recipe") == "djpq" else (),
        corrections=(Correction.BATCH_NORM_STATISTICS,),
    )
    provenance = learned.plan.provenance | {
        "from_plan": None if start is None else start.digest(),
        "request": request.to_json(),
        "bitquota": bitquota.__version__,
    }
    trained = ready.as_it_returns(learned.trained)
    return Trained(
        plan=replace(
            _of_model(learned.plan, model_fingerprint(trained.module)),
            loss=ready.loss.name,
            outputs=ready.found(),
            provenance=provenance,
        ),
        model=trained,
        learning=learned.learning,
    )


def solve_around(
    model: LoadedModel,
    trained: Trained,
    data: CalibrationSet,
    settings: TrainingSettings | None = None,
    *,
    request: PlanRequest | None = None,
    method: str = "lsq",
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    context: Context | None = None,
) -> Trained:
    """Measure around trained weights, solve again, and train under what was found.

    Sensitivities are those of the full-precision weights that training moved (*latents*), so the
    bit-widths of the last plan are not privileged. The same budgets hold. The result competes with
    ``trained`` on the same hold-out samples, and the better of the two is returned.

    Args:
        model: The full-precision model; it teaches.
        trained: What to go on from.
        data: The training samples that ``trained`` was made with.
        settings: How to train.
        request: What to solve; by default the request on record in the plan, with its budgets.
        method: How to train.
        loss: A loss of one's own that ``trained`` was trained with.
        checkpoint: File for resuming.
        context: Whom to tell, when to stop, and where to run.

    Raises:
        InvalidPlan: The plan has no request on record, and none was given.
        Cancelled: The context said so.

    Cost: an allocation, and a training.
    """
    settings = TrainingSettings() if settings is None else settings
    if request is None:
        recorded = trained.plan.provenance.get("request")
        if recorded is None:
            msg = (
                "solving again needs the request that the plan was made with; this plan has none "
                "on record: make one with 'bitquota plan' or 'learn'"
            )
            raise InvalidPlan(msg)
        request = PlanRequest.from_json(recorded)
    budgets = "+".join(b.text for b in trained.plan.budgets if b.text)
    if not budgets:
        msg = "solving again needs the plan's budgets as they were asked for; this plan has none"
        raise InvalidPlan(msg)
    request = replace(request, budgets=(budgets,))

    # Allocate anew around the trained weights, on samples that training has seen.
    latents = trained.model.latents
    fit, holdout = data.split(settings.holdout_fraction, settings.seed)
    wanted = request.samples + request.holdout_samples
    measured = fit.first(max(wanted, request.correction_samples))
    module = copy.deepcopy(latents).cpu()
    # What is stored are the statistics of the quantized model; sensitivities start without error.
    reestimate_batch_norm(module, measured.to(torch.device("cpu")))
    around = replace(model, module=module, digest=model_fingerprint(module))
    tables = tuple(replace(t, model_digest=around.digest) for t in request.tables)
    request = replace(request, tables=tables)
    found = allocate(
        around,
        measured,
        request,
        loss=loss,
        context=context,
    )
    (plan,) = found.plans

    # Train under the new plan; the better of the two on the hold-out stays.
    again = finetune_plan(
        model,
        replace(
            _of_model(plan, model.digest), measured=None, baselines=(), proof=None, weights=None
        ),
        data,
        settings,
        method=method,
        start=latents,
        loss=loss,
        checkpoint=checkpoint,
        context=context,
    )
    ready = prepared(
        model, holdout, loss=loss or AUTO_LOSS, known=trained.plan.outputs, context=context
    )
    before = measure_trained(
        ready.as_it_is_measured(trained.model),
        ready.model.module,
        ready.samples,
        loss=ready.loss,
        kind=ready.kind,
        batch_size=settings.micro_batch or BATCH,
    )
    assert again.plan.measured is not None  # noqa: S101  # ``finetune_plan`` measures
    return again if again.plan.measured.mean < before.mean else trained


def write_pt2(trained: Trained, data: CalibrationSet, path: Path) -> Trained:
    """Write the trained model as a ``.pt2`` that takes any batch size, for every other command.

    Where inputs are quantized, their trained quantizers are part of the program. The plan that is
    returned names the model in the file, whose graph is that of the export.

    Raises:
        InvalidPlan: See ``training.exported_inputs.hold_input_quantizers``.
        InvalidModel: What was exported cannot be read back; then there is no file.
    """
    layers = {la.name: la.weight_name for la in trained.model.inventory.layers}
    digest = write_module(
        trained.model.module, data, path, {layers[k]: q for k, q in trained.model.inputs.items()}
    )
    return replace(trained, plan=_of_model(trained.plan, digest))


def write_module(
    module: nn.Module,
    data: CalibrationSet,
    path: Path,
    inputs: Mapping[str, ActivationQuantizer] | None = None,
) -> str:
    """Write a module as a ``.pt2`` that takes any batch size; return the digest of the model in it.

    Args:
        module: What is written; it stays as it is.
        data: At least two samples.
        path: The file.
        inputs: Quantizers of what is multiplied with weights, by name of the weight.

    Raises:
        InvalidPlan: See ``training.exported_inputs.hold_input_quantizers``.
        InvalidModel: What was exported cannot be read back; then there is no file.
    """
    samples = tuple(t.cpu() for t in data.first(2).inputs)
    module = copy.deepcopy(module).cpu().eval()
    batch = dynamic_axes(module, len(samples), {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(module, samples, dynamic_shapes=batch)
    hold_input_quantizers(program, dict(inputs or {}))
    try:
        torch.export.save(program, path)
        return load_model(str(path)).digest
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def check_trainable(plan: Plan, model: LoadedModel) -> None:
    """Raise unless ``plan`` was made for ``model`` and has grids that training can move.

    Raises:
        StalePlan: It was made for another model.
        InvalidInput: Grids of inputs are found token by token.
    """
    check_model(plan, model)
    if plan.activation_fit in DYNAMIC_FITS:
        msg = (
            f"training learns grids of inputs; the plan finds them token by token "
            f"({plan.activation_fit}): plan with another --activation-fit to train"
        )
        raise InvalidInput(msg, activation_fit=plan.activation_fit)


def _of_model(plan: Plan, digest: str) -> Plan:
    """Return the plan for a model of the same layers."""
    budgets = tuple(b.of_model(digest) for b in plan.budgets)
    return replace(plan, model_digest=digest, budgets=budgets)


def _stored_assignment(assignment: Assignment, method: str) -> Assignment:
    if assignment.candidate.weight_bits == FULL_PRECISION_BITS:
        return assignment
    candidate = trained_candidate(method, assignment.layer, assignment.candidate)
    return replace(assignment, candidate=candidate)


def _same_grids(planned: Sequence[Assignment], stored: Sequence[Assignment]) -> bool:
    """Whether training keeps what a target was asked for: it stores no codebooks."""
    pairs = zip(planned, stored, strict=True)
    return all(a.candidate.scheme.grid is b.candidate.scheme.grid for a, b in pairs)


def _check_budgets(plan: Plan, stored: Sequence[Assignment], method: str) -> None:
    """Raise where the format that training stores does not keep the plan's budgets."""
    try:
        replace(plan, assignments=tuple(stored), target=None)
    except InvalidPlan as err:
        msg = (
            f"method '{method}' stores levels instead of scales, which does not fit this plan: "
            f"{err.message}; plan with '--grid codebook', with a little less budget, or train "
            "with 'lsq'"
        )
        raise BudgetTooSmall(msg, method=method) from err


def _before(
    ready: Prepared, plan: Plan, fit: CalibrationSet, holdout: CalibrationSet, batch_size: int
) -> Baseline:
    """Measure the plan without training, its corrections included."""
    untrained = quantized_module(
        ready.model, plan, correction_data=fit.first(1024), fit_data=fit.first(512)
    )
    rows = tuple(a.candidate.row_bits for a in plan.assignments)
    return Baseline(
        name=BEFORE,
        weight_bits=plan.weight_bits,
        row_bits=rows if any(rows) else (),
        size_bits=plan.size_bits,
        measured=measure_module(
            untrained,
            ready.model.module,
            holdout,
            loss=ready.loss,
            kind=ready.kind,
            batch_size=batch_size,
        ),
    )
