"""What a user asks of an allocation: everything that decides the plan, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from bitquota.candidates.caches import CACHE_BITS, CACHE_SCALES
from bitquota.candidates.cost_table import CostTable
from bitquota.candidates.storage import ROW_BITS, WEIGHT_BITS, Scheme
from bitquota.candidates.targets import TARGETS
from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.candidates.zero_bits import ALLOWED, PRUNE
from bitquota.codec import Document, Form, OneOrMore
from bitquota.corrections import BEFORE_QUANTIZING, REWRITTEN, SAMPLES_DEPEND, Correction
from bitquota.errors import InvalidInput

MEASURES = (
    "auto", "gram", "pairs", "diagonal", "tangent",
    "gram_weighted",
    "empirical_fisher", "output_fisher", "kronecker", "relative_mse", "noise_response",
    "shapley", "gpfq", "weight_mse",
    "first_order", "hessian_trace", "attribution", "class_separability", "orthogonality", "limpq",
)  # fmt: skip
"""What ``bitquota.sensitivity.registry.measures`` offers; metrics in order of preference."""

SOLVERS = ("auto", "bitquota", "gurobi", "cvxpy_scip", "cp_sat", "brute_force")
"""What ``bitquota.solver.backends`` offers; that package compiles kernels when it is imported."""
FORMER_SOLVERS = {"mathopt": "cvxpy_scip", "highs_rlt": "cp_sat"}
"""Names of solvers that only the benchmarks still run, and which one to use instead."""

TRAINING_METHODS = ("lsq", "tqt", "direct")
"""As ``bitquota.training.weight_quantizers`` has them; that module loads torch."""

RECIPES = (
    "stabilised", "ellipsoid", "bitpruning", "bsq", "msq", "djpq", "uhlich2020", "uhlich2020_p3",
)  # fmt: skip
"""As ``bitquota.training.learn`` has them; that module loads torch."""

ROBUST = ("gradient", "dropbits")
"""What ``bitquota.training.robust`` offers before there is a plan."""

EFFORTS = ("quick", "normal", "thorough")
"""How much work a plan may take, the least first."""

ROUNDINGS = ("auto", "nearest", "gpfq", "gptq", "qep", "learned")
"""``nearest``; ``gpfq`` and ``gptq``: with feedback, layer after layer; ``qep``: as ``gptq``, and
each layer also makes up for part of what quantization did to its inputs; ``auto``: ``qep`` where
its moments fit into memory and the hold-out samples do not prefer ``nearest``; ``learned``: what
``qep`` gives the plan found, then moved by gradients of each block's error."""

ITERATIONS = 200
"""Steps of learned rounding for each block, by default."""

FORMER_ROUNDINGS = {"error_feedback": "gptq"}
"""What commands called roundings before, and what they are called now."""

