"""GPTQ checkpoints in vLLM: 4 and 8 bits, symmetric, overridden per module by ``dynamic``."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.target import LINEAR, full_precision, per_width

_GPTQ = Scheme(
    granularity=Granularity.GROUP,
    group_size=128,
    scale_format=ScaleFormat.FP16,
    row_alignment_bits=32,
)

TARGET = replace(
    MARLIN,
    name="gptq-vllm",
    summary="A GPTQModel 'dynamic' configuration for checkpoints that vLLM serves.",
    versions={"gptqmodel": "7.7", "vllm": "0.33"},
    formats=(
        *per_width((4, 8), _GPTQ, name="gptq-int{bits}-g128", kinds=LINEAR, column_multiple=128),
        full_precision("fp16"),
    ),
    exporter="gptqmodel-config",
    not_run="a configuration without weights; vLLM's kernels need an NVIDIA GPU",
)
