"""What training starts from: the model on its device, ending where its loss is measured.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.models.binding import bound
from bitquota.models.running import choose_device, primary_output
from bitquota.models.samples import check_calibration
from bitquota.request import AUTO_LOSS
from bitquota.sensitivity.outputs import read_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import PlanOutput
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.finetune import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A model and samples that training can begin with.

    Attributes:
        model: On its device in eval mode; its output is what the loss is about.
        plain: The same weights, returning what the model returns.
        samples: On that device, bound to the model's inputs.
        loss: Distance to the full-precision output.
        outputs: What the outputs were taken for; ``None`` with a loss of one's own.
        kind: What is scored besides (``evaluate.metrics.compare_models``).
    """

    model: LoadedModel
    plain: LoadedModel
    samples: CalibrationSet
    loss: Loss
    outputs: tuple[PlanOutput, ...] | None
    kind: str

    def found(self) -> tuple[PlanOutput, ...] | None:
        """Return the outputs without what a plan did to them."""
        if self.outputs is None:
            return None
        return tuple(
            replace(o, changed=None, relative_error=None, correlation=None) for o in self.outputs
        )

    def as_it_returns(self, trained: TrainedModel) -> TrainedModel:
        """Return what was trained, with modules that return what the model returns."""
        if self.model is self.plain:
            return trained
        return replace(
            trained,
            module=self.returning(trained.module),
            latents=self.returning(trained.latents),
        )

    def returning(self, trained: nn.Module) -> nn.Module:
        """Return a trained module as one that returns what the model returns."""
        return _with_weights_of(trained, self.plain.module)

    def as_it_is_measured(self, trained: TrainedModel) -> TrainedModel:
        """Return what was trained, with a module that ends where the loss is measured."""
        if self.model is self.plain:
            return trained
        return replace(trained, module=_with_weights_of(trained.module, self.model.module))


def prepared(
    model: LoadedModel,
    data: CalibrationSet,
    *,
    loss: str | Loss = AUTO_LOSS,
    outputs: Sequence[str] = (),
    known: Sequence[PlanOutput] | None = None,
    context: Context | None = None,
) -> Prepared:
    """Return a copy of ``model`` that training may run, and what it is to minimise.

    Args:
        model: As it was loaded.
        data: Training samples.
        loss: A name as in ``PlanRequest``, or a loss of one's own such as ``CustomLoss``.
        outputs: Which outputs count, as in ``PlanRequest``.
        known: What a plan found already; nothing is chosen anew then.
        context: Where to run.

    Raises:
        InvalidInput: The model can only be run, or no loss fits its output.
        InvalidCalibration: It does not take the samples.

    Cost: a copy of the model, and a few passes.
    """
    where = choose_device((context or Context()).device)
    data = bound(model, data)
    check_calibration(model, data)
    module, samples = copy.deepcopy(model.module).to(where).eval(), data.to(where)
    with torch.enable_grad():
        output = primary_output(module(*samples.first(2).inputs))
    if not output.requires_grad:
        msg = (
            f"training needs a model that torch can differentiate; '{model.source}' "
            f"({model.architecture}) can only be run: provide a .pt2, a Hugging Face folder or a "
            "factory"
        )
        raise InvalidInput(msg, source=model.source)
    plain = replace(model, module=module)
    if not isinstance(loss, str):
        return Prepared(
            model=plain, plain=plain, samples=samples, loss=loss, outputs=None, kind="outputs"
        )
    read = read_outputs(plain, samples, loss=loss, outputs=outputs, known=known, demand=False)
    return Prepared(
        model=read.model,
        plain=plain,
        samples=samples,
        loss=read.loss,
        outputs=read.outputs,
        kind="logits" if read.has_classes else "outputs",
    )


def _with_weights_of(source: nn.Module, module: nn.Module) -> nn.Module:
    """Return ``source``'s weights in a module that is called like ``module``.

    Both have the same parts; only the class, which says what is returned, differs.
    """
    other = copy.copy(source)
    other.__class__ = type(module)
    return other
