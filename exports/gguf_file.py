"""GGUF: plain and K blocks written in Python, and a recipe for llama.cpp's own tool."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import ExportFailed, InvalidInput
from bitquota.exports.gguf_blocks import blocks_of, type_name
from bitquota.exports.gguf_metadata import add_metadata, rope_of, window_notes
from bitquota.exports.gguf_tokenizer import add_tokenizer
from bitquota.exports.hugging_face_folder import source_folder
from bitquota.exports.llama_cpp import MISSING, installed, run_text
from bitquota.exports.names import unknown_architecture
from bitquota.models.gguf_names import (
    ARCHITECTURES,
    ROPE_FACTORS,
    gguf_names,
    gguf_package,
    row_order,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport

FILE = "model.gguf"
RECIPE = "tensor-types.txt"


class GgufFile:
    """Writes ``model.gguf`` and the recipe ``tensor-types.txt``.

    Blocks are symmetric groups of 32 with fp16 scales, or super-blocks of 256, which is what these
    types are, so the file holds the plan's own codes and scales.
    """

    name = "gguf"
    summary = "GGUF with Q2_K to Q6_K, Q4_0, Q5_0, Q8_0, and a --tensor-type-file for llama.cpp."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the file, read every type and value back, run the dequantized model in torch."""
        gguf = gguf_package()
        config = _config(prepared)
        names = gguf_names(prepared.module.state_dict(), config)
        path = folder / FILE
        # Tensors wait in a file for what stands before them; gguf's own would fill memory first.
        with tempfile.TemporaryFile(dir=folder) as waiting:
            recipe, folder_notes = self._write(prepared, folder, waiting, config, names)
        (folder / RECIPE).write_text("\n".join(recipe) + "\n")

        # Read back what was written.
        reader = gguf.GGUFReader(str(path))
        tensors = {t.name: t for t in reader.tensors}
        reports = []
        for name, weight in prepared.weights.items():
            target = names[prepared.layers[name].weight_name]
            found = tensors.get(target)
            if found is None or found.tensor_type.name != type_name(weight):
                got = "nothing" if found is None else found.tensor_type.name
                msg = f"'{target}' must be stored as {type_name(weight)}; the file has {got}"
                raise ExportFailed(msg, layer=name)
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=target,
                    stored=found.tensor_type.name,
                    actual_bits=int(found.n_bytes) * 8,
                )
            )
        held = sum(int(t.n_bytes) for t in reader.tensors)
        # Run it, with the tokenizer if it has one.
        ran = None
        if installed():
            source = (
                None if folder_notes else source_folder(prepared.model, "gguf") / "tokenizer.json"
            )
            ran, run_notes = run_text(prepared, path, source)
            folder_notes += run_notes
        else:
            folder_notes += (MISSING,)
        report = prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            [path, folder / RECIPE],
            reports,
            held_bytes=held,
            runtime={"name": "torch on dequantized tensors", "version": torch.__version__},
            weight_files=[path],
            notes=(
                *folder_notes,
                "llama.cpp also quantizes activations to 8 bits",
                *window_notes(config),
            ),
        )
        return replace(report, text_run=ran)

    @staticmethod
    def _write(
        prepared: PreparedExport,
        folder: Path,
        waiting: IO[bytes],
        config: JsonObject,
        names: Mapping[str, str],
    ) -> tuple[list[str], tuple[str, ...]]:
        """Write ``model.gguf``; returns the lines of the recipe, and notes on the tokenizer."""
        gguf = gguf_package()
        architecture = ARCHITECTURES[config["model_type"]]
        rope = rope_of(prepared.module, config, architecture)
        writer = gguf.GGUFWriter(str(folder / FILE), architecture, use_temp_file=True)
        writer.temp_file = waiting
        add_metadata(writer, config, rope)
        notes = add_tokenizer(writer, source_folder(prepared.model, "gguf"), config["vocab_size"])

        # Quantized weights, in the order of rows that llama.cpp expects.
        recipe = []
        for name, weight in prepared.weights.items():
            layer = prepared.layers[name]
            order = row_order(layer.weight_name, config)
            kind = type_name(weight)
            target = names[layer.weight_name]
            writer.add_tensor(
                target, blocks_of(weight, order), raw_dtype=gguf.GGMLQuantizationType[kind]
            )
            recipe.append(f"^{re.escape(target)}$={kind.lower()}")

        # Every other tensor, in float32.
        tied = bool(config.get("tie_word_embeddings"))
        for name, tensor in prepared.unquantized_tensors().items():
            if name.endswith("inv_freq") or (tied and name == "lm_head.weight"):
                continue
            values = tensor.detach().float().cpu().numpy()
            order = row_order(name, config)
            if order is not None:
                values = values[order]
            writer.add_tensor(names[name], np.ascontiguousarray(values))
            if values.ndim > 1:
                recipe.append(f"^{re.escape(names[name])}$=f32")
        if rope.factors is not None:
            writer.add_tensor(ROPE_FACTORS, rope.factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return recipe, notes

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return a copy of the model with every tensor dequantized from the file."""
        gguf = gguf_package()
        config = _config(prepared)
        back = {v: k for k, v in gguf_names(prepared.module.state_dict(), config).items()}

        def read(found: Any, name: str) -> Tensor:  # noqa: ANN401  # a tensor of gguf's reader
            values = gguf.quants.dequantize(found.data, found.tensor_type)
            order = row_order(name, config)
            if order is not None:
                values = values[np.argsort(order)]
            shape = prepared.module.get_parameter(name).shape
            return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)

        found = gguf.GGUFReader(str(folder / FILE)).tensors
        named = {back[t.name]: t for t in found if t.name != ROPE_FACTORS}
        return prepared.with_tensors({name: partial(read, t, name) for name, t in named.items()})


def _config(prepared: PreparedExport) -> JsonObject:
    config: JsonObject = json.loads(
        (source_folder(prepared.model, "gguf") / "config.json").read_text()
    )
    model_type = config.get("model_type")
    if refused := unknown_architecture(model_type):
        raise InvalidInput(refused, model_type=model_type)
    return config
