"""What exporters of Hugging Face folders share: the source, its other files, and stored sizes.

Design: docs/design/targets.md
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from bitquota.exports.prepared import PreparedExport

_KEPT_FILES = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|tokenizer\.model|vocab\.txt|chat_template\.jinja"
)


def source_folder(prepared: PreparedExport, what: str) -> Path:
    """Return the folder that the model was loaded from; raises ``InvalidInput`` for others."""
    source = prepared.model.folder
    if source is None:
        msg = (
            f"{what} needs a Hugging Face folder as the model, whose config it extends; "
            f"got '{prepared.model.source}': export with ref-int or onnx-qdq instead"
        )
        raise InvalidInput(msg, source=prepared.model.source)
    return source


def copy_other_files(source: Path, folder: Path) -> list[Path]:
    """Copy tokenizer, chat template and generation settings; return the copies."""
    kept = [file for file in sorted(source.iterdir()) if _KEPT_FILES.fullmatch(file.name)]
    return [Path(shutil.copy(file, folder / file.name)) for file in kept]


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
    config = json.loads((source / "config.json").read_text())
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
