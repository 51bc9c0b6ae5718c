"""OpenVINO on CPUs: compressed constants of 2, 4 and 8 bits."""

from __future__ import annotations

from bitquota.candidates.layers import MATRICES
from bitquota.candidates.storage import Scheme
from bitquota.candidates.targets.storage_format import (
    CONVOLUTIONS,
    EMBEDDINGS,
    LINEAR,
    full_precision,
    per_width,
)
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="openvino-cpu",
    summary="OpenVINO IR with compressed constants, run on CPUs.",
    versions={"openvino": "2026.4"},
    formats=(
        *per_width(
            (2, 4, 8), Scheme(), name="i{bits}", kinds=CONVOLUTIONS | LINEAR | EMBEDDINGS | MATRICES
        ),
        full_precision("f32"),
    ),
    exporter="openvino",
    # By default activations are quantized on the fly and products run in bf16.
    runtime_options={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"},
    verified="run",
)
