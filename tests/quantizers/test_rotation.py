"""Models turned so that weights round better."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model, load_within
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.quantized_model import QuantizedModel
from bitquota.quantizers.rotation import rotate
from bitquota.request import PlanRequest
from decoder_networks import TOKENS, Decoder
from format_networks import write_llama


def made(**about):
    """A decoder whose stream has few large channels, and its layers."""
    module = Decoder(**about).eval()
    with torch.no_grad():
        module.embed.weight[:, :2] *= 8
        for block in module.blocks:
            block.norm1.weight.uniform_(0.5, 2)
            for layer in (block.q, block.k, block.v, block.gate, block.up):
                layer.weight[:, :2] *= 8
    return module, discover(module, (TOKENS,))


def error(module, inventory, reference):
    """How far outputs move when all layers are rounded to 4 bits."""
    chosen = [Candidate.of(layer, 4, Scheme()) for layer in inventory.layers]
    rounded = apply_plan(module, inventory, chosen)
    with torch.no_grad():
        return float((rounded(TOKENS) - reference).norm())


class TestRotate:
    def test_rounding_hurts_less_and_full_precision_stays(self):
        module, inventory = made()
        found = rotate(module, inventory, (TOKENS,))
        assert found.to_json() == {"residual_streams": 1, "attention_layers": 2}
        with torch.no_grad():
            reference = module(TOKENS)
            assert torch.allclose(found.module(TOKENS), reference, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.module.norm.weight, torch.ones(16))
        plain, turned = (error(m, inventory, reference) for m in (module, found.module))
        assert turned < 0.6 * plain

    def test_a_tied_head_leaves_attention(self):
        module, inventory = made(tied=True)
        found = rotate(module, inventory, (TOKENS,))
        told = found.to_json()
        assert (told["residual_streams"], told["attention_layers"]) == (0, 2)
        assert "tied" in told["undone"]
        assert torch.equal(found.module.embed.weight, module.embed.weight)
        assert not torch.equal(found.module.blocks[0].v.weight, module.blocks[0].v.weight)

    def test_networks_without_places_are_refused(self):
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        x = torch.randn(3, 4)
        with pytest.raises(InvalidInput, match="'rotation' needs a residual stream"):
            rotate(module, discover(module, (x,)), (x,))

    def test_undone_where_channels_are_treated_one_by_one(self):
        """A ReLU on the stream, which no flow of values shows."""

        class Bent(Decoder):
            def forward(self, tokens):
                x = self.embed(tokens)
                for block in self.blocks:
                    x = block(x.relu())
                return self.head(self.norm(x))

        module = Bent().eval()
        found = rotate(module, discover(module, (TOKENS,)), (TOKENS,))
        assert found.to_json()["residual_streams"] == 0
        assert "one by one" in found.undone


@pytest.mark.slow  # imports transformers
class TestSetup:
    def test_weights_that_lie_in_files_are_turned_alike(self, tmp_path):
        """And the model is still measured block after block."""
        path = str(write_llama(tmp_path, tied=False))
        tokens = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(0))
        request = PlanRequest(
            budgets=("5 bits",), corrections=(Correction.ROTATION,), samples=3, holdout_samples=3
        )
        here, there = (
            build_setup(model, CalibrationSet(inputs=(tokens,)), request)
            for model in (load_model(path), load_within(path, 1))
        )
        assert there.stacked is not None
        assert here.fitted.origin == there.fitted.origin
        for name, tensor in here.module.state_dict().items():
            assert torch.equal(there.module.state_dict()[name], tensor)

    def test_importance_matrices_are_refused(self, tmp_path):
        path = str(write_llama(tmp_path, tied=False))
        model = replace(load_model(path), imatrix=tmp_path / "imatrix.dat")
        request = PlanRequest(budgets=("5 bits",), corrections=(Correction.ROTATION,))
        with pytest.raises(InvalidInput, match="importance matrix"):
            build_setup(model, CalibrationSet(inputs=(TOKENS,)), request)


class TestStored:
    def test_makes_the_turned_model_again(self):
        module, inventory = made()
        found = rotate(module, inventory, (TOKENS,))
        file = QuantizedModel(
            model_digest="x", rounding="nearest", weights={}, rotations=found.rotations
        )
        stored = QuantizedModel.load(file.to_bytes())
        assert stored.to_bytes() == file.to_bytes()
        again = copy.deepcopy(module)
        stored.rewrite(again, inventory)
        for name, tensor in found.module.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)

    def test_another_model_is_refused(self):
        module, inventory = made()
        (stream, *_) = rotate(module, inventory, (TOKENS,)).rotations
        other = copy.deepcopy(module)
        other.embed = nn.Embedding(20, 15)
        with pytest.raises(InvalidPlan) as refused:
            stream.apply(other)
        assert refused.value.details["tensor"] == "embed.weight"
