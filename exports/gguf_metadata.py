"""What a GGUF says of a model beside its tensors: sizes, positions, and what it must not leave out.

llama.cpp computes rotary positions from these entries alone, so a scaling that is not written is
another model. Keys and values are those of llama.cpp's converter.

References:
    GGUF: ggml-org/ggml, its page on GGUF; ggml-org/llama.cpp, conversion/base.py and llama.py
    YaRN: Peng et al., YaRN: Efficient Context Window Extension, 2023, arXiv:2309.00071

Design: docs/design/targets.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from bitquota.canonical import JsonObject

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Bounds of the ramp of ``yarn`` that llama.cpp computes with: it does not read a file's."""
_KNOWN = _BETAS.keys() | {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "truncate", "partial_rotary_factor",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rope:
    """Rotary positions.

    Attributes:
        theta: Base of the frequencies ``theta^(-2i/d)``.
        scaling: ``linear`` or ``yarn``, if llama.cpp computes the scaling by itself.
        factor: Of that scaling.
        original_context: Positions that the model was trained on before it, of ``yarn``.
        factors: f32[d / 2], what each frequency is divided by, where a table says it.
    """

    theta: float
    scaling: str | None = None
    factor: float = 1.0
    original_context: int | None = None
    factors: NDArray[np.float32] | None = None


def rope_of(module: nn.Module, config: JsonObject, architecture: str) -> Rope:
    """Return the rotary positions of ``module``, as transformers computes them.

    Args:
        module: A causal language model of transformers.
        config: Its ``config.json``.
        architecture: GGUF's name of it.

    Raises:
        InvalidInput: llama.cpp would compute other positions, whatever the file says.
    """
    settings: Any = module.config
    given = dict(getattr(settings, "rope_parameters", None) or {})
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(given.get("rope_type") or "default")
    if unknown := sorted(k for k in set(given) - _KNOWN if given[k] is not None):
        raise _refusal(f"'{unknown[0]}' in it", given)
    if float(given.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _refusal("a part of each head turned", given)
    if kind == "default":
        return Rope(theta=theta)
    factor = float(given.get("factor") or 1.0)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=factor)
    if kind == "yarn":
        original = given.get("original_max_position_embeddings")
        context = int(original or settings.max_position_embeddings)
        return _yarn(given, theta, factor, context)
    if kind == "llama3" and architecture == "llama":
        return Rope(theta=theta, factors=_factors(module, theta))
    raise _refusal(f"the type '{kind}' for {architecture}", given)


def _yarn(given: JsonObject, theta: float, factor: float, context: int) -> Rope:
    """Return the positions of ``yarn``; ``context`` is what the model was trained on before."""
    # llama.cpp multiplies with 1 + 0.1 ln(factor), and rounds the bounds of the ramp.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention = given.get("attention_factor")
    if attention is not None and not math.isclose(float(attention), usual, rel_tol=1e-6):
        raise _refusal(f"an attention factor of {attention} (not {usual:.6g})", given)
    if given.get("truncate") is False:
        raise _refusal("bounds that are not rounded", given)
    for name, taken in _BETAS.items():
        own = given.get(name)
        if own is not None and float(own) != taken:
            raise _refusal(f"a {name} of {own} (it takes {taken:g} whatever the file says)", given)
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_context=context,
    )


def _factors(module: nn.Module, theta: float) -> NDArray[np.float32]:
    """Return the usual frequencies over those that the module turns by."""
    found = next(b for name, b in module.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    turned = found.detach().double().cpu().numpy()
    usual = theta ** (-np.arange(len(turned)) / len(turned))
    factors: NDArray[np.float32] = (usual / turned).astype(np.float32)
    return factors


def _refusal(what: str, given: JsonObject) -> InvalidInput:
    msg = (
        f"GGUF must hold the model's rotary positions, and llama.cpp has no entry for {what}: it "
        "would compute another model; use another format"
    )
    return InvalidInput(msg, rope=given)


def add_metadata(writer: Any, config: JsonObject, rope: Rope) -> None:  # noqa: ANN401  # GGUFWriter
    """Write sizes and positions.

    Raises:
        InvalidInput: An activation function that llama.cpp does not compute.
    """
    import gguf

    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        msg = (
            "llama.cpp computes SiLU in models of this type, whatever a GGUF says; this one has "
            f"'{activation}': use another format"
        )
        raise InvalidInput(msg, hidden_act=activation)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.scaling))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def window_notes(config: JsonObject) -> tuple[str, ...]:
    """Return what to say of a sliding window, which llama.cpp does not apply to these models."""
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True)
    if not window or not used or window >= config["max_position_embeddings"]:
        return ()
    return (f"the model attends to the last {window:,} tokens, llama.cpp to all of them",)
