"""Rounders with feedback on every grid: legal codes, smaller output errors, never larger ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import (
    CODEBOOKS,
    GRID_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    ScaleRule,
    Scheme,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.grid import code_range, matrix_grid, stacked
from bitquota.quantizers.rounders import FEEDBACK, Rounder
from bitquota.quantizers.weights import SCANNED_BITS, estimated, fake_quantize, quantize
from refusals import refused

COLUMNS = 256


def correlated(columns: int = COLUMNS, seed: int = 0, n: int = 600) -> torch.Tensor:
    """Return the Gram, f64[columns, columns], of inputs as behind a ReLU: few common factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    mixing = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    inputs = (factors @ mixing + 0.5 * noise).clamp(min=0)
    return inputs.T @ inputs


def weights(rows: int = 8, columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_errors(matrix, stored, gram):
    """Return f64[rows]: e G e^T."""
    error = matrix.double() - stored.dequantize().double()
    return ((error @ gram) * error).sum(dim=1)


def schemes():
    """Every grid with every granularity that it has."""
    for grid, granularity in itertools.product(Grid, Granularity):
        if grid is Grid.K_BLOCKS:
            if granularity is Granularity.GROUP:
                yield Scheme(
                    grid=grid,
                    granularity=granularity,
                    group_size=256,
                    scale_format=ScaleFormat.FP16,
                )
        elif grid not in CODEBOOKS or granularity is not Granularity.GROUP:
            size = 40 if granularity is Granularity.GROUP else None
            yield Scheme(grid=grid, granularity=granularity, group_size=size)


CASES = [
    pytest.param(scheme, bits, id=f"{scheme.grid}-{scheme.granularity}-{bits}")
    for scheme in schemes()
    for bits in (1, 2, 3, 4, 6)
    if bits in GRID_BITS.get(scheme.grid, range(1, 17))
]


@pytest.mark.parametrize("rounder", list(FEEDBACK))
@pytest.mark.parametrize(("scheme", "bits"), CASES)
class TestEveryGrid:
    def test_output_error_is_far_below_rounding_to_nearest(self, rounder, scheme, bits):
        """By half at least, all rows together; and no row's is larger.

        At one bit less: a code at its end cannot repay.
        """
        matrix, gram = weights(), correlated()
        importance = gram.diagonal()
        nearest = quantize(matrix, bits, scheme, importance=importance)
        fed = quantize(matrix, bits, scheme, inputs_gram=gram, rounding=rounder)

        before, after = (output_errors(matrix, stored, gram) for stored in (nearest, fed))
        assert float(after.sum()) < (0.5 if bits > 1 else 0.8) * float(before.sum())
        assert bool((after <= before * (1 + 1e-5)).all())

    def test_the_grid_is_that_of_nearest_and_codes_are_of_it(self, rounder, scheme, bits):
        """Codes are legal and read back as the grid says; scales are those of nearest.

        But for those that GPTQ fits again to its codes (``refit``).
        """
        matrix, gram = weights(), correlated()
        nearest = quantize(matrix, bits, scheme, importance=gram.diagonal())
        fed = quantize(matrix, bits, scheme, inputs_gram=gram, rounding=rounder)

        refitted = (
            rounder is Rounder.GPTQ
            and scheme.grid in (Grid.SYMMETRIC, Grid.ASYMMETRIC)
            and scheme.granularity is not Granularity.TENSOR
        )
        same = torch.allclose(nearest.scales.float(), fed.scales.float(), rtol=1e-6)
        assert same is not refitted
        least, most = code_range(scheme.grid, bits)
        assert least <= int(fed.codes.min())
        assert int(fed.codes.max()) <= most
        assert len(fed.codes.unique()) <= 2**bits
        grid = matrix_grid(fed.scales, fed.zero_points, bits, scheme, COLUMNS)
        read = grid.read(fed.codes)
        assert torch.allclose(fed.dequantize().double(), read, rtol=1e-5, atol=1e-6)
        assert torch.equal(read, grid.read(grid.nearest(read)))

    def test_twice_the_same(self, rounder, scheme, bits):
        """The same bytes from the same inputs."""
        matrix, gram = weights(), correlated()
        a, b = (quantize(matrix, bits, scheme, inputs_gram=gram, rounding=rounder) for _ in "ab")
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("rounder", list(FEEDBACK))
class TestRounders:
    @pytest.mark.parametrize("seed", range(6))
    def test_close_to_the_best_of_all_codes(self, rounder, seed):
        """Five weights at two bits: all 1,024 vectors of codes are tried for each row."""
        matrix, gram = weights(4, 5, seed), correlated(5, seed, n=40)
        fed = quantize(matrix, 2, Scheme(), inputs_gram=gram, rounding=rounder)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)

        errors = output_errors(matrix, fed, gram)
        nearest = quantize(matrix, 2, Scheme(), importance=gram.diagonal())
        for row, scale in enumerate(fed.scales[:, 0].double()):
            gap = matrix[row].double() - every * scale
            best = float(((gap @ gram) * gap).sum(dim=1).min())
            worst = float(output_errors(matrix, nearest, gram)[row])
            assert best * (1 - 1e-5) <= float(errors[row]) <= worst * (1 + 1e-5)
        gaps = matrix.double()[:, None] - every * fed.scales.double()[:, None]
        best = ((gaps @ gram) * gaps).sum(dim=2).amin(dim=1)
        assert float(errors.sum()) < 2.5 * float(best.sum())

    def test_groups_of_rows_have_their_own_inputs(self, rounder):
        """A Gram per group equals quantizing each group alone."""
        grams = torch.stack([correlated(48, seed) for seed in (1, 2, 3)])
        matrix = weights(6, 48)
        whole = quantize(matrix, 3, Scheme(), inputs_gram=grams, rounding=rounder)
        parts = [
            quantize(matrix[2 * g : 2 * g + 2], 3, Scheme(), inputs_gram=grams[g], rounding=rounder)
            for g in range(3)
        ]
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes)
        assert torch.equal(torch.cat([p.scales for p in parts]), whole.scales)

    def test_inputs_that_are_always_zero(self, rounder):
        """Nothing is repaid through them, and nothing is divided by zero."""
        gram = correlated(48)
        gram[::2], gram[:, ::2] = 0, 0
        fed = quantize(weights(4, 48), 3, Scheme(), inputs_gram=gram, rounding=rounder)
        assert bool(torch.isfinite(fed.dequantize()).all())
        none = quantize(weights(4, 48), 3, Scheme(), inputs_gram=0 * gram, rounding=rounder)
        assert torch.equal(quantize(weights(4, 48), 3, Scheme()).codes, none.codes)

    def test_the_unit_of_the_gram_does_not_matter(self, rounder):
        """A sum or a mean over samples: the same codes."""
        gram, matrix = correlated(48), weights(4, 48)
        a, b = (
            quantize(matrix, 3, Scheme(), inputs_gram=gram * unit, rounding=rounder).codes
            for unit in (1.0, 2.0**-20)
        )
        assert torch.equal(a, b)

    def test_importance_that_is_given_wins(self, rounder):
        """Scales are then those of the importance, not of the Gram."""
        gram, matrix = correlated(48), weights(4, 48)
        ones = torch.ones(48)
        fed = quantize(matrix, 3, Scheme(), importance=ones, inputs_gram=gram, rounding=rounder)
        assert torch.equal(quantize(matrix, 3, Scheme(), importance=ones).scales, fed.scales)

    def test_transposed_convolution(self, rounder):
        """Shaped back as the framework stores it, each group by its own Gram."""
        from torch import nn

        from bitquota.models.discovery import discover
        from bitquota.quantizers.input_moments import input_grams

        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        module = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2))
        common = torch.randn(4, 1, 9, 9, generator=generator)
        x = (common + 0.3 * torch.randn(4, 6, 9, 9, generator=generator)).clamp(min=0)
        inventory = discover(module, (x,))
        (layer,) = inventory.layers
        assert layer.kind is LayerKind.CONV_TRANSPOSE2D
        gram = input_grams(module, inventory, [(x,)])["0"]
        weight = module[0].weight.detach().clone()
        exact = module(x).detach()
        errors = []
        for name in ("nearest", rounder):
            with torch.no_grad():
                module[0].weight.copy_(
                    fake_quantize(weight, layer, 3, Scheme(), inputs_gram=gram, rounding=name)
                )
                errors.append(float((module(x) - exact).square().sum()))
        assert errors[1] < 0.7 * errors[0]

    def test_needs_a_gram(self, rounder):
        """The message says what to do."""
        with refused(InvalidInput, rounder=str(rounder)):
            quantize(weights(2, 4), 3, Scheme(), rounding=rounder)


