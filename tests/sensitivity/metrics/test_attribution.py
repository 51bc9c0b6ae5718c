"""Attributions of quantized layers: by hand on a linear model, and what is refused."""

import pytest
import torch
from torch import nn

from bitquota.errors import InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics.attribution import AttributionChange
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Branches, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


class TestAttributionChange:
    def test_of_a_linear_layer_is_input_times_weight(self):
        """Two layers whose outputs add: the row of the largest output, element by element."""
        module = build(Branches)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Branches), chunk_size=99, engine="eager")
        table = table_of(inventory)
        matrix = AttributionChange().measure(runner, table, KL)
        (x,) = runner.calibration.inputs
        whole = (module.left.weight + module.right.weight).detach()
        top = module(x).argmax(dim=-1)
        before = (x * whole[top]).abs().double()
        for row, found in zip(table.rows, matrix.diagonal, strict=True):
            (candidate,) = row.candidates
            change = runner.weights(candidate) - runner.weights.original(candidate.layer)
            after = (x * (whole + change)[top]).abs().double()
            expected = ((after - before).square().sum(1) / before.square().sum(1)).mean()
            assert found == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-12)

    def test_refuses_tokens(self):
        """Nothing to attribute to."""
        module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
        data = CalibrationSet(inputs=(torch.randint(7, (4, 3)),))
        inventory = discover(module, data.inputs)
        runner = make_runner(module, inventory, data, engine="eager")
        with pytest.raises(InvalidModel, match="reads integers such as tokens"):
            AttributionChange().measure(runner, table_of(inventory), KL)
