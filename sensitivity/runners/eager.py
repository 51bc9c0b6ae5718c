"""A runner that calls the module itself with replaced weights: any model, nothing reused."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitquota.models.batch_norm import Moments, moved_batch_norms, observed_statistics
from bitquota.models.running import (
    cut,
    inputs_of,
    run_module,
)
from bitquota.quantizers.apply import input_quantizer
from bitquota.quantizers.corrections import output_means
from bitquota.quantizers.kv_cache import cache_quantizers, hook_cache
from bitquota.sensitivity.runners.base import (
    Change,
    RunnerBase,
    Scheduled,
    State,
    in_precision,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor, nn

    from bitquota.candidates.table import Candidate
    from bitquota.quantizers.quantized_weights import QuantizedWeights


@dataclass(frozen=True, slots=True)
class WholePass:
    """A run of the whole model."""

    passes: float = 1.0


@dataclass(slots=True)
class EagerState:
    """What is changed, and the output."""

    chunk: int
    change: dict[str, Candidate]
    output: Tensor


@dataclass(slots=True)
class EagerRunner(RunnerBase):
    """Calls the module itself with replaced weights: any model, no reuse of prefixes."""

    engine: str = "eager"
    _seen: dict[int, tuple[dict[str, Tensor], list[Moments | None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut the samples into chunks."""
        RunnerBase.__post_init__(self)
        n = len(self.calibration)
        self.chunks = cut(n, self.chunk_size)
        self.passes.macs_per_pass = float(n)

    def _run(
        self, state: State | None, chunk: int, change: Change, keep_for: tuple[str, ...] | None
    ) -> EagerState:
        """Run the whole model with both changes; nothing is kept."""
        del keep_for
        both = dict(change) if state is None else {**state.change, **change}
        return EagerState(chunk, both, self._output(chunk, both))

    def _full_precision(self, chunk: int) -> Tensor:
        if self._compares:
            return self._observe(chunk)
        return self._output(chunk, {})

    def schedule(
        self,
        before: Scheduled | None,
        layers: Collection[str],
        keep_for: Collection[str] | None = (),
    ) -> WholePass:
        """Every run is a full pass."""
        del before, layers, keep_for
        return WholePass()

    def share(self, layers: Collection[str]) -> float:
        """Every run is a full pass."""
        del layers
        return 1.0

    @property
    def _compares(self) -> bool:
        return self.batch_norm == "moved" or self.bias_correction

    def _observed(self, chunk: int) -> tuple[dict[str, Tensor], list[Moments | None]]:
        """Return what corrections compare with: means of layers, moments of batch norms' inputs.

        Cost: a pass over the chunk in full precision, once, whose output is kept.
        """
        if chunk not in self._seen:
            output = self._observe(chunk)
            self._references.get(chunk, lambda: output)
        return self._seen[chunk]

    def _observe(self, chunk: int) -> Tensor:
        """Run in full precision, note what corrections compare with, return the output."""
        with (
            output_means(self.module, self.inventory) as means,
            observed_statistics() as statistics,
        ):
            output = self._output(chunk, {})
        self._seen[chunk] = means.means, statistics.calls
        return output

    def _output(self, chunk: int, change: Change) -> Tensor:
        moved = self.batch_norm == "moved"
        # Without a change there is nothing to correct.
        corrected = bool(change) and self._compares
        means, statistics = self._observed(chunk) if corrected else ({}, [])
        inputs = inputs_of(self.calibration, self.chunks[chunk])
        self.passes.macs += len(inputs[0])
        self.passes.calls += 1
        with contextlib.ExitStack() as within:
            within.enter_context(
                replaced_weights(self.module, self.weights, change, self.activations)
            )
            if corrected and moved:
                within.enter_context(moved_batch_norms(statistics))
            if corrected and self.bias_correction:
                within.enter_context(output_means(self.module, self.inventory, means))
            within.enter_context(in_precision(self.precision, inputs[0].device))
            return run_module(self.module, inputs)


class replaced_weights:  # noqa: N801  # used as a context manager
    """Within the context the module has the weights and input quantizers of ``change``."""

    def __init__(
        self,
        module: nn.Module,
        weights: QuantizedWeights,
        change: Change,
        activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None,
    ) -> None:
        self._module, self._weights, self._change = module, weights, change
        self._activations = activations
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        """Put the weights in place."""
        for name, cached in cache_quantizers(self._change.values()).items():
            self._hooks.append(hook_cache(self._module, name, cached))
        for name, candidate in self._change.items():
            if candidate.cached:
                continue
            parameter = self._weights.original(name)
            quantized = self._weights(candidate)
            if quantized is not parameter:
                self._saved.append((parameter, parameter.data))
                parameter.data = quantized
            if candidate.activation_bits is not None:
                quantizer = input_quantizer(self._activations, name, candidate.activation_bits)
                self._hooks.append(
                    self._module.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, q=quantizer: (q(args[0]), *args[1:])
                    )
                )

    def __exit__(self, *_: object) -> None:
        """Put the original weights back."""
        for parameter, data in reversed(self._saved):
            parameter.data = data
        for hook in self._hooks:
            hook.remove()
        self._saved, self._hooks = [], []
