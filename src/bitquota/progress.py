"""How far a long piece of work is, and what it takes; torch-free: the service shows it.

Design: docs/design/progress.md
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

ALMOST = 0.99
"""The largest fraction that is told before the end: there is always something left to write."""

WINDOW_S = 60.0
"""Time left follows from how fast the work went during so many seconds."""

_SETTLED_S = 2.0
"""Seconds before which a rate says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Document):
    """One report on the way.

    Attributes:
        stage: Stable name of what is being done, such as ``pairs`` or ``evidence``.
        done: Finished units of the stage, those found in the ledger included.
        total: Units of the stage.
        reused: How many of ``done`` were found in the ledger.
        fraction: How much of the whole job is done, by what its parts are expected to take; below
            1 until the end. ``None`` where that is not known.
        until: What ``fraction`` will be when the stage ends.
        left_s: Seconds that the job will still take, from how fast it went; the service adds it.
    """

    FORM: ClassVar[Form] = Form(left_out=("fraction", "until", "left_s"))

    stage: str
    done: int
    total: int
    reused: int = 0
    fraction: float | None = None
    until: float | None = None
    left_s: float | None = None

    def __post_init__(self) -> None:
        """Check ``0 <= reused <= done <= total`` and ``0 <= fraction <= until <= 1``."""
        if not 0 <= self.reused <= self.done <= self.total:
            msg = f"progress must satisfy 0 <= reused <= done <= total; got {self}"
            raise InvalidInput(msg)
        known = [f for f in (self.fraction, self.until) if f is not None]
        if any(not 0 <= f <= 1 for f in known) or known != sorted(known):
            msg = f"progress must satisfy 0 <= fraction <= until <= 1; got {self}"
            raise InvalidInput(msg)
        if self.left_s is not None and not 0 <= self.left_s < float("inf"):
            msg = f"seconds left must be a number of at least 0; got {self.left_s}"
            raise InvalidInput(msg)


OnProgress = Callable[[Progress], None]
"""Called after each unit of work, from the thread that does the work."""

IsCancelled = Callable[[], bool]
"""Asked between units of work; ``True`` stops the work with ``Cancelled``."""


def peak_bytes() -> int:
    """Return the largest resident size of this process so far, its libraries included."""
    import resource  # Windows has none, and needs the rest of this module

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return int(largest if sys.platform == "darwin" else largest * 1024)


def lasting(seconds: float) -> str:
    """Return a duration for a person: ``40 s``, ``12 min``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {round(whole % 3600 / 60)} min"


class Course:
    """Where a job is that consists of phases, which are expected to take different times.

    A phase may consist of several stages whose number nobody knows beforehand. As soon as they
    have taken more than the phase was expected to, it counts as done; a phase that ends earlier
    counts as done too.

    Args:
        weights: What each phase is expected to take, in one unit. The first one begins at once.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = [max(0.0, float(weight)) for weight in weights] or [1.0]
        self._phase = 0
        self._finished = 0.0
        self._stage: tuple[str, int] | None = None
        self._spent = 0.0
        self._told = 0.0

    def next_phase(self) -> None:
        """Go on to the following phase, if there is one."""
        self._phase = min(self._phase + 1, len(self._weights) - 1)
        self._finished = self._spent = 0.0
        self._stage = None

    def at(self, stage: str, done: int, total: int, weight: float | None) -> tuple[float, float]:
        """Return the fraction of the job that is done, and that at the end of the stage.

        Args:
            stage: Name of the stage; another one, or fewer ``done``, ends the stage before.
            done: Its finished units.
            total: Its units.
            weight: What the stage takes, in the unit of the phases; ``None`` for a whole phase. One
                of 0 is part of the stage before, which may go on after it.
        """
        if weight == 0.0:
            return self._told, self._told
        if self._stage is not None and (self._stage[0] != stage or done < self._stage[1]):
            self._finished += self._spent
        self._stage = stage, done
        own = self._weights[self._phase]
        whole = own if weight is None else weight
        self._spent = whole * done / max(1, total)
        self._told = max(self._told, self._fraction(self._finished + self._spent))
        return self._told, max(self._told, self._fraction(self._finished + whole))

    def _fraction(self, spent: float) -> float:
        everything = sum(self._weights)
        if not everything:
            return 0.0
        before = sum(self._weights[: self._phase])
        return ALMOST * (before + min(spent, self._weights[self._phase])) / everything


