"""Budgets of a sensitivity matrix as text, where the model itself is not at hand.

Design: docs/design/budgets.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.candidates.budget import LARGEST_LIMIT, Budget, Scope
from bitquota.candidates.layers import Cache, Inventory, Layer, LayerKind
from bitquota.errors import InvalidBudget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.cost_table import CostTable
    from bitquota.matrix import SensitivityMatrix


def inventory_of(matrix: SensitivityMatrix) -> Inventory:
    """Return the layers and caches that a matrix speaks of, as far as it knows them."""
    known = matrix.table.n_weights
    cached = {c.layer: c.cached for row in matrix.table.rows for c in row.candidates}
    return inventory_of_weights(
        {name: known[name] for name, of_cache in cached.items() if not of_cache},
        {name: known[name] for name, of_cache in cached.items() if of_cache},
    )


def inventory_of_weights(
    weights: Mapping[str, int], caches: Mapping[str, int] | None = None
) -> Inventory:
    """Return an inventory of layers, and caches, of which only the numbers are known."""
    return Inventory(
        model_digest="",
        layers=tuple(
            Layer(
                name=name, kind=LayerKind.LINEAR, weight_name=name, weight_shape=(n,), rows=1,
                columns=n, n_weights=n,
            )
            for name, n in weights.items()
        ),
        caches=tuple(Cache(name=name, heads=1, head_size=n) for name, n in (caches or {}).items()),
    )  # fmt: skip


def budget_of(
    text: str,
    matrix: SensitivityMatrix,
    inventory: Inventory | None = None,
    tables: Sequence[CostTable] = (),
) -> Budget:
    """Return the limit that ``text`` means for a matrix.

    Args:
        text: As ``Budget.parse`` reads it, or a whole number of bits.
        matrix: The matrix.
        inventory: Of the whole model; without it, budgets must be of its weights.
        tables: What prices times and energies.

    Raises:
        InvalidBudget: It cannot be read, or speaks of a model that is not at hand.
        InvalidInput: No table prices it, or one of another model.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return Budget(resource="size_bits", limit=whole_number(text), text=text)
    budget = Budget.parse(text, inventory or inventory_of(matrix), tables)
    of_model = budget.scope is Scope.MODEL and (
        budget.resource in {"size_bits", "weight_size_bits"}
    )
    if inventory is None and of_model:
        msg = (
            f"without the whole model a budget must be of its weights; got '{text}': write "
            f"'{text} of weights', or solve by the id of a plan job"
        )
        raise InvalidBudget(msg, budget=text)
    return budget


def whole_number(text: str) -> int:
    """Return the integer that ASCII digits stand for; raises ``InvalidBudget`` for huge ones."""
    if len(text) > len(str(LARGEST_LIMIT)):
        msg = f"a budget must be below 2^62; got {len(text):,} digits: give a smaller one"
        raise InvalidBudget(msg, digits=len(text))
    return int(text)
