"""Scales fitted again to the codes of feedback: the best for them, and never a worse row."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, ScaleRule, Scheme
from bitquota.quantizers.grid import matrix_grid
from bitquota.quantizers.parameters import fitted_parameters
from bitquota.quantizers.refit import refitted
from bitquota.quantizers.rounders import Rounder, output_errors, round_codes

GROUPS = Scheme(granularity=Granularity.GROUP, group_size=10, scale_format=ScaleFormat.FP16)
SCHEMES = {
    "channel": Scheme(),
    "groups of which the last is short": GROUPS,
    "zero points": Scheme(grid=Grid.ASYMMETRIC),
    "groups with zero points": Scheme(
        grid=Grid.ASYMMETRIC, granularity=Granularity.GROUP, group_size=16
    ),
    "positive": Scheme(scale_rule=ScaleRule.LEAST_SQUARES_POSITIVE),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns, seed=1):
    x = normal(200, 5, seed=seed) @ normal(5, columns, seed=seed + 1)
    x = (x + 0.5 * normal(200, columns, seed=seed + 2)).clamp(min=0)
    return x.T @ x


def rounded(values, bits, scheme, grams):
    """Return codes, scales and zero points of GPTQ before scales are fitted again."""
    diagonal = grams.diagonal(dim1=1, dim2=2).repeat_interleave(len(values) // len(grams), dim=0)
    scales, zeros, _ = fitted_parameters(values, bits, scheme, diagonal)
    grid = matrix_grid(scales, zeros, bits, scheme, values.shape[1])
    return round_codes(values, grid, Rounder.GPTQ, grams), scales, zeros


def errors(values, codes, scales, zeros, bits, scheme, gram):
    grid = matrix_grid(scales, zeros, bits, scheme, values.shape[1])
    return output_errors(values - grid.read(codes), gram)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_no_row_gets_worse_and_most_get_better(scheme, bits):
    values, gram = normal(12, 48), correlated(48)
    codes, scales, zeros = rounded(values, bits, scheme, gram[None])
    before = errors(values, codes, scales, zeros, bits, scheme, gram)
    codes, fitted = refitted(values, codes, scales, zeros, bits, scheme, gram[None])
    after = errors(values, codes, fitted, zeros, bits, scheme, gram)
    assert bool((after <= before).all())
    assert int((after < before).sum()) > 6
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert fitted.dtype == scales.dtype
    # Signs stay: what a target asks of them holds.
    assert bool((fitted.double() * scales.double() > 0).all())


@pytest.mark.parametrize("scheme", [SCHEMES["channel"], SCHEMES["zero points"]])
def test_scales_are_the_best_for_the_codes_when_codes_stay(scheme):
    """Values near their codes: rounding changes nothing more, the scale has a closed form."""
    gram = correlated(20)
    levels = torch.randint(0, 4, (6, 20), generator=torch.Generator().manual_seed(5))
    codes = (levels - 2 if scheme.grid is Grid.SYMMETRIC else levels).int()
    zeros = None if scheme.grid is Grid.SYMMETRIC else torch.full((6, 1), 2, dtype=torch.int32)
    steps = (levels - 2).double()
    values = 0.7 * steps + 0.01 * normal(6, 20, seed=6)
    start = torch.full((6, 1), 0.71)
    found, fitted = refitted(values, codes, start, zeros, 2, scheme, gram[None])
    assert torch.equal(found, codes)
    best = ((values @ gram) * steps).sum(1) / ((steps @ gram) * steps).sum(1)
    assert torch.allclose(fitted[:, 0].double(), best, rtol=1e-6)


def test_groups_of_rows_have_moments_of_their_own():
    values, grams = normal(8, 12), torch.stack([correlated(12), correlated(12, seed=9)])
    codes, scales, _ = rounded(values, 2, Scheme(), grams)
    together = refitted(values, codes, scales, None, 2, Scheme(), grams)
    for g, rows in enumerate((slice(0, 4), slice(4, 8))):
        alone = refitted(
            values[rows], codes[rows], scales[rows], None, 2, Scheme(), grams[g : g + 1]
        )
        for found, wanted in zip(together, alone, strict=True):
            assert torch.equal(found[rows], wanted)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(granularity=Granularity.TENSOR),
        Scheme(scale_rule=ScaleRule.ABSMAX),
        Scheme(grid=Grid.CODEBOOK),
    ],
)
def test_of_other_scales_the_codes_alone_are_improved(scheme):
    values, gram = normal(24, 48), correlated(48)
    codes, scales, zeros = rounded(values, 2, scheme, gram[None])
    found, fitted = refitted(values, codes, scales, zeros, 2, scheme, gram[None])
    assert torch.equal(fitted, scales)
    before, after = (errors(values, c, scales, zeros, 2, scheme, gram) for c in (codes, found))
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())


def test_scales_that_are_to_stay_do():
    values, gram = normal(8, 12), correlated(12)
    codes, scales, _ = rounded(values, 2, Scheme(), gram[None])
    _, fitted = refitted(values, codes, scales, None, 2, Scheme(), gram[None], scales_stay=True)
    assert torch.equal(fitted, scales)


def test_rows_of_zeros_keep_their_scales():
    values, gram = normal(4, 12), correlated(12)
    values[1] = 0
    codes, scales, _ = rounded(values, 3, Scheme(), gram[None])
    found, fitted = refitted(values, codes, scales, None, 3, Scheme(), gram[None])
    assert torch.equal(fitted[1], scales[1])
    assert not bool(found[1].any())
