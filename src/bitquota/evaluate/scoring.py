"""Score plans and exported files on one set, beside full precision and uniform at their bytes.

Design: docs/design/evaluation.md
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bitquota.candidates.targets import target_by_name
from bitquota.codec import Document
from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.evaluate.by_block import walked
from bitquota.evaluate.metrics import BATCH, compare_models, measured_loss
from bitquota.evaluate.scores import FULL_PRECISION, ModelScores, Score
from bitquota.exports.export import open_export
from bitquota.models.binding import bound
from bitquota.models.loaded import check_model, in_memory
from bitquota.models.on_demand import on_demand
from bitquota.models.outputs import joined, measuring
from bitquota.models.running import choose_device, run_module
from bitquota.models.samples import check_calibration
from bitquota.plan import MeasuredLoss
from bitquota.quantizers.planned import quantized_module, runs_from_files
from bitquota.request import AUTO_LOSS
from bitquota.sensitivity.outputs import Read, read_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.sensitivity.losses import Loss

_UNIFORM_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Document):
    """The loss of one choice on a labelled set.

    Attributes:
        plan_index: Which of the plans, or ``None`` for full precision.
        name: ``full precision``, ``plan``, or the baseline's name.
        measured: Loss increase and accuracy.
    """

    plan_index: int | None
    name: str
    measured: MeasuredLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    kind: str
    module: Callable[..., Tensor]
    size_bits: int | None = None
    beside: tuple[str, ...] = ()
    caches: tuple[Candidate, ...] = ()


def score_plans(
    model: LoadedModel,
    data: CalibrationSet,
    *,
    plans: Mapping[str, Plan] | None = None,
    exported: Sequence[Path] = (),
    original: LoadedModel | None = None,
    correction_data: CalibrationSet | None = None,
    fit_data: CalibrationSet | None = None,
    with_uniform: bool = True,
    with_baselines: bool = False,
    kind: str = "logits",
    custom: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] | None = None,
    loss: Loss | None = None,
    read: Read | None = None,
    context: Context | None = None,
) -> list[Score]:
    """Run full precision, plans and exported files on ``data`` and compare them pairwise.

    Args:
        model: What the plans were made for.
        data: Labelled samples, or windows of text (labels are the next tokens).
        plans: Name to plan: run fake-quantized.
        exported: Folders of ``export_plan``, run by their runtimes.
        original: Where ``model`` was trained under its plans, what it was trained from: then
            full precision, uniform and baselines are quantizations of this model.
        correction_data: Unlabelled samples for corrections, activation ranges and error
            feedback; ``data`` itself is never used for them.
        fit_data: Samples for activation ranges and error feedback, if not those.
        with_uniform: Also run, for each plan, the widest uniform plan of no more bytes; not of
            plans with quantized weights of their own where there is no data to round it alike.
        with_baselines: Also run every baseline that a plan was measured beside.
        kind: ``logits`` or ``embedding``.
        custom: Own metrics: ``f(output, labels) -> [N]``.
        loss: A loss to score as well, under its name.
        read: What the outputs are, if that is known; by default what the plans say, or what the
            answers on ``data`` show.
        context: Whom to tell after each batch, when to stop, and where torch runs; exported
            files run on the CPU.

    Raises:
        StalePlan: A plan or export is of another model.
        InvalidInput: Corrections without ``correction_data``, an export that cannot run here, or
            an original that has other layers than a plan.
        ExportFailed: Exported files that were changed.
        MeasurementFailed: Outputs that are not finite.

    Cost: one pass of every model; its corrections' passes besides. Weights that stay in files are
    read once where the model is a chain of blocks, else for each batch.
    """
    data = bound(model, data)
    context = context or Context()
    where = choose_device(context.device)
    plans = plans or {}
    # Weights stay in files where nothing needs all of them at once.
    fitting = with_baselines or correction_data is not None or fit_data is not None
    if where.type != "cpu" or fitting or original is not None:
        model = in_memory(model)
    if not all(runs_from_files(plan, model) for plan in plans.values()):
        model = in_memory(model)
    from_files = model if model.pages is not None else None
    if from_files is not None:
        model = replace(model, module=on_demand(model))
    if read is None:
        read = _reading(model, data, tuple(plans.values()), kind=kind)
    if kind == "logits":
        loss = read.loss if loss is None else loss
        kind = "logits" if read.has_classes else "outputs"
    check_calibration(read.model, data)
    correction_data = _bound_if_given(model, correction_data)
    fit_data = _bound_if_given(model, fit_data)
    here = _on(read.model, where)
    if original is not None and read.model is not model:
        original = replace(original, module=measuring(original.module, read.outputs))

    # Everything that is run, by name: full precision, plans and baselines, exports, uniform plans.
    lineup = _Lineup(
        model=here,
        original=here if original is None else _on(original, where),
        where=where,
        correction_data=None if correction_data is None else correction_data.to(where),
        fit_data=None if fit_data is None else fit_data.to(where),
        example=data.first(2).to(where),
        with_uniform=with_uniform,
    )
    inventories = [plan.inventory for plan in plans.values()]
    for name, plan in plans.items():
        lineup.add_plan(name, plan, with_baselines=with_baselines)
    for folder in exported:
        module, plan, _ = open_export(model, folder, correction_data=correction_data)
        inventories.append(plan.inventory)
        run = module if read.model is model else _reading_of(module, read)
        lineup.add_export(str(folder), plan, run)
    lineup.add_uniforms()

    # All of them on the same samples, each shown beside what it is to be compared with.
    models = {name: entry.module for name, entry in lineup.entries.items()}
    batch_size, before = _batch_size(read, inventories, context.memory_bytes), 0
    if from_files is not None:
        caches = {name: entry.caches for name, entry in lineup.entries.items()}
        models, before = walked(models, caches, from_files, data, batch_size, context)
    compared = compare_models(
        models,
        data,
        kind=kind,
        custom=custom,
        loss=loss,
        names=[output.name for output in read.outputs],
        batch_size=batch_size,
        before=before,
        context=context,
    )
    return [
        _score(name, entry, found)
        for (name, entry), found in zip(lineup.entries.items(), compared, strict=True)
    ]


def _batch_size(read: Read, inventories: Sequence[Inventory], memory_bytes: int) -> int:
    """Return how many samples run at once: activations, or the outputs of text, may be large.

    Outputs of a model and of the reference are counted in float32 and in float64.
    """
    values = sum(math.prod(output.shape) for output in read.outputs)
    at_once = min((each.samples_at_once(BATCH) for each in inventories), default=BATCH)
    return max(1, min(at_once, memory_bytes // 2 // (24 * max(1, values))))


def _bound_if_given(model: LoadedModel, data: CalibrationSet | None) -> CalibrationSet | None:
    return None if data is None else bound(model, data)


def _score(name: str, entry: _Entry, found: ModelScores) -> Score:
    """Return the score of an entry, with the differences to what it is shown beside."""
    return Score(
        name=name,
        kind=entry.kind,
        size_bits=entry.size_bits,
        metrics=found.metrics,
        kl_tail=found.kl_tail,
        perplexity=found.perplexity,
        differences={other: found.differences[other] for other in entry.beside},
    )


@dataclass(slots=True, kw_only=True)
class _Lineup:
    """What is compared, and beside what each is shown.

    Attributes:
        model: What the plans were made for.
        original: What it was trained from, or itself.
        where: Device of all torch models.
        correction_data: For corrections.
        fit_data: For activation ranges and error feedback.
        example: Two samples.
        with_uniform: Whether uniform plans are shown beside plans.
        entries: Everything that is run, by name.
    """

    model: LoadedModel
    original: LoadedModel
    where: torch.device
    correction_data: CalibrationSet | None
    fit_data: CalibrationSet | None
    example: CalibrationSet
    with_uniform: bool
    entries: dict[str, _Entry] = field(default_factory=dict)
    _references: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _uniforms: dict[str, tuple[Plan, tuple[Candidate, ...]]] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with full precision."""
        self.entries[FULL_PRECISION] = _Entry(
            kind=FULL_PRECISION, module=_running(self.original.module.eval(), self.where)
        )

    def add_plan(self, name: str, plan: Plan, *, with_baselines: bool) -> None:
        """Add a plan, and the baselines that it was measured beside."""
        check_model(plan, self.model)
        beside = self._beside(plan, name)
        self._names[plan.digest()] = name
        self._add(name, "plan", plan, plan.candidates, beside)
        for baseline in plan.baselines if with_baselines else ():
            cached = plan.caches_at(baseline.cache_bits)
            chosen = (*plan.candidates_of(baseline), *cached)
            beside = (FULL_PRECISION, name)
            self._add(f"{baseline.name} of {name}", "baseline", plan, chosen, beside)

    def add_export(self, name: str, plan: Plan, module: Callable[..., Tensor]) -> None:
        """Add exported files, shown also beside the plan that they were made from."""
        beside = self._beside(plan, name)
        if plan.digest() in self._names:
            beside = (*beside, self._names[plan.digest()])
        if name in self.entries:
            msg = f"every plan and export needs a name of its own; '{name}' was given twice"
            raise InvalidInput(msg, name=name)
        self.entries[name] = _Entry(
            kind="exported", module=module, size_bits=plan.size_bits, beside=beside
        )

    def add_uniforms(self) -> None:
        """Add the uniform plans that were named beside others."""
        for name, (plan, chosen) in self._uniforms.items():
            self._add(name, "uniform", plan, chosen, (FULL_PRECISION,))

    def _add(
        self, name: str, kind: str, plan: Plan, chosen: Sequence[Candidate], beside: tuple[str, ...]
    ) -> None:
        module = quantized_module(
            self.model if kind == "plan" else self.original,
            plan,
            chosen,
            correction_data=self.correction_data,
            fit_data=self.fit_data,
            example=self.example,
        )
        self.entries[name] = _Entry(
            kind=kind,
            module=_running(module, self.where),
            size_bits=sum(c.size_bits for c in chosen if not c.cached),
            beside=beside,
            caches=tuple(c for c in chosen if c.cached),
        )

    def _beside(self, plan: Plan, label: str) -> tuple[str, ...]:
        """Return what is shown beside a plan: full precision, and a uniform plan if wanted."""
        key = plan.digest()
        if key not in self._references:
            _check_layers(plan, self.original)
            found = [FULL_PRECISION]
            without = self.fit_data is None and self.correction_data is None
            alike = plan.rounding == "nearest" or not without
            uniform = uniform_candidates(plan) if self.with_uniform and alike else None
            if uniform is not None:
                width, chosen = uniform
                found.append(f"uniform W{width} ({label})")
                # With the KV cache of the plan: what differs is the weights.
                cached = (a.candidate for a in plan.caches)
                self._uniforms[found[-1]] = plan, (*chosen, *cached)
            self._references[key] = tuple(found)
        return self._references[key]


