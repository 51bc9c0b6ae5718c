"""Weights of a language model as another tool rounds them; runs in that tool's own environment.

    PYTHON benchmarks/rounding_peers.py TOOL FOLDER WINDOWS BITS GROUP OUT

TOOL is ``auto-round`` (200 iterations, its default), ``auto-round-light`` (its preset of 50
iterations with a learning rate of .005), ``auto-round-rtn`` (its rounding to nearest),
``gptqmodel``, or ``gptqmodel-gptaq`` (with its correction for earlier layers). FOLDER is a Hugging
Face folder, WINDOWS a safetensors file of the calibration tokens, ``tokens: i64[windows, length]``.
Weights get symmetric grids, in groups of GROUP with fp16 scales. OUT gets them dequantized, by
name, and in its metadata the tool's version and the CPU seconds. ``rounding.py --peers PYTHON``
calls this. Everything is computed in float32 on the CPU.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PRESETS: dict[str, dict[str, float]] = {
    "auto-round": {"iters": 200},
    "auto-round-light": {"iters": 50, "lr": 5e-3},
    "auto-round-rtn": {"iters": 0},
}


def with_tokenizer(folder: Path, scratch: Path) -> Path:
    """Return the folder, or a copy with a tokenizer of bytes: both tools load one anyway."""
    if (folder / "tokenizer.json").is_file():
        return folder
    copied = Path(shutil.copytree(folder, scratch / "model"))
    table = {chr(byte): byte for byte in range(256)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token=chr(0))),
        pad_token=chr(0),
        bos_token=chr(1),
        eos_token=chr(2),
    ).save_pretrained(copied)
    return copied


def auto_round(
    folder: Path, tokens: torch.Tensor, bits: int, group: int, preset: dict[str, float]
) -> dict[str, torch.Tensor]:
    """Return the weights of auto-round's fake-quantized model."""
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, _ = AutoRound(
        model,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        scheme="W4A16",
        bits=bits,
        group_size=group,
        sym=True,
        **preset,
        dataset=list(tokens.split(8)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    ).quantize()
    return {
        f"{name}.weight": part.weight.detach().float()
        for name, part in found.named_modules()
        if isinstance(part, torch.nn.Linear)
    }


def gptqmodel(
    folder: Path, tokens: torch.Tensor, bits: int, group: int, scratch: Path, *, propagating: bool
) -> dict[str, torch.Tensor]:
    """Return the weights of the file that GPTQModel saves, read back with its torch kernel."""
    # By default it takes half the processors, and refuses to start with less than two threads.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    more = {"gptaq": GPTAQConfig()} if propagating else {}
    config = QuantizeConfig(bits=bits, group_size=group, sym=True, device="cpu", **more)
    model = GPTQModel.load(str(folder), config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    model.quantize(rows, batch_size=8)
    saved = str(scratch / "saved")
    model.save(saved)
    # Its kernels compute in 16 bits only; by itself it takes bfloat16 on a CPU, for scales too.
    read = GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH).model
    return {
        f"{name}.weight": part.dequantize_weight().T.float()
        for name, part in read.named_modules()
        if hasattr(part, "qweight")
    }


def main() -> None:
    """Round and write what came out."""
    tool, given, windows, bits, group, out = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = load_file(windows)["tokens"]
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_tokenizer(Path(given), Path(scratch))
        if tool.startswith("gptqmodel"):
            kind, propagating = "gptqmodel", tool.endswith("gptaq")
            weights = gptqmodel(
                folder, tokens, int(bits), int(group), Path(scratch), propagating=propagating
            )
        else:
            kind = "auto-round"
            weights = auto_round(folder, tokens, int(bits), int(group), PRESETS[tool])
    seconds = time.process_time() - begun
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        out,
        metadata={"tool": f"{kind} {version(kind)}", "seconds": f"{seconds:.0f}"},
    )


if __name__ == "__main__":
    main()
