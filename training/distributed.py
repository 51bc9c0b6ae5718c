"""Several processes train one model: ``torch.distributed``, one process for each device.

Started by ``torchrun --nproc-per-node N``; a process that was started alone is a group of one, and
nothing here costs it anything.

Design: docs/design/training.md
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes that train together.

    Attributes:
        rank: Which of them this one is; 0 writes files and shows progress.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's samples of a batch."""
        return batch if self.size == 1 else batch[self.rank :: self.size]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return ``module`` with its gradients averaged over the group during backward.

        Batch-norm statistics are those of the first process, as usual for data parallelism.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` over the group."""
        if self.size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()


def present_group() -> Group:
    """Return the group that this process has joined, or a group of one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Group()
    return Group(rank=distributed.get_rank(), size=distributed.get_world_size())


@contextmanager
def joined_group() -> Iterator[Group]:
    """Join the group that ``torchrun`` started this process for, and leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield present_group()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield present_group()
    finally:
        distributed.destroy_process_group()
