"""Whatever a menu offers is written, reads back as planned, and runs right in its runtime.

One network holds every kind of layer in odd shapes several times, so that each format of a target
meets each shape in a single export. The layers' outputs stand side by side, and each is compared by
itself, with few samples and with many: runtimes take other kernels for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bitquota.candidates.architectures import prepare_inventory
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.table import Candidate
from bitquota.candidates.targets import TARGETS
from bitquota.errors import InvalidPlan
from bitquota.exports.export import EXPORTERS, prepare_export
from bitquota.exports.storage_rules import require_storable
from bitquota.models.calibration import CalibrationSet
from bitquota.models.layout import from_matrix
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.models.onnx.module import OnnxModule
from bitquota.plan import Assignment, Plan
from format_networks import write_llama
from menu_graphs import WIDTH, menu_graph
from refusals import refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.targets import Target
    from bitquota.exports.prepared import PreparedExport
    from bitquota.models.loaded import LoadedModel

ROWS = (1, 3, 21)
"""Numbers of samples that exported files are run on."""

TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "float16": 2e-3}
"""Relative difference of one layer's output. A graph in float16 rounds its values to 2^-11."""

COPIES = {"ort-cpu": 3, "openvino-cpu": 3, "tensorrt": 2, "mcu": 3, "ref-int": 7}
"""Formats that a target has for a layer at most, so that each layer occurs in each of them."""

WITHOUT_FLOAT64 = ("products", "tables", "contractions")
"""ONNX Runtime runs no convolution and no RNN of doubles, so no such model can be loaded."""

GIVEN = torch.randn(max(ROWS), WIDTH, generator=torch.Generator().manual_seed(3)) * 3


@dataclass
class Menu:
    """A model whose layers have segments of its output.

    Attributes:
        model: The model.
        inventory: All its layers.
        segments: Length of each segment of the output, by a name that its layers begin with.
    """

    model: LoadedModel
    inventory: Inventory
    segments: dict[str, int]

    def plan(self, inventory: Inventory, chosen: dict[str, Candidate]) -> Plan:
        """Return the plan of these candidates; the other layers stay as they are."""
        return Plan(
            model_digest=self.model.digest,
            assignments=tuple(
                Assignment(
                    layer=layer,
                    candidate=chosen.get(layer.name) or Candidate.of(layer, 32, Scheme()),
                )
                for layer in inventory.layers
            ),
            unquantized=inventory.unquantized,
        )

    def export(
        self, plan: Plan, folder: Path, *, format_name: str, target: Target | None = None
    ) -> PreparedExport:
        """Write the plan's files; sizes are the plan's, and outputs the fake-quantized model's."""
        require_storable(plan, format_name)
        samples = CalibrationSet(inputs=(GIVEN,))
        prepared = prepare_export(self.model, plan, target=target, samples=samples)
        folder.mkdir()
        report = EXPORTERS[format_name].export(prepared, folder)
        report.require()
        assert plan.size_bits == report.payload_bits + sum(
            a.candidate.size_bits for a in plan.assignments if a.candidate.weight_bits == 32
        )
        return prepared

    def wrong_segments(
        self, prepared: PreparedExport, folder: Path, *, format_name: str, tolerance: float
    ) -> dict[str, float]:
        """Return the segments that the files compute otherwise than the fake-quantized model."""
        written = EXPORTERS[format_name].load(prepared, folder)
        wrong = {}
        for n in ROWS:
            with torch.no_grad():
                made, expected = (m(GIVEN[:n]).double() for m in (written, prepared.module))
            start = 0
            for name, length in self.segments.items():
                part = slice(start, start + length)
                start += length
                norm = float(expected[:, part].norm())
                gap = float((made[:, part] - expected[:, part]).norm())
                if not gap <= tolerance * max(norm, 1e-3):
                    wrong[f"{name} of {n} samples"] = gap / max(norm, 1e-3)
            assert made.shape[1] == start
        return wrong


