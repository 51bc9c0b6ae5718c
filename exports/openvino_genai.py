"""OpenVINO GenAI: a decoder that keeps keys and values as its state, and tokenizers as models.

The decoder is that of ONNX Runtime GenAI's builder, read by OpenVINO. Its attention nodes have no
place in an IR and become standard operations here; inputs and outputs of the cache become states,
which ``beam_idx`` reorders.

References:
    openvinotoolkit/openvino.genai: src/cpp/src/llm/pipeline_stateful.cpp (names of the inputs)
    microsoft/onnxruntime: ContribOperators (com.microsoft.GroupQueryAttention)

Design: docs/design/targets.md
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bitquota.errors import ExportFailed, InvalidInput, MissingDependency
from bitquota.exports.genai_graph import decoder_graph
from bitquota.exports.hugging_face_folder import copy_other_files, source_folder
from bitquota.exports.openvino_ir import (
    OPTIONS,
    import_openvino,
    put_integers,
    read_back,
)
from bitquota.exports.text_run import run_windows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport

DECODER = "openvino_model"
_PAST, _PRESENT = "past_key_values", "present"
_PLAIN = {
    "rotary_interleaved": False, "smooth_softmax": False, "sliding_window_cache": False,
    "k_quant_type": "NONE", "v_quant_type": "NONE",
}  # fmt: skip
"""Attributes of attention that are left out here, where they have these values."""


class OpenvinoGenai:
    """Writes ``openvino_model.xml``, the tokenizer and its inverse as models, and the config."""

    name = "openvino-genai"
    summary = "A folder for OpenVINO GenAI: a decoder with its cache as state, and its tokenizer."

    @property
    def runs_here(self) -> bool:
        """Whether openvino-genai is there; without it nothing is written either."""
        return importlib.util.find_spec("openvino_genai") is not None

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read types and bytes back, and run it with and without GenAI."""
        ov = import_openvino()
        source = source_folder(prepared.model, self.name)
        if not (source / "tokenizer.json").exists():
            msg = (
                "a folder for OpenVINO GenAI holds the model's tokenizer; there is no "
                f"tokenizer.json in '{source}': add it, or export with --format openvino"
            )
            raise InvalidInput(msg, source=str(source))
        _import_genai()
        graph = decoder_graph(prepared, self.name)

        # Integers for weights, attention in standard operations, the cache as state.
        model = ov.Core().read_model(graph.model.SerializeToString(), b"")
        put_integers(ov, model, prepared, graph.initializer_of, graph.turned)
        head = int(graph.config["model"]["decoder"]["head_size"])
        _keep_cache(ov, model, head)
        path = folder / f"{DECODER}.xml"
        ov.save_model(model, str(path), compress_to_fp16=False)
        copies = [*copy_other_files(source, folder), folder / "config.json"]
        copies[-1].write_bytes((source / "config.json").read_bytes())
        copies += _write_tokenizers(ov, folder)

        # Read back what was written, and run it.
        reports, held = read_back(ov, path, prepared, graph.initializer_of)
        files = [path, path.with_suffix(".bin")]
        report = prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            [*files, *copies],
            reports,
            held_bytes=held,
            runtime={"name": "openvino", "version": ov.__version__, "options": dict(OPTIONS)},
            weight_files=files,
        )
        ran, notes = run_windows(prepared, Genai(folder), folder / "tokenizer.json")
        return replace(report, text_run=ran, notes=(*report.notes, *notes))

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the decoder as a module that runs whole windows with an empty state."""
        del prepared
        return _Decoder(folder)


class Genai:
    """A folder in OpenVINO GenAI, on one thread of the processor.

    Args:
        folder: What ``export`` wrote.

    Raises:
        MissingDependency: openvino-genai is not installed.
        ExportFailed: It does not load the folder.
    """

    name = "openvino-genai"

    def __init__(self, folder: Path) -> None:
        self._genai = _import_genai()
        self.version = str(self._genai.__version__)
        self._decoder = _Decoder(folder)
        try:
            self._tokenizer = self._genai.Tokenizer(str(folder))
            self._pipeline = self._genai.LLMPipeline(
                str(folder), "CPU", **OPTIONS, ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=1
            )
        except Exception as err:  # GenAI raises RuntimeError and its own kinds
            msg = f"OpenVINO GenAI must load the exported folder; it says: {err}"
            raise ExportFailed(msg) from err

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds what a text begins and ends with."""
        found = self._tokenizer.encode(text, add_special_tokens=special).input_ids.data
        return [int(token) for token in found[0]]

    def logits(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """Return logits behind each of ``tokens``, f32[n, tokens known], and the seconds."""
        start = time.perf_counter()
        found = self._decoder(torch.tensor([list(tokens)]))[0]
        return found, time.perf_counter() - start

    def continue_greedily(self, tokens: Sequence[int], n: int) -> tuple[list[int], float]:
        """Return the ``n`` most probable next tokens, and the seconds of all but the first."""
        ov = import_openvino()
        ids = np.array([list(tokens)], dtype=np.int64)
        given = self._genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        settings = self._genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = n, True, False
        settings.set_eos_token_id(0)  # ignored, but one must be known
        said = self._pipeline.generate(given, settings)
        times = said.perf_metrics.raw_metrics.token_infer_durations  # microseconds
        return [int(t) for t in said.tokens[0]], sum(times[1:]) / 1e6


class _Decoder(nn.Module):
    """The decoder in OpenVINO: takes tokens and returns logits as torch does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        ov = import_openvino()
        try:
            compiled = ov.Core().compile_model(str(folder / f"{DECODER}.xml"), "CPU", dict(OPTIONS))
        except RuntimeError as err:
            msg = f"OpenVINO must compile the exported decoder; it says: {err}"
            raise ExportFailed(msg) from err
        self._request = compiled.create_infer_request()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits, zero where ``mask`` is; a mask may leave out the ends of windows only."""
        ids = tokens.numpy().astype(np.int64)
        self._request.reset_state()
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), 0),
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        try:
            logits = torch.from_numpy(np.array(self._request.infer(feed)[0]))
        except RuntimeError as err:
            msg = f"OpenVINO must run the exported decoder; it says: {err}"
            raise ExportFailed(msg) from err
        return logits if mask is None else logits * mask[..., None].to(logits.dtype)


