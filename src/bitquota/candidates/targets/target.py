"""What a deployment target is: the formats it can store, the shapes and ties it demands.

A target turns a model's inventory into the table of candidates that the solver may choose from,
so that an illegal candidate is never seen, and checks any plan against the same rules. Sizes are
those that the target's files really take. No torch here.

Design: docs/design/targets.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitquota.candidates.caches import CacheFormats, cache_rows, tied_caches
from bitquota.candidates.layers import LayerKind, match_layers
from bitquota.candidates.rows import HOLD_PARTS, MIXED_KINDS, WHY_NO_PARTS
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    PRUNED_BITS,
    Granularity,
    Scheme,
)
from bitquota.candidates.table import Candidate, CandidateTable, Row
from bitquota.candidates.targets.storage_format import StorageFormat
from bitquota.candidates.zero_bits import HOLD_ZERO_BITS, WHY_NOT, zero_bits_of
from bitquota.canonical import digest_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput, InvalidPlan, UnknownLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bitquota.candidates.layers import Cache, Inventory, Layer, UnquantizedTensor


FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
)
"""Projections that serving engines fuse into one matrix, so that they must share a format."""


DYNAMIC_FITS = ("token", "token_float")
"""Ranges of inputs that are found when a token comes: of integers, and of E4M3 numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation(Document):
    """One way in which a plan breaks a target's rules."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Document):
    """A deployment target.

    Attributes:
        name: What ``--target`` takes.
        summary: One sentence.
        versions: Packages and the versions that the rules were checked against.
        formats: What it can store, smallest first; the first legal one of a bit-width counts.
        exporter: Name of the exporter that writes its files (see ``bitquota.exports.export``).
        ties: Lists of name patterns that its fusion demands to share a format.
        exclude: Name patterns that it keeps in full precision.
        excluded_kinds: Kinds of layer that it keeps in full precision.
        activation_bits: Activation bit-width that it runs, or ``None`` for floating point.
        other_activation_bits: Further ones, which layers have only where they are asked for.
        activation_fit: How its runtime finds ranges of inputs, if by itself (``DYNAMIC_FITS``).
        refuses: What its runtime does not read although its files hold it (``zero_bits.ALLOWED``).
        runtime_options: Options that a runtime must be given for the numbers to hold.
        cache: How its runtime stores a KV cache of fewer than 16 bits, if it does.
        cache_refusal: Why bits of the KV cache cannot be planned for it, otherwise.
        verified: How the rules were checked: ``run``, ``read`` (in the shipped code) or
            ``documented``.
        not_run: Why its runtime did not run its files here, unless ``verified`` is ``run``.
    """

    FORM: ClassVar[Form] = Form(
        left_out=(
            "cache",
            "cache_refusal",
            "not_run",
            "other_activation_bits",
            "activation_fit",
            "refuses",
        )
    )

    name: str
    summary: str
    versions: Mapping[str, str]
    formats: tuple[StorageFormat, ...]
    exporter: str
    ties: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()
    excluded_kinds: frozenset[LayerKind] = frozenset()
    activation_bits: int | None = None
    other_activation_bits: tuple[int, ...] = ()
    activation_fit: str = ""
    refuses: tuple[str, ...] = ()
    runtime_options: Mapping[str, Any] = field(default_factory=dict)
    verified: str = "documented"
    not_run: str = ""
    cache: CacheFormats | None = None
    cache_refusal: str = ""

    @property
    def input_widths(self) -> tuple[int | None, ...]:
        """Every bit-width of activations that it runs; ``None`` is floating point."""
        return (self.activation_bits, *self.other_activation_bits)

    @property
    def inputs(self) -> str:
        """How its runtime reads the inputs of quantized layers, for a person."""
        if self.activation_bits is None:
            return "as they are"
        kind = {"token": " bits per token", "token_float": " bits (FP8) per token"}
        others = ", ".join(map(str, self.other_activation_bits))
        asked = f" ({others} on request)" if others else ""
        return f"{self.activation_bits}{kind.get(self.activation_fit, ' bits')}{asked}"

    @property
    def on_request(self) -> tuple[str, ...]:
        """What its files hold beside its formats, where it is asked for, as options."""
        rows = ("--row-widths",) if self.exporter in HOLD_PARTS else ()
        held = (what for what in HOLD_ZERO_BITS if self._holds(what))
        return (*rows, *(f"--allow {what}" for what in held))

    def _holds(self, what: str) -> bool:
        """Whether its files are the smaller for zero bits, and its runtime reads them."""
        return self.exporter in HOLD_ZERO_BITS[what] and what not in self.refuses

    @property
    def version(self) -> str:
        """Digest of the rules for weights: formats, ties, exclusions and options."""
        rules = self.to_json()
        apart = ("summary", "verified", "not_run", "cache", "cache_refusal")
        return digest_json({k: v for k, v in rules.items() if k not in apart})

    def exclusions(self, inventory: Inventory) -> dict[str, str]:
        """Return the layers that stay in full precision, each with the reason."""
        found: dict[str, str] = {}
        for name in _matching(self.exclude, inventory):
            found[name] = f"{self.name} keeps it in full precision"
        for layer in inventory.layers:
            if layer.kind in self.excluded_kinds:
                found.setdefault(
                    layer.name, f"{self.name} keeps layers of kind {layer.kind} in full precision"
                )
            elif not any(f.weight_bits < FULL_PRECISION_BITS for f in self.formats_for(layer)):
                reasons = dict.fromkeys(
                    reason
                    for f in self.formats
                    if f.weight_bits < FULL_PRECISION_BITS and (reason := f.refusal(layer))
                )
                found.setdefault(layer.name, next(iter(reasons), "no format is legal"))
        return found

    def prepare(self, inventory: Inventory) -> Inventory:
        """Return ``inventory`` with the target's exclusions and ties applied.

        Patterns that match no layer are passed over: they speak of architectures at large.

        Raises:
            InvalidInput: One of several layers that the runtime fuses was excluded before.
        """
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.exclusions(inventory).items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            inventory = inventory.exclude(["re:" + "|".join(map(_quoted, names))], reason)
        for tie in self.ties:
            tied = siblings_in(tie, (layer.name for layer in inventory.layers))
            for siblings in tied:
                if missing := self._excluded_siblings(tie, siblings, inventory.unquantized):
                    msg = (
                        f"'{self.name}' fuses {', '.join((*siblings, *missing))}, so they are "
                        f"quantized together or not at all; {', '.join(missing)} is excluded: "
                        "exclude all of them, or none"
                    )
                    raise InvalidInput(msg, target=self.name, layers=[*siblings, *missing])
            known = [p for p in tie if _matching([p], inventory)]
            if any(len(names) > 1 for names in tied):
                inventory = inventory.tie([known])
        return inventory

    def formats_for(self, layer: Layer) -> tuple[StorageFormat, ...]:
        """Return the formats that ``layer`` can have: the first legal one of each bit-width."""
        chosen: dict[int, StorageFormat] = {}
        for storage in self.formats:
            if storage.refusal(layer) is None:
                chosen.setdefault(storage.weight_bits, storage)
        return tuple(chosen.values())

    def shared_widths(self, layers: Sequence[Layer]) -> tuple[int, ...]:
        """Return the bit-widths that all ``layers`` of one group can have, smallest first."""
        legal = [{f.weight_bits for f in self.formats_for(layer)} for layer in layers]
        return tuple(sorted(set.intersection(*legal)))

    def candidates(
        self,
        inventory: Inventory,
        *,
        weight_bits: Sequence[int] | None = None,
        activation_bits: Sequence[int] | None = None,
        fixed: Mapping[str, int] | None = None,
    ) -> CandidateTable:
        """Return every legal quantization of every decision group.

        Args:
            inventory: From ``prepare``.
            weight_bits: Offer only these of the target's bit-widths.
            activation_bits: Offer these of ``input_widths``; by default the target's usual one.
            fixed: Layer pattern to bit-width, as in ``enumerate_candidates``.

        Raises:
            InvalidInput: A group is left without any format: the message names its layers.
            UnknownLayer: A pattern of ``fixed`` matches nothing.
        """
        offered = None if weight_bits is None else set(weight_bits)
        if offered is not None and not offered & {f.weight_bits for f in self.formats}:
            msg = (
                f"target '{self.name}' stores {self._widths()} bits; none of "
                f"{sorted(offered)} is among them"
            )
            raise InvalidInput(msg, target=self.name)
        pinned = {
            inventory.layer(name).group: bits
            for pattern, bits in (fixed or {}).items()
            for name in match_layers(pattern, inventory.layers)
        }
        members: dict[str, list[Layer]] = {}
        for layer in inventory.layers:
            members.setdefault(layer.group, []).append(layer)
        rows = []
        given: list[int | None] = [*sorted(activation_bits or ())] or [None]
        for group, layers in members.items():
            widths = self._offered_widths(layers, {pinned[group]} if group in pinned else offered)
            rows += [
                Row(
                    group=group,
                    candidates=tuple(
                        c if inputs is None else Candidate.of(la, bits, c.scheme, inputs)
                        for la, c in zip(
                            layers, self.candidates_at(layers, [bits] * len(layers)), strict=True
                        )
                    ),
                )
                for bits in widths
                for inputs in given
            ]
        return CandidateTable(rows=tuple(rows))

    def require_cache(self) -> CacheFormats:
        """Return how the runtime stores a KV cache; raises ``InvalidInput`` if it is not known."""
        if self.cache is None:
            why = self.cache_refusal or "its runtime is not known to store a KV cache in fewer bits"
            msg = f"target '{self.name}' takes no bits of the KV cache: {why}; leave --kv-bits out"
            raise InvalidInput(msg, target=self.name)
        return self.cache

    def require_rows(self) -> None:
        """Raise ``InvalidInput`` unless its files hold a layer whose rows have several widths."""
        if self.exporter not in HOLD_PARTS:
            why = WHY_NO_PARTS.get(
                self.exporter, f"in its files ({self.exporter}) a tensor has one type"
            )
            msg = (
                f"target '{self.name}' stores a layer in one bit-width: {why}; leave --row-widths "
                "out, or plan for ref-int or ort-cpu"
            )
            raise InvalidInput(msg, target=self.name)

    def agreed_fit(self, asked: str) -> str:
        """Return how ranges of inputs are found; ``mse`` stands for what the target does.

        Raises:
            InvalidInput: Its runtime finds them otherwise.
        """
        if asked == self.activation_fit or (asked == "mse" and self.activation_fit):
            return self.activation_fit
        if not self.activation_fit and asked not in DYNAMIC_FITS:
            return asked
        why = "its files hold ranges of a calibration set"
        if self.activation_fit:
            why = f"its runtime finds them by itself ({self.activation_fit})"
        elif self.exporter.startswith("onnx"):
            why = "ONNX finds ranges while it runs for whole tensors alone (DynamicQuantizeLinear)"
        msg = f"target '{self.name}' takes no ranges of inputs by '{asked}': {why}; leave it out"
        raise InvalidInput(msg, target=self.name, activation_fit=asked)

    def require_zero_bits(self, allow: Sequence[str]) -> None:
        """Raise ``InvalidInput`` unless its files are the smaller for what is allowed."""
        for what in allow:
            if not self._holds(what):
                able = ", ".join(sorted(HOLD_ZERO_BITS[what]))
                why = "its kernels read dense weights" if what in self.refuses else WHY_NOT[what]
                msg = (
                    f"target '{self.name}' cannot have --allow {what}: {why}; leave it out, or "
                    f"plan for files of {able}"
                )
                raise InvalidInput(msg, target=self.name, allow=what)

    def check_caches(
        self, caches: Sequence[Cache], candidates: Sequence[Candidate]
    ) -> tuple[Violation, ...]:
        """Return every rule of its runtime that one candidate for each cache breaks."""
        names = tuple(cache.name for cache in caches)
        if not caches:
            return ()
        try:
            formats = self.require_cache()
            tied = tied_caches(caches, formats)
            bits = {c.stored_bits for c in candidates}
            legal = cache_rows(tied, sorted(bits), scales="head", formats=formats)
        except InvalidInput as err:
            return (Violation(layers=names, reason=err.message),)
        by_name = {c.layer: c for c in candidates}
        groups: dict[str, list[Candidate]] = {}
        for cache in tied:
            groups.setdefault(cache.group, []).append(by_name[cache.name])
        return tuple(
            Violation(
                layers=tuple(c.layer for c in chosen),
                reason="the runtime stores the KV cache of all layers alike, and not like this",
            )
            for group, chosen in groups.items()
            if not any(
                row.group == group and _cached_alike(row.candidates, chosen) for row in legal
            )
        )

    def _offered_widths(self, layers: Sequence[Layer], wanted: set[int] | None) -> list[int]:
        """Return the bit-widths that all ``layers`` of one group can have and that are wanted."""
        widths = [b for b in self.shared_widths(layers) if wanted is None or b in wanted]
        if not widths:
            names = ", ".join(layer.name for layer in layers)
            asked = "" if wanted is None else f" of {sorted(wanted)}"
            msg = (
                f"every group must have a format that target '{self.name}' can store; "
                f"{names} has none{asked}: exclude it, untie it, or offer other bit-widths"
            )
            raise InvalidInput(msg, target=self.name, layers=[la.name for la in layers])
        return widths

    def candidates_at(
        self, layers: Sequence[Layer], weight_bits: Sequence[int]
    ) -> tuple[Candidate, ...]:
        """Return the target's candidate of each layer at its bit-width; there is one for each.

        Raises:
            InvalidPlan: A bit-width that a layer cannot have.
        """
        found = []
        for layer, bits in zip(layers, weight_bits, strict=True):
            formats = {f.weight_bits: f for f in self.formats_for(layer)}
            if bits == PRUNED_BITS:
                found.append(Candidate.of(layer, bits, next(iter(formats.values())).scheme))
                continue
            if bits not in formats:
                msg = f"'{self.name}' cannot store layer '{layer.name}' at {bits} bits"
                raise InvalidPlan(msg, layer=layer.name, weight_bits=bits)
            found.append(self._candidate(layer, formats[bits]))
        return tuple(found)

    def check(
        self,
        layers: Sequence[Layer],
        candidates: Sequence[Candidate],
        unquantized: Sequence[UnquantizedTensor],
    ) -> Iterator[Violation]:
        """Yield every rule that one candidate for each layer breaks; see ``Plan.violations``."""
        # Most layers of a model are like others.
        known: dict[object, str | None] = {}
        for layer, candidate in zip(layers, candidates, strict=True):
            alike = (layer.kind, layer.rows, layer.columns, candidate.weight_bits,
                     candidate.activation_bits, candidate.scheme)  # fmt: skip
            if alike not in known:
                known[alike] = self._refusal(layer, candidate)
            if reason := known[alike]:
                yield Violation(layers=(layer.name,), reason=reason)
        chosen = {c.layer: c for c in candidates}
        for tie in self.ties:
            for siblings in siblings_in(tie, chosen):
                labels = {(chosen[n].label, chosen[n].scheme) for n in siblings}
                missing = self._excluded_siblings(tie, siblings, unquantized)
                if len(labels) > 1 or missing:
                    given = ", ".join(f"{n}={chosen[n].label}" for n in siblings)
                    for name in missing:
                        given += f", {name} in full precision"
                    reason = f"the runtime fuses these layers, so they must share a format: {given}"
                    yield Violation(layers=(*siblings, *missing), reason=reason)

    def _candidate(self, layer: Layer, storage: StorageFormat) -> Candidate:
        return Candidate.of(layer, storage.weight_bits, storage.scheme, self.activation_bits)

    def _refusal(self, layer: Layer, candidate: Candidate) -> str | None:
        if candidate.weight_bits == FULL_PRECISION_BITS:
            return None
        if layer.kind in self.excluded_kinds:
            return f"layers of kind {layer.kind} stay in full precision"
        if (what := zero_bits_of(candidate)) and not self._holds(what):
            return f"its files or its runtime hold no {what}"
        if candidate.pruned:
            return None
        if candidate.row_bits:
            return self._refusal_of_rows(layer, candidate)
        same_width = [f for f in self.formats if f.weight_bits == candidate.weight_bits]
        if not same_width:
            return f"{candidate.weight_bits} bits is not one of its widths ({self._widths()})"
        legal = {f.weight_bits: f for f in self.formats_for(layer)}.get(candidate.weight_bits)
        if legal is None:
            return "; ".join(reason for f in same_width if (reason := f.refusal(layer)))
        if not _stored_alike(legal.scheme, candidate.scheme):
            return f"stored as {_short(candidate.scheme)}, where it stores {_short(legal.scheme)}"
        if candidate.activation_bits not in self.input_widths:
            return f"activations of {candidate.activation_bits} bits are not what it runs"
        return None

    def _refusal_of_rows(self, layer: Layer, candidate: Candidate) -> str | None:
        if self.exporter not in HOLD_PARTS or layer.kind not in MIXED_KINDS:
            return "its rows have several bit-widths, and a tensor of its files has one type"
        reasons = (
            self._refusal(
                layer,
                Candidate.of(layer, bits, candidate.scheme.of_parts, candidate.activation_bits),
            )
            for bits in sorted(set(candidate.row_bits))
        )
        return next((reason for reason in reasons if reason), None)

    @staticmethod
    def _excluded_siblings(
        tie: tuple[str, ...], siblings: Sequence[str], unquantized: Sequence[UnquantizedTensor]
    ) -> tuple[str, ...]:
        """Return members of a fused group that stay in full precision."""
        parents = {name.rpartition(".")[0] for name in siblings}
        return tuple(
            owner
            for tensor in unquantized
            if (owner := tensor.name.removesuffix(".weight")) != tensor.name
            and owner.rpartition(".")[0] in parents
            and owner.rpartition(".")[2] in tie
        )

    def _widths(self) -> str:
        return ", ".join(map(str, sorted({f.weight_bits for f in self.formats})))


def _matching(patterns: Sequence[str], inventory: Inventory) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        try:
            found += match_layers(pattern, inventory.layers)
        except UnknownLayer:
            continue
    return found


def _quoted(name: str) -> str:
    import re

    return re.escape(name)


def siblings_in(tie: tuple[str, ...], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the names of layers that a tie of last name parts joins, per parent module."""
    by_parent: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        if last in tie:
            by_parent.setdefault(parent, []).append(name)
    return [tuple(names) for names in by_parent.values()]


def _stored_alike(a: Scheme, b: Scheme) -> bool:
    """Whether two schemes lead to the same files: how scales were fitted does not matter."""
    return (
        a.grid == b.grid
        and a.granularity == b.granularity
        and a.group_size == b.group_size
        and a.scale_format == b.scale_format
        and a.row_alignment_bits == b.row_alignment_bits
    )


def _cached_alike(a: Sequence[Candidate], b: Sequence[Candidate]) -> bool:
    """Whether caches hold the same; how one in half precision would be quantized is no matter."""
    return all(
        x.weight_bits == y.weight_bits
        and (x.weight_bits == FULL_PRECISION_BITS or _stored_alike(x.scheme, y.scheme))
        for x, y in zip(a, b, strict=True)
    )


def _short(scheme: Scheme) -> str:
    group = f" of {scheme.group_size}" if scheme.granularity is Granularity.GROUP else ""
    aligned = f", rows of {scheme.row_alignment_bits} bits" if scheme.row_alignment_bits else ""
    return f"{scheme.grid} per {scheme.granularity}{group}, {scheme.scale_format} scales{aligned}"
