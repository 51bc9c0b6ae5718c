from __future__ import annotations

import torch
from torch import nn

from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.models.sharing import sharing_weights
from bitquota.request import PlanRequest


class TestSetup:
    def test_runners_share_what_was_exported(self):
        """One graph for chunks of one size, whoever runs them; another size has its own."""
        torch.manual_seed(0)
        model = finish(nn.Linear(4, 4).eval(), source="test", architecture="test")
        request = PlanRequest(budgets=("4 bits",), samples=16, holdout_samples=16)
        setup = build_setup(model, CalibrationSet(inputs=(torch.randn(40, 4),)), request)
        runners = setup.runner(), setup.runner(setup.holdout)
        assert runners[0].graph(16) is runners[1].graph(16)
        assert runners[0].graph(8) is not runners[0].graph(16)


class TestSharingWeights:
    def a_model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        model[2].weight = model[0].weight  # tied
        return model.eval()

    def test_memory_is_shared(self):
        """A second copy of all weights would only take room."""
        model = self.a_model()
        copy = sharing_weights(model)
        assert [p.data_ptr() for p in model.parameters()] == [
            p.data_ptr() for p in copy.parameters()
        ]

    def test_replaced_weights_are_not_seen_outside(self):
        """As runners do it: another tensor in place of the weight."""
        model, x = self.a_model(), torch.ones(2, 4)
        expected = model(x)
        copy = sharing_weights(model)
        copy[0].weight.data = torch.zeros(4, 4)
        assert not torch.equal(expected, copy(x))
        assert torch.equal(expected, model(x))

    def test_statistics_are_copies(self):
        model = self.a_model()
        copy = sharing_weights(model)
        copy[1].running_mean.fill_(7)
        assert float(model[1].running_mean.sum()) == 0

    def test_ties_stay(self):
        copy = sharing_weights(self.a_model())
        assert copy[0].weight is copy[2].weight