class TestGpfq:
    def test_by_hand(self):
        """Two equal inputs: what the first column loses, the second repays."""
        from bitquota.quantizers.gpfq import gpfq

        values = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
        grid = matrix_grid(torch.ones(1, 1), None, 4, Scheme(), 2)
        gram = torch.ones(2, 2, dtype=torch.float64)

        # 0.4 -> 0, then 0.4 + 0.4 -> 1: the sum 0.8 becomes 1, not 0.
        assert [[0.0, 1.0]] == gpfq(values, grid, gram[None]).tolist()
        assert [[0, 0]] == grid.nearest(values).tolist()


class TestRounderOf:
    def test_unknown_name(self):
        """All that there are are named."""
        with pytest.raises(InvalidInput, match="nearest, gptq, gpfq"):
            quantize(weights(2, 4), 3, Scheme(), rounding="awq")

    def test_nearest_wins_over_a_scheme_with_feedback(self):
        """What is asked for counts, and no Gram is needed then."""
        from bitquota.candidates.storage import Rounding

        scheme = Scheme(rounding=Rounding.ERROR_FEEDBACK)
        plain = quantize(weights(2, 4), 3, Scheme())
        asked = quantize(weights(2, 4), 3, scheme, rounding=Rounder.NEAREST)
        assert torch.equal(plain.codes, asked.codes)


