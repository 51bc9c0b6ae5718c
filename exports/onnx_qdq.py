"""ONNX with quantized initializers: DequantizeLinear in front of the layers' weights.

The graph is the user's own file, or what ``torch.onnx.export`` makes of the module; only weights
are replaced. Types are int2 (opset 25), int4 (opset 21), int8 and int16, unsigned with zero points
on asymmetric grids; codebooks are looked up by Gather. ONNX Runtime turns blocked matrix products
into MatMulNBits.

Design: docs/design/targets.md
"""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bitquota.candidates.storage import PRUNED_BITS
from bitquota.errors import ExportFailed, InvalidInput, MissingDependency
from bitquota.exports.onnx_blocks import BLOCKS, fits_blocks, packed_blocks
from bitquota.exports.onnx_editor import GraphEditor, n_bytes
from bitquota.exports.onnx_inputs import INTEGER_BITS, multiplies_integers, quantize_inputs
from bitquota.exports.onnx_tidy import absorb_batch_norms, fold_constants, shorten_names
from bitquota.models.onnx.folding import restore_types
from bitquota.models.onnx.module import OnnxModule
from bitquota.models.onnx.program import source_of
from bitquota.models.onnx.reading import read_normalized, read_onnx
from bitquota.models.onnx.sessions import import_onnxruntime
from bitquota.models.pt2.module import dynamic_axes
from bitquota.quantizers.activations import ActivationQuantizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.models.onnx.program import OnnxSource

FILE = "model.onnx"
OPSET = 21
OPSET_2_BITS = 25
MAX_INLINE_BYTES = 2**31 - 2**27
"""Bytes of tensors up to which a file holds them itself; protobuf ends at 2 GiB."""

_LARGE = 2**16
"""Bytes from which no tensor is a shape or an axis."""

SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""At its default level 4 ONNX Runtime quantizes the activations of matrix products to int8."""


class OnnxQdq:
    """Writes ``model.onnx`` with weights as 2, 4, 8 or 16-bit initializers.

    Attributes:
        blocked: Whether matrix products with blocks become MatMulNBits nodes.
    """

    name = "onnx-qdq"
    summary = "ONNX with quantized weights and DequantizeLinear, run by ONNX Runtime."
    runs_here = True
    holds_inputs = ActivationQuantizer
    blocked = False

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the file, read every code back, run it in ONNX Runtime."""
        two_bits = any(
            2 in (w.scheme.row_bits or (w.bits,))
            and not (self.blocked and fits_blocks(prepared.layers[name], w))
            for name, w in prepared.weights.items()
        )
        graph = float_graph(prepared, OPSET_2_BITS if two_bits else OPSET)
        model, initializer_of = graph.model, graph.initializer_of
        prepared = prepared.without(graph.unused)
        weights = prepared.weights
        traced = not isinstance(prepared.module, OnnxModule)
        if traced:
            stored = {name: weight for name, weight in weights.items() if weight.bits}
            weights = {
                **weights,
                **absorb_batch_norms(model, stored, prepared.layers, initializer_of),
            }

        # Put integers and their dequantization in the place of every weight.
        grids = {
            n: g
            for n, g in prepared.activations.items()
            if n in initializer_of and isinstance(g, ActivationQuantizer)
        }
        quantize_inputs(model, grids, initializer_of)
        editor = GraphEditor(model)
        for name, weight in weights.items():
            initializer, layer = initializer_of[name], prepared.layers[name]
            if weight.bits == PRUNED_BITS:
                editor.leave_out(initializer)
                continue
            if not (self.blocked and editor.multiply_blocks(initializer, layer, weight)):
                integers = multiplies_integers(weight, grids.get(name))
                editor.quantize(initializer, layer, weight, widened=integers)
        model = editor.finish()
        if traced:
            shorten_names(model.graph)
        path = folder / FILE
        files = save_model(model, path)

        # Read back what was written.
        sizes = read_back(
            path, prepared, {name: editor.names[initializer_of[name]] for name in weights}
        )
        reports = tuple(
            prepared.exported_tensor(
                name,
                tensor=next(iter(editor.names[initializer_of[name]]), initializer_of[name]),
                stored=stored,
                actual_bits=bits,
            )
            for name, (stored, bits) in sizes.items()
        )
        held = sum(n_bytes(t) for t in read_onnx(path).graph.initializer)
        return prepared.report(
            self.name,
            self.load(prepared, folder),
            folder,
            files,
            reports,
            held_bytes=held,
            runtime=runtime(),
            notes=_notes(grids),
        )

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the file as a module that runs in ONNX Runtime."""
        return OnnxFile(folder / FILE, source_of(prepared.module))


class OnnxMatMulNBits(OnnxQdq):
    """Writes blocked matrix products as MatMulNBits of ``com.microsoft``, the rest as QDQ.

    ONNX Runtime fuses QDQ into the same node by itself; written out, the file needs no fusion, and
    runtimes that know no 2-bit or 4-bit tensors read its bytes.
    """

    name = "onnx-matmulnbits"
    summary = "ONNX with MatMulNBits for blocked matrix products, for ONNX Runtime."
    blocked = True


class OnnxFile(nn.Module):
    """An ONNX file run as it is, with the session options of its report.

    Args:
        path: The file.
        source: The graph that it was made of, if it was one: inputs go by its names and in its
            fixed batch, and its output is returned.
    """

    def __init__(self, path: Path, source: OnnxSource | None = None) -> None:
        super().__init__()
        self._source = source
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        for key, value in SESSION_OPTIONS.items():
            options.add_session_config_entry(key, value)
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # onnxruntime raises its own kinds
            msg = f"ONNX Runtime must run the exported file; it says: {err}"
            raise ExportFailed(msg) from err
        self._types = {
            "tensor(float)": np.float32,
            "tensor(int64)": np.int64,
            "tensor(int32)": np.int32,
            "tensor(float16)": np.float16,
        }

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the file and return its primary output."""
        found = self.all_outputs(*inputs)
        return next(iter(found.values())) if self._source is None else found[self._source.output]

    def all_outputs(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the file and return every output by name."""
        names = [value.name for value in self._session.get_outputs()]
        if self._source is not None:
            parts = [self._session.run(None, p) for p in self._source.pieces(inputs)]
            whole = [
                np.concatenate(k) if len(parts) > 1 else k[0] for k in zip(*parts, strict=True)
            ]
            n = len(inputs[0])
            values = [v[:n] if v.ndim else v for v in whole]
            values = [v.astype(np.float32) if v.dtype.kind == "f" else v for v in values]
            return {k: torch.from_numpy(v) for k, v in zip(names, values, strict=True)}
        feed = {
            given.name: tensor.detach().cpu().numpy().astype(self._types[given.type])
            for given, tensor in zip(self._session.get_inputs(), inputs, strict=True)
        }
        values = self._session.run(None, feed)
        return {k: torch.from_numpy(v) for k, v in zip(names, values, strict=True)}


class FloatGraph(NamedTuple):
    """A graph with the corrected weights in floating point.

    Attributes:
        model: ``onnx.ModelProto``.
        initializer_of: The weight of each layer.
        unused: Layers to quantize whose weights no node reads, so that the graph lacks them.
    """

    model: Any
    initializer_of: dict[str, str]
    unused: tuple[str, ...]


def float_graph(prepared: PreparedExport, opset: int) -> FloatGraph:
    """Return the graph of a prepared plan, at ``opset`` or above, before it is quantized.

    Raises:
        InvalidInput: The model is no ONNX file and there is no sample to trace it with.
        ExportFailed: torch cannot express the model in ONNX, or a weight got lost on the way.
    """
    unread: frozenset[str] = frozenset()
    if isinstance(prepared.module, OnnxModule):
        graph = read_normalized(Path(prepared.model.source))
        model = graph.model
        initializer_of = {la.name: la.initializer for la in prepared.module.onnx_layers}
        _write_back(model, prepared.module)
        written = {initializer_of[name] for name in prepared.weights if name in initializer_of}
        restore_types(model, {k: v for k, v in graph.stored.items() if k not in written})
    else:
        model, unread = _traced_once(prepared)
        held = {t.name for t in model.graph.initializer}
        initializer_of = {}
        for name, layer in prepared.layers.items():
            names = [n for n in (layer.weight_name, *layer.aliases) if n in held]
            if names:
                initializer_of[name] = names[0]
    missing = sorted(set(prepared.weights) - set(initializer_of))
    layers = prepared.layers
    unused = [n for n in missing if unread.issuperset([layers[n].weight_name, *layers[n].aliases])]
    if lost := sorted(set(missing) - set(unused)):
        msg = f"every planned weight must be an initializer of the ONNX graph; {lost[0]} is not"
        raise ExportFailed(msg, layers=lost)
    return FloatGraph(at_opset(model, opset), initializer_of, tuple(unused))


def at_opset(model: Any, opset: int) -> Any:  # noqa: ANN401  # onnx.ModelProto
    """Return ``model`` at ``opset`` or above."""
    import onnx

    current = next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
    if current >= opset:
        return model
    # The converter takes at most 2 GiB and reads no weights: large ones stand aside as inputs.
    graph = model.graph
    large = [t for t in graph.initializer if n_bytes(t) > _LARGE]
    small = [t for t in graph.initializer if n_bytes(t) <= _LARGE]
    declared = {v.name for v in graph.input}
    added = {t.name for t in large} - declared
    del graph.initializer[:]
    graph.initializer.extend(small)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in large
        if t.name in added
    )
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the converter raises RuntimeError and others
        msg = f"the graph cannot be converted from opset {current} to {opset}: {err}"
        raise ExportFailed(msg, opset=opset) from err
    inputs = [v for v in converted.graph.input if v.name not in added]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.graph.initializer.extend(large)
    return converted


def save_model(model: Any, path: Path) -> list[Path]:  # noqa: ANN401  # onnx.ModelProto
    """Write the model; its tensors go to a file beside it if they are too many for protobuf."""
    import onnx

    if sum(n_bytes(t) for t in model.graph.initializer) < MAX_INLINE_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return [path]
    data = path.with_name(f"{path.name}.data")
    onnx.save_model(
        model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024
    )
    return [path, data]


def runtime() -> JsonObject:
    """Return what runs ONNX files here, and with which options."""
    ort = import_onnxruntime()
    return {"name": "onnxruntime", "version": ort.__version__, "options": dict(SESSION_OPTIONS)}


def _notes(grids: Mapping[str, ActivationQuantizer]) -> tuple[str, ...]:
    """Return what a user should know of inputs on grids that have no type of their width."""
    odd = sorted({g.bits for g in grids.values()} - {INTEGER_BITS, 2 * INTEGER_BITS})
    if not odd:
        return ()
    widths = " and ".join(map(str, odd))
    return (f"inputs of {widths} bits are held in the next type of 8 or 16 bits while it runs",)


def read_back(
    path: Path, prepared: PreparedExport, names: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, int]]:
    """Return what the file holds for each layer, after comparing every code.

    ``names`` are the tensors of each layer, the codes of its parts first.
    """
    import onnx

    held = {t.name: t for t in read_onnx(path).graph.initializer}
    found = {}
    for name, weight in prepared.weights.items():
        parts = [part for _, part in weight.parts() if part.bits != PRUNED_BITS]
        stored = []
        for codes, part in zip(names[name], parts, strict=False):  # codes come first
            values = onnx.numpy_helper.to_array(held[codes]).astype(np.int64)
            expected = part.codes.cpu().numpy().astype(np.int64)
            if codes.endswith(BLOCKS):
                expected = packed_blocks(part).astype(np.int64)
            # The same numbers in some arrangement: order is proved by running the file.
            same = np.array_equal(np.sort(values, axis=None), np.sort(expected, axis=None))
            if not same or values.size != expected.size:
                msg = f"layer '{name}' does not read back as it was written"
                raise ExportFailed(msg, layer=name)
            kind = onnx.TensorProto.DataType.Name(held[codes].data_type).lower()
            if codes.endswith(BLOCKS):
                kind = f"MatMulNBits of {part.bits} bits"
            stored.append(f"{kind} {'x'.join(map(str, held[codes].dims))}")
        bits = 8 * sum(n_bytes(held[tensor]) for tensor in names[name])
        found[name] = (", ".join(stored) or "zeros", bits)
    return found


def _traced_once(prepared: PreparedExport) -> tuple[Any, frozenset[str]]:
    """Return ``_trace``, or a copy of what it returned for an earlier export of the same module."""
    kept = prepared.traced
    if kept is None:
        return _trace(prepared)
    if not kept:
        model, unread = _trace(prepared)
        kept |= {"model": model.SerializeToString(), "unread": unread}
    import onnx

    return onnx.ModelProto.FromString(kept["model"]), kept["unread"]


def _trace(prepared: PreparedExport) -> tuple[Any, frozenset[str]]:
    """Return the graph that torch makes of the module, and the parameters that it never reads."""
    inputs = prepared.inputs or prepared.model.example_inputs
    if inputs is None:
        msg = "a model that is not an ONNX file must be traced with a sample: provide samples"
        raise InvalidInput(msg)
    example = tuple(t[:2] for t in inputs)
    tokens = all(not t.is_floating_point() and t.ndim > 1 for t in example)
    axes = {0: torch.export.Dim.DYNAMIC}
    if tokens:
        axes[1] = torch.export.Dim.AUTO  # a model may fix the length
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so less clearly

        with _quiet():
            program = torch.onnx.export(
                prepared.module,
                example,
                dynamo=True,
                optimize=False,
                dynamic_shapes=dynamic_axes(prepared.module, len(example), axes),
                opset_version=OPSET,
                verbose=False,
                output_names=["logits"],
            )
    except ImportError as err:
        msg = "exporting a torch model to ONNX needs onnxscript: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    except Exception as err:  # the exporter raises whatever it meets
        msg = f"torch.onnx must be able to export the model; it says: {err}"
        raise ExportFailed(msg) from err
    if program is None or program.exported_program is None:
        msg = "torch.onnx must return a program; it returned none"
        raise ExportFailed(msg)
    exported = program.exported_program
    parameters = exported.graph_signature.inputs_to_parameters
    read = {
        parameters[node.name]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in parameters and node.users
    }
    # torch leaves some that are not read out of the signature, and others in.
    unread = {n for n, _ in prepared.module.named_parameters(remove_duplicate=False)} - read
    # A length that the model fixes is a symbol of one value to torch, and should be that value.
    fixed = {
        str(symbol): int(values.lower)
        for symbol, values in exported.range_constraints.items()
        if values.lower == values.upper
    }
    for given in program.model.graph.inputs:
        for axis, size in enumerate(given.shape):
            given.shape[axis] = fixed.get(str(size), size)
    with _quiet():
        return fold_constants(program), frozenset(unread)


def _write_back(model: Any, module: OnnxModule) -> None:  # noqa: ANN401  # onnx.ModelProto
    """Write the module's weights and biases (corrected) into the graph's initializers."""
    import onnx

    for tensor in model.graph.initializer:
        value = module.fed_value(tensor.name)
        if value is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporter and onnxscript tell of their inner steps from the user."""
    levels = {logging.getLogger(name): 0 for name in ("torch.onnx", "onnxscript")}
    for logger in levels:
        levels[logger] = logger.level
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
