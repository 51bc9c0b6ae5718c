"""Costs of each layer at each candidate that no formula knows: times and energies, from a table.

A table says what one run of a model takes of a resource: a constant, and for each layer and
candidate what is added to it. ``bitquota profile`` measures one; anything else may write one, its
schema is published (``docs/reference/costs.schema.json``). The resource decides which budgets a
table serves: ``latency_ns`` those in seconds and tokens per second, ``energy_pj`` those in joules.

Design: docs/design/latency.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.canonical import JsonObject, digest_json, read_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate, CandidateTable

LATENCY, ENERGY = "latency_ns", "energy_pj"
MEASURED = {LATENCY: ("ns", "µs", "ms", "s"), ENERGY: ("pJ", "nJ", "µJ", "mJ", "J")}
"""Of each resource the unit of its costs, and larger ones, each a thousand times the one before."""

_LARGEST = 2**53
Named = tuple[str, str]
"""A layer and the label of a candidate, such as ``["conv1", "W4"]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost(Document):
    """What one layer adds at one candidate, and the standard error of that."""

    FORM: ClassVar[Form] = Form(what="a cost", left_out=("standard_error",))

    layer: str
    candidate: str
    cost: int
    standard_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TogetherCost(Document):
    """What two layers at two candidates take together beyond the sum of both; of any sign."""

    first: Named
    second: Named
    cost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPlan(Document):
    """A plan that was timed although no cost was fitted to it."""

    predicted: int
    measured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable(Document):
    """What a model takes of a resource, layer by layer.

    Attributes:
        resource: ``latency_ns`` or ``energy_pj``: its unit is that of all costs.
        model_digest: Of the model.
        constant: What one run takes whatever is chosen.
        layers: Costs of each layer at each candidate, at least 0.
        pairs: Costs of two layers together beyond these.
        target: The deployment target whose files were measured.
        device: What it was measured on.
        runtime: Name, version and options of what ran it.
        threads: That it ran on.
        batch: Samples of one run.
        length: Tokens of a sample, or 0 where samples are no tokens.
        constant_error: Standard error of ``constant``.
        checked: Plans that show how well the table predicts.
        source: How it was made: method, clock, rounds; or the constants it was computed from.
    """

    FORM: ClassVar[Form] = Form(
        what="a cost table",
        schema="bitquota/costs/1",
        advice="name a file that 'bitquota profile' wrote",
    )

    resource: str
    model_digest: str
    constant: int = 0
    layers: tuple[LayerCost, ...]
    pairs: tuple[TogetherCost, ...] = ()
    target: str | None = None
    device: str = ""
    runtime: JsonObject = field(default_factory=dict)
    threads: int = 1
    batch: int = 1
    length: int = 0
    constant_error: float = 0.0
    checked: tuple[CheckedPlan, ...] = ()
    source: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every cost can be added up, and stands once."""
        if self.resource not in MEASURED:
            msg = (
                f"a cost table must be of {' or '.join(MEASURED)}; got '{self.resource[:80]}': "
                "times are written in nanoseconds, energies in picojoules"
            )
            raise InvalidInput(msg, resource=self.resource[:80])
        if not self.layers:
            msg = "a cost table must have the cost of at least one layer; got none: profile again"
            raise InvalidInput(msg)
        for what, value in (
            ("the constant", self.constant),
            *((f"'{c.layer[:80]}' at {c.candidate[:20]}", c.cost) for c in self.layers),
        ):
            if not 0 <= value < _LARGEST:
                msg = (
                    f"costs of a table must be from 0 to below 2^53 {self.unit}; {what} has "
                    f"{value:.15g}: measure again, or correct it"
                )
                raise InvalidInput(msg)
        errors = [self.constant_error, *(c.standard_error for c in self.layers)]
        if not all(0 <= e < math.inf for e in errors):
            msg = "standard errors of a cost table must be finite and at least 0; one is not"
            raise InvalidInput(msg)
        if min(self.threads, self.batch) < 1 or self.length < 0:
            msg = (
                "a cost table must be of at least one thread and one sample; got "
                f"{self.threads} and {self.batch}"
            )
            raise InvalidInput(msg)
        names = [(c.layer, c.candidate) for c in self.layers]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            msg = f"a cost table must price each candidate once; '{twice[0]}' has {twice[1]} twice"
            raise InvalidInput(msg, layer=twice[0])
        known = set(names)
        for pair in self.pairs:
            if {pair.first, pair.second} - known or pair.first[0] == pair.second[0]:
                msg = (
                    "a pair of a cost table must join candidates of two of its layers; got "
                    f"{' '.join(pair.first)[:80]} with {' '.join(pair.second)[:80]}"
                )
                raise InvalidInput(msg)

    @property
    def unit(self) -> str:
        """Unit of all costs."""
        return MEASURED[self.resource][0]

    @property
    def tokens(self) -> int:
        """Tokens of one run."""
        return self.batch * self.length

    def digest(self) -> str:
        """Return the content digest."""
        return digest_json(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table; raises ``InvalidInput``."""
        return cls.from_json(read_json(path, "a cost table", cls.FORM.advice, InvalidInput))

    def require_model(self, digest: str) -> None:
        """Raise ``InvalidInput`` unless it is a table of the model with this digest."""
        if digest not in {"", self.model_digest}:
            msg = (
                f"a cost table must be of the model that is planned; this one is of "
                f"{self.model_digest[:19]}…, the model is {digest[:19]}…: profile this model"
            )
            raise InvalidInput(msg, table=self.model_digest, model=digest)

    def kept(self, inventory: Inventory) -> int:
        """Return what layers take that are not among those of ``inventory``: full precision."""
        prices = self._prices()
        planned = {layer.name for layer in inventory.layers}
        apart = dict.fromkeys(c.layer for c in self.layers if c.layer not in planned)
        full = f"W{FULL_PRECISION_BITS}"
        return sum(self._price(prices, name, full) for name in apart)

    def spent(self, candidates: Iterable[Candidate]) -> int:
        """Return what candidates take, without the constant; caches cost nothing.

        Raises:
            InvalidInput: The table lacks one of them.
        """
        prices = self._prices()
        chosen = [(c.layer, c.label) for c in candidates if not c.cached]
        total = sum(self._price(prices, *name) for name in chosen)
        here = set(chosen)
        return total + sum(p.cost for p in self.pairs if {p.first, p.second} <= here)

    def costs(self, table: CandidateTable) -> NDArray[np.int64]:
        """Return ``i64[n]``: what each row of ``table`` takes, pairs at most.

        A row that may meet pair costs counts the largest of them with each layer, if that is
        positive: sums are never too small, and too large where a pair saves something.

        Raises:
            InvalidInput: This table lacks a candidate of ``table``.
        """
        prices = self._prices()
        most: dict[Named, dict[str, int]] = {}
        for pair in self.pairs:
            other = most.setdefault(pair.first, {})
            other[pair.second[0]] = max(other.get(pair.second[0], 0), pair.cost)
        return np.array(
            [
                sum(
                    self._price(prices, c.layer, c.label)
                    + sum(most.get((c.layer, c.label), {}).values())
                    for c in row.candidates
                    if not c.cached
                )
                for row in table.rows
            ],
            dtype=np.int64,
        )

    def with_whole_sums(self) -> Self:
        """Return the table of the same plans' costs in which sums over layers have the constant.

        Each plan has one candidate of the first layer: the constant is added to all of these.
        """
        first = self.layers[0].layer
        layers = tuple(
            replace(c, cost=c.cost + self.constant) if c.layer == first else c for c in self.layers
        )
        return replace(self, layers=layers, constant=0)

    def _prices(self) -> dict[Named, int]:
        return {(c.layer, c.candidate): c.cost for c in self.layers}

    def _price(self, prices: dict[Named, int], layer: str, label: str) -> int:
        if (layer, label) not in prices:
            known = [c.candidate for c in self.layers if c.layer == layer]
            got = f"only {', '.join(known)}" if known else "the layer not at all"
            msg = (
                f"a cost table must price every candidate; it lacks {label[:40]} of layer "
                f"'{layer[:80]}' and has {got}: plan with --bits of what it has, or profile again"
            )
            raise InvalidInput(msg, layer=layer, candidate=label)
        return prices[layer, label]


def table_of(resource: str, tables: Sequence[CostTable], text: str) -> CostTable:
    """Return the table that prices ``resource``; raises ``InvalidInput`` unless there is one."""
    found = [table for table in tables if table.resource == resource]
    if len(found) != 1:
        named = f"{len(found)} of them" if found else "none"
        msg = (
            f"the budget '{text.strip()}' needs one cost table of {resource}; got {named}: measure "
            "one with 'bitquota profile' and give it to 'bitquota plan --table'"
        )
        raise InvalidInput(msg, resource=resource)
    return found[0]


def format_cost(cost: float, resource: str) -> str:
    """Return a cost for a person, such as ``4.97 ms``."""
    units = MEASURED[resource]
    k = 0
    while k + 1 < len(units) and abs(cost) >= 1000 ** (k + 1):
        k += 1
    return f"{cost / 1000**k:.4g} {units[k]}"
