"""Tasks: parts of a measurement that others carry out at the same time.

The forward-only measures treat chunk after chunk, and everything that they find goes through the
ledger. So any process with the same model, samples and request can run the same loop for one chunk
only; whoever runs the whole loop afterwards finds that chunk in the ledger and computes the same
bits as if it had done everything alone.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, overload

from bitquota.canonical import digest_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.models.calibration import CalibrationSet


CHOICES = "choices"
"""The task of ``measure_choices``; the others are named after their measure."""

MEASURES = ("gram", "pairs", "diagonal", CHOICES)
"""What can be done chunk by chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Document):
    """One chunk of one measurement.

    Attributes:
        measure: One of ``MEASURES``.
        chunk: Which chunk of the runner.
        point: Base point, or for ``choices`` their centre; a row within each group.
        choices: What ``choices`` measures.
        samples: Digest of the runner's samples (``samples_digest``); empty means those that
            sensitivities are measured on.
    """

    FORM: ClassVar[Form] = Form(what="a task", left_out=("samples",))

    measure: str
    chunk: int
    point: tuple[int, ...] | None = None
    choices: tuple[tuple[int, ...], ...] = ()
    samples: str = ""

    def __post_init__(self) -> None:
        """Check name and chunk."""
        if self.measure not in MEASURES or self.chunk < 0:
            msg = f"a task must measure one of {', '.join(MEASURES)} on a chunk; got {self}"
            raise InvalidInput(msg, measure=self.measure, chunk=self.chunk)


def samples_digest(samples: CalibrationSet) -> str:
    """Return what tells sets of samples apart, in every process that cut them alike."""
    return digest_json(samples.to_json())


@overload
def as_point(choice: Sequence[int]) -> tuple[int, ...]: ...
@overload
def as_point(choice: None) -> None: ...
def as_point(choice: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return a row within each group as plain integers; ``None`` stays full precision."""
    return None if choice is None else tuple(int(row) for row in choice)
