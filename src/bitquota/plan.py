"""A plan: one candidate for every layer, exact sizes, measured loss, proof, and baselines.

Design: docs/design/bytes.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar, Self

from bitquota.candidates.budget import Budget
from bitquota.candidates.layers import Cache, Inventory, Layer, UnquantizedTensor
from bitquota.candidates.storage import Sparsity
from bitquota.candidates.table import RESOURCES, Candidate
from bitquota.candidates.targets import target_by_name
from bitquota.canonical import (
    JsonObject,
    canonical_json,
    read_json,
    write_whole,
)
from bitquota.codec import Document, Form, Seal
from bitquota.corrections import Correction
from bitquota.errors import InvalidPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from bitquota.candidates.storage import StorageSize
    from bitquota.candidates.targets import Target, Violation

SCHEMA = "bitquota/plan/1"
SOLVER = "solver"
"""``Plan.selected`` when no baseline measured better than the solver's own plan."""

WEIGHTS_SUFFIX = ".weights.safetensors"
"""Takes the place of ``.json`` in the name of a plan's file of quantized weights."""

BESIDE = (".certificate.npz", WEIGHTS_SUFFIX)
"""What takes the place of ``.json`` in the names of files that 'bitquota plan' writes beside it."""

ONLY_WEIGHTS = (
    "an earlier release wrote the plan and named the model by its weights alone: they are the "
    "same, but the graph cannot be compared; plan again to have it covered"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLoss(Document):
    """Mean loss increase over full precision on ``n_samples`` samples, and its standard error."""

    mean: float
    standard_error: float
    n_samples: int
    unit: str = "nats/sample"
    accuracy: float | None = None
    """Top-1 accuracy on the same samples when they are labelled, between 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutput(Document):
    """One output of the model: what it was taken for, and how far the plan changes it.

    Attributes:
        name: As the model names it: a key, a position in a tuple, or ``output`` where it is alone.
        kind: What it was taken for (``sensitivity.outputs.Kind``).
        loss: The loss that is measured on it.
        weight: What its loss counts for in the sum over outputs.
        undone: ``softmax``, ``sigmoid`` or ``argmax`` at the end of the network that the loss is
            measured before, or empty.
        axis: Which axis of the output holds classes.
        shape: Of one sample of what the loss is measured on.
        scale: Variance of the reference, which a relative error is relative to.
        changed: Share of answers (arg-max, or side of one half) that the plan changes on the
            hold-out samples; ``None`` where the output is no answer.
        relative_error: Norm of the change over the norm of the reference there.
        correlation: Pearson's, of all elements with their reference there.
    """

    FORM: ClassVar[Form] = Form(what="an output")

    name: str
    kind: str
    loss: str
    weight: float = 1.0
    undone: str = ""
    axis: int = -1
    shape: tuple[int, ...] = ()
    scale: float | None = None
    changed: float | None = None
    relative_error: float | None = None
    correlation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment(Document):
    """One layer and the candidate it gets."""

    layer: Layer
    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAssignment(Document):
    """The keys or values of one attention layer, and the candidate they get."""

    cache: Cache
    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Document):
    """How good the solver's choice is for the matrix it was given.

    ``bound <= objective`` holds for the *predicted* loss increase; only a measurement speaks
    of the true one.
    """

    FORM: ClassVar[Form] = Form(what="a proof", derived=("absolute_gap", "relative_gap"))

    status: str
    limit: str | None
    objective: float
    bound: float | None
    solver: str
    matrix_digest: str
    certified: bool = False
    """Whether the bound is safe against rounding, not merely a float that a solver printed."""

    @property
    def absolute_gap(self) -> float | None:
        """``objective - bound``."""
        return None if self.bound is None else max(0.0, self.objective - self.bound)

    @property
    def relative_gap(self) -> float | None:
        """The absolute gap as a share of the objective's magnitude."""
        gap = self.absolute_gap
        if gap is None:
            return None
        return 0.0 if gap == 0 else gap / max(abs(self.objective), 1e-300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline(Document):
    """A simpler way to choose, measured on the same samples with the same corrections."""

    FORM: ClassVar[Form] = Form(left_out=("cache_bits", "cache_size_bits", "row_bits", "sparse"))

    name: str
    weight_bits: tuple[int, ...]
    """Bit-width of each layer in the plan's order."""
    size_bits: int
    measured: MeasuredLoss
    paired_difference: float = 0.0
    """Mean over samples of (this baseline's loss minus the returned plan's)."""
    paired_error: float = 0.0
    """Standard error of ``paired_difference``."""
    cache_bits: tuple[int, ...] = ()
    """Bit-width of each KV cache in the plan's order, if it has any."""
    cache_size_bits: int = 0
    """Storage of all of them together."""
    row_bits: tuple[tuple[int, ...], ...] = ()
    """Of each layer in the plan's order the bit-widths of its rows, where these differ; nothing at
    all if they do in no layer."""
    sparse: tuple[str, ...] = ()
    """Layers with 2:4."""

    @property
    def mean_bits(self) -> tuple[float, ...]:
        """Bits of a code of each layer, on average over its rows; 2:4 is not told apart."""
        rows = self.row_bits or ((),) * len(self.weight_bits)
        return tuple(
            sum(own) / len(own) if own else bits
            for bits, own in zip(self.weight_bits, rows, strict=True)
        )

    @property
    def total_bits(self) -> int:
        """Storage of quantized weights and KV cache."""
        return self.size_bits + self.cache_size_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTarget(Document):
    """The deployment target that a plan was made for.

    Attributes:
        name: What ``--target`` took.
        version: Digest of the target's rules then: formats, ties, exclusions, options.
        packages: Versions of the runtimes that the rules were checked against.
    """

    name: str
    version: str
    packages: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target) -> Self:
        """Return what a plan for ``target`` says of it."""
        return cls(name=target.name, version=target.version, packages=dict(target.versions))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWeights(Document):
    """The file of quantized weights that belongs to a plan (``quantizers.quantized_model``).

    Attributes:
        rounding: How codes were chosen, one of ``request.ROUNDINGS``.
        digest: SHA-256 of the file.
        n_bytes: Its size; codes take a byte each there, whatever their width.
    """

    rounding: str
    digest: str
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Document):
    """The bit-width of every layer, and all that is known about how good that is.

    Attributes:
        model_digest: Fingerprint of the model it was made for: its weights, and what is
            computed with them.
        assignments: One per quantizable layer, in module order.
        unquantized: What ships as it is.
        budgets: Limits that the plan keeps.
        corrections: What must be applied when the plan is.
        selected: ``solver``, or the name of the baseline that measured better and was taken.
        predicted: Loss increase that the sensitivity matrix predicts, or ``None`` for a
            baseline that it cannot price.
        measured: Loss increase on the calibration hold-out.
        proof: The solver's status, bound and gap.
        baselines: What was measured beside it.
        loss: Name of the loss.
        provenance: Digests, seed, samples, versions, request; no clock, no machine.
        target: The deployment target that it was made for, if for one.
        outputs: Which outputs the loss was measured on, and how far the plan changes them.
        evidence: Predicted and measured losses of the plan, of neighbours and of random plans
            within the budget, with rank correlations (``Evidence.to_json``).
        weights: The file of quantized weights that it was measured with; without one, weights are
            rounded to nearest wherever the plan is applied.
        caches: One for the keys and one for the values of each attention layer, where the KV cache
            was planned too.
    """

    FORM: ClassVar[Form] = Form(
        what="a plan",
        error=InvalidPlan,
        schema=SCHEMA,
        advice="name a file that 'bitquota plan' wrote",
        derived=("totals",),
        left_out=(
            "target",
            "evidence",
            "outputs",
            "weights",
            "caches",
        ),  # plans without keep the bytes that they always had
        seal=Seal(
            may_lack=True,
            remedy="write it with 'bitquota plan', or remove the digest to have it computed anew",
        ),
    )

    model_digest: str
    assignments: tuple[Assignment, ...]
    unquantized: tuple[UnquantizedTensor, ...] = ()
    budgets: tuple[Budget, ...] = ()
    corrections: tuple[Correction, ...] = ()
    selected: str = SOLVER
    predicted: float | None = None
    measured: MeasuredLoss | None = None
    proof: Proof | None = None
    baselines: tuple[Baseline, ...] = ()
    loss: str = "kl"
    provenance: JsonObject = field(default_factory=dict)
    target: PlanTarget | None = None
    evidence: JsonObject | None = None
    outputs: tuple[PlanOutput, ...] | None = None
    weights: PlanWeights | None = None
    caches: tuple[CacheAssignment, ...] = ()

    def __post_init__(self) -> None:
        """Check names, sizes and budgets from first principles."""
        if not self.assignments:
            msg = "a plan must assign at least one layer; got none"
            raise InvalidPlan(msg)
        named = [(a.layer, a.candidate) for a in self.assignments]
        cached = [(a.cache, a.candidate) for a in self.caches]
        planned: list[tuple[Layer | Cache, Candidate]] = [*named, *cached]
        names = [layer.name for layer, _ in planned]
        if len(set(names)) != len(names):
            msg = "a plan must assign each layer once; a name appears twice"
            raise InvalidPlan(msg)
        for layer, candidate in planned:
            counted = Candidate.of(
                layer, candidate.weight_bits, candidate.scheme, candidate.activation_bits
            )
            if candidate != counted:
                msg = (
                    f"layer '{layer.name}' at {candidate.label} takes "
                    f"{counted.size_bits:,} bits; the plan says {candidate.size_bits:,} bits "
                    f"for layer '{candidate.layer}'"
                )
                raise InvalidPlan(msg, layer=layer.name)
        for budget in self.budgets:
            spent = self.spent(budget)
            if budget.prices is not None:
                budget.prices.require_model(self.model_digest)
            if spent is not None and spent > budget.limit:
                msg = (
                    f"a plan must keep its budget '{budget.text}' ({budget.limit:,} "
                    f"{budget.unit}); it takes {spent:,}"
                )
                raise InvalidPlan(msg, spent=spent, limit=budget.limit)

    def spent(self, budget: Budget) -> int | None:
        """Return what the plan takes of a budget's resource, ``None`` where nothing prices it."""
        if budget.resource not in RESOURCES and not (budget.prices or budget.schedule):
            return None
        return budget.spent(self.candidates)

    @property
    def activation_fit(self) -> str:
        """How ranges of layers' inputs are found, where they are quantized (``PlanRequest``)."""
        request = self.provenance.get("request") or {}
        return str(request.get("activation_fit", "mse"))

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What was chosen for every layer, and for the KV cache where that was planned."""
        own = tuple(a.candidate for a in self.assignments)
        return (*own, *(a.candidate for a in self.caches))

    @property
    def inventory(self) -> Inventory:
        """The tensors that the plan speaks of."""
        return Inventory(
            model_digest=self.model_digest,
            layers=tuple(a.layer for a in self.assignments),
            unquantized=self.unquantized,
            caches=tuple(a.cache for a in self.caches),
        )

    @property
    def cache_size_bits(self) -> int:
        """Storage of the KV cache at the context that it was planned for."""
        return sum(a.candidate.size_bits for a in self.caches)

    def caches_at(self, bits: Sequence[int]) -> tuple[Candidate, ...]:
        """Return the candidates of the KV cache with other bit-widths, in the plan's order.

        Raises:
            InvalidPlan: Not one bit-width for each cache.
        """
        if len(bits) != len(self.caches):
            msg = f"one bit-width must be given for each of {len(self.caches)} caches; got {bits}"
            raise InvalidPlan(msg)
        return tuple(
            Candidate.of(a.cache, b, a.candidate.scheme)
            for a, b in zip(self.caches, bits, strict=True)
        )

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Bit-width of each layer, in module order."""
        return tuple(a.candidate.weight_bits for a in self.assignments)

    def candidates_of(self, baseline: Baseline) -> tuple[Candidate, ...]:
        """Return the candidates of a baseline, layer by layer in the plan's order.

        Raises:
            InvalidPlan: As ``candidates_at``.
        """
        whole = self.candidates_at(baseline.weight_bits)
        if not baseline.row_bits and not baseline.sparse:
            return whole
        widths = baseline.row_bits or ((),) * len(whole)
        return tuple(
            Candidate.of(
                a.layer,
                c.weight_bits,
                replace(
                    c.scheme,
                    row_bits=rows,
                    sparsity=Sparsity.TWO_OF_FOUR if c.layer in baseline.sparse else None,
                ),
                c.activation_bits,
            )
            for a, c, rows in zip(self.assignments, whole, widths, strict=True)
        )

    def candidates_at(self, weight_bits: Sequence[int]) -> tuple[Candidate, ...]:
        """Return the plan's candidates with other bit-widths, layer by layer in its order.

        They are stored as the plan's target stores them, if it has one.

        Raises:
            InvalidPlan: Not one bit-width for each layer, or one that the target cannot store.
        """
        if len(weight_bits) != len(self.assignments):
            msg = (
                f"one bit-width must be given for each of {len(self.assignments)} layers; got "
                f"{len(weight_bits)}"
            )
            raise InvalidPlan(msg)
        if self.target is not None:
            layers = [a.layer for a in self.assignments]
            return target_by_name(self.target.name).candidates_at(layers, weight_bits)
        return tuple(
            Candidate.of(a.layer, bits, a.candidate.scheme.of_parts, a.candidate.activation_bits)
            for a, bits in zip(self.assignments, weight_bits, strict=True)
        )

    def violations(self, target: Target) -> tuple[Violation, ...]:
        """Return every rule of ``target`` that the plan breaks; empty if it can store the plan."""
        return tuple(self._broken(target))

    def _broken(self, target: Target) -> Iterator[Violation]:
        yield from target.check(
            [a.layer for a in self.assignments],
            [a.candidate for a in self.assignments],
            self.unquantized,
        )
        cached = [a.cache for a in self.caches], [a.candidate for a in self.caches]
        yield from target.check_caches(*cached)

    def fits(self, target: Target) -> bool:
        """Return whether ``target`` can store the plan: whether it has no ``violations``."""
        return next(self._broken(target), None) is None

    def require(self, target: Target) -> None:
        """Raise ``InvalidPlan`` with every layer named, unless ``target`` can store the plan."""
        if found := self.violations(target):
            shown = "; ".join(f"{', '.join(v.layers)}: {v.reason}" for v in found[:5])
            more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
            msg = (
                f"a plan for target '{target.name}' must keep its rules; {shown}{more}: make the "
                f"plan with --target {target.name}"
            )
            raise InvalidPlan(
                msg, target=target.name, violations=[violation.to_json() for violation in found]
            )

    @property
    def rounding(self) -> str:
        """How its weights are rounded."""
        return "nearest" if self.weights is None else self.weights.rounding

    @property
    def n_weights(self) -> int:
        """Quantizable weights."""
        return sum(a.layer.n_weights for a in self.assignments)

    @property
    def size(self) -> StorageSize:
        """Storage of the quantized weights, by part."""
        return reduce(add, (a.candidate.size for a in self.assignments))

    @property
    def size_bits(self) -> int:
        """Storage of the quantized weights with scales, zero points and padding."""
        return self.size.total

    @property
    def unquantized_bits(self) -> int:
        """Storage of everything that ships as it is."""
        return sum(t.size_bits for t in self.unquantized)

    @property
    def model_bits(self) -> int:
        """Storage of the whole model."""
        return self.size_bits + self.unquantized_bits

    @property
    def average_bits(self) -> float:
        """Code bits per quantizable weight, as papers count."""
        return self.size.codes / self.n_weights

    @property
    def effective_bits(self) -> float:
        """Stored bits per quantizable weight, scales, zero points and padding included."""
        return self.size_bits / self.n_weights

    @property
    def totals(self) -> JsonObject:
        """Sums over layers and tensors, as they stand in the JSON."""
        cache = {"cache_bits": self.cache_size_bits} if self.caches else {}
        return cache | {
            "n_weights": self.n_weights,
            "weights": self.size.to_json(),
            "unquantized_bits": self.unquantized_bits,
            "model_bits": self.model_bits,
            "average_bits": self.average_bits,
            "effective_bits": self.effective_bits,
        }

    def digest(self) -> str:
        """Return the content digest, as it stands in the JSON."""
        return str(self.to_json()["digest"])

    def dumps(self) -> str:
        """Return the canonical JSON text: equal plans give equal bytes."""
        return canonical_json(self.to_json()) + "\n"

    def save(self, path: Path) -> None:
        """Write the canonical JSON to ``path`` (whole or not at all)."""
        write_whole(path, self.dumps().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan file; raises ``InvalidPlan``."""
        return cls.from_json(read_json(path, "a plan file", cls.FORM.advice, InvalidPlan))


def weights_near(files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the files of quantized weights in the folders of plans or lock files.

    Plans name theirs by digest, so that it does not matter which is which.
    """
    folders = dict.fromkeys(file.resolve().parent for file in files)
    return tuple(path for f in folders for path in sorted(f.glob(f"*{WEIGHTS_SUFFIX}")))
