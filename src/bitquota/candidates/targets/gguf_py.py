"""GGUF files written in Python: the block types of 32 weights that need no native build."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.caches import CacheFormat, CacheFormats
from bitquota.candidates.storage import Granularity, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.targets.storage_format import (
    EMBEDDINGS,
    LINEAR,
    StorageFormat,
    full_precision,
)
from bitquota.candidates.targets.target import FUSED_SIBLINGS, Target

_BLOCK = Scheme(granularity=Granularity.GROUP, group_size=32, scale_format=ScaleFormat.FP16)

TARGET = Target(
    name="gguf-py",
    summary="GGUF with Q4_0, Q5_0 and Q8_0 tensors, for llama.cpp and everything that reads it.",
    versions={"gguf": "0.19"},
    formats=(
        *(
            StorageFormat(
                name=name,
                weight_bits=bits,
                scheme=_BLOCK,
                kinds=LINEAR | EMBEDDINGS,
                column_multiple=32,
            )
            for name, bits in (("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8))
        ),
        full_precision("F32"),
    ),
    exporter="gguf",
    ties=FUSED_SIBLINGS,
    runtime_options={
        "--no-repack": "llama.cpp built with -march=native crashed on repacked blocks"
    },
    verified="run",
    # Rounded as llama.cpp rounds them: to nearest, by the largest value of a block.
    cache=CacheFormats(
        formats=tuple(
            CacheFormat(name=name, bits=bits, scheme=replace(_BLOCK, scale_rule=ScaleRule.ABSMAX))
            for name, bits in (("q4_0", 4), ("q5_0", 5), ("q8_0", 8))
        )
    ),
)
