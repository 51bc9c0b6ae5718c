"""Plans for llama.cpp beside its own mixes, and K types beside its own quantizer.

    python benchmarks/llama_cpp.py                 # the tiny Llama of $BITQUOTA_DATA
    python benchmarks/llama_cpp.py --model FOLDER --samples 16 --test-windows 16

Needs ``bitquota[llama-cpp]``. The library in xllamacpp has llama.cpp's quantizer of tensors
(``ggml_quantize_chunk``) but not its tool, so the tool's choice of types for ``Q3_K_M`` and
``Q4_K_M`` is written down here (``mix_type``); tensors come from its quantizer, with an importance
matrix (mean squared inputs) of the windows that the plan is made on. A plan for ``gguf-k`` gets the
bits that the mix takes. KL per token is of dequantized weights in torch, on windows that nothing
saw; the plan's file is also run in llama.cpp on 32 of them.

References:
    ggml-org/llama.cpp: src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback)
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch.nn.functional import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.context import Context, MemoryLedger
from bitquota.exports.export import export_plan, prepare_export
from bitquota.exports.llama_cpp import installed
from bitquota.exports.llama_cpp_library import load_library
from bitquota.models.load import load_model
from bitquota.models.running import primary_output
from bitquota.models.text import text_windows
from bitquota.quantizers.weights import quantize
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from resnet_cifar import data_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

K_SCHEME = Scheme(
    grid=Grid.K_BLOCKS,
    granularity=Granularity.GROUP,
    group_size=256,
    scale_format=ScaleFormat.FP16,
)
FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def main() -> None:
    """Print both tables; end with code 1 where a plan is worse than the mix of its size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="Hugging Face folder (default: the tiny Llama).")
    parser.add_argument("--samples", type=int, default=64, help="Windows to measure on.")
    parser.add_argument("--test-windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--mixes", default="Q3_K_M,Q4_K_M")
    parser.add_argument("--quantizer-only", action="store_true", help="Make no plans.")
    given = parser.parse_args()
    if not installed():
        print("llama.cpp is not installed: pip install bitquota[llama-cpp]")
        return
    torch.set_num_threads(1)
    library, version = load_library()
    print(f"llama.cpp of xllamacpp {version}")
    quantizer_table(library)
    if given.quantizer_only:
        return
    source = given.model or str(data_folder() / "llama_shakespeare")
    worse = mix_table(library, source, given)
    sys.exit(1 if worse else 0)


def quantizer_table(library: Any) -> None:  # noqa: ANN401  # ctypes
    """Print weighted squared errors of nearest codes, ours over llama.cpp's."""
    draw = np.random.default_rng(0)
    tensors = {
        "normal": draw.normal(size=(512, 512)),
        "Laplace": draw.laplace(size=(512, 512)),
        "Student, 3 degrees": draw.standard_t(3, size=(512, 512)),
    }
    print("\n| weights | " + " | ".join(f"Q{b}_K" for b in range(2, 7)) + " |\n|" + " --- |" * 6)
    for name, values in tensors.items():
        weight = values.astype(np.float32)
        importance = np.exp(1.5 * draw.normal(size=512)).astype(np.float32)
        ratios = []
        for bits in range(2, 7):
            mine = quantize(
                torch.from_numpy(weight),
                bits,
                K_SCHEME,
                importance=torch.from_numpy(importance).double(),
            ).dequantize()
            theirs = their_values(library, weight, f"Q{bits}_K", importance)
            errors = [
                ((importance * (made.astype(np.float64) - weight) ** 2).sum())
                for made in (mine.numpy(), theirs)
            ]
            ratios.append(errors[0] / errors[1])
        print(f"| {name} | " + " | ".join(f"{r:.3f}" for r in ratios) + " |")


