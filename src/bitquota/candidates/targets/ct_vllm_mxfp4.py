"""vLLM with the 4-bit floats of the Open Compute Project: compressed-tensors of MXFP4 and FP8."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.targets.ct_vllm_nvfp4 import FP8
from bitquota.candidates.targets.ct_vllm_nvfp4 import TARGET as NVIDIA
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision

MXFP4 = Scheme(
    grid=Grid.FLOAT,
    granularity=Granularity.GROUP,
    group_size=32,
    scale_format=ScaleFormat.E8M0,
)

TARGET = replace(
    NVIDIA,
    name="ct-vllm-mxfp4",
    summary="compressed-tensors of MXFP4 and FP8 weights for vLLM, activations in bf16.",
    formats=(
        StorageFormat(name="MXFP4", weight_bits=4, scheme=MXFP4, kinds=LINEAR, column_multiple=32),
        FP8,
        full_precision("bf16"),
    ),
)
