"""Which plans a format can hold: the rules that every exporter goes by and menus are made of.

They look at the plan alone, so a menu need not load the model, or torch.

Design: docs/design/targets.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.rows import HOLD_PARTS, MIXED_KINDS
from bitquota.candidates.storage import (
    K_BLOCKS,
    PRUNED_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    Scheme,
)
from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.candidates.zero_bits import HOLD_ZERO_BITS, WHY_NOT, zero_bits_of
from bitquota.errors import InvalidPlan
from bitquota.exports.kv_cache import cache_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.targets import Target
    from bitquota.plan import Plan

    _Names = dict[tuple[int, Granularity, int | None, ScaleFormat], str]

_LOOKED_UP = frozenset({LayerKind.LINEAR, LayerKind.EMBEDDING})
_BLOCKED = _LOOKED_UP | {LayerKind.LINEAR_TRANSPOSED}

_GGUF_BLOCK, _GGUF_WIDTHS = 32, (4, 5, 8)
"""Weights with one scale in GGUF's plain types, and bit-widths of these."""

_MLX_GROUPS = (32, 64, 128)
_GPTQ_WORD = 32
_NAMED = 4
"""Layers that a refusal names."""

COMPRESSED_FLOATS = {
    (4, Granularity.GROUP, 16, ScaleFormat.E4M3): "nvfp4-pack-quantized",
    (4, Granularity.GROUP, 32, ScaleFormat.E8M0): "mxfp4-pack-quantized",
    (8, Granularity.CHANNEL, None, ScaleFormat.FP32): "float-quantized",
}
"""What compressed-tensors calls weights on the grid of floating-point numbers."""

MODELOPT_ALGORITHMS = {
    (4, Granularity.GROUP, 16, ScaleFormat.E4M3): "W4A16_NVFP4",
    (8, Granularity.TENSOR, None, ScaleFormat.FP32): "FP8",
}
"""What ModelOpt calls them."""


def in_blocks(layer: Layer, bits: int, scheme: Scheme) -> bool:
    """Return whether MatMulNBits can hold a weight: symmetric blocks with fp32 scales."""
    size = scheme.group_size or 0
    return (
        layer.kind in _BLOCKED
        and scheme.granularity is Granularity.GROUP
        and scheme.scale_format is ScaleFormat.FP32
        and scheme.grid is not Grid.ASYMMETRIC
        and not scheme.row_bits
        and bits in {2, 4, 8}
        and size >= 16
        and size & (size - 1) == 0
        and layer.columns % size == 0
    )


def floats_as(names: _Names, bits: int, scheme: Scheme) -> str | None:
    """Return a format's name of a weight on the grid of floating-point numbers, if it has one."""
    key = (bits, scheme.granularity, scheme.group_size, scheme.scale_format)
    return names.get(key) if scheme.grid is Grid.FLOAT else None


def compressed_as(bits: int, scheme: Scheme, *, inputs: bool) -> str | None:
    """Return compressed-tensors' name of how a weight is stored, or ``None`` if it has none.

    ``inputs``: whether those of the layer are quantized, too.
    """
    if scheme.grid is Grid.FLOAT:
        return floats_as(COMPRESSED_FLOATS, bits, scheme)
    if inputs and bits == 8 and scheme == replace(Scheme(), scale_rule=scheme.scale_rule):
        return "int-quantized"
    integer = (
        scheme.grid is Grid.SYMMETRIC
        and scheme.row_alignment_bits == 32
        and scheme.granularity is not Granularity.TENSOR
        and bits > 1
    )
    return "pack-quantized" if integer else None


def _compressed(layer: Layer, bits: int, scheme: Scheme, inputs: bool) -> bool:  # noqa: FBT001
    stored = compressed_as(bits, scheme, inputs=inputs)
    return layer.kind is LayerKind.LINEAR and stored is not None