PRECISIONS = ("fp32", "bf16")
LOSSES = ("kl", "binary_kl", "cross_entropy", "relative_mse", "mse", "cosine")
LOSS_WORDS = {
    "kl": "how far its probabilities move (Kullback-Leibler divergence)",
    "binary_kl": "how far its yes-or-no probabilities move (Kullback-Leibler divergence)",
    "cross_entropy": "how much worse it predicts the labels",
    "relative_mse": "squared error, relative to how much the numbers vary",
    "mse": "squared error",
    "cosine": "how far its vectors turn (cosine distance)",
}
"""What each loss tells, for a person."""
AUTO_LOSS = "auto"
"""The loss follows from what the output is (``sensitivity.outputs``)."""
CACHE_MEASURES = ("auto", "gram_weighted", "gram", "diagonal")
"""Measures that see what quantized keys and values do."""
LARGEST_CONTEXT = 2**28
"""Tokens, and sequences, that may be asked for at most: sizes stay far below 2^62 bits."""
ACTIVATION_FITS = ("mse", "joint", "chan", "irls")
"""Ranges of inputs that are fitted to samples; ``DYNAMIC_FITS`` are those of each token."""
DEFAULT_WEIGHT_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest(Document):
    """The complete order for one or several plans of one model.

    Attributes:
        budgets: One plan for each; a budget is one text, or several joined by ``+`` that must
            hold together (``"3 bits + 2 GBitOps"``). A mere measurement needs none.
        weight_bits: Bit-widths on offer to every layer; if empty, all that the target stores, or
            2, 3, 4, 5, 6 and 8 without a target.
        activation_bits: Bit-width of every layer's input, or ``None`` for full precision; several
            are on offer to each layer beside each width of its weight.
        activation_fit: How grids of inputs are fitted: ``mse`` each tensor's own error; ``joint``,
            ``chan`` and ``irls`` weigh its channels (``quantizers.channel_fit``); ``token`` and
            ``token_float`` (integers, E4M3) give each token its own, when it comes. A target whose
            runtime does that brings its own.
        scheme: How weights are quantized; a target brings its own.
        fixed: Layer pattern to bit-width.
        ties: Lists of layer patterns that must share a candidate.
        exclude: Layer patterns that stay in full precision (and count at that size).
        corrections: What ships with the plan, measured with it.
        correction_samples: Samples that corrections are fitted on.
        loss: Name of the loss whose increase is minimised: one of ``LOSSES``, or ``auto``, which
            follows what the output is; for several outputs also ``NAME=LOSS`` for each, joined
            by commas.
        outputs: Outputs that count, each ``NAME`` or ``NAME=WEIGHT``; all with weight 1 if left
            out.
        measure: How the matrix around full precision is measured: ``gram`` (also ``auto``, unless
            the effort is quick), ``pairs`` (exact, expensive), ``diagonal``, ``tangent``, or a
            metric of ``bitquota compare``, whose plan is then one start of the refinement (or,
            without it, the plan).
        effort: ``quick`` measures the plans that scores of a few passes propose, ``normal`` also
            measures every candidate and searches around the best plan, ``thorough`` does so longer.
        refine: Whether to go on from there: measure anew around the plan found, solve again, and
            try swaps on the true loss.
        samples: Calibration samples for the measurement.
        holdout_samples: Further samples on which plans and baselines are compared; when the set
            is too small for both, each gets its share.
        seed: Of the choice of samples and of the solver.
        solver: Solver backend.
        gap: Relative optimality gap at which the solver may stop.
        time_limit_s: Limit on one solve, or ``None``; with a limit the plan may depend on the
            machine's speed.
        precision: In which arithmetic sensitivities are measured: ``fp32``, or ``bf16`` for speed
            on a GPU. Plans are compared on the hold-out samples in float32 in any case.
        target: Deployment target, whose formats, legal shapes, ties and exclusions decide what
            may become of each layer.
        rounding: How weights are rounded, one of ``ROUNDINGS``.
        iterations: Steps of learned rounding for each block of the network.
        kv_bits: Bit-widths on offer to the keys and to the values of each attention layer, 16 for
            half precision; if empty, the KV cache is neither counted nor quantized.
        kv_scales: Which numbers of a token share a scale there, ``head`` or ``token``; a target
            brings its own.
        context: Tokens of a sequence that the KV cache is counted for.
        sequences: Sequences at the same time, likewise.
        robust: Standard errors that are added to every term of the leading matrix before it is
            solved (``SensitivityMatrix.robust``).
        tables: What prices budgets of time and energy, one for each resource.
        allow: What layers may become beside bit-widths: ``prune`` (zeros, whose mean output is
            folded into the bias, so that ``bias_correction`` is added to the corrections unless
            they have it or adjust batch-norm statistics; with ``row_widths`` rows may be zeros,
            too) and ``2:4`` (two of every four weights).
        row_widths: Bit-widths that the rows (output channels) of one layer may have at most; with
            more than 1, mixes of these are on offer beside whole layers of one bit-width.
    """

    # Requests without these keep the bytes that they always had.
    FORM: ClassVar[Form] = Form(
        what="a request",
        left_out=(
            "outputs", "effort", "rounding", "iterations",
            "kv_bits", "kv_scales", "context", "sequences", "robust", "tables",
            "row_widths", "allow",
        ),
    )  # fmt: skip

    budgets: tuple[str, ...] = ()
    weight_bits: tuple[int, ...] = ()
    activation_bits: OneOrMore | None = None
    activation_fit: str = "mse"
    scheme: Scheme = field(default_factory=Scheme)
    fixed: dict[str, int] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()
    corrections: tuple[Correction, ...] = ()
    correction_samples: int = 1024
    loss: str = AUTO_LOSS
    measure: str = "auto"
    refine: bool = True
    samples: int = 512
    holdout_samples: int = 512
    seed: int = 0
    solver: str = "auto"
    gap: float = 1e-4
    time_limit_s: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    target: str | None = None
    outputs: tuple[str, ...] | None = None
    effort: str = "normal"
    rounding: str = "auto"
    iterations: int = ITERATIONS
    kv_bits: tuple[int, ...] = ()
    kv_scales: str = "head"
    context: int = 0
    sequences: int = 1
    robust: float = 0.0
    tables: tuple[CostTable, ...] = ()
    row_widths: int = 1
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check everything that can be checked without the model."""
        if not self.weight_bits and self.target is None:
            object.__setattr__(self, "weight_bits", DEFAULT_WEIGHT_BITS)
        if self.target is not None and self.scheme != Scheme():
            msg = (
                f"a target brings its own quantizer, so a scheme must not be given with "
                f"'{self.target}'; leave grid, granularity and scales out"
            )
            raise InvalidInput(msg, target=self.target)
        _one_of("measure", self.measure, MEASURES)
        self._check_zero_bits()
        if self.measure == "tangent" and set(self.corrections) - BEFORE_QUANTIZING:
            raise InvalidInput(SAMPLES_DEPEND, measure=self.measure)
        _one_of("effort", self.effort, EFFORTS)
        parse_losses(self.loss)
        parse_outputs(self.outputs or ())
        check_solver(self.solver)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("precision", self.precision, PRECISIONS)
        for bits in self.weight_bits:
            _one_of("weight_bits", bits, WEIGHT_BITS)
        if len(set(self.weight_bits)) < len(self.weight_bits):
            msg = f"weight_bits must name each bit-width once; got {list(self.weight_bits)}"
            raise InvalidInput(msg, weight_bits=list(self.weight_bits))
        if not 0 <= self.seed < 2**63:
            msg = f"seed must be at least 0 and below 2^63; got {self.seed}"
            raise InvalidInput(msg, seed=self.seed)
        self._check_inputs()
        _one_of("activation_fit", self.activation_fit, (*ACTIVATION_FITS, *DYNAMIC_FITS))
        if self.target is not None and self.target in TARGETS:
            fit = TARGETS[self.target].agreed_fit(self.activation_fit)
            object.__setattr__(self, "activation_fit", fit)
        if self.iterations != ITERATIONS and self.rounding != "learned":
            msg = (
                "iterations are steps of learned rounding; got them with the rounding "
                f"'{self.rounding}': take 'learned', or leave them out"
            )
            raise InvalidInput(msg, rounding=self.rounding)
        for name in ("samples", "holdout_samples", "correction_samples", "iterations"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1; got {getattr(self, name)}"
                raise InvalidInput(msg)
        self._check_cache()
        self._check_rows()
        if not 0 <= self.robust < float("inf"):
            msg = f"robust must be a number of standard errors from 0 on; got {self.robust}"
            raise InvalidInput(msg, robust=self.robust)
        if not 0 <= self.gap < 1:
            msg = f"gap must be at least 0 and below 1; got {self.gap}"
            raise InvalidInput(msg)
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            msg = f"time_limit_s must be positive, or left out; got {self.time_limit_s}"
            raise InvalidInput(msg)

    def _check_inputs(self) -> None:
        """Check the bit-widths of layers' inputs; a list of one is that one."""
        asked = self.activation_bits
        if isinstance(asked, tuple):
            if not asked or len(set(asked)) < len(asked):
                msg = f"activation_bits must name each bit-width once; got {list(asked)}"
                raise InvalidInput(msg, activation_bits=list(asked))
            widths = asked[0] if len(asked) == 1 else tuple(sorted(asked))
            object.__setattr__(self, "activation_bits", widths)
        for bits in self.input_widths:
            if bits is not None and not 2 <= bits <= 16:
                msg = f"activation_bits must be between 2 and 16; got {bits}"
                raise InvalidInput(msg, activation_bits=bits)

    def _check_zero_bits(self) -> None:
        """Check what is asked beside bit-widths; a layer of zeros needs a bias for its output."""
        for what in self.allow:
            _one_of("allow", what, ALLOWED)
        if self.scheme.sparsity is not None:
            msg = (
                "which layers are sparse is the plan's to choose; a request must not say it "
                f"(sparsity of the scheme): ask for allow {self.scheme.sparsity} instead"
            )
            raise InvalidInput(msg, sparsity=str(self.scheme.sparsity))
        if self.allow and (self.tables or self.rounding == "learned" or self.measure == "limpq"):
            msg = (
                f"zero bits (allow {', '.join(self.allow)}) go with budgets without a cost table, "
                "and with neither learned rounding nor the measure limpq: leave one of them out"
            )
            raise InvalidInput(msg, allow=list(self.allow))
        folding = {Correction.BIAS_CORRECTION, Correction.BATCH_NORM_STATISTICS}
        if PRUNE in self.allow and not folding & set(self.corrections):
            object.__setattr__(self, "corrections", (*self.corrections, Correction.BIAS_CORRECTION))

    def _check_rows(self) -> None:
        """Check what is asked of the rows of layers."""
        if self.scheme.row_bits:
            msg = (
                "the bit-widths of single rows are the plan's to choose; a request must not name "
                "them (row_bits of the scheme): ask for row_widths instead"
            )
            raise InvalidInput(msg, row_bits=list(self.scheme.row_bits))
        if not 1 <= self.row_widths <= len(ROW_BITS):
            msg = f"row_widths must be between 1 and {len(ROW_BITS)}; got {self.row_widths}"
            raise InvalidInput(msg, row_widths=self.row_widths)
        if self.row_widths > 1 and (not self.scheme.mixes or self.tables):
            what = "a cost table knows whole layers" if self.tables else "the scheme has neither"
            msg = (
                "rows of different bit-widths need an integer grid, scales per channel or group, "
                f"and budgets without a cost table; {what}: leave row_widths out"
            )
            raise InvalidInput(msg, row_widths=self.row_widths)

    def _check_cache(self) -> None:
        """Check what is asked of the KV cache."""
        _one_of("kv_scales", self.kv_scales, CACHE_SCALES)
        for bits in self.kv_bits:
            _one_of("kv_bits", bits, CACHE_BITS)
        if len(set(self.kv_bits)) < len(self.kv_bits):
            msg = f"kv_bits must name each bit-width once; got {list(self.kv_bits)}"
            raise InvalidInput(msg, kv_bits=list(self.kv_bits))
        if bool(self.kv_bits) != bool(self.context):
            msg = (
                "bit-widths of the KV cache (kv_bits) and the tokens that it is counted for "
                f"(context) belong together; got {list(self.kv_bits)} and {self.context}: give "
                "both, or neither"
            )
            raise InvalidInput(msg, kv_bits=list(self.kv_bits), context=self.context)
        if not 0 <= self.context <= LARGEST_CONTEXT or not 1 <= self.sequences <= LARGEST_CONTEXT:
            msg = (
                f"context and sequences must be between 1 and {LARGEST_CONTEXT:,}; got "
                f"{self.context:,} and {self.sequences:,}"
            )
            raise InvalidInput(msg, context=self.context, sequences=self.sequences)
        plain = self.activation_bits is None and not self.corrections and self.precision == "fp32"
        if self.kv_bits and (not plain or self.measure not in CACHE_MEASURES):
            msg = (
                "bits of the KV cache are planned without quantized inputs, corrections and bf16, "
                f"by one of the measures {', '.join(CACHE_MEASURES)}; leave the others out, or "
                "kv_bits"
            )
            raise InvalidInput(msg, measure=self.measure, precision=self.precision)

    @property
    def input_widths(self) -> tuple[int | None, ...]:
        """Bit-widths on offer to layers' inputs, ascending; ``None`` is full precision."""
        asked = self.activation_bits
        return asked if isinstance(asked, tuple) else (asked,)

    @property
    def ships_weights(self) -> bool:
        """Whether a file of quantized weights belongs to each plan."""
        return self.rounding != "nearest" or bool(REWRITTEN & set(self.corrections))


