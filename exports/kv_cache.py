"""The KV cache of a plan as options of the runtime that an export is for.

A file of weights holds no cache: whoever starts the runtime says how it is kept. The options stand
in a file of their own beside the export.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.targets import target_by_name
from bitquota.errors import InvalidPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.candidates.targets import Target
    from bitquota.plan import Plan

OPTIONS_FILE = "kv-cache-options.txt"


def _llama_cpp(names: dict[bool, str]) -> list[str]:
    """Quantized values need llama.cpp's flash attention."""
    keys, values = names[True] or "f16", names[False] or "f16"
    return ["--flash-attn", "on", "--cache-type-k", keys, "--cache-type-v", values]


def _mlx(names: dict[bool, str]) -> list[str]:
    """Without a start of 0 mlx_lm keeps the first 5,000 tokens in half precision."""
    bits = names[True].removeprefix("affine").partition("-")[0]
    return ["--kv-bits", bits, "--kv-group-size", "64", "--quantized-kv-start", "0"]


_RUNTIMES: dict[str, tuple[str, Callable[[dict[bool, str]], list[str]]]] = {
    "gguf": ("gguf-py", _llama_cpp),
    "mlx": ("mlx", _mlx),
    "mlx-config": ("mlx", _mlx),
}
"""By format: a target with the runtime's rules, and what makes options of the names of the formats
of keys (``True``) and values (``False``), empty where they are not quantized."""


def cache_options(plan: Plan, format_name: str) -> list[str]:
    """Return the options with which a runtime keeps the KV cache as ``plan`` says.

    Empty where the plan says nothing of it, or keeps it in half precision.

    Raises:
        InvalidPlan: No runtime of this format takes the bits of the cache, or not these.
    """
    if all(a.candidate.weight_bits == FULL_PRECISION_BITS for a in plan.caches):
        return []
    if format_name not in _RUNTIMES:
        able = ", ".join(_RUNTIMES)
        msg = (
            f"format '{format_name}' has no runtime that is known to take the bits of this plan's "
            f"KV cache; these have: {able}: take one of them, or plan without --kv-bits"
        )
        raise InvalidPlan(msg, format=format_name)
    target_name, options = _RUNTIMES[format_name]
    target = target_by_name(target_name)
    broken = target.check_caches([a.cache for a in plan.caches], [a.candidate for a in plan.caches])
    if broken:
        msg = (
            f"the runtime of format '{format_name}' cannot keep the KV cache of this plan: "
            f"{broken[0].reason} ({broken[0].layers[0]}, …): plan with --target {target_name}"
        )
        raise InvalidPlan(msg, format=format_name, layers=list(broken[0].layers))
    return options(_names(plan, target))


def _names(plan: Plan, target: Target) -> dict[bool, str]:
    """Return the runtime's names of the formats of keys and of values; they are alike in layers."""
    known = {f.bits: f.name for f in target.require_cache().formats}
    return {a.cache.holds_keys: known.get(a.candidate.weight_bits, "") for a in plan.caches}
