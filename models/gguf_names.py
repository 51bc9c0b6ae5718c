"""Between transformers' names and rows of a model's tensors and those of a GGUF file.

References:
    GGUF: ggml-org/llama.cpp, conversion/llama.py (permute), gguf-py/gguf/tensor_mapping.py

Design: docs/design/models.md
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of the model types that are written and read here."""

ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor that divides the frequencies of rotary positions."""

_INTERLEAVED = frozenset({"llama", "mistral"})
"""Model types whose q and k rows GGUF stores in another order (pairs of rotated rows adjacent)."""


def gguf_package() -> Any:  # noqa: ANN401  # a module
    """Return gguf; raises ``MissingDependency``."""
    try:
        import gguf
    except ImportError as err:
        msg = "GGUF files need gguf; install it with: pip install bitquota[exports]"
        raise MissingDependency(msg) from err
    return gguf


def gguf_names(names: Iterable[str], config: JsonObject) -> dict[str, str]:
    """Return the GGUF name of each of a model's tensors, by transformers' name.

    Raises:
        InvalidInput: GGUF has none for one of them.
    """
    gguf = gguf_package()
    kind = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]].upper())
    known = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    found = {}
    for name in names:
        if name.endswith("inv_freq"):
            continue
        found[name] = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found[name] is None:
            msg = f"GGUF has no name for '{name}' of a {config['model_type']} model"
            raise InvalidInput(msg, tensor=name)
    return found


def row_order(name: str, config: JsonObject) -> NDArray[np.int64] | None:
    """Return which row of the checkpoint each row of the file is, or ``None`` for the same.

    Transformers rotates row ``i`` of a head with row ``i + d/2``; GGUF keeps them adjacent.
    """
    if config["model_type"] not in _INTERLEAVED:
        return None
    found = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
    if found is None:
        return None
    heads = config["num_attention_heads"]
    if found[1] == "k":
        heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rows = np.arange(heads * size, dtype=np.int64)
    return rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
