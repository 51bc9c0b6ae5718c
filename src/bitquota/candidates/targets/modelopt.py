"""ModelOpt folders: NVFP4 weights in bf16 products, and FP8 with one scale for each tensor."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import Granularity, Grid, Scheme
from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.ct_vllm_nvfp4 import NVFP4
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision

TARGET = replace(
    MARLIN,
    name="modelopt",
    summary="Folders as NVIDIA's Model Optimizer writes them: NVFP4 and FP8 weights.",
    versions={"vllm": "0.33", "nvidia-modelopt": "0.47"},
    formats=(
        StorageFormat(name="NVFP4", weight_bits=4, scheme=NVFP4, kinds=LINEAR, column_multiple=16),
        StorageFormat(
            name="FP8",
            weight_bits=8,
            scheme=Scheme(grid=Grid.FLOAT, granularity=Granularity.TENSOR),
            kinds=LINEAR,
        ),
        full_precision("bf16"),
    ),
    exporter="modelopt",
    verified="read",
    not_run="runtimes need an NVIDIA GPU; the files are read back and run in torch",
)
