"""What long work is given besides its subject: where results are kept, whom to tell, when to stop.

The seed is not here: it belongs to the request, because it changes the result.

Design: docs/design/measurement-cache.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bitquota.errors import Cancelled, InvalidInput
from bitquota.journal import Journal
from bitquota.progress import Course, IsCancelled, OnProgress, Progress, stage_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_MEMORY_BYTES = 2**30
"""The same everywhere, so that the same request gives the same plan on every machine."""

Executor = Callable[[Sequence[Any], Callable[[Any], object]], None]
"""Called with the parts of a measurement and a function that measures one of them here.

It returns when the ledger holds what the parts measure, as far as that can be had: some may be
measured here, the rest elsewhere. What is still missing is measured by the loop that asked.
"""


class Ledger(Protocol):
    """Content-addressed store of float64 arrays."""

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None`` if it was never measured."""
        ...

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        ...

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array; an existing entry is kept as it is."""
        ...

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays in one transaction: all of them or none."""
        ...

    def __len__(self) -> int:
        """Return the number of entries."""
        ...


def checked_entry(key: str, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``array`` as a ledger keeps it; raises ``InvalidInput`` unless it is finite."""
    values = np.ascontiguousarray(array, dtype="<f8")
    if not np.isfinite(values).all():
        msg = f"a ledger entry must be finite; '{key}' is not"
        raise InvalidInput(msg, key=key)
    return values


class MemoryLedger:
    """A ledger that lives as long as the process."""

    def __init__(self) -> None:
        self._entries: dict[str, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None``."""
        return self._entries.get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        return {key: self._entries[key] for key in keys if key in self._entries}

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array."""
        self.put_many({key: array})

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays."""
        checked = {key: checked_entry(key, array) for key, array in entries.items()}
        for key, values in checked.items():
            values.flags.writeable = False
            self._entries.setdefault(key, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How long work runs.

    Attributes:
        ledger: Where measurements are kept, and looked up first; by default forgotten at the end.
        on_progress: Called after each unit of work, from the thread that does it.
        cancelled: Asked between units of work; once it answers true, ``Cancelled`` is raised and
            the ledger (of a training its checkpoint) keeps what was done.
        device: ``auto`` takes a GPU where there is one; otherwise a device of torch.
        memory_bytes: What a measurement may keep: half of it activations for later runs, a quarter
            each outputs of variants and what is computed of their differences.
        journal: Where the state of long walks is kept until they end; by default nowhere.
        processes: How many processes share the batches of a walk over a language model's blocks.
        executor: Has several parts of a measurement carried out at once, where it can be.
        course: Where the whole job is; without one, a stage counts as the whole.
    """

    ledger: Ledger = field(default_factory=MemoryLedger)
    on_progress: OnProgress | None = None
    cancelled: IsCancelled | None = None
    device: str = "auto"
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    journal: Journal = field(default_factory=Journal)
    processes: int = 1
    executor: Executor | None = None
    course: Course | None = None

    def report(
        self, stage: str, done: int, total: int, reused: int = 0, *, weight: float | None = None
    ) -> None:
        """Tell how far a stage is.

        Args:
            stage: Stable name; ``progress.stage_words`` says it to people.
            done: Finished units.
            total: Units of the stage.
            reused: How many of ``done`` were found in the ledger.
            weight: What the stage takes, in the unit of the course; by default a whole phase.
        """
        if self.on_progress is None:
            return
        if self.course is None:
            fraction, until = Course([1.0]).at(stage, done, total, None)
        else:
            fraction, until = self.course.at(stage, done, total, weight)
        self.on_progress(
            Progress(
                stage=stage, done=done, total=total, reused=reused, fraction=fraction, until=until
            )
        )

    def next_phase(self) -> None:
        """Note that the next phase of the whole job begins."""
        if self.course is not None:
            self.course.next_phase()

    def check(self, stage: str) -> None:
        """Raise ``Cancelled`` if the work is to stop."""
        if self.cancelled is not None and self.cancelled():
            raise cancelled_during(stage)

    def part(self) -> Context:
        """Return the context of a part of a measurement: it tells nobody, and is not shared out."""
        return replace(self, on_progress=None, executor=None, course=None)


def cancelled_during(stage: str) -> Cancelled:
    """Return the error of work that was to stop."""
    msg = f"the work was cancelled while {stage_words(stage)}; what was measured until then is kept"
    return Cancelled(msg, stage=stage)
