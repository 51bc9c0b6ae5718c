"""Budgets: what a user writes, and the integer limit it means for a given model.

======================  =====================================================================
``3.5 bits``            average bits of the integer codes of all quantizable weights (scales not
                        counted, as papers do); ``code_bits``
``3.5 bpw``             the same average with scales, zero points and padding; ``size_bits``
``4.25 bpw of model``   stored bits of the whole model for each of its numbers; ``size_bits``
``12 MiB``              stored size of the whole model; ``size_bits`` (B, kB, MB, GB, KiB, MiB, GiB)
``0.25x``               that share of the model's full-precision size; ``size_bits``
``1 GB of cache``       the KV cache alone, where it is planned; ``cache_bits``
``2.5 GBitOps``         bit operations of one sample (also MBitOps, TBitOps, BitOps)
``act 96 KiB``          the largest quantized input activation of one sample
``act total 96 KiB``    the input activations of all layers together
``act peak 96 KiB``     all tensors that are alive at once while the model runs
``5 ms``                time of one run (ns, us, ms, s), by a cost table; ``latency_ns``
``120 tok/s``           the same as tokens per second
``2 mJ``                energy of one run (nJ, uJ, mJ, J), by a cost table; ``energy_pj``
======================  =====================================================================

Sizes and shares speak of the whole model, and of the KV cache with it where that is planned, unless
``of weights``, ``of model`` or ``of cache`` follows; averages speak of the quantizable weights;
``bpw of model`` counts what ships as it is, too. Thousands may be set off as in ``1,500,000 B`` or
``1_500_000 B``; the decimal sign is a point.

Design: docs/design/budgets.md
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

from bitquota.candidates.cost_table import (
    ENERGY,
    LATENCY,
    CostTable,
    format_cost,
    table_of,
)
from bitquota.candidates.layers import Cache, Inventory, Layer, LayerKind
from bitquota.candidates.live import Cut, Schedule
from bitquota.candidates.peak import constraints, least_peak, peak_of
from bitquota.candidates.table import spent_on
from bitquota.codec import Document, Form
from bitquota.errors import BudgetTooSmall, InvalidBudget, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate, CandidateTable

_BYTE_UNITS = {
    "b": 1, "byte": 1, "bytes": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_AVERAGE_UNITS = frozenset({"bit", "bits", "bits/weight", "bpw"})
_BIT_OPS_UNITS = {"bitops": 1, "mbitops": 10**6, "gbitops": 10**9, "tbitops": 10**12}
_TABLE_UNITS = {
    "ns": (LATENCY, 1), "us": (LATENCY, 10**3), "ms": (LATENCY, 10**6), "s": (LATENCY, 10**9),
    "nj": (ENERGY, 10**3), "uj": (ENERGY, 10**6), "mj": (ENERGY, 10**9), "j": (ENERGY, 10**12),
}  # fmt: skip
_TOKENS_UNIT = "tok/s"
_SYNTAX = re.compile(
    r"""\s*(?P<act>act(?:ivation)?s?\s+(?:(?P<kind>total|peak)\s+)?)?
        (?P<value>(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?|\.\d+)\s*
        (?P<unit>[A-Za-zµ]+(?:/weight|/s)?)
        (?:\s+of\s+(?P<scope>weights|model|cache))?\s*""",
    re.VERBOSE | re.IGNORECASE,
)


def parse_bytes(text: str) -> int:
    """Return the bytes that ``12 MiB`` or ``1500000`` (bytes) means, rounded down.

    Raises:
        InvalidBudget: The text is no such size.
    """
    readable = text[: LONGEST_TEXT + 1]
    found = _SYNTAX.fullmatch(readable if readable.strip()[-1:].isalpha() else f"{readable} B")
    found = found if len(text) <= LONGEST_TEXT else None
    unit = found["unit"].lower() if found else ""
    if found is None or found["act"] or found["scope"] or unit not in _BYTE_UNITS:
        msg = f"a size must read like '1500000', '1500000 B', '1.5 MB' or '12 MiB'; got '{text}'"
        raise InvalidBudget(msg, size=text)
    return int(Fraction(re.sub(r"[_,]", "", found["value"])) * _BYTE_UNITS[unit])


def parse_time(text: str) -> int:
    """Return the nanoseconds that ``5 ms`` means; raises ``InvalidBudget`` for no such time."""
    found = _SYNTAX.fullmatch(text) if len(text) <= LONGEST_TEXT else None
    resource, size = (
        _TABLE_UNITS.get(found["unit"].lower().replace("µ", "u"), ("", 0)) if found else ("", 0)
    )
    if found is None or resource != LATENCY or found["act"] or found["scope"]:
        msg = f"a time must read like '5 ms', '800 us' or '1.5 s'; got '{text[:LONGEST_TEXT]}'"
        raise InvalidBudget(msg, time=text[:LONGEST_TEXT])
    return int(Fraction(re.sub(r"[_,]", "", found["value"])) * size)


LARGEST_LIMIT = 2**62
"""Solvers add up costs as 64-bit integers."""
LONGEST_TEXT = 200
"""Characters of a budget as text; Python reads no number of thousands of digits."""


class Scope(StrEnum):
    """What a budget counts."""

    WEIGHTS = "weights"
    """The quantizable weights only."""
    MODEL = "model"
    """Every tensor that ships."""
    CACHE = "cache"
    """The KV cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Document):
    """An integer limit on one resource of one model.

    Attributes:
        resource: One of ``table.RESOURCES``, or that of ``costs``.
        limit: The largest permitted amount, in the resource's unit, ``constant`` included.
        constant: What the model takes of the resource whatever is chosen (unquantized tensors).
        scope: What is counted.
        text: What the user wrote.
        prices: What prices candidates where no formula does.
        schedule: What is alive when, for a peak.
    """

    FORM: ClassVar[Form] = Form(what="a budget", left_out=("prices", "schedule"))

    resource: str
    limit: int
    constant: int = 0
    scope: Scope = Scope.WEIGHTS
    text: str = ""
    prices: CostTable | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Check that sums over layers can be compared with the limit."""
        if not max(self.limit, self.constant) < LARGEST_LIMIT:
            msg = (
                f"a budget must be below 2^62 {self.unit}; '{self.text[:40]}' is more: leave the "
                "limit out, or give a smaller one"
            )
            raise InvalidBudget(msg, budget=self.text)

    @property
    def available(self) -> int:
        """What is left for the decision groups."""
        return self.limit - self.constant

    @classmethod
    def parse(cls, text: str, inventory: Inventory, tables: Sequence[CostTable] = ()) -> Self:
        """Return the integer limit that ``text`` means for the model of ``inventory``.

        Fractions of a bit are rounded down, so that the limit is never exceeded. Times and
        energies are priced by one of ``tables``.

        Raises:
            InvalidBudget: The text does not follow the table above, or is not positive.
            InvalidInput: There is no table for it, or one of another model.
        """
        found = _SYNTAX.fullmatch(text) if len(text) <= LONGEST_TEXT else None
        if found is None:
            raise _unreadable(text)
        value = Fraction(re.sub(r"[_,]", "", found["value"]))
        unit = found["unit"].lower()
        scope = Scope((found["scope"] or "model").lower())
        averaged = unit in _AVERAGE_UNITS
        _check_scope(found, text)
        if value <= 0:
            msg = f"a budget must be positive; got '{text}'"
            raise InvalidBudget(msg, budget=text)

        if scope is Scope.CACHE and not inventory.caches:
            msg = (
                f"a budget 'of cache' needs a KV cache that is planned; got '{text}': give the "
                "bit-widths it may have (--kv-bits) and the context (--context)"
            )
            raise InvalidBudget(msg, budget=text)
        # What weights alone take needs a name of its own only where something else counts, too.
        of_weights = "weight_size_bits" if inventory.caches else "size_bits"

        # By what the unit measures: time and energy, inputs, averages, work, or bytes.
        unit = unit.replace("µ", "u")
        if (unit in _TABLE_UNITS or unit == _TOKENS_UNIT) and not found["act"]:
            return cls._priced(text, value, unit, inventory, tables)
        if found["act"]:
            if unit not in _BYTE_UNITS:
                raise _unreadable(text)
            limit = int(value * _BYTE_UNITS[unit] * 8)
            kind = (found["kind"] or "max").lower()
            if kind == "peak" and inventory.schedule is None:
                msg = (
                    "a budget of the peak limits quantized inputs along the order in which a model "
                    f"runs; got '{text}' where no input is quantized, or no model is run: plan "
                    "with --activations, or take 'act' or 'act total'"
                )
                raise InvalidBudget(msg, budget=text)
            return cls(
                resource=f"activation_bits_{kind}",
                limit=limit,
                text=text,
                schedule=inventory.schedule if kind == "peak" else None,
            )
        if averaged and found["scope"] and scope is Scope.MODEL:
            return cls(
                resource=of_weights,
                limit=int(value * inventory.n_numbers),
                constant=inventory.unquantized_bits,
                scope=scope,
                text=text,
            )
        if averaged:
            limit = int(value * inventory.n_weights)
            resource = of_weights if unit == "bpw" else "code_bits"
            return cls(resource=resource, limit=limit, text=text)
        if unit in _BIT_OPS_UNITS:
            return cls(resource="bit_ops", limit=int(value * _BIT_OPS_UNITS[unit]), text=text)
        if unit != "x" and unit not in _BYTE_UNITS:
            raise _unreadable(text)
        constant = inventory.unquantized_bits if scope is Scope.MODEL else 0
        if found["scope"]:
            resource = "cache_bits" if scope is Scope.CACHE else of_weights
        else:
            resource = "size_bits"
        if unit == "x":
            whole = {
                Scope.WEIGHTS: inventory.full_precision_bits - inventory.unquantized_bits,
                Scope.MODEL: inventory.full_precision_bits,
                Scope.CACHE: inventory.cache_bits,
            }[scope]
            joint = 0 if found["scope"] else inventory.cache_bits
            limit = int(value * (whole + joint))
        else:
            limit = int(value * _BYTE_UNITS[unit]) * 8
        return cls(resource=resource, limit=limit, constant=constant, scope=scope, text=text)

    @classmethod
    def _priced(
        cls,
        text: str,
        value: Fraction,
        unit: str,
        inventory: Inventory,
        tables: Sequence[CostTable],
    ) -> Self:
        """Return a budget that a cost table prices."""
        resource, size = _TABLE_UNITS.get(unit, (LATENCY, 0))
        prices = table_of(resource, tables, text)
        prices.require_model(inventory.model_digest)
        if unit == _TOKENS_UNIT and not prices.tokens:
            msg = (
                f"a budget in tokens per second needs a cost table of a language model; got "
                f"'{text}' and a table whose samples are no tokens: give a time, such as '5 ms'"
            )
            raise InvalidBudget(msg, budget=text)
        limit = value * size if size else Fraction(prices.tokens * 10**9) / value
        constant = prices.constant
        if inventory is not _ANY_MODEL:
            constant += prices.kept(inventory)
        return cls(
            resource=resource, limit=int(limit), constant=constant, scope=Scope.MODEL, text=text,
            prices=prices,
        )  # fmt: skip

    def of_model(self, digest: str) -> Self:
        """Return the same limit for a model of the same layers: costs know no weights."""
        if self.prices is None:
            return self
        return replace(self, prices=replace(self.prices, model_digest=digest))

    def costs(self, table: CandidateTable) -> NDArray[np.int64]:
        """Return ``i64[n]``: what each row takes of the resource, in its unit.

        Raises:
            InvalidInput: The budget's cost table lacks a candidate.
        """
        return table.costs(self.resource) if self.prices is None else self.prices.costs(table)

    def constraints(self, table: CandidateTable) -> list[tuple[NDArray[np.int64], int]]:
        """Return costs, i64[n] of each row, and limits whose sums over a choice say if it fits.

        Raises:
            InvalidInput: As ``costs``.
        """
        if self.schedule is not None:
            return constraints(self.schedule, table, self.available)
        return [(self.costs(table), self.available)]

    def spent(self, candidates: Sequence[Candidate]) -> int:
        """Return what candidates take, ``constant`` included; errors as ``costs``."""
        if self.schedule is not None:
            return self.constant + peak_of(self.schedule, candidates)
        if self.prices is None:
            return self.constant + spent_on(self.resource, candidates)
        return self.constant + self.prices.spent(candidates)

    def check(self, table: CandidateTable) -> None:
        """Raise ``BudgetTooSmall`` unless the cheapest choice of every group fits.

        The check looks at this budget alone; several budgets can still conflict.
        """
        least = self._least(table) + self.constant
        if least > self.limit and self.prices is not None:
            made = format_cost(self.constant, self.resource)
            msg = (
                f"budget '{self.text}' is below the cheapest plan, which takes "
                f"{format_cost(least, self.resource)} by its cost table ({made} of it whatever is "
                "chosen); raise the budget to that, offer other candidates, or fix and exclude "
                "fewer layers"
            )
            raise BudgetTooSmall(msg, budget=self.text, limit=self.limit, smallest=least)
        if least > self.limit:
            fixed = f", {self.constant:,} bits of them in tensors that ship as they are"
            msg = (
                f"budget '{self.text or self.limit}' is {self.limit:,} {self.unit} "
                f"({self.resource}), below the smallest plan, {least:,} {self.unit}"
                f"{fixed if self.constant else ''}; raise the budget, offer smaller candidates, "
                f"or fix and exclude fewer layers"
            )
            raise BudgetTooSmall(msg, budget=self.text, limit=self.limit, smallest=least)

    def _least(self, table: CandidateTable) -> int:
        """Return what no choice takes less than."""
        if self.schedule is not None:
            return least_peak(self.schedule, table)
        costs = self.costs(table)
        cheapest = [int(costs[a:b].min()) for a, b in itertools.pairwise(table.offsets)]
        return max(cheapest) if self.resource == "activation_bits_max" else sum(cheapest)

    @property
    def unit(self) -> str:
        """The unit of ``limit``, for a person."""
        if self.prices is not None:
            return self.prices.unit
        return {"bit_ops": "bit operations", LATENCY: "ns"}.get(self.resource, "bits")


_ANY_MODEL = Inventory(
    model_digest="",
    layers=(
        Layer(
            name="any", kind=LayerKind.LINEAR, weight_name="any.weight", weight_shape=(1, 1),
            rows=1, columns=1, n_weights=1,
        ),
    ),
    caches=(Cache(name="any.k_cache", heads=1, head_size=1),),
    schedule=Schedule(cuts=(Cut(operation="any", tensors=()),)),
)  # fmt: skip


def check_budgets(texts: Sequence[str], tables: Sequence[CostTable] = ()) -> None:
    """Read budgets, of which several may be joined by ``+``, without a model to hold them to.

    Raises:
        InvalidInput: There is none, or none of ``tables`` prices it.
        InvalidBudget: One cannot be read.
    """
    if not texts:
        msg = "at least one budget must be given, such as '3 bits' or '12 MiB'; got none"
        raise InvalidInput(msg)
    for text in texts:
        for part in text.split("+"):
            Budget.parse(part, _ANY_MODEL, tables)


def _check_scope(found: re.Match[str], text: str) -> None:
    """Raise ``InvalidBudget`` if a budget names a scope that its unit cannot have."""
    unit = found["unit"].lower()
    scope = Scope((found["scope"] or "model").lower())
    codes_of_the_model = unit in _AVERAGE_UNITS and (
        scope is Scope.CACHE or (unit != "bpw" and scope is Scope.MODEL)
    )
    sizeless = {*_BIT_OPS_UNITS, *_TABLE_UNITS, _TOKENS_UNIT}
    if found["scope"] and (found["act"] or unit in sizeless or codes_of_the_model):
        msg = (
            "only sizes, shares and 'bpw' can apply to 'weights' or to the whole 'model', sizes "
            "and shares also to the 'cache', averages of codes to the weights alone; got "
            f"'{text}': leave out 'of {found['scope']}', or give a size"
        )
        raise InvalidBudget(msg, budget=text)


def _unreadable(text: str) -> InvalidBudget:
    msg = (
        "a budget must read like '3.5 bits', '3.6 bpw', '12 MiB', '1500000 B', '0.25x', "
        "'2.5 GBitOps', '5 ms', '120 tok/s', '2 mJ', 'act 96 KiB', 'act total 96 KiB' or "
        f"'act peak 96 KiB', sizes optionally followed by 'of weights'; got '{text[:LONGEST_TEXT]}'"
    )
    return InvalidBudget(msg, budget=text[:LONGEST_TEXT])