def parse_losses(text: str) -> str | dict[str, str]:
    """Return one loss for all outputs, or the loss of each output that is named.

    Raises:
        InvalidInput: There is no such loss.
    """
    if "=" not in text:
        _one_of("loss", text, (AUTO_LOSS, *LOSSES))
        return text
    found = {}
    for part in text.split(","):
        name, _, loss = part.strip().rpartition("=")
        if not name:
            msg = f"losses of several outputs must be 'NAME=LOSS,NAME=LOSS'; got '{text}'"
            raise InvalidInput(msg, loss=text)
        _one_of("loss", loss, (AUTO_LOSS, *LOSSES))
        found[name] = loss
    return found


def parse_outputs(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the weight of each output that is named; none named means all.

    Raises:
        InvalidInput: A weight that is no positive number, or a name given twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, found, number = text.rpartition("=")
        name, number = (name, number) if found else (text, "1")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not 0 < weight < math.inf:
            msg = (
                f"an output must be given once, as NAME or NAME=WEIGHT with a positive weight; got "
                f"'{text}'"
            )
            raise InvalidInput(msg, output=text)
        weights[name] = weight
    return weights


def check_solver(name: str) -> None:
    """Raise ``InvalidInput`` unless there is a solver backend called ``name``."""
    if instead := FORMER_SOLVERS.get(name):
        msg = f"solver must be one that is still offered; got '{name}': use '{instead}' instead"
        raise InvalidInput(msg, solver=name, instead=instead)
    _one_of("solver", name, SOLVERS)


def check_training(*, method: str, recipe: str | None = None) -> None:
    """Raise ``InvalidInput`` unless there are a training method and a recipe of these names."""
    _one_of("method", method, TRAINING_METHODS)
    if recipe is not None:
        _one_of("recipe", recipe, RECIPES)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        msg = f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}"
        raise InvalidInput(msg, **{name: value})
