"""What an export must say, told before anything is loaded: format, target, and a free folder."""

from __future__ import annotations

import json
from pathlib import Path

from bitquota.candidates.targets import target_by_name
from bitquota.errors import InvalidInput
from bitquota.models.gguf_names import ARCHITECTURES
from bitquota.models.sources import ModelSource, model_source

EXPORT_FORMATS = (
    "ref-int", "compressed-tensors", "onnx-qdq", "onnx-matmulnbits", "onnx-genai", "openvino",
    "openvino-genai", "gguf", "mlx", "gptq", "modelopt", "gptqmodel-config",
    "autoround-config", "llm-compressor-recipe", "torchao-config", "mlx-config", "coreml-config",
)  # fmt: skip
"""Names of ``bitquota.exports.export.EXPORTERS``, in its order; that module loads torch."""

FOLDER_FORMATS = frozenset(
    {"compressed-tensors", "onnx-genai", "openvino-genai", "gguf", "mlx", "gptq", "modelopt"}
)
"""Formats that extend the config of a Hugging Face folder: no other kind of model has one."""


HOW_TO_RUN = {
    "onnx-qdq": "onnxruntime.InferenceSession('{out}/model.onnx')",
    "onnx-matmulnbits": "onnxruntime.InferenceSession('{out}/model.onnx')",
    "onnx-genai": "onnxruntime_genai.Model('{out}')",
    "openvino": "openvino.Core().compile_model('{out}/model.xml')",
    "openvino-genai": "openvino_genai.LLMPipeline('{out}', 'CPU')",
    "gguf": "llama-cli -m {out}/model.gguf",
    "compressed-tensors": "transformers.AutoModelForCausalLM.from_pretrained('{out}')",
    "gptq": "gptqmodel.GPTQModel.load('{out}')",
    "mlx": "mlx_lm.generate --model {out}",
    "modelopt": "vllm serve {out}",
}
"""What runs the files of an export, by its format."""


def usual_target(model: str | None) -> tuple[str, str]:
    """Return the target that suits a model best, and why; ``None`` for a module in memory."""
    source = ModelSource.FACTORY if model is None else model_source(model)
    if source is ModelSource.ONNX:
        return "ort-cpu", "an ONNX file stays one: ONNX Runtime runs it on any processor"
    if source is ModelSource.GGUF:
        return "gguf-k", "a GGUF file stays one: llama.cpp runs it"
    config = Path(model or "") / "config.json"
    kind = json.loads(config.read_bytes()).get("model_type") if config.is_file() else None
    if source is ModelSource.FOLDER and kind in ARCHITECTURES:
        return "gguf-k", f"llama.cpp runs {kind} models on any processor; bits differ by layer"
    if source is ModelSource.FOLDER:
        return "ct-vllm-humming", "transformers loads it, vLLM serves it; bits differ by layer"
    return "ort-cpu", "a torch module becomes an ONNX file, which runs without torch"


def unknown_architecture(model_type: str | None) -> str | None:
    """Return why GGUF cannot be written for a model of this type, or ``None`` where it can."""
    if model_type in ARCHITECTURES:
        return None
    return (
        f"GGUF is written here for {', '.join(ARCHITECTURES)}; got '{model_type}': use llama.cpp's "
        "converter and the plan's bit-widths"
    )


def check_format(name: str) -> None:
    """Raise ``InvalidInput`` that lists them unless there is an export format called ``name``."""
    if name not in EXPORT_FORMATS:
        msg = f"an export format must be one of {', '.join(EXPORT_FORMATS)}; got '{name}'"
        raise InvalidInput(msg, format=name)


def format_for(format_name: str | None, target: str | None) -> str:
    """Return the format of an export: as named, or the target's own.

    Raises:
        InvalidInput: Neither is named, or there is no such format or target.
    """
    chosen = None if target is None else target_by_name(target)
    found = format_name or (chosen.exporter if chosen else None)
    if found is None:
        msg = "an export needs a format or a target; got neither"
        raise InvalidInput(msg)
    check_format(found)
    return found


def check_folder(folder: Path) -> None:
    """Raise ``InvalidInput`` unless ``folder`` does not exist yet, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"an export needs a new or empty folder; '{folder}' is not empty: name another"
        raise InvalidInput(msg, folder=str(folder))
