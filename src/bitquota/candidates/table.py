"""Layers of a model, what each may become, and which layers must decide together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from bitquota.candidates.layers import (
    CACHE_FORMAT_BITS,
    Cache,
    Inventory,
    Layer,
    match_layers,
)
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    PLACE_BITS,
    PRUNED_BITS,
    WEIGHT_BITS,
    Scheme,
    StorageSize,
    kept_weights,
    storage_size,
)
from bitquota.canonical import digest_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Document):
    """One permitted quantization of one layer.

    Attributes:
        layer: Name of the layer.
        weight_bits: Bit-width of the weights; 32 leaves them as they are, 0 makes them zero.
        activation_bits: Bit-width of the layer's input, or ``None`` for full precision.
        scheme: Everything else about the weight's quantization.
        size: Exact storage **including** scales, zero points and padding.
        bit_ops: ``n_macs * weight_bits * activation_bits`` of one sample (32 for an activation
            in full precision).
        activation_size_bits: Bits of the input activation of one sample.
        cached: Whether the layer is a KV cache, and its "weights" what that holds.
    """

    FORM: ClassVar[Form] = Form(left_out=("cached",))

    layer: str
    weight_bits: int
    activation_bits: int | None = None
    scheme: Scheme = field(default_factory=Scheme)
    size: StorageSize
    bit_ops: int = 0
    activation_size_bits: int = 0
    cached: bool = False

    def __post_init__(self) -> None:
        """Check the bit-widths; sizes check themselves."""
        if self.weight_bits not in (PRUNED_BITS, *WEIGHT_BITS):
            msg = (
                f"layer '{self.layer}': weight_bits must be one of "
                f"{', '.join(map(str, WEIGHT_BITS))}; got {self.weight_bits}"
            )
            raise InvalidInput(msg, layer=self.layer, weight_bits=self.weight_bits)
        if self.activation_bits is not None and not 1 <= self.activation_bits <= 32:
            msg = (
                f"layer '{self.layer}': activation_bits must lie between 1 and 32, or be left out; "
                f"got {self.activation_bits}"
            )
            raise InvalidInput(msg, layer=self.layer, activation_bits=self.activation_bits)

    @property
    def size_bits(self) -> int:
        """Exact stored size of the weight in bits."""
        return self.size.total

    @property
    def label(self) -> str:
        """Short name such as ``W4``, ``W4A8``, or ``KV8`` of a cache.

        Of rows with different bit-widths it has the mean: ``W3.25``; of weights that are partly
        left out what stays: ``W4:2:4``; ``W0`` has none.
        """
        if self.cached:
            return f"KV{self.stored_bits}"
        activation = "" if self.activation_bits is None else f"A{self.activation_bits}"
        if self.sparse:
            return f"W{self.weight_bits}:{self.scheme.sparsity}{activation}"
        return f"W{self.mean_bits:.4g}{activation}"

    @property
    def row_bits(self) -> tuple[int, ...]:
        """The bit-width of each row, where rows have different ones."""
        return self.scheme.row_bits if self.weight_bits != FULL_PRECISION_BITS else ()

    @property
    def pruned(self) -> bool:
        """Whether all weights are zero."""
        return self.weight_bits == PRUNED_BITS

    @property
    def sparse(self) -> bool:
        """Whether weights are left out, and the places of the others stored."""
        return self.scheme.sparsity is not None and self.weight_bits != FULL_PRECISION_BITS

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as codes."""
        return self.weight_bits not in (PRUNED_BITS, FULL_PRECISION_BITS)

    @property
    def n_weights(self) -> int:
        """Weights of the layer, or numbers of the cache; 0 where nothing is stored."""
        mean = self.mean_bits
        return round(self.size.codes / mean) if mean else 0

    @property
    def mean_bits(self) -> float:
        """Bits of a weight's code, on average over all weights."""
        widths = self.row_bits
        if self.sparse:
            return (self.weight_bits + PLACE_BITS) / 2
        return sum(widths) / len(widths) if widths else self.weight_bits

    @property
    def stored_bits(self) -> int:
        """Bits of a code; a cache that is not quantized is kept in half precision."""
        full = self.weight_bits == FULL_PRECISION_BITS
        return CACHE_FORMAT_BITS if self.cached and full else self.weight_bits

    @classmethod
    def of(
        cls,
        layer: Layer | Cache,
        weight_bits: int,
        scheme: Scheme,
        activation_bits: int | None = None,
    ) -> Self:
        """Return the candidate of ``layer`` with its sizes counted."""
        if isinstance(layer, Cache):
            size = storage_size(
                layer.rows,
                layer.columns,
                weight_bits,
                scheme,
                full_precision_bits=CACHE_FORMAT_BITS,
            )
            return cls(
                layer=layer.name, weight_bits=weight_bits, scheme=scheme, size=size, cached=True
            )
        size = storage_size(
            layer.rows,
            layer.columns,
            weight_bits,
            scheme,
            full_precision_bits=layer.weight_format_bits,
        )
        activation = FULL_PRECISION_BITS if activation_bits is None else activation_bits
        if weight_bits == PRUNED_BITS:
            # Nothing reads the input, and how it would be stored is no matter.
            scheme, activation_bits, activation = scheme.of_parts, None, 0
        return cls(
            layer=layer.name,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            scheme=scheme,
            size=size,
            bit_ops=_code_bits(layer.n_macs, weight_bits, scheme) * activation,
            activation_size_bits=layer.n_inputs * activation,
        )


