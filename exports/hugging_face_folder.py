"""What exporters of Hugging Face folders share: the source, its other files, and stored sizes.

Design: docs/design/targets.md
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitquota.errors import InvalidInput
from bitquota.models.tensor_files import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.prepared import PreparedExport
    from bitquota.models.loaded import LoadedModel
    from bitquota.quantizers.weights import QuantizedWeight

WEIGHTS = "model.safetensors"
"""The file of all tensors."""

_KEPT_FILES = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|tokenizer\.model|vocab\.txt|chat_template\.jinja|(LICENSE|NOTICE)[\w.-]*"
)


def source_folder(model: LoadedModel, what: str) -> Path:
    """Return the folder that the model was loaded from; raises ``InvalidInput`` for others."""
    source = model.folder
    if source is None:
        msg = (
            f"{what} needs a Hugging Face folder as the model, whose config it extends; "
            f"got '{model.source}': export with ref-int or onnx-qdq instead"
        )
        raise InvalidInput(msg, source=model.source)
    return source


def copy_other_files(source: Path, folder: Path) -> list[Path]:
    """Copy tokenizer, chat template, generation settings and licence; return the copies."""
    kept = [file for file in sorted(source.iterdir()) if _KEPT_FILES.fullmatch(file.name)]
    return [Path(shutil.copy(file, folder / file.name)) for file in kept]


def source_config(source: Path) -> JsonObject:
    """Return the ``config.json`` of a checkpoint."""
    config: JsonObject = json.loads((source / "config.json").read_text())
    return config


def write_json(path: Path, value: JsonObject) -> Path:
    """Write a description as it stands in such folders; returns its path."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return path


def unquantized_linear(prepared: PreparedExport) -> list[str]:
    """Return the linear layers of the model that keep their weights."""
    linear = {n for n, m in prepared.module.named_modules() if isinstance(m, torch.nn.Linear)}
    return sorted(linear - set(prepared.weights))


def write_model(
    prepared: PreparedExport,
    folder: Path,
    layer_tensors: Callable[[str, QuantizedWeight], Mapping[str, Tensor]],
    *,
    kind: str = "pt",
) -> Path:
    """Write every quantized weight as ``layer_tensors`` says, and the other tensors as they are.

    These keep the type of the checkpoint. Returns the path of the file.
    """
    kept_as = stored_type(source_folder(prepared.model, "the export"))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in prepared.weights.items():
            yield from layer_tensors(name, weight).items()
        for name, tensor in prepared.unquantized_tensors().items():
            yield name, tensor.detach().to(kept_as)

    path = folder / WEIGHTS
    with path.open("wb") as file:
        write_tensors(file, tensors(), metadata={"format": kind})
    return path


def read_model(
    prepared: PreparedExport, folder: Path, weight: Callable[[Any, str], Tensor]
) -> nn.Module:
    """Return the model with what the folder's file holds, in float32.

    ``weight(file, layer)`` returns the weight of a quantized layer out of the open file.
    """
    from safetensors import safe_open

    file: Any = safe_open(str(folder / WEIGHTS), framework="pt")
    quantized = {prepared.layers[name].weight_name: name for name in prepared.weights}
    kept = (set(file.keys()) & prepared.module.state_dict().keys()) - quantized.keys()
    return prepared.with_tensors(
        {name: partial(file.get_tensor, name) for name in kept}
        | {name: partial(weight, file, layer) for name, layer in quantized.items()}
    )


def stored_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor from the header of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: item["data_offsets"][1] - item["data_offsets"][0]
        for name, item in header.items()
        if name != "__metadata__"
    }


def stored_type(source: Path) -> torch.dtype:
    """Return the type that a checkpoint's config says its tensors have."""
    config = source_config(source)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
