"""Codebooks: exact level gradients, levels carry their latents, bytes as counted."""

import pytest
import torch

from bitquota.errors import InvalidInput
from bitquota.quantizers.codebook import CodebookWeight, _Lookup, assign, start_levels
from refusals import refused


def weights(n=600, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestStartLevels:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_are_a_fixed_point_of_lloyd(self, bits):
        """Each level is about the mean of its weights, and levels ascend."""
        values = weights()
        levels = start_levels(values, bits, steps=200)
        codes = assign(values, levels)
        assert bool((levels[1:] > levels[:-1]).all())
        for k in range(2**bits):
            assert float(values[codes == k].mean()) == pytest.approx(float(levels[k]), abs=0.03)

    def test_beats_quantiles(self):
        """Lloyd steps lower the error."""
        values = weights()
        errors = [
            float((values - (levels := start_levels(values, 3, steps=s))[assign(values, levels)])
                  .square().sum())
            for s in (0, 20)
        ]  # fmt: skip
        assert errors[1] < errors[0]

    def test_symmetric_levels_mirror(self):
        """L_k = -L_(K+1-k)."""
        levels = start_levels(weights() + 0.5, 3, symmetric=True)
        assert torch.allclose(levels, -levels.flip(0))

    def test_constant_weights_need_no_clusters(self):
        """Nothing to cluster, nothing breaks."""
        levels = start_levels(torch.full((10,), 0.5), 2)
        assert 0.5 == float(levels[assign(torch.tensor([0.5]), levels)])

    def test_refuses_a_codebook_of_thousands(self):
        """Sixteen bits would be 65,536 floats."""
        with refused(InvalidInput, bits=16):
            start_levels(weights(), 16)


class TestCodebookWeight:
    def test_level_gradients_are_exact(self):
        """Against finite differences on a frozen assignment."""
        values, levels = weights(50), start_levels(weights(50), 2).requires_grad_()
        target = weights(50, seed=1)

        def objective(current):
            return (_Lookup.apply(values, current) - target).pow(3).sum()

        objective(levels).backward()
        for k in range(4):
            change = torch.zeros(4, dtype=torch.float64)
            change[k] = 1e-6
            codes = assign(values, levels)
            up, down = (
                ((levels.detach() + sign * change)[codes] - target).pow(3).sum() for sign in (1, -1)
            )
            assert float((up - down) / 2e-6) == pytest.approx(levels.grad[k].item(), rel=1e-5)

    def test_a_level_step_changes_no_assignment(self):
        """However unevenly levels move; without the carry assignments flip."""
        latents = weights()
        codebook = CodebookWeight(latents, 3)
        before = assign(latents, codebook.levels)
        step = torch.tensor([0.05, -0.03, 0.04, -0.06, 0.05, 0.02, -0.04, 0.06]).double()
        with torch.no_grad():
            codebook.levels += step
        assert bool((assign(latents, codebook.levels) != before).any())
        codebook.carry(latents)
        assert torch.equal(before, assign(latents, codebook.levels))

    def test_a_latent_keeps_its_own_step(self):
        """With the levels at rest nothing is carried."""
        latents = weights()
        codebook = CodebookWeight(latents, 3)
        moved = latents + 0.01
        expected = moved.clone()
        codebook.carry(moved)
        assert torch.allclose(expected, moved, atol=1e-12)

    def test_a_common_shift_moves_every_latent_as_far(self):
        """The latents move along exactly."""
        latents = weights()
        codebook = CodebookWeight(latents, 3)
        before = latents.clone()
        with torch.no_grad():
            codebook.levels += 0.4
        codebook.carry(latents)
        assert torch.allclose(before + 0.4, latents)

    def test_symmetric_levels_stay_symmetric(self):
        """After any step."""
        latents = weights()
        codebook = CodebookWeight(latents, 2, symmetric=True)
        with torch.no_grad():
            codebook.levels += torch.tensor([0.1, -0.2, 0.05, 0.3]).double()
        codebook.carry(latents)
        assert torch.allclose(codebook.levels, -codebook.levels.flip(0))

    def test_every_row_can_have_levels_of_its_own(self):
        """Gradients and carry go by row, as for each row alone."""
        latents = weights(80).reshape(4, 20)
        latents[1] *= 5
        together = CodebookWeight(latents, 2, per_row=True)
        alone = [CodebookWeight(row, 2) for row in latents]
        assert torch.equal(together.levels, torch.stack([c.levels for c in alone]))
        together(latents).pow(3).sum().backward()
        for row, codebook, gradient in zip(latents, alone, together.levels.grad, strict=True):
            codebook(row).pow(3).sum().backward()
            assert torch.allclose(codebook.levels.grad, gradient)
        moved = latents.clone()
        with torch.no_grad():
            together.levels += torch.tensor([0.1, -0.02, 0.05, 0.02]).double()
        before = assign(moved, together.previous)
        together.carry(moved)
        assert torch.equal(before, assign(moved, together.levels))

    def test_trains_with_levels_as_they_are_stored(self):
        """Half precision rounds them in the forward pass."""
        latents = weights().float()
        codebook = CodebookWeight(latents, 3, stored_as=torch.float16)
        used = codebook(latents).unique()
        assert torch.equal(used.half().float(), used)
