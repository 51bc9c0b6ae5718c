"""What a model is made of: its layers, and every tensor that is not quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

from bitquota.candidates.live import Schedule
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput, InvalidModel, UnknownLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import re2


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
    RECURRENT = "recurrent"
    """The matrix of one gate of an LSTM, GRU or RNN: one row per hidden unit."""
    CONTRACTION = "contraction"
    """The constant side of an Einsum or matrix product outside of a layer: one row per output."""


BATCH_BYTES = 2**29
"""What the input and output of a layer may take in a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(Document):
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
        axes: Axes of the stored weight, those of its rows first, where a contraction stores them
            in another order.
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
    axes: tuple[int, ...] | None = None

    FORM: ClassVar[Form] = Form(left_out=("axes",))

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
        if self.axes is not None and sorted(self.axes) != list(range(len(self.weight_shape))):
            msg = (
                f"layer '{self.name}': axes must be those of a weight of shape "
                f"{list(self.weight_shape)}, each once; got {list(self.axes)}"
            )
            raise InvalidModel(msg, layer=self.name)
        if not self.group:
            object.__setattr__(self, "group", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache(Document):
    """The keys, or the values, that one attention layer keeps of past tokens.

    Seen as a matrix it has one row for each token and one column for each number of each head.

    Attributes:
        name: Path of the attention module, and ``k_cache`` or ``v_cache``.
        heads: Heads whose keys or values are kept; queries may have more.
        head_size: Numbers of one head.
        tokens: Tokens of one sequence that are kept: the context, or the window if that is shorter.
        sequences: Sequences at the same time.
        window: How far back the layer attends, or ``None`` if over the whole context.
        group: Name of the decision group.
    """

    FORM: ClassVar[Form] = Form(what="a cache")

    name: str
    heads: int
    head_size: int
    tokens: int = 1
    sequences: int = 1
    window: int | None = None
    group: str = ""

    def __post_init__(self) -> None:
        """Refuse what nothing can be kept in; a cache without a group is its own group."""
        if min(self.heads, self.head_size, self.tokens, self.sequences) < 1:
            msg = (
                f"cache '{self.name}' must have at least one head, number, token and sequence; got "
                f"{self.heads}, {self.head_size}, {self.tokens} and {self.sequences}"
            )
            raise InvalidModel(msg, cache=self.name)
        if not self.group:
            object.__setattr__(self, "group", self.name)

    @property
    def holds_keys(self) -> bool:
        """Whether it holds keys; else values."""
        return self.name.endswith(K_CACHE)

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.tokens * self.sequences

    @property
    def columns(self) -> int:
        """Numbers kept of one token."""
        return self.heads * self.head_size

    @property
    def full_precision_bits(self) -> int:
        """Bits of the whole cache where it is not quantized."""
        return self.rows * self.columns * CACHE_FORMAT_BITS

    def at(self, context: int, sequences: int) -> Cache:
        """Return the cache of so many sequences of ``context`` tokens each."""
        tokens = context if self.window is None else min(context, self.window)
        return replace(self, tokens=tokens, sequences=sequences)


K_CACHE, V_CACHE = "k_cache", "v_cache"
"""Last parts of the names of caches."""

CACHE_FORMAT_BITS = 16
"""Bits of a number in a cache that is not quantized: runtimes keep them in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedTensor(Document):
    """A parameter or buffer that ships as it is: biases, norms, excluded layers."""

    name: str
    shape: tuple[int, ...]
    format: str
    size_bits: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory(Document):
    """Every tensor of a model, counted once: the quantizable layers and the rest.

    Attributes:
        caches: The KV cache, where that is planned too; no part of the model's own size.
        schedule: Which tensors are alive when, where inputs of layers are quantized.
    """

    FORM: ClassVar[Form] = Form(left_out=("caches", "schedule"))

    model_digest: str
    layers: tuple[Layer, ...]
    unquantized: tuple[UnquantizedTensor, ...] = ()
    caches: tuple[Cache, ...] = ()
    schedule: Schedule | None = None

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
    def n_numbers(self) -> int:
        """Everything that ships: quantizable weights, and numbers of all other tensors."""
        return self.n_weights + sum(math.prod(tensor.shape) for tensor in self.unquantized)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's activations where they are largest: a layer's input and output."""
        return max(4 * (layer.n_inputs + layer.n_macs // layer.columns) for layer in self.layers)

    def samples_at_once(self, wanted: int, limit_bytes: int = BATCH_BYTES) -> int:
        """Return how many samples run together: ``wanted``, or as many as fit, and one at least.

        The limit is about the largest activation: a pass holds a few of that size.
        """
        return max(1, min(wanted, limit_bytes // max(1, self.sample_bytes)))

    @property
    def unquantized_bits(self) -> int:
        """Bits of everything that ships as it is."""
        return sum(tensor.size_bits for tensor in self.unquantized)

    @property
    def full_precision_bits(self) -> int:
        """Bits of the whole model before quantization."""
        own = sum(layer.n_weights * layer.weight_format_bits for layer in self.layers)
        return own + self.unquantized_bits

    @property
    def cache_bits(self) -> int:
        """Bits of the KV cache before quantization, where it is planned."""
        return sum(cache.full_precision_bits for cache in self.caches)

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
        return self.join(m for patterns in ties for m in _tie_groups(patterns, self.layers))

    def join(self, together: Iterable[Sequence[str]]) -> Inventory:
        """Make the layers of each list of names decide together, as ``tie`` does."""
        group_of = {layer.name: layer.group for layer in self.layers}
        for members in together:
            merged = {group_of[name] for name in members}
            joined = [name for name, group in group_of.items() if group in merged]
            group_of |= dict.fromkeys(joined, "+".join(joined))
        layers = tuple(replace(layer, group=group_of[layer.name]) for layer in self.layers)
        return replace(self, layers=layers)


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
    import re2  # for patterns only: everything speaks this vocabulary, and loads numpy alone

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
            "of them stand in one block: name every layer of the tie, in full if they are in "
            "different blocks"
        )
        raise InvalidInput(msg, tie=list(patterns), layers=names)
    return groups


MATRICES = frozenset({LayerKind.RECURRENT, LayerKind.CONTRACTION})
"""Matrices inside a larger operator, whose own inputs and outputs no call shows."""

WITHOUT_BIAS = frozenset({LayerKind.EMBEDDING, LayerKind.EXPERTS}) | MATRICES
"""Layers whose outputs no bias can correct."""
