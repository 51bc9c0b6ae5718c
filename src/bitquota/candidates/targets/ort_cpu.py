"""ONNX Runtime on CPUs: QDQ initializers of 2, 4 and 8 bits.

Matrix products are stored in blocks of 32 columns, which ONNX Runtime turns into MatMulNBits;
convolutions, and the matrices of recurrent layers and contractions, per output channel, which saves
bytes and no time (they are dequantized at run time).
"""

from __future__ import annotations

from bitquota.candidates.layers import MATRICES
from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.targets.storage_format import (
    CONVOLUTIONS,
    EMBEDDINGS,
    LINEAR,
    full_precision,
    per_width,
)
from bitquota.candidates.targets.target import Target

_WIDTHS = (2, 4, 8)
_BY_CHANNEL = CONVOLUTIONS | EMBEDDINGS | LINEAR | MATRICES
_BLOCKS = Scheme(granularity=Granularity.GROUP, group_size=32)

TARGET = Target(
    name="ort-cpu",
    summary="ONNX with quantized initializers, run by ONNX Runtime on CPUs.",
    versions={"onnx": "1.23", "onnxruntime": "1.31"},
    formats=(
        *per_width(_WIDTHS, _BLOCKS, name="int{bits}-b32", kinds=LINEAR, column_multiple=32),
        *per_width(_WIDTHS, Scheme(), name="int{bits}", kinds=_BY_CHANNEL),
        full_precision("float"),
    ),
    exporter="onnx-qdq",
    # At its default level 4 ONNX Runtime quantizes activations to int8: 2.4 % relative error.
    runtime_options={"session.qdq_matmulnbits_accuracy_level": "1"},
    verified="run",
)
