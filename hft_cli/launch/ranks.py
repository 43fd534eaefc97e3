"""The ranks of a worker: joining, gathering, leaving."""

from __future__ import annotations

import os
import sys
from datetime import timedelta


def join_ranks() -> None:
    """Start DeepSpeed's process group; before the model is loaded, or ZeRO-3 on the CPU sees a world of one."""
    import deepspeed
    import torch

    # DeepSpeed would compile an operator that only inference uses: a minute, a compiler, a lock that a kill leaves
    # behind, and a link line that a path with a space breaks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The ranks wait while the first one tokenizes, which takes minutes for a large set.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(hours=2))


def gather_objects(value: int, world: int) -> list[int]:
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[int] = [0] * world
    dist.all_gather_object(values, value)
    return values


def max_over_ranks(value: int, world: int) -> int:
    """The largest of the ranks' values, so that they all do the same after the same step."""
    if world == 1:
        return value
    import torch
    import torch.distributed as dist

    held = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def barrier(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def leave_ranks(world: int) -> None:
    """End a rank at once when all is written: torn down in its own time, it sometimes aborts at exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        barrier(world)
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
