"""Calibration sets: the samples that a measurement runs on, and how to name them again.

Design: docs/design/models.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from bitquota.canonical import digest_array, digest_json
from bitquota.errors import InvalidCalibration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from bitquota.canonical import JsonObject

Moved = tuple[tuple["Tensor", ...], "Tensor | None"]
"""Inputs and labels of some samples."""

GENERIC_NAMES = ("x", "inputs", "input_ids", "pixel_values")
"""Names that mean a model's first input, whatever the model calls it."""

RESIDENT_BYTES = 2**30
"""Samples up to this size live on the device; larger sets are copied chunk by chunk."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSet:
    """Samples, and the names that let them be found again.

    Attributes:
        inputs: Positional arguments of the model, each ``[N, ...]``.
        names: What the inputs are called, where that is known; then they go to the model's inputs
            of these names (see ``binding``).
        labels: ``i64[N]`` classes, ``i64[N, T]`` tokens, or any targets ``[N, ...]``; or ``None``.
        label_name: What the labels are called, where that is known: a model may take an input of
            that name.
        digest: Content digest of the **whole** set that this one was cut from.
        indices: Positions of these samples in that set.
        seed: What the indices were drawn with, if they were.
        device: Where samples go when they are used, if not where they are (see ``placed``).
    """

    inputs: tuple[Tensor, ...]
    names: tuple[str, ...] = ()
    labels: Tensor | None = None
    label_name: str = ""
    digest: str = ""
    indices: tuple[int, ...] = ()
    seed: int | None = None
    device: torch.device | None = None
    _moved: dict[range, Moved] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check counts and finiteness; a set without a digest is the whole set."""
        if not self.inputs:
            msg = "a calibration set must have at least one input tensor; got none"
            raise InvalidCalibration(msg)
        if self.names and (
            len(set(self.names)) != len(self.names) or len(self.names) != len(self.inputs)
        ):
            msg = f"each input must have a name of its own; got {', '.join(self.names)}"
            raise InvalidCalibration(msg, names=list(self.names))
        named = [(f"input {k}", tensor) for k, tensor in enumerate(self.inputs)]
        if self.labels is not None:
            named.append(("labels", self.labels))
        n = len(self.inputs[0]) if self.inputs[0].ndim else 0
        if n == 0:
            shape = list(self.inputs[0].shape)
            msg = f"a calibration set must have at least one sample; input 0 has shape {shape}"
            raise InvalidCalibration(msg, shape=shape)
        for name, tensor in named:
            if tensor.ndim == 0 or len(tensor) != n:
                msg = (
                    f"every tensor of a calibration set must have the same first dimension; "
                    f"input 0 has {n} samples, {name} has shape {list(tensor.shape)}"
                )
                raise InvalidCalibration(msg, tensor=name, shape=list(tensor.shape))
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).reshape(n, -1).any(dim=1).sum())
                msg = (
                    f"a calibration set must be finite; {bad} of {n} samples of {name} hold NaN "
                    "or infinity: remove or repair them"
                )
                raise InvalidCalibration(msg, tensor=name, samples=bad)
        if not self.digest:
            tensors = [digest_array(t.detach().cpu().contiguous().numpy()) for _, t in named]
            labelled = self.labels is not None
            content: dict[str, Any] = {"tensors": tensors, "l": labelled}
            if self.names[1:] not in {(), ("attention_mask",)}:
                content["names"] = list(self.names)  # they decide which input a tensor goes to
            object.__setattr__(self, "digest", digest_json(content))
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(n)))
        if len(self.indices) != n:
            msg = f"a calibration set of {n} samples must have {n} indices; got {len(self.indices)}"
            raise InvalidCalibration(msg)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def take(self, positions: Sequence[int], *, seed: int | None = None) -> Self:
        """Return the samples at ``positions``, in that order, where they are used."""
        rows = torch.as_tensor(list(positions), dtype=torch.int64)

        def taken(tensor: Tensor) -> Tensor:
            return tensor[rows.to(tensor.device)].to(self.device or tensor.device)

        return replace(
            self,
            inputs=tuple(map(taken, self.inputs)),
            labels=None if self.labels is None else taken(self.labels),
            device=None,
            indices=tuple(self.indices[p] for p in positions),
            seed=self.seed if seed is None else seed,
        )

    def begin(self, n: int) -> Self:
        """Return the same samples of tokens, each cut to its first ``n``."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :n] if tensor.ndim > 1 else tensor

        labels = None if self.labels is None else cut(self.labels)
        return replace(self, inputs=tuple(map(cut, self.inputs)), labels=labels)

    def first(self, n: int) -> Self:
        """Return the first ``n`` samples (all, if there are fewer)."""
        return self.take(range(min(n, len(self))))

    def subset(self, n: int, seed: int) -> Self:
        """Return ``n`` samples drawn without replacement, in their original order.

        Raises:
            InvalidCalibration: There are fewer than ``n`` samples, or ``n`` is below 1.
        """
        if not 1 <= n <= len(self):
            msg = f"a subset must have between 1 and {len(self)} samples; got {n}"
            raise InvalidCalibration(msg, samples=n, available=len(self))
        drawn = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.take(sorted(drawn.tolist()), seed=seed)

    def split(self, holdout_fraction: float, seed: int) -> tuple[Self, Self]:
        """Return disjoint ``(fit, holdout)``, together all samples, each in original order.

        Raises:
            InvalidCalibration: One part would be empty.
        """
        n_holdout = round(holdout_fraction * len(self))
        if not 1 <= n_holdout < len(self):
            msg = (
                f"a split must leave at least one sample on each side; a hold-out share of "
                f"{holdout_fraction} of {len(self)} does not: give more samples"
            )
            raise InvalidCalibration(msg, holdout_fraction=holdout_fraction, available=len(self))
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        fit, holdout = sorted(order[n_holdout:]), sorted(order[:n_holdout])
        return self.take(fit, seed=seed), self.take(holdout, seed=seed)

    def batches(self, size: int) -> Iterator[Self]:
        """Yield consecutive batches of ``size`` samples; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def to(self, device: torch.device | str) -> Self:
        """Return the same samples on another device."""
        return replace(
            self,
            inputs=tuple(t.to(device) for t in self.inputs),
            labels=None if self.labels is None else self.labels.to(device),
        )

    def placed(self, device: torch.device | str, resident_bytes: int = RESIDENT_BYTES) -> Self:
        """Return the samples ready for use on ``device``.

        Small sets are moved at once. Larger ones stay in page-locked memory and each chunk is
        copied when it is used, without waiting for the copy.
        """
        where = torch.device(device)
        tensors = [*self.inputs, *([] if self.labels is None else [self.labels])]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size <= resident_bytes or where.type == "cpu":
            return self.to(where)

        def pinned(tensor: Tensor) -> Tensor:
            return tensor.cpu().pin_memory() if where.type == "cuda" else tensor.cpu()

        return replace(
            self,
            inputs=tuple(map(pinned, self.inputs)),
            labels=None if self.labels is None else pinned(self.labels),
            device=where,
        )

    def chunk(self, span: range) -> Moved:
        """Return inputs and labels of consecutive samples where they are used; views if there."""

        def part(tensor: Tensor) -> Tensor:
            view = tensor[span.start : span.stop]
            return view if self.device is None else view.to(self.device, non_blocking=True)

        if self.device is None:
            return tuple(map(part, self.inputs)), None if self.labels is None else part(self.labels)
        if span not in self._moved:
            # One chunk at a time: many variants run on it before the next begins.
            self._moved.clear()
            labels = None if self.labels is None else part(self.labels)
            self._moved[span] = (tuple(map(part, self.inputs)), labels)
        return self._moved[span]

    def to_json(self) -> JsonObject:
        """Return digest, indices and seed: enough to cut the same samples from the same set."""
        return {"digest": self.digest, "indices": list(self.indices), "seed": self.seed}

    @classmethod
    def from_json(cls, data: JsonObject, whole: CalibrationSet) -> CalibrationSet:
        """Cut the samples that ``to_json`` named from the whole set.

        Raises:
            InvalidCalibration: ``whole`` is another set.
        """
        if whole.digest != data["digest"] or whole.indices != tuple(range(len(whole))):
            msg = (
                f"the samples were cut from the set {data['digest']}; got {whole.digest}: "
                "load the set that was measured"
            )
            raise InvalidCalibration(msg, expected=data["digest"], got=whole.digest)
        return whole.take(data["indices"], seed=data["seed"])
