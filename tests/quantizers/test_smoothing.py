"""Channels scaled so that weights round better."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.quantizers import smoothing
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.quantizers.smoothing import scale_channels, smooth

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Uneven(nn.Module):
    """A hidden layer with a few large channels, which are read with small weights."""

    def __init__(self, between=functional.relu):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 64)
        self.between = between
        with torch.no_grad():
            self.up.weight[:6] *= 30
            self.down.weight[:, :6] /= 30

    def forward(self, x):
        return self.down(self.between(self.up(x)))


def made(between=functional.relu, granularity=Granularity.CHANNEL, bits=3, activation_bits=None):
    torch.manual_seed(0)
    module = Uneven(between).eval()
    inventory = discover(module, (X,))
    scheme = Scheme(granularity=granularity)
    candidates = {
        la.name: Candidate.of(la, bits, scheme, activation_bits) for la in inventory.layers
    }
    return module, inventory, candidates


def rounded(module, inventory, candidates):
    """A copy whose weights are rounded to nearest."""
    return apply_plan(module, inventory, list(candidates.values()))


class TestSmooth:
    def test_rounding_hurts_less_and_full_precision_stays(self):
        module, inventory, candidates = made()
        found = smooth(module, inventory, candidates, [(X,)])
        assert [s.pair.weight for s in found.scalings] == ["up.weight"]
        with torch.no_grad():
            assert torch.allclose(found.module(X), module(X), rtol=1e-4, atol=1e-4)
        plain, smoothed = (
            functional.mse_loss(rounded(m, inventory, candidates)(X), module(X))
            for m in (module, found.module)
        )
        assert smoothed < 0.5 * plain

    def test_rows_that_share_a_scale_count_too(self):
        module, inventory, candidates = made(granularity=Granularity.TENSOR)
        found = smooth(module, inventory, candidates, [(X,)])
        plain, smoothed = (
            functional.mse_loss(rounded(m, inventory, candidates)(X), module(X))
            for m in (module, found.module)
        )
        assert smoothed < 0.5 * plain

    def test_quantized_inputs_lose_less(self):
        """One range for all inputs, which large channels set, fits channels of one size."""
        module, inventory, candidates = made(bits=8, activation_bits=4)
        found = smooth(module, inventory, candidates, [(X,)])
        data = CalibrationSet(inputs=(X,))
        plain, smoothed = (
            functional.mse_loss(
                apply_plan(
                    m, inventory, [candidates["down"]],
                    fitted=fit_quantizers(m, inventory, [candidates["down"]], data),
                )(X),
                module(X),
            )
            for m in (module, found.module)
        )  # fmt: skip
        assert smoothed < 0.1 * plain

    def test_scalings_make_the_smoothed_model_again(self):
        module, inventory, candidates = made()
        found = smooth(module, inventory, candidates, [(X,)])
        again = made()[0]
        for scaling in found.scalings:
            scale_channels(again, inventory, scaling)
        for name, tensor in found.module.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)

    def test_nothing_is_scaled_where_nothing_can_be(self):
        module, inventory, candidates = made(functional.gelu)
        found = smooth(module, inventory, candidates, [(X,)])
        assert found.scalings == ()
        assert not found.undone

    def test_undone_where_full_precision_would_change(self, monkeypatch):
        monkeypatch.setattr(smoothing, "UNCHANGED", 0.0)
        module, inventory, candidates = made()
        found = smooth(module, inventory, candidates, [(X,)])
        assert found.module is module
        assert found.scalings == ()
        assert "places" in found.to_json()
        assert found.to_json()["undone"] == found.undone != ""

    def test_onnx_graphs_are_treated_alike(self, tmp_path):
        path = tmp_path / "m.onnx"
        module, inventory, candidates = made()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own trees
            torch.onnx.export(module, (X,), path, dynamo=True, verbose=False)
        graph = load_model(str(path)).module
        known = discover(graph, (X,))
        assert {layer.name for layer in known.layers} == candidates.keys()
        found = smooth(graph, known, candidates, [(X,)])
        (scaling,) = found.scalings
        (expected,) = smooth(module, inventory, candidates, [(X,)]).scalings
        assert torch.allclose(scaling.factors, expected.factors, rtol=1e-3)
        assert torch.allclose(found.module(X), graph(X), rtol=1e-4, atol=1e-4)
        assert not torch.equal(found.module.up.weight, graph.up.weight)


class TestScaleChannels:
    def test_another_model_is_refused(self):
        module, inventory, candidates = made()
        (scaling,) = smooth(module, inventory, candidates, [(X,)]).scalings
        other = nn.Module()
        other.up, other.down = nn.Linear(32, 60), nn.Linear(60, 64)
        with pytest.raises(InvalidModel) as refused:
            scale_channels(other, inventory, scaling)
        assert refused.value.details["layer"] == "up"
