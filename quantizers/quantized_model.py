"""The quantized model as a file: codes and scales of every layer, and what corrections changed.

A plan says which bit-width each layer gets; this says which numbers. It is written once, when the
plan is made, and whatever evaluates, checks or exports the plan reads it instead of quantizing
again: what was measured is what ships.

Design: docs/design/rounding.md
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme
from bitquota.canonical import digest_bytes, digest_file
from bitquota.errors import InvalidPlan, StalePlan
from bitquota.models.calls import parameter_owners, tensor_key
from bitquota.models.channel_flow import ChannelPair
from bitquota.models.layout import from_matrix
from bitquota.models.orthogonal import Orthogonal
from bitquota.models.pages import Pages
from bitquota.models.rotation_places import RotationPlace
from bitquota.models.running import tensor_of
from bitquota.models.tensor_files import write_tensors
from bitquota.plan import WEIGHTS_SUFFIX, PlanWeights
from bitquota.quantizers.activations import (
    ActivationQuantizer,
    InputGrid,
    TokenQuantizer,
    quantize_inputs_of,
)
from bitquota.quantizers.corrections import ensure_bias
from bitquota.quantizers.rotation import Rotation
from bitquota.quantizers.smoothing import Scaling, scale_channels
from bitquota.quantizers.weights import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.canonical import JsonObject
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan

SCHEMA = "bitquota/weights/1"
ADVICE = "name the file that 'bitquota plan' wrote beside the plan"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedModel:
    """What a plan makes of a model.

    Attributes:
        model_digest: The model.
        rounding: How codes were chosen.
        weights: Codes and scales of each quantized layer.
        tensors: Other parameters and buffers that corrections changed or added, by name.
        activations: Grids of inputs by layer.
        rotations: What was turned before anything else.
        scalings: Where channels were scaled then, before anything was quantized.
    """

    model_digest: str
    rounding: str
    weights: Mapping[str, QuantizedWeight]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, InputGrid] = field(default_factory=dict)
    rotations: tuple[Rotation, ...] = ()
    scalings: tuple[Scaling, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the content of the file; equal values give equal bytes."""
        layers: dict[str, JsonObject] = {}
        # One entry only: safetensors writes several in an order that changes.
        described: dict[str, str] = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            """Weights may come out of a file: each is read once, and described at the end."""
            for name, weight in self.weights.items():
                layers[name] = {"bits": weight.bits, "scheme": weight.scheme.to_json()}
                yield f"codes:{name}", _smallest(weight.codes)
                yield f"scales:{name}", weight.scales
                if weight.zero_points is not None:
                    yield f"zero_points:{name}", _smallest(weight.zero_points)
            for name, tensor in self.tensors.items():
                yield f"tensor:{name}", tensor
            for scaling in self.scalings:
                yield f"factors:{scaling.pair.weight}", scaling.factors
            for k, rotation in enumerate(self.rotations):
                yield f"odd:{k}", rotation.matrix.odd
                yield f"signs:{k}", rotation.matrix.signs
            described["bitquota"] = self._about(layers)

        file = io.BytesIO()
        write_tensors(file, tensors(), metadata=described)
        return file.getvalue()

    def _about(self, layers: JsonObject) -> str:
        about: JsonObject = {
            "schema": SCHEMA,
            "model": self.model_digest,
            "rounding": self.rounding,
            "layers": layers,
            "activations": {name: asdict(grid) for name, grid in self.activations.items()},
        }
        if self.rotations:
            about["rotations"] = [asdict(rotation.place) for rotation in self.rotations]
        if self.scalings:
            about["scalings"] = [asdict(scaling.pair) for scaling in self.scalings]
        return json.dumps(about, sort_keys=True, separators=(",", ":"))

    @classmethod
    def load(cls, source: Path | bytes, *, mapped: bool = False) -> Self:
        """Read a file of quantized weights, or its content.

        If ``mapped``, codes stay in the file, and each layer's are read when they are asked for.

        Raises:
            InvalidPlan: The file cannot be read, or is something else.
        """
        try:
            pages = Pages(source) if mapped and not isinstance(source, bytes) else None
            about, held = _content(source, pages)
            if about["schema"] != SCHEMA:
                raise KeyError(about["schema"])  # noqa: TRY301
            return cls(
                model_digest=about["model"],
                rounding=about["rounding"],
                weights=(
                    {name: _weight(name, layer, held) for name, layer in about["layers"].items()}
                    if pages is None
                    else _WeightsInFile(about["layers"], pages)
                ),
                tensors={
                    name.removeprefix("tensor:"): tensor
                    for name, tensor in held.items()
                    if name.startswith("tensor:")
                },
                activations={
                    name: (TokenQuantizer if "floats" in grid else ActivationQuantizer)(**grid)
                    for name, grid in about["activations"].items()
                },
                rotations=tuple(
                    Rotation(
                        place=RotationPlace.of(place),
                        matrix=Orthogonal(odd=held[f"odd:{k}"], signs=held[f"signs:{k}"]),
                    )
                    for k, place in enumerate(about.get("rotations", ()))
                ),
                scalings=tuple(
                    Scaling(pair=ChannelPair.of(pair), factors=held[f"factors:{pair['weight']}"])
                    for pair in about.get("scalings", ())
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as err:
            msg = f"{_name(source)} must be a file of quantized weights ({SCHEMA}); {ADVICE}: {err}"
            raise InvalidPlan(msg, path=_name(source).strip("'")) from err

    def rewrite(self, module: nn.Module, inventory: Inventory) -> None:
        """Change ``module``, as it was loaded, to the model that was quantized, in place.

        Raises:
            InvalidModel: The model lacks a tensor.
            InvalidPlan: It is another model than the plan's.
        """
        for rotation in self.rotations:
            rotation.apply(module)
        for scaling in self.scalings:
            scale_channels(module, inventory, scaling)

    def put_into(self, module: nn.Module, inventory: Inventory) -> nn.Module:
        """Change ``module``, in full precision, to what this file holds; returns it.

        Its batch norms must be folded and ``rewrite`` called already, if the plan says so
        (``planned.full_precision_module``).

        Raises:
            InvalidPlan: The file holds tensors that the model has no place for.
        """
        layers = {layer.name: layer for layer in inventory.layers}
        with torch.no_grad():
            for name, weight in self.weights.items():
                place = tensor_of(module, layers[name].weight_name)
                place.copy_(from_matrix(weight.dequantize().to(place.dtype), layers[name]))
            for name, tensor in self.tensors.items():
                _place_for(module, name, layers).copy_(tensor)
        for name, grid in self.activations.items():
            quantize_inputs_of(module, name, grid)
        return module


class WeightsOnDemand(Mapping[str, QuantizedWeight]):
    """Quantized weights by layer, of which only those that are asked for are in memory.

    Args:
        layers: What is known of each without reading it.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers

    def __contains__(self, name: object) -> bool:
        """Say whether the layer is here; nothing is read."""
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        """Go through the names of layers."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)


class _WeightsInFile(WeightsOnDemand):
    """Quantized weights that stay in their file."""

    def __init__(self, layers: Mapping[str, JsonObject], pages: Pages) -> None:
        super().__init__(layers)
        self._pages = pages

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read the weight of a layer."""
        weight = _weight(name, self._layers[name], self._pages.tensors)
        self._pages.release_tensor(self._pages.tensors[f"codes:{name}"])
        return weight


def _weight(name: str, layer: JsonObject, held: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the weight of a layer among the tensors of a file."""
    zero_points = held.get(f"zero_points:{name}")
    return QuantizedWeight(
        codes=held[f"codes:{name}"].int(),
        scales=held[f"scales:{name}"],
        zero_points=None if zero_points is None else zero_points.int(),
        bits=layer["bits"],
        scheme=Scheme.from_json(layer["scheme"]),
    )


def changed_tensors(before: nn.Module, after: nn.Module, inventory: Inventory) -> dict[str, Tensor]:
    """Return what corrections changed in ``after``, a copy of ``before``, or added to it."""
    apart = {n for layer in inventory.layers for n in (layer.weight_name, *layer.aliases)}
    old = before.state_dict()
    return {
        name: tensor
        for name, tensor in after.state_dict().items()
        if name not in apart and not (name in old and torch.equal(old[name], tensor))
    }


def shipped_weights(plan: Plan, model: LoadedModel) -> QuantizedModel | None:
    """Return the quantized model that belongs to a plan, or ``None`` if the plan names none.

    Raises:
        StalePlan: It was not given with the model, or is not the one that the plan names.
        InvalidPlan: It is no such file, or does not hold what the plan says.
    """
    if plan.weights is None:
        return None
    wanted, size = plan.weights.digest, plan.weights.n_bytes
    path = next((p for p in model.weights if _size(p) == size and _digest(p) == wanted), None)
    if path is None:
        given = ", ".join(_name(p) for p in model.weights) or "none"
        msg = (
            f"a plan is used with the quantized weights that were written beside it ({wanted}); "
            f"got {given}: keep the file that ends in {WEIGHTS_SUFFIX} in the plan's folder, or "
            "plan again"
        )
        raise StalePlan(msg, wanted=wanted)
    found = QuantizedModel.load(path, mapped=model.pages is not None)
    planned = {
        a.layer.name: (
            a.candidate.weight_bits,
            a.candidate.scheme,
            (a.layer.rows, a.layer.columns),
        )
        for a in plan.assignments
        if a.candidate.weight_bits != FULL_PRECISION_BITS
    }
    held = {
        name: (weight.bits, weight.scheme, tuple(weight.codes.shape))
        for name, weight in found.weights.items()
    }
    wrong = sorted(n for n in planned.keys() | held.keys() if planned.get(n) != held.get(n))
    if wrong:
        msg = (
            f"{_name(path)} must hold every layer as the plan has it; it does not hold "
            f"{', '.join(wrong[:5])} so: plan again"
        )
        raise InvalidPlan(msg, layers=wrong)
    return found


def _content(
    source: Path | bytes, pages: Pages | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of its tensors, and the tensors, which may be mapped already."""
    if isinstance(source, bytes):
        header = json.loads(source[8 : 8 + int.from_bytes(source[:8], "little")])
        return json.loads(header["__metadata__"]["bitquota"]), safetensors.torch.load(source)
    with safetensors.safe_open(source, framework="pt") as file:
        about = json.loads((file.metadata() or {})["bitquota"])
        if pages is not None:
            return about, pages.tensors
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _digest(source: Path | bytes) -> str:
    return digest_bytes([source]) if isinstance(source, bytes) else digest_file(source)


def _name(source: Path | bytes) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else f"'{source}'"


def named(content: bytes, rounding: str) -> PlanWeights:
    """Return what a plan says of a file of quantized weights."""
    return PlanWeights(rounding=rounding, digest=digest_bytes([content]), n_bytes=len(content))


def _smallest(codes: Tensor) -> Tensor:
    """Return integers in the smallest type that holds them."""
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    for dtype in (torch.int8, torch.uint8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return codes.to(dtype)
    return codes.int()


def _place_for(module: nn.Module, name: str, layers: Mapping[str, Layer]) -> Tensor:
    """Return the tensor ``name``; a bias that corrections added is made."""
    owner, _, leaf = name.rpartition(".")
    found = None
    with contextlib.suppress(AttributeError):
        found = getattr(module.get_submodule(owner), leaf, None)
    if isinstance(found, torch.Tensor):
        return found
    for layer in layers.values():
        if leaf == "bias" and layer.weight_name == f"{owner}.weight".lstrip("."):
            places = parameter_owners(module)[tensor_key(tensor_of(module, layer.weight_name))]
            for holder, attribute, full in places:
                if full == layer.weight_name:
                    return ensure_bias(module, holder, attribute, full, rows=layer.rows)
    msg = f"the quantized weights hold '{name}', which the model has no place for: plan again"
    raise InvalidPlan(msg, tensor=name)
