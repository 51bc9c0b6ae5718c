"""ONNX Runtime GenAI: a decoder with a cache, MatMulNBits of 2, 4 and 8 bits, and its tokenizer.

Embeddings are looked up in the same blocks (GatherBlockQuantized), which a tied output layer
shares.

Design: docs/design/targets.md
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.errors import ExportFailed, MissingDependency
from bitquota.exports.genai_graph import CONFIG, decoder_graph
from bitquota.exports.hugging_face_folder import copy_other_files, source_folder
from bitquota.exports.onnx_editor import GraphEditor, n_bytes
from bitquota.exports.onnx_qdq import FILE, read_back, runtime, save_model
from bitquota.exports.text_run import run_windows
from bitquota.models.onnx.reading import read_onnx
from bitquota.models.onnx.sessions import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport

_TOKENIZER = "tokenizer.json"


class GenaiFolder:
    """Writes ``model.onnx``, ``genai_config.json`` and the source's tokenizer."""

    name = "onnx-genai"
    summary = "A folder for ONNX Runtime GenAI: a decoder with its cache, MatMulNBits, tokenizer."

    @property
    def runs_here(self) -> bool:
        """Whether onnxruntime-genai is there; without it nothing is written either."""
        return importlib.util.find_spec("onnxruntime_genai") is not None

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the folder, read every code back, and run it: the graph, and then GenAI itself."""
        graph = decoder_graph(prepared, self.name)

        # Put blocks of integers in the place of every weight.
        editor = GraphEditor(graph.model)
        for name, weight in prepared.weights.items():
            layer = prepared.layers[name]
            if name in graph.turned:
                layer = replace(layer, kind=LayerKind.LINEAR_TRANSPOSED)
            if not editor.multiply_blocks(graph.initializer_of[name], layer, weight):
                msg = f"only products and look-ups may read the weight of layer '{name}'"
                raise ExportFailed(msg, layer=name)
        path = folder / FILE
        files = save_model(editor.finish(), path)
        config = folder / CONFIG
        config.write_text(json.dumps(graph.config, indent=2, sort_keys=True) + "\n")
        copies = copy_other_files(source_folder(prepared.model, self.name), folder)
        tokenizer, settings = folder / _TOKENIZER, folder / "tokenizer_config.json"
        if tokenizer.exists() and not settings.exists():
            settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
            copies.append(settings)

        # Read back what was written, and run it.
        names = {name: editor.names[graph.initializer_of[name]] for name in prepared.weights}
        reports = tuple(
            prepared.exported_tensor(
                name,
                tensor=names[name][0],
                stored=stored,
                actual_bits=bits,
            )
            for name, (stored, bits) in read_back(path, prepared, names).items()
        )
        report = prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            [*files, config, *copies],
            reports,
            held_bytes=sum(n_bytes(t) for t in read_onnx(path).graph.initializer),
            runtime=runtime() | {"options": {}},
            weight_files=files,
        )
        known = tokenizer if tokenizer.exists() else None
        ran, notes = run_windows(prepared, Genai(folder), known)
        return replace(report, text_run=ran, notes=(*report.notes, *notes))

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the decoder as a module that runs whole windows with an empty cache."""
        del prepared
        return _Decoder(folder)


class Genai:
    """A folder in ONNX Runtime GenAI, on one thread of the processor.

    Args:
        folder: What ``export`` wrote.

    Raises:
        MissingDependency: onnxruntime-genai is not installed.
        ExportFailed: It does not load the folder.
    """

    name = "onnxruntime-genai"

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime_genai
        except ImportError as err:
            msg = "these files need onnxruntime-genai: pip install bitquota[genai]"
            raise MissingDependency(msg) from err
        self._genai = onnxruntime_genai
        self.version = str(onnxruntime_genai.__version__)
        self._longest = int(json.loads((folder / CONFIG).read_text())["model"]["context_length"])
        try:
            given = onnxruntime_genai.Config(str(folder))
            given.overlay(json.dumps({"model": {"decoder": {"session_options": _ONE_THREAD}}}))
            self._model = onnxruntime_genai.Model(given)
            self._tokenizer = None
            if (folder / _TOKENIZER).exists():
                self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        except Exception as err:  # GenAI raises RuntimeError and its own kinds
            msg = f"ONNX Runtime GenAI must load the exported folder; it says: {err}"
            raise ExportFailed(msg) from err

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds what a text begins and ends with."""
        assert self._tokenizer is not None  # noqa: S101  # for types: asked only where one is
        self._tokenizer.update_options(add_special_tokens=str(special).lower())
        return [int(token) for token in self._tokenizer.encode(text)]

    def logits(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """Return logits behind each of ``tokens``, f32[n, tokens known], and the seconds."""
        generator = self._generator(len(tokens) + 1)
        start = time.perf_counter()
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        seconds = time.perf_counter() - start
        return torch.from_numpy(np.array(generator.get_output("logits")[0], np.float32)), seconds

    def continue_greedily(self, tokens: Sequence[int], n: int) -> tuple[list[int], float]:
        """Return the ``n`` most probable next tokens, and the seconds of all but the first."""
        given = list(tokens)[: max(1, self._longest - n)]
        generator = self._generator(len(given) + n)
        generator.append_tokens(np.array(given, dtype=np.int32))
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(n - 1):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        return [int(token) for token in generator.get_sequence(0)[len(given) :]], seconds

    def _generator(self, length: int) -> Any:  # noqa: ANN401  # of GenAI
        options = self._genai.GeneratorParams(self._model)
        # A text goes on behind its end: what is asked for is a number of tokens.
        length = min(length, self._longest)
        options.set_search_options(do_sample=False, max_length=length, min_length=length)
        return self._genai.Generator(self._model, options)


_ONE_THREAD: JsonObject = {"intra_op_num_threads": 1}


class _Decoder(nn.Module):
    """The decoder in ONNX Runtime: takes tokens and returns logits as torch does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        decoder = json.loads((folder / CONFIG).read_text())["model"]["decoder"]
        self._head = int(decoder["head_size"])
        path = folder / FILE
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # onnxruntime raises its own kinds
            msg = f"ONNX Runtime must run the exported decoder; it says: {err}"
            raise ExportFailed(msg) from err

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits, zero where ``mask`` is; a mask may leave out the ends of windows only."""
        ids = tokens.numpy().astype(np.int64)
        n, length = ids.shape
        whole = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(length)[None].repeat(n, 0),
        }
        feed = {
            given.name: whole[given.name]
            if given.name in whole
            # Keys and values of no token: [batch, heads, 0, size of a head].
            else np.zeros((n, given.shape[1], 0, self._head), np.float32)
            for given in self._session.get_inputs()
        }
        try:
            logits = torch.from_numpy(self._session.run(["logits"], feed)[0])
        except Exception as err:  # as above
            msg = f"ONNX Runtime must run the exported decoder; it says: {err}"
            raise ExportFailed(msg) from err
        return logits if mask is None else logits * mask[..., None].to(logits.dtype)
