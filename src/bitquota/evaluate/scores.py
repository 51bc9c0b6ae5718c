"""What evaluations found: metrics with standard errors and paired differences. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

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
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        """Return mean and standard error of per-sample values."""
        n = len(values)
        error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        return cls(mean=float(values.mean()), standard_error=error, n_samples=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
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

    def to_json(self) -> JsonObject:
        """Return everything as plain JSON."""
        return {
            "name": self.name,
            "metrics": {k: asdict(v) for k, v in self.metrics.items()},
            "kl_tail": self.kl_tail,
            "perplexity": self.perplexity,
            "differences": {
                other: {k: asdict(v) for k, v in values.items()}
                for other, values in self.differences.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One way to run the model, scored.

    Attributes:
        name: File or folder that it came from, or what it is.
        kind: ``full precision``, ``plan``, ``baseline``, ``uniform`` or ``exported``.
        size_bits: Stored size of the quantizable weights.
        scores: Metrics with standard errors, and paired differences to those in ``beside``.
        beside: Names of what it is compared with: full precision, the uniform plan at no more
            bytes, and of an export its plan.
    """

    name: str
    kind: str
    size_bits: int | None
    scores: ModelScores
    beside: tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        """Return everything as plain JSON; differences to ``beside`` only."""
        found = self.scores.to_json()
        kept = {other: found["differences"][other] for other in self.beside}
        return found | {
            "kind": self.kind,
            "size_bits": self.size_bits,
            "differences": kept,
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:  # noqa: ANN401  # whatever a worker returned
        """Rebuild from ``to_json``.

        Raises:
            InvalidInput: A missing member, or one of another type.
        """
        try:
            size = data["size_bits"]
            tail, perplexity = data["kl_tail"], data["perplexity"]
            scores = ModelScores(
                name=str(data["name"]),
                metrics=_estimates(data["metrics"]),
                kl_tail=None if tail is None else float(tail),
                perplexity=None if perplexity is None else float(perplexity),
                differences={str(k): _estimates(v) for k, v in data["differences"].items()},
            )
            return cls(
                name=scores.name,
                kind=str(data["kind"]),
                size_bits=None if size is None else int(size),
                scores=scores,
                beside=tuple(scores.differences),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            msg = f"a score must have every member that an evaluation writes; got: {err!r}"
            raise InvalidInput(msg) from err

    def difference(self, other: str, metric: str) -> Estimate:
        """Return the paired difference of ``metric`` to one of ``beside``."""
        return self.scores.differences[other][metric]


def _estimates(data: Mapping[str, Any]) -> dict[str, Estimate]:
    return {
        str(name): Estimate(
            mean=float(value["mean"]),
            standard_error=float(value["standard_error"]),
            n_samples=int(value["n_samples"]),
        )
        for name, value in data.items()
    }
