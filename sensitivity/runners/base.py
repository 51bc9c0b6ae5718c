"""Runners: execute a model with some layers quantized, again and again, as cheaply as possible.

A run starts at a *state*: the model at some base point on one chunk of the calibration set, with
the activations that later runs will read. ``output`` changes some layers on top of a state and
re-executes only what lies behind them; ``extend`` does the same and returns a new state, so that
a pair of layers costs the suffix behind the later one. A chunk is executed with the same batch of
samples whatever is asked for, so a value never depends on what else was measured.

Design: docs/design/runners.md
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.context import DEFAULT_MEMORY_BYTES
from bitquota.models.references import References
from bitquota.models.running import DEFAULT_CHUNK, labels_of, put_in_eval_mode
from bitquota.quantizers.quantized_weights import QuantizedWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.canonical import JsonObject
    from bitquota.models.calibration import CalibrationSet

Change = Mapping[str, "Candidate"]
"""Layer name to the candidate that it takes; layers left out stay as they are."""

BatchNormMode = Literal["eval", "moved"]
"""``eval`` uses the stored statistics, ``moved`` moves them to fit each chunk."""

Precision = Literal["fp32", "bf16"]
"""In which arithmetic layers are run; weights are always quantized in float32."""


def describe_change(change: Change) -> list[JsonObject]:
    """Return what a ledger key must know of a change; full precision counts as no change."""
    return [
        {
            "layer": name,
            "bits": change[name].weight_bits,
            "activation_bits": change[name].activation_bits,
            "scheme": change[name].scheme.to_json(),
        }
        for name in sorted(change)
        if change[name].weight_bits != FULL_PRECISION_BITS
        or change[name].activation_bits is not None
    ]


@dataclass(slots=True)
class PassCounter:
    """Work done by a runner, in full passes over the calibration set.

    Attributes:
        macs: Multiply-accumulates executed (forward; a backward pass counts twice its forward).
        macs_per_pass: Those of one full-precision pass over the whole calibration set.
        calls: Executions of the model or of a part of it.
    """

    macs_per_pass: float = 0.0
    macs: float = 0.0
    calls: int = 0

    @property
    def passes(self) -> float:
        """Forward-equivalents: how many full passes the executed work amounts to."""
        return self.macs / self.macs_per_pass if self.macs_per_pass else 0.0


class Scheduled(Protocol):
    """A run that was scheduled and need not have happened.

    Attributes:
        passes: What it takes, in passes over the samples of its chunk.
    """

    @property
    def passes(self) -> float: ...  # noqa: D102


class State(Protocol):
    """A model at some point on one chunk, with activations kept for later runs."""

    @property
    def chunk(self) -> int:
        """Which chunk."""
        ...

    @property
    def change(self) -> Change:
        """What is changed against full precision."""
        ...

    @property
    def output(self) -> Tensor:
        """The model's primary output, ``[n, ...]``."""
        ...


class Runner(Protocol):
    """Executes one model on one calibration set.

    Attributes:
        inventory: The model's layers.
        calibration: The samples.
        batch_norm: Which statistics batch normalisation uses.
        bias_correction: Whether the means of layers' outputs are corrected.
        precision: In which arithmetic layers are run.
        engine: Name of the implementation; part of ledger keys.
        origin: Digest of the samples that quantizers were fitted on, or empty.
        chunks: Positions of the samples of each chunk.
        passes: The work done so far.
    """

    inventory: Inventory
    calibration: CalibrationSet
    batch_norm: BatchNormMode
    bias_correction: bool
    precision: Precision
    engine: str
    origin: str
    chunks: tuple[range, ...]
    passes: PassCounter

    def start(self, chunk: int, change: Change) -> State:
        """Run the whole model with ``change`` and keep what later runs need."""
        ...

    def extend(self, state: State, change: Change, *, keep_for: Collection[str] = ()) -> State:
        """Apply ``change`` on top of ``state``; keep activations for changes of ``keep_for``."""
        ...

    def output(self, state: State, change: Change) -> Tensor:
        """Return the primary output with ``change`` on top of ``state``."""
        ...

    def reference(self, chunk: int) -> Tensor:
        """Return the full-precision output with stored batch-norm statistics."""
        ...

    def labels(self, chunk: int) -> Tensor | None:
        """Return the labels of a chunk, if there are any."""
        ...

    def share(self, layers: Collection[str]) -> float:
        """Return what re-running behind ``layers`` costs, as a share of a full pass."""
        ...

    def schedule(
        self,
        before: Scheduled | None,
        layers: Collection[str],
        keep_for: Collection[str] | None = (),
    ) -> Scheduled:
        """Return what a run of the first chunk would take, without running anything.

        Args:
            before: The run that it would start from, or ``None`` for the whole model (``start``).
            layers: Which layers it changes.
            keep_for: Layers whose later changes must find their inputs; ``None`` for all, as
                ``start`` has it.
        """
        ...

    @property
    def passes_before(self) -> float:
        """Passes over a chunk for what all runs are compared with: its full-precision output."""
        ...

    def describe(self) -> JsonObject:
        """Return what a ledger key must know of the runner (not of the samples)."""
        ...


