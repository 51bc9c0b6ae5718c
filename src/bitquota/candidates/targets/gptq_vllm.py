"""GPTQ checkpoints in vLLM: 4 and 8 bits, symmetric, overridden per module by ``dynamic``."""

from __future__ import annotations

from dataclasses import replace

from bitquota.candidates.storage import FULL_PRECISION_BITS, ScaleFormat
from bitquota.candidates.targets.ct_vllm_marlin import TARGET as MARLIN
from bitquota.candidates.targets.storage_format import full_precision

_WORD = 32

TARGET = replace(
    MARLIN,
    name="gptq-vllm",
    summary="GPTQ checkpoints that vLLM serves with Marlin (Turing and later).",
    versions={"gptqmodel": "7.7", "vllm": "0.33"},
    formats=(
        *(
            replace(
                form,
                name=form.name.replace("W", "gptq-int").replace("A16", ""),
                scheme=replace(form.scheme, scale_format=ScaleFormat.FP16),
                # Codes fill words along the inputs, zero points along the outputs.
                column_multiple=max(form.column_multiple, _WORD),
                row_multiple=_WORD,
            )
            for form in MARLIN.formats
            if form.weight_bits != FULL_PRECISION_BITS
        ),
        full_precision("fp16"),
    ),
    exporter="gptq",
    not_run="vLLM's kernels need an NVIDIA GPU; GPTQModel runs the files on CPUs",
)
