"""Tensors in memory up to a limit, then in files."""

from __future__ import annotations

import torch

from bitquota.models.kept import Keeper


class TestSeries:
    def test_beyond_the_limit_tensors_come_from_a_file(self):
        keeper = Keeper(limit_bytes=50)
        series = keeper.series()
        tensors = [torch.randn(5, 4), torch.arange(6, dtype=torch.int8), torch.randn(3).bfloat16()]
        for tensor in tensors:
            series.append(tensor)
        assert all(torch.equal(series[k], tensor) for k, tensor in enumerate(tensors))
        assert keeper.used_bytes == 6 + 6
        assert keeper.written_bytes == 80
        assert keeper.most_bytes <= keeper.limit_bytes

    def test_dropping_frees_the_memory(self):
        keeper = Keeper(limit_bytes=100)
        series = keeper.series()
        series.append(torch.zeros(20))
        series.drop()
        assert keeper.used_bytes == 0
        assert len(series) == 0

    def test_a_view_does_not_hold_on_to_all(self):
        keeper = Keeper(limit_bytes=100)
        series = keeper.series()
        series.append(torch.zeros(10_000)[:4])
        assert series[0].untyped_storage().nbytes() == 16
