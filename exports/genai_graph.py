"""The graph of a decoder that keeps keys and values, as ONNX Runtime GenAI's builder writes it.

The builder writes the float model (attention as GroupQueryAttention, inputs and outputs of the
cache) and ``genai_config.json``. It gets the plan's model, so each weight of the plan is in its
graph value for value, as it is or transposed: that is how layers and initializers are matched,
without the builder's names.

References:
    microsoft/onnxruntime-genai: src/python/py/models/builder.py (create_model)

Design: docs/design/targets.md
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitquota.errors import ExportFailed, InvalidPlan, MissingDependency
from bitquota.exports.hugging_face_folder import copy_other_files, source_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.canonical import JsonObject
    from bitquota.exports.prepared import PreparedExport

CONFIG = "genai_config.json"
_TOKENIZER = "tokenizer.json"


class DecoderGraph(NamedTuple):
    """A decoder with a cache, before it is quantized.

    Attributes:
        model: ``onnx.ModelProto`` with its tensors.
        initializer_of: The weight of each quantized layer.
        turned: Layers whose initializer is ``[columns, rows]``.
        config: ``genai_config.json``.
    """

    model: Any
    initializer_of: dict[str, str]
    turned: frozenset[str]
    config: JsonObject


def decoder_graph(prepared: PreparedExport, what: str) -> DecoderGraph:
    """Return the decoder of a prepared plan of a Hugging Face folder.

    Args:
        prepared: The plan and its model.
        what: The export that needs it, for messages.

    Raises:
        InvalidInput: The model is no Hugging Face folder.
        MissingDependency: onnxruntime-genai is not installed.
        ExportFailed: The builder refuses the model, or leaves out its sliding window.
        InvalidPlan: It changes a weight of the plan.
    """
    source = source_folder(prepared.model, what)
    builder = _builder()
    import onnx

    with tempfile.TemporaryDirectory() as temporary:
        given, made = Path(temporary) / "model", Path(temporary) / "onnx"
        given.mkdir()
        _write_model(source, prepared, given)
        options = ["disable_qkv_fusion=true", "hf_remote=false"]
        with _quietly() as said:
            try:
                arguments = ("", str(given), str(made), "fp32", "cpu", str(given))
                parsed = builder.parse_extra_options(*arguments, options)
                builder.create_model(*arguments, **parsed)
            except Exception as err:  # the builder raises whatever it meets
                msg = f"ONNX Runtime GenAI's builder must take the model; it says: {err}"
                raise ExportFailed(msg, said=said.getvalue()[-400:]) from err
        model = onnx.load(str(made / "model.onnx"))
        config: JsonObject = json.loads((made / CONFIG).read_text())
    _check_window(model, prepared)
    names, turned = matched(model, prepared)
    return DecoderGraph(model, names, turned, config)


def _builder() -> Any:  # noqa: ANN401  # a module
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao, which transformers imports, where it is installed
    try:
        import onnxruntime_genai.models.builder as found
    except ImportError as err:
        msg = (
            f"this export needs onnxruntime-genai ({err}); install it with: "
            "pip install bitquota[genai]"
        )
        raise MissingDependency(msg) from err
    finally:
        logging.disable(level)
    return found


def _write_model(source: Path, prepared: PreparedExport, folder: Path) -> None:
    """Write the plan's model in float32 as transformers loads it."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    kept: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in prepared.module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in kept:
            tensors[name] = tensor.detach().float().contiguous()
        kept.add(key)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    copy_other_files(source, folder)
    if not (folder / _TOKENIZER).exists():  # the builder asks for one, of any kind
        Tokenizer(models.BPE()).save(str(folder / _TOKENIZER))


@contextmanager
def _quietly() -> Iterator[io.StringIO]:
    """Keep the builder's account of its steps, and keep it from any network."""
    said, before = io.StringIO(), os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(level)
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _check_window(model: Any, prepared: PreparedExport) -> None:  # noqa: ANN401
    """Raise ``ExportFailed`` where the model has a sliding window and its graph has none."""
    config = getattr(prepared.module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return
    kept = {
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "local_window_size"
    }
    if not any(size > 0 for size in kept):
        msg = (
            f"the model's attention must see {window:,} tokens back, as its sliding_window says; "
            "ONNX Runtime GenAI's builder leaves that out for this family: set sliding_window to "
            "null in config.json if texts stay shorter, or export with gguf or onnx-matmulnbits"
        )
        raise ExportFailed(msg, window=window)


def matched(
    model: Any,  # noqa: ANN401  # onnx.ModelProto
    prepared: PreparedExport,
) -> tuple[dict[str, str], frozenset[str]]:
    """Return the initializer of each quantized layer, and which hold ``[columns, rows]``.

    Args:
        model: With the tensors of its weights.
        prepared: The plan, whose model's weights are looked for.

    Raises:
        InvalidPlan: The model has no such weight.
        ExportFailed: It has one twice.
    """
    import onnx

    held: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 2 and values.dtype == np.float32:
            held.setdefault(_key(values), []).append(tensor.name)
    names: dict[str, str] = {}
    turned: set[str] = set()
    for name in prepared.weights:
        owner, _, leaf = prepared.layers[name].weight_name.rpartition(".")
        weight = getattr(prepared.module.get_submodule(owner), leaf).detach().float().numpy()
        straight, across = held.get(_key(weight), []), held.get(_key(weight.T), [])
        if straight and (across and straight is not across):
            msg = f"the weight of layer '{name}' must be in the decoder's graph once; it is twice"
            raise ExportFailed(msg, layer=name)
        if not straight and not across:
            msg = (
                f"the graph of ONNX Runtime GenAI's builder must hold the weight of '{name}' "
                "as it is; it does not: exclude the layer, or export with onnx-matmulnbits"
            )
            raise InvalidPlan(msg, layer=name)
        if not straight:
            turned.add(name)
        names[name] = (straight or across).pop(0)
    return names, frozenset(turned)


def _key(values: NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()
    return values.shape, digest
