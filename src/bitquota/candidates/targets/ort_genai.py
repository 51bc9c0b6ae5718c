"""ONNX Runtime GenAI: language models in blocks of 32 with 2, 4 and 8 bits, keys and values kept.

Embeddings are stored in the same blocks, and shared with a tied output layer.
"""

from __future__ import annotations

from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.targets.storage_format import EMBEDDINGS, LINEAR, full_precision, per_width
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="ort-genai",
    summary="A folder for ONNX Runtime GenAI: a decoder with its cache in blocks of 32, tokenizer.",
    versions={"onnxruntime": "1.31", "onnxruntime-genai": "0.18"},
    formats=(
        *per_width(
            (2, 4, 8),
            Scheme(granularity=Granularity.GROUP, group_size=32),
            name="int{bits}-b32",
            kinds=LINEAR | EMBEDDINGS,
            column_multiple=32,
        ),
        full_precision("float"),
    ),
    exporter="onnx-genai",
    verified="run",
)