def _read_only(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.flags.writeable = False
    return array


def _code_bits(numbers: int, weight_bits: int, scheme: Scheme) -> int:
    """Return the bits of ``numbers`` codes, as many in each row."""
    widths = scheme.row_bits
    if widths and weight_bits != FULL_PRECISION_BITS:
        return numbers * sum(widths) // len(widths)
    if scheme.sparsity is not None and weight_bits != FULL_PRECISION_BITS:
        numbers = kept_weights(numbers)
    return numbers * weight_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Document):
    """What one decision group may become: one candidate for each of its layers."""

    group: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        """Check that there is something to choose."""
        if not self.candidates:
            msg = f"a row must hold one candidate per layer of its group; '{self.group}' has none"
            raise InvalidInput(msg, group=self.group)

    @property
    def cached(self) -> bool:
        """Whether the group is one of KV caches."""
        return self.candidates[0].cached

    @property
    def plain(self) -> bool:
        """Whether a bit-width says it all: every weight of a layer is stored, at one of them."""
        return not any(c.row_bits or c.sparse or c.pruned for c in self.candidates)

    @property
    def label(self) -> str:
        """Short name; the members' labels joined when they differ."""
        return "/".join(dict.fromkeys(c.label for c in self.candidates))


RESOURCES = (
    "size_bits", "weight_size_bits", "cache_bits", "code_bits", "bit_ops", "activation_bits_max",
    "activation_bits_total",
)  # fmt: skip
"""Resources that a table can price; ``latency_ns`` comes from a table of the user's.

``size_bits`` is what weights and KV cache take together, ``weight_size_bits`` and ``cache_bits``
what each takes alone."""


def spent_on(resource: str, candidates: Sequence[Candidate]) -> int:
    """Return what candidates take of a resource; raises ``InvalidInput`` for an unknown one.

    ``activation_bits_max`` is the largest activation: a limit on it forbids rows rather than
    adding up.
    """
    weights = [c for c in candidates if not c.cached]
    if resource == "size_bits":
        return sum(c.size_bits for c in candidates)
    if resource == "weight_size_bits":
        return sum(c.size_bits for c in weights)
    if resource == "cache_bits":
        return sum(c.size_bits for c in candidates if c.cached)
    if resource == "code_bits":
        return sum(c.size.codes for c in weights)
    if resource == "bit_ops":
        return sum(c.bit_ops for c in weights)
    if resource == "activation_bits_total":
        return sum(c.activation_size_bits for c in weights)
    if resource == "activation_bits_max":
        return max((c.activation_size_bits for c in weights), default=0)
    msg = f"a resource must be one of {', '.join(RESOURCES)}; got '{resource}'"
    raise InvalidInput(msg, resource=resource)


