"""Checkpoints of a training run: one safetensors file, replaced atomically, no pickle."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject


def save_checkpoint(
    path: Path,
    run: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: JsonObject,
    *,
    best: dict[str, Tensor] | None = None,
) -> None:
    """Write everything that a run needs to continue to the same bits.

    Args:
        path: File to write; an older one is replaced only when the new one is complete.
        run: The module that holds all trained tensors and buffers.
        optimizer: Its optimizer.
        progress: Plain JSON: where the run is, its history, and a digest of its settings.
        best: The best state so far, if it is kept.
    """
    tensors = {f"run.{k}": v for k, v in run.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, values in state.items():
        for key, value in values.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors.update({f"best.{k}": v for k, v in (best or {}).items()})
    # Tied tensors share memory, which the format refuses: write each name its own copy.
    owned = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(owned, partial, metadata={"progress": json.dumps(progress, sort_keys=True)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(
    path: Path, run: nn.Module, optimizer: torch.optim.Optimizer, settings_digest: str
) -> tuple[JsonObject, dict[str, Tensor]]:
    """Restore a run in place; return its progress and the best state.

    Raises:
        InvalidInput: The file is of a run with other settings, model or data.
    """
    groups: dict[str, dict[str, Any]] = {"run": {}, "best": {}, "optimizer": {}}
    with safe_open(path, framework="pt") as file:
        progress: JsonObject = json.loads(file.metadata()["progress"])
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            kind, _, rest = name.partition(".")
            groups[kind][rest] = file.get_tensor(name)
    if progress["settings"] != settings_digest:
        msg = (
            f"the checkpoint '{path.name}' must be of the same model, data and settings to be "
            "continued; it is not: remove it, or give another path"
        )
        raise InvalidInput(msg, path=str(path))
    run.load_state_dict(groups["run"])
    state = optimizer.state_dict()
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, _, key = name.partition(".")
        values.setdefault(int(index), {})[key] = tensor
    state["state"] = values
    optimizer.load_state_dict(state)
    return progress, groups["best"]
