"""vLLM with integer products: compressed-tensors of 8-bit weights, inputs in 8 bits per token."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import Scheme
from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision
from bitquota.candidates.targets.target import DYNAMIC_FITS

TARGET = replace(
    MARLIN,
    name="ct-vllm-int8",
    verified="run",
    not_run="",
    summary="compressed-tensors of 8-bit integers for vLLM, inputs in 8 bits per token.",
    formats=(
        StorageFormat(name="W8A8", weight_bits=8, scheme=Scheme(), kinds=LINEAR),
        full_precision("bf16"),
    ),
    activation_bits=8,
    activation_fit=DYNAMIC_FITS[0],
)
