"""From a model to quantized files in one call."""

from __future__ import annotations

import json

import pytest
import torch

from bitquota.errors import InvalidInput
from bitquota.pipeline import quantize
from bitquota.plan import Plan


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


@pytest.mark.parametrize("several", [False, True], ids=["tensor", "tuple"])
def test_module_in_memory(net, tmp_path, several):
    """It stays as it is; settings reach the request; the folder holds the plan that is returned."""
    net.double().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    inputs = torch.randn(32, 8)
    plan = quantize(
        net, (inputs,) if several else inputs, "4 bits", tmp_path / "out", target="ref-int",
        effort="quick", samples=16, holdout_samples=16, weight_bits=(2, 4, 8),
    )  # fmt: skip
    assert plan.average_bits <= 4
    assert Plan.load(tmp_path / "out" / "plan.json").digest() == plan.digest()
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["difference"]["relative"] < 1e-6
    assert net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_folder_in_use_is_told_first(net, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="new or empty"):
        quantize(net, torch.randn(4, 8), "4 bits", tmp_path)


def test_unknown_setting(net, tmp_path):
    with pytest.raises(TypeError, match="speed"):
        quantize(net, torch.randn(4, 8), "4 bits", tmp_path / "out", speed="fast")
