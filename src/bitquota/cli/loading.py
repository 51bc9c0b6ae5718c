"""Samples for a command: arrays, or text with the tokenizer of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.sensitivity.calibration import CalibrationSet


def load_samples(
    spec: str, *, model: str, tokenizer: str | None = None, length: int | None = None
) -> CalibrationSet:
    """Load a calibration set; a text takes the tokenizer of the model's folder if it has one.

    Raises:
        InvalidCalibration: See ``bitquota.formats.load_calibration``.
    """
    from bitquota.formats import load_calibration
    from bitquota.formats.text import DEFAULT_LENGTH

    if tokenizer is None and (Path(model) / "tokenizer.json").is_file():
        tokenizer = model
    return load_calibration(spec, tokenizer=tokenizer, length=length or DEFAULT_LENGTH)
