"""Deployment targets by name, each in a file of its own."""

from __future__ import annotations

from bitquota.candidates.targets import (
    coreml,
    ct_vllm_fp8,
    ct_vllm_humming,
    ct_vllm_int8,
    ct_vllm_marlin,
    ct_vllm_mxfp4,
    ct_vllm_nvfp4,
    gguf_k,
    gguf_py,
    gptq_vllm,
    mcu,
    mlx,
    modelopt,
    openvino_cpu,
    ort_cpu,
    ort_cpu_integer,
    ort_genai,
    ref_int,
    tensorrt,
    torchao,
    vllm_cpu,
)
from bitquota.candidates.targets.storage_format import StorageFormat
from bitquota.candidates.targets.target import Target, Violation
from bitquota.errors import InvalidInput

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (
        ref_int,
        ort_cpu,
        ort_cpu_integer,
        ort_genai,
        openvino_cpu,
        ct_vllm_marlin,
        ct_vllm_humming,
        ct_vllm_nvfp4,
        ct_vllm_mxfp4,
        ct_vllm_fp8,
        ct_vllm_int8,
        modelopt,
        vllm_cpu,
        gptq_vllm,
        gguf_py,
        gguf_k,
        mlx,
        torchao,
        coreml,
        tensorrt,
        mcu,
    )
}
"""In order of how much of them was run here."""

__all__ = [
    "TARGETS",
    "StorageFormat",
    "Target",
    "Violation",
    "target_by_name",
]


def target_by_name(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        InvalidInput: There is none; the message lists them.
    """
    if name not in TARGETS:
        msg = f"a target must be one of {', '.join(TARGETS)}; got '{name}'"
        raise InvalidInput(msg, target=name)
    return TARGETS[name]
