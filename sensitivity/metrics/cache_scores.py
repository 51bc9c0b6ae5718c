"""What quantized keys and values lose, from the gradients of a walk backwards.

Rounding errors of single numbers are small, and to a good approximation independent of each other:
then a loss with the gradients ``g`` of one random direction of its Hessian for each sample grows by
``½ Σ E[g² e²]`` over all numbers that a cache holds, where ``e`` is what quantizing does to them.
Unlike a weight's, the errors differ from token to token, and are known where the gradient is.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bitquota.quantizers.kv_cache import CacheQuantizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.table import Candidate


@contextmanager
def scored_caches(
    part: nn.Module, candidates: Sequence[Candidate], add: Callable[[Candidate, Tensor], None]
) -> Iterator[None]:
    """Within the context gradients that pass the caches of ``part`` are scored.

    Args:
        part: With caches that are open (``models.kv_cache.open_caches``).
        candidates: Of its caches, those that quantize them.
        add: Called for each candidate with ``½ Σ g² e²`` (f64, a number) of the samples of a pass.

    Cost: every candidate's rounding, and a few operations on keys and values; no pass.
    """

    def watch(candidate: Candidate, held: Tensor) -> None:
        if held.requires_grad:
            held.register_hook(  # type: ignore[no-untyped-call]  # torch's own
                lambda gradient: add(candidate, _score(candidate, held.detach(), gradient))
            )

    handles = [
        part.get_submodule(candidate.layer).register_forward_hook(
            lambda _module, _given, held, candidate=candidate: watch(candidate, held)
        )
        for candidate in candidates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _score(candidate: Candidate, held: Tensor, gradient: Tensor) -> Tensor:
    error = CacheQuantizer(candidate.weight_bits, candidate.scheme)(held) - held
    return 0.5 * (gradient * error).square().sum(dtype=torch.float64)
