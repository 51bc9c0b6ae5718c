"""What is in memory at once while a model runs: the tensors between its operations, cut by cut.

While an operation runs, its inputs, its outputs and whatever is read later are alive. Each such
moment is a cut; ``peak`` says what the largest takes.

Design: docs/design/live-tensors.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor(Document):
    """A tensor that is read by the operation at hand, or later.

    Attributes:
        elements: Of one sample.
        readers: Layers that read it from here on, each of which quantizes it; none if anything else
            does, too, so that it is kept as it is.
    """

    FORM: ClassVar[Form] = Form(what="a live tensor")

    elements: int
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Document):
    """What is alive while one operation runs."""

    FORM: ClassVar[Form] = Form(what="a cut")

    operation: str
    tensors: tuple[LiveTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Document):
    """The cuts of a model in the order in which it runs."""

    FORM: ClassVar[Form] = Form(what="a schedule")

    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        """Refuse a schedule of nothing."""
        if not self.cuts:
            msg = "a schedule must have at least one operation; got none"
            raise InvalidInput(msg)

    @classmethod
    def of(cls, cuts: Sequence[Cut]) -> Self | None:
        """Return the schedule of these cuts, or ``None`` of none."""
        return cls(cuts=tuple(cuts)) if cuts else None
