"""What may become of a KV cache: which bit-widths, stored how, and what must share one.

Keys and values are quantized when they are written, each token by itself, so that nothing is
fitted beforehand: a line of numbers gets the scale that it needs itself.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.candidates.layers import CACHE_FORMAT_BITS
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    Scheme,
)
from bitquota.candidates.table import Candidate, Row
from bitquota.codec import Document
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.layers import Cache

CACHE_BITS = (2, 3, 4, 5, 6, 8, CACHE_FORMAT_BITS)
"""Bit-widths that a cache may have; at 16 it is not quantized."""

CACHE_SCALES = ("head", "token")
"""One scale and offset for each head of a token, or for all heads of a token together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFormat(Document):
    """One way in which a runtime stores a KV cache.

    Attributes:
        name: The runtime's name for it.
        bits: Of one code.
        scheme: How it is quantized; lines of scales do not reach over the end of a head.
    """

    name: str
    bits: int
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFormats(Document):
    """How a runtime stores the KV cache of all layers alike.

    Attributes:
        formats: What it can store beside half precision.
        together: Whether keys and values share a format, too.
    """

    formats: tuple[CacheFormat, ...]
    together: bool = False


def own_scheme(cache: Cache, scales: str) -> Scheme:
    """Return how a cache is stored where no runtime says so: affine, with fp16 scale and offset."""
    per_head = scales == "head"
    return Scheme(
        grid=Grid.OFFSET,
        granularity=Granularity.GROUP if per_head else Granularity.CHANNEL,
        group_size=cache.head_size if per_head else None,
        scale_format=ScaleFormat.FP16,
    )


def tied_caches(caches: Sequence[Cache], formats: CacheFormats | None) -> tuple[Cache, ...]:
    """Return caches in the groups that a runtime demands; without one each decides for itself."""
    if formats is None:
        return tuple(caches)
    if formats.together:
        return tuple(replace(cache, group="kv_cache") for cache in caches)
    return tuple(
        replace(cache, group="k_caches" if cache.holds_keys else "v_caches") for cache in caches
    )


def cache_rows(
    caches: Sequence[Cache], bits: Sequence[int], *, scales: str, formats: CacheFormats | None
) -> tuple[Row, ...]:
    """Return every permitted quantization of the KV cache.

    Args:
        caches: In their groups.
        bits: Bit-widths on offer, among ``CACHE_BITS``.
        scales: One of ``CACHE_SCALES``, where no runtime has formats of its own.
        formats: Those of a runtime.

    Raises:
        InvalidInput: A bit-width that the runtime does not store, or not for heads of this size.
    """
    members: dict[str, list[Cache]] = {}
    for cache in caches:
        members.setdefault(cache.group, []).append(cache)
    rows = []
    for group, own in members.items():
        for width in sorted(bits):
            chosen = tuple(_candidate(cache, width, scales, formats) for cache in own)
            rows.append(Row(group=group, candidates=chosen))
    return tuple(rows)


def _candidate(cache: Cache, bits: int, scales: str, formats: CacheFormats | None) -> Candidate:
    scheme = own_scheme(cache, scales)
    if bits == CACHE_FORMAT_BITS:
        return Candidate.of(cache, FULL_PRECISION_BITS, scheme)
    if formats is not None:
        stored = {known.bits: known.scheme for known in formats.formats}
        if bits not in stored:
            widths = ", ".join(map(str, sorted({*stored, CACHE_FORMAT_BITS})))
            msg = f"the target's runtime keeps a KV cache at {widths} bits; got {bits}"
            raise InvalidInput(msg, kv_bits=bits)
        scheme = stored[bits]
    if scheme.group_size is not None and cache.head_size % scheme.group_size:
        msg = (
            f"the target's runtime quantizes a KV cache in groups of {scheme.group_size}, which "
            f"must divide the {cache.head_size} numbers of a head: offer 16 bits alone, or leave "
            "out the target"
        )
        raise InvalidInput(msg, head_size=cache.head_size)
    return Candidate.of(cache, bits, scheme)
