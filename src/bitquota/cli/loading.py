"""Samples for a command: arrays, or text with the tokenizer of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.cli.remote import check_files
from bitquota.models.sources import model_source, require_existing, tokenizer_of

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.models.calibration import CalibrationSet


def check_sources(
    model: str,
    *samples: str | None,
    tokenizer: str | None = None,
    imatrix: Path | None = None,
    server: str | None = None,
) -> None:
    """Raise what is wrong with the names of a model and of sets, before anything is loaded.

    Raises:
        InvalidInput: No such file, or of a kind that cannot be loaded, here or on a server.
    """
    named = [spec for spec in samples if spec is not None]
    if server is not None:
        check_files(model, *named)
        return
    model_source(model)
    for spec in named:
        tokenizer_of(spec, model=model, tokenizer=tokenizer)
    if imatrix is not None:
        require_existing(imatrix, "an importance matrix (.dat)", "--imatrix")


def load_samples(
    spec: str, *, model: str, tokenizer: str | None = None, length: int | None = None
) -> CalibrationSet:
    """Load a calibration set; a text takes the tokenizer of the model's folder if it has one.

    Raises:
        InvalidCalibration: See ``bitquota.models.load_calibration``.
    """
    from bitquota.models.samples import load_calibration
    from bitquota.models.text import DEFAULT_LENGTH

    tokenizer = tokenizer_of(spec, model=model, tokenizer=tokenizer)
    return load_calibration(spec, tokenizer=tokenizer, length=length or DEFAULT_LENGTH)
