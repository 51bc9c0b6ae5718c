"""Error feedback: smaller output errors than rounding to nearest, never larger ones."""

import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, Rounding, Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers import refit
from bitquota.quantizers.weights import quantize
from refusals import refused

FEEDBACK = Scheme(rounding=Rounding.ERROR_FEEDBACK)


def correlated(n=400, columns=48, seed=0):
    """Return non-negative, correlated inputs f64[n, columns], as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, 6, generator=generator).double()
    mixing = torch.randn(6, columns, generator=generator).double()
    noise = torch.randn(n, columns, generator=generator).double()
    return (factors @ mixing + 0.5 * noise).clamp(min=0)


def output_error(inputs, matrix, bits, scheme):
    gram = inputs.T @ inputs
    back = quantize(matrix, bits, scheme, inputs_gram=gram).dequantize()
    return float((inputs @ (matrix.double() - back.double()).T).square().sum())


class TestErrorFeedbackCodes:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    def test_output_error_is_below_rounding_to_nearest(self, bits, grid):
        """At every width, on correlated inputs."""
        inputs = correlated()
        matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
        fed = output_error(
            inputs, matrix, bits, Scheme(grid=grid, rounding=Rounding.ERROR_FEEDBACK)
        )
        assert fed < output_error(inputs, matrix, bits, Scheme(grid=grid))

    def test_saves_a_third_at_four_bits(self):
        """As such rounders did before on such data (research/prior-measurements.md)."""
        inputs = correlated()
        matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
        nearest = output_error(inputs, matrix, 4, Scheme())
        fed = output_error(inputs, matrix, 4, FEEDBACK)
        assert fed**0.5 < 0.7 * nearest**0.5

    @pytest.mark.parametrize("seed", range(5))
    def test_no_row_gets_worse(self, seed):
        """Row by row, whatever the weights; also when groups share scales."""
        inputs = correlated(seed=seed)
        matrix = torch.randn(8, 48, generator=torch.Generator().manual_seed(seed)) ** 3
        scheme = Scheme(granularity=Granularity.GROUP, group_size=10)
        fed_scheme = Scheme(
            granularity=Granularity.GROUP, group_size=10, rounding=Rounding.ERROR_FEEDBACK
        )
        gram = inputs.T @ inputs
        power = gram.diagonal()
        errors = [
            matrix.double()
            - quantize(matrix, 2, s, importance=power, inputs_gram=gram).dequantize().double()
            for s in (scheme, fed_scheme)
        ]
        nearest, fed = ((inputs @ e.T).square().sum(dim=0) for e in errors)
        assert bool((fed <= nearest * (1 + 1e-12)).all())

    def test_is_nearest_when_inputs_are_uncorrelated(self):
        """With a diagonal Gram there is nothing to repay."""
        generator = torch.Generator().manual_seed(1)
        matrix = torch.randn(8, 20, generator=generator)
        power = torch.rand(20, generator=generator)
        plain = quantize(matrix, 3, Scheme(), importance=power)
        fed = quantize(matrix, 3, FEEDBACK, inputs_gram=torch.diag(power))
        assert torch.equal(plain.codes, fed.codes)

    def test_matches_a_plain_implementation(self):
        """Column by column with an explicit inverse, as in the paper, without blocks."""
        inputs = correlated(columns=12)
        matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).double()
        gram = inputs.T @ inputs
        weight = quantize(matrix, 3, FEEDBACK, inputs_gram=gram, polish=False)
        scale = weight.scales.double()[:, 0]
        order = gram.diagonal().argsort(descending=True)
        damped = gram[order][:, order]
        damped = damped + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
        work, codes = matrix[:, order].clone(), torch.zeros(5, 12).double()
        left = list(range(12))
        while left:
            inverse = torch.linalg.inv(damped[left][:, left])
            j = left[0]
            codes[:, j] = torch.round(work[:, j] / scale).clamp(-4, 3)
            error = (work[:, j] - codes[:, j] * scale) / inverse[0, 0]
            for position, k in enumerate(left[1:], start=1):
                work[:, k] -= error * inverse[0, position]
            left = left[1:]
        expected = torch.zeros_like(codes)
        expected[:, order] = codes
        found = (inputs @ (matrix - expected * scale[:, None]).T).square().sum(dim=0)
        ours = (inputs @ (matrix - weight.dequantize().double()).T).square().sum(dim=0)
        same = (expected.int() == weight.codes).all(dim=1)
        assert int(same.sum()) >= 4  # rows where nearest was better keep nearest
        assert bool((ours <= found * (1 + 1e-5)).all())

    @pytest.mark.parametrize("bits", [2, 3])
    def test_coordinate_descent_lowers_the_error(self, bits, monkeypatch):
        """With each sweep, on the inputs and on others of the same kind."""
        matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(1)).double()
        # Given importance keeps scales as they are.
        alike = torch.ones(48)
        inputs = correlated(n=2000)
        fit, other = inputs[:1000], inputs[1000:]
        errors = []
        for sweeps in (0, 1, 2):
            monkeypatch.setattr(refit, "DESCENTS", sweeps)
            back = quantize(
                matrix, bits, FEEDBACK, importance=alike, inputs_gram=fit.T @ fit
            ).dequantize()
            error = matrix - back.double()
            errors.append([float((x @ error.T).square().sum()) for x in (fit, other)])
        assert errors[2][0] <= errors[1][0] * (1 + 1e-5)
        assert errors[1][0] < 0.99 * errors[0][0]
        assert errors[2][1] < errors[0][1]

    def test_coordinate_descent_ends_where_no_single_code_helps(self, monkeypatch):
        """Each code up or down alone: no smaller error."""
        monkeypatch.setattr(refit, "ROUNDS", 50)
        matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double()
        inputs = correlated(columns=12)
        gram = inputs.T @ inputs
        stored = quantize(matrix, 3, FEEDBACK, inputs_gram=gram)
        scale, codes = stored.scales.double(), stored.codes.double()

        def row_errors(tried):
            error = matrix - tried * scale
            return ((error @ gram) * error).sum(dim=1)

        best = row_errors(codes)
        for column in range(12):
            for step in (-1, 1):
                tried = codes.clone()
                tried[:, column] = (tried[:, column] + step).clamp(-4, 3)
                assert bool((row_errors(tried) >= best * (1 - 1e-6)).all())

    def test_groups_of_rows_have_their_own_inputs(self):
        """A Gram per group equals quantizing each group alone."""
        grams = torch.stack([correlated(seed=s).T @ correlated(seed=s) for s in (1, 2)])
        matrix = torch.randn(6, 48, generator=torch.Generator().manual_seed(3))
        scheme = FEEDBACK
        whole = quantize(matrix, 3, scheme, inputs_gram=grams)
        parts = [quantize(matrix[3 * g : 3 * g + 3], 3, scheme, inputs_gram=grams[g]).codes
                 for g in (0, 1)]  # fmt: skip
        assert torch.equal(torch.cat(parts), whole.codes)

    def test_inputs_that_are_always_zero_do_no_harm(self):
        """A dead input has no error to repay; a singular Gram is damped."""
        inputs = correlated()
        inputs[:, ::2] = 0
        matrix = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
        weight = quantize(matrix, 3, FEEDBACK, inputs_gram=inputs.T @ inputs)
        assert bool(torch.isfinite(weight.dequantize()).all())

    def test_a_gram_of_zeros_gives_nearest(self):
        """A layer that saw only zeros."""
        matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
        fed = quantize(matrix, 3, FEEDBACK, inputs_gram=torch.zeros(6, 6))
        assert torch.equal(quantize(matrix, 3, Scheme()).codes, fed.codes)

    def test_refuses_a_gram_of_another_size(self):
        """Both sizes are named."""
        with refused(InvalidInput, shape=[5, 5]):
            quantize(
                torch.randn(4, 6),
                3,
                FEEDBACK,
                inputs_gram=torch.eye(5),
            )

    def test_refuses_a_gram_that_is_not_positive(self):
        """X^T X always is; anything else was computed wrongly."""
        bad = torch.eye(4)
        bad[0, 1] = bad[1, 0] = 100.0
        with pytest.raises(InvalidInput, match="positive semidefinite"):
            quantize(torch.randn(4, 4), 3, FEEDBACK, inputs_gram=bad)