def their_values(
    library: Any,  # noqa: ANN401  # ctypes
    weight: NDArray[np.float32],
    kind: str,
    importance: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Return ``f32[rows, columns]`` as llama.cpp quantizes and reads it."""
    import ctypes

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.zeros((rows, columns // block * size), dtype=np.uint8)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk(
        ctypes.c_int(number),
        ctypes.c_void_p(weight.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(None if importance is None else importance.ctypes.data),
    )
    values: NDArray[np.float32] = gguf.quants.dequantize(out, number)
    return values


def mix_table(library: Any, source: str, given: argparse.Namespace) -> bool:  # noqa: ANN401
    """Print the KL of each mix and of a plan of its size; return whether a plan is worse."""
    model = load_model(source)
    calibration, test = windows(source, given)
    expected = logits(model.module, test)
    squares = mean_squares(model.module, calibration)
    made = {name: mix(library, model, name, squares) for name in given.mixes.split(",")}

    # Plans of the same bits, measured once.
    start = time.process_time()
    request = PlanRequest(
        budgets=tuple(f"{bits:.6f} bpw" for _, bits in made.values()),
        target="gguf-k",
        samples=given.samples,
        holdout_samples=given.samples,
        effort="quick",
    )
    found = allocate(model, calibration, request, context=Context(ledger=MemoryLedger()))
    spent = time.process_time() - start
    model = found.with_weights(model)
    print(f"\n{source}: plans took {spent:.0f} s of processor on {given.samples} windows\n")
    print("| mix | stored bits per weight | KL | plan, bits | KL | the file in llama.cpp |")
    print("|" + " --- |" * 6)
    worse = False
    for (name, (module, bits)), plan in zip(made.items(), found.plans, strict=True):
        theirs = divergence(expected, logits(module, test))
        ours = divergence(expected, logits(prepare_export(model, plan).module, test))
        with tempfile.TemporaryDirectory() as folder:
            report = export_plan(
                model, plan, Path(folder) / "o", target="gguf-k", samples=test.first(32)
            )
        ran = report.text_run
        assert ran is not None
        apart = abs(ran.log_likelihood / ran.planned_log_likelihood - 1)
        print(
            f"| {name} | {bits:.4f} | {theirs:.5f} | {plan.effective_bits:.4f} | {ours:.5f} | "
            f"log-likelihood {ran.log_likelihood:.4f}, {100 * apart:.2f} % off the plan's; "
            f"{ran.tokens_per_second:.0f} tokens/s |"
        )
        worse |= not (ours < theirs and apart < 0.01)
    return worse


def windows(source: str, given: argparse.Namespace) -> tuple[CalibrationSet, CalibrationSet]:
    """Return windows of the first nine tenths of the text, and of the rest."""
    path = data_folder() / "tinyshakespeare.txt"
    text = path.read_text()
    cut = len(text) * 9 // 10
    tokenizer = source if (Path(source) / "tokenizer.json").exists() else "bytes"
    first, rest = (
        text_windows(part, path, tokenizer=tokenizer, length=given.length, n=n, seed=0)
        for part, n in ((text[:cut], 2 * given.samples), (text[cut:], given.test_windows))
    )
    return first, rest


def mix(
    library: Any,  # noqa: ANN401  # ctypes
    model: LoadedModel,
    name: str,
    squares: dict[str, NDArray[np.float32]],
) -> tuple[nn.Module, float]:
    """Return the model as llama.cpp's tool would quantize it, and its bits per weight."""
    module = copy.deepcopy(model.module)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    embedding = module.get_input_embeddings()
    tied = module.get_output_embeddings().weight is embedding.weight
    layers = {n: m for n, m in layers.items() if not (tied and m.weight is embedding.weight)}
    layers["token_embd"] = embedding
    bits = weights = 0.0
    for path, layer in layers.items():
        kind = mix_type(name, path, layer.weight.shape[1], model.module.config, tied=tied)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        values = their_values(library, layer.weight.detach().numpy(), kind, squares.get(path))
        layer.weight.data = torch.from_numpy(values.copy())
        bits += 8 * size / block * layer.weight.numel()
        weights += layer.weight.numel()
    return module, bits / weights


def mix_type(name: str, path: str, columns: int, config: Any, *, tied: bool) -> str:  # noqa: ANN401
    """Return the type that the tool gives a tensor in ``Q3_K_M`` or ``Q4_K_M``."""
    base = name.removesuffix("_M")
    found = re.search(r"layers\.(\d+)\.", path)
    k, n = int(found[1]) if found else 0, config.num_hidden_layers
    more = k < n // 8 or k >= 7 * n // 8 or (k - n // 8) % 3 == 2
    kind = base
    if path == "lm_head" or (path == "token_embd" and tied):
        kind = "Q8_0" if columns % 256 else "Q6_K"
    elif path.endswith("v_proj"):
        kind = ("Q5_K" if k < 2 else "Q4_K") if base == "Q3_K" else "Q6_K" if more else base
    elif path.endswith("down_proj"):
        kind = ("Q5_K" if k < n // 16 else "Q4_K") if base == "Q3_K" else "Q6_K" if more else base
    elif path.endswith("o_proj") and base == "Q3_K":
        kind = "Q4_K"
    return FALLBACK.get(kind, kind) if columns % 256 else kind


def mean_squares(module: nn.Module, data: CalibrationSet) -> dict[str, NDArray[np.float32]]:
    """Return an importance matrix: the mean squared input of each column, by layer."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Any:  # noqa: ANN401  # a hook
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).square().mean(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    hooks = [
        m.register_forward_pre_hook(note(n))
        for n, m in module.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    logits(module, data)
    for hook in hooks:
        hook.remove()
    return {n: np.ascontiguousarray(s.numpy(), dtype=np.float32) for n, s in sums.items()}


def logits(module: nn.Module, data: CalibrationSet) -> list[Tensor]:
    """Return the logits of each window."""
    with torch.no_grad():
        return [primary_output(module(w[None]))[0] for w in data.inputs[0]]


def divergence(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the mean KL per token, in nats."""
    sums = []
    for a, b in zip(expected, found, strict=True):
        ours, theirs = log_softmax(a.double(), -1), log_softmax(b.double(), -1)
        sums.append(float((ours.exp() * (ours - theirs)).sum(-1).mean()))
    return sum(sums) / len(sums)


if __name__ == "__main__":
    main()