@dataclass(frozen=True, kw_only=True)
class CandidateTable(Document):
    """All rows of all decision groups, groups contiguous and in module order.

    What follows from the rows is computed once: every solve asks for it again.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        """Check that groups are contiguous, non-empty and without duplicate rows."""
        if not self.rows:
            msg = "a candidate table must have at least one row; got none"
            raise InvalidInput(msg)
        seen: dict[str, set[tuple[Candidate, ...]]] = {}
        previous = None
        for row in self.rows:
            if row.group != previous and row.group in seen:
                msg = f"the rows of a group must be contiguous; '{row.group}' appears twice"
                raise InvalidInput(msg, group=row.group)
            known = seen.setdefault(row.group, set())
            if row.candidates in known:
                msg = f"a group must not list a candidate twice; '{row.group}' has {row.label}"
                raise InvalidInput(msg, group=row.group)
            known.add(row.candidates)
            previous = row.group

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Group names in order."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The label of every row."""
        return tuple(row.label for row in self.rows)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """``i64[G+1]``: group ``g`` owns the rows ``offsets[g]:offsets[g+1]``."""
        counts = dict.fromkeys(self.groups, 0)
        for row in self.rows:
            counts[row.group] += 1
        return _read_only(np.cumsum([0, *counts.values()], dtype=np.int64))

    @cached_property
    def group_of_row(self) -> NDArray[np.int64]:
        """``i64[n]``: index of the group that each row belongs to."""
        index = {group: g for g, group in enumerate(self.groups)}
        return _read_only(np.array([index[row.group] for row in self.rows], dtype=np.int64))

    @cached_property
    def n_weights(self) -> dict[str, int]:
        """Weights of each layer, and numbers of each cache, by name; pruned ones store none."""
        found: dict[str, int] = {}
        for row in self.rows:
            for c in row.candidates:
                found[c.layer] = found.get(c.layer) or c.n_weights
        return found

    @cached_property
    def _known_costs(self) -> dict[str, NDArray[np.int64]]:
        return {}

    def costs(self, resource: str) -> NDArray[np.int64]:
        """Return ``i64[n]``: what each row takes of ``resource``, see ``spent_on``."""
        known = self._known_costs
        if resource not in known:
            values = [spent_on(resource, row.candidates) for row in self.rows]
            known[resource] = _read_only(np.array(values, dtype=np.int64))
        return known[resource]

    def decode(self, choice: Sequence[int]) -> tuple[Candidate, ...]:
        """Return the chosen candidate of every layer.

        Args:
            choice: For each group, the index of the row **within** the group.

        Raises:
            InvalidInput: Wrong length, or an index outside its group.
        """
        offsets = self.offsets
        if len(choice) != len(offsets) - 1:
            groups = len(offsets) - 1
            msg = f"a choice must name one row for each of {groups} groups; got {len(choice)}"
            raise InvalidInput(msg)
        chosen: list[Candidate] = []
        for g, local in enumerate(choice):
            if not 0 <= local < offsets[g + 1] - offsets[g]:
                msg = f"group '{self.groups[g]}' has no row {local}"
                raise InvalidInput(msg, group=self.groups[g], row=int(local))
            chosen.extend(self.rows[offsets[g] + int(local)].candidates)
        return tuple(chosen)

    def digest(self) -> str:
        """Return the content digest."""
        return digest_json(self.to_json())


def enumerate_candidates(
    inventory: Inventory,
    weight_bits: Sequence[int],
    *,
    scheme: Scheme | None = None,
    activation_bits: Sequence[int | None] | int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> CandidateTable:
    """Return every permitted quantization of every decision group.

    Layers of one group take the same bit-width (a tie). A group keeps its place where its first
    layer stands in module order.

    Args:
        inventory: The model's layers, exclusions and ties already applied.
        weight_bits: Bit-widths on offer, in any order.
        scheme: How weights are quantized; the default is symmetric, per output channel, exact
            least squares, fp32 scales.
        activation_bits: Bit-width of layers' inputs, or several on offer; ``None`` is full
            precision.
        fixed: Pattern to bit-width: matching layers (and what they are tied to) get only it.

    Raises:
        InvalidInput: No bit-widths, an impossible one, or ties fixed to different widths.
        UnknownLayer: A pattern of ``fixed`` matches nothing.
    """
    if not weight_bits:
        msg = "at least one bit-width must be on offer; got none"
        raise InvalidInput(msg)
    if bad := sorted(set(weight_bits) - set(WEIGHT_BITS)):
        msg = f"bit-widths must be among {', '.join(map(str, WEIGHT_BITS))}; got {bad}"
        raise InvalidInput(msg, weight_bits=bad)
    scheme = scheme or Scheme()
    input_widths: Sequence[int | None] = (
        (activation_bits,)
        if activation_bits is None or isinstance(activation_bits, int)
        else activation_bits
    )
    pinned: dict[str, int] = {}
    group_of = {layer.name: layer.group for layer in inventory.layers}
    for pattern, bits in (fixed or {}).items():
        if bits not in WEIGHT_BITS:
            msg = (
                f"a fixed bit-width must be one of {', '.join(map(str, WEIGHT_BITS))}; "
                f"got {pattern}={bits}"
            )
            raise InvalidInput(msg, pattern=pattern, weight_bits=bits)
        for name in match_layers(pattern, inventory.layers):
            group = group_of[name]
            if pinned.setdefault(group, bits) != bits:
                msg = (
                    f"group '{group}' must be fixed to one bit-width; got {pinned[group]} and "
                    f"{bits}; fix its layers alike or remove the tie"
                )
                raise InvalidInput(msg, group=group)
    members: dict[str, list[Layer]] = {}
    for layer in inventory.layers:
        members.setdefault(layer.group, []).append(layer)
    rows: list[Row] = []
    for group, layers in members.items():
        widths = [pinned[group]] if group in pinned else sorted(set(weight_bits))
        for bits in widths:
            for inputs in input_widths:
                chosen = tuple(Candidate.of(la, bits, scheme, inputs) for la in layers)
                rows.append(Row(group=group, candidates=chosen))
    return CandidateTable(rows=tuple(rows))
