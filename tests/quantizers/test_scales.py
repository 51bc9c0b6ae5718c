"""Scale fitting: exact least squares against dense scans and brute force."""

import itertools
import math

import pytest
import torch

from bitquota.candidates.storage import ScaleRule
from bitquota.quantizers import scales
from bitquota.quantizers.scales import (
    _exact_scales,
    _sorted_scales,
    asymmetric_scale,
    grid_error,
    least_squares_scale,
    symmetric_scale,
)


def random_lines(seed, lines=5, n=40, heavy=False):
    """Return f64[lines, n]; heavy tails put outliers in."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(lines, n, generator=generator, dtype=torch.float64)
    return values**3 if heavy else values


def scanned_error(values, low, high, importance=None, points=4000):
    """Return the smallest error of a dense scan over scales."""
    reach = values.abs().amax(dim=1)
    best = torch.full((len(values),), math.inf, dtype=torch.float64)
    for share in torch.linspace(1e-3, 1.0, points, dtype=torch.float64):
        scale = reach * share / max(1, min(high, -low)) * 1.2
        best = torch.minimum(best, grid_error(values, scale, low, high, importance))
    return best


class TestLeastSquaresScale:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
    @pytest.mark.parametrize("heavy", [False, True])
    def test_is_never_worse_than_a_dense_scan(self, bits, heavy):
        """4,000 scales find nothing better, with and without outliers."""
        values = random_lines(bits, heavy=heavy)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        found = grid_error(values, least_squares_scale(values, low, high), low, high)
        scanned = scanned_error(values, low, high)
        assert bool((found <= scanned * (1 + 1e-9)).all())

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_is_never_worse_than_a_dense_scan_when_weighted(self, bits):
        """The same holds for weighted errors."""
        values = random_lines(bits)
        importance = torch.rand(5, 40, generator=torch.Generator().manual_seed(9)).double() ** 4
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = least_squares_scale(values, low, high, importance)
        found = grid_error(values, scale, low, high, importance)
        assert bool((found <= scanned_error(values, low, high, importance) * (1 + 1e-9)).all())

    def test_equals_brute_force_over_all_codes(self):
        """Over every assignment of 2-bit codes to six weights no better scale exists."""
        values = random_lines(3, lines=1, n=6)
        best = math.inf
        for codes in itertools.product(range(-2, 2), repeat=6):
            q = torch.tensor([codes], dtype=torch.float64)
            power = float((q * q).sum())
            scale = float((q * values).sum()) / power if power else 0.0
            if scale >= 0:
                best = min(best, float((values - scale * q).square().sum()))
        found = grid_error(values, least_squares_scale(values, -2, 1), -2, 1)
        assert best == pytest.approx(float(found), rel=1e-12)

    def test_finds_the_grid_that_the_weights_lie_on(self):
        """Weights on a coarse grid have error zero, however small the range they use."""
        codes = torch.tensor([[3.0, -5.0, 1.0, 0.0, 2.0, -4.0]], dtype=torch.float64)
        found = least_squares_scale(codes * 0.37, -128, 127)
        assert 0.0 == pytest.approx(float(grid_error(codes * 0.37, found, -128, 127)), abs=1e-20)

    def test_scales_with_the_weights(self):
        """Weights times a constant have the scale times that constant."""
        values = random_lines(5)
        once, scaled = least_squares_scale(values, -4, 3), least_squares_scale(values * 8, -4, 3)
        assert torch.allclose(once * 8, scaled, rtol=1e-12)

    def test_ignores_values_of_importance_zero(self):
        """Padding changes nothing."""
        values = random_lines(6, n=12)
        padded = torch.cat([values, torch.full((5, 3), 1e6, dtype=torch.float64)], dim=1)
        importance = torch.cat([torch.ones(5, 12), torch.zeros(5, 3)], dim=1).double()
        assert torch.allclose(
            least_squares_scale(values, -4, 3), least_squares_scale(padded, -4, 3, importance)
        )

    def test_lines_do_not_depend_on_each_other(self, monkeypatch):
        """Cutting the work into small parts gives the same scales."""
        values = random_lines(7, lines=9)
        whole = least_squares_scale(values, -8, 7)
        monkeypatch.setattr(scales, "VALUES_AT_ONCE", 80)
        assert torch.allclose(whole, least_squares_scale(values, -8, 7), rtol=1e-12)

    def test_all_zero_weights_have_scale_zero(self):
        """There is nothing to fit."""
        assert [0.0] == least_squares_scale(torch.zeros(1, 4).double(), -4, 3).tolist()

    @pytest.mark.parametrize(("bits", "most"), [(6, 1.06), (8, 1.12)])
    @pytest.mark.parametrize("n", [64, 500])
    def test_the_scan_loses_little(self, bits, most, n, monkeypatch):
        """Where breakpoints are too many; and next to nothing against absmax."""
        values = random_lines(8, lines=40, n=n, heavy=True)
        importance = torch.rand(40, n, generator=torch.Generator().manual_seed(9)).double()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for weight in (None, importance):
            exact = grid_error(
                values, least_squares_scale(values, low, high, weight), low, high, weight
            )
            with monkeypatch.context() as patch:
                patch.setattr(scales, "EXACT_LIMIT_BREAKPOINTS", 0)
                found = grid_error(
                    values, least_squares_scale(values, low, high, weight), low, high, weight
                )
            assert float(found.sum()) <= most * float(exact.sum())
            reach = torch.where(values >= 0, values / high, values / low).amax(dim=1)
            assert bool((found <= grid_error(values, reach, low, high, weight) * 1.001).all())

    @pytest.mark.parametrize("share", [1.0, 0.4])
    @pytest.mark.parametrize("bits", [6, 8])
    def test_the_scan_finds_the_grid_that_weights_lie_on(self, bits, share, monkeypatch):
        """As of a trained model, whether it uses all levels or a part of them."""
        top = 2 ** (bits - 1) - 1
        generator = torch.Generator().manual_seed(0)
        codes = (torch.randn(20, 256, generator=generator).double() * top / 3).round()
        codes = (codes.clamp(-top, top) * share).round()
        codes[:, 0] = round(top * share)
        monkeypatch.setattr(scales, "EXACT_LIMIT_BREAKPOINTS", 0)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        found = least_squares_scale(codes * 0.37, low, high)
        assert bool((grid_error(codes * 0.37, found, low, high) < 1e-12).all())

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("bits", [2, 3, 6])
    def test_is_the_same_in_machine_code_and_in_torch(self, bits, weighted):
        """Where values are equal in size, the order of sums may differ."""
        values = random_lines(seed=bits, lines=50, n=64).bfloat16().double()
        values[3] = 0
        importance = random_lines(seed=9, lines=50, n=64).abs().clamp(min=0.1) - 0.1
        weight = importance if weighted else None
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        pairs = [(low, high), (-high, -low), (0, high - low)]
        bounds = torch.tensor(pairs, dtype=torch.float64)[..., None].expand(-1, -1, 50)
        compiled = _exact_scales(values, bounds, weight)
        torch.testing.assert_close(
            compiled, _sorted_scales(values, bounds, weight), rtol=1e-14, atol=0
        )
        assert (compiled[:, 3] == 0).all()
        assert (compiled[:2, :3] > 0).all()

    def test_ranges_are_fitted_together_as_apart(self):
        """Breakpoints are shared, results are not."""
        values = random_lines(3, lines=7)
        pairs = [(-4, 3), (-3, 4), (0, 7), (-7, 0), (torch.arange(-7, 0), torch.arange(0, 7))]
        for (low, high), scale in zip(
            pairs, scales.least_squares_scales(values, pairs), strict=True
        ):
            alone = grid_error(values, least_squares_scale(values, low, high), low, high)
            assert torch.allclose(alone, grid_error(values, scale, low, high), rtol=1e-12)


class TestSymmetricScale:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
    def test_absmax_leaves_no_error_beyond_half_a_step(self, bits):
        """Its definition; a slightly smaller scale breaks it."""
        values = random_lines(bits)
        scale = symmetric_scale(values, bits, ScaleRule.ABSMAX)
        step = scale * (2 if bits == 1 else 1)
        reach = scale * (1 if bits == 1 else 2 ** (bits - 1) - 1) + step / 2
        assert torch.allclose(values.abs().amax(dim=1), reach)

    def test_percentile_leaves_out_the_outermost_weights(self):
        """Of 1,000 weights the five largest are beyond the grid."""
        values = torch.arange(1.0, 1001.0).double()[None]
        scale = symmetric_scale(values, 4, ScaleRule.PERCENTILE)
        assert 995.0 == pytest.approx(float(scale) * 7.5)

    def test_one_bit_least_squares_is_the_weighted_mean_magnitude(self):
        """The closed form of Rastegari et al. 2016, equation 6, with weights."""
        values = torch.tensor([[1.0, -2.0, 4.0]]).double()
        weight = torch.tensor([[1.0, 1.0, 2.0]]).double()
        assert 11 / 4 == float(symmetric_scale(values, 1, ScaleRule.LEAST_SQUARES, weight))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_least_squares_gives_the_extra_level_to_the_heavier_tail(self, bits):
        """Weights and their negatives are fitted equally well, and no worse than by positives."""
        values = random_lines(bits, heavy=True)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        both = symmetric_scale(values, bits, ScaleRule.LEAST_SQUARES)
        mirrored = symmetric_scale(-values, bits, ScaleRule.LEAST_SQUARES)
        found = grid_error(values, both, low, high)
        assert torch.allclose(found, grid_error(-values, mirrored, low, high), rtol=1e-8)
        positive = symmetric_scale(values, bits, ScaleRule.LEAST_SQUARES_POSITIVE)
        assert bool((positive > 0).all())
        assert bool((found <= grid_error(values, positive, low, high)).all())

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
    def test_least_squares_beats_the_other_rules(self, bits):
        """On its own measure it must."""
        values = random_lines(bits, heavy=True)
        low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors = {}
        for rule in ScaleRule:
            scale = symmetric_scale(values, bits, rule)
            if bits == 1:
                signs = torch.where(values >= 0, 1.0, -1.0)
                errors[rule] = (values - scale[:, None] * signs).square().sum(dim=1)
            else:
                errors[rule] = grid_error(values, scale, low, high)
        for rule in (ScaleRule.ABSMAX, ScaleRule.PERCENTILE):
            assert bool((errors[ScaleRule.LEAST_SQUARES] <= errors[rule] * (1 + 1e-9)).all())


class TestAsymmetricScale:
    @pytest.mark.parametrize("rule", ScaleRule)
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_zero_points_fit_the_bit_width(self, rule, bits):
        """They are stored in as many bits as a code, whatever the sign of the weights."""
        values = torch.cat([random_lines(1) + 3, random_lines(2) - 3, random_lines(3)])
        _, zero = asymmetric_scale(values, bits, rule)
        assert 0 <= int(zero.min())
        assert int(zero.max()) <= 2**bits - 1

    def test_absmax_spans_minimum_to_maximum(self):
        """Both ends are on the grid within half a step."""
        values = random_lines(4)
        scale, zero = asymmetric_scale(values, 4, ScaleRule.ABSMAX)
        low, high = -zero * scale, (15 - zero) * scale
        assert bool(((values.amin(dim=1) - low).abs() <= scale / 2 + 1e-12).all())
        assert bool(((values.amax(dim=1) - high).abs() <= scale / 2 + 1e-12).all())

    @pytest.mark.parametrize("bits", [1, 2, 3])
    def test_least_squares_tries_every_zero_point_at_few_bits(self, bits):
        """No scale and zero point of a dense scan does better."""
        values = random_lines(5) + 0.7
        top = 2**bits - 1
        scale, zero = asymmetric_scale(values, bits, ScaleRule.LEAST_SQUARES)
        found = grid_error(values, scale, -zero, top - zero)
        for z in range(top + 1):
            reach = values.abs().amax(dim=1)
            for share in torch.linspace(0.01, 3.0, 400, dtype=torch.float64):
                error = grid_error(values, reach * share, -z, top - z)
                assert bool((found <= error * (1 + 1e-9)).all())

    @pytest.mark.parametrize("bits", [4, 6, 8])
    def test_least_squares_beats_a_scan_over_ranges(self, bits):
        """Above 3 bits it is at least as good as 400 ranges with their own zero points."""
        values = random_lines(6, heavy=True) + 0.5
        top = 2**bits - 1
        scale, zero = asymmetric_scale(values, bits, ScaleRule.LEAST_SQUARES)
        found = grid_error(values, scale, -zero, top - zero)
        low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
        best = torch.full((len(values),), math.inf, dtype=torch.float64)
        for a in torch.linspace(0.3, 1.0, 20):
            for b in torch.linspace(0.3, 1.0, 20):
                tried, z = scales._range_to_grid(low * a, high * b, top)
                best = torch.minimum(best, grid_error(values, tried, -z, top - z))
        assert bool((found <= best * 1.01).all())

    def test_beats_symmetric_on_skewed_weights(self):
        """That is what a zero point is for."""
        values = random_lines(7).abs()
        scale, zero = asymmetric_scale(values, 4, ScaleRule.LEAST_SQUARES)
        plain = symmetric_scale(values, 4, ScaleRule.LEAST_SQUARES)
        skewed = grid_error(values, scale, -zero, 15 - zero)
        assert bool((skewed < grid_error(values, plain, -8, 7)).all())
