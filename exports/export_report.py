"""What was written, read back and compared: the proof that files are what the plan says.

Design: docs/design/targets.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.canonical import JsonObject, canonical_json, digest_file, why_unreadable
from bitquota.codec import Document, Form
from bitquota.errors import ExportFailed, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bitquota.candidates.table import Candidate

SCHEMA = "bitquota/receipt/1"
REPORT_FILE = "receipt.json"
TOLERANCE = 1e-3
"""Largest relative difference of outputs: far above rounding, far below a wrong scale."""
HALF_TOLERANCE = 1e-2
"""The same where a graph computes in float16, which runtimes round at other places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file of an export."""

    name: str
    size_bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path, folder: Path) -> Self:
        """Hash the file at ``path``, named relative to ``folder``."""
        name = path.relative_to(folder).as_posix()
        return cls(name=name, size_bytes=path.stat().st_size, digest=digest_file(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTensor:
    """One quantized weight, as the plan has it and as it was read back.

    Attributes:
        layer: Name of the layer in the plan.
        tensor: Name of the weight in the file.
        planned: Bit-width and scheme of the plan, for a person.
        stored: What the file holds, for a person.
        planned_bits: Size in the plan.
        actual_bits: Size in the file: codes, scales, zero points and their padding.
    """

    layer: str
    tensor: str
    planned: str
    stored: str
    planned_bits: int
    actual_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far an exported model's output is from the fake-quantized model's."""

    maximum: float
    relative: float
    """Norm of the difference over the norm of the fake-quantized output."""
    n_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed(Document):
    """One run of the exported files, timed, beside what the plan's cost table predicts.

    Attributes:
        predicted_ns: By the table.
        measured_ns: Here, at the speed that the machine had when the table was made: ``clocked_ns``
            times ``speed``.
        clocked_ns: Here, as it was.
        speed: Time that the table predicts for the model in full precision over what that took
            here, in turn with the files; 1 where nothing tells, as on another machine.
        limit_ns: The plan's budget.
        table: Digest of the table.
        device: What it was timed on.
        clock: ``processor`` or ``wall``.
        threads: That the runtime ran on.
        batch: Samples of one run.
        length: Tokens of a sample, or 0.
    """

    predicted_ns: int
    measured_ns: int
    clocked_ns: int
    speed: float
    limit_ns: int
    table: str
    device: str
    clock: str
    threads: int
    batch: int
    length: int = 0

    @property
    def error(self) -> float:
        """How far the prediction lies from what was measured, as a share of that."""
        return self.predicted_ns / self.measured_ns - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRun:
    """What a runtime that rounds activations computed from a file, beside the plan's model.

    Attributes:
        runtime: Its name.
        version: Of the package that it came from.
        n_windows: Windows of the samples that were run.
        n_tokens: Their tokens together.
        relative: Norm of the difference of logits over that of the plan's, each without the mean
            over the tokens known.
        explained: The same for the plan's model with inputs rounded as the runtime rounds them.
        kl: Divergence per token of the runtime's distributions from the plan's, nats.
        log_likelihood: Of the windows' tokens in the runtime, nats per token.
        planned_log_likelihood: The same in the plan's model.
        same_top: Share of positions with the same most probable token.
        texts: Texts that both tokenizers split; 0 where the file has none.
        texts_alike: Those with the same tokens.
        prompt_tokens_per_second: Of windows, on one thread of the machine that exported.
        tokens_per_second: Of a text written token by token, likewise.
    """

    runtime: str
    version: str
    n_windows: int
    n_tokens: int
    relative: float
    explained: float
    kl: float
    log_likelihood: float
    planned_log_likelihood: float
    same_top: float
    texts: int
    texts_alike: int
    prompt_tokens_per_second: float
    tokens_per_second: float

    @property
    def tolerance(self) -> float:
        """Largest difference of logits: twice what is explained; 1/200 for a cache in fp16."""
        return 2 * self.explained + 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport(Document):
    """An export, verified.

    Attributes:
        exporter: What wrote it.
        target: For which target, if for one.
        plan_digest: Of the plan.
        model_digest: Of the full-precision model.
        files: All files but this report.
        tensors: Every quantized weight.
        unquantized_bits: Size of everything else as stored.
        planned_unquantized_bits: The same in the plan (corrections may add biases).
        container_bytes: Bytes of the files that hold neither weights nor other tensors: headers,
            graph, alignment.
        difference: Against fake-quantization, where the files could be run here.
        tolerance: Largest relative difference, if not ``TOLERANCE``.
        runtime: What ran them, its version and options.
        text_run: What a runtime of language models computed, where one ran the files.
        notes: What a user should know.
        timed: One run, where the plan has a budget of time and the runtime is here.
    """

    FORM: ClassVar[Form] = Form(
        what="an export report",
        schema=SCHEMA,
        derived=("payload_bits", "total_bytes", "container_overhead"),
        left_out=("tolerance", "timed", "text_run"),
    )

    exporter: str
    target: str | None
    plan_digest: str
    model_digest: str
    files: tuple[ExportedFile, ...]
    tensors: tuple[ExportedTensor, ...]
    unquantized_bits: int = 0
    planned_unquantized_bits: int = 0
    container_bytes: int = 0
    difference: Difference | None = None
    tolerance: float | None = None
    runtime: JsonObject = field(default_factory=dict)
    text_run: TextRun | None = None
    notes: tuple[str, ...] = ()
    timed: Timed | None = None

    @property
    def payload_bits(self) -> int:
        """Size of the quantized weights as stored."""
        return sum(t.actual_bits for t in self.tensors)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(f.size_bytes for f in self.files)

    @property
    def container_overhead(self) -> float:
        """Container bytes as a share of what they contain, to six places."""
        held = (self.payload_bits + self.unquantized_bits) / 8
        return round(self.container_bytes / held, 6) if held else 0.0

    def require(self) -> None:
        """Raise ``ExportFailed`` unless sizes are the plan's and outputs those of its weights."""
        wrong = [t for t in self.tensors if t.planned_bits != t.actual_bits]
        if wrong:
            shown = "; ".join(
                f"{t.layer}: {t.planned_bits:,} bits planned, {t.actual_bits:,} as {t.stored}"
                for t in wrong[:5]
            )
            msg = (
                f"an export must take the bytes of its plan; {len(wrong)} of {len(self.tensors)} "
                f"weights do not: {shown}"
            )
            raise ExportFailed(msg, layers=[t.layer for t in wrong])
        gap, allowed = self.difference, self.tolerance or TOLERANCE
        if gap is not None and not gap.relative <= allowed:
            msg = (
                f"an export must compute what fake-quantization computes; its outputs on "
                f"{gap.n_samples} samples differ by {gap.relative:.2g} of their norm, more than "
                f"{allowed:g}: {self.runtime.get('name', 'the runtime')} reads the files wrongly"
            )
            raise ExportFailed(msg, relative=gap.relative)

        ran = self.text_run
        if ran is not None and not ran.relative <= ran.tolerance:
            msg = (
                f"an export must compute what its plan computes; logits of {ran.runtime} on "
                f"{ran.n_tokens:,} tokens differ by {ran.relative:.2g} of their norm, and its "
                f"rounding of activations explains {ran.explained:.2g}: it reads the file wrongly"
            )
            raise ExportFailed(msg, relative=ran.relative)

    def save(self, folder: Path) -> None:
        """Write ``receipt.json`` (canonical JSON)."""
        (folder / REPORT_FILE).write_text(canonical_json(self.to_json()) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the export report in an export's folder; raises ``InvalidInput``."""
        path = folder / REPORT_FILE
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as err:
            msg = (
                f"an export's folder must hold a readable {REPORT_FILE}; '{path}' "
                f"{why_unreadable(err)}: name a folder that 'bitquota export' wrote"
            )
            raise InvalidInput(msg, folder=str(folder)) from err
        return cls.from_json(data)


def describe_files(folder: Path, paths: Sequence[Path]) -> tuple[ExportedFile, ...]:
    """Hash files, sorted by name."""
    return tuple(sorted((ExportedFile.of(p, folder) for p in paths), key=lambda f: f.name))


def describe_candidate(candidate: Candidate) -> str:
    """Return bit-width and scheme for a person."""
    scheme = candidate.scheme
    if candidate.weight_bits == FULL_PRECISION_BITS:
        return "full precision"
    if candidate.pruned:
        return "zeros"
    where = f"group of {scheme.group_size}" if scheme.group_size else str(scheme.granularity)
    return f"{candidate.label} {scheme.grid} per {where}, {scheme.scale_format} scales"
