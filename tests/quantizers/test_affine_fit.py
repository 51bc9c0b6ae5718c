"""Scale and offset by least squares, and the grid that stores both."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme, storage_size
from bitquota.quantizers.affine_fit import fit_affine
from bitquota.quantizers.packing import pack, unpack
from bitquota.quantizers.weights import quantize

GROUPS = Scheme(
    grid=Grid.OFFSET,
    granularity=Granularity.GROUP,
    group_size=64,
    scale_format=ScaleFormat.FP16,
)


def lines(n: int = 6, columns: int = 64) -> torch.Tensor:
    """Normal values around different means."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(n, columns, generator=random, dtype=torch.float64)
    return x + torch.linspace(-3, 3, n, dtype=torch.float64)[:, None]


def rounded(x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    """What is read back."""
    codes = ((x - low[:, None]) / scale[:, None]).round().clamp(0, 2**bits - 1)
    return codes * scale[:, None] + low[:, None]


class TestFitAffine:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_beats_the_full_range(self, bits):
        """Never worse than from the least to the largest value; a dense search is hardly better."""
        x = lines()
        scale, low = fit_affine(x, bits)
        error = (rounded(x, scale, low, bits) - x).square().sum(1)
        span = x.amax(1) - x.amin(1)
        full = (rounded(x, span / (2**bits - 1), x.amin(1), bits) - x).square().sum(1)
        assert bool((error <= full + 1e-12).all())
        best = full.clone()
        for share in torch.linspace(0.4, 1.0, 25, dtype=torch.float64):
            for place in torch.linspace(0, 1, 25, dtype=torch.float64):
                start = x.amin(1) + (1 - share) * place * span
                found = rounded(x, share * span / (2**bits - 1), start, bits) - x
                best = torch.minimum(best, found.square().sum(1))
        assert bool((error <= 1.25 * best).all())

    def test_exact_on_a_grid(self):
        """Values that lie on a grid are met."""
        x = 0.25 * torch.arange(16, dtype=torch.float64)[None] - 7
        scale, low = fit_affine(x, 4)
        assert float(scale) == pytest.approx(0.25)
        assert float(low) == pytest.approx(-7)

    @pytest.mark.parametrize(("bits", "steps"), [(4, 12), (4, 14), (5, 24), (5, 30), (8, 250)])
    def test_exact_on_a_grid_of_fewer_steps(self, bits, steps):
        """Weights that were rounded before span fewer steps than there are codes."""
        codes = torch.randint(0, steps + 1, (40, 32), generator=torch.Generator().manual_seed(0))
        codes[:, 0], codes[:, 1] = 0, steps
        x = 0.25 * codes.double() - 2
        scale, low = fit_affine(x, bits)
        assert float((rounded(x, scale, low, bits) - x).abs().max()) < 1e-9

    def test_through_zero(self):
        """The offset is never above zero."""
        _, low = fit_affine(lines().abs() + 5, 3, through_zero=True)
        assert bool((low <= 0).all())

    def test_constant_line(self):
        """All equal: the offset is the value."""
        scale, low = fit_affine(torch.full((1, 8), 2.5, dtype=torch.float64), 4)
        assert (0.0, 2.5) == (float(scale), float(low))


class TestOffsetGrid:
    @pytest.mark.parametrize("granularity", list(Granularity))
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_packs_and_counts(self, granularity, bits):
        """What is packed comes back, and takes the bits that are counted."""
        size = 64 if granularity is Granularity.GROUP else None
        scheme = Scheme(
            grid=Grid.OFFSET,
            granularity=granularity,
            group_size=size,
            scale_format=ScaleFormat.FP16,
        )
        stored = quantize(lines(4, 160).float(), bits, scheme)
        packed = pack(stored)
        assert storage_size(4, 160, bits, scheme) == packed.size
        assert 8 * packed.n_bytes == packed.size.total
        back = unpack(packed)
        assert torch.equal(stored.codes, back.codes)
        assert torch.equal(stored.dequantize(), back.dequantize())

    def test_mlx_bits_per_weight(self):
        """Four bits in groups of 64 take 4.5 bits: a scale and a bias of 16 bits each."""
        assert 4.5 == storage_size(1, 4096, 4, GROUPS).total / 4096

    def test_error_is_small(self):
        """A quarter of the error for each bit more."""
        x = lines(4, 128).float()
        errors = [float((quantize(x, b, GROUPS).dequantize() - x).norm()) for b in (3, 4, 5)]
        assert errors[1] < 0.55 * errors[0]
        assert errors[2] < 0.55 * errors[1]
