"""Layers of a model, what each may become, and which layers must decide together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Self

import numpy as np
import re2

from bitquota.canonical import digest_json
from bitquota.errors import InvalidInput, InvalidModel, UnknownLayer
from bitquota.storage import (
    FULL_PRECISION_BITS,
    WEIGHT_BITS,
    Scheme,
    StorageSize,
    storage_size,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject


class LayerKind(StrEnum):
    """What a layer does with its weight."""

    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    CONV_TRANSPOSE1D = "conv_transpose1d"
    CONV_TRANSPOSE2D = "conv_transpose2d"
    CONV_TRANSPOSE3D = "conv_transpose3d"
    LINEAR = "linear"
    LINEAR_TRANSPOSED = "linear_transposed"
    """A linear layer that stores ``[in, out]``, such as transformers' Conv1D."""
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    """A three-dimensional parameter that holds one matrix per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One quantizable weight of a model.

    Attributes:
        name: Path of the module that owns the weight, or of the parameter itself when a module
            owns several (experts).
        kind: What the layer does with the weight.
        weight_name: Full name of the parameter.
        weight_shape: Shape as the framework stores it.
        rows: Output channels: rows of the weight seen as a matrix (see ``storage``).
        columns: Weights per output channel.
        n_weights: Number of weights, ``rows * columns``.
        n_macs: Multiply-accumulates of one forward pass of one sample.
        n_inputs: Elements of the layer's input activation for one sample.
        weight_format_bits: Bits per weight as the checkpoint stores it (32 or 16).
        group: Name of the decision group; layers of one group share a candidate.
        aliases: Other parameter names that share the same storage (tied weights).
    """

    name: str
    kind: LayerKind
    weight_name: str
    weight_shape: tuple[int, ...]
    rows: int
    columns: int
    n_weights: int
    n_macs: int = 0
    n_inputs: int = 0
    weight_format_bits: int = 32
    group: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the counts against each other; a layer without a group is its own group."""
        if math.prod(self.weight_shape) != self.n_weights or self.n_weights < 1:
            msg = (
                f"layer '{self.name}': n_weights must be the product of weight_shape and at "
                f"least 1; got {self.n_weights} for shape {list(self.weight_shape)}"
            )
            raise InvalidModel(msg, layer=self.name)
        if self.rows * self.columns != self.n_weights:
            msg = (
                f"layer '{self.name}': rows x columns must equal n_weights={self.n_weights}; "
                f"got {self.rows} x {self.columns}"
            )
            raise InvalidModel(msg, layer=self.name)
        if not self.group:
            object.__setattr__(self, "group", self.name)

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        data = asdict(self)
        data["kind"] = str(self.kind)
        data["weight_shape"] = list(self.weight_shape)
        data["aliases"] = list(self.aliases)
        return data

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Rebuild from ``to_json``."""
        return cls(
            **data
            | {
                "kind": LayerKind(data["kind"]),
                "weight_shape": tuple(data["weight_shape"]),
                "aliases": tuple(data["aliases"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedTensor:
    """A parameter or buffer that ships as it is: biases, norms, excluded layers."""

    name: str
    shape: tuple[int, ...]
    format: str
    size_bits: int
    reason: str = ""

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Rebuild from ``to_json``."""
        return cls(**data | {"shape": tuple(data["shape"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Every tensor of a model, counted once: the quantizable layers and the rest."""

    model_digest: str
    layers: tuple[Layer, ...]
    unquantized: tuple[UnquantizedTensor, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to quantize and that names are unique."""
        if not self.layers:
            msg = (
                "a model must have at least one quantizable layer (convolution, linear, "
                "embedding or expert weights); found none: check the model, or the exclusions"
            )
            raise InvalidModel(msg)
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            msg = f"layer names must be unique; got twice: {', '.join(twice)}"
            raise InvalidModel(msg, layers=twice)

    @property
    def n_weights(self) -> int:
        """Quantizable weights."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def unquantized_bits(self) -> int:
        """Bits of everything that ships as it is."""
        return sum(tensor.size_bits for tensor in self.unquantized)

    @property
    def full_precision_bits(self) -> int:
        """Bits of the whole model before quantization."""
        own = sum(layer.n_weights * layer.weight_format_bits for layer in self.layers)
        return own + self.unquantized_bits

    def stored_in(self, bits: int) -> Inventory:
        """Return the same tensors with floating-point ones counted at ``bits`` each.

        For a checkpoint in half precision, which is measured in float32 but ships as it is.
        """
        layers = tuple(replace(layer, weight_format_bits=bits) for layer in self.layers)
        unquantized = tuple(
            replace(tensor, format=f"fp{bits}", size_bits=math.prod(tensor.shape) * bits)
            if tensor.format in ("fp32", "fp16")
            else tensor
            for tensor in self.unquantized
        )
        return replace(self, layers=layers, unquantized=unquantized)

    def layer(self, name: str) -> Layer:
        """Return the layer called ``name``; raises ``UnknownLayer``."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown_layer(name, [layer.name for layer in self.layers])

    def exclude(self, patterns: Sequence[str], reason: str = "excluded on request") -> Inventory:
        """Move the layers that match any pattern to the tensors that ship as they are."""
        out = {name for p in patterns for name in match_layers(p, self.layers)}
        moved = tuple(
            UnquantizedTensor(
                name=layer.weight_name,
                shape=layer.weight_shape,
                format=f"fp{layer.weight_format_bits}",
                size_bits=layer.n_weights * layer.weight_format_bits,
                reason=reason,
            )
            for layer in self.layers
            if layer.name in out
        )
        kept = tuple(layer for layer in self.layers if layer.name not in out)
        return replace(self, layers=kept, unquantized=self.unquantized + moved)

    def tie(self, ties: Sequence[Sequence[str]]) -> Inventory:
        """Make layers decide together.

        Each tie is a list of patterns. A tie whose patterns match one layer per block (as
        ``q_proj,k_proj,v_proj`` does) makes one group per block: layers are grouped by their
        name with the matching last part removed. Patterns with a ``.`` or ``*`` name layers in
        full and make one single group. A group is called after all its layers, in module order.

        Raises:
            UnknownLayer: A pattern matches nothing.
            InvalidInput: A tie joins no two layers.
        """
        group_of = {layer.name: layer.group for layer in self.layers}
        for patterns in ties:
            for members in _tie_groups(patterns, self.layers):
                merged = {group_of[name] for name in members}
                joined = [name for name, group in group_of.items() if group in merged]
                group_of |= dict.fromkeys(joined, "+".join(joined))
        layers = tuple(replace(layer, group=group_of[layer.name]) for layer in self.layers)
        return replace(self, layers=layers)

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "model_digest": self.model_digest,
            "layers": [layer.to_json() for layer in self.layers],
            "unquantized": [tensor.to_json() for tensor in self.unquantized],
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Rebuild from ``to_json``."""
        return cls(
            model_digest=data["model_digest"],
            layers=tuple(Layer.from_json(d) for d in data["layers"]),
            unquantized=tuple(UnquantizedTensor.from_json(d) for d in data["unquantized"]),
        )


def unknown_layer(name: str, known: Sequence[str]) -> UnknownLayer:
    """Return the error for a name or pattern that matches nothing, with the nearest names."""
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known[:3])
    msg = (
        f"a layer name or pattern must match at least one layer; '{name}' matches none of the "
        f"{len(known)} layers; did you mean {', '.join(repr(n) for n in near)}?"
    )
    return UnknownLayer(msg, pattern=name, nearest=near)


def match_layers(pattern: str, layers: Sequence[Layer]) -> list[str]:
    """Return the names that ``pattern`` matches, in module order.

    ``re:…`` is a regular expression that must match the whole name; anything else is a shell
    pattern over the whole name, or the exact last part of a name (``q_proj`` matches
    ``model.layers.0.self_attn.q_proj``).

    Raises:
        UnknownLayer: Nothing matches.
        InvalidInput: The regular expression cannot be compiled.
    """
    names = [layer.name for layer in layers]
    if pattern.startswith("re:"):
        compiled = _compiled(pattern)
        found = [name for name in names if compiled.fullmatch(name)]
    else:
        found = [n for n in names if fnmatchcase(n, pattern) or n.rsplit(".", 1)[-1] == pattern]
    if not found:
        raise unknown_layer(pattern, names)
    return found


def check_pattern(pattern: str) -> None:
    """Raise ``InvalidInput`` if a layer pattern is a regular expression that cannot be read."""
    if pattern.startswith("re:"):
        _compiled(pattern)


def _compiled(pattern: str) -> re2._Regexp[str]:
    """Return the expression after ``re:``, in RE2, whose time is linear in the name.

    The patterns of a request may be a stranger's, and ``(a*)*b`` would take Python's own engine
    for ever.
    """
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern[3:], options)
    except re2.error as err:
        why = err.args[0].decode() if err.args and isinstance(err.args[0], bytes) else str(err)
        msg = (
            f"'{pattern}' must be a regular expression of RE2 after 're:', which has no "
            f"look-around and no back-references; got: {why}"
        )
        raise InvalidInput(msg, pattern=pattern) from err


def _tie_groups(patterns: Sequence[str], layers: Sequence[Layer]) -> list[list[str]]:
    matched = [match_layers(pattern, layers) for pattern in patterns]
    names = list(dict.fromkeys(name for found in matched for name in found))
    by_parent: dict[str, list[str]] = {}
    whole = any("." in p or "*" in p or p.startswith("re:") for p in patterns)
    for name in names:
        by_parent.setdefault("" if whole else name.rpartition(".")[0], []).append(name)
    groups = [members for members in by_parent.values() if len(members) > 1]
    if not groups:
        text = ",".join(patterns)
        msg = (
            f"a tie must join at least two layers; '{text}' matches {', '.join(names)} and no two "
            "of them stand in one block: name every layer of the tie, in full if they stand apart"
        )
        raise InvalidInput(msg, tie=list(patterns), layers=names)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One permitted quantization of one layer.

    Attributes:
        layer: Name of the layer.
        weight_bits: Bit-width of the weights; 32 leaves them as they are.
        activation_bits: Bit-width of the layer's input, or ``None`` for full precision.
        scheme: Everything else about the weight's quantization.
        size: Exact storage **including** scales, zero points and padding.
        bit_ops: ``n_macs * weight_bits * activation_bits`` of one sample (32 for an activation
            in full precision).
        activation_size_bits: Bits of the input activation of one sample.
    """

    layer: str
    weight_bits: int
    activation_bits: int | None = None
    scheme: Scheme = field(default_factory=Scheme)
    size: StorageSize
    bit_ops: int = 0
    activation_size_bits: int = 0

    def __post_init__(self) -> None:
        """Check the bit-widths; sizes check themselves."""
        if self.weight_bits not in WEIGHT_BITS:
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
        """Short name such as ``W4`` or ``W4A8``."""
        activation = "" if self.activation_bits is None else f"A{self.activation_bits}"
        return f"W{self.weight_bits}{activation}"

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "layer": self.layer,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "scheme": self.scheme.to_json(),
            "size": self.size.to_json(),
            "bit_ops": self.bit_ops,
            "activation_size_bits": self.activation_size_bits,
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Rebuild from ``to_json``."""
        return cls(
            **data
            | {
                "scheme": Scheme.from_json(data["scheme"]),
                "size": StorageSize.from_json(data["size"]),
            }
        )

    @classmethod
    def of(
        cls,
        layer: Layer,
        weight_bits: int,
        scheme: Scheme,
        activation_bits: int | None = None,
    ) -> Self:
        """Return the candidate of ``layer`` with its sizes counted."""
        size = storage_size(
            layer.rows,
            layer.columns,
            weight_bits,
            scheme,
            full_precision_bits=layer.weight_format_bits,
        )
        activation = FULL_PRECISION_BITS if activation_bits is None else activation_bits
        return cls(
            layer=layer.name,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            scheme=scheme,
            size=size,
            bit_ops=layer.n_macs * weight_bits * activation,
            activation_size_bits=layer.n_inputs * activation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one decision group may become: one candidate for each of its layers."""

    group: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        """Check that there is something to choose."""
        if not self.candidates:
            msg = f"a row must hold one candidate per layer of its group; '{self.group}' has none"
            raise InvalidInput(msg, group=self.group)

    @property
    def label(self) -> str:
        """Short name; the members' labels joined when they differ."""
        return "/".join(dict.fromkeys(c.label for c in self.candidates))


RESOURCES = ("size_bits", "code_bits", "bit_ops", "activation_bits_max", "activation_bits_total")
"""Resources that a table can price; ``latency_ns`` comes from a table of the user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateTable:
    """All rows of all decision groups, groups contiguous and in module order."""

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

    @property
    def groups(self) -> tuple[str, ...]:
        """Group names in order."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``i64[G+1]``: group ``g`` owns the rows ``offsets[g]:offsets[g+1]``."""
        counts = dict.fromkeys(self.groups, 0)
        for row in self.rows:
            counts[row.group] += 1
        return np.cumsum([0, *counts.values()], dtype=np.int64)

    @property
    def group_of_row(self) -> NDArray[np.int64]:
        """``i64[n]``: index of the group that each row belongs to."""
        index = {group: g for g, group in enumerate(self.groups)}
        return np.array([index[row.group] for row in self.rows], dtype=np.int64)

    def costs(self, resource: str) -> NDArray[np.int64]:
        """Return ``i64[n]``: what each row takes of ``resource``.

        ``activation_bits_max`` is the largest activation of the row: a limit on it forbids rows
        rather than adding up.
        """
        if resource == "size_bits":
            values = [sum(c.size_bits for c in row.candidates) for row in self.rows]
        elif resource == "code_bits":
            values = [sum(c.size.codes for c in row.candidates) for row in self.rows]
        elif resource == "bit_ops":
            values = [sum(c.bit_ops for c in row.candidates) for row in self.rows]
        elif resource == "activation_bits_total":
            values = [sum(c.activation_size_bits for c in row.candidates) for row in self.rows]
        elif resource == "activation_bits_max":
            values = [max(c.activation_size_bits for c in row.candidates) for row in self.rows]
        else:
            msg = f"a resource must be one of {', '.join(RESOURCES)}; got '{resource}'"
            raise InvalidInput(msg, resource=resource)
        return np.array(values, dtype=np.int64)

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

    def to_json(self) -> JsonObject:
        """Return the rows as plain JSON."""
        return {
            "rows": [
                {"group": row.group, "candidates": [c.to_json() for c in row.candidates]}
                for row in self.rows
            ]
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Rebuild from ``to_json``."""
        return cls(
            rows=tuple(
                Row(
                    group=row["group"],
                    candidates=tuple(Candidate.from_json(c) for c in row["candidates"]),
                )
                for row in data["rows"]
            )
        )


def enumerate_candidates(
    inventory: Inventory,
    weight_bits: Sequence[int],
    *,
    scheme: Scheme | None = None,
    activation_bits: int | None = None,
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
        activation_bits: Bit-width of every layer's input, or ``None``.
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
            chosen = tuple(Candidate.of(la, bits, scheme, activation_bits) for la in layers)
            rows.append(Row(group=group, candidates=chosen))
    return CandidateTable(rows=tuple(rows))
