"""Corrections of ONNX graphs against the same corrections of the torch module."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import bias_correction, fold_batch_norm, reestimate_batch_norm
from onnx_graphs import image_graph, odd_graph, residual_graph, token_graph
from refusals import refused
from sensitivity_networks import Residual, build, samples

pytest.importorskip("onnxruntime")


@pytest.fixture
def pair(tmp_path):
    """Return a torch network and the same one as an ONNX file."""
    module = build(Residual)
    return module, load_model(str(residual_graph(tmp_path / "m.onnx", module))).module


def quantized(module, data, corrections, bits=2):
    inventory = discover(module, (data.inputs[0][:2],))
    chosen = [Candidate.of(la, bits, Scheme()) for la in inventory.layers]
    return apply_plan(module, inventory, chosen, corrections=corrections, correction_data=data)


class TestReestimateOnnx:
    @pytest.mark.parametrize("batch_size", [12, 5])
    def test_equals_torch(self, pair, batch_size):
        """Means and variances over one batch or several, under the names of the file."""
        data = samples(Residual)
        damaged = []
        for module in pair:
            damaged.append(quantized(module, data, []))
            reestimate_batch_norm(damaged[-1], data, reference=module, batch_size=batch_size)
        ours, theirs = (m.state_dict() for m in damaged[::-1])
        for name in ("norm", "inner_norm"):
            for part in ("running_mean", "running_var"):
                key = f"{name}.{part}"
                torch.testing.assert_close(ours[key], theirs[key])
                assert not torch.allclose(ours[key], pair[1].state_dict()[key], atol=1e-2)
        torch.testing.assert_close(damaged[1](data.inputs[0]), damaged[0](data.inputs[0]))

    def test_needs_the_full_precision_graph(self, pair):
        """Nothing to move from without it."""
        with pytest.raises(InvalidInput, match="full-precision model"):
            reestimate_batch_norm(pair[1], samples(Residual))

    def test_ships_with_a_plan(self, pair):
        """A quantized copy is repaired as torch repairs it; the original stays as it was."""
        data = samples(Residual)
        before = pair[1](data.inputs[0])
        outputs = [
            quantized(m, data, [Correction.BATCH_NORM_STATISTICS])(data.inputs[0]) for m in pair
        ]
        plain = quantized(pair[1], data, [])(data.inputs[0])

        torch.testing.assert_close(*outputs)
        assert not torch.allclose(outputs[1], plain, atol=1e-2)
        assert torch.equal(before, pair[1](data.inputs[0]))

    def test_refused_without_batch_norms(self, tmp_path):
        """It would do nothing."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        with refused(InvalidInput, batch_norms=0, opset=21):
            quantized(module, samples(Residual), [Correction.BATCH_NORM_STATISTICS])


class TestBiasCorrectOnnx:
    def test_equals_torch(self, pair):
        """Into biases where there are some, into the batch norm's mean where there are none."""
        data = samples(Residual)
        outputs = [quantized(m, data, [Correction.BIAS_CORRECTION])(data.inputs[0]) for m in pair]
        plain = quantized(pair[1], data, [])(data.inputs[0])

        torch.testing.assert_close(*outputs)
        assert not torch.allclose(outputs[1], plain, atol=1e-2)

    def test_mean_of_the_output_is_restored(self, tmp_path):
        """The last layer's mean output is that of full precision; depthwise and Gemm included."""
        module = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        data = samples(Residual)
        fixed = quantized(module, data, [Correction.BIAS_CORRECTION])
        x = data.inputs[0]

        torch.testing.assert_close(fixed(x).mean(0), module(x).mean(0), atol=1e-5, rtol=1e-4)
        plain = quantized(module, data, [])
        assert not torch.allclose(plain(x).mean(0), module(x).mean(0), atol=1e-2)

    def test_what_is_added_behind_a_product(self, tmp_path):
        """A MatMul's bias is an Add of its own; layers without one are left alone."""
        module = load_model(str(odd_graph(tmp_path / "m.onnx"))).module
        x = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(0))
        fixed = quantized(module, CalibrationSet(inputs=(x,)), [Correction.BIAS_CORRECTION])
        weight = fixed.get_submodule("first").weight - module.get_submodule("first").weight
        moved = fixed.state_dict()["shift"] - module.state_dict()["shift"]

        expected = -(x.reshape(-1, 4) @ weight).mean(0).detach()
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)

    def test_refused_without_a_place(self, tmp_path):
        """No bias anywhere, or a fixed batch."""
        module = load_model(str(token_graph(tmp_path / "m.onnx"))).module
        ids = CalibrationSet(inputs=(torch.zeros(4, 6, dtype=torch.int64),))
        with pytest.raises(InvalidInput, match="has none: leave the correction out"):
            bias_correction(module, module, discover(module, ids.inputs), ids)
        path = image_graph(tmp_path / "f.onnx", batch=2)
        with pytest.raises(InvalidInput, match="fixed batch of 2"):
            quantized(load_model(str(path)).module, samples(Residual), [Correction.BIAS_CORRECTION])


class TestFoldOnnx:
    def test_refused_where_there_is_something_to_fold(self, pair, tmp_path):
        """With what to do; a graph without batch norms is folded already."""
        x = samples(Residual).inputs[0]
        with refused(InvalidInput, batch_norms=2):
            fold_batch_norm(pair[1], (x,))
        folded = load_model(str(image_graph(tmp_path / "m.onnx"))).module
        assert torch.equal(fold_batch_norm(folded, (x,))(x), folded(x))
