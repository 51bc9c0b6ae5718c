"""Trained models as one safetensors file: the weights to run, and the codes that they come from.

The file holds the state dictionary of the model under its own names (quantized weights as they are
after reading back), so that any code that loads safetensors can run it. Beside it, under
``quantized.LAYER.``, stand the packed codes, scales or levels, and zero points of each layer, byte
for byte as the plan counts them; the metadata say how to read them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitquota.candidates.storage import Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers.activations import ActivationQuantizer
from bitquota.quantizers.packing import from_packed_tensors, packed_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from bitquota.canonical import JsonObject
    from bitquota.quantizers.weights import QuantizedWeight
    from bitquota.training.finetune import TrainedModel

SCHEMA = "bitquota/trained/1"
_UNDER = "quantized."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedModel:
    """What ``save_trained`` wrote.

    Attributes:
        state: State dictionary of the model, quantized weights dequantized.
        weights: Codes and scales of each quantized layer.
        inputs: Trained quantizers of inputs, by layer.
    """

    state: dict[str, Tensor]
    weights: dict[str, QuantizedWeight]
    inputs: dict[str, ActivationQuantizer]


def save_trained(trained: TrainedModel, path: Path) -> None:
    """Write ``trained``; an older file is replaced only when the new one is complete."""
    tensors = dict(trained.module.state_dict())
    layers = {}
    for name, weight in trained.stored.items():
        stored = packed_tensors(f"{_UNDER}{name}", weight)
        tensors |= {stem: torch.from_numpy(data) for stem, data in stored.items()}
        rows, columns = weight.codes.shape
        layers[name] = {
            "rows": rows,
            "columns": columns,
            "bits": weight.bits,
            "scheme": weight.scheme.to_json(),
        }
    description = {
        "schema": SCHEMA,
        "layers": layers,
        "inputs": {name: asdict(q) for name, q in trained.inputs.items()},
    }
    write_described(path, tensors, description)


def load_trained(path: Path) -> SavedModel:
    """Read what ``save_trained`` wrote.

    Raises:
        InvalidInput: Not such a file, or bytes that are not as many as they must be.
    """
    description, tensors = read_described(path, SCHEMA, "'bitquota finetune' or 'learn'")
    under = tuple(f"{_UNDER}{name}." for name in description["layers"])
    stored = {name: tensors.pop(name).numpy() for name in list(tensors) if name.startswith(under)}
    weights = {
        name: from_packed_tensors(
            f"{_UNDER}{name}",
            stored,
            (known["rows"], known["columns"]),
            known["bits"],
            Scheme.from_json(known["scheme"]),
        )
        for name, known in description["layers"].items()
    }
    inputs = {name: ActivationQuantizer(**q) for name, q in description["inputs"].items()}
    return SavedModel(state=tensors, weights=weights, inputs=inputs)


def write_described(path: Path, tensors: Mapping[str, Tensor], description: JsonObject) -> None:
    """Write tensors with what describes them; an older file is replaced by a complete one."""
    # Tied tensors share memory, which the format refuses: write each name its own copy.
    owned = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(owned, partial, metadata={"bitquota": json.dumps(description, sort_keys=True)})
    partial.replace(path)


def read_described(path: Path, schema: str, command: str) -> tuple[JsonObject, dict[str, Tensor]]:
    """Return what ``write_described`` wrote with ``schema``.

    Raises:
        InvalidInput: Not such a file; the message names the ``command`` that writes it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: JsonObject = json.loads((file.metadata() or {})["bitquota"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, ValueError, SafetensorError) as err:
        msg = f"'{path}' must be a file that {command} wrote; got: {err!r}"
        raise InvalidInput(msg, path=str(path)) from err
    if description.get("schema") != schema:
        msg = f"'{path}' must be of schema '{schema}'; got {description.get('schema')!r}"
        raise InvalidInput(msg, path=str(path))
    return description, tensors
