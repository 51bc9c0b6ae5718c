"""Second moments of few positions: the formula, its limits, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.models.discovery import discover
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.shrinkage import ALIKE, shrink
from bitquota.quantizers.weights import quantize


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x):
    return (x.T @ x)[None].clone()


class TestShrink:
    @pytest.mark.parametrize(
        "energies",
        [[4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0], [9.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.1, 0.1]],
    )
    def test_is_nearly_the_best_share_for_normal_inputs(self, energies):
        """Mean squared distance to the true moment, over many draws, beside every fixed share."""
        truth = torch.diag(torch.tensor(energies).double())
        shares = torch.linspace(0, 1, 21).double()
        fixed, own = torch.zeros(21).double(), 0.0
        for seed in range(300):
            x = normal(12, 8, seed=seed) @ truth.sqrt()
            sample = x.T @ x / 12
            unit = sample.trace() / 8 * torch.eye(8)
            for k, share in enumerate(shares):
                fixed[k] += ((1 - share) * sample + share * unit - truth).square().sum()
            gram = gram_of(x)
            # Independent draws: each counts.
            shrink(gram, int(12 * ALIKE))
            own += float((gram[0] / 12 - truth).square().sum())
        assert own < 0.8 * float(fixed[0])
        assert own < 1.2 * float(fixed.min())

    def test_keeps_the_trace_and_moves_others_alike(self):
        mix = torch.tensor([[5.0, 1, 0, 0, 0, 0]]).double().T @ torch.ones(
            1, 6
        ).double() + torch.eye(6)
        x, y = normal(12, 6) @ mix, normal(12, 6, seed=1)
        gram, cross = gram_of(x), (y.T @ x)[None].clone()
        shrink(gram, 12, cross)
        assert float(gram[0].trace()) == pytest.approx(float(x.square().sum()))
        share = float(gram[0, 0, 1]) / float((x.T @ x)[0, 1])
        assert 0 < share < 1
        change = (cross - gram)[0]
        assert torch.allclose(change, share * (y.T @ x - x.T @ x))

    def test_falls_with_the_number_of_positions(self):
        mix = normal(16, 16, seed=2)
        kept = []
        for n in (8, 64, 4096):
            x = normal(n, 16) @ mix
            gram = gram_of(x)
            shrink(gram, n)
            kept.append(float(gram[0, 0, 1]) / float((x.T @ x)[0, 1]))
        assert kept == sorted(kept)
        assert kept[-1] > 0.99

    @pytest.mark.parametrize(
        "gram", [torch.zeros(2, 3, 3), 4 * torch.eye(3)[None], torch.ones(1, 1, 1)]
    )
    def test_leaves_multiples_of_the_unit_matrix_alone(self, gram):
        found = gram.double()
        shrink(found, 5)
        assert torch.equal(gram.double(), found)

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
        assert errors[1] < 0.98 * errors[0]


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
