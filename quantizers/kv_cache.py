"""Fake-quantized keys and values: what attention reads after a cache has stored them in few bits.

Every line of numbers, such as one head of one token, gets a scale from its own extremes when it is
written, as runtimes do: nothing is fitted to samples.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS, Granularity, Grid, Scheme
from bitquota.errors import InvalidInput
from bitquota.models.kv_cache import open_caches
from bitquota.quantizers.parameters import SCALE_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from bitquota.candidates.table import Candidate


@dataclass(frozen=True, slots=True)
class CacheQuantizer:
    """Rounds keys or values to what a cache holds.

    Attributes:
        bits: Bits of a code.
        scheme: Affine (``offset``) or symmetric lines, of a group or of all heads of a token.
    """

    bits: int
    scheme: Scheme

    def __post_init__(self) -> None:
        """Refuse grids that no cache has."""
        if self.scheme.grid not in (Grid.OFFSET, Grid.SYMMETRIC):
            msg = f"a KV cache has an affine or a symmetric grid; got '{self.scheme.grid}'"
            raise InvalidInput(msg, grid=str(self.scheme.grid))

    def __call__(self, held: Tensor) -> Tensor:
        """Return keys or values of ``[samples, heads, tokens, head_size]`` as they are read."""
        samples, heads, tokens, size = held.shape
        lines = held.transpose(1, 2).reshape(samples, tokens, heads * size)
        if self.scheme.granularity is Granularity.GROUP:
            assert self.scheme.group_size is not None  # noqa: S101  # invariant of Scheme
            lines = lines.reshape(samples, tokens, -1, self.scheme.group_size)
        affine = self.scheme.grid is Grid.OFFSET
        rounded = self._affine(lines) if affine else self._symmetric(lines)
        return rounded.reshape(samples, tokens, heads, size).transpose(1, 2)

    def _affine(self, lines: Tensor) -> Tensor:
        """``lowest + q s`` with ``2^b`` levels from the least to the largest value of a line."""
        low, high = lines.aminmax(dim=-1, keepdim=True)
        scale = self._stored((high - low) / ((1 << self.bits) - 1))
        low = self._stored(low)
        codes = ((lines - low) / _nonzero(scale)).round().clamp(0, (1 << self.bits) - 1)
        return codes * scale + low

    def _symmetric(self, lines: Tensor) -> Tensor:
        """``q s`` as llama.cpp's Q8_0, Q5_0 and Q4_0 have it.

        At 8 bits the largest magnitude becomes code 127; below, where one level more counts, the
        value of largest magnitude becomes the lowest code, whatever its sign. Codes are computed
        with the scale before it is rounded to its format, as there.
        """
        largest = 1 << (self.bits - 1)
        if self.bits == 8:
            exact = lines.abs().amax(dim=-1, keepdim=True) / (largest - 1)
        else:
            extreme = lines.gather(-1, lines.abs().argmax(dim=-1, keepdim=True))
            exact = extreme / -largest
        codes = (lines / _nonzero(exact)).round().clamp(-largest, largest - 1)
        return codes * self._stored(exact)

    def _stored(self, scale: Tensor) -> Tensor:
        return scale.to(SCALE_DTYPES[self.scheme.scale_format]).to(scale.dtype)


def _nonzero(scale: Tensor) -> Tensor:
    """Return scales to divide by; a line of equal values has none."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def cache_quantizers(candidates: Iterable[Candidate]) -> dict[str, CacheQuantizer]:
    """Return the quantizers of the caches among ``candidates``; of those in half precision none."""
    return {
        c.layer: CacheQuantizer(c.weight_bits, c.scheme)
        for c in candidates
        if c.cached and c.weight_bits != FULL_PRECISION_BITS
    }


def hook_cache(module: nn.Module, name: str, quantizer: CacheQuantizer) -> RemovableHandle:
    """Quantize a cache of ``module``, which ``models.kv_cache.open_caches`` has opened.

    Returns the handle that undoes it.
    """
    return module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: (quantizer(args[0]),)
    )


def put_caches(module: nn.Module, candidates: Iterable[Candidate]) -> nn.Module:
    """Let the caches of ``module`` hold what ``candidates`` say from now on, and return it."""
    found = cache_quantizers(candidates)
    open_caches(module, found)
    for name, quantizer in found.items():
        hook_cache(module, name, quantizer)
    return module


@contextmanager
def quantized_caches(module: nn.Module, candidates: Iterable[Candidate]) -> Iterator[None]:
    """Within the context the caches of ``module`` hold what ``candidates`` say."""
    handles = [hook_cache(module, name, q) for name, q in cache_quantizers(candidates).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