def onnx_menu(
    path: Path, *, copies: int, dtype: str, families: Sequence[str] | None = None
) -> Menu:
    """Return a graph that torch never saw."""
    lengths = menu_graph(path, copies=copies, dtype=dtype, families=families)
    return _menu(load_model(str(path)), lengths)


def torch_menu(factory: str) -> Menu:
    """Return a torch module."""
    model = load_model(f"menu_modules:{factory}")
    return _menu(model, model.module.segments)


def _menu(model: LoadedModel, segments: dict[str, int]) -> Menu:
    inventory = inventory_of(model.module, model, CalibrationSet(inputs=(GIVEN,)))
    return Menu(model=model, inventory=inventory, segments=segments)


def in_turn(inventory: Inventory, target: Target) -> dict[str, Candidate]:
    """Return a candidate for each layer: those alike in kind and shape get one format each."""
    met: dict[tuple[object, ...], int] = {}
    chosen = {}
    for k, layer in enumerate(inventory.layers):
        widths = [f.weight_bits for f in target.formats_for(layer) if f.weight_bits < 32]
        turn = met.setdefault(_alike(layer), k)
        met[_alike(layer)] += 1
        (chosen[layer.name],) = target.candidates_at([layer], [widths[turn % len(widths)]])
    return chosen


def _alike(layer: Layer) -> tuple[object, ...]:
    return layer.kind, layer.weight_shape, layer.rows


