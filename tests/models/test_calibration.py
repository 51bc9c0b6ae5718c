from dataclasses import replace

import pytest
import torch

from bitquota.errors import InvalidCalibration
from bitquota.models.calibration import CalibrationSet
from refusals import refused


def make(n=10):
    x = torch.arange(n * 3, dtype=torch.float32).reshape(n, 3)
    return CalibrationSet(inputs=(x,), labels=torch.arange(n))


class TestCalibrationSet:
    def test_different_counts_are_refused(self):
        """Inputs and labels must have the same first dimension."""
        with refused(InvalidCalibration, tensor="labels", shape=[3]):
            CalibrationSet(inputs=(torch.ones(4, 2),), labels=torch.zeros(3))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused(self, bad):
        """NaN and infinity are counted by sample."""
        x = torch.ones(4, 2)
        x[1, 1] = bad
        with refused(InvalidCalibration, tensor="input 0", samples=1):
            CalibrationSet(inputs=(x,))

    @pytest.mark.parametrize("inputs", [(), (torch.ones(0, 3),), (torch.tensor(1.0),)])
    def test_nothing_is_refused(self, inputs):
        """There must be a sample."""
        with pytest.raises(InvalidCalibration, match="at least one"):
            CalibrationSet(inputs=inputs)

    def test_digest_follows_content(self):
        """Equal samples give equal digests, other values, shapes and labels other ones."""
        same = make()
        x = same.inputs[0].clone()
        x[0, 0] += 1
        others = [
            CalibrationSet(inputs=(x,), labels=same.labels),
            CalibrationSet(inputs=same.inputs),
            CalibrationSet(inputs=(same.inputs[0], same.labels)),
        ]

        assert make().digest == same.digest
        assert len({same.digest, *(o.digest for o in others)}) == 4


class TestSubset:
    def test_is_reproducible_and_keeps_order(self):
        """The same seed draws the same samples, in original order, under the same digest."""
        a, b = make().subset(4, seed=3), make().subset(4, seed=3)

        assert a.indices == b.indices == tuple(sorted(a.indices))
        assert a.digest == make().digest
        assert torch.equal(a.labels, torch.tensor(a.indices))
        assert a.indices != make().subset(4, seed=4).indices

    @pytest.mark.parametrize("n", [0, 11])
    def test_impossible_size(self, n):
        """More samples than there are, or none."""
        with pytest.raises(InvalidCalibration, match="between 1 and 10"):
            make().subset(n, seed=0)


class TestSplit:
    def test_parts_are_disjoint_and_complete(self):
        """Every sample is on one side."""
        fit, holdout = make().split(0.3, seed=0)

        assert len(holdout) == 3
        assert sorted(fit.indices + holdout.indices) == list(range(10))

    def test_empty_part_is_refused(self):
        """A hold-out of no samples decides nothing."""
        with refused(InvalidCalibration, holdout_fraction=0.01, available=10):
            make().split(0.01, seed=0)


class TestFromJson:
    def test_round_trip(self):
        """Digest and indices find the same samples again."""
        part = make().subset(5, seed=7)
        again = CalibrationSet.from_json(part.to_json(), make())

        assert torch.equal(again.inputs[0], part.inputs[0])
        assert again.to_json() == part.to_json()

    def test_other_set_is_refused(self):
        """Indices mean nothing in another set."""
        with pytest.raises(InvalidCalibration, match="load the set that was measured"):
            CalibrationSet.from_json(make().to_json(), make(9))


class TestBatches:
    def test_covers_everything_in_order(self):
        """The last batch is the rest."""
        parts = list(make().batches(4))

        assert [len(p) for p in parts] == [4, 4, 2]
        assert torch.equal(torch.cat([p.inputs[0] for p in parts]), make().inputs[0])


class TestPlaced:
    def test_small_sets_are_moved_at_once(self):
        """As ``to`` does; on the CPU that is no copy at all."""
        x = torch.arange(12.0).reshape(6, 2)
        data = CalibrationSet(inputs=(x,), labels=torch.arange(6))
        moved = data.placed("cpu")

        assert moved.device is None
        assert moved.inputs[0] is x
        (part,), labels = moved.chunk(range(2, 4))
        assert part.data_ptr() == x[2:].data_ptr()
        assert labels.tolist() == [2, 3]

    def test_large_sets_arrive_chunk_by_chunk(self):
        """The samples stay where they are; each chunk is copied once, however often it is used."""
        x = torch.arange(12.0).reshape(6, 2)
        data = CalibrationSet(inputs=(x,), labels=torch.arange(6))
        streamed = data.placed("meta", resident_bytes=0)

        assert streamed.inputs[0].device.type == "cpu"
        assert streamed.digest == data.digest
        first = streamed.chunk(range(3))
        assert first[0][0].device.type == first[1].device.type == "meta"
        assert streamed.chunk(range(3)) is first
        assert streamed.chunk(range(3, 6))[0][0].shape == (3, 2)
        here = replace(data, device=torch.device("cpu"))
        assert here.take([1]).device is None
        assert torch.equal(here.take([1]).inputs[0], x[1:2])
        assert streamed.to_json() == data.to_json()
