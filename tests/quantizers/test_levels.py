"""Codebooks and powers of two as stored formats: counted to the bit, read back as written."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.candidates.storage import (
    CODEBOOKS,
    GRID_BITS,
    SMALL_SCALES,
    Granularity,
    Grid,
    ScaleFormat,
    ScaleRule,
    Scheme,
    n_scales,
    storage_size,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.codebook import start_levels
from bitquota.quantizers.grid import NF4, companded_levels, numbers_of, power_codes, power_values
from bitquota.quantizers.levels import fit_levels, fit_scale
from bitquota.quantizers.packing import pack, unpack
from bitquota.quantizers.weights import quantize
from refusals import refused

LEVELS = (Grid.CODEBOOK, Grid.COMPANDED, Grid.POWER_OF_TWO, Grid.NORMAL_FLOAT)


@st.composite
def formats(draw, grids=LEVELS):
    """A scheme of one of the grids, and a width that it takes."""
    grid = draw(st.sampled_from(grids))
    allowed = [Granularity.TENSOR, Granularity.CHANNEL]
    if grid not in CODEBOOKS:
        allowed.append(Granularity.GROUP)
    granularity = draw(st.sampled_from(allowed))
    scheme = Scheme(
        grid=grid,
        granularity=granularity,
        group_size=draw(st.integers(1, 9)) if granularity is Granularity.GROUP else None,
        scale_format=draw(st.sampled_from(sorted(set(ScaleFormat) - SMALL_SCALES))),
        row_alignment_bits=draw(st.sampled_from([0, 8, 32])),
    )
    bits = draw(st.sampled_from(GRID_BITS[grid]))
    return scheme, bits


def random_matrix(rows=6, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class TestQuantize:
    @given(kind=formats(), rows=st.integers(1, 5), columns=st.integers(1, 12))
    @settings(max_examples=80, deadline=None)
    def test_bytes_are_those_of_storage_size(self, kind, rows, columns):
        """Levels and scales included; unpacked to the same weight."""
        scheme, bits = kind
        weight = quantize(random_matrix(rows, columns, columns), bits, scheme)
        packed = pack(weight)
        size = storage_size(rows, columns, bits, scheme)
        assert size == packed.size
        assert size.total == 8 * packed.n_bytes
        lines = n_scales(rows, columns, scheme)
        per_line = {Grid.CODEBOOK: 2**bits, Grid.COMPANDED: 2}.get(scheme.grid, 1)
        assert lines * per_line * scheme.scale_format.bits == size.scales
        back = unpack(packed)
        assert torch.equal(weight.codes, back.codes)
        assert torch.equal(weight.dequantize(), back.dequantize())

    @given(kind=formats((Grid.CODEBOOK, Grid.POWER_OF_TWO)), seed=st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_a_weight_on_the_grid_is_read_back_as_it_is(self, kind, seed):
        """Quantizing what was quantized changes nothing: trained weights can be exported."""
        scheme, bits = kind
        once = quantize(random_matrix(4, 30, seed), bits, scheme).dequantize()
        again = quantize(once, bits, scheme).dequantize()
        assert torch.allclose(once, again, rtol=1e-6, atol=0)

    def test_codes_are_nearest(self):
        """Against a search over all levels, for both grids."""
        matrix = random_matrix()
        for grid, bits in product((Grid.CODEBOOK, Grid.POWER_OF_TWO), (2, 3)):
            weight = quantize(matrix, bits, Scheme(grid=grid))
            if grid is Grid.CODEBOOK:
                levels = weight.scales
            else:
                powers = 2.0 ** -torch.arange(2 ** (bits - 1))
                levels = weight.scales * torch.cat([powers, -powers])
            distance = (matrix[:, :, None] - levels[:, None, :]).abs()
            assert torch.allclose(
                distance.amin(dim=2), (matrix - weight.dequantize()).abs(), atol=1e-6
            )

    def test_a_codebook_is_never_worse_than_integers(self):
        """Its levels are free; at 2 and 3 bits per channel."""
        matrix = random_matrix(8, 200, 3)
        for bits in (2, 3):
            errors = [
                float((quantize(matrix, bits, Scheme(grid=g)).dequantize() - matrix).norm())
                for g in (Grid.CODEBOOK, Grid.SYMMETRIC)
            ]
            assert errors[0] < errors[1]

    def test_refuses_widths_that_the_grid_has_not(self):
        """The message names the range."""
        with refused(InvalidInput, weight_bits=8, grid="power_of_two"):
            quantize(random_matrix(), 8, Scheme(grid=Grid.POWER_OF_TWO))
        with refused(InvalidInput, weight_bits=16, grid="codebook"):
            storage_size(3, 4, 16, Scheme(grid=Grid.CODEBOOK))


class TestScheme:
    def test_refuses_what_makes_no_sense(self):
        """Levels for every group."""
        with refused(InvalidInput, granularity="group"):
            Scheme(grid=Grid.CODEBOOK, granularity=Granularity.GROUP, group_size=8)


class TestFitLevels:
    def test_few_distinct_values_are_the_levels(self):
        """Whatever their counts."""
        values = torch.tensor([[1.0] * 50 + [-3.0] + [7.0], [2.0] * 52], dtype=torch.float64)
        levels = fit_levels(values, 2)
        assert [-3.0, 1.0, 7.0] == levels[0].unique().tolist()
        assert [2.0] == levels[1].unique().tolist()

    def test_each_level_is_the_mean_of_its_weights(self):
        """Lloyd's condition, up to the number of sweeps."""
        values = random_matrix(3, 300).double()
        levels = fit_levels(values, 2)
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        for line, own, cuts in zip(values, levels, middles, strict=True):
            codes = torch.bucketize(line, cuts)
            means = torch.stack([line[codes == k].mean() for k in range(4)])
            assert torch.allclose(means, own, atol=0.02)

    def test_agrees_with_the_start_of_training(self):
        """The same method, one line at a time."""
        values = random_matrix(1, 500).double()
        ours, theirs = fit_levels(values, 3)[0], start_levels(values, 3)
        assert torch.allclose(ours, theirs, atol=0.05)

    def test_importance_pulls_levels(self):
        """The weighted error falls."""
        values = random_matrix(1, 400).double()
        weight = torch.where(values > 0, 100.0, 1.0).double()

        def error(levels):
            codes = torch.bucketize(values[0], (levels[0, 1:] + levels[0, :-1]) / 2)
            return float((weight * (values - levels[0][codes]).square()).sum())

        assert error(fit_levels(values, 2, weight)) < error(fit_levels(values, 2))