def _keep_cache(ov: Any, model: Any, head: int) -> None:  # noqa: ANN401  # module, openvino.Model
    """Replace attention by standard operations, and inputs and outputs of the cache by states."""
    from openvino._offline_transformations import (
        apply_make_stateful_transformation,
    )

    make = ov.opset13
    inputs = {value.any_name: value for value in model.inputs}
    added = []
    for name, shape, kind in (("position_ids", [-1, -1], np.int64), ("beam_idx", [-1], np.int32)):
        if name not in inputs:
            added.append(make.parameter(shape, kind, name=name))
            added[-1].output(0).set_names({name})
            inputs[name] = added[-1].output(0)
    model.add_parameters(added)
    pairs = {n: n.replace(_PAST, _PRESENT) for n in inputs if n.startswith(_PAST)}
    for name in pairs:
        node, readers = inputs[name].get_node(), inputs[name].get_target_inputs()
        shape = node.get_partial_shape()
        node.set_partial_shape(ov.PartialShape([-1, shape[1], -1, head]))
        reordered = make.gather(node, inputs["beam_idx"], np.int64(0))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    for node in model.get_ordered_ops():
        if node.get_type_name() == "GroupQueryAttention":
            _write_out(ov, node, inputs)
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)

    # A state begins without tokens, for as many samples as are given.
    batch = make.gather(make.shape_of(model.input("input_ids")), np.array([0]), np.int64(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            heads = node.get_output_partial_shape(0)[1].get_length()
            shape = make.concat([batch, np.array([heads, 0, head])], 0)
            node.set_arguments([make.broadcast(np.float32(0), shape).output(0)])
    model.validate_nodes_and_infer_types()


def _write_out(ov: Any, node: Any, inputs: dict[str, Any]) -> None:  # noqa: ANN401  # openvino
    """Replace one GroupQueryAttention.

    Raises:
        ExportFailed: It has attributes that are not written out here.
    """
    make, attributes = ov.opset13, node.get_attributes()
    wrong = {k: attributes[k] for k, v in _PLAIN.items() if attributes.get(k, v) != v}
    if wrong:
        msg = f"attention is written out without {wrong}: export with --target ort-genai"
        raise ExportFailed(msg)
    query, key, value, past_key, past_value, _, _, cos, sin = (
        node.input_value(k) for k in range(9)
    )
    if attributes["do_rotary"]:
        query, key = (_rotated(make, x, cos, sin, inputs["position_ids"]) for x in (query, key))
    keys = make.concat([past_key, key], 2)
    values = make.concat([past_value, value], 2)
    n, kept = attributes["num_heads"], attributes["kv_num_heads"]
    head = query.get_partial_shape()[3].get_length()
    spread = [_spread(make, x, n, kept, head) for x in (keys, values)]
    mask = _mask(make, query, inputs["attention_mask"], attributes["local_window_size"])
    scale = np.float32(attributes["scale"] or head**-0.5)
    found = make.scaled_dot_product_attention(query, *spread, mask, scale)
    found = make.reshape(make.transpose(found, [0, 2, 1, 3]), [0, 0, n * head], special_zero=True)
    for k, made in enumerate((found, keys, values)):
        for reader in node.output(k).get_target_inputs():
            reader.replace_source_output(made.output(0))


def _rotated(make: Any, values: Any, cos: Any, sin: Any, positions: Any) -> Any:  # noqa: ANN401
    """Return ``[batch, heads, n, size]`` turned by its positions; halves lie behind one another.

    Where angles are fewer than half the size, what is behind both halves stays as it is.
    """
    half = cos.get_partial_shape()[1].get_length()
    rest = values.get_partial_shape()[3].get_length() - 2 * half
    cos, sin = (make.unsqueeze(make.gather(x, positions, np.int64(0)), 1) for x in (cos, sin))
    lengths = [half, half, rest] if rest else [half, half]
    first, second, *others = make.variadic_split(values, 3, lengths).outputs()
    turned = [
        make.subtract(make.multiply(first, cos), make.multiply(second, sin)),
        make.add(make.multiply(second, cos), make.multiply(first, sin)),
    ]
    return make.concat([*turned, *others], 3).output(0)


def _spread(make: Any, values: Any, n: int, kept: int, head: int) -> Any:  # noqa: ANN401
    """Return keys or values once for each of the ``n`` heads that share the ``kept`` ones."""
    if n == kept:
        return values
    each = make.unsqueeze(values, 2)
    times = make.broadcast(each, [1, 1, n // kept, 1, 1], broadcast_spec="BIDIRECTIONAL")
    return make.reshape(times, [0, n, -1, head], special_zero=True)


def _mask(make: Any, query: Any, known: Any, window: int) -> Any:  # noqa: ANN401
    """Return 0 where a token sees a key, and minus infinity elsewhere: f32[batch, 1, n, keys].

    Keys are no padding, at or before the token, and less than ``window`` back if it is positive.
    """
    n = make.gather(make.shape_of(query), np.int64(2), np.int64(0))
    total = make.gather(make.shape_of(known), np.int64(1), np.int64(0))
    zero, one = np.int64(0), np.int64(1)
    keys = make.unsqueeze(make.range(zero, total, one, "i64"), 0)
    own = make.unsqueeze(make.range(make.subtract(total, n), total, one, "i64"), 1)
    sees = make.less_equal(keys, own)
    if window > 0:
        sees = make.logical_and(sees, make.greater(keys, make.subtract(own, np.int64(window))))
    real = make.unsqueeze(make.not_equal(known, zero), [1, 2])
    seen = make.logical_and(real, make.unsqueeze(sees, [0, 1]))
    return make.select(seen, np.float32(0), np.float32(-np.inf))


def _write_tokenizers(ov: Any, folder: Path) -> list[Path]:  # noqa: ANN401  # a module
    """Write tokenizer and detokenizer as models; return their files."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer_config.json").exists():
            from transformers import AutoTokenizer

            source = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            source = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        made = convert_tokenizer(source, with_detokenizer=True)
    except Exception as err:  # transformers and the converter raise whatever they meet
        msg = f"openvino-tokenizers must convert the tokenizer; it says: {err}"
        raise ExportFailed(msg) from err
    paths = []
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), made, strict=True):
        path = folder / f"{name}.xml"
        ov.save_model(model, str(path))
        paths += [path, path.with_suffix(".bin")]
    return [path for path in paths if path.exists()]


def _import_genai() -> Any:  # noqa: ANN401  # a module
    try:
        import openvino_genai
        import openvino_tokenizers  # noqa: F401  # converts, and adds its operations
    except ImportError as err:
        msg = f"this export needs openvino-genai ({err}); install it: pip install bitquota[genai]"
        raise MissingDependency(msg) from err
    return openvino_genai