def _openvino(layer: Layer, _bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    return (
        scheme.granularity is not Granularity.GROUP
        and scheme.scale_format is ScaleFormat.FP32
        and scheme.grid is not Grid.ASYMMETRIC
        and layer.kind is not LayerKind.EXPERTS
    )


def _genai(layer: Layer, bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    return in_blocks(layer, bits, scheme)


def _gguf(layer: Layer, bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    plain = (
        bits in _GGUF_WIDTHS
        and scheme.grid is Grid.SYMMETRIC
        and scheme.granularity is Granularity.GROUP
        and scheme.group_size == _GGUF_BLOCK
        and scheme.scale_format is ScaleFormat.FP16
        and layer.columns % _GGUF_BLOCK == 0
    )
    return layer.kind in _LOOKED_UP and (scheme.grid is Grid.K_BLOCKS or plain)


def _mlx(layer: Layer, _bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    return (
        layer.kind in _LOOKED_UP
        and layer.columns % (scheme.group_size or 1) == 0
        and scheme.grid is Grid.OFFSET
        and scheme.granularity is Granularity.GROUP
        and scheme.group_size in _MLX_GROUPS
        and scheme.scale_format is ScaleFormat.FP16
        and scheme.row_alignment_bits == 32
    )


def _gptq(layer: Layer, _bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    return (
        layer.kind is LayerKind.LINEAR
        and scheme.grid is Grid.SYMMETRIC
        and scheme.granularity is not Granularity.TENSOR
        and scheme.scale_format is ScaleFormat.FP16
        and layer.rows % _GPTQ_WORD == layer.columns % _GPTQ_WORD == 0
        and layer.columns % (scheme.group_size or 1) == 0
    )


def _modelopt(layer: Layer, bits: int, scheme: Scheme, _inputs: bool) -> bool:  # noqa: FBT001
    named = floats_as(MODELOPT_ALGORITHMS, bits, scheme)
    return layer.kind is LayerKind.LINEAR and named is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRule:
    """What a format can hold of one layer.

    Attributes:
        what: Its name in a sentence.
        widths: Its bit-widths.
        holds: Whether it can hold a layer of these bits and this scheme; the last argument says
            whether inputs are quantized, too.
        otherwise: The sentence where it cannot; ``{layers}`` stands for the layers.
    """

    what: str
    widths: tuple[int, ...]
    holds: Callable[[Layer, int, Scheme, bool], bool] | None = None
    otherwise: str = ""


_ONNX = StorageRule(what="ONNX", widths=(2, 4, 8, 16))
_OPENVINO = StorageRule(
    what="OpenVINO",
    widths=(2, 4, 8),
    holds=_openvino,
    otherwise=(
        "the OpenVINO export stores symmetric codes with fp32 scales per channel or tensor, "
        "and no experts; {layers} are planned otherwise: plan with --target openvino-cpu"
    ),
)


def _config(what: str, *widths: int) -> StorageRule:
    return StorageRule(what=what, widths=widths)


RULES: dict[str, StorageRule] = {
    "compressed-tensors": StorageRule(
        what="compressed-tensors",
        widths=(1, 2, 3, 4, 5, 6, 7, 8),
        holds=_compressed,
        otherwise=(
            "compressed-tensors stores linear layers in rows of 32-bit words, symmetric, with "
            "scales per channel or group, or as NVFP4, MXFP4 or FP8; {layers} are planned "
            "otherwise: plan with --target ct-vllm-humming"
        ),
    ),
    "onnx-qdq": _ONNX,
    "onnx-matmulnbits": _ONNX,
    "onnx-genai": StorageRule(
        what="ONNX Runtime GenAI",
        widths=(2, 4, 8),
        holds=_genai,
        otherwise=(
            "a folder for ONNX Runtime GenAI stores linear layers and embeddings as symmetric "
            "blocks with fp32 scales; {layers} are planned otherwise: plan with --target ort-genai"
        ),
    ),
    "openvino": _OPENVINO,
    "openvino-genai": _OPENVINO,
    "gguf": StorageRule(
        what="GGUF written in Python",
        widths=tuple(sorted({*_GGUF_WIDTHS, *K_BLOCKS})),
        holds=_gguf,
        otherwise=(
            "GGUF blocks are symmetric groups of 32 with fp16 scales, or K blocks, in linear "
            "layers and embeddings; {layers} are planned otherwise: plan with --target gguf-py or "
            "gguf-k"
        ),
    ),
    "mlx": StorageRule(
        what="MLX",
        widths=(2, 3, 4, 5, 6, 8),
        holds=_mlx,
        otherwise=(
            "MLX stores linear layers and embeddings as groups of 32, 64 or 128 that divide the "
            "row, with an fp16 scale and bias each; {layers} are planned otherwise: plan with "
            "--target mlx"
        ),
    ),
    "gptq": StorageRule(
        what="a GPTQ checkpoint",
        widths=(2, 3, 4, 8),
        holds=_gptq,
        otherwise=(
            "a GPTQ checkpoint stores linear layers whose rows and columns are multiples of 32, "
            "symmetric, with fp16 scales per channel or per group that divides the row; {layers} "
            "are planned otherwise: plan with --target gptq-vllm"
        ),
    ),
    "modelopt": StorageRule(
        what="ModelOpt",
        widths=(4, 8),
        holds=_modelopt,
        otherwise=(
            "ModelOpt's folders hold linear layers as NVFP4, or as FP8 with one scale; {layers} "
            "are planned otherwise: plan with --target modelopt"
        ),
    ),
    "gptqmodel-config": _config("gptqmodel-config", 2, 3, 4, 8),
    "autoround-config": _config("autoround-config", 2, 3, 4, 5, 6, 7, 8),
    "llm-compressor-recipe": _config("llm-compressor-recipe", 2, 3, 4, 5, 6, 7, 8),
    "torchao-config": _config("torchao-config", 1, 2, 3, 4, 5, 6, 7, 8),
    "mlx-config": _config("mlx-config", 2, 3, 4, 5, 6, 8),
    "coreml-config": _config("coreml-config", 4, 8),
}
"""By format; ``ref-int`` holds everything that its grids allow."""

GRIDS: dict[str, frozenset[Grid]] = {
    "ref-int": frozenset(Grid) - {Grid.K_BLOCKS},
    "onnx-qdq": frozenset({Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.CODEBOOK}),
    "onnx-matmulnbits": frozenset({Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.CODEBOOK}),
    "gguf": frozenset({Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.K_BLOCKS}),
    "compressed-tensors": frozenset({Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.FLOAT}),
    "mlx": frozenset({Grid.OFFSET}),
    "gptq": frozenset({Grid.SYMMETRIC}),
    "modelopt": frozenset({Grid.FLOAT}),
    "mlx-config": frozenset({Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.OFFSET}),
}
"""Which grids a format can hold; the others hold integers alone. ONNX looks levels up (Gather);
powers of two would need a table that the plan does not count."""

STATIC_RANGES = frozenset({"onnx-qdq", "onnx-matmulnbits"})
"""Formats with ranges of inputs, all of them known before."""


def require_storable(plan: Plan, format_name: str, target: Target | None = None) -> None:
    """Raise ``InvalidPlan``, with layers named, where a format or a target cannot hold the plan."""
    _check_rows(plan, format_name)
    _check_zero_bits(plan, format_name)
    _check_ranges(plan, format_name)
    _check_grids(plan, format_name)
    cache_options(plan, format_name)
    if target is not None:
        plan.require(target)
    _check_rule(plan, format_name)


def refusal(plan: Plan, format_name: str, target: Target | None = None) -> str | None:
    """Return why a format or a target cannot hold the plan, or ``None`` where it can."""
    try:
        require_storable(plan, format_name, target)
    except InvalidPlan as err:
        return err.message
    return None


def _check_rule(plan: Plan, format_name: str) -> None:
    rule = RULES.get(format_name)
    if rule is None:
        return
    quantized = [a for a in plan.assignments if a.candidate.quantized]
    able = {PRUNED_BITS, *rule.widths}
    wide = {
        a.layer.name: widths
        for a in quantized
        if (widths := {*(a.candidate.row_bits or (a.candidate.weight_bits,))} - able)
    }
    if wide:
        found = [f"{name}={bits}" for name, widths in wide.items() for bits in sorted(widths)]
        stored = ", ".join(map(str, rule.widths))
        msg = (
            f"{rule.what} stores {stored} bits; the plan has {_some(found)}: plan with "
            f"--bits {stored.replace(' ', '')}"
        )
        raise InvalidPlan(msg, layers=sorted(wide))
    if rule.holds is None:
        return
    by_token = plan.activation_fit in DYNAMIC_FITS
    wrong = [
        a.layer.name
        for a in quantized
        if not rule.holds(
            a.layer,
            a.candidate.weight_bits,
            a.candidate.scheme,
            by_token and a.candidate.activation_bits is not None,
        )
    ]
    if wrong:
        raise InvalidPlan(rule.otherwise.format(layers=_some(wrong)), layers=wrong)


def _some(names: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _check_grids(plan: Plan, format_name: str) -> None:
    """Raise ``InvalidPlan`` where the format cannot hold what the plan's codes stand for."""
    integers = frozenset(grid for grid in Grid if grid.is_integer)
    held = GRIDS.get(format_name, integers)
    wrong = {
        a.layer.name: a.candidate.scheme.grid
        for a in plan.assignments
        if a.candidate.quantized and a.candidate.scheme.grid not in held
    }
    if wrong:
        grids = ", ".join(sorted(set(wrong.values())))
        able = ", ".join(name for name in GRIDS if set(wrong.values()) <= GRIDS[name])
        msg = (
            f"format '{format_name}' cannot store weights on the grid '{grids}', as layer "
            f"'{next(iter(wrong))}' and {len(wrong) - 1} more have them; these formats have: {able}"
        )
        raise InvalidPlan(msg, layers=sorted(wrong), format=format_name)


def _check_zero_bits(plan: Plan, format_name: str) -> None:
    """Raise ``InvalidPlan`` where the format is not smaller for weights that are left out."""
    found = {a.layer.name: what for a in plan.assignments if (what := zero_bits_of(a.candidate))}
    wrong = {name: what for name, what in found.items() if format_name not in HOLD_ZERO_BITS[what]}
    if wrong:
        name, what = next(iter(wrong.items()))
        msg = (
            f"format '{format_name}' cannot store layer '{name}' and {len(wrong) - 1} more, which "
            f"leave weights out ({what}): {WHY_NOT[what]}; export to "
            f"{', '.join(sorted(HOLD_ZERO_BITS[what]))}, or plan without --allow {what}"
        )
        raise InvalidPlan(msg, layers=sorted(wrong), format=format_name)


def _check_ranges(plan: Plan, format_name: str) -> None:
    """Raise ``InvalidPlan`` where the format would hold ranges of inputs, but not of each token."""
    fit = plan.activation_fit
    if fit in DYNAMIC_FITS and format_name in STATIC_RANGES:
        msg = (
            f"format '{format_name}' cannot find ranges of inputs token by token ({fit}), as the "
            "plan has them: ONNX finds ranges while it runs for whole tensors alone "
            "(DynamicQuantizeLinear); export to compressed-tensors, or plan with another "
            "--activation-fit"
        )
        raise InvalidPlan(msg, format=format_name, activation_fit=fit)


def _check_rows(plan: Plan, format_name: str) -> None:
    """Raise ``InvalidPlan`` where the format cannot hold rows of several bit-widths in a layer."""
    mixed = {a.layer.name: a.layer.kind for a in plan.assignments if a.candidate.row_bits}
    if format_name in HOLD_PARTS and MIXED_KINDS.issuperset(mixed.values()):
        return
    if mixed:
        msg = (
            f"format '{format_name}' stores a layer in one bit-width; the rows of layer "
            f"'{next(iter(mixed))}' and {len(mixed) - 1} more have several: export to "
            f"{', '.join(sorted(HOLD_PARTS))}, or plan without --row-widths"
        )
        raise InvalidPlan(msg, layers=sorted(mixed), format=format_name)