def lost(error, rounder, gram):
    """What a rounder makes small: the squared error of the weights, or of what they compute."""
    along = error if rounder is Rounder.NEAREST else error @ gram
    return float((along * error).sum())


class TestSeveralWidthsAtOnce:
    @pytest.mark.parametrize("rounder", [Rounder.NEAREST, *FEEDBACK])
    @pytest.mark.parametrize(
        "schemes",
        [
            [Scheme()] * 4,
            [Scheme(granularity=Granularity.GROUP, group_size=8)] * 4,
            [Scheme(grid=Grid.ASYMMETRIC, scale_rule=rule) for rule in list(ScaleRule)[:2] * 2],
            [Scheme(grid=Grid.CODEBOOK)] * 4,
            [Scheme(), Scheme(grid=Grid.POWER_OF_TWO), Scheme(), Scheme(grid=Grid.ASYMMETRIC)],
        ],
    )
    def test_are_rounded_as_each_by_itself(self, rounder, schemes):
        """Whether they can be rounded together or not; one at a bit has a grid of its own.

        Wide ones on the symmetric grid have scales from a scan, which cost a little.
        """
        matrix, gram = weights(), correlated()
        wanted = [(bits, s) for bits, s in zip((2, 3, 4, 6), schemes, strict=True)]
        wanted += [(1, Scheme())] if schemes[0] == Scheme() else []
        found = list(estimated(matrix, wanted, inputs_gram=gram, rounding=rounder))
        for (bits, scheme), values in zip(wanted, found, strict=True):
            (alone,) = estimated(matrix, [(bits, scheme)], inputs_gram=gram, rounding=rounder)
            assert float((values == alone).double().mean()) > 0.99
            assert float((values - alone).abs().max()) <= float(2 * matrix.abs().max())
            stored = quantize(
                matrix, bits, scheme, inputs_gram=gram, rounding=rounder, polish=False
            )
            best = stored.dequantize().double()
            if bits < SCANNED_BITS or scheme.grid is not Grid.SYMMETRIC:
                assert torch.allclose(best, alone, rtol=1e-5, atol=1e-6)
            else:
                assert lost(alone - matrix, rounder, gram) < 1.5 * lost(
                    best - matrix, rounder, gram
                )

    def test_different_kinds_have_no_grid_in_common(self):
        scales = torch.ones(2, 1)
        one = matrix_grid(scales, None, 3, Scheme(), 4)
        zeros = torch.ones(2, 1, dtype=torch.int32)
        other = matrix_grid(scales, zeros, 3, Scheme(grid=Grid.ASYMMETRIC), 4)
        assert stacked([one, other], 2, 4) is None
        together = stacked([one, matrix_grid(scales, None, 2, Scheme(), 4)], 2, 4)
        read = together.nearest(torch.full((4, 4), 100.0))
        assert read[:, 0].tolist() == [3, 3, 1, 1]
