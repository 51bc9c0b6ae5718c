"""Measurements of other tools, so that they can be solved here without measuring again.

==========================  =====================================================================
exllamav2                   ``measurement.json`` of ``convert.py -om``: accuracy and bits of every
                            option of every attention and MLP block
exllamav3                   the file of ``measure.py``: change of KL divergence and of bits of
                            every group against a quantized base
ModelOpt                    ``candidate_stats`` of ``auto_quantize``, written as JSON (its own
                            checkpoint is a pickle, which is never read)
==========================  =====================================================================

An imported measurement has its own options, sizes and unit, which are not candidates of ours: it
is solved and read back in the terms of the tool it came from.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.canonical import why_unreadable
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

_LARGEST_FILE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to store one group, in another tool's terms.

    Attributes:
        group: The group that it is an option of.
        label: Short name.
        score: Predicted loss in ``ImportedMeasurement.unit``, additive over groups.
        cost_bits: Cost in ``ImportedMeasurement.cost_unit``.
        detail: What the tool wrote about it.
    """

    group: str
    label: str
    score: float
    cost_bits: int
    detail: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedMeasurement:
    """Scores and costs of another tool: a separable problem.

    Attributes:
        source: Which tool.
        unit: Unit of the scores.
        cost_unit: Unit of the costs: ``bits``, or what the tool counts instead.
        options: Groups contiguous, in the tool's order.
    """

    source: str
    unit: str
    cost_unit: str
    options: tuple[Option, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Group names in order."""
        return tuple(dict.fromkeys(option.group for option in self.options))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``i64[G+1]``: group ``g`` owns the options ``offsets[g]:offsets[g+1]``."""
        counts = dict.fromkeys(self.groups, 0)
        for option in self.options:
            counts[option.group] += 1
        return np.cumsum([0, *counts.values()], dtype=np.int64)

    @property
    def diagonal(self) -> NDArray[np.float64]:
        """``f64[n]``: the scores."""
        return np.array([option.score for option in self.options])

    @property
    def costs(self) -> NDArray[np.int64]:
        """``i64[1, n]``: the costs, shifted per group so that none is negative."""
        raw = np.array([option.cost_bits for option in self.options], dtype=np.int64)
        offsets = self.offsets
        for a, b in itertools.pairwise(offsets):
            raw[a:b] -= min(0, int(raw[a:b].min()))
        return raw[None]

    @property
    def shift_bits(self) -> int:
        """What ``costs`` adds to the tool's own total: add it to a limit in the tool's terms."""
        raw = np.array([option.cost_bits for option in self.options], dtype=np.int64)
        return int(-np.minimum.reduceat(raw, self.offsets[:-1]).clip(max=0).sum())

    def chosen(self, choice: NDArray[np.int64] | tuple[int, ...]) -> tuple[Option, ...]:
        """Return the option of each group that a choice (index within the group) names."""
        rows = self.offsets[:-1] + np.asarray(choice, dtype=np.int64)
        return tuple(self.options[int(row)] for row in rows)


def read_measurement(path: Path) -> ImportedMeasurement:
    """Read a measurement of exllamav2, exllamav3 or ModelOpt; the layout tells which.

    Scores: exllamav2 ``-log(accuracy)`` (so that accuracies multiply), exllamav3 the change of KL
    divergence, ModelOpt its own score.

    Raises:
        InvalidInput: Not JSON, none of these layouts, or a number that cannot be.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            msg = f"a measurement must be smaller than 1 GiB; '{path}' is larger"
            raise InvalidInput(msg, path=str(path))
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        if isinstance(err, InvalidInput):
            raise
        msg = f"a measurement must be readable JSON; '{path}' {why_unreadable(err)}"
        raise InvalidInput(msg, path=str(path)) from err
    try:
        if isinstance(data, dict) and isinstance(data.get("measurement"), dict):
            return _exllamav2(data["measurement"])
        if isinstance(data, dict) and isinstance(data.get("groups"), list):
            return _exllamav3(data["groups"])
        if isinstance(data, dict):
            stats = data.get("candidate_stats", data)
            if stats and all(isinstance(v, dict) and "scores" in v for v in stats.values()):
                return _modelopt(stats)
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        if isinstance(err, InvalidInput):
            raise
        msg = f"'{path}' looks like a measurement of another tool but cannot be read: {err!r}"
        raise InvalidInput(msg, path=str(path)) from err
    msg = (
        f"'{path}' must be exllamav2's measurement.json ('measurement'), exllamav3's measurement "
        "('groups'), or ModelOpt's candidate_stats as JSON; it is none of them"
    )
    raise InvalidInput(msg, path=str(path))


def _number(value: Any, what: str) -> float:  # noqa: ANN401  # from JSON
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        msg = f"{what} must be a finite number; got {value!r}"
        raise InvalidInput(msg)
    return number


def _measurement(
    source: str, unit: str, cost_unit: str, options: list[Option]
) -> ImportedMeasurement:
    if not options:
        msg = f"a measurement of {source} must hold at least one option; got none"
        raise InvalidInput(msg)
    return ImportedMeasurement(
        source=source, unit=unit, cost_unit=cost_unit, options=tuple(options)
    )


def _exllamav2(data: JsonObject) -> ImportedMeasurement:
    options = []
    for group, entries in data.items():
        for k, entry in enumerate(entries):
            accuracy = _number(entry["accuracy"], f"accuracy of '{group}'")
            if not 0 < accuracy <= 1:
                msg = f"an accuracy must be above 0 and at most 1; '{group}' has {accuracy}"
                raise InvalidInput(msg, group=group)
            detail = {key: value for key, value in entry.items() if isinstance(value, dict)}
            bits = "/".join("-".join(map(str, d.get("bits", []))) for d in detail.values())
            options.append(
                Option(
                    group=group,
                    label=f"{k}: {bits}",
                    score=-math.log(accuracy),
                    cost_bits=round(_number(entry["total_bits"], f"total_bits of '{group}'")),
                    detail=detail,
                )
            )
    return _measurement("exllamav2", "-log accuracy", "bits", options)


def _exllamav3(groups: list[JsonObject]) -> ImportedMeasurement:
    options = []
    for group in groups:
        name = "+".join(group["layers"])
        options.append(Option(group=name, label="base", score=0.0, cost_bits=0, detail={}))
        for k, entry in enumerate(group["candidates"]):
            options.append(  # a comprehension of this length hides the numbers
                Option(
                    group=name,
                    label=f"alternative {k}",
                    score=_number(entry["dkld"], f"dkld of '{name}'"),
                    cost_bits=round(_number(entry["dbits"], f"dbits of '{name}'")),
                    detail=dict(entry),
                )
            )
    return _measurement("exllamav3", "nats/token", "bits beyond the base", options)


def _modelopt(stats: JsonObject) -> ImportedMeasurement:
    options = []
    for layer, entry in stats.items():
        formats = entry["formats"]
        for label, score, cost in zip(formats, entry["scores"], entry["costs"], strict=True):
            options.append(
                Option(
                    group=layer,
                    label=str(label),
                    score=_number(score, f"score of '{layer}'"),
                    cost_bits=round(_number(cost, f"cost of '{layer}'")),
                    detail={"module_names": list(entry.get("module_names", []))},
                )
            )
    return _measurement("ModelOpt", "score", "ModelOpt's cost", options)