def evaluate_plans(
    model: LoadedModel,
    data: CalibrationSet,
    plans: Sequence[Plan],
    *,
    correction_data: CalibrationSet | None = None,
    with_baselines: bool = False,
    loss: str = AUTO_LOSS,
    context: Context | None = None,
) -> list[Evaluation]:
    """Measure one loss in full precision and under each plan on ``data``; see ``score_plans``.

    Args:
        model: The model that the plans were made for.
        data: Samples, labelled if accuracies are wanted.
        plans: What to evaluate.
        correction_data: Unlabelled samples for corrections, activation ranges and error
            feedback; ``data`` itself is never used for them.
        with_baselines: Also evaluate every baseline of every plan, with the plan's corrections.
        loss: Name of the loss, for plans that do not say what they were measured by.
        context: Whom to tell, when to stop, and where to run.

    Raises:
        StalePlan: A plan was made for another model, or with another importance matrix.
        InvalidInput: A plan needs ``correction_data`` and it is missing.

    Cost: a forward pass over ``data`` for full precision and for each choice.
    """
    data = bound(model, data)
    read = _reading(model, data, plans, loss=loss)
    function = read.loss
    scores = score_plans(
        model,
        data,
        plans={f"plan {k + 1}": plan for k, plan in enumerate(plans)},
        correction_data=correction_data,
        with_uniform=False,
        with_baselines=with_baselines,
        loss=function,
        read=read,
        context=context,
    )
    names: list[tuple[int | None, str]] = [(None, FULL_PRECISION)]
    for k, plan in enumerate(plans):
        names.append((k, "plan"))
        names += [(k, b.name) for b in plan.baselines if with_baselines]
    labelled = data.labels is not None
    return [
        Evaluation(
            plan_index=k,
            name=name,
            measured=measured_loss(score, function, labelled=labelled),
        )
        for (k, name), score in zip(names, scores, strict=True)
    ]


