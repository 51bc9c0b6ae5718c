"""Class separability: which layers' channels tell classes apart.

References:
    [CSMPQ] M. Wang et al. CSMPQ: class separability based mixed-precision quantization. 2022.
    arXiv 2212.10220.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidCalibration
from bitquota.sensitivity.metrics.layer_trace import trace_layers
from bitquota.sensitivity.metrics.metric import FORWARD, Metric, Scores, Work, row_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.metrics.layer_trace import TracedCall
    from bitquota.sensitivity.runners.base import Runner


def separability(means: NDArray[np.float64]) -> float:
    """Return the mean over channels of the largest TF-IDF of the channel over classes.

    ``tf_ck = m_ck / Σ_c m_ck``, ``idf_c = log(K / #{k : tf_ck > mean over k})``,
    ``γ = mean_c max_k tf_ck · idf_c``: a channel is a term, a class a document.

    Args:
        means: f64[K, C], not negative: mean activation of every channel on every class.
    """
    totals = means.sum(axis=1, keepdims=True)
    tf = np.divide(means, totals, out=np.zeros_like(means), where=totals > 0)
    above = (tf > tf.mean(axis=0)).sum(axis=0)
    # A channel that is alike on all classes says nothing about any.
    idf = np.where(above > 0, np.log(len(means) / np.maximum(above, 1)), 0.0)
    return float((tf.max(axis=0) * idf).mean())


@dataclass(frozen=True, slots=True)
class ClassSeparability(Metric):
    """``s = (32 - b) γ_l / mean γ`` with the TF-IDF separability γ of layer ``l``'s feature.

    **A reconstruction**: of [CSMPQ] the abstract is known, no code; it says that the TF-IDF of
    layer features measures class separability and that layers of lower separability get fewer
    bits. What a term, a document and a frequency are is our reading (see ``separability``).
    Activations count by magnitude, averaged over positions; a layer's feature is that of
    ``layer_trace``. As in ``orthogonality``, ``-b γ`` was shifted by a constant.

    Standard errors come from leaving out one chunk at a time.

    Pitfalls: looks neither at the weights' error nor at the loss; needs class labels, one per
    sample, and enough samples of every class.
    """

    name: ClassVar[str] = "class_separability"
    known_as: ClassVar[str] = "class separability (CSMPQ, reconstructed)"
    needs_labels: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass."""
        del runner, table
        return FORWARD

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        runner, layers = work.runner, work.layers
        labels = runner.calibration.labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            got = "none" if labels is None else f"shape {list(labels.shape)}"
            msg = f"class separability needs one class label per sample; got {got}"
            raise InvalidCalibration(msg, measure=self.name)
        n_classes = int(labels.max()) + 1

        # Chunk by chunk: sums of each channel's activity over each class.
        sums: list[list[NDArray[np.float64]]] = []
        counts = np.zeros((len(runner.chunks), n_classes))
        for chunk, span in enumerate(runner.chunks):
            own = labels[span.start : span.stop].cpu().numpy()
            kept = own >= 0
            keys = [
                work.key(chunk, {"layer": n, "classes": n_classes, "all": layers}, "class sums")
                for n in layers
            ]

            def run(
                chunk: int = chunk,
                own: NDArray[np.int64] = own,
                kept: NDArray[np.bool_] = kept,
            ) -> list[NDArray[np.float64]]:
                calls = trace_layers(runner, chunk, layers, self.name, features=True)
                work.charge(chunk, FORWARD)
                found = []
                for name in layers:
                    activity = _channel_activity(calls[name][0]).cpu().numpy()
                    total = np.zeros((n_classes, activity.shape[1]))
                    np.add.at(total, own[kept], activity[kept])
                    found.append(total)
                return found

            arrays = work.recorder.shard(keys, run)
            sums.append([arrays[key] for key in keys])
            np.add.at(counts[chunk], own[kept], 1.0)

        # The jackknife over chunks gives the errors.
        chunks = range(len(sums))
        gamma = self._gammas(sums, counts, list(chunks))
        errors = np.zeros(len(layers))
        if len(sums) > 1:
            left_out = np.stack(
                [self._gammas(sums, counts, [c for c in chunks if c != out]) for out in chunks]
            )
            deviations = left_out - left_out.mean(axis=0)
            errors = np.sqrt((deviations**2).sum(axis=0) * (len(sums) - 1) / len(sums))
        index = {name: k for k, name in enumerate(layers)}

        def spared(candidate: Candidate) -> int:
            return FULL_PRECISION_BITS - candidate.weight_bits

        return Scores(
            diagonal=row_sums(work.table, lambda c: spared(c) * gamma[index[c.layer]]),
            error=np.sqrt(
                row_sums(work.table, lambda c: (spared(c) * errors[index[c.layer]]) ** 2)
            ),
            loss=self.name,
            unit="weighted bits",
            details={"gamma": dict(zip(layers, gamma.tolist(), strict=True))},
        )

    @staticmethod
    def _gammas(
        sums: list[list[NDArray[np.float64]]],
        counts: NDArray[np.float64],
        chunks: list[int],
    ) -> NDArray[np.float64]:
        """Return ``f64[L]``: separability of each layer from some chunks, mean one."""
        count = counts[chunks].sum(axis=0)
        seen = count > 0
        gamma = np.array(
            [
                separability(
                    np.stack([sums[c][k] for c in chunks]).sum(axis=0)[seen] / count[seen, None]
                )
                for k in range(len(sums[0]))
            ]
        )
        mean = gamma.mean()
        scaled: NDArray[np.float64] = gamma / mean if mean > 0 else gamma
        return scaled


def _channel_activity(call: TracedCall) -> Tensor:
    """Return ``f64[n, C]``: mean magnitude of each channel of the feature over positions."""
    feature = call.feature
    assert feature is not None  # noqa: S101  # traced with features
    values = feature.double().abs()
    if values.ndim != call.output_dims:
        return values.reshape(len(values), -1)
    moved = values.movedim(call.channel_axis % values.ndim, 1)
    return moved.reshape(*moved.shape[:2], -1).mean(dim=2)