class Pace:
    """How long a job still takes: from how fast its fraction grew of late.

    Args:
        clock: Seconds, such as ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque()

    def told(self, fraction: float) -> None:
        """Note the fraction that is done now."""
        now = self._clock()
        if self._seen and fraction == self._seen[-1][1]:
            if len(self._seen) == 1:
                # What comes before the first fraction says nothing of how fast the others grow.
                self._seen[0] = now, fraction
            return
        self._seen.append((now, fraction))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def left_s(self) -> float | None:
        """Seconds until the end, or ``None`` while nobody can say."""
        if len(self._seen) < 2:
            return None
        (start, first), (_, last) = self._seen[0], self._seen[-1]
        now = self._clock()
        if now - start < _SETTLED_S or last <= first:
            return None
        # What passed since the last report counts: nothing was done in it yet.
        return (1 - last) / (last - first) * (now - start)


_WORDS = {
    # The service and the command line.
    "compile": "compiling kernels, once for this machine",
    "connect": "connecting to a worker",
    "prepare": "preparing the job",
    "load": "preparing model and samples",
    "keep": "storing the results",
    "done": "done",
    # Measures.
    "gram": "measuring each candidate",
    "pairs": "measuring pairs of candidates",
    "diagonal": "measuring each candidate alone",
    "tangent": "differentiating by each candidate",
    "gram_weighted": "scoring by weighted output error",
    "empirical_fisher": "scoring by empirical Fisher",
    "output_fisher": "scoring by output Fisher",
    "kronecker": "scoring by Kronecker Fisher",
    "relative_mse": "scoring by relative weight error",
    "noise_response": "scoring by the response to noise",
    "shapley": "scoring by Shapley shares",
    "attribution": "scoring by attributions",
    "gpfq": "scoring by output error (GPFQ)",
    "weight_mse": "scoring by weight error",
    "first_order": "scoring by gradients",
    "hessian_trace": "scoring by curvature",
    "class_separability": "scoring by class separability",
    "orthogonality": "scoring by orthogonality",
    "limpq": "training steps of all bit-widths",
    "mixquant_threshold": "scoring by an error threshold",
    "candidates": "looking at the layers' inputs",
    "shares": "measuring the shares of layers",
    # The search.
    "search": "searching around good plans",
    "refine": "searching around good plans",
    "choices": "measuring plans",
    "starts": "measuring plans to start from",
    "idle layers": "looking for layers without effect",
    "start": "comparing plans to start from",
    "linearisation": "measuring around a good plan",
    "proposals": "trying proposed plans",
    "linearised": "comparing proposed plans",
    "swaps": "trying swaps of layers",
    "swap": "comparing swaps of layers",
    "evidence": "checking the predictions",
    "full precision": "measuring full precision",
    "hold-out": "comparing plans",
    "plans of": "measuring plans",
    "rounding": "rounding the weights",
    # Other jobs.
    "choice": "measuring a plan",
    "estimate": "timing the model",
    "evaluate": "running the models",
    "export": "writing and reading back files",
    "finetune": "fine-tuning",
    "learn": "learning bit-widths",
    "training": "training",
    "solve": "solving",
    "frontier": "solving budget after budget",
}
_LONGEST_FIRST = sorted(_WORDS, key=len, reverse=True)


def stage_words(stage: str) -> str:
    """Return what a person reads of a stage; what follows its name stands in brackets.

    Short, so that it fits beside a bar in 80 columns.
    """
    for name in _LONGEST_FIRST:
        if stage == name:
            return _WORDS[name]
        if re.match(rf"{re.escape(name)}\b", stage):
            rest = stage[len(name) :].strip(" ,")
            rest = f"round {rest}" if re.match(r"\d", rest) else rest
            return f"{_WORDS[name]} ({rest})"
    return stage.replace("_", " ")
