"""Core ML: linear constants of 4 and 8 bits (predictions can only be checked on macOS)."""

from __future__ import annotations

from bitquota.candidates.storage import ScaleFormat, Scheme
from bitquota.candidates.targets.storage_format import (
    CONVOLUTIONS,
    LINEAR,
    full_precision,
    per_width,
)
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="coreml",
    summary="An 'op_name_configs' table for coremltools' linear quantization.",
    versions={"coremltools": "9.0"},
    formats=(
        *per_width(
            (4, 8),
            Scheme(scale_format=ScaleFormat.FP16),
            name="linear-int{bits}",
            kinds=CONVOLUTIONS | LINEAR,
        ),
        full_precision("fp16"),
    ),
    exporter="coreml-config",
    not_run="Core ML predicts on macOS only",
)
