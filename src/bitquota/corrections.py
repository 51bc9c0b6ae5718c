"""What users ship after post-training quantization to repair part of the damage."""

from __future__ import annotations

from enum import StrEnum


class Correction(StrEnum):
    """A step that changes a quantized model without training it.

    A plan records its corrections, is measured with them, and is compared only with baselines
    that have them too.
    """

    FOLD_BATCH_NORM = "fold_batch_norm"
    """Multiply each batch norm into the layer before it, before quantizing."""
    BATCH_NORM_STATISTICS = "batch_norm_statistics"
    """Move running mean and variance by what quantizing did to them on unlabelled data."""
    BIAS_CORRECTION = "bias_correction"
    """Shift each layer's bias by the mean output error per channel after quantizing."""
    SMOOTHING = "smoothing"
    """Scale channels between layers, before quantizing, so that the weights round better."""
    ROTATION = "rotation"
    """Turn the residual stream and attention's values by orthogonal matrices that are folded into
    weights, before quantizing: language models with RMS norms."""


CORRECTION_WORDS = {
    Correction.FOLD_BATCH_NORM: "batch norms folded into weights",
    Correction.BATCH_NORM_STATISTICS: "batch-norm statistics adjusted",
    Correction.BIAS_CORRECTION: "biases shifted",
    Correction.SMOOTHING: "channels smoothed",
    Correction.ROTATION: "residual stream rotated",
}
"""What each does, for a form."""


REWRITTEN = frozenset({Correction.SMOOTHING, Correction.ROTATION})
"""Corrections that give the model other weights, which the plan's quantized weights describe."""

BEFORE_QUANTIZING = frozenset({Correction.FOLD_BATCH_NORM}) | REWRITTEN
"""Corrections of the full-precision model: it computes what it did."""


SAMPLES_REPAIR = frozenset({Correction.BATCH_NORM_STATISTICS, Correction.BIAS_CORRECTION})
"""Corrections that run the model on the correction samples."""

SAMPLES_DEPEND = (
    "reverse-mode sensitivities (the measure 'tangent') need samples that do not depend on each "
    "other; batch_norm_statistics and bias_correction take means over them: use the measure "
    "'gram', or leave the correction out"
)
"""A backward pass sums what all samples do to one; what one does by itself would be lost."""
