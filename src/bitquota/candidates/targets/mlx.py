"""MLX on Apple silicon: affine groups of 64 with a scale and a bias each."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.caches import CacheFormat, CacheFormats
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.targets.storage_format import (
    EMBEDDINGS,
    LINEAR,
    StorageFormat,
    full_precision,
)
from bitquota.candidates.targets.target import Target

_AFFINE = Scheme(
    grid=Grid.OFFSET,
    granularity=Granularity.GROUP,
    group_size=64,
    scale_format=ScaleFormat.FP16,
    row_alignment_bits=32,
)
_WIDTHS = (2, 3, 4, 5, 6, 8)

TARGET = Target(
    name="mlx",
    summary="A folder for mlx-lm: groups of 64 with scale and bias (32 where 64 divides no row).",
    versions={"mlx": "0.32"},
    formats=(
        *(
            StorageFormat(
                name=f"affine{bits}-g{size}",
                weight_bits=bits,
                scheme=replace(_AFFINE, group_size=size),
                kinds=LINEAR | EMBEDDINGS,
                column_multiple=size,
            )
            for size in (64, 32)
            for bits in _WIDTHS
        ),
        full_precision(),
    ),
    exporter="mlx",
    verified="run",
    cache=CacheFormats(
        formats=tuple(
            CacheFormat(
                name=f"affine{bits}-g64",
                bits=bits,
                scheme=replace(_AFFINE, row_alignment_bits=0, scale_rule=ScaleRule.ABSMAX),
            )
            for bits in (2, 3, 4, 6, 8)
        ),
        together=True,
    ),
)
