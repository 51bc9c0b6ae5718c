"""From relaxed bit-widths to whole ones that keep a limit exactly.

Design: docs/design/training.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate

PRICES: dict[str, Callable[[Candidate], int]] = {
    "size_bits": lambda candidate: candidate.size_bits,
    "code_bits": lambda candidate: candidate.size.codes,
}
"""What a candidate takes of each resource of weights that can be limited here."""


def repair(
    layers: Sequence[Layer],
    relaxed: Sequence[float],
    table: dict[str, dict[int, Candidate]],
    budget: Budget,
) -> tuple[Candidate, ...]:
    """Return whole bit-widths near the relaxed ones, within the limit exactly.

    Layers of one group get one width; its relaxed width is their mean, weighed by weights. See
    ``whole_widths`` for the way. A heuristic; the limit holds exactly, and no single group could be
    raised further.
    """
    price = PRICES[budget.resource]
    groups: dict[str, list[int]] = {}
    for k, layer in enumerate(layers):
        groups.setdefault(layer.group, []).append(k)
    means, prices = [], []
    for members in groups.values():
        weight = sum(layers[k].n_weights for k in members)
        means.append(sum(relaxed[k] * layers[k].n_weights for k in members) / weight)
        widths = sorted(table[layers[members[0]].name])
        prices.append({b: sum(price(table[layers[k].name][b]) for k in members) for b in widths})
    bits = whole_widths(means, prices, budget.available)
    of_group = dict(zip(groups, bits, strict=True))
    return tuple(table[la.name][of_group[la.group]] for la in layers)


def whole_widths(
    relaxed: Sequence[float], prices: Sequence[Mapping[int, int]], limit: int | None
) -> list[int]:
    """Return one of the widths of each unit, together within ``limit``.

    Every unit starts at the largest width that is not above its relaxed one. Over the limit, the
    unit whose width exceeds its relaxed width the most is lowered, the dearest first. Under it,
    units are raised, the one whose relaxed width exceeds its width the most first, as long as one
    fits. Without a limit each unit takes the nearest width.
    """
    offered = [sorted(p) for p in prices]
    if limit is None:
        return [
            min(w, key=lambda b: (abs(b - r), b)) for r, w in zip(relaxed, offered, strict=True)
        ]
    bits = [
        max([w for w in widths if w <= r + 1e-6], default=widths[0])
        for r, widths in zip(relaxed, offered, strict=True)
    ]

    def step(k: int, by: int) -> int | None:
        at = offered[k].index(bits[k]) + by
        return offered[k][at] if 0 <= at < len(offered[k]) else None

    spent = sum(p[b] for p, b in zip(prices, bits, strict=True))
    while spent > limit:
        lower = [k for k in range(len(bits)) if step(k, -1) is not None]
        k = max(lower, key=lambda k: (bits[k] - relaxed[k], prices[k][bits[k]], -k))
        down = step(k, -1)
        assert down is not None  # noqa: S101  # ``lower`` has only such
        spent += prices[k][down] - prices[k][bits[k]]
        bits[k] = down
    while True:
        raisable = []
        for k in range(len(bits)):
            up = step(k, 1)
            if up is not None and prices[k][up] - prices[k][bits[k]] <= limit - spent:
                raisable.append((relaxed[k] - bits[k], -k, up))
        if not raisable:
            return bits
        _, negative, up = max(raisable)
        spent += prices[-negative][up] - prices[-negative][bits[-negative]]
        bits[-negative] = up


def _nearest(widths: Sequence[int], relaxed: float) -> int:
    return min(widths, key=lambda width: (abs(width - relaxed), width))
