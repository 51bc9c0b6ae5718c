"""What evaluations found: metrics with standard errors and paired differences. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitquota.codec import Document

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


FULL_PRECISION = "full precision"
SHARES = ("same_top", "top1")
"""Metrics that are shares of the samples, shown in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over samples and its standard error."""

    mean: float
    standard_error: float
    n_samples: int

    @classmethod
    def of(
        cls, values: NDArray[np.float64], weights: NDArray[np.float64] | None = None
    ) -> Estimate:
        """Return mean and standard error of per-sample values, which count alike or by weights.

        With weights the mean is a ratio of two sums, and its error that of the linearized ratio.
        """
        n = len(values)
        if weights is not None and weights.sum() > 0:
            total = float(weights.sum())
            mean = float((weights * values).sum()) / total
            spread = float(((weights * (values - mean)) ** 2).sum())
            error = math.sqrt(spread * n / (n - 1)) / total if n > 1 else 0.0
            return cls(mean=mean, standard_error=error, n_samples=n)
        error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        return cls(mean=float(values.mean()), standard_error=error, n_samples=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores(Document):
    """What one model scores on one set.

    Attributes:
        name: Of the model.
        metrics: Name to estimate: ``kl`` and ``same_top`` against full precision; ``top1`` and
            ``cross_entropy`` with labels; ``embedding_cosine`` and ``embedding_correlation`` (over
            the coordinates of one embedding) for embeddings; the user's own.
        kl_tail: The 99.9 % quantile of KL over positions.
        perplexity: ``exp`` of the cross entropy.
        differences: Paired differences of every metric to other models: ``metric - other's``.
    """

    name: str
    metrics: Mapping[str, Estimate]
    kl_tail: float | None = None
    perplexity: float | None = None
    differences: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(ModelScores):
    """One way to run the model, scored against what it is to be compared with.

    That is full precision, the uniform plan at no more bytes, and of an export its plan.

    Attributes:
        kind: ``full precision``, ``plan``, ``baseline``, ``uniform`` or ``exported``.
        size_bits: Stored size of the quantizable weights.
    """

    kind: str
    size_bits: int | None

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of what it is compared with."""
        return tuple(self.differences)
