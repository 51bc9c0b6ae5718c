"""Candidates that leave weights out: a layer or rows of zeros, and two of every four weights.

All are on offer only where they are asked for (``--allow prune,2:4``).

Design: docs/design/zero-bits.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bitquota.candidates.layers import WITHOUT_BIAS, match_layers
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    PRUNED_BITS,
    SPARSE_BLOCK,
    Sparsity,
)
from bitquota.candidates.table import Candidate, CandidateTable, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bitquota.candidates.layers import Inventory, Layer

PRUNE = "prune"
ALLOWED = (PRUNE, str(Sparsity.TWO_OF_FOUR))
"""What may be asked for."""

ALLOWED_WORDS = {
    PRUNE: "layers of zeros, or rows of them, whose mean output goes on (ref-int, ONNX)",
    str(Sparsity.TWO_OF_FOUR): "two of every four weights (ref-int)",
}
"""The same, as a form says it."""

HOLD_ZERO_BITS = {
    PRUNE: frozenset({"ref-int", "onnx-qdq", "onnx-matmulnbits"}),
    str(Sparsity.TWO_OF_FOUR): frozenset({"ref-int"}),
}
"""Exporters whose files are the smaller for it."""

WHY_NOT = {
    PRUNE: "its files hold every weight of every layer",
    str(Sparsity.TWO_OF_FOUR): "its files would store the zeros too, and so take as many bytes",
}


def zero_bits_of(candidate: Candidate) -> str | None:
    """Return which of ``ALLOWED`` a candidate is, or ``None``."""
    if candidate.pruned or PRUNED_BITS in candidate.row_bits:
        return PRUNE
    return str(candidate.scheme.sparsity) if candidate.sparse else None


def with_zero_bits(
    table: CandidateTable, inventory: Inventory, allow: Sequence[str], fixed: Iterable[str] = ()
) -> CandidateTable:
    """Return a table that also offers what is allowed, where all layers of a group can have it.

    A layer of zeros gives its bias and nothing else, so a group is pruned if a bias can hold what
    its layers give on average (``Correction.BIAS_CORRECTION``). ``2:4`` stands beside every
    bit-width whose scheme has a code for zero, where four divides the rows of weights. Groups of
    layers that match a pattern of ``fixed`` keep their bit-width.
    """
    if not allow:
        return table
    layers = {layer.name: layer for layer in inventory.layers}
    pinned = {layers[n].group for p in fixed for n in match_layers(p, inventory.layers)}
    rows: list[Row] = []
    offsets = table.offsets
    for g in range(len(offsets) - 1):
        own = table.rows[offsets[g] : offsets[g + 1]]
        found = list(own)
        if not own[0].cached and own[0].group not in pinned:
            members = [layers[c.layer] for c in own[0].candidates]
            if Sparsity.TWO_OF_FOUR in allow:
                found += [made for row in own if (made := _sparse(row, members)) is not None]
            if PRUNE in allow and not any(la.kind in WITHOUT_BIAS for la in members):
                zeros = tuple(
                    Candidate.of(la, PRUNED_BITS, c.scheme)
                    for la, c in zip(members, own[0].candidates, strict=True)
                )
                found.append(Row(group=own[0].group, candidates=zeros))
        rows += sorted(found, key=lambda row: (sum(c.size_bits for c in row.candidates), row.label))
    return CandidateTable(rows=tuple(rows))


def _sparse(row: Row, layers: Sequence[Layer]) -> Row | None:
    """Return the same bit-widths with two of four weights, if all layers can have that."""
    able = all(
        c.weight_bits != FULL_PRECISION_BITS
        and 2 <= c.weight_bits <= 8
        and not c.row_bits
        and c.scheme.has_zero
        and la.columns % SPARSE_BLOCK == 0
        for c, la in zip(row.candidates, layers, strict=True)
    )
    if not able:
        return None
    return Row(
        group=row.group,
        candidates=tuple(
            Candidate.of(
                la,
                c.weight_bits,
                replace(c.scheme, sparsity=Sparsity.TWO_OF_FOUR),
                c.activation_bits,
            )
            for c, la in zip(row.candidates, layers, strict=True)
        ),
    )
