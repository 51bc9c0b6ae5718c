"""ONNX files as models."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidModel, MeasurementFailed, UnsafeModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.onnx.layers import find_layers
from bitquota.quantizers.apply import apply_plan
from bitquota.sensitivity.runners.make import make_runner
from onnx_graphs import image_graph, save, token_graph
from refusals import refused


def run(path, **feed) -> np.ndarray:
    """Run a file as it is."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


class TestLoadOnnx:
    def test_same_output_as_the_file(self, tmp_path):
        """Feeding the weights as inputs changes nothing."""
        path = image_graph(tmp_path / "m.onnx")
        x = np.random.default_rng(1).normal(size=(5, 3, 8, 8)).astype(np.float32)
        loaded = load_model(str(path))
        with torch.no_grad():
            assert np.allclose(run(path, x=x), loaded.module(torch.from_numpy(x)), atol=1e-6)

    def test_layers_and_counts(self, tmp_path):
        """Names come from nodes, kinds from operators, and every tensor is counted once."""
        loaded = load_model(str(image_graph(tmp_path / "m.onnx")))
        inventory = discover(loaded.module, (torch.zeros(2, 3, 8, 8),))
        found = {la.name: (la.kind, la.rows, la.columns, la.n_macs) for la in inventory.layers}
        assert found == {
            "stem": (LayerKind.CONV2D, 8, 27, 8 * 27 * 64),
            "stage/depthwise": (LayerKind.CONV2D, 8, 9, 8 * 9 * 36),
            "classify": (LayerKind.LINEAR_TRANSPOSED, 10, 8, 80),
        }
        assert {t.name for t in inventory.unquantized} == {"stem.bias", "classify.bias"}
        assert 32 * (216 + 72 + 80 + 8 + 10) == inventory.full_precision_bits

    def test_tied_head_is_one_layer(self, tmp_path):
        """An embedding that is also the head, through a Transpose, is counted once."""
        loaded = load_model(str(token_graph(tmp_path / "m.onnx")))
        inventory = discover(loaded.module, (torch.zeros(2, 6, dtype=torch.int64),))
        assert [(la.name, la.kind) for la in inventory.layers] == [
            ("embed", LayerKind.EMBEDDING),
            ("mixer", LayerKind.LINEAR_TRANSPOSED),
        ]

    def test_changed_weight_is_seen(self, tmp_path):
        """A fake-quantized parameter changes the output exactly as an edited file does."""
        path = token_graph(tmp_path / "m.onnx")
        loaded = load_model(str(path))
        ids = torch.randint(0, 32, (3, 6))
        inventory = discover(loaded.module, (ids,))
        chosen = [Candidate.of(la, 3, Scheme()) for la in inventory.layers]
        quantized = apply_plan(loaded.module, inventory, chosen)
        model = onnx.load(path)
        for tensor, name in zip(
            model.graph.initializer, ("embed.weight", "mixer.weight"), strict=True
        ):
            owner, _, leaf = name.rpartition(".")
            weight = getattr(quantized.get_submodule(owner), leaf).detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        onnx.save(model, tmp_path / "edited.onnx")
        expected = run(tmp_path / "edited.onnx", ids=ids.numpy())
        assert np.allclose(expected, quantized(ids).detach(), atol=1e-5)
        assert not np.allclose(run(path, ids=ids.numpy()), expected, atol=1e-2)

    def test_runner(self, tmp_path):
        """The measurement's runner takes it, one call per run."""
        loaded = load_model(str(image_graph(tmp_path / "m.onnx")))
        x = torch.randn(6, 3, 8, 8)
        inventory = discover(loaded.module, (x[:2],))
        runner = make_runner(loaded.module, inventory, CalibrationSet(inputs=(x,)))
        change = {"stem": Candidate.of(inventory.layers[0], 2, Scheme())}
        assert torch.equal(loaded.module(x).detach(), runner.reference(0))
        assert not torch.equal(runner.start(0, change).output, runner.reference(0))
        assert torch.equal(loaded.module(x).detach(), runner.reference(0))

    def test_fixed_batch(self, tmp_path):
        """A graph exported for one batch size runs in pieces, the last one padded."""
        x = torch.randn(7, 3, 8, 8)
        free = load_model(str(image_graph(tmp_path / "n.onnx"))).module(x)
        for batch in (1, 4):
            fixed = load_model(str(image_graph(tmp_path / f"{batch}.onnx", batch=batch)))
            assert torch.allclose(free, fixed.module(x), atol=1e-6)
            assert fixed.example_inputs[0].shape == (2, 3, 8, 8)

    def test_hooks_see_the_graphs_tensors(self, tmp_path):
        """A forward hook on a layer gets what the node takes and gives."""
        loaded = load_model(str(image_graph(tmp_path / "m.onnx")))
        seen = []
        head = loaded.module.get_submodule("classify")
        handle = head.register_forward_hook(lambda m, a, out: seen.append((m, a[0], out)))
        x = torch.randn(4, 3, 8, 8)
        output = loaded.module(x)
        handle.remove()
        ((module, given, made),) = seen
        assert torch.equal(output, made)
        assert torch.allclose(given @ module.weight + module.bias, made, atol=1e-5)

    def test_bias_is_a_parameter(self, tmp_path):
        """A changed bias reaches the graph, so that bias correction works."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        x = torch.randn(4, 3, 8, 8)
        before = module(x)
        with torch.no_grad():
            module.get_submodule("classify").bias.add_(1.0)
        assert torch.allclose(before + 1, module(x), atol=1e-5)

    def test_changing_an_input_is_refused(self, tmp_path):
        """Activation quantization hooks would do nothing, so they are an error."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        module.get_submodule("stem").register_forward_pre_hook(lambda _, args: args)
        with pytest.raises(MeasurementFailed, match="leave out activation bits"):
            module(torch.zeros(1, 3, 8, 8))

    def test_copy_is_independent(self, tmp_path):
        """A deep copy has weights of its own."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        twin, x = copy.deepcopy(module), torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            twin.get_submodule("stem").weight.zero_()
        assert not torch.allclose(module(x), twin(x))

    def test_wrong_shape_is_a_calibration_error(self, tmp_path):
        """ONNX Runtime's own message is wrapped."""
        from bitquota.errors import InvalidCalibration
        from bitquota.models.samples import check_calibration

        loaded = load_model(str(image_graph(tmp_path / "m.onnx")))
        with refused(InvalidCalibration, got="[1, 8, 8] float32"):
            check_calibration(loaded, CalibrationSet(inputs=(torch.zeros(4, 1, 8, 8),)))

    def test_truncated(self, tmp_path):
        """Half a file is one sentence."""
        path = image_graph(tmp_path / "m.onnx")
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(InvalidModel, match="whole file"):
            load_model(str(path))

    def test_opset_above_25(self, tmp_path):
        """A newer opset is named."""
        path = image_graph(tmp_path / "m.onnx")
        model = onnx.load(path)
        model.opset_import[0].version = 99
        onnx.save(model, path)
        with refused(InvalidModel, opset=99):
            load_model(str(path))

    def test_custom_operators(self, tmp_path):
        """Operators of unknown domains need a library, which is not loaded."""
        node = helper.make_node("Evil", ["x"], ["y"], domain="my.ops")
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node], "g", [info("x", TensorProto.FLOAT, [1])], [info("y", TensorProto.FLOAT, [1])]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        onnx.save(model, tmp_path / "m.onnx")
        with refused(UnsafeModel, domains=["my.ops"]):
            load_model(str(tmp_path / "m.onnx"))

    def test_external_data_elsewhere(self, tmp_path):
        """Weights in a file outside the folder are not read."""
        (tmp_path / "inner").mkdir()
        path = image_graph(tmp_path / "inner" / "m.onnx")
        model = onnx.load(path)
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, "../secret.bin")
        tensor.ClearField("raw_data")
        (tmp_path / "secret.bin").write_bytes(b"\0" * 864)
        path.write_bytes(model.SerializeToString())
        with pytest.raises((UnsafeModel, InvalidModel), match=r"folder|cannot be read"):
            load_model(str(path))

    def test_already_quantized(self, tmp_path):
        """A graph with DequantizeLinear is refused."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [
                helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
                helper.make_node("MatMul", ["x", "d"], ["y"]),
            ],
            "g",
            [info("x", TensorProto.FLOAT, ["n", 4])],
            [info("y", TensorProto.FLOAT, ["n", 4])],
            [
                numpy_helper.from_array(np.ones((4, 4), np.int8), "w"),
                numpy_helper.from_array(np.float32(0.5), "s"),
            ],
        )
        with refused(InvalidModel, operators=["DequantizeLinear"]):
            find_layers(onnx.load(save(graph, tmp_path / "m.onnx", 21)))

    def test_nothing_to_quantize(self, tmp_path):
        """A graph without weights says what was looked for."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [info("x", TensorProto.FLOAT, ["n", 4])],
            [info("y", TensorProto.FLOAT, ["n", 4])],
        )
        with pytest.raises(InvalidModel, match="Conv, ConvTranspose, Gemm, MatMul, Einsum"):
            load_model(str(save(graph, tmp_path / "m.onnx", 21)))
