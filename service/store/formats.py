"""Kinds of uploads and the file formats that are taken."""

from __future__ import annotations

from enum import StrEnum


class ArtifactKind(StrEnum):
    """What an upload is for; plans, their quantized weights and matrices are also left by jobs."""

    MODEL = "model"
    DATASET = "dataset"
    PLAN = "plan"
    MATRIX = "matrix"
    QUANTIZED = "quantized"


FORMATS_OF_RESULTS = {
    ArtifactKind.PLAN: "json",
    ArtifactKind.MATRIX: "npz",
    ArtifactKind.QUANTIZED: "safetensors",
    ArtifactKind.MODEL: "pt2",
}
"""What jobs leave, by the upload that it becomes."""


class ModelFormat(StrEnum):
    """Model files that the service can tell apart and may take."""

    PT2 = "pt2"
    HUGGING_FACE = "huggingface-zip"
    ONNX = "onnx"


class DatasetFormat(StrEnum):
    """Calibration files that the service takes."""

    NPZ = "npz"
    SAFETENSORS = "safetensors"
