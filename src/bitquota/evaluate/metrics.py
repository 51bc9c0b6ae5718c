"""Compare models on one set: top-1, KL, perplexity, agreement, embeddings; with paired errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.evaluate.scores import Estimate, ModelScores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.models.calibration import CalibrationSet

BATCH = 64
TAIL = 0.999
"""Quantile of the per-position KL that is reported beside the mean."""


def compare_models(
    models: Mapping[str, Callable[..., Tensor]],
    data: CalibrationSet,
    *,
    kind: str = "logits",
    custom: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] | None = None,
    batch_size: int = BATCH,
) -> list[ModelScores]:
    """Run several models on the same samples and compare them, sample by sample.

    Args:
        models: Name to model; the first is the reference (full precision). Fake-quantized modules
            and files from ``load_export`` alike.
        data: Samples; labels ``[N]`` or, for logits ``[N, T, V]``, ``[N, T]`` with -100 where
            nothing counts. Without labels, integer inputs ``[N, T]`` that logits ``[N, T, V]``
            belong to are their own labels, shifted by one.
        kind: ``logits`` or ``embedding``.
        custom: Own metrics: ``f(output, labels) -> [N]``.
        batch_size: Samples per pass.

    Raises:
        InvalidInput: No model, or an unknown kind.
        MeasurementFailed: An output that is not finite, or whose shape differs from the first's.

    Cost: one pass of every model.
    """
    if not models or kind not in ("logits", "embedding"):
        msg = f"a comparison needs models and the kind 'logits' or 'embedding'; got '{kind}'"
        raise InvalidInput(msg, kind=kind)
    per_sample: dict[str, dict[str, list[NDArray[np.float64]]]] = {name: {} for name in models}
    tails: dict[str, list[NDArray[np.float64]]] = {name: [] for name in models}
    first = next(iter(models))
    for part in data.batches(batch_size):
        reference: Tensor | None = None
        for name, model in models.items():
            with torch.no_grad():
                output = model(*part.inputs).double()
            reference = output if reference is None else reference
            if output.shape != reference.shape or not bool(torch.isfinite(output).all()):
                msg = (
                    f"outputs must be finite and of one shape; '{name}' gave "
                    f"{list(output.shape)}, '{first}' gave {list(reference.shape)}"
                )
                raise MeasurementFailed(msg, model=name)
            labels = _labels(part, output)
            found, positions = _metrics(output, reference, labels, kind)
            for metric, function in (custom or {}).items():
                found[metric] = function(output, labels)
            for metric, rows in found.items():
                per_sample[name].setdefault(metric, []).append(rows.double().cpu().numpy())
            if positions is not None:
                tails[name].append(positions.cpu().numpy().reshape(-1))
    joined = {
        name: {metric: np.concatenate(parts) for metric, parts in found.items()}
        for name, found in per_sample.items()
    }
    scores = []
    for name, values in joined.items():
        metrics = {metric: Estimate.of(array) for metric, array in values.items()}
        entropy = metrics.get("cross_entropy")
        differences = {
            other: {m: Estimate.of(values[m] - joined[other][m]) for m in values}
            for other in models
            if other != name
        }
        tail = float(np.quantile(np.concatenate(tails[name]), TAIL)) if tails[name] else None
        scores.append(
            ModelScores(
                name=name,
                metrics=metrics,
                kl_tail=tail,
                perplexity=None if entropy is None else math.exp(min(entropy.mean, 700.0)),
                differences=differences,
            )
        )
    return scores


def _labels(part: CalibrationSet, output: Tensor) -> Tensor | None:
    if part.labels is not None:
        return part.labels
    tokens = part.inputs[0]
    if output.ndim == 3 and not tokens.is_floating_point() and tokens.shape == output.shape[:2]:
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        return labels
    return None


def _metrics(
    output: Tensor, reference: Tensor, labels: Tensor | None, kind: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    n = len(output)
    if kind == "embedding":
        a, b = output.reshape(n, -1), reference.reshape(n, -1)
        cosine = torch.nn.functional.cosine_similarity
        correlation = cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
        return {
            "embedding_cosine": cosine(a, b, dim=1),
            "embedding_correlation": correlation,
            "mse": (a - b).square().mean(1),
        }, None
    log_q = torch.log_softmax(output, dim=-1)
    log_p = torch.log_softmax(reference, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [N] or [N, T]
    same = (output.argmax(-1) == reference.argmax(-1)).double()
    found = {"kl": kl.reshape(n, -1).mean(1), "same_top": same.reshape(n, -1).mean(1)}
    if labels is not None and not labels.is_floating_point() and labels.shape == output.shape[:-1]:
        counted = (labels >= 0).double()
        safe = labels.clamp(min=0)
        entropy = -log_q.gather(-1, safe[..., None])[..., 0] * counted
        right = (output.argmax(-1) == safe).double() * counted
        weight = counted.reshape(n, -1).sum(1).clamp(min=1)
        found["cross_entropy"] = entropy.reshape(n, -1).sum(1) / weight
        found["top1"] = right.reshape(n, -1).sum(1) / weight
    return found, kl


def scores_to_markdown(scores: list[ModelScores]) -> str:
    """Return a table: one line per model, metric means with standard errors."""
    names = list(dict.fromkeys(metric for s in scores for metric in s.metrics))
    header = ["model", *names]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for s in scores:
        cells: list[Any] = [s.name]
        for metric in names:
            e = s.metrics.get(metric)
            cells.append("" if e is None else f"{e.mean:.6g} ± {e.standard_error:.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
