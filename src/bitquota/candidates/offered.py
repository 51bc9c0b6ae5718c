"""What may become of each group of a model: a target's formats, or the request's own scheme."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bitquota.candidates.caches import cache_rows, tied_caches
from bitquota.candidates.table import CandidateTable, enumerate_candidates
from bitquota.candidates.zero_bits import with_zero_bits
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.layers import Cache, Inventory
    from bitquota.candidates.storage import Scheme
    from bitquota.candidates.targets import Target


def offered_candidates(
    inventory: Inventory,
    target: Target | None,
    *,
    weight_bits: Sequence[int],
    scheme: Scheme,
    activation_bits: Sequence[int | None],
    fixed: Mapping[str, int],
    allow: Sequence[str] = (),
) -> CandidateTable:
    """Return the candidates of each group; a target brings its own scheme.

    Inputs of a target's layers have its own bit-width, or those of ``activation_bits``, all of
    which it must run. What ``allow`` names is on offer too (``zero_bits.ALLOWED``).

    Raises:
        InvalidInput: Bit-widths, fixed widths or activations that cannot be had, or zero bits that
            the target's files cannot hold.
    """
    if target is None:
        table = enumerate_candidates(
            inventory, weight_bits, scheme=scheme, activation_bits=activation_bits, fixed=fixed
        )
        return with_zero_bits(table, inventory, allow, fixed)
    target.require_zero_bits(allow)
    asked = [bits for bits in activation_bits if bits is not None]
    if set(asked) - set(target.input_widths):
        runs = " or ".join("full precision" if b is None else f"{b}" for b in target.input_widths)
        got = ", ".join(map(str, asked))
        msg = (
            f"target '{target.name}' runs activations in {runs}; got {got} bits: leave "
            "--activations out, or name what it runs"
        )
        raise InvalidInput(msg, target=target.name, activation_bits=asked)
    table = target.candidates(
        inventory, weight_bits=weight_bits or None, activation_bits=asked or None, fixed=fixed
    )
    return with_zero_bits(table, inventory, allow, fixed)


def with_caches(
    inventory: Inventory,
    table: CandidateTable,
    caches: Sequence[Cache],
    target: Target | None,
    *,
    bits: Sequence[int],
    scales: str,
) -> tuple[Inventory, CandidateTable]:
    """Return an inventory and a table with the groups of a KV cache behind those of the layers.

    Raises:
        InvalidInput: The target's runtime takes no bits of the KV cache, or not these.
    """
    formats = None if target is None else target.require_cache()
    tied = tied_caches(caches, formats)
    rows = cache_rows(tied, bits, scales=scales, formats=formats)
    return replace(inventory, caches=tied), CandidateTable(rows=(*table.rows, *rows))
