"""Several calibration sets as one: shares hold, and sets that do not fit are refused."""

from __future__ import annotations

import pytest
import torch

from bitquota.errors import InvalidCalibration, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.mixing import mixed


def windows(n: int, first: int, *, mask: bool = False) -> CalibrationSet:
    """Return ``n`` windows of four tokens, of which the first tells the set."""
    tokens = torch.full((n, 4), first)
    tokens[:, 1] = torch.arange(n)
    if not mask:
        return CalibrationSet(inputs=(tokens,))
    return CalibrationSet(
        inputs=(tokens, (torch.arange(4) < 3).expand(n, 4).long()),
        names=("input_ids", "attention_mask"),
    )


class TestMixed:
    @pytest.mark.parametrize(
        ("sizes", "shares", "counts"),
        [
            ((30, 30), (1, 1), (30, 30)),
            ((30, 30), (2, 1), (30, 15)),
            ((30, 9), (2, 1), (18, 9)),
            ((100, 10, 3), (0.1, 0.7, 0.2), (1, 10, 2)),
            ((5, 500), (1000, 1), (5, 1)),
        ],
    )
    def test_shares_hold(self, sizes, shares, counts):
        """As many samples as the shares permit, none twice."""
        found = mixed([windows(n, k) for k, n in enumerate(sizes)], shares)
        tokens = found.inputs[0]
        assert counts == tuple(int((tokens[:, 0] == k).sum()) for k in range(len(sizes)))
        assert len({tuple(row[:2]) for row in tokens.tolist()}) == sum(counts)

    def test_equal_draws_are_equal_sets(self):
        sets = [windows(30, 0), windows(9, 1)]
        assert mixed(sets, (2, 1)).digest == mixed(sets, (4, 2)).digest
        assert mixed(sets, (2, 1)).digest != mixed(sets, (2, 1), seed=1).digest

    def test_one_set_is_itself(self):
        one = windows(3, 0)
        assert one is mixed([one], (5,))

    def test_a_set_without_a_mask_is_not_padded(self):
        found = mixed([windows(2, 0), windows(2, 1, mask=True)], (1, 1))
        assert ("input_ids", "attention_mask") == found.names
        assert [4, 4, 3, 3] == found.inputs[1].sum(1).tolist()

    def test_names_of_tokens(self):
        named = CalibrationSet(inputs=(torch.ones(2, 4, dtype=torch.int64),), names=("input_ids",))
        assert ("input_ids",) == mixed([windows(2, 0), named], (1, 1)).names

    def test_labels(self):
        whole = [
            CalibrationSet(inputs=(torch.randn(3, 2),), labels=torch.full((3,), k)) for k in (0, 1)
        ]
        assert [0, 0, 0, 1, 1, 1] == mixed(whole, (1, 1)).labels.tolist()
        bare = CalibrationSet(inputs=(torch.randn(3, 2),))
        with pytest.raises(InvalidCalibration, match="labels"):
            mixed([whole[0], bare], (1, 1))

    def test_other_lengths_are_refused(self):
        longer = CalibrationSet(inputs=(torch.ones(2, 5, dtype=torch.int64),))
        with pytest.raises(InvalidCalibration, match=r"one shape.*\[4\].*\[5\]"):
            mixed([windows(2, 0), longer], (1, 1))

    def test_other_names_are_refused(self):
        images = CalibrationSet(inputs=(torch.randn(2, 4),), names=("pixel_values",))
        with pytest.raises(InvalidCalibration, match="same names"):
            mixed([windows(2, 0), images], (1, 1))

    @pytest.mark.parametrize("shares", [(1,), (1, 0), (1, -2), (1, float("inf"))])
    def test_shares_must_be_positive(self, shares):
        with pytest.raises(InvalidInput, match="one positive share"):
            mixed([windows(2, 0), windows(2, 1)], shares)
