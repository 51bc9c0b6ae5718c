"""Functions computed in several processes: the same results in the same order, whatever happens."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from bitquota.errors import InvalidInput
from bitquota.models.processes import MOST, Processes


def children() -> set[str]:
    """Process ids of what this process forked and did not wait for."""
    return {
        n for file in Path("/proc/self/task").glob("*/children") for n in file.read_text().split()
    }


def squares(k: int) -> dict[str, torch.Tensor]:
    """Tensors of several types and shapes, none and one element among them."""
    return {
        "half": torch.full((2, 3), float(k)).half().T,
        "whole": torch.tensor(k * k),
        "none": torch.empty(0, 4),
        "long": torch.arange(200_000) * k,
    }


class TestProcesses:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_results_come_in_order(self, count):
        found = list(Processes(count).map(squares, 5))
        assert len(found) == 5
        for k, own in enumerate(found):
            assert own.keys() == squares(k).keys()
            for name, value in squares(k).items():
                assert own[name].dtype == value.dtype
                assert torch.equal(own[name], value)

    def test_gradients_are_computed_in_each(self):
        weight = torch.ones(3, requires_grad=True)
        (weight * 2).sum().backward()

        def slope(k):
            (found,) = torch.autograd.grad((weight * k).sum(), weight)
            return {"slope": found, "process": torch.tensor(os.getpid())}

        found = list(Processes(2).map(slope, 4))
        assert [0, 1, 2, 3] == [int(own["slope"][0]) for own in found]
        assert len({int(own["process"]) for own in found}) == 2

    def test_what_a_process_leaves_is_done_here(self):
        """One is killed after its first result; the rest of its numbers are computed here."""
        here = os.getpid()

        def once(k):
            if k == 3 and os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"k": torch.tensor(k), "process": torch.tensor(os.getpid())}

        found = list(Processes(2).map(once, 7))
        assert list(range(7)) == [int(own["k"]) for own in found]
        assert [1] == [int(own["k"]) for own in found if int(own["process"]) != here]

    def test_errors_are_raised_here(self):
        def fails(k):
            if k == 1:
                msg = "one"
                raise InvalidInput(msg)
            return {}

        with pytest.raises(InvalidInput, match="one"):
            list(Processes(2).map(fails, 3))

    def test_no_process_is_left(self):
        """Also not of results that nobody takes."""
        before = children()
        results = Processes(3).map(squares, 30)
        next(results)
        assert len(children() - before) == 2
        results.close()
        assert not children() - before

    def test_refuses_what_cannot_be(self):
        with pytest.raises(InvalidInput, match=f"1 to {MOST}"):
            Processes(MOST + 1)
        with pytest.raises(InvalidInput, match=r"on the CPU.*a job each.*CUDA_VISIBLE"):
            Processes(2).check_device(torch.device("cuda"))
        Processes(1).check_device(torch.device("cuda"))