def _reading(
    model: LoadedModel,
    data: CalibrationSet,
    plans: Sequence[Plan],
    *,
    loss: str = AUTO_LOSS,
    kind: str = "logits",
) -> Read:
    """Return what the outputs are: as a plan says, else as the answers show."""
    known = next((plan.outputs for plan in plans if plan.outputs), None)
    if kind == "embedding":
        return read_outputs(model, data, loss="mse")
    return read_outputs(model, data, loss=loss, known=known, demand=False)


def _reading_of(module: Callable[..., Any], read: Read) -> Callable[..., Tensor]:
    """Return an exported module in the space of the loss."""
    run = getattr(module, "all_outputs", module)
    return lambda *inputs: joined(run(*inputs), read.outputs)


def _check_layers(plan: Plan, original: LoadedModel) -> None:
    shapes = {name: tuple(p.shape) for name, p in original.module.named_parameters()}
    for assignment in plan.assignments:
        layer = assignment.layer
        if shapes.get(layer.weight_name) != layer.weight_shape:
            msg = (
                f"the original must have the plan's layers; '{original.source}' has no weight "
                f"'{layer.weight_name}' of shape {list(layer.weight_shape)}: name the model that "
                f"the plan's was trained from"
            )
            raise InvalidInput(msg, layer=layer.name)


