"""Sensible ties and exclusions for a model, to be shown before anything is measured.

With a deployment target they are applied: what runtimes fuse decides together, and what is small
and precious stays in full precision. Without a target they are suggestions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.targets.target import FUSED_SIBLINGS
from bitquota.codec import Document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.targets.target import Target

POSITIONS = ("wpe", "position_embeddings", "embed_positions")
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion(Document):
    """What would usually be tied or left alone, and why.

    Attributes:
        ties: Lists of name patterns, as ``--tie`` takes them.
        exclude: Name patterns, as ``--exclude`` takes them.
        reasons: One sentence for each tie and exclusion, in that order.
    """

    ties: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def prepare_inventory(
    inventory: Inventory,
    target: Target | None,
    *,
    exclude: Sequence[str] = (),
    ties: Sequence[Sequence[str]] = (),
) -> Inventory:
    """Return ``inventory`` with what the user asks for, and what a target demands, applied.

    With a target the default exclusions of ``suggest`` and the target's own exclusions and ties
    apply; without one only the user's.

    Raises:
        UnknownLayer: A pattern of the user's matches nothing.
        InvalidInput: A tie joins nothing, or part of a fused group is excluded.
        InvalidModel: Nothing is left to quantize.
    """
    if exclude:
        inventory = inventory.exclude(exclude)
    if target is not None:
        for name, reason in default_exclusions(inventory).items():
            inventory = inventory.exclude([f"re:{re.escape(name)}"], reason)
        inventory = target.prepare(inventory)
    return inventory.tie(ties)


def default_exclusions(inventory: Inventory) -> dict[str, str]:
    """Return the layers that usually stay in full precision, each with the reason."""
    found = {}
    for layer in inventory.layers:
        last = layer.name.rpartition(".")[2]
        if layer.kind is LayerKind.EMBEDDING and last in POSITIONS:
            found[layer.name] = "a position table, small and read by every token"
        elif _is_router(layer.name, layer.n_weights, inventory):
            found[layer.name] = "a router; a wrong choice of expert costs most"
    return found


def suggest(inventory: Inventory) -> Suggestion:
    """Return ties and exclusions that runtimes and experience ask for, by layer names."""
    ties, why_tied = [], []
    last = {layer.name.rpartition(".")[2] for layer in inventory.layers}
    for siblings in FUSED_SIBLINGS:
        present = tuple(name for name in siblings if name in last)
        if len(present) > 1:
            ties.append(present)
            why_tied.append(f"{', '.join(present)}: serving engines fuse them into one matrix")
    excluded = default_exclusions(inventory)
    why_excluded = [f"{name}: {reason}" for name, reason in excluded.items()]
    return Suggestion(ties=tuple(ties), exclude=tuple(excluded), reasons=(*why_tied, *why_excluded))


def _is_router(name: str, n_weights: int, inventory: Inventory) -> bool:
    """Whether a layer picks experts: named so, and beside expert weights that dwarf it."""
    parent, _, last = name.rpartition(".")
    if last not in ROUTERS:
        return False
    return any(
        layer.kind is LayerKind.EXPERTS
        and layer.name.startswith(parent + ".")
        and layer.n_weights > 8 * n_weights
        for layer in inventory.layers
    )
