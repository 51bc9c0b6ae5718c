from __future__ import annotations

import torch
from torch import nn

from bitquota.measurement_setup import sharing_weights


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