def uniform_candidates(plan: Plan) -> tuple[int, tuple[Candidate, ...]] | None:
    """Return the widest uniform plan that takes no more bytes than ``plan``, and its bit-width.

    Where a target cannot store a layer at that width, the layer takes the nearest above that it
    can. ``None`` if even the narrowest is larger.
    """
    best = None
    for bits in _UNIFORM_WIDTHS:
        try:
            chosen = plan.candidates_at(_nearest_widths(plan, bits))
        except InvalidInput:  # a grid that has not this width
            continue
        size = sum(c.size_bits for c in chosen)
        if size <= plan.size_bits and bits in {c.weight_bits for c in chosen}:
            best = bits, chosen
    return best


def _nearest_widths(plan: Plan, bits: int) -> tuple[int, ...]:
    if plan.target is None:
        return (bits,) * len(plan.assignments)
    target = target_by_name(plan.target.name)
    widths = []
    for a in plan.assignments:
        legal = [f.weight_bits for f in target.formats_for(a.layer)]
        widths.append(min((b for b in legal if b >= bits), default=max(legal)))
    return tuple(widths)


def _on(model: LoadedModel, device: torch.device) -> LoadedModel:
    """Return the model on ``device``; what was handed in stays where it is."""
    if device.type == "cpu":
        return model
    return replace(model, module=copy.deepcopy(model.module).to(device))


def _running(module: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    if device.type == "cpu":
        return module

    def run(*inputs: Tensor) -> Tensor:
        return run_module(module, tuple(tensor.to(device) for tensor in inputs)).cpu()

    return run
