"""How far a long piece of work is; torch-free, so that the service can show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import Cancelled, InvalidInput

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report on the way.

    Attributes:
        stage: What is being done, such as ``pairs`` or ``holdout``.
        done: Finished units of the stage, those found in the ledger included.
        total: Units of the stage.
        reused: How many of ``done`` were found in the ledger.
    """

    stage: str
    done: int
    total: int
    reused: int = 0

    def __post_init__(self) -> None:
        """Check ``0 <= reused <= done <= total``."""
        if not 0 <= self.reused <= self.done <= self.total:
            msg = f"progress must satisfy 0 <= reused <= done <= total; got {self}"
            raise InvalidInput(msg)

    @property
    def fraction(self) -> float:
        """Share of the stage that is done; an empty stage is done."""
        return self.done / self.total if self.total else 1.0

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "reused": self.reused,
        }


OnProgress = Callable[[Progress], None]
"""Called after each unit of work, from the thread that does the work."""

IsCancelled = Callable[[], bool]
"""Asked between units of work; ``True`` stops the work with ``Cancelled``."""


def check_cancelled(cancelled: IsCancelled | None, stage: str) -> None:
    """Raise ``Cancelled`` if ``cancelled`` says so.

    Raises:
        Cancelled: The work is to stop; what was committed to a ledger is kept.
    """
    if cancelled is not None and cancelled():
        msg = f"the work was cancelled during '{stage}'; what was measured until then is kept"
        raise Cancelled(msg, stage=stage)
