"""What quantized keys and values lose, from the gradients of a walk backwards.

Rounding errors of single numbers are small, and to a good approximation independent of each other:
then a loss with the gradients ``g`` of one random direction of its Hessian for each sample grows by
``½ Σ E[g² e²]`` over all numbers that a cache holds, where ``e`` is what quantizing does to them.
Unlike a weight's, the errors differ from token to token, and are known where the gradient is.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bitquota.quantizers.kv_cache import CacheQuantizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.candidates.table import Candidate


@dataclass(slots=True)
class CacheScores:
    """The score of every candidate of a KV cache, summed up while gradients pass.

    Attributes:
        folds: Samples whose gradients are kept apart.
        candidates: By name of the cache, those that quantize it.
        values: ``f64[folds]`` by candidate.
    """

    folds: Sequence[range]
    candidates: dict[str, list[Candidate]] = field(default_factory=lambda: defaultdict(list))
    values: dict[Candidate, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of(cls, candidates: Iterable[Candidate], folds: Sequence[range]) -> CacheScores:
        """Return scores of zero for those of ``candidates`` that quantize a cache."""
        found = cls(folds)
        for candidate in candidates:
            if candidate.cached and candidate not in found.values:
                found.candidates[candidate.layer].append(candidate)
                found.values[candidate] = np.zeros(len(folds))
        return found

    @contextmanager
    def watching(self, part: nn.Module, names: Iterable[str], fold: int) -> Iterator[None]:
        """Within the context gradients that pass the caches of ``part`` are added to a fold."""

        def watch(name: str, held: Tensor) -> None:
            if held.requires_grad:
                held.register_hook(  # type: ignore[no-untyped-call]  # torch's own
                    lambda gradient: self._add(name, held.detach(), gradient, fold)
                )

        handles = [
            part.get_submodule(name).register_forward_hook(
                lambda _module, _given, held, name=name: watch(name, held)
            )
            for name in names
            if name in self.candidates
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, held: Tensor, gradient: Tensor, fold: int) -> None:
        for candidate in self.candidates[name]:
            error = CacheQuantizer(candidate.weight_bits, candidate.scheme)(held) - held
            found = (gradient * error).double().square().sum()
            self.values[candidate][fold] += 0.5 * float(found) / len(self.folds[fold])
