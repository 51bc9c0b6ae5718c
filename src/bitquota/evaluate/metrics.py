"""Compare models on one set: top-1, KL, perplexity, agreement, embeddings; with paired errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.evaluate.effects import changed_answers
from bitquota.evaluate.scores import FULL_PRECISION, Estimate, ModelScores
from bitquota.models.padding import positions_that_count
from bitquota.models.running import run_module
from bitquota.plan import MeasuredLoss
from bitquota.sensitivity.losses import (
    CrossEntropy,
    divergence,
    loss_by_name,
    losses_of,
    n_correct,
    n_right,
    position_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.sensitivity.losses import Loss

BATCH = 64
KINDS = ("logits", "embedding", "outputs")
TAIL = 0.999
"""Quantile of the per-position KL that is reported beside the mean."""


def compare_models(
    models: Mapping[str, Callable[..., Any]],
    data: CalibrationSet,
    *,
    kind: str = "logits",
    custom: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] | None = None,
    loss: Loss | None = None,
    names: Sequence[str] = (),
    batch_size: int = BATCH,
    before: int = 0,
    context: Context | None = None,
) -> list[ModelScores]:
    """Run several models on the same samples and compare them, sample by sample.

    Args:
        models: Name to model; the first is the reference (full precision). Fake-quantized modules
            and files from ``load_export`` alike.
        data: Samples; labels ``[N]`` or, for logits ``[N, T, V]``, ``[N, T]`` with -100 where
            nothing counts. Without labels, integer inputs ``[N, T]`` that logits ``[N, T, V]``
            belong to are their own labels, shifted by one.
        kind: ``logits``, ``embedding``, or ``outputs``: what ``loss`` says.
        custom: Own metrics: ``f(output, labels) -> [N]``.
        loss: A loss to score as well, under its name.
        names: Of the outputs that ``loss`` sums over, for the names of their metrics.
        batch_size: Samples per pass.
        before: Steps of the comparison that were done and told of before.
        context: Whom to tell after each batch, and when to stop.

    Raises:
        InvalidInput: No model, or an unknown kind.
        Cancelled: ``context`` said so.
        InvalidCalibration: A model does not accept the samples.
        MeasurementFailed: An output that is not finite, or whose shape differs from the first's.

    Cost: one pass of every model.
    """
    if not models or kind not in KINDS or (kind == "outputs" and loss is None):
        msg = f"a comparison needs models and one of the kinds {', '.join(KINDS)}; got '{kind}'"
        raise InvalidInput(msg, kind=kind)

    # Batch by batch: every metric of every model, sample by sample.
    seen = {name: _Seen() for name in models}
    first = next(iter(models))
    n_batches = -(-len(data) // batch_size)
    for done, part in enumerate(data.batches(batch_size), start=1):
        reference: Tensor | None = None
        for name, model in models.items():
            counts: dict[str, Tensor]
            output = run_module(model, part.inputs).double()
            reference = output if reference is None else reference
            if output.shape != reference.shape or not bool(torch.isfinite(output).all()):
                msg = (
                    f"outputs must be finite and of one shape; '{name}' gave "
                    f"{list(output.shape)}, '{first}' gave {list(reference.shape)}"
                )
                raise MeasurementFailed(msg, model=name)
            labels = _labels(part, output)
            if kind == "outputs" and loss is not None:
                found = _output_metrics(output, reference, part.labels, loss, names)
                positions, counts = None, {}
            else:
                found, positions, counts = _metrics(output, reference, labels, kind)
                counts |= _next_tokens(part, labels, counts)
                if loss is not None and loss.name not in found:
                    found[loss.name] = loss.per_sample(output, reference, labels)
            found |= {metric: own(output, labels) for metric, own in (custom or {}).items()}
            seen[name].add(found, positions, counts)
        if context is not None:
            context.report("evaluate", before + done, before + n_batches)
            context.check("evaluate")

    # Means over the samples, and paired differences to every other model.
    values = {name: found.values() for name, found in seen.items()}
    return [_model_scores(name, values, seen[name]) for name in models]


def _next_tokens(
    part: CalibrationSet, labels: Tensor | None, counts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return over how many next tokens of each sample a metric of ``counts`` is, if over such."""
    if part.labels is not None or labels is None:
        return {}
    n_next = (labels >= 0).sum(1)
    return {metric: n_next for metric in ("cross_entropy", "top1") if metric in counts}


@dataclass(slots=True)
class _Seen:
    """What was computed of one model so far: metrics of each sample, KL of each position.

    Where samples are padded, a metric over their positions counts each sample by those it has.
    """

    metrics: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    positions: list[NDArray[np.float64]] = field(default_factory=list)
    counts: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(
        self, found: Mapping[str, Tensor], positions: Tensor | None, counts: Mapping[str, Tensor]
    ) -> None:
        """Add one batch."""
        for metric, rows in found.items():
            self.metrics.setdefault(metric, []).append(rows.double().cpu().numpy())
        for metric, rows in counts.items():
            self.counts.setdefault(metric, []).append(rows.double().cpu().numpy())
        if positions is not None:
            self.positions.append(positions.cpu().numpy().reshape(-1))

    def values(self) -> dict[str, NDArray[np.float64]]:
        """Return each metric, ``f64[N]``."""
        return {metric: np.concatenate(parts) for metric, parts in self.metrics.items()}

    def weights(self, metric: str) -> NDArray[np.float64] | None:
        """Return what each sample counts, ``f64[N]``; ``None`` for all alike."""
        if metric not in self.counts:
            return None
        counts = np.concatenate(self.counts[metric])
        return None if (counts == counts[0]).all() else counts

    def tail(self) -> float | None:
        """Return the KL that few positions exceed."""
        return float(np.quantile(np.concatenate(self.positions), TAIL)) if self.positions else None


