"""compressed-tensors ``pack-quantized``: a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity
from bitquota.errors import ExportFailed, InvalidInput, InvalidPlan
from bitquota.exports.prepared import widths_must_be
from bitquota.models.huggingface import return_tensor
from bitquota.quantizers.packing import pack

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.quantizers.weights import QuantizedWeight

_WEIGHTS = "model.safetensors"
_KEPT_FILES = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|tokenizer\.model|vocab\.txt|chat_template\.jinja"
)
_BYTES_PER_ELEMENT = {"I32": 4, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


class CompressedTensorsFolder:
    """Writes ``weight_packed``, ``weight_scale``, ``weight_shape`` and a ``quantization_config``.

    Only linear layers can be stored so; the source must be a Hugging Face folder. Other tensors
    keep the type of the checkpoint.
    """

    name = "compressed-tensors"
    summary = "A Hugging Face folder of packed weights for transformers and vLLM (2 to 8 bits)."
    runs_here = True

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every tensor back, load it with transformers and run it."""
        from safetensors.torch import save_file

        source = _source_folder(prepared)
        self._check(prepared)

        # Packed weights, the other tensors, the config and what else the source folder holds.
        tensors: dict[str, Tensor] = {}
        for name, weight in prepared.weights.items():
            tensors |= _layer_tensors(name, weight)
        shapes = {k for k in tensors if k.endswith(".weight_shape")}
        for name, tensor in prepared.unquantized_tensors().items():
            tensors[name] = tensor.detach().contiguous().to(_stored_type(prepared))
        config = _config(source, prepared)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        path = folder / _WEIGHTS
        save_file(tensors, path, metadata={"format": "pt"})
        paths = [path, folder / "config.json"]
        kept = [f for f in sorted(source.iterdir()) if _KEPT_FILES.fullmatch(f.name)]
        paths += [Path(shutil.copy(file, folder / file.name)) for file in kept]

        # Read back what was written.
        reports = []
        sizes = _stored_sizes(path)
        for name in prepared.weights:
            parts = [f"{name}.weight_{p}" for p in ("packed", "scale")]
            bits = _bits_of_layer(config, name)
            reports.append(
                prepared.exported_tensor(
                    name,
                    tensor=f"{name}.weight_packed",
                    stored=f"pack-quantized W{bits}",
                    actual_bits=8 * sum(sizes.get(p, 0) for p in parts),
                )
            )
        held = sum(sizes.values())
        described = sum(sizes[k] for k in shapes)
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            paths,
            reports,
            held_bytes=held - described,
            runtime=_runtime(),
            weight_files=[path],
            notes=("weight_shape and the file's header are counted as container",),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Load the folder with transformers, as a user would, in float32."""
        import transformers

        kind = getattr(transformers, prepared.model.architecture)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            with redirect_stderr(io.StringIO()):  # progress bars of compressed-tensors
                model: nn.Module = kind.from_pretrained(
                    str(folder),
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                )
                if prepared.model.example_inputs is not None:
                    # Weights are unpacked at the first pass, with a progress bar of its own.
                    with torch.no_grad():
                        model(prepared.model.example_inputs[0][:1])
        except Exception as err:  # whatever transformers raises, the folder did not load
            msg = f"transformers must load the exported folder; it says: {err}"
            raise ExportFailed(msg) from err
        finally:
            transformers.logging.set_verbosity(verbosity)
        return return_tensor(model.eval())

    @staticmethod
    def _check(prepared: PreparedExport) -> None:
        widths_must_be(prepared, (1, 2, 3, 4, 5, 6, 7, 8), "compressed-tensors")
        wrong = [
            name
            for name, w in prepared.weights.items()
            if prepared.layers[name].kind is not LayerKind.LINEAR
            or w.scheme.row_alignment_bits != 32
            or w.scheme.granularity is Granularity.TENSOR
            or w.bits == 1
            or w.zero_points is not None
        ]
        if wrong:
            msg = (
                "compressed-tensors stores linear layers in rows of 32-bit words, symmetric, with "
                f"scales per channel or group; {', '.join(wrong[:8])} are planned otherwise: plan "
                "with --target ct-vllm-humming"
            )
            raise InvalidPlan(msg, layers=wrong)


def _source_folder(prepared: PreparedExport) -> Path:
    source = prepared.model.folder
    if source is None:
        msg = (
            "compressed-tensors needs a Hugging Face folder as the model, whose config it extends; "
            f"got '{prepared.model.source}': export with ref-int or onnx-qdq instead"
        )
        raise InvalidInput(msg, source=prepared.model.source)
    return source


def _layer_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    rows, columns = weight.codes.shape
    packed = pack(weight)
    return {
        f"{name}.weight_packed": torch.from_numpy(packed.codes.view("<i4")).reshape(rows, -1),
        f"{name}.weight_scale": weight.scales.contiguous(),
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _config(source: Path, prepared: PreparedExport) -> JsonObject:
    config: JsonObject = json.loads((source / "config.json").read_text())
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in prepared.weights.items():
        scheme = weight.scheme
        groups.setdefault((weight.bits, scheme.group_size or 0), []).append(name)
    described = {}
    for k, (key, names) in enumerate(sorted(groups.items())):
        bits, size = key
        described[f"group_{k}"] = {
            "targets": sorted(names),
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if size else "channel",
                "group_size": size or None,
                "dynamic": False,
                "observer": "minmax",
            },
        }
    linear = {
        name
        for name, module in prepared.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": sorted(linear - set(prepared.weights)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config


def _bits_of_layer(config: JsonObject, name: str) -> int:
    for group in config["quantization_config"]["config_groups"].values():
        if name in group["targets"]:
            return int(group["weights"]["num_bits"])
    msg = f"layer '{name}' must belong to a group of the written config; it does not"
    raise ExportFailed(msg, layer=name)


def _stored_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor from the file's own header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: item["data_offsets"][1] - item["data_offsets"][0]
        for name, item in header.items()
        if name != "__metadata__"
    }


def _stored_type(prepared: PreparedExport) -> torch.dtype:
    source = json.loads((_source_folder(prepared) / "config.json").read_text())
    name = str(source.get("dtype") or source.get("torch_dtype") or "float32")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)


def _runtime() -> JsonObject:
    from importlib.metadata import version

    return {
        "name": "transformers",
        "version": version("transformers"),
        "options": {"dtype": "float32"},
        "compressed-tensors": version("compressed-tensors"),
    }