_S = TypeVar("_S")


@dataclass(slots=True)
class RunnerBase:
    """What every runner is made of; see ``Runner`` and ``make_runner``.

    A subclass says how it runs: ``_run``, ``_full_precision`` and ``share``.

    Attributes:
        activations: Input quantizers for candidates with activation bits.
        chunk_size: Samples per execution at most.
        memory_limit_bytes: Limit on kept activations.
        fallback: Why this runner was taken where the graph runner was asked for first.
    """

    module: nn.Module
    inventory: Inventory
    calibration: CalibrationSet
    engine: str = ""
    batch_norm: BatchNormMode = "eval"
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None
    bias_correction: bool = False
    precision: Precision = "fp32"
    chunk_size: int = DEFAULT_CHUNK
    memory_limit_bytes: int = DEFAULT_MEMORY_BYTES
    fallback: str = ""
    origin: str = ""
    chunks: tuple[range, ...] = ()
    passes: PassCounter = field(default_factory=PassCounter)
    weights: QuantizedWeights = field(init=False)
    _references: References = field(default_factory=References)

    def __post_init__(self) -> None:
        """Put the model into eval mode."""
        put_in_eval_mode(self.module)
        self.weights = QuantizedWeights(self.module, self.inventory)

    def reference(self, chunk: int) -> Tensor:
        """Return the full-precision output with stored batch-norm statistics."""
        return self._references.get(chunk, lambda: self._full_precision(chunk))

    def start(self, chunk: int, change: Change) -> State:
        """Run the whole model and keep what changes of single groups will read."""
        return self._run(None, chunk, change, None)

    def extend(self, state: State, change: Change, *, keep_for: Collection[str] = ()) -> State:
        """Run behind ``change`` and keep what changes of ``keep_for`` will read."""
        return self._run(state, state.chunk, change, tuple(keep_for))

    def output(self, state: State, change: Change) -> Tensor:
        """Run behind ``change``."""
        return self._run(state, state.chunk, change, ()).output

    @abstractmethod
    def _run(
        self, state: State | None, chunk: int, change: Change, keep_for: tuple[str, ...] | None
    ) -> State:
        """Run with ``change`` on top of ``state``, or of the whole model without one.

        Args:
            state: Where to start.
            chunk: Which chunk; that of ``state``.
            change: What differs from ``state``.
            keep_for: Layers whose later changes must find their inputs; ``None`` for all.
        """

    @abstractmethod
    def _full_precision(self, chunk: int) -> Tensor:
        """Run without changes and corrections."""

    @abstractmethod
    def schedule(
        self,
        before: Scheduled | None,
        layers: Collection[str],
        keep_for: Collection[str] | None = (),
    ) -> Scheduled:
        """Return what a run of the first chunk would take; see ``Runner.schedule``."""

    @property
    def passes_before(self) -> float:
        """Passes over a chunk for what all runs are compared with."""
        return 1.0

    def _groups(self, names: Collection[str] | None = None) -> list[list[str]]:
        """Return the layers, or those of ``names``, by their groups."""
        groups: dict[str, list[str]] = {}
        for layer in self.inventory.layers:
            if names is None or layer.name in names:
                groups.setdefault(layer.group, []).append(layer.name)
        return list(groups.values())

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.calibration.device or self.calibration.inputs[0].device

    def labels(self, chunk: int) -> Tensor | None:
        """Return the labels of a chunk, if there are any."""
        return labels_of(self.calibration, self.chunks[chunk])

    def describe(self) -> JsonObject:
        """Return what keys must know: engine, corrections, what quantizers were fitted on."""
        described = {"engine": self.engine, "batch_norm": self.batch_norm, "origin": self.origin}
        if self.precision != "fp32":
            described["precision"] = self.precision
        return described | ({"bias_correction": True} if self.bias_correction else {})


def own_state(state: State | None, kind: type[_S]) -> _S | None:
    """Return ``state``; raises ``TypeError`` for the state of another runner."""
    if state is not None and not isinstance(state, kind):
        msg = f"a state must come from the runner it is given to; got {type(state).__name__}"
        raise TypeError(msg)
    return state


def in_precision(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a runner executes: nothing, or autocast to bfloat16.

    Matrix products and convolutions take bfloat16, what sums over many values stays in float32.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
