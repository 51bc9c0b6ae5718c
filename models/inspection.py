"""What a model is before anything is measured: its layers, and what may become of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.candidates.architectures import Suggestion, prepare_inventory, suggest
from bitquota.candidates.table import Candidate
from bitquota.codec import Document
from bitquota.errors import BitquotaError, InvalidModel
from bitquota.models.binding import bound
from bitquota.models.discovery import discover
from bitquota.models.kv_cache import find_caches, latent_size
from bitquota.models.samples import samples_refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bitquota.candidates.layers import Cache, Inventory, Layer
    from bitquota.candidates.targets.storage_format import StorageFormat
    from bitquota.candidates.targets.target import Target
    from bitquota.canonical import JsonObject
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalFormat(Document):
    """One way in which a target can store one layer.

    Attributes:
        name: The target's name for it.
        weight_bits: Bits of one code.
        size_bits: Exact size of the layer with scales, zero points and padding.
        note: What a user should know before choosing it.
    """

    name: str
    weight_bits: int
    size_bits: int
    note: str = ""

    @classmethod
    def of(cls, layer: Layer, storage: StorageFormat) -> LegalFormat:
        """Return what ``storage`` takes for ``layer``."""
        size = Candidate.of(layer, storage.weight_bits, storage.scheme).size_bits
        return cls(
            name=storage.name, weight_bits=storage.weight_bits, size_bits=size, note=storage.note
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One quantizable weight.

    Attributes:
        layer: The layer; its group is that of the ties that apply.
        kept: Why it stays in full precision, or empty.
        formats: What the target can store it as, smallest first; empty without a target.
    """

    layer: Layer
    kept: str = ""
    formats: tuple[LegalFormat, ...] = ()

    def to_json(self) -> JsonObject:
        """Return everything as plain JSON."""
        return self.layer.to_json() | {
            "kept_in_full_precision": self.kept or None,
            "formats": [
                f.to_json() | {"bits_per_weight": f.size_bits / self.layer.n_weights}
                for f in self.formats
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A model as ``bitquota inspect`` shows it.

    Attributes:
        source: What the user named.
        architecture: Class or model type.
        digest: Fingerprint of its tensors; empty if these were not read.
        inventory: Every tensor, nothing excluded yet but what was asked for.
        layers: Every quantizable weight, in module order.
        target: The deployment target, or ``None``.
        suggestion: Ties and exclusions by architecture: applied with a target, else advice.
        counted: Whether a forward pass counted multiply-accumulates.
        caches: The keys and values that each attention layer keeps of one token, if it is a causal
            language model that was run.
        latent: Numbers of the latent that they are made of, if they are.
    """

    source: str
    architecture: str
    digest: str
    inventory: Inventory
    layers: tuple[LayerSummary, ...]
    target: Target | None = None
    suggestion: Suggestion
    counted: bool = True
    caches: tuple[Cache, ...] = ()
    latent: int | None = None

    @property
    def smallest_bits(self) -> int | None:
        """Size of the whole model with every layer in its smallest format, or ``None``."""
        if self.target is None:
            return None
        own = 0
        for entry in self.layers:
            low = [f.size_bits for f in entry.formats]
            full = entry.layer.n_weights * entry.layer.weight_format_bits
            own += full if entry.kept or not low else min(low)
        return own + self.inventory.unquantized_bits

    def to_json(self) -> JsonObject:
        """Return everything as plain JSON."""
        inventory = self.inventory
        cached: JsonObject = {
            "caches": [cache.to_json() for cache in self.caches],
            "bits_per_token": sum(cache.full_precision_bits for cache in self.caches),
            "latent_size": self.latent,
        }
        return ({"kv_cache": cached} if self.caches else {}) | {
            "source": self.source,
            "architecture": self.architecture,
            "model_digest": self.digest or None,
            "layers": [entry.to_json() for entry in self.layers],
            "unquantized": [tensor.to_json() for tensor in inventory.unquantized],
            "suggestion": self.suggestion.to_json() | {"applied": self.target is not None},
            "target": None if self.target is None else self.target.to_json(),
            "counted": self.counted,
            "totals": {
                "n_weights": inventory.n_weights,
                "n_macs": sum(entry.layer.n_macs for entry in self.layers),
                "full_precision_bits": inventory.full_precision_bits,
                "unquantized_bits": inventory.unquantized_bits,
                "smallest_bits": self.smallest_bits,
            },
        }


def inspect_model(
    model: LoadedModel,
    *,
    target: Target | None = None,
    samples: CalibrationSet | None = None,
    exclude: Sequence[str] = (),
    ties: Sequence[Sequence[str]] = (),
) -> ModelSummary:
    """Return the layers of ``model`` and what ``target`` may make of each.

    Args:
        model: From ``load_model`` or ``load_outline``.
        target: Its ties, exclusions and legal formats are shown.
        samples: Two are run to count multiply-accumulates where the model has no example of its
            own; without either they are not counted.
        exclude: As in a plan request.
        ties: As in a plan request.

    Raises:
        UnknownLayer: A pattern matches nothing.
        InvalidInput: A tie joins nothing, or part of a fused group is excluded.
        InvalidModel: Nothing to quantize.
        InvalidCalibration: The model cannot take the samples.

    Cost: two forward passes over two samples at most.
    """
    example = model.example_inputs
    if samples is not None:
        samples = bound(model, samples)
        example = tuple(tensor[:2] for tensor in samples.inputs)
    try:
        found = discover(model.module, example, model_digest=model.digest)
    except BitquotaError:
        raise
    except Exception as err:  # whatever the model raises is about its input
        if samples is None:
            raise
        raise samples_refused(model, samples, err) from err
    found = found.stored_in(model.weight_format_bits)
    prepared = prepare_inventory(found, target, exclude=exclude, ties=ties)
    live = {layer.name: layer for layer in prepared.layers}
    reasons = {tensor.name: tensor.reason for tensor in prepared.unquantized}
    entries = []
    for layer in found.layers:
        if layer.name not in live:
            entries.append(LayerSummary(layer=layer, kept=reasons[layer.weight_name]))
            continue
        legal: tuple[StorageFormat, ...] = ()
        if target is not None:
            shared = target.shared_widths(
                [la for la in prepared.layers if la.group == live[layer.name].group]
            )
            legal = tuple(f for f in target.formats_for(layer) if f.weight_bits in shared)
        entries.append(
            LayerSummary(
                layer=live[layer.name], formats=tuple(LegalFormat.of(layer, f) for f in legal)
            )
        )
    return ModelSummary(
        source=model.source,
        architecture=model.architecture,
        digest=model.digest,
        inventory=found,
        layers=tuple(entries),
        target=target,
        suggestion=suggest(found),
        counted=example is not None,
        caches=() if example is None else _caches(model, example),
        latent=latent_size(model),
    )


def _caches(model: LoadedModel, example: tuple[Tensor, ...]) -> tuple[Cache, ...]:
    try:
        return find_caches(model, example)
    except InvalidModel:
        return ()
