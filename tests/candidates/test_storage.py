"""Stored sizes are exact: closed forms by hand, and properties over all schemes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    WEIGHT_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    Scheme,
    StorageSize,
    n_scales,
    storage_size,
)
from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from vocabulary_strategies import WIDTHS, schemes, sizes

SIDES = st.integers(1, 70)


class TestScaleFormat:
    def test_bits(self):
        assert [32, 16, 16] == [ScaleFormat(name).bits for name in ("fp32", "fp16", "bf16")]


class TestScheme:
    @pytest.mark.parametrize(
        "members",
        [
            {"granularity": Granularity.GROUP},
            {"granularity": Granularity.CHANNEL, "group_size": 32},
            {"granularity": Granularity.TENSOR, "group_size": 32},
        ],
    )
    def test_group_size_belongs_to_groups(self, members):
        with pytest.raises(InvalidInput, match="belongs to granularity 'group'"):
            Scheme(**members)

    @pytest.mark.parametrize("size", [0, -4])
    def test_group_size_is_positive(self, size):
        with pytest.raises(InvalidInput, match=f"at least 1; got {size}"):
            Scheme(granularity=Granularity.GROUP, group_size=size)

    @pytest.mark.parametrize("alignment", [-8, 1, 7, 128])
    def test_alignment_is_a_machine_word(self, alignment):
        with pytest.raises(InvalidInput, match=f"0, 8, 16, 32 or 64; got {alignment}"):
            Scheme(row_alignment_bits=alignment)

    @given(schemes())
    def test_survives_json(self, scheme):
        assert scheme == Scheme.from_json(scheme.to_json())

    @given(schemes())
    def test_json_is_plain(self, scheme):
        """Strings and integers only: no enum leaks into what is digested."""
        kinds = {type(value) for value in scheme.to_json().values()}
        assert kinds <= {str, int, type(None)}
        canonical_json(scheme.to_json())

    def test_unknown_member_is_refused(self):
        with pytest.raises(ValueError, match="ternary"):
            Scheme.from_json(Scheme().to_json() | {"grid": "ternary"})


class TestStorageSize:
    @given(sizes(), sizes())
    def test_adds_part_by_part(self, one, other):
        assert (one + other).total == one.total + other.total
        assert one + other == other + one
        assert (one + other).scales == one.scales + other.scales

    @given(sizes())
    def test_survives_json(self, size):
        assert size == StorageSize.from_json(size.to_json())

    def test_json_with_a_wrong_total_is_refused(self):
        wrong = StorageSize(codes=8).to_json() | {"total": 9}
        with pytest.raises(InvalidInput, match="total that its members give, 8; got 9"):
            StorageSize.from_json(wrong)

    @pytest.mark.parametrize("part", ["codes", "scales", "zero_points", "padding"])
    def test_no_part_is_negative(self, part):
        with pytest.raises(InvalidInput, match="not be negative"):
            StorageSize(**{"codes": 1} | {part: -1})


class TestNScales:
    @given(SIDES, SIDES, schemes())
    def test_covers_every_weight_once(self, rows, columns, scheme):
        """Counted group by group."""
        if scheme.granularity is Granularity.TENSOR:
            expected = 1
        elif scheme.granularity is Granularity.CHANNEL:
            expected = rows
        else:
            expected = rows * len(range(0, columns, scheme.group_size))
        assert expected == n_scales(rows, columns, scheme)


class TestStorageSizeOfWeights:
    """``storage_size`` against sizes written out by hand."""

    def test_symmetric_per_channel(self):
        """3 rows of 5 weights at 3 bits: 45 bits, three fp32 scales, padded to 48."""
        assert StorageSize(codes=45, scales=96, padding=3) == storage_size(3, 5, 3, Scheme())

    def test_asymmetric_per_channel(self):
        """The three zero points have 3 bits each and are padded to two bytes."""
        scheme = Scheme(grid=Grid.ASYMMETRIC)
        expected = StorageSize(codes=45, scales=96, zero_points=9, padding=3 + 7)
        assert expected == storage_size(3, 5, 3, scheme)

    def test_groups_with_a_short_last_one(self):
        """Ten columns in groups of four are three groups per row."""
        scheme = Scheme(granularity=Granularity.GROUP, group_size=4, scale_format=ScaleFormat.BF16)
        expected = StorageSize(codes=2 * 10 * 4, scales=2 * 3 * 16)
        assert expected == storage_size(2, 10, 4, scheme)

    def test_rows_aligned_to_words(self):
        """Each row of 5 x 3 = 15 bits fills one word of 32."""
        scheme = Scheme(granularity=Granularity.TENSOR, row_alignment_bits=32)
        expected = StorageSize(codes=45, scales=32, padding=3 * 17)
        assert expected == storage_size(3, 5, 3, scheme)

    def test_full_precision_has_no_scales(self):
        assert StorageSize(codes=15 * 32) == storage_size(3, 5, 32, Scheme())

    def test_half_precision_checkpoint(self):
        """Left as it is, a weight takes what the checkpoint gives it."""
        assert StorageSize(codes=15 * 16) == storage_size(
            3, 5, 32, Scheme(), full_precision_bits=16
        )

    @pytest.mark.parametrize("bits", [-1, 9, 12, 33])
    def test_other_widths_are_refused(self, bits):
        with pytest.raises(InvalidInput, match=f"one of 1, 2, .*; got {bits}"):
            storage_size(3, 5, bits, Scheme())

    @given(SIDES, SIDES, WIDTHS, schemes())
    def test_fills_whole_bytes(self, rows, columns, bits, scheme):
        """What is written to a file is a whole number of bytes, part by part."""
        assert storage_size(rows, columns, bits, scheme).total % 8 == 0

    @given(SIDES, SIDES, WIDTHS, schemes())
    def test_codes_are_weights_times_bits(self, rows, columns, bits, scheme):
        assert rows * columns * bits == storage_size(rows, columns, bits, scheme).codes

    @given(SIDES, SIDES, schemes())
    def test_grows_with_the_width(self, rows, columns, scheme):
        """Up to 16 bits; full precision drops scales, so it may be smaller on tiny tensors."""
        quantized = [w for w in WEIGHT_BITS if w != FULL_PRECISION_BITS]
        totals = [storage_size(rows, columns, w, scheme).total for w in quantized]
        assert sorted(totals) == totals

    @given(SIDES, SIDES, WIDTHS, schemes())
    def test_padding_is_less_than_one_unit_per_row(self, rows, columns, bits, scheme):
        """And one more unit for the zero points."""
        size = storage_size(rows, columns, bits, scheme)
        unit, units = (scheme.row_alignment_bits, rows + 1) if scheme.row_alignment_bits else (8, 2)
        assert 0 <= size.padding < unit * units

    @given(st.integers(2, 8), SIDES, st.sampled_from([1, 2, 4, 8]), schemes())
    def test_equals_counting_bit_by_bit(self, rows, columns, bits, scheme):
        """A second count that lays out every code, row by row."""
        end = 0
        for _ in range(rows):
            end += columns * bits
            if scheme.row_alignment_bits:
                end = math.ceil(end / scheme.row_alignment_bits) * scheme.row_alignment_bits
        end = math.ceil(end / 8) * 8
        scales = n_scales(rows, columns, scheme)
        zero_points = scales * bits if scheme.grid is Grid.ASYMMETRIC else 0
        unit = scheme.row_alignment_bits or 8
        expected = end + scales * scheme.scale_format.bits + math.ceil(zero_points / unit) * unit
        assert expected == storage_size(rows, columns, bits, scheme).total
