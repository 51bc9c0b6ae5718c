"""TensorRT: weight-only 4 bits for matrix products in blocks, 8 bits for everything."""

from __future__ import annotations

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.candidates.targets.storage_format import (
    CONVOLUTIONS,
    LINEAR,
    full_precision,
    per_width,
)
from bitquota.candidates.targets.target import Target

_BLOCKS = Scheme(granularity=Granularity.GROUP, group_size=128, scale_format=ScaleFormat.FP16)

TARGET = Target(
    name="tensorrt",
    summary="ONNX QDQ within what TensorRT accepts: no 2 bits, convolutions at 8.",
    versions={"tensorrt": "11"},
    formats=(
        *per_width((4,), _BLOCKS, name="int{bits}-b128", kinds=LINEAR, column_multiple=128),
        *per_width((8,), Scheme(), name="int{bits}", kinds=CONVOLUTIONS | LINEAR),
        full_precision("fp16"),
    ),
    exporter="onnx-qdq",
    not_run="TensorRT needs an NVIDIA GPU; ONNX Runtime runs the file on CPUs",
)
