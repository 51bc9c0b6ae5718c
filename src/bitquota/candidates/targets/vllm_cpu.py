"""vLLM on CPUs: its packed kernel takes 4 bits only."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN

TARGET = replace(
    MARLIN,
    name="vllm-cpu",
    summary="compressed-tensors that vLLM serves on CPUs: 4 bits or none.",
    not_run="vLLM's kernel for packed weights on CPUs needs AVX-512; vLLM loads the files, "
    "transformers runs them",
    formats=tuple(f for f in MARLIN.formats if f.weight_bits in (4, 32)),
)
