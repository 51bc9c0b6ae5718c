"""Second moments of few positions: the prior by hand, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.models.discovery import discover
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.shrinkage import PRIOR, shrink
from bitquota.quantizers.weights import quantize


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x):
    return (x.T @ x)[None].clone()


class TestShrink:
    def test_is_what_uncorrelated_positions_of_the_same_energy_add(self):
        x, y = normal(10, 6), normal(10, 6, seed=1)
        gram, cross = gram_of(x), (y.T @ x)[None].clone()
        # Further positions, each with all its energy in another column.
        energy = float(x.square().sum()) / len(x)
        further = (PRIOR * energy) ** 0.5 * torch.eye(6, dtype=torch.float64)
        expected = [torch.cat([t, further]).T @ torch.cat([x, further]) for t in (x, y)]
        shrink(gram, 10, cross)
        for found, wanted in zip((gram, cross), expected, strict=True):
            assert torch.allclose(found[0], wanted)

    def test_groups_have_their_own_energy(self):
        gram = torch.stack([torch.eye(3), 4 * torch.eye(3)]).double()
        shrink(gram, 6)
        share = PRIOR * 3 / 6
        assert [1 + share, 4 * (1 + share)] == [float(part[0, 0]) for part in gram]

    def test_nothing_seen_adds_nothing(self):
        gram = torch.zeros(1, 3, 3, dtype=torch.float64)
        shrink(gram, 0)
        assert not gram.any()

    @pytest.mark.parametrize("positions", [32, 64, 256])
    @pytest.mark.parametrize("correlated", [False, True])
    def test_errors_on_other_inputs_are_smaller(self, positions, correlated):
        """Feedback on few positions alone may do worse on others than rounding to nearest."""
        energies = 1 / torch.arange(1, 65).double() if correlated else torch.ones(64).double()
        turn = torch.linalg.qr(normal(64, 64, seed=2)).Q
        mix = turn * energies.sqrt() @ turn.T
        seen, unseen = normal(positions, 64) @ mix, normal(4096, 64, seed=3) @ mix
        weights = normal(32, 64, seed=4)
        errors = []
        for shrunk in (False, True):
            gram = gram_of(seen)
            if shrunk:
                shrink(gram, positions)
            found = quantize(weights, 3, Scheme(), inputs_gram=gram, rounding="gptq")
            errors.append(float((unseen @ (weights - found.dequantize()).T).square().mean()))
        assert errors[1] < errors[0]


def test_moments_of_inputs_are_shrunk():
    """Positions of a convolution are counted, not samples."""
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    x = normal(4, 2, 3, 3)
    inventory = discover(module, (x,))
    plain = input_grams(module, inventory, [(x[:1],), (x[1:],)])
    found = input_grams(module, inventory, [(x[:1],), (x[1:],)], shrunk=True)
    for name, positions in (("0", 16), ("2", 4)):
        shrink(plain[name], positions)
        assert torch.allclose(plain[name], found[name])
