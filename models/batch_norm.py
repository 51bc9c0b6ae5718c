"""What quantization does to the inputs of batch norms, and how stored statistics follow.

Statistics of the quantized model, taken anew from a few hundred calibration samples, replace what
training averaged over its whole (augmented) set: on ResNet-20 that alone costs more than 4-bit
weights do. So stored statistics are *moved* instead. Per channel, let ``m, v`` be mean and variance
of a batch norm's input on some samples in full precision, and ``m', v'`` in the quantized model on
the same samples. Were the input changed by nothing but ``x' = a x + b``, then

    a = sqrt((v' + eps) / (v + eps)),    b = m' - a m,

and statistics ``M, V`` that fitted ``x`` become ``a M + b`` and ``a² (V + eps) - eps``: the batch
norm returns what it returned before, and without an error nothing moves. What the samples are
cancels.

References:
    [Chan79] T. Chan, G. Golub, R. LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", 1979 (merging means and variances).

Design: docs/design/corrections.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitquota.models.calls import BatchNormCall, batch_norm_call, operator_name, tensor_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and biased variance of each channel, and over how many values."""

    mean: Tensor
    variance: Tensor
    count: int

    @classmethod
    def of(cls, inputs: Tensor, around: Tensor) -> Moments:
        """Return those of ``inputs``, ``[N, C, ...]``, in float32.

        ``around`` is something near the means: sums of squares around it lose no digits.
        """
        near = around.float()
        values = inputs.float().reshape(len(inputs), inputs.shape[1], -1) - near[:, None]
        count = values.shape[0] * values.shape[2]
        # Sums of contiguous places first: a third of the time of reducing both axes at once.
        mean = values.sum(dim=2).sum(dim=0) / count
        squares = torch.linalg.vector_norm(values, dim=2).square().sum(dim=0)
        variance = (squares / count - mean * mean).clamp_min(0)
        return cls(mean + near, variance, count)

    def merged(self, other: Moments) -> Moments:
        """Return those of both sets of values together [Chan79], in float64."""
        total = self.count + other.count
        mean, delta = self.mean.double(), other.mean.double() - self.mean.double()
        share = other.count / total
        spread = self.variance.double() * (1 - share) + other.variance.double() * share
        return Moments(mean + delta * share, spread + delta.square() * (share * (1 - share)), total)


def moved_statistics(
    mean: Tensor, variance: Tensor, before: Moments, after: Moments, eps: float
) -> tuple[Tensor, Tensor]:
    """Return stored statistics ``[C]`` moved as the input's moments were; see the module."""
    squared = (after.variance + eps) / (before.variance + eps)
    scale = squared.sqrt()
    # Written so that equal moments change not one bit.
    moved = scale * mean + (after.mean - scale * before.mean)
    return moved, (variance + (squared - 1) * (variance + eps)).clamp_min(0)


def observed(call: BatchNormCall, around: Tensor | None = None) -> Moments | None:
    """Return the moments of a batch norm's input, summed around ``around`` or the stored mean.

    ``None`` where there is nothing to follow: no stored statistics, or one value per channel.
    """
    if call.running_mean is None or call.running_var is None or not _varies(call.inputs):
        return None
    return Moments.of(call.inputs, call.running_mean if around is None else around)


def _varies(x: Tensor) -> bool:
    """Whether there is more than one value per channel."""
    return x.numel() > x.shape[1]


def run_moved(call: BatchNormCall, before: Moments) -> tuple[Tensor, Moments]:
    """Run a batch norm with statistics moved to fit its input; return the input's moments, too."""
    after = observed(call)
    assert after is not None  # noqa: S101  # there was something to follow before
    assert call.running_mean is not None  # noqa: S101
    assert call.running_var is not None  # noqa: S101
    mean, variance = moved_statistics(call.running_mean, call.running_var, before, after, call.eps)
    kind = call.running_mean.dtype
    output = functional.batch_norm(
        call.inputs, mean.to(kind), variance.to(kind), call.weight, call.bias, eps=call.eps
    )
    return output, after


