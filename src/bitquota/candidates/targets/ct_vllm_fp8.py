"""vLLM on Hopper: compressed-tensors of 4-bit and FP8 weights, inputs in FP8 token by token."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.ct_vllm_marlin import packed
from bitquota.candidates.targets.ct_vllm_nvfp4 import FP8
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision
from bitquota.candidates.targets.target import DYNAMIC_FITS

TARGET = replace(
    MARLIN,
    name="ct-vllm-fp8",
    verified="documented",
    summary="compressed-tensors of W4 and FP8 weights for vLLM (Hopper), inputs in FP8 per token.",
    formats=(
        StorageFormat(
            name="W4AFP8-g128",
            weight_bits=4,
            scheme=packed(128),
            kinds=LINEAR,
            column_multiple=128,
        ),
        replace(FP8, name="W8AFP8"),
        full_precision("bf16"),
    ),
    activation_bits=8,
    activation_fit=DYNAMIC_FITS[1],
)
