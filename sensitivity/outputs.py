"""What the outputs of a model are, told from its answers on the first calibration samples.

A loss must fit its output: the divergence of softmaxes says nothing of a single column, and far
too little of probabilities that went through a softmax already. ``read_outputs`` looks at the
answers, chooses the loss or asks for one, and returns the network so that it ends where the loss is
measured.

Design: docs/design/outputs.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from bitquota.canonical import digest_json
from bitquota.errors import BitquotaError, InvalidCalibration, InvalidInput
from bitquota.models.outputs import measuring, outputs_of
from bitquota.models.samples import samples_refused
from bitquota.plan import PlanOutput
from bitquota.request import AUTO_LOSS, parse_losses, parse_outputs
from bitquota.sensitivity.losses import (
    Loss,
    RelativeSquaredError,
    SumOfLosses,
    loss_by_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

N_SAMPLES = 64
"""Answers that the diagnosis looks at."""

MAX_ELEMENTS = 2**20
"""Elements of one output that it looks at; two samples in any case. Vocabularies are large."""

FIRST = 2
"""Samples that are run before anything is known of the answers."""

AT_ONCE = 8
"""Samples that run at once: nothing is known yet of the activations between."""

_SUM_TOLERANCE = 2e-3
"""How far probabilities may be from adding up to 1: half-precision outputs have three digits."""

_UNDO_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-3
"""How far probabilities may be from what their undoing leads back to, of the largest of them: in
float32, and in half precision or from their logarithms."""


class Kind(StrEnum):
    """What an output is taken for."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities (softmax)"
    INDEPENDENT = "independent probabilities (sigmoid)"
    BINARY_LOGIT = "one logit"
    NUMBERS = "numbers"
    EMBEDDING = "embedding"
    FEATURE_MAP = "feature map"
    CHOICE = "arg-max"


_FITTING: dict[Kind, str] = {
    Kind.LOGITS: "kl",
    Kind.PROBABILITIES: "kl",
    Kind.INDEPENDENT: "binary_kl",
    Kind.BINARY_LOGIT: "binary_kl",
    Kind.NUMBERS: "relative_mse",
    Kind.EMBEDDING: "cosine",
    Kind.FEATURE_MAP: "relative_mse",
    Kind.CHOICE: "kl",
}
_ON_LOGITS = frozenset({"kl", "binary_kl", "cross_entropy"})
_LAST_AXIS = _ON_LOGITS | {"cosine"}
"""Losses of vectors, which stand in the last axis."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """A model that ends where its loss is measured.

    Attributes:
        model: The same weights under the same names; its output is one tensor.
        loss: What is measured on it.
        outputs: What was found, in the order in which they are joined.
    """

    model: LoadedModel
    loss: Loss
    outputs: tuple[PlanOutput, ...]

    @property
    def has_classes(self) -> bool:
        """Whether the model's one output holds logits of classes that exclude each other."""
        classes = self.loss.name in {"kl", "cross_entropy"} or self.outputs[0].kind == Kind.LOGITS
        return len(self.outputs) == 1 and classes


def read_outputs(
    model: LoadedModel,
    calibration: CalibrationSet,
    *,
    loss: str = AUTO_LOSS,
    outputs: Sequence[str] = (),
    known: Sequence[PlanOutput] | None = None,
    demand: bool = True,
) -> Read:
    """Return ``model`` with an output that the loss is about, and the loss.

    Args:
        model: As it was loaded.
        calibration: Its first samples are run, in full precision.
        loss: As in ``PlanRequest``.
        outputs: As in ``PlanRequest``.
        known: What a plan found already; nothing is chosen anew then.
        demand: Ask for a loss where the answers do not tell which; else a single column is a
            number.

    Raises:
        InvalidCalibration: The model does not take the samples.
        InvalidInput: The loss does not fit the output, or cannot be chosen; the message names those
            that fit. Or there is no such output.

    Cost: two passes over 64 samples at most, over two where answers are large.
    """
    few, found = _first_answers(model, calibration)
    if known is None:
        losses, weights = parse_losses(loss), parse_outputs(tuple(outputs))
        chosen = _chosen(found, few, losses, weights, demand=demand)
    else:
        if missing := [o.name for o in known if o.name not in found]:
            raise _no_such(missing[0], found)
        chosen = list(known)
    module, chosen = _ending_in(model, few, found, chosen)
    return Read(
        model=model if module is model.module else replace(model, module=module),
        loss=loss_of(chosen),
        outputs=tuple(chosen),
    )


