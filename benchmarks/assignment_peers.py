"""Bit-widths of a language model's layers as another tool chooses them, in its own environment.

    PYTHON benchmarks/assignment_peers.py TOOL FOLDER WINDOWS BITS WIDTHS GROUP OUT

TOOL is ``auto-round`` (AutoScheme, its default method) or ``modelopt`` (``auto_quantize`` by
gradients). FOLDER is a Hugging Face folder, WINDOWS a safetensors file of the calibration tokens,
``tokens: i64[windows, length]``, BITS the mean width that is allowed, WIDTHS what layers may take
(``2,3,4,5,6,8``), GROUP the weights that share a scale, symmetric. OUT gets, as JSON, the width of
each layer by name, the tool's version and the CPU seconds. ``language_models.py --peers PYTHON``
calls this. Everything is computed in float32 on the CPU; an output layer with weights of its own is
chosen for as well.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rounding_peers import with_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


def auto_scheme(
    folder: Path, tokens: torch.Tensor, bits: float, widths: Sequence[int], group: int
) -> dict[str, int]:
    """Return what AutoScheme gives each layer, scales not counted."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.calib_dataset import register_dataset
    from auto_round.schemes import QuantizationScheme
    from datasets import Dataset

    # It takes the samples that it chooses on by the name of a data set.
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    register_dataset("windows")(lambda **_: Dataset.from_dict(rows).with_format("torch"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = AutoScheme(
        avg_bits=bits,
        options=[QuantizationScheme(bits=width, group_size=group, sym=True) for width in widths],
        ignore_scale_zp_bits=True,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=8,
        enable_torch_compile=False,
        low_gpu_mem_usage=False,
        low_cpu_mem_usage=False,
    )
    tool = AutoRound(
        model,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        scheme=chosen,
        iters=0,
        dataset="windows",
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        quant_lm_head=not model.config.tie_word_embeddings,
    )
    tool.quantize()
    return {
        name: int(layer["bits"])
        for name, layer in tool.layer_config.items()
        if layer.get("bits", 16) <= max(widths)
    }


def auto_quantize(
    folder: Path, tokens: torch.Tensor, bits: float, widths: Sequence[int], group: int
) -> dict[str, int]:
    """Return what ModelOpt's ``auto_quantize`` gives each layer, by its default method."""
    import modelopt.torch.quantization as mtq

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": width, "block_sizes": {-1: group}},
                    "enable": True,
                },
            ],
            "algorithm": "max",
        }
        for width in widths
    ]

    def loss(output: Any, batch: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        logits = output.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())

    batches = list(tokens.split(4))
    left_out = ["*embed_tokens*"]
    if model.config.tie_word_embeddings:
        left_out.append("*lm_head*")
    changed, _ = mtq.auto_quantize(
        model,
        # What nobody chooses for does not count: by default embeddings do, at 16 bits.
        constraints={
            "effective_bits": bits,
            "cost": {"excluded_module_name_patterns": left_out},
        },
        quantization_formats=formats,
        data_loader=batches,
        forward_step=lambda model, batch: model(batch),
        loss_func=loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        disabled_layers=left_out,
    )
    return {
        name: int(part.weight_quantizer.num_bits)
        for name, part in changed.named_modules()
        if hasattr(part, "weight_quantizer") and part.weight_quantizer.is_enabled
    }


TOOLS = {"auto-round": (auto_scheme, "auto-round"), "modelopt": (auto_quantize, "nvidia-modelopt")}


def main() -> None:
    """Choose, and write what came out."""
    tool, given, windows, bits, widths, group, out = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = load_file(windows)["tokens"]
    choose, package = TOOLS[tool]
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_tokenizer(Path(given), Path(scratch))
        found = choose(folder, tokens, float(bits), [int(w) for w in widths.split(",")], int(group))
    about = {
        "tool": f"{tool} {version(package)}",
        "seconds": round(time.process_time() - begun, 1),
        "bits": found,
    }
    Path(out).write_text(json.dumps(about))


if __name__ == "__main__":
    main()
