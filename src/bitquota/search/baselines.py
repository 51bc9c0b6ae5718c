"""Baselines: simpler ways to choose bit-widths, which every plan is compared with.

Some are choices in themselves (uniform plans); others are scores that still have to be solved
under a budget. ``sensitivity`` does not solve: the latter are diagonal sensitivity matrices.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.matrix import SensitivityMatrix
from bitquota.quantizers.quantized_weights import QuantizedWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate, CandidateTable, Row


def baseline_choices(table: CandidateTable) -> dict[str, tuple[int, ...]]:
    """Return the choices that need no measurement, by name; budgets are not looked at.

    ``uniform W4`` gives every group its 4-bit row, or the nearest above (else the nearest) where
    it has none; ``first and last W8, rest W4`` differs from it in the first and last group. Only
    distinct choices are returned, simplest name first. Each stands beside every width that inputs
    may have (``uniform W4A8``), and, where a KV cache is planned, every width of the cache
    (``uniform W4 KV8``).
    """
    offsets = table.offsets
    groups = [table.rows[offsets[g] : offsets[g + 1]] for g in range(len(offsets) - 1)]
    layers = [rows for rows in groups if not rows[0].cached]
    caches = [rows for rows in groups if rows[0].cached]
    named: dict[str, tuple[int, ...]] = {}
    widths = _widths(table)
    inputs = _input_widths(table)
    for cached, given in itertools.product(_cache_widths(table), inputs):
        behind = tuple(_nearest(rows, cached) for rows in caches)
        beside = f"A{given}" if len(inputs) > 1 else ""
        also = f"{beside} {caches[0][behind[0]].label}" if caches else beside
        for bits in widths:
            rest = (_nearest(rows, bits, given) for rows in layers)
            named[f"uniform W{bits}{also}"] = (*rest, *behind)
        if len(layers) > 2:
            high = widths[-1]
            for bits in widths[:-1]:
                inner = [_nearest(rows, bits, given) for rows in layers[1:-1]]
                ends = [_nearest(rows, high, given) for rows in (layers[0], layers[-1])]
                name = f"first and last W{high}, rest W{bits}{also}"
                named[name] = (ends[0], *inner, ends[1], *behind)
    distinct: dict[tuple[int, ...], str] = {}
    for name, choice in named.items():
        distinct.setdefault(choice, name)
    return {name: choice for choice, name in distinct.items()}


def largest(
    table: CandidateTable, choices: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the one of ``choices`` that takes most bytes, by name, if there is one."""
    sizes = {name: sum(c.size_bits for c in table.decode(k)) for name, k in choices.items()}
    return {name: choices[name] for name in sorted(sizes, key=lambda n: -sizes[n])[:1]}


def uniform_mixes(table: CandidateTable, size_bits: int) -> dict[str, tuple[int, ...]]:
    """Return mixes of two neighbouring uniform plans that take at most ``size_bits``, by name.

    From the widest uniform plan that fits, groups take the next width, in the order of the model,
    from its end, or the smallest first, each where it still fits. No measurement decides which.
    Inputs have the same width everywhere, each that is on offer in turn.
    """
    inputs = _input_widths(table)
    found: dict[str, tuple[int, ...]] = {}
    for given in inputs:
        found |= _mixes_beside(table, size_bits, given, f"A{given}" if len(inputs) > 1 else "")
    return found