def _first_answers(
    model: LoadedModel, calibration: CalibrationSet
) -> tuple[CalibrationSet, dict[str, Tensor]]:
    """Return the first samples and what the model answers: two, and more if answers are small."""
    few = calibration.first(min(FIRST, len(calibration)))
    try:
        found = outputs_of(model.module, few.inputs)
        largest = max((value.numel() for value in found.values()), default=1) // len(few)
        n = min(N_SAMPLES, len(calibration), MAX_ELEMENTS // max(1, largest))
        by_sample = all(v.ndim and len(v) == len(few) for v in found.values())
        if n > len(few) and by_sample:
            few = calibration.first(n)
            found = _joined(outputs_of(model.module, b.inputs) for b in few.batches(AT_ONCE))
    except BitquotaError:
        raise
    except Exception as err:  # whatever the model raises is about its input
        raise samples_refused(model, few, err) from err
    return few, found


def _joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the answers of consecutive batches as those of one."""
    first, *others = parts
    return {name: torch.cat([first[name], *(o[name] for o in others)]) for name in first}


def loss_of(outputs: Sequence[PlanOutput]) -> Loss:
    """Return the loss over ``outputs``, joined in this order."""
    parts = tuple((o.weight, _loss(o), o.shape) for o in outputs)
    plain = len(outputs) == 1 and outputs[0].weight == 1
    if plain and not outputs[0].undone and outputs[0].axis == -1 and outputs[0].scale is None:
        return parts[0][1]
    # What the plan did to them is no part of what is measured.
    bare = [replace(o, changed=None, relative_error=None, correlation=None) for o in outputs]
    return SumOfLosses(
        name=outputs[0].loss if plain else ",".join(f"{o.name}={o.loss}" for o in outputs),
        key=digest_json([o.to_json() for o in bare]),
        parts=parts,
        unit=parts[0][1].unit if len(parts) == 1 else "weighted loss/sample",
    )


def _loss(output: PlanOutput) -> Loss:
    if output.loss == "relative_mse" and output.scale is not None:
        return RelativeSquaredError(scale=output.scale)
    return loss_by_name(output.loss)


def _chosen(
    found: Mapping[str, Tensor],
    few: CalibrationSet,
    losses: str | dict[str, str],
    weights: dict[str, float],
    *,
    demand: bool,
) -> list[PlanOutput]:
    """Return the outputs that count, each with its kind and loss."""
    named = set(weights) | (set() if isinstance(losses, str) else set(losses))
    for name in named:
        if name not in found:
            raise _no_such(name, found)
    answers = {
        name: value
        for name, value in found.items()
        if (name in weights if weights else value.dtype.is_floating_point and value[0].numel())
    }
    if not answers and not weights:  # integers alone
        answers = dict(found)
    if not answers:
        msg = "a model must return a tensor with one row for each sample; this one returns none"
        raise InvalidCalibration(msg)
    chosen = []
    for name, value in answers.items():
        asked = losses if isinstance(losses, str) else losses.get(name, AUTO_LOSS)
        labels = few.labels if len(answers) == 1 else None
        kind, axis = diagnose(name, value, labels)
        sure = not demand or _are_numbers(labels, value)
        fitting = _fitting(name, value, kind, asked, sure=sure)
        undo = {Kind.PROBABILITIES: "softmax", Kind.INDEPENDENT: "sigmoid", Kind.CHOICE: "argmax"}
        on_logits = fitting in _ON_LOGITS
        undoing = on_logits or kind is Kind.CHOICE
        chosen.append(
            PlanOutput(
                name=name,
                kind=str(kind),
                loss=fitting,
                weight=weights.get(name, 1.0),
                undone=undo.get(kind, "") if undoing else "",
                axis=axis if undoing or fitting in _LAST_AXIS else -1,
                shape=tuple(value.shape[1:]),
                scale=_scale(value) if fitting == "relative_mse" else None,
            )
        )
    return chosen


def diagnose(name: str, answers: Tensor, labels: Tensor | None) -> tuple[Kind, int]:
    """Return what ``answers`` ``[N, ...]`` are, and which axis holds classes.

    Raises:
        InvalidCalibration: They are not finite.
    """
    if not answers.dtype.is_floating_point:
        return Kind.CHOICE, -1
    y = answers.double()
    if not bool(torch.isfinite(y).all()):
        msg = f"the model's output must be finite; '{name}' is not: check weights and samples"
        raise InvalidCalibration(msg, output=name)
    if y.ndim > 2 and 1 < y.shape[1] == y[0].numel():
        # Maps of one pixel: what stands in the second axis would be columns without the others.
        kind, _ = diagnose(name, answers.reshape(y.shape[:2]), labels)
        return kind, 1
    inside = bool(((y > 0) & (y <= 1)).all())
    columns = y.shape[-1] if y.ndim > 1 else 1
    adding_up = _axis_adding_up(y)
    if adding_up is not None:
        return Kind.PROBABILITIES, adding_up
    if inside and y.numel() > 1 and bool((y < 1).any()):
        return Kind.INDEPENDENT, -1
    if _are_numbers(labels, y):
        return Kind.NUMBERS, -1
    if columns == 1:
        two = labels is not None and bool(((labels == 0) | (labels == 1)).all())
        return (Kind.BINARY_LOGIT if two else Kind.NUMBERS), -1
    if _is_embedding(name, y):
        return Kind.EMBEDDING, -1
    return (Kind.FEATURE_MAP if y.ndim > 3 else Kind.LOGITS), -1


def _axis_adding_up(answers: Tensor) -> int | None:
    """Return the axis along which all answers are shares of 1, if there is one."""
    if answers.ndim == 1 or not bool((answers >= 0).all()):
        return None
    for axis in (-1, 1) if answers.ndim > 2 else (-1,):
        sums = answers.sum(dim=axis)
        if answers.shape[axis] > 1 and bool(((sums - 1).abs() < _SUM_TOLERANCE).all()):
            return axis
    return None


def _is_embedding(name: str, answers: Tensor) -> bool:
    """Whether answers are vectors of length 1, or are called what embeddings are called."""
    norms = answers.reshape(len(answers), -1).norm(dim=1)
    if answers.ndim == 2 and len(answers) > 1 and bool(((norms - 1).abs() < _SUM_TOLERANCE).all()):
        return True
    lower = name.lower()
    return any(word in lower for word in ("embed", "hidden", "pooler", "state"))


def _are_numbers(labels: Tensor | None, answers: Tensor) -> bool:
    """Whether labels say that the answers are numbers."""
    return (
        labels is not None
        and labels.is_floating_point()
        and labels.numel() == answers.numel()
        and not bool(((labels == 0) | (labels == 1)).all())
    )


def _fitting(name: str, answers: Tensor, kind: Kind, asked: str, *, sure: bool) -> str:
    """Return the loss for an output, or raise which ones would do.

    ``sure`` means that a single column of numbers is known to hold no logits.
    """
    columns = answers.shape[-1] if answers.ndim > 1 else 1
    if asked == AUTO_LOSS:
        single = columns == 1 and answers[0].numel() == 1
        if kind is Kind.NUMBERS and single and not sure:
            unlabelled = (
                f"the output '{name}' has one column, which may be a logit or a number: name the "
                "loss, 'binary_kl' for a logit or 'relative_mse' for a number"
            )
            raise InvalidInput(unlabelled, output=name, losses=["binary_kl", "relative_mse"])
        return _FITTING[kind]
    if asked in {"kl", "cross_entropy"} and kind is Kind.INDEPENDENT:
        if asked == "kl":
            return "binary_kl"  # the same divergence, of each column's two answers
        msg = (
            f"cross entropy needs classes that exclude each other; '{name}' holds independent "
            "probabilities: leave the loss out, or name 'binary_kl'"
        )
        raise InvalidInput(msg, output=name)
    if asked in {"kl", "cross_entropy", "cosine"} and columns == 1:
        msg = (
            f"the loss '{asked}' of a single column says nothing; '{name}' has one: name "
            "'binary_kl' for a logit, or 'relative_mse' for a number"
        )
        raise InvalidInput(msg, output=name)
    if kind is Kind.CHOICE and asked not in _ON_LOGITS:
        return "kl"
    return asked


def _scale(answers: Tensor) -> float:
    """Return the variance of all elements, or their mean square where nothing varies."""
    y = answers.double()
    variance = float((y - y.mean(dim=0)).square().mean()) or float(y.square().mean())
    return variance or 1.0


def _ending_in(
    model: LoadedModel, few: CalibrationSet, found: Mapping[str, Tensor], chosen: list[PlanOutput]
) -> tuple[torch.nn.Module, list[PlanOutput]]:
    """Return the module that ends in ``chosen``, with the shapes that it then has."""
    (only, *more) = chosen
    returned = next(iter(found.values()))
    if not more and not only.undone and only.axis == -1 and len(found) == 1:
        # The ordinary case: the model as it is.
        return model.module, [replace(only, shape=tuple(returned.shape[1:]))]
    two = few.first(min(FIRST, len(few)))
    for before in (True, False):
        try:
            shaped = [_with_shape(model.module, o, two, before=before) for o in chosen]
            joint = measuring(model.module, shaped, before=before)
            with torch.no_grad():
                value = torch.cat([joint(*batch.inputs) for batch in few.batches(AT_ONCE)])
        except BitquotaError as err:
            last = next((o for o in chosen if o.undone == "argmax"), None)
            if last is None:
                raise
            raise _only_choices(last.name) from err
        sizes = [math.prod(o.shape) for o in shaped]
        parts = torch.split(value.reshape(len(value), -1), sizes, dim=1)
        ends = [
            _same(o, part.reshape(-1, *o.shape), found[o.name], before=before)
            for o, part in zip(shaped, parts, strict=True)
        ]
        if all(ends):
            return joint, shaped
    wrong = next(o for o, end in zip(chosen, ends, strict=True) if not end)
    if wrong.undone == "argmax":
        raise _only_choices(wrong.name)
    msg = (
        f"the {wrong.undone} at the end of '{wrong.name}' cannot be undone: what stands before it "
        "does not lead to its values; hand in a model that returns the logits, or name another loss"
    )
    raise InvalidInput(msg, output=wrong.name)


def _with_shape(
    module: torch.nn.Module, output: PlanOutput, few: CalibrationSet, *, before: bool
) -> PlanOutput:
    """Return the output with the shape that it has for one sample in the space of the loss."""
    with torch.no_grad():
        value = measuring(module, [output], before=before)(*few.inputs)
    return replace(output, shape=tuple(value.shape[1:]))


def _same(output: PlanOutput, value: Tensor, returned: Tensor, *, before: bool) -> bool:
    """Whether ``value`` leads to what the model returns."""
    if output.undone == "argmax":
        return bool((value.argmax(dim=-1).reshape(-1) == returned.reshape(-1)).all())
    if output.undone == "softmax":
        again = value.double().softmax(dim=-1)
        expected = returned.double().movedim(output.axis, -1)
    elif output.undone == "sigmoid":
        again, expected = value.double().sigmoid(), returned.double()
    else:
        return True
    if again.numel() != expected.numel():
        return False
    half = not before or bool((returned == returned.half().to(returned.dtype)).all())
    gap = (again.reshape(-1) - expected.reshape(-1)).abs().max() if again.numel() else 0.0
    scale = float(expected.abs().max()) if again.numel() else 1.0
    return float(gap) <= (_HALF_TOLERANCE if half else _UNDO_TOLERANCE) * scale


def _only_choices(name: str) -> InvalidInput:
    msg = (
        f"a loss needs scores; the output '{name}' holds integers, such as an arg-max, and the "
        "scores behind them are not seen: hand in a model that returns the scores"
    )
    return InvalidInput(msg, output=name)


def _no_such(name: str, found: Mapping[str, Tensor]) -> InvalidInput:
    msg = f"an output must be one of {', '.join(found)}; got '{name}'"
    return InvalidInput(msg, output=name)
