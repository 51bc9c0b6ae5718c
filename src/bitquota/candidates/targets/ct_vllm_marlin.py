"""vLLM with the Marlin kernels: compressed-tensors of 4 and 8 bits in groups of 128."""

from __future__ import annotations

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.candidates.targets.storage_format import LINEAR, full_precision, per_width
from bitquota.candidates.targets.target import FUSED_SIBLINGS, Target

_WIDTHS = (4, 8)


def packed(group_size: int | None) -> Scheme:
    """Return the scheme of packed rows of 32-bit words with bf16 scales."""
    return Scheme(
        granularity=Granularity.CHANNEL if group_size is None else Granularity.GROUP,
        group_size=group_size,
        scale_format=ScaleFormat.BF16,
        row_alignment_bits=32,
    )


TARGET = Target(
    name="ct-vllm-marlin",
    summary="compressed-tensors that vLLM serves with Marlin (Turing and later).",
    versions={"compressed-tensors": "0.20", "vllm": "0.33"},
    formats=(
        *per_width(_WIDTHS, packed(128), name="W{bits}A16-g128", kinds=LINEAR, column_multiple=128),
        *per_width(_WIDTHS, packed(32), name="W{bits}A16-g32", kinds=LINEAR, column_multiple=32),
        *per_width(_WIDTHS, packed(None), name="W{bits}A16", kinds=LINEAR),
        full_precision("bf16"),
    ),
    exporter="compressed-tensors",
    ties=FUSED_SIBLINGS,
    exclude=("lm_head",),
    excluded_kinds=frozenset({LayerKind.EMBEDDING, LayerKind.EXPERTS}),
    verified="read",
    not_run="vLLM's kernels need an NVIDIA GPU; transformers runs the files on CPUs",
    cache_refusal="vLLM's own caches hold FP8, or integers that it rounds in its own way",
)
