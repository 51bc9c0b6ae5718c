"""GGUF with llama.cpp's K types: super-blocks of 256 where the row allows, else blocks of 32."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import K_BLOCK, K_BLOCKS, Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.targets.gguf_py import TARGET as PLAIN
from bitquota.candidates.targets.storage_format import (
    EMBEDDINGS,
    LINEAR,
    StorageFormat,
    full_precision,
)

_SUPER = Scheme(
    grid=Grid.K_BLOCKS,
    granularity=Granularity.GROUP,
    group_size=K_BLOCK,
    scale_format=ScaleFormat.FP16,
)

TARGET = replace(
    PLAIN,
    name="gguf-k",
    summary="GGUF with Q2_K to Q6_K and Q8_0 tensors; Q4_0 and Q5_0 where 256 divides no row.",
    formats=(
        *(
            StorageFormat(
                name=f"Q{bits}_K",
                weight_bits=bits,
                scheme=_SUPER,
                kinds=LINEAR | EMBEDDINGS,
                column_multiple=K_BLOCK,
                note="codes of Q2_K to Q6_K are fitted here; llama.cpp's own tool fits others",
            )
            for bits in K_BLOCKS
        ),
        *(f for f in PLAIN.formats if f.weight_bits < 32),
        full_precision("F32"),
    ),
)
