"""Several calibration sets as one, in given shares.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidCalibration, InvalidInput
from bitquota.models.calibration import CalibrationSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_TOKENS, _MASK = "input_ids", "attention_mask"


def mixed(
    sets: Sequence[CalibrationSet], shares: Sequence[float], *, seed: int = 0
) -> CalibrationSet:
    """Return one set of samples from several, as many of each as ``shares`` says.

    Of the set that is shortest for its share all samples are taken; of the others so many that the
    shares hold are drawn without replacement, in their original order. Whoever draws from the
    result keeps the shares in expectation.

    Args:
        sets: Of equal inputs; windows of text go with ``input_ids``, and a set without a mask is
            not padded.
        shares: One for each set; only their ratios matter.
        seed: Of the draws.

    Raises:
        InvalidInput: Not one positive share for each set.
        InvalidCalibration: Inputs of other names, shapes or types, or labels in some sets alone.
    """
    if len(shares) != len(sets) or not all(math.isfinite(s) and s > 0 for s in shares):
        msg = (
            f"each of {len(sets)} calibration sets must have one positive share; got "
            f"{', '.join(f'{s:g}' for s in shares) or 'none'}"
        )
        raise InvalidInput(msg, shares=list(shares))
    if len(sets) == 1:
        return sets[0]
    alike = _with_equal_names(sets)
    unit = min(len(part) / share for part, share in zip(alike, shares, strict=True))
    # The product is a whole number for the shortest set, apart from rounding.
    counts = [max(1, math.floor(unit * share + 1e-9)) for share in shares]
    drawn = [part.subset(n, seed) for part, n in zip(alike, counts, strict=True)]

    def joined(tensors: Sequence[Tensor], what: str) -> Tensor:
        kinds = {(tuple(t.shape[1:]), t.dtype) for t in tensors}
        if len(kinds) > 1:
            got = ", ".join(
                f"{list(shape)} {str(kind)[6:]}" for shape, kind in sorted(kinds, key=str)
            )
            msg = f"mixed calibration sets must have samples of one shape and type; {what}: {got}"
            raise InvalidCalibration(msg)
        return torch.cat(list(tensors))

    labels = [part.labels for part in drawn if part.labels is not None]
    if len(labels) not in (0, len(drawn)):
        msg = "either all or none of the mixed calibration sets must have labels"
        raise InvalidCalibration(msg)
    first = drawn[0]
    return CalibrationSet(
        inputs=tuple(
            joined(column, first.names[k] if first.names else f"input {k}")
            for k, column in enumerate(zip(*(part.inputs for part in drawn), strict=True))
        ),
        names=first.names,
        labels=joined(labels, "labels") if labels else None,
        label_name=first.label_name,
    )


def _with_equal_names(sets: Sequence[CalibrationSet]) -> list[CalibrationSet]:
    """Return the sets with inputs of the same names; raises ``InvalidCalibration``."""
    if any(_MASK in part.names for part in sets):
        sets = [_with_mask(part) for part in sets]
    elif any(part.names for part in sets):
        sets = [_named(part) for part in sets]
    names = {part.names for part in sets}
    if len(names) > 1 or len({len(part.inputs) for part in sets}) > 1:
        got = "; ".join(", ".join(n) or "one without a name" for n in sorted(names))
        msg = f"mixed calibration sets must have inputs of the same names; got {got}"
        raise InvalidCalibration(msg)
    return list(sets)


def _named(part: CalibrationSet) -> CalibrationSet:
    """Return a set of token windows with the name that these have in transformers."""
    tokens = len(part.inputs) == 1 and not part.inputs[0].is_floating_point()
    if part.names or not tokens or part.inputs[0].ndim != 2:
        return part
    return replace(part, names=(_TOKENS,), digest="")


def _with_mask(part: CalibrationSet) -> CalibrationSet:
    """Return a set that says that nothing of it is padded, if it says nothing."""
    part = _named(part)
    if part.names != (_TOKENS,):
        return part
    ones = torch.ones_like(part.inputs[0])
    return replace(part, inputs=(*part.inputs, ones), names=(_TOKENS, _MASK), digest="")