def every_format(inventory: Inventory, target: Target) -> set[tuple[object, ...]]:
    """Return what the target offers: kind, shape and bit-width."""
    return {
        (*_alike(layer), f.weight_bits)
        for layer in inventory.layers
        for f in target.formats_for(layer)
        if f.weight_bits < 32
    }


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Return every value of an ONNX file that depends on its weights alone, in plain arithmetic."""
    model = onnx.load(path)
    known = {t.name for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.input and known.issuperset(filter(None, node.input)):
            nodes.append(node)
            known.update(node.output)
    names = [name for node in nodes for name in node.output]
    graph = onnx.helper.make_graph(
        nodes, "weights", [], [onnx.ValueInfoProto(name=n) for n in names], model.graph.initializer
    )
    alone = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        alone.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, session.run(None, {}), strict=True))


def misread(prepared: PreparedExport, path: Path) -> list[str]:
    """Return the layers whose weights an ONNX file does not hold to the last bit."""
    assert isinstance(prepared.module, OnnxModule)
    initializer_of = {la.name: la.initializer for la in prepared.module.onnx_layers}
    values = decoded(path)
    wrong = []
    for name, weight in prepared.weights.items():
        layer = prepared.layers[name]
        expected = from_matrix(weight.dequantize(), layer).numpy()
        found = values[initializer_of[name]]
        if not np.array_equal(expected.astype(found.dtype), found):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("ort-cpu", "float32"), ("ort-cpu", "float16"), ("ort-cpu", "float64"),
        ("openvino-cpu", "float32"), ("openvino-cpu", "float16"), ("openvino-cpu", "float64"),
        ("tensorrt", "float32"), ("mcu", "float32"), ("ref-int", "float32"),
    ],
)  # fmt: skip
class TestOnnxModels:
    def test_every_format_of_every_layer(self, tmp_path, target, dtype):
        """Bytes, weights and outputs of a graph's layers are the plan's."""
        rules = TARGETS[target]
        families = WITHOUT_FLOAT64 if dtype == "float64" else None
        menu = onnx_menu(tmp_path / "m.onnx", copies=COPIES[target], dtype=dtype, families=families)
        inventory = prepare_inventory(menu.inventory, rules)
        chosen = in_turn(inventory, rules)
        if dtype == "float32":
            met = {(*_alike(la), chosen[la.name].weight_bits) for la in inventory.layers}
            assert every_format(inventory, rules) == met
        plan = menu.plan(inventory, chosen)
        folder, name = tmp_path / "out", rules.exporter
        prepared = menu.export(plan, folder, format_name=name, target=rules)
        assert {} == menu.wrong_segments(
            prepared, folder, format_name=name, tolerance=TOLERANCE[dtype]
        )
        if name == "onnx-qdq":
            assert [] == misread(prepared, folder / "model.onnx")


@pytest.mark.parametrize(
    ("target", "factory"),
    [
        ("ref-int", "seven_of_each"), ("ref-int", "halves"), ("ref-int", "brains"),
        ("ort-cpu", "few"), ("openvino-cpu", "few"),
    ],
)  # fmt: skip
class TestTorchModules:
    def test_every_kind_of_layer(self, tmp_path, target, factory):
        """Bytes and outputs of a module's layers are the plan's."""
        rules = TARGETS[target]
        menu = torch_menu(factory)
        inventory = prepare_inventory(menu.inventory, rules)
        chosen = in_turn(inventory, rules)
        if factory == "seven_of_each":
            met = {(*_alike(la), chosen[la.name].weight_bits) for la in inventory.layers}
            assert every_format(inventory, rules) == met
        plan = menu.plan(inventory, chosen)
        folder, name = tmp_path / "out", rules.exporter
        prepared = menu.export(plan, folder, format_name=name, target=rules)
        assert {} == menu.wrong_segments(prepared, folder, format_name=name, tolerance=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "target",
    [
        "gguf-py", "gguf-k", "ct-vllm-humming", "ct-vllm-marlin", "ct-vllm-nvfp4", "ct-vllm-mxfp4"
    ],
)  # fmt: skip
class TestFolders:
    def test_every_format_of_every_layer(self, tmp_path, target, dtype):
        """Weights that are read from the files are the planned ones; rows of 256, 64 and 80."""
        rules = TARGETS[target]
        path = write_llama(tmp_path / "m", width=256 if target == "gguf-k" else 64, inner=80)
        if dtype == "bfloat16":
            stored_in_halves(path)
        model = load_model(str(path))
        ids = torch.arange(12).reshape(2, 6)
        everything = inventory_of(model.module, model, CalibrationSet(inputs=(ids,)))
        inventory = prepare_inventory(everything, rules)
        menu = Menu(model=model, inventory=everything, segments={})
        widths = {f.weight_bits for la in inventory.layers for f in rules.formats_for(la)} - {32}
        groups: dict[str, list[Layer]] = {}
        for layer in inventory.layers:
            groups.setdefault(layer.group, []).append(layer)
        chosen = {}
        for k, layers in enumerate(groups.values()):
            legal = [bits for bits in rules.shared_widths(layers) if bits < 32]
            bits = [legal[k % len(legal)]] * len(layers)
            chosen |= {c.layer: c for c in rules.candidates_at(layers, bits)}
        assert widths == {c.weight_bits for c in chosen.values()}
        samples = CalibrationSet(inputs=(ids,))
        plan = menu.plan(inventory, chosen)
        prepared = prepare_export(model, plan, target=rules, samples=samples)
        folder = tmp_path / "out"
        folder.mkdir()
        report = EXPORTERS[rules.exporter].export(prepared, folder)
        report.require()
        assert report.difference.relative < 1e-5
        written = EXPORTERS[rules.exporter].load(prepared, folder)
        for name, weight in prepared.weights.items():
            layer = prepared.layers[name]
            found = written.get_parameter(layer.weight_name).detach().float()
            assert torch.equal(from_matrix(weight.dequantize(), layer), found), name


def stored_in_halves(path: Path) -> None:
    """Store a folder's weights in bfloat16, as most language models come."""
    import json

    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = {k: v.bfloat16() for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


CHANNEL, TENSOR, GROUP = Granularity
BY_CHANNEL, BY_TENSOR, BLOCKS = (
    Scheme(),
    Scheme(granularity=TENSOR),
    Scheme(granularity=GROUP, group_size=32),
)
# How a scale is fitted says nothing about how it is stored, and with zero points takes longest.
RANGES = {"grid": Grid.ASYMMETRIC, "scale_rule": ScaleRule.ABSMAX}
ZEROS = Scheme(**RANGES)
INTEGERS = (
    BY_CHANNEL, BY_TENSOR, BLOCKS, replace(BLOCKS, group_size=5),
    ZEROS, replace(BY_TENSOR, **RANGES), replace(BLOCKS, **RANGES),
    replace(ZEROS, scale_format=ScaleFormat.BF16),
)  # fmt: skip
LEVELS = (Scheme(grid=Grid.CODEBOOK), Scheme(grid=Grid.CODEBOOK, granularity=TENSOR))

HELD: dict[str, tuple[tuple[int, ...], tuple[Scheme, ...]]] = {
    "onnx-qdq": ((2, 4, 8, 16), (*INTEGERS, *LEVELS)),
    "onnx-matmulnbits": ((2, 4, 8), (BLOCKS, replace(BLOCKS, **RANGES))),
    "openvino": ((2, 4, 8), (BY_CHANNEL, BY_TENSOR)),
    "ref-int": ((1, 3, 7), (ZEROS, replace(BLOCKS, group_size=5, scale_format=ScaleFormat.BF16))),
}  # fmt: skip
"""What a request may ask for without a target, by format: bit-widths and schemes that it holds."""


def _named(value: object) -> str:
    if not isinstance(value, Scheme):
        return str(value)
    return f"{value.grid}-{value.granularity}{value.group_size or ''}-{value.scale_format}"


@pytest.fixture(scope="module")
def two_of_each(tmp_path_factory):
    """A graph with each layer twice."""
    path = tmp_path_factory.mktemp("menu") / "m.onnx"
    return onnx_menu(path, copies=2, dtype="float32")


def _columns_divide(layer: Layer, scheme: Scheme) -> bool:
    return not scheme.group_size or layer.columns % scheme.group_size == 0


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, scheme) for name, (_, schemes) in HELD.items() for scheme in schemes],
    ids=_named,
)
class TestSchemesOfRequests:
    def test_every_layer_that_can_have_it(self, two_of_each, tmp_path, name, scheme):
        """Without a target a request names the scheme: here at the narrowest width and another."""
        narrow, *others = [b for b in HELD[name][0] if scheme.grid is not Grid.CODEBOOK or b <= 8]
        met: set[tuple[object, ...]] = set()
        chosen = {}
        for k, layer in enumerate(two_of_each.inventory.layers):
            if _columns_divide(layer, scheme):
                bits = others[k % len(others)] if _alike(layer) in met else narrow
                met.add(_alike(layer))
                chosen[layer.name] = Candidate.of(layer, bits, scheme)
        plan = two_of_each.plan(two_of_each.inventory, chosen)
        folder = tmp_path / "out"
        prepared = two_of_each.export(plan, folder, format_name=name)
        assert {} == two_of_each.wrong_segments(prepared, folder, format_name=name, tolerance=1e-5)
        if name == "onnx-qdq":
            assert [] == misread(prepared, folder / "model.onnx")


@pytest.mark.parametrize("scheme", [ZEROS, BLOCKS], ids=_named)
class TestRefusals:
    def test_openvino_names_the_layers(self, two_of_each, tmp_path, scheme):
        """A scheme that a format cannot hold is refused before anything is written."""
        layers = [la for la in two_of_each.inventory.layers if _columns_divide(la, scheme)]
        chosen = {la.name: Candidate.of(la, 4, scheme) for la in layers}
        plan = two_of_each.plan(two_of_each.inventory, chosen)
        with refused(InvalidPlan, layers=list(chosen)):
            two_of_each.export(plan, tmp_path / "out", format_name="openvino")
