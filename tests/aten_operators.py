"""Writes ``models/aten_operators.txt``: the ATen operators that the graph of a ``.pt2`` may call.

Run ``python tests/aten_operators.py`` with a new torch, read the difference, commit it.
``tests/models/test_pt2_operators.py`` fails until that is done.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

FILE = Path(__file__).parent.parent / "models" / "aten_operators.txt"

PRIVATE = frozenset(
    {
        "__and__", "__lshift__", "__or__", "__rshift__", "__xor__", "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d", "_assert_scalar", "_assert_tensor_metadata", "_conv_depthwise2d",
        "_convolution", "_local_scalar_dense", "_log_softmax", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "_scaled_dot_product_flash_attention_for_cpu",
        "_softmax", "_to_copy", "_unsafe_index", "_unsafe_view", "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d", "_weight_norm", "_weight_norm_interface",
    }
)  # fmt: skip
"""Operators with a leading underscore that exports of ordinary models call."""

REFUSED = tuple(
    re.compile(pattern)
    for pattern in (
        # Files, storage under a tensor's feet, the state of autograd, memory of devices.
        r"from_file|set_?|set_data|resize.*|requires_grad_|retains?_grad|data|pin_memory",
        r"is_(pinned|distributed|inference|leaf|set_to|vulkan_available)|output_nr",
        r"storage_offset|stride|get_device|as_strided_|hash_tensor|embedding_renorm_?",
        # Other layouts and back ends, and the passes of training.
        r".*sparse.*|.*nested.*|to_mkldnn|(c?col|crow|row)_indices.*|(values|indices)(_copy)?",
        r"coalesce|is_coalesced|dense_dim|to_padded_tensor|smm|sspaddmm|hspmm",
        r"(cudnn|mkldnn|miopen|mps|fbgemm|quantized|quantize|q|batch_norm)_.*",
        r"choose_qparams.*|int_repr|dequantize|empty_quantized|.*_jvp|.*backward.*|slow_.*",
        r"thnn_.*|convolution_overrideable|(un)?flatten_dense_tensors|slice_inverse",
        # Kernels that trust their arguments, or that no network calls.
        r"segment_reduce|ctc_loss|histogramdd|fractional_max_pool.*|linalg_ldl.*|lu_unpack",
        r"geqrf|orgqr|ormqr|empty_(strided|permuted)|new_empty_strided|native_norm",
    )
)
TYPE = re.compile(
    r"(Tensor|Optional\[Tensor\]|List\[(Optional\[)?Tensor\]?\])|"
    r"(Optional\[)?(List\[)?(int|float|bool|number)\]*|(Optional\[)?str\]?|"
    r"(Optional\[)?(ScalarType|Layout|Device|MemoryFormat|Generator)\]?"
)
"""Types of arguments whose values a graph can hold."""

RESULTS = frozenset({"Tensor", "List[Tensor]", "int", "bool", "float", "number"})

TEXTS = frozenset(
    {
        "UPLO", "approximate", "assert_msg", "driver", "equation", "indexing", "interpolation",
        "mode", "norm", "ord", "p", "pad_mode", "padding", "padding_side", "reduce",
        "rounding_mode", "side",
    }
)  # fmt: skip
"""Arguments that choose among modes; any other text could be a file's name."""

DETERMINISTIC_WITH = frozenset({"train", "training", "dropout_p"})
"""Arguments that keep an operator from drawing random numbers."""


def forward_operators() -> list[str]:
    """Return the schemas of the operators that a forward pass may call, sorted."""
    return sorted(str(s) for s in torch._C._jit_get_all_schemas() if _is_forward(s))


def _is_forward(schema: torch._C.FunctionSchema) -> bool:
    namespace, _, name = schema.name.partition("::")
    names = {a.name for a in schema.arguments}
    if namespace != "aten" or (name.startswith("_") and name not in PRIVATE):
        return False
    full = f"{schema.name}.{schema.overload_name}".rstrip(".")
    if any(p.fullmatch(name) for p in REFUSED) or not torch._C._dispatch_has_kernel(full):
        return False
    written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    if any(a.is_out for a in schema.arguments) or any(
        a is not schema.arguments[0] or a.name != "self" for a in written
    ):
        return False
    for argument in schema.arguments:
        type_ = str(argument.real_type)
        if not TYPE.fullmatch(type_) or ("str" in type_ and argument.name not in TEXTS):
            return False
    if any(str(r.real_type) not in RESULTS for r in schema.returns):
        return False
    tags = torch._C._get_operation_overload(schema.name, schema.overload_name)[2]
    return torch.Tag.nondeterministic_seeded not in tags or bool(names & DETERMINISTIC_WITH)


if __name__ == "__main__":
    found = forward_operators()
    FILE.write_text("\n".join(found) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(found)} operators of torch {torch.__version__} in {FILE}\n")
