"""Apply a choice of candidates to a model, and measure what it really costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.context import Context
from bitquota.evaluate.effects import effect_sums, with_effects
from bitquota.models.references import References
from bitquota.models.running import (
    DEFAULT_CHUNK,
    cut,
    inputs_of,
    labels_of,
    put_in_eval_mode,
    run_module,
)
from bitquota.plan import MeasuredLoss
from bitquota.quantizers.apply import apply_plan, as_change
from bitquota.sensitivity.base import CODE_VERSION
from bitquota.sensitivity.cache import ledger_key
from bitquota.sensitivity.losses import key_of, n_right
from bitquota.sensitivity.recorder import checked_losses, standard_error
from bitquota.sensitivity.runners.base import describe_change

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.corrections import Correction
    from bitquota.models.calibration import CalibrationSet
    from bitquota.plan import PlanOutput
    from bitquota.quantizers.fitted import Fitted
    from bitquota.sensitivity.losses import Loss


SMALL_OUTPUT = 2**22
"""Elements of the outputs of a chunk up to which their sums cost little beside the pass itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChoiceLoss:
    """What a choice costs on every sample.

    Attributes:
        per_sample: f64[N], loss of the quantized model minus that of the full-precision model.
        correct: f64[N], share of right answers of each sample, or ``None`` without labels.
        unit: Unit of ``per_sample``.
        outputs: The outputs with what the choice changes in them, where that was asked for.
    """

    per_sample: NDArray[np.float64]
    correct: NDArray[np.float64] | None = None
    unit: str = "nats/sample"
    outputs: tuple[PlanOutput, ...] | None = None

    @property
    def mean(self) -> float:
        """Mean loss increase."""
        return float(self.per_sample.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of ``mean`` over samples."""
        return float(standard_error(self.per_sample))

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy between 0 and 1, or ``None`` without labels."""
        return None if self.correct is None else float(self.correct.mean())

    @property
    def measured(self) -> MeasuredLoss:
        """The summary that a plan stores."""
        return MeasuredLoss(
            mean=self.mean,
            standard_error=self.standard_error,
            n_samples=len(self.per_sample),
            unit=self.unit,
            accuracy=self.accuracy,
        )

    def paired(self, other: ChoiceLoss) -> tuple[float, float]:
        """Return mean and standard error of (this loss minus the other's), sample by sample."""
        difference = self.per_sample - other.per_sample
        return float(difference.mean()), float(standard_error(difference))


def measure_choice(
    module: nn.Module,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    calibration: CalibrationSet,
    loss: Loss,
    *,
    corrections: Sequence[Correction] = (),
    correction_data: CalibrationSet | None = None,
    fitted: Fitted | None = None,
    context: Context | None = None,
    stage: str = "choice",
    batch_size: int = DEFAULT_CHUNK,
    references: References | None = None,
    outputs: Sequence[PlanOutput] = (),
    with_outputs: bool = False,
    make: Callable[[], nn.Module] | None = None,
    walk: Callable[[], Iterator[Walked]] | None = None,
) -> ChoiceLoss:
    """Measure the loss increase of a choice on ``calibration``, corrections included.

    Cost: two passes (full precision and quantized) and the passes of the corrections; what the
    ledger holds is not run again, nor the full precision that ``references`` keep: one value for
    all choices on the same module, samples, correction data and batch size. Exact up to the
    model's own arithmetic. Arguments as in ``apply_plan``; ``candidates`` may be empty for the
    full-precision model. What changes in ``outputs`` is noted in the ledger on the way where they
    are small, and returned if ``with_outputs``: then the choice is run again only where they are
    large. ``make`` returns the quantized model where the caller has it, or keeps it. ``walk``
    yields the outputs themselves, for batches of ``batch_size`` in their order, where the quantized
    model is never there as a whole.

    Raises:
        InvalidCalibration: The model does not accept the samples, or labels are missing.
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so.
    """
    put_in_eval_mode(module)
    context = context or Context()
    references = References() if references is None else references
    chunks = cut(len(calibration), batch_size)
    common = {
        "kind": "choice",
        "code": CODE_VERSION,
        "model": inventory.model_digest,
        "data": calibration.digest,
        "loss": key_of(loss),
    }
    plan = {
        "change": describe_change(as_change(candidates)),
        "corrections": [str(c) for c in corrections],
        "origin": "" if fitted is None else fitted.origin,
        "correction_data": correction_data.to_json() if corrections and correction_data else None,
    }

    def key(chunk: range, variant: object) -> str:
        rows = list(calibration.indices[chunk.start : chunk.stop])
        return ledger_key({**common, "indices": rows, "variant": variant})

    rounded = partial(
        apply_plan,
        module,
        inventory,
        candidates,
        corrections=corrections,
        correction_data=correction_data,
        fitted=fitted,
        references=references,
    )
    quantized = cache(make or rounded)
    walked = None if walk is None else _InOrder(walk)

    # Chunk by chunk: losses in full precision and under the choice, measured where not known.
    increases: list[NDArray[np.float64]] = []
    correct: list[NDArray[np.float64]] = []
    sums: list[NDArray[np.float64]] = []
    for done, chunk in enumerate(chunks):
        context.check(stage)
        inputs, labels = inputs_of(calibration, chunk), labels_of(calibration, chunk)
        first, own = key(chunk, "reference"), key(chunk, plan)
        changed = key(chunk, plan | {"of": "outputs"})
        found = context.ledger.get_many((first, own, changed))
        here = None if walked is None else walked.at(chunk)
        measured = _missing(
            (first, own, changed),
            found,
            loss,
            labels,
            reference=partial(references.get, done, partial(run_module, module, inputs))
            if here is None
            else here.reference,
            output=partial(_run, quantized, inputs) if here is None else here.output,
            outputs=outputs,
            with_outputs=with_outputs,
        )
        if measured:
            context.ledger.put_many(measured)
            found |= measured
        start, end = found[first], found[own]
        if with_outputs:
            sums.append(found[changed])
        increases.append(end[0] - start[0])
        if len(end) > 1:
            correct.append(end[1])
        context.report(stage, done + 1, len(chunks))
    return ChoiceLoss(
        per_sample=np.concatenate(increases),
        correct=np.concatenate(correct) if correct else None,
        unit=loss.unit,
        outputs=with_effects(outputs, np.sum(sums, axis=0)) if sums and outputs else None,
    )


Walked = tuple[range, "Tensor", "Iterator[Tensor]"]
"""Which samples, the full-precision output, and the quantized one as the next of an iterator."""


class _InOrder:
    """Outputs that come batch after batch, from the first that is asked for on."""

    def __init__(self, walk: Callable[[], Iterator[Walked]]) -> None:
        self._begin = walk
        self._walk: Iterator[Walked] | None = None

    def at(self, chunk: range) -> _Here:
        """Return what gives the outputs of a batch, behind those that were asked for before."""
        return _Here(self, chunk)

    def walk_to(self, chunk: range) -> Walked:
        """Go on to a batch."""
        if self._walk is None:
            self._walk = self._begin()
        return next(found for found in self._walk if found[0] == chunk)


class _Here:
    """The outputs of one batch, each computed once and only if it is asked for."""

    def __init__(self, order: _InOrder, chunk: range) -> None:
        self._order, self._chunk = order, chunk

    @cached_property
    def _walked(self) -> Walked:
        return self._order.walk_to(self._chunk)

    def reference(self) -> Tensor:
        """Return the full-precision output."""
        return self._walked[1]

    def output(self) -> Tensor:
        """Return the quantized output; once."""
        return next(self._walked[2])


def _run(quantized: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> Tensor:
    return run_module(quantized(), inputs)


def _missing(
    keys: tuple[str, str, str],
    known: Container[str],
    loss: Loss,
    labels: Tensor | None,
    *,
    reference: Callable[[], Tensor],
    output: Callable[[], Tensor],
    outputs: Sequence[PlanOutput],
    with_outputs: bool,
) -> dict[str, NDArray[np.float64]]:
    """Measure what is not known of a chunk, and return it by its keys.

    ``keys`` are those of the losses in full precision, of the losses under the choice, and of what
    changes in the outputs.
    """
    first, own, changed = keys
    measured: dict[str, NDArray[np.float64]] = {}
    if first not in known:
        measured[first] = _losses(loss, reference(), reference(), labels)
    if own not in known or (with_outputs and changed not in known):
        changed_output = output()
        if own not in known:
            measured[own] = _losses(loss, changed_output, reference(), labels)
        if outputs and (with_outputs or changed_output.numel() <= SMALL_OUTPUT):
            measured[changed] = effect_sums(loss, changed_output, reference())
    return measured


def _losses(
    loss: Loss, output: Tensor, reference: Tensor, labels: Tensor | None
) -> NDArray[np.float64]:
    """Return ``f64[1, N]`` losses, or ``f64[2, N]`` with right answers where labels tell them."""
    rows = [loss.per_sample(output, reference, labels)]
    right = None if labels is None else n_right(loss, output, labels)
    if right is not None:
        rows.append(right)
    return np.stack(checked_losses(torch.stack(rows), loss.name))
