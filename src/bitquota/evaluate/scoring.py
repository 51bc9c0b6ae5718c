"""Score plans and exported files on one set, beside full precision and uniform at their bytes.

Design: docs/design/evaluation.md
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS, Rounding
from bitquota.candidates.targets import candidates_at, target_by_name
from bitquota.errors import InvalidInput
from bitquota.evaluate.metrics import compare_models
from bitquota.evaluate.scores import FULL_PRECISION, Score
from bitquota.exports.prepared import folded_module, inventory_of
from bitquota.models.loaded import check_model
from bitquota.quantizers.apply import QuantizedWeights, apply_plan
from bitquota.quantizers.channel_fit import collect_by
from bitquota.quantizers.input_moments import input_grams
from bitquota.sensitivity.importers import check_importance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan

_UNIFORM_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    kind: str
    module: Callable[..., Tensor]
    size_bits: int | None = None
    beside: tuple[str, ...] = ()


def score_plans(
    model: LoadedModel,
    data: CalibrationSet,
    *,
    plans: Mapping[str, Plan] | None = None,
    exported: Sequence[Path] = (),
    original: LoadedModel | None = None,
    correction_data: CalibrationSet | None = None,
    with_uniform: bool = True,
    with_baselines: bool = False,
    kind: str = "logits",
    custom: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] | None = None,
    device: str = "cpu",
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
        with_uniform: Also run, for each plan, the widest uniform plan of no more bytes.
        with_baselines: Also run every baseline that a plan was measured beside.
        kind: ``logits`` or ``embedding``.
        custom: Own metrics: ``f(output, labels) -> [N]``.
        device: Where torch runs; exported files run on the CPU.

    Raises:
        StalePlan: A plan or export is of another model.
        InvalidInput: Corrections without ``correction_data``, an export that cannot run here, or
            an original that has other layers than a plan.
        ExportFailed: Exported files that were changed.
        MeasurementFailed: Outputs that are not finite.

    Cost: one pass of every model; its corrections' passes besides.
    """
    from bitquota.exports.export import open_export

    untrained = model if original is None else original
    entries = {
        FULL_PRECISION: _Entry(
            kind=FULL_PRECISION, module=_running(untrained.module.eval(), device), size_bits=None
        )
    }

    def add(
        name: str, what: str, plan: Plan, chosen: Sequence[Candidate], beside: tuple[str, ...]
    ) -> str:
        source = model if what == "plan" else untrained
        module = quantized_module(source, plan, chosen, correction_data=correction_data)
        size = sum(c.size_bits for c in chosen)
        entries[name] = _Entry(
            kind=what, module=_running(module, device), size_bits=size, beside=beside
        )
        return name

    references: dict[str, tuple[str, ...]] = {}
    uniforms: dict[str, tuple[Plan, tuple[Candidate, ...]]] = {}

    def beside_of(plan: Plan, label: str) -> tuple[str, ...]:
        key = plan.digest()
        if key not in references:
            _check_layers(plan, untrained)
            found = [FULL_PRECISION]
            uniform = uniform_candidates(plan) if with_uniform else None
            if uniform is not None:
                width, chosen = uniform
                found.append(f"uniform W{width} ({label})")
                uniforms[found[-1]] = plan, chosen
            references[key] = tuple(found)
        return references[key]

    known: dict[str, str] = {}
    for name, plan in (plans or {}).items():
        check_model(plan, model)
        beside = beside_of(plan, name)
        known[plan.digest()] = add(
            name, "plan", plan, [a.candidate for a in plan.assignments], beside
        )
        for baseline in plan.baselines if with_baselines else ():
            chosen = candidates_at(plan, baseline.weight_bits)
            add(f"{baseline.name} of {name}", "baseline", plan, chosen, (FULL_PRECISION, name))
    for folder in exported:
        module, plan, _ = open_export(model, folder, correction_data=correction_data)
        beside = beside_of(plan, str(folder))
        if plan.digest() in known:
            beside = (*beside, known[plan.digest()])
        name = str(folder)
        if name in entries:
            msg = f"every plan and export needs a name of its own; '{name}' was given twice"
            raise InvalidInput(msg, name=name)
        entries[name] = _Entry(
            kind="exported", module=module, size_bits=plan.size_bits, beside=beside
        )
    for name, (plan, chosen) in uniforms.items():
        add(name, "uniform", plan, chosen, (FULL_PRECISION,))
    scores = compare_models(
        {name: entry.module for name, entry in entries.items()},
        data,
        kind=kind,
        custom=custom,
        batch_size=_BATCH,
    )
    return [
        Score(
            name=name,
            kind=entry.kind,
            size_bits=entry.size_bits,
            metrics=found.metrics,
            kl_tail=found.kl_tail,
            perplexity=found.perplexity,
            differences={other: found.differences[other] for other in entry.beside},
        )
        for (name, entry), found in zip(entries.items(), scores, strict=True)
    ]


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
            chosen = candidates_at(plan, _nearest_widths(plan, bits))
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


def quantized_module(
    model: LoadedModel,
    plan: Plan,
    candidates: Sequence[Candidate],
    *,
    correction_data: CalibrationSet | None = None,
) -> nn.Module:
    """Return a copy of the model under ``candidates``, with the plan's corrections.

    Raises:
        InvalidInput: Corrections, activation ranges or error feedback, and no data for them.
    """
    module = folded_module(model, plan, correction_data)
    inventory = inventory_of(plan)
    needs_ranges = any(c.activation_bits is not None for c in candidates)
    needs_grams = any(
        c.scheme.rounding is Rounding.ERROR_FEEDBACK and c.weight_bits != FULL_PRECISION_BITS
        for c in candidates
    )
    if (needs_ranges or needs_grams) and correction_data is None:
        what = "ranges of activations are" if needs_ranges else "error feedback is"
        msg = f"{what} fitted on samples; hand in correction data, such as the calibration set"
        raise InvalidInput(msg)
    columns = check_importance(plan, model.imatrix, inventory)
    activations, grams = None, None
    if correction_data is not None and needs_ranges:
        batches = (b.inputs for b in correction_data.batches(_BATCH))
        request = plan.provenance.get("request") or {}
        fit = request.get("activation_fit", "mse")
        activations = collect_by(fit, module, inventory, batches)
    if correction_data is not None and needs_grams:
        grams = input_grams(module, inventory, (b.inputs for b in correction_data.batches(_BATCH)))
    return apply_plan(
        module,
        inventory,
        tuple(candidates),
        corrections=plan.corrections,
        correction_data=correction_data,
        activations=activations,
        weights=QuantizedWeights(module, inventory, grams, columns),
    )


def _running(module: nn.Module, device: str) -> Callable[..., Tensor]:
    if device == "cpu":
        return module
    moved = copy.deepcopy(module).to(device)  # the loaded model stays where it is

    def run(*inputs: Tensor) -> Tensor:
        output: Tensor = moved(*(tensor.to(device) for tensor in inputs))
        return output.cpu()

    return run
