"""The ranks of a worker: joining, exchanging small values, leaving."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

RANKS_TIMEOUT = timedelta(hours=2)  # the other ranks wait while the first one tokenizes, minutes for a large set


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its worker. The methods are collective: all ranks must call them.

    Attributes:
        rank: number of this process, from 0.
        count: number of ranks, over all nodes. A worker of one process without torchrun is rank 0 of 1.
        waiting: the process group of gloo in which ranks wait for each other, and exchange values. Under NCCL a wait
            would count against its own timeout, and would need the GPU.
    """

    rank: int = 0
    count: int = 1
    waiting: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the files which all ranks share."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier(group=self.waiting)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values = [value] * self.count
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def maximum(self, value: int) -> int:
        """The largest value of all ranks, so that they all take the same decision after the same step."""
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        largest = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def leave(self) -> None:
        """End this process when all ranks have written their files; without a process group, do nothing."""
        import torch.distributed as dist

        if dist.is_initialized():
            from hft_cli.launch import compat

            self.barrier()
            compat.exit_rank()


class Flag:
    """A value of each rank, of which all learn the largest one call later, without waiting for a device or a rank.

    In a process without other ranks it is known at once. Each call is collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._before: tuple[Any, Any] | None = None  # the values of the last call, and what is done to them

    def __call__(self, value: int) -> int:
        """The largest value of the call before, 0 for the first one."""
        if self._ranks.count == 1:
            return value
        import torch
        import torch.distributed as dist

        largest = 0
        if self._before is not None:
            before, work = self._before
            work.wait()
            largest = int(before)
        values = torch.tensor(value)
        self._before = values, dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._ranks.waiting, async_op=True)
        return largest


def join_ranks() -> Ranks:
    """Start DeepSpeed's process group and return this process's place in it.

    Must be called before the model is loaded: otherwise ZeRO-3 on the CPU sees a world of one rank.
    """
    import deepspeed
    import torch

    from hft_cli.launch import compat

    compat.load_data_only()
    compat.disable_shared_memory_op()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=RANKS_TIMEOUT)
    waiting = torch.distributed.new_group(backend="gloo", timeout=RANKS_TIMEOUT)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), waiting)
