"""How far a long piece of work is; torch-free, so that the service can show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitquota.codec import Document
from bitquota.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Document):
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


OnProgress = Callable[[Progress], None]
"""Called after each unit of work, from the thread that does the work."""

IsCancelled = Callable[[], bool]
"""Asked between units of work; ``True`` stops the work with ``Cancelled``."""
