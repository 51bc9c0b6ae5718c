"""From a model to quantized files in one call.

Design: docs/design/client.md
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bitquota.exports.export import export_plan
from bitquota.exports.names import check_folder, usual_target
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import LoadedModel, finish
from bitquota.models.samples import load_calibration
from bitquota.models.sources import tokenizer_of
from bitquota.report.model_card import write_card
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate

if TYPE_CHECKING:
    from bitquota.context import Context
    from bitquota.plan import Plan


def quantize(
    model: str | Path | nn.Module,
    calibration: str | Path | Tensor | tuple[Tensor, ...] | CalibrationSet,
    budget: str,
    out: str | Path,
    *,
    target: str | None = None,
    context: Context | None = None,
    **settings: Any,  # noqa: ANN401  # fields of several types
) -> Plan:
    """Plan a model within a budget and write the quantized files; the plan is returned.

    Args:
        model: A module in memory, which stays as it is, or what the command line takes: a folder,
            a file, a factory ``package.module:function``.
        calibration: Inputs in memory, ``[N, ...]`` each, a calibration set with labels, or what
            the command line takes: a file, or a factory.
        budget: Such as ``3 bits`` or ``4.25 bpw``.
        out: Folder to write, new or empty: the files, ``plan.json``, ``receipt.json``, and a model
            card.
        target: Deployment target; by default one that suits the model.
        context: Device, cancellation, ledger and the like; by default the processor alone.
        **settings: Further fields of ``PlanRequest``, such as ``effort="quick"``.

    Raises:
        BitquotaError: As ``allocate`` and ``export_plan`` do.
        TypeError: ``PlanRequest`` has no such field.

    Cost: that of ``allocate`` and ``export_plan``.
    """
    folder = Path(out)
    check_folder(folder)
    source = None if isinstance(model, nn.Module) else str(model)
    name = target or usual_target(source)[0]
    request = PlanRequest(budgets=(budget,), target=name, **settings)
    loaded, samples = _loaded(model), _samples(calibration, source)
    made = allocate(loaded, samples, request, context=context)
    (plan,) = made.plans
    report = export_plan(made.with_weights(loaded), plan, folder, target=name, samples=samples)
    write_card(folder, plan, report)
    return plan


def _loaded(model: str | Path | nn.Module) -> LoadedModel:
    if not isinstance(model, nn.Module):
        return load_model(str(model))
    kind = type(model).__qualname__
    return finish(copy.deepcopy(model), source=kind, architecture=kind)


def _samples(
    given: str | Path | Tensor | tuple[Tensor, ...] | CalibrationSet, source: str | None
) -> CalibrationSet:
    match given:
        case CalibrationSet():
            return given
        case Tensor():
            return CalibrationSet(inputs=(given,))
        case tuple():
            return CalibrationSet(inputs=given)
    spec = str(given)
    tokenizer = None if source is None else tokenizer_of(spec, model=source, tokenizer=None)
    return load_calibration(spec, tokenizer=tokenizer)
