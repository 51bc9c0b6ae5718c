"""Candidates whose rows have different bit-widths: which row of a layer gets which.

Rows of a weight are rounded independently of each other, so the error of a layer is a sum over its
rows, and one multiplier (error for a bit) decides all of them. What a layer is offered are a few
points of that curve, at average bits that are a step apart: the search over layers then moves from
one to the next as it does between bit-widths. Where zeros are allowed (``zero_bits``), rows may be
zeros, too.

References:
    [RMSMP] S.-E. Chang et al. RMSMP: a novel deep neural network quantization framework with
    row-wise mixed schemes and multiple precisions. ICCV 2021. arXiv 2111.00153.

Design: docs/design/rows.md
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import ROW_BITS
from bitquota.candidates.table import Candidate, CandidateTable, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory, Layer

    RowErrors = Mapping[str, Mapping[int, NDArray[np.float64]]]
    """By layer and bit-width f64[rows]: what each row adds to the loss."""

MIXED_KINDS = frozenset(
    {LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D, LayerKind.LINEAR}
)  # fmt: skip
"""Kinds of layer whose rows are output channels along the first axis of the stored weight."""

HOLD_PARTS = frozenset({"ref-int", "onnx-qdq", "onnx-matmulnbits"})
"""Exporters whose files hold a weight in parts of different bit-widths."""

WHY_NO_PARTS = {
    "compressed-tensors": "transformers and vLLM read one packed weight for each layer, pass over "
    "its parts, and leave the layer random",
    "gguf": "llama.cpp reads one tensor of one type for each weight, and loads no file without it",
}
"""What loaders do with parts, as tried."""

STEP = 0.25
"""Average bits from one mix of a layer to the next."""


def with_mixes(
    table: CandidateTable, inventory: Inventory, errors: RowErrors, most: int
) -> CandidateTable:
    """Return a table that also offers mixes of bit-widths over rows.

    Args:
        table: Its candidates of one bit-width are what is mixed.
        inventory: Of the same layers.
        errors: What rows add to the loss; layers that it lacks are not mixed.
        most: Bit-widths that the rows of one layer may have at most.

    Cost: O(widths^most rows log rows). A heuristic: rows stop at points of their lower convex
    hulls, and what is left of an average is not spent.
    """
    layers = {layer.name: layer for layer in inventory.layers}
    rows: list[Row] = []
    offsets = table.offsets
    for g in range(len(offsets) - 1):
        own = table.rows[offsets[g] : offsets[g + 1]]
        found = set(own)
        if not own[0].cached:
            for given in {row.candidates[0].activation_bits for row in own}:
                beside = [
                    row
                    for row in own
                    if row.candidates[0].activation_bits == given or row.candidates[0].pruned
                ]
                found.update(_mixes(beside, layers, errors, most))
        rows += sorted(found, key=lambda row: (sum(c.size_bits for c in row.candidates), row.label))
    return CandidateTable(rows=tuple(rows))


def mixable(candidates: Sequence[Candidate], layer: Layer) -> dict[int, Candidate]:
    """Return the candidates of one layer that may stand side by side in its rows, by bit-width."""
    if layer.kind not in MIXED_KINDS:
        return {}
    whole = (c for c in candidates if c.scheme == c.scheme.of_parts)
    plain = {c.weight_bits: c for c in whole if c.weight_bits in ROW_BITS}
    schemes = [c.scheme for c in plain.values() if c.scheme.mixes]
    alike = {b: c for b, c in plain.items() if schemes and (c.pruned or c.scheme == schemes[-1])}
    return alike if len(alike) > 1 and layer.rows > 1 else {}


def made_up_errors(table: CandidateTable, inventory: Inventory) -> RowErrors:
    """Return errors that give a table as many mixes as measured ones, to count what they take."""
    widths = {c.weight_bits for row in table.rows for c in row.candidates} & set(ROW_BITS)
    return {
        layer.name: {b: 4.0**-b * np.geomspace(1.0, 100.0, layer.rows) for b in sorted(widths)}
        for layer in inventory.layers
    }


def _mixes(
    rows: Sequence[Row], layers: Mapping[str, Layer], errors: RowErrors, most: int
) -> Iterator[Row]:
    """Yield the mixes of a group: at each average a mix of each of its layers."""
    members = [layers[c.layer] for c in rows[0].candidates]
    menus = []
    for k, layer in enumerate(members):
        plain = mixable([row.candidates[k] for row in rows], layer)
        known = errors.get(layer.name, {})
        widths = [bits for bits in sorted(plain) if bits in known]
        if len(widths) < 2:
            return
        menus.append((widths, plain[widths[-1]], np.array([known[bits] for bits in widths])))
    lowest = max(widths[0] for widths, *_ in menus)
    highest = min(widths[-1] for widths, *_ in menus)
    averages = np.arange(lowest + STEP, highest, STEP).tolist()
    choices = [mix_rows(error, widths, averages, most) for widths, _, error in menus]
    for mixes in zip(*choices, strict=True):
        if all(len(set(bits)) > 1 for bits in mixes):
            yield Row(
                group=rows[0].group,
                candidates=tuple(
                    Candidate.of(
                        layer,
                        max(bits),
                        replace(like.scheme, row_bits=bits),
                        like.activation_bits,
                    )
                    for layer, bits, (_, like, _) in zip(members, mixes, menus, strict=True)
                ),
            )


def mix_rows(
    errors: NDArray[np.float64], widths: Sequence[int], averages: Sequence[float], most: int
) -> list[tuple[int, ...]]:
    """Return for each average the bit-widths of rows, of at most that average, with least error.

    Args:
        errors: f64[widths, rows].
        widths: Ascending.
        averages: Mean bits of a row, from the smallest width on.
        most: Different widths at most.

    Cost: O(widths^most rows log rows).
    """
    n = errors.shape[1]
    rooms = (np.array(averages, dtype=np.float64) - widths[0]) * n
    least = np.full(len(rooms), np.inf)
    bits: list[tuple[int, ...]] = [(widths[0],) * n] * len(rooms)
    # What all sets of widths share: between any two of them what a row's error falls by, and that
    # for each bit.
    falls = {(i, j): errors[i] - errors[j] for i, j in combinations(range(len(widths)), 2)}
    slopes = {(i, j): fall / (widths[j] - widths[i]) for (i, j), fall in falls.items()}
    orders = {pair: np.argsort(-slope, kind="stable") for pair, slope in slopes.items()}
    made: dict[int, tuple[int, _Steps, NDArray[np.int64]]] = {}
    for chosen in combinations(range(len(widths)), min(most, len(widths))):
        steps, order = _hull_steps(chosen, widths, falls, slopes, orders)
        # What is left of each average behind the rows' smallest width of these.
        left = rooms - (widths[chosen[0]] - widths[0]) * n
        taken = np.searchsorted(np.cumsum(steps.bits[order]), left + 1e-9, side="right")
        gained = np.concatenate([np.zeros(1), np.cumsum(steps.gains[order])])
        error = np.where(left < 0, np.inf, errors[chosen[0]].sum() - gained[taken])
        for a in np.flatnonzero(error < least).tolist():
            made[a] = widths[chosen[0]], steps, order[: taken[a]]
        least = np.minimum(least, error)
    for a, (lowest, steps, first) in made.items():
        width = np.full(n, lowest)
        width[steps.rows[first]] = steps.widths[first]  # the last of each row counts
        bits[a] = tuple(width.tolist())
    return bits


class _Steps(NamedTuple):
    """Steps of rows from one width to a wider one: arrays ``[n]``.

    Attributes:
        rows: The rows.
        widths: The wider widths.
        bits: What they are wider.
        gains: What the row's error falls by.
    """

    rows: NDArray[np.int64]
    widths: NDArray[np.int64]
    bits: NDArray[np.int64]
    gains: NDArray[np.float64]


def _hull_steps(
    chosen: Sequence[int],
    widths: Sequence[int],
    falls: Mapping[tuple[int, int], NDArray[np.float64]],
    slopes: Mapping[tuple[int, int], NDArray[np.float64]],
    orders: Mapping[tuple[int, int], NDArray[np.int64]],
) -> tuple[_Steps, NDArray[np.int64]]:
    """Return steps along the lower convex hulls of all rows, and their order.

    The largest gain for a bit comes first.

    Args:
        chosen: Indices of the widths that rows may have.
        widths: All of them.
        falls: Between two widths, by index, f64[rows]: what the error of each row falls by.
        slopes: The same for each bit.
        orders: Rows by slope, the largest first.
    """
    n = len(orders[chosen[0], chosen[1]])
    here = np.full(n, chosen[0])
    # By a rounding, a row's second step may have a larger slope than its first: no later one has.
    steepest = np.full(n, np.inf)
    found, lengths = [], []
    for k, wider in ((k, chosen[level:]) for level, k in enumerate(chosen[:-1], start=1)):
        best, to = slopes[k, wider[0]], np.full(n, wider[0])
        for j in wider[1:]:
            better = slopes[k, j] > best
            best = np.where(better, slopes[k, j], best)
            to[better] = j
        to[(best <= 0) | (here != k)] = k
        for j in wider:
            rows = orders[k, j]
            rows = rows[to[rows] == j]
            slope = np.minimum(slopes[k, j][rows], steepest[rows])
            steepest[rows], here[rows] = slope, j
            found.append((slope, rows, falls[k, j][rows]))
            lengths.append((len(rows), widths[j], widths[j] - widths[k]))
    slope, rows, gains = (np.concatenate(part) for part in zip(*found, strict=True))
    n_steps, width, taken = zip(*lengths, strict=True)
    steps = _Steps(rows, np.repeat(width, n_steps), np.repeat(taken, n_steps), gains)
    return steps, np.argsort(-slope, kind="stable")  # a merge of a few sorted runs
