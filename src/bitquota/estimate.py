"""What a job is expected to take, before anything is measured; torch-free.

Design: docs/design/progress.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput
from bitquota.plan import PlanOutput

JOBS = ("plan", "measure", "compare")
"""Jobs that can be estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate(Document):
    """One part of the job.

    Attributes:
        stage: What it does, as ``progress.stage_words`` reads it.
        passes: Forward-equivalents over the calibration samples; a backward pass counts as two.
        most_passes: Those that it takes at most; equal to ``passes`` where they are known exactly.
        seconds: What ``passes`` are expected to take on this machine.
    """

    stage: str
    passes: float
    most_passes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEstimate(Document):
    """What one budget leaves of the model.

    Attributes:
        text: What the user wrote.
        model_bits: Size of the whole model with the widest plan that keeps the budget.
    """

    text: str
    model_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal(Document):
    """Something that will not be done.

    Attributes:
        what: A tensor that ships as it is, or a measure that is left out.
        reason: Why.
        size_bits: Of the tensor.
    """

    what: str
    reason: str
    size_bits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate(Document):
    """What a job is expected to take, and what it is about.

    Attributes:
        job: ``plan``, ``measure`` or ``compare``.
        model_digest: The model's.
        engine: What will run the model.
        device: Where.
        n_layers: Layers that are quantized.
        n_groups: Decisions: layers that must agree are one.
        n_candidates: Candidates of all groups together.
        n_pairs: Pairs of candidates of different groups, whose cross-layer terms count.
        samples: Samples that sensitivities are measured on.
        holdout_samples: Samples that plans are compared on.
        model_bits: The whole model as it is.
        quantizable_bits: What of it is in layers that are quantized.
        budgets: What each budget leaves.
        stages: Parts of the job in their order.
        seconds_per_pass: Median of a few timed passes over a chunk, for all calibration samples.
        peak_bytes: Memory that this process is expected to take at its peak.
        refused: What will not be done, the largest first.
        outputs: What the outputs were taken for, and the loss of each; empty with a loss of one's
            own.
    """

    FORM: ClassVar[Form] = Form(
        what="an estimate", schema="bitquota.estimate/1", left_out=("outputs",)
    )

    job: Literal["plan", "measure", "compare"]
    model_digest: str
    engine: str
    device: str
    n_layers: int
    n_groups: int
    n_candidates: int
    n_pairs: int
    samples: int
    holdout_samples: int
    model_bits: int
    quantizable_bits: int
    budgets: tuple[BudgetEstimate, ...]
    stages: tuple[StageEstimate, ...]
    seconds_per_pass: float
    peak_bytes: int
    refused: tuple[Refusal, ...] = ()
    outputs: tuple[PlanOutput, ...] = ()

    def __post_init__(self) -> None:
        """Check that nothing is negative."""
        numbers = [self.n_candidates, self.seconds_per_pass, self.peak_bytes]
        numbers += [x for s in self.stages for x in (s.passes, s.most_passes - s.passes, s.seconds)]
        if min(numbers) < -1e-6:
            msg = f"an estimate must consist of numbers of at least 0; got {min(numbers)}"
            raise InvalidInput(msg)

    @property
    def passes(self) -> float:
        """Forward-equivalents over the calibration samples that are expected."""
        return sum(stage.passes for stage in self.stages)

    @property
    def most_passes(self) -> float:
        """Forward-equivalents over the calibration samples at most."""
        return sum(stage.most_passes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds that are expected."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def most_seconds(self) -> float:
        """Seconds at most, at the speed that was timed."""
        return self.seconds + (self.most_passes - self.passes) * self.seconds_per_pass