class TestFitPowerScale:
    def test_is_as_good_as_a_dense_search(self):
        """Within a per mille of the best of 2,000 scales."""
        values = random_matrix(5, 60, 7).double()

        def error(scale):
            levels = power_values(power_codes(values / scale[:, None], 3), 3)
            return (values - scale[:, None] * levels).square().sum(dim=1)

        largest = values.abs().amax(dim=1)
        dense = torch.stack([error(largest * s) for s in torch.linspace(0.1, 1.2, 2000)])
        found = fit_scale(values, numbers_of(Grid.POWER_OF_TWO, 3))
        assert bool((error(found) <= 1.01 * dense.amin(dim=0)).all())


class TestNormalFloat:
    def test_has_the_published_numbers(self):
        """Scaled to its largest weight a block reads back, code by code, in ascending order."""
        scheme = Scheme(
            grid=Grid.NORMAL_FLOAT, granularity=Granularity.GROUP, group_size=16,
            scale_rule=ScaleRule.ABSMAX,
        )  # fmt: skip
        blocks = torch.tensor([2.5, 0.25])[:, None] * torch.tensor(NF4)
        stored = quantize(blocks.reshape(1, 32), 4, scheme)
        assert [*range(16), *range(16)] == stored.codes[0].tolist()
        assert [2.5, 0.25] == stored.scales[0].tolist()
        torch.testing.assert_close(stored.dequantize().reshape(2, 16), blocks, rtol=1e-6, atol=0)

    def test_numbers_are_quantiles_of_a_normal_distribution(self):
        """QLoRA, equation 4: means of neighbouring quantiles would differ; theirs end at .9677."""
        normal = torch.distributions.Normal(0.0, 1.0)
        above = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
        below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
        made = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
        torch.testing.assert_close(torch.tensor(NF4), made, rtol=0, atol=1e-5)

    def test_is_better_than_integers_on_normal_weights(self):
        """What it is made for: squared error of blocks of 64 at 4 bits."""
        values = random_matrix(64, 256)
        errors = []
        for grid in (Grid.SYMMETRIC, Grid.NORMAL_FLOAT):
            scheme = Scheme(grid=grid, granularity=Granularity.GROUP, group_size=64)
            found = quantize(values, 4, scheme).dequantize()
            errors.append(float((found - values).square().mean()))
        assert errors[1] < errors[0]


class TestCompanded:
    def test_weights_on_its_levels_are_read_back(self):
        """Scale, exponent and side are found again, row by row."""
        wanted = torch.tensor([[0.7, 1.5], [-2.0, 2.0], [0.3, 1.0]])
        table = companded_levels(wanted, 4)
        stored = quantize(table, 4, Scheme(grid=Grid.COMPANDED))
        torch.testing.assert_close(stored.scales.reshape(3, 2), wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(stored.dequantize(), table, rtol=1e-5, atol=1e-6)

    def test_of_exponent_one_is_the_integer_grid(self):
        """Levels by hand, also turned around."""
        plain = companded_levels(torch.tensor([[4.0, 1.0], [-4.0, 1.0], [4.0, 2.0]]), 3)
        assert [-4, -3, -2, -1, 0, 1, 2, 3] == plain[0].tolist()
        assert [-3, -2, -1, 0, 1, 2, 3, 4] == plain[1].tolist()
        assert [-4, -2.25, -1, -0.25, 0, 0.25, 1, 2.25] == plain[2].tolist()

    def test_serves_heavy_tails_better_than_integers(self):
        """Of Laplacian weights at 3 bits; two numbers for a row are counted."""
        values = torch.distributions.Laplace(0.0, 1.0).icdf(
            torch.rand(16, 200, generator=torch.Generator().manual_seed(0)) * 0.998 + 0.001
        )
        schemes = Scheme(), Scheme(grid=Grid.COMPANDED)
        plain, finer = (
            float((quantize(values, 3, s).dequantize() - values).square().mean()) for s in schemes
        )
        assert finer < 0.9 * plain
        assert 16 * 32 == storage_size(16, 200, 3, schemes[1]).scales - 16 * 32