class _watching(TorchFunctionMode):  # noqa: N801  # used as a context manager
    """Within the context every batch norm goes through ``around``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Replace calls of batch norm, pass on everything else."""
        del types
        name = operator_name(func)
        call = batch_norm_call(name, args, kwargs or {})
        output = None if call is None else self.around(call)
        if output is None:
            return func(*args, **(kwargs or {}))
        return as_returned(name, output)

    def around(self, call: BatchNormCall) -> Tensor | None:
        """Return the output, or ``None`` to run the call as it is."""
        raise NotImplementedError


def as_returned(operator: str, output: Tensor) -> Any:  # noqa: ANN401  # Tensor, or a tuple
    """Return the output of a batch norm as the operator of that name returns it."""
    nothing = output.new_empty(0)
    return output if operator == "batch_norm" else (output, nothing, nothing)


class observed_statistics(_watching):  # noqa: N801  # used as a context manager
    """Within the context, note the moments of every batch norm's input, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Moments | None] = []

    def around(self, call: BatchNormCall) -> Tensor | None:
        """Note, and let it run."""
        self.calls.append(observed(call))
        return None


@dataclass(slots=True, eq=False)
class Followed:
    """Stored statistics, and all that their batch norm's input was seen to be.

    ``before`` is that of full precision on the same samples, where there was something to compare.
    """

    running_mean: Tensor
    running_var: Tensor
    eps: float
    after: Moments
    before: Moments | None = None

    def join(self, followed: dict[Key, Followed], key: Key) -> None:
        """Put this under ``key``, or into what is there of other batches."""
        known = followed.setdefault(key, self)
        if known is not self:
            known.merge(self)

    def merge(self, other: Followed) -> None:
        """Take in what was seen of another batch."""
        self.after = self.after.merged(other.after)
        if self.before is not None and other.before is not None:
            self.before = self.before.merged(other.before)

    def store(self) -> None:
        """Move the stored statistics, or replace them by mean and unbiased variance."""
        if self.before is not None:
            mean, variance = moved_statistics(
                self.running_mean, self.running_var, self.before, self.after, self.eps
            )
        else:
            n = self.after.count
            mean, variance = self.after.mean, self.after.variance * (n / max(1, n - 1))
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)


class _following(_watching):  # noqa: N801  # used as a context manager
    def __init__(self, followed: dict[tuple[Any, ...], Followed] | None = None) -> None:
        super().__init__()
        self._followed = followed

    def follow(self, call: BatchNormCall, after: Moments, before: Moments | None = None) -> None:
        if self._followed is None or call.running_mean is None or call.running_var is None:
            return
        new = Followed(call.running_mean, call.running_var, call.eps, after, before)
        new.join(self._followed, tensor_key(call.running_mean))


class moved_batch_norms(_following):  # noqa: N801  # used as a context manager
    """Within the context stored statistics are moved to fit what runs; none is changed.

    Args:
        before: What ``observed_statistics`` noted of the full-precision model on the same samples.
        followed: Gets what was seen, by batch norm.
    """

    def __init__(
        self,
        before: Sequence[Moments | None],
        followed: dict[tuple[Any, ...], Followed] | None = None,
    ) -> None:
        super().__init__(followed)
        self._before = iter(before)

    def around(self, call: BatchNormCall) -> Tensor | None:
        """Run with moved statistics."""
        before = next(self._before)
        if before is None:
            return None
        output, after = run_moved(call, before)
        self.follow(call, after, before)
        return output


class batch_statistics(_following):  # noqa: N801  # used as a context manager
    """Within the context every batch norm uses the statistics of the batch at hand.

    Stored statistics are neither used nor changed. A batch with one value per channel has no
    variance; it keeps the stored statistics.

    Args:
        followed: Gets what was seen, by batch norm.
    """

    def around(self, call: BatchNormCall) -> Tensor | None:
        """Run as in training."""
        if not _varies(call.inputs):
            return None
        # Around the batch's own mean: the stored one must not show in the last bits of what
        # replaces it, or equal weights would get unequal statistics from epoch to epoch.
        near = call.inputs.float().reshape(*call.inputs.shape[:2], -1).mean(dim=(0, 2))
        if (after := observed(call, near)) is not None:
            self.follow(call, after)
        return functional.batch_norm(
            call.inputs, None, None, call.weight, call.bias, training=True, eps=call.eps
        )
