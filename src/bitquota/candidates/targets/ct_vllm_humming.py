"""vLLM with the Humming kernels: compressed-tensors of 2 to 8 bits."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.ct_vllm_marlin import packed
from bitquota.candidates.targets.storage_format import LINEAR, full_precision, per_width

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)

TARGET = replace(
    MARLIN,
    name="ct-vllm-humming",
    summary="compressed-tensors that vLLM serves with Humming: the only kernels for odd widths.",
    versions={"compressed-tensors": "0.20", "vllm": "0.33", "humming": "as vLLM asks for"},
    formats=(
        *per_width(_WIDTHS, packed(128), name="W{bits}A16-g128", kinds=LINEAR, column_multiple=128),
        *per_width(_WIDTHS, packed(32), name="W{bits}A16-g32", kinds=LINEAR, column_multiple=32),
        *per_width(_WIDTHS, packed(None), name="W{bits}A16", kinds=LINEAR),
        full_precision("bf16"),
    ),
)