def _model_scores(
    name: str, values: Mapping[str, Mapping[str, NDArray[np.float64]]], seen: _Seen
) -> ModelScores:
    """Return the scores of one model among others."""
    weights = {metric: seen.weights(metric) for metric in values[name]}
    metrics = {
        metric: Estimate.of(array, weights[metric]) for metric, array in values[name].items()
    }
    entropy = metrics.get("cross_entropy")
    return ModelScores(
        name=name,
        metrics=metrics,
        kl_tail=seen.tail(),
        perplexity=None if entropy is None else math.exp(min(entropy.mean, 700.0)),
        differences={
            other: {m: Estimate.of(values[name][m] - theirs[m], weights[m]) for m in values[name]}
            for other, theirs in values.items()
            if other != name
        },
    )


def measured_loss(scores: ModelScores, loss: Loss, *, labelled: bool) -> MeasuredLoss:
    """Return how much more ``loss`` a model has than full precision, as a plan records it.

    Args:
        scores: From ``compare_models`` with this ``loss`` and full precision among the models.
        loss: The loss.
        labelled: Whether the samples had labels of their own, so that there is an accuracy.
    """
    own = scores.metrics[loss.name]
    more = Estimate(mean=0.0, standard_error=0.0, n_samples=own.n_samples)
    if scores.name != FULL_PRECISION:
        more = scores.differences[FULL_PRECISION][loss.name]
    top1 = scores.metrics.get("top1") if labelled else None
    return MeasuredLoss(
        mean=more.mean,
        standard_error=more.standard_error,
        n_samples=more.n_samples,
        unit=loss.unit,
        accuracy=None if top1 is None else top1.mean,
    )


def measure_module(
    model: Callable[..., Any],
    reference: Callable[..., Any],
    data: CalibrationSet,
    *,
    loss: Loss | None = None,
    kind: str = "logits",
    batch_size: int = BATCH,
) -> MeasuredLoss:
    """Return the loss increase of ``model`` over ``reference``, by default in KL, and its accuracy.

    ``kind`` is that of ``compare_models``: outputs other than logits are scored by ``loss`` alone.

    Cost: one pass of each model over ``data``.
    """
    function = loss_by_name("kl") if loss is None else loss
    both = {FULL_PRECISION: reference, "model": model}
    _, scores = compare_models(both, data, kind=kind, loss=function, batch_size=batch_size)
    return measured_loss(scores, function, labelled=data.labels is not None)


def _labels(part: CalibrationSet, output: Tensor) -> Tensor | None:
    if part.labels is not None:
        return part.labels
    tokens = part.inputs[0]
    if output.ndim == 3 and not tokens.is_floating_point() and tokens.shape == output.shape[:2]:
        counted = positions_that_count(output).to(tokens.device)
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = torch.where(counted[:, :-1] & counted[:, 1:], tokens[:, 1:], -100)
        return labels
    return None


def _output_metrics(
    output: Tensor, reference: Tensor, labels: Tensor | None, loss: Loss, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the loss, and of every output what changed; of several, under their names."""
    found = {loss.name: loss.per_sample(output, reference, labels)}
    pairs = list(zip(losses_of(loss, output), losses_of(loss, reference), strict=True))
    for k, ((mine, own), (other, _)) in enumerate(pairs):
        name = names[k] if k < len(names) else f"output {k + 1}"
        prefix = f"{name}: " if len(pairs) > 1 else ""
        changed = changed_answers(own, mine, other)
        if changed is not None:
            found[f"{prefix}same_top"] = 1 - changed
            continue
        a, b = mine.reshape(len(mine), -1), other.reshape(len(other), -1)
        norms = b.norm(dim=1)
        found[f"{prefix}relative_error"] = (a - b).norm(dim=1) / norms.clamp_min(1e-300)
    right = None if labels is None else n_right(loss, output, labels)
    return found if right is None else found | {"top1": right}


def _metrics(
    output: Tensor, reference: Tensor, labels: Tensor | None, kind: str
) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """Return metrics of each sample, KL of each position, and over how many each metric is."""
    n = len(output)
    if kind == "embedding":
        a, b = output.reshape(n, -1), reference.reshape(n, -1)
        cosine = torch.nn.functional.cosine_similarity
        correlation = cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
        return (
            {
                "embedding_cosine": cosine(a, b, dim=1),
                "embedding_correlation": correlation,
                "mse": (a - b).square().mean(1),
            },
            None,
            {},
        )
    kl = divergence(output, reference)  # [N] or [N, T]
    same = (output.argmax(-1) == reference.argmax(-1)).double()
    weights = position_weights(output, reference)
    if isinstance(weights, float):
        share = torch.full_like(kl.reshape(n, -1), weights)
        found = {"kl": kl.reshape(n, -1).mean(1), "same_top": same.reshape(n, -1).mean(1)}
    else:
        share = weights[..., 0].reshape(n, -1)
        found = {
            "kl": (kl.reshape(n, -1) * share).sum(1),
            "same_top": (same.reshape(n, -1) * share).sum(1),
        }
        kl = kl[weights[..., 0] > 0]
    if labels is not None and not labels.is_floating_point() and labels.shape == output.shape[:-1]:
        found["cross_entropy"] = CrossEntropy().per_sample(output, reference, labels)
        found["top1"] = n_correct(output, labels)
    return found, kl, dict.fromkeys(found, (share > 0).sum(1))
