"""Sensible ties and exclusions for a model, to be shown before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.candidates import LayerKind
from bitquota.formats.targets.target import FUSED_SIBLINGS

if TYPE_CHECKING:
    from bitquota.candidates import Inventory
    from bitquota.canonical import JsonObject

POSITIONS = ("wpe", "position_embeddings", "embed_positions")
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What would usually be tied or left alone, and why.

    Attributes:
        ties: Lists of name patterns, as ``--tie`` takes them.
        exclude: Name patterns, as ``--exclude`` takes them.
        reasons: One sentence for each tie and exclusion, in that order.
    """

    ties: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "ties": [list(tie) for tie in self.ties],
            "exclude": list(self.exclude),
            "reasons": list(self.reasons),
        }


def suggest(inventory: Inventory) -> Suggestion:
    """Return ties and exclusions that runtimes and experience ask for, by layer names.

    Nothing is applied: a target applies its own, a user decides on the rest.
    """
    ties, exclude, why_tied, why_excluded = [], [], [], []
    last = {layer.name.rpartition(".")[2] for layer in inventory.layers}
    for siblings in FUSED_SIBLINGS:
        present = tuple(name for name in siblings if name in last)
        if len(present) > 1:
            ties.append(present)
            why_tied.append(f"{', '.join(present)}: serving engines fuse them into one matrix")
    for layer in inventory.layers:
        name = layer.name.rpartition(".")[2]
        if layer.kind is LayerKind.EMBEDDING and name in POSITIONS:
            exclude.append(layer.name)
            why_excluded.append(f"{layer.name}: a position table, small and read by every token")
        elif _is_router(layer.name, layer.n_weights, inventory):
            exclude.append(layer.name)
            why_excluded.append(f"{layer.name}: a router; a wrong choice of expert costs most")
    return Suggestion(ties=tuple(ties), exclude=tuple(exclude), reasons=(*why_tied, *why_excluded))


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
