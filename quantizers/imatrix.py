"""llama.cpp's importance matrix: the mean squared input of every column, for the fit of scales."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.canonical import digest_array, digest_json
from bitquota.errors import InvalidInput, StalePlan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory
    from bitquota.plan import Plan


def read_imatrix(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the mean squared input of every column, by tensor name, from an imatrix ``.dat``.

    The layout: ``i32`` count, then per entry ``i32`` length, name, ``i32`` calls, ``i32`` count,
    ``f32`` sums; the sums are divided by the calls.

    Raises:
        InvalidInput: Not that layout, cut off, or with values that cannot be. (Newer versions
            write GGUF by default; ``llama-imatrix --output-format dat`` converts.)
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        msg = f"an imatrix must be readable; '{path}': {err}"
        raise InvalidInput(msg, path=str(path)) from err
    if data[:4] == b"GGUF":
        msg = (
            f"'{path}' is an imatrix in GGUF; convert it with "
            "'llama-imatrix --in-file FILE --output-format dat -o FILE.dat'"
        )
        raise InvalidInput(msg, path=str(path))
    try:
        return _imatrix_entries(data)
    except (struct.error, ValueError) as err:
        msg = f"'{path}' must be an imatrix in its binary layout, whole; got: {err}"
        raise InvalidInput(msg, path=str(path)) from err


def _imatrix_entries(data: bytes) -> dict[str, NDArray[np.float64]]:
    """Raises ``ValueError`` or ``struct.error`` where the layout does not hold."""
    found: dict[str, NDArray[np.float64]] = {}
    (n_entries,) = struct.unpack_from("<i", data, 0)
    if n_entries < 1:
        msg = "no entries"
        raise ValueError(msg)
    at = 4
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length < _LONGEST_NAME:
            msg = f"a name of {length} bytes"
            raise ValueError(msg)
        name = data[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if count < 1 or at + 4 * count > len(data):
            msg = f"entry '{name}' does not fit the file"
            raise ValueError(msg)
        sums = np.frombuffer(data, dtype="<f4", count=count, offset=at).astype(np.float64)
        at += 4 * count
        values = sums / max(calls, 1)
        if not np.isfinite(values).all() or (values < 0).any():
            msg = f"entry '{name}' has negative or infinite values"
            raise ValueError(msg)
        found[name] = values
    return found


_FLOOR = 1e-6
"""Share of a layer's mean importance that every column has at least."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Weights of squared errors in the fit of scales.

    Attributes:
        columns: f64[columns] by layer name.
        digest: Of all of it; part of ledger keys and of a plan's provenance.
        missing: Layers that have none: their columns count alike.
    """

    columns: dict[str, torch.Tensor]
    digest: str
    missing: tuple[str, ...] = ()


def importance_of(path: Path, inventory: Inventory) -> Importance:
    """Read an imatrix as the importance of the columns of ``inventory``'s layers.

    With ``h`` the mean squared input of each column, scales minimise ``Σ h (w - q(w))²``: to first
    order the squared error of the layer's output for inputs that are not correlated, and what
    llama.cpp does with the same file. Columns that no input ever reached keep a millionth of the
    layer's mean, so that a scale never rests on nothing.

    Args:
        path: ``imatrix`` in its binary layout; names as llama.cpp gives them, or the layers' own.
        inventory: The layers.

    Raises:
        InvalidInput: Unreadable, no entry belongs to a layer, or one has another width.
    """
    layers = {layer.name: layer for layer in inventory.layers}
    found: dict[str, torch.Tensor] = {}
    for tensor, values in sorted(read_imatrix(path).items()):
        name = tensor.removesuffix(".weight")
        name = name if name in layers else (layer_name(tensor) or "")
        if name not in layers:
            continue
        if len(values) != layers[name].columns:
            msg = (
                f"an imatrix must be of this model; '{tensor}' has {len(values)} columns, layer "
                f"'{name}' has {layers[name].columns}"
            )
            raise InvalidInput(msg, layer=name)
        floor = _FLOOR * float(values.mean()) or 1.0
        found[name] = torch.from_numpy(np.maximum(values, floor))
    if not found:
        msg = (
            "an imatrix must name layers of this model, as llama.cpp does (blk.0.attn_q.weight) or "
            f"as the model does ({inventory.layers[0].name}.weight); '{path.name}' names none"
        )
        raise InvalidInput(msg, path=str(path))
    digests = {name: digest_array(columns.numpy()) for name, columns in found.items()}
    return Importance(
        columns=found,
        digest=digest_json(digests),
        missing=tuple(name for name in layers if name not in found),
    )


def check_importance(plan: Plan, imatrix: Path | None) -> Importance | None:
    """Return the importance that a plan's scales are fitted with, ``None`` for none.

    Raises:
        StalePlan: The plan was made with another importance matrix, or with one and got none.
    """
    made_with = plan.provenance.get("importance")
    given = None if imatrix is None or made_with is None else importance_of(imatrix, plan.inventory)
    if made_with is not None and (given is None or given.digest != made_with):
        got = "none" if imatrix is None else f"'{imatrix}'"
        msg = (
            "a plan must be used with the importance matrix it was made with, "
            f"{made_with}; got {got}: give that file with --imatrix"
        )
        raise StalePlan(msg, plan=made_with)
    return given


def layer_name(tensor: str) -> str | None:
    """Return the Hugging Face layer that a llama.cpp tensor name stands for, if it is known.

    ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj``; ``output.weight`` is
    ``lm_head``. Llama-like models only.
    """
    if tensor == "output.weight":
        return "lm_head"
    parts = tensor.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[3] == "weight":
        part = _LLAMA_NAMES.get(parts[2])
        return None if part is None else f"model.layers.{parts[1]}.{part}"
    return None


_LONGEST_NAME = 2**12


_LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