def _mixes_beside(
    table: CandidateTable, size_bits: int, inputs: int, label: str
) -> dict[str, tuple[int, ...]]:
    """Return the mixes of two widths of weights beside one width of inputs."""
    offsets = table.offsets
    n = len(offsets) - 1
    groups = [table.rows[offsets[g] : offsets[g + 1]] for g in range(n)]
    sizes = [[sum(c.size_bits for c in row.candidates) for row in rows] for rows in groups]
    widths = _widths(table)
    plans = [tuple(_nearest(rows, bits, inputs) for rows in groups) for bits in widths]
    taken = [sum(sizes[g][k] for g, k in enumerate(plan)) for plan in plans]
    fitting = [k for k, size in enumerate(taken) if size <= size_bits]
    if not fitting or fitting[-1] + 1 == len(widths):
        return {}
    low, high = plans[fitting[-1]], plans[fitting[-1] + 1]
    name = f"uniform W{widths[fitting[-1]]}/W{widths[fitting[-1] + 1]}{label} mix"
    orders = {
        "first": list(range(n)),
        "last": list(range(n))[::-1],
        "smallest": sorted(range(n), key=lambda g: sizes[g][low[g]]),
    }
    found: dict[tuple[int, ...], str] = {}
    for which, order in orders.items():
        choice, size = list(low), taken[fitting[-1]]
        for g in order:
            more = size + sizes[g][high[g]] - sizes[g][choice[g]]
            if more <= size_bits:
                choice[g], size = high[g], more
        if tuple(choice) != low:
            found.setdefault(tuple(choice), f"{name}, {which} wider")
    return {label: choice for choice, label in found.items()}


def _widths(table: CandidateTable) -> list[int]:
    """Return the bit-widths of weights, smallest first."""
    return sorted({_bits(row) for row in table.rows if row.plain and not row.cached})


def _cache_widths(table: CandidateTable) -> list[int]:
    """Return the bit-widths of the KV cache, widest first; one without meaning if there is none."""
    return sorted({_bits(row) for row in table.rows if row.cached}, reverse=True) or [0]


def _input_widths(table: CandidateTable) -> list[int]:
    """Return the bit-widths of inputs, widest first."""
    return sorted(
        {_input_bits(row) for row in table.rows if row.plain and not row.cached}, reverse=True
    )


def _bits(row: Row) -> int:
    return max(candidate.weight_bits for candidate in row.candidates)


def _input_bits(row: Row) -> int:
    return max(c.activation_bits or FULL_PRECISION_BITS for c in row.candidates)


def _nearest(rows: tuple[Row, ...], bits: int, inputs: int = FULL_PRECISION_BITS) -> int:
    """Return the row of ``bits``, or the nearest above, else below; so of those for inputs."""

    def distance(k: int) -> tuple[bool, int, bool, int, int]:
        own, given = _bits(rows[k]), _input_bits(rows[k])
        return own < bits, abs(own - bits), given < inputs, abs(given - inputs), k

    return min((k for k, row in enumerate(rows) if row.plain), key=distance)


def size_only(table: CandidateTable) -> SensitivityMatrix:
    """Return ``diagonal_i = -bits``: the most bits summed over layers, whatever they hold.

    Under a size budget this fills the smallest layers first. A metric that cannot beat it does
    not look at the network.
    """
    values = [-sum(float(c.mean_bits) for c in row.candidates) for row in table.rows]
    return SensitivityMatrix(
        table=table,
        diagonal=np.array(values),
        loss="size_only",
        unit="negative bits",
        provenance={"measure": "size_only"},
    )


def weight_mse(
    module: nn.Module,
    inventory: Inventory,
    table: CandidateTable,
    *,
    weights: QuantizedWeights | None = None,
    squares: Mapping[Candidate, float] | None = None,
) -> SensitivityMatrix:
    """Return ``diagonal_i = ‖Q(W) - W‖²`` summed over the group's weights; no data, exact.

    ``squares`` are those of the candidates, where they are known.
    """
    weights = weights or QuantizedWeights(module, inventory)
    values = []
    for row in table.rows:
        total = 0.0
        for candidate in row.candidates:
            if squares is not None and candidate in squares:
                total += squares[candidate]
                continue
            with torch.no_grad():
                error = weights(candidate).double() - weights.original(candidate.layer).double()
                total += float(error.square().sum())
        values.append(total)
    return SensitivityMatrix(
        table=table,
        diagonal=np.array(values),
        loss="weight_mse",
        unit="squared weight",
        provenance={"measure": "weight_mse", "model_digest": inventory.model_digest},
    )
