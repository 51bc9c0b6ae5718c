"""Packing: exact both ways, and as many bytes as the accounting says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.candidates.storage import (
    SMALL_SCALES,
    Granularity,
    Grid,
    ScaleFormat,
    ScaleRule,
    Scheme,
    storage_size,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers import packing
from bitquota.quantizers.packing import pack, pack_bits, unpack, unpack_bits
from bitquota.quantizers.weights import quantize
from refusals import refused


@st.composite
def schemes(draw):
    granularity = draw(st.sampled_from(Granularity))
    group_size = draw(st.integers(1, 9)) if granularity is Granularity.GROUP else None
    return Scheme(
        grid=draw(st.sampled_from((Grid.SYMMETRIC, Grid.ASYMMETRIC))),
        granularity=granularity,
        group_size=group_size,
        scale_rule=ScaleRule.ABSMAX,
        scale_format=draw(st.sampled_from(sorted(set(ScaleFormat) - SMALL_SCALES))),
        row_alignment_bits=draw(st.sampled_from([0, 8, 16, 32, 64])),
    )


class TestPack:
    @given(
        scheme=schemes(),
        bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]),
        rows=st.integers(1, 7),
        columns=st.integers(1, 19),
    )
    @settings(max_examples=150, deadline=None)
    def test_bytes_are_those_of_storage_size(self, scheme, bits, rows, columns):
        """Codes, scales, zero points and padding, each to the bit."""
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        packed = pack(quantize(matrix, bits, scheme))
        size = storage_size(rows, columns, bits, scheme)
        assert size == packed.size
        assert size.total == 8 * packed.n_bytes

    def test_refuses_codes_that_do_not_fit(self):
        """A ninth value cannot be stored in three bits."""
        weight = quantize(torch.randn(2, 3), 3, Scheme())
        weight.codes[0, 0] = 4
        with pytest.raises(InvalidInput, match="must lie in a range of 8 values"):
            pack(weight)


class TestUnpack:
    @given(
        scheme=schemes(),
        bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]),
        rows=st.integers(1, 7),
        columns=st.integers(1, 19),
    )
    @settings(max_examples=150, deadline=None)
    def test_gives_back_what_was_packed(self, scheme, bits, rows, columns):
        """Codes, scales and zero points, bit for bit."""
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
        weight = quantize(matrix, bits, scheme)
        back = unpack(pack(weight))
        assert torch.equal(weight.codes, back.codes)
        assert torch.equal(weight.scales, back.scales)
        assert weight.scales.dtype == back.scales.dtype
        assert torch.equal(weight.dequantize(), back.dequantize())

    def test_refuses_bytes_that_were_cut_short(self):
        """The message says how many there must be."""
        packed = pack(quantize(torch.randn(4, 6), 5, Scheme()))
        cut = packing.PackedWeight(
            codes=packed.codes[:-1],
            scales=packed.scales,
            zero_points=packed.zero_points,
            rows=4,
            columns=6,
            bits=5,
            scheme=packed.scheme,
        )
        with refused(InvalidInput, expected=15, got=14):
            unpack(cut)

    def test_refuses_missing_scales(self):
        """Scales are counted too."""
        packed = pack(quantize(torch.randn(4, 6), 5, Scheme()))
        cut = packing.PackedWeight(
            codes=packed.codes,
            scales=packed.scales[:-4],
            zero_points=packed.zero_points,
            rows=4,
            columns=6,
            bits=5,
            scheme=packed.scheme,
        )
        with pytest.raises(InvalidInput, match="must take 16 bytes; got 12"):
            unpack(cut)


class TestPackBits:
    @pytest.mark.parametrize("bits", range(1, 17))
    def test_is_the_documented_bit_stream(self, bits):
        """Code i takes bits i*b.. of one little-endian number."""
        codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 7), dtype=np.uint16)
        number = sum(int(c) << (i * bits) for i, c in enumerate(codes.reshape(-1)))
        expected = number.to_bytes(-(-21 * bits // 8), "little")
        assert expected == pack_bits(codes, bits).tobytes()

    def test_aligned_rows_start_at_their_alignment(self):
        """Each row of five 3-bit codes takes 32 bits."""
        codes = np.array([[7, 0, 0, 0, 0], [1, 2, 3, 4, 5]], dtype=np.uint16)
        packed = pack_bits(codes, 3, alignment_bits=32)
        assert (8,) == packed.shape
        assert int.from_bytes(packed[4:].tobytes(), "little") == sum(
            c << 3 * i for i, c in enumerate([1, 2, 3, 4, 5])
        )

    @pytest.mark.parametrize("alignment", [0, 32])
    @pytest.mark.parametrize("bits", [1, 3, 7])
    def test_large_matrices_are_packed_in_parts(self, bits, alignment, monkeypatch):
        """The parts make the same stream."""
        codes = np.random.default_rng(0).integers(0, 2**bits, (9, 41), dtype=np.uint16)
        whole = pack_bits(codes, bits, alignment_bits=alignment)
        monkeypatch.setattr(packing, "CODES_AT_ONCE", 16)
        assert np.array_equal(whole, pack_bits(codes, bits, alignment_bits=alignment))
        back = unpack_bits(whole, 9, 41, bits, alignment_bits=alignment)
        assert np.array_equal(codes, back)
