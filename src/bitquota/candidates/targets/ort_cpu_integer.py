"""ONNX Runtime on CPUs with quantized inputs: QDQ of weights and activations.

Weights have scales per output channel, because ONNX Runtime multiplies integers only with those.
A layer computes in floating point where its inputs have 16 bits, and a convolution also where its
output is read by anything but one further quantized layer.
"""

from __future__ import annotations

from bitquota.candidates.storage import Scheme
from bitquota.candidates.targets.storage_format import (
    CONVOLUTIONS,
    LINEAR,
    full_precision,
    per_width,
)
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="ort-cpu-integer",
    summary="ONNX with quantized weights and inputs, multiplied as integers by ONNX Runtime.",
    versions={"onnx": "1.23", "onnxruntime": "1.31"},
    formats=(
        *per_width((2, 4, 8), Scheme(), name="int{bits}", kinds=CONVOLUTIONS | LINEAR),
        full_precision("float"),
    ),
    exporter="onnx-qdq",
    activation_bits=8,
    other_activation_bits=(4, 6, 16),
    runtime_options={"session.qdq_matmulnbits_accuracy_level": "1"},
    verified="run",
)
