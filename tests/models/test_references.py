"""Full-precision outputs are computed once while they are small."""

from __future__ import annotations

import torch
from torch import Tensor

from bitquota.models.references import References


class TestReferences:
    def test_computes_each_chunk_once_while_all_fit(self) -> None:
        """A second look at a chunk costs nothing."""
        computed: list[int] = []
        references = References(limit_bytes=3 * 8 * 4)

        def output(chunk: int) -> Tensor:
            computed.append(chunk)
            return torch.full((8,), float(chunk))

        for _ in range(2):
            for chunk in range(3):
                value = references.get(chunk, lambda chunk=chunk: output(chunk))
                assert torch.equal(value, torch.full((8,), float(chunk)))
        assert computed == [0, 1, 2]

    def test_never_holds_more_than_its_limit_and_the_one_in_use(self) -> None:
        """Beyond the limit the others go; a single output that is larger is kept alone."""
        references = References(limit_bytes=2 * 8 * 4)
        for chunk in range(5):
            references.get(chunk, lambda chunk=chunk: torch.full((8,), float(chunk)))
            assert len(references.kept) <= 2
            assert chunk in references.kept
        big = references.get(9, lambda: torch.zeros(100))
        assert list(references.kept) == [9]
        assert references.get(9, lambda: torch.ones(100)) is big
