"""vLLM with NVIDIA's 4-bit floats: compressed-tensors of NVFP4 and FP8 weights."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision

NVFP4 = Scheme(
    grid=Grid.FLOAT,
    granularity=Granularity.GROUP,
    group_size=16,
    scale_format=ScaleFormat.E4M3,
)

FP8 = StorageFormat(
    name="FP8",
    weight_bits=8,
    scheme=Scheme(grid=Grid.FLOAT),
    kinds=LINEAR,
)

TARGET = replace(
    MARLIN,
    name="ct-vllm-nvfp4",
    summary="compressed-tensors of NVFP4 and FP8 weights for vLLM, activations in bf16.",
    formats=(
        StorageFormat(name="NVFP4", weight_bits=4, scheme=NVFP4, kinds=LINEAR, column_multiple=16),
        FP8,
        full_precision("bf16"),
    ),
)
