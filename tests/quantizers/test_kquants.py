"""Super-blocks of 256: exact bytes, readers' arithmetic, and better than plain groups."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.storage import (
    K_BLOCK,
    K_BLOCKS,
    Granularity,
    Grid,
    ScaleFormat,
    Scheme,
    storage_size,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.grid import code_range
from bitquota.quantizers.kquants import split_parameters
from bitquota.quantizers.weights import quantize
from refusals import refused

SCHEME = Scheme(
    grid=Grid.K_BLOCKS,
    granularity=Granularity.GROUP,
    group_size=K_BLOCK,
    scale_format=ScaleFormat.FP16,
)
PLAIN = Scheme(granularity=Granularity.GROUP, group_size=32, scale_format=ScaleFormat.FP16)


def matrix() -> torch.Tensor:
    """Rows of different sizes, one of zeros, one without negative weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 512, generator=random) * torch.rand(8, 1, generator=random)
    x[0] = 0
    x[1, :256] = x[1, :256].abs()
    return x


@pytest.mark.parametrize("bits", list(K_BLOCKS))
class TestFitKBlocks:
    def test_gguf_reads_the_same_numbers(self, bits):
        """The package's own reader gives every weight back bit for bit, from as many bytes."""
        import gguf

        from bitquota.exports.gguf_blocks import blocks_of, type_name

        stored = quantize(matrix(), bits, SCHEME)
        data = blocks_of(stored, None)
        kind = gguf.GGMLQuantizationType[type_name(stored)]
        read = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
        assert torch.equal(stored.dequantize(), read)
        assert 8 * data.size == storage_size(8, 512, bits, SCHEME).total

    def test_better_than_plain_groups(self, bits):
        """Less error than groups of 32 with a scale each, at fewer or as many bits."""
        x = matrix()
        error = (quantize(x, bits, SCHEME).dequantize() - x).norm()
        plain = (quantize(x, bits, PLAIN).dequantize() - x).norm()
        assert error < plain
        size = storage_size(8, 512, bits, SCHEME).total
        # Six bits have scales for sixteen weights, and at two and three there are minima.
        assert size <= storage_size(8, 512, bits, PLAIN).total * 1.06

    def test_codes_are_the_nearest(self, bits):
        """No other code of a weight's own sub-block is closer to it."""
        x = matrix()
        stored = quantize(x, bits, SCHEME)
        least, most = code_range(Grid.K_BLOCKS, bits)
        assert least <= int(stored.codes.min())
        assert int(stored.codes.max()) <= most
        gap = (stored.dequantize() - x).abs()
        for step in (-1, 1):
            other = (stored.codes + step).clamp(least, most)
            moved = type(stored)(
                codes=other.int(), scales=stored.scales, zero_points=None, bits=bits, scheme=SCHEME
            )
            assert bool((gap <= (moved.dequantize() - x).abs() + 1e-6).all())

    def test_integers_fit_their_bits(self, bits):
        """Scales and minima of sub-blocks are integers of the format's width."""
        kind = K_BLOCKS[bits]
        _, scales, minima = split_parameters(quantize(matrix(), bits, SCHEME).scales, bits)
        low = 0 if kind.affine else -(2 ** (kind.scale_bits - 1))
        assert low <= int(scales.min())
        assert int(scales.max()) <= kind.largest
        assert (K_BLOCK // kind.sub_block if kind.affine else 0) == minima.shape[1]

    def test_zeros_stay_zeros(self, bits):
        """A block of zeros has the unit zero."""
        assert not quantize(matrix(), bits, SCHEME).dequantize()[0].any()

    def test_importance(self, bits):
        """Weights that matter more are met more closely."""
        x = matrix()
        weight = torch.ones_like(x)
        weight[:, ::4] = 100.0
        plain = quantize(x, bits, SCHEME).dequantize() - x
        weighed = quantize(x, bits, SCHEME, importance=weight).dequantize() - x
        assert (weighed * weight.sqrt()).norm() < (plain * weight.sqrt()).norm()


class TestScheme:
    def test_row_that_256_does_not_divide(self):
        """Neither sized nor quantized."""
        with refused(InvalidInput, columns=128):
            storage_size(2, 128, 4, SCHEME)
        with refused(InvalidInput, columns=128):
            quantize(torch.ones(2, 128), 4, SCHEME)

    def test_width_that_it_has_not(self):
        """Eight bits are another type."""
        with refused(InvalidInput, weight_bits=8, grid="k_blocks"):
            storage_size(2, 256, 8, SCHEME)

    @pytest.mark.parametrize(
        "changes",
        [
            {"group_size": 128},
            {"scale_format": ScaleFormat.FP32},
            {"row_alignment_bits": 32},
        ],
    )
    def test_other_groups(self, changes):
        """The layout is llama.cpp's and no other."""
        from dataclasses import replace

        with pytest.raises(InvalidInput):
            replace(SCHEME, **changes)
