"""A plan applied to the model that it was made for."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

from bitquota.corrections import REWRITTEN, Correction
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.models.layout import from_matrix
from bitquota.models.loaded import in_memory
from bitquota.models.on_demand import on_demand
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import fold_batch_norm
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.quantizers.imatrix import check_importance
from bitquota.quantizers.kv_cache import put_caches
from bitquota.quantizers.quantized_model import shipped_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.quantizers.fitted import Fitted
    from bitquota.quantizers.quantized_model import QuantizedModel


def full_precision_module(
    model: LoadedModel, plan: Plan, samples: CalibrationSet | None
) -> nn.Module:
    """Return a copy of the model in eval mode as it is before the plan quantizes it.

    Batch norms are folded, values turned and channels scaled, if the plan says so. Two of
    ``samples`` show how the graph runs, by default the model's own example.

    Raises:
        InvalidInput: Batch norms are to be folded and there is no sample.
        StalePlan: Weights are to be changed, and the plan's quantized weights were not given.
        InvalidPlan: They are not those of such a plan.
    """
    module = copy.deepcopy(model.module).eval()
    if Correction.FOLD_BATCH_NORM in plan.corrections:
        module = fold_batch_norm(module, _example(model, samples))
    if rewritten := REWRITTEN & set(plan.corrections):
        shipped = shipped_weights(plan, model)
        if shipped is None:
            msg = (
                f"a plan with the correction '{min(rewritten)}' must name its quantized weights, "
                "which say how the model was changed before; this one names none: plan again"
            )
            raise InvalidPlan(msg)
        shipped.rewrite(module, plan.inventory)
    return module


def runs_from_files(plan: Plan, model: LoadedModel) -> bool:
    """Return whether the model can run under a plan while its weights stay in their files.

    The plan must have the codes of all its layers beside it and change nothing else.
    """
    changed = plan.corrections or any(a.candidate.activation_bits for a in plan.assignments)
    return model.pages is not None and plan.weights is not None and not changed


def run_from_files(model: LoadedModel, plan: Plan, weights: QuantizedModel) -> nn.Module:
    """Return a model whose weights stay in files as a plan has it; each layer is read when it runs.

    Args:
        model: With its weights in files (``runs_from_files``).
        plan: Made for it.
        weights: The plan's codes.
    """

    def read(layer: Layer) -> Tensor:
        return from_matrix(weights.weights[layer.name].dequantize(), layer)

    layers = {a.layer.name: a.layer for a in plan.assignments}
    readers = {layers[n].weight_name: partial(read, layers[n]) for n in weights.weights}
    return put_caches(on_demand(model, readers), plan.candidates)


def quantizers_of(
    plan: Plan,
    model: LoadedModel,
    module: nn.Module,
    candidates: Sequence[Candidate],
    samples: CalibrationSet | None,
) -> Fitted:
    """Return the quantizers of ``candidates``, fitted to ``samples`` as the plan's request says.

    Args:
        plan: Whose request and importance matrix count.
        model: The model that the plan was made for.
        module: From ``full_precision_module``.
        candidates: The plan's, or others for its layers.
        samples: Unlabelled samples; ``None`` will do where nothing is fitted to inputs.

    Raises:
        StalePlan: The plan was made with another importance matrix, or with one and got none.
        InvalidInput: Activation ranges or error feedback, and no samples.
    """
    return fit_quantizers(
        module,
        plan.inventory,
        [c for c in candidates if not c.cached],
        samples,
        activation_fit=plan.activation_fit,
        importance=check_importance(plan, model.imatrix),
        rounding=plan.rounding,
    )


def quantized_module(
    model: LoadedModel,
    plan: Plan,
    candidates: Sequence[Candidate] | None = None,
    *,
    correction_data: CalibrationSet | None = None,
    fit_data: CalibrationSet | None = None,
    example: CalibrationSet | None = None,
) -> nn.Module:
    """Return a copy of the model under a plan, fake-quantized, with the plan's corrections.

    The weights are those that were written beside the plan, with what corrections changed, if it
    names any; else they are quantized now.

    Args:
        model: The model that the plan was made for, on the device where it will run.
        plan: What to apply.
        candidates: Others than the plan's own, one for each of its layers and caches.
        correction_data: Unlabelled samples for the corrections.
        fit_data: Samples for activation ranges and error feedback, by default those.
        example: Any two samples, for plans that fold batch norms and have no other samples.

    Raises:
        StalePlan: The plan was made with another importance matrix, or with one and got none.
        InvalidInput: Corrections, activation ranges or error feedback, and no data for them.
        InvalidPlan: The file of quantized weights is not what the plan says.

    Cost: none with quantized weights beside the plan; else the passes of ``fit_quantizers`` and
    of the corrections.
    """
    fit_data = correction_data if fit_data is None else fit_data
    own = plan.candidates
    chosen = own if candidates is None else tuple(candidates)
    if chosen == own and runs_from_files(plan, model):
        shipped = shipped_weights(plan, model)
        assert shipped is not None  # noqa: S101  # the plan names them
        return run_from_files(model, plan, shipped)
    model = in_memory(model)
    module = full_precision_module(model, plan, example if fit_data is None else fit_data)
    if chosen == own and (shipped := shipped_weights(plan, model)) is not None:
        return put_caches(shipped.put_into(module, plan.inventory), own)
    return apply_plan(
        module,
        plan.inventory,
        chosen,
        corrections=plan.corrections,
        correction_data=correction_data,
        fitted=quantizers_of(plan, model, module, chosen, fit_data),
    )


def _example(model: LoadedModel, data: CalibrationSet | None) -> tuple[Tensor, ...]:
    if data is not None:
        return tuple(t[:2] for t in data.inputs)
    if model.example_inputs is not None:
        return model.example_inputs
    msg = "folding batch norms needs one sample to trace the graph: provide samples"
    raise InvalidInput(msg)
