"""Private or undocumented behaviour of other packages that `launch` relies on; tests/launch/test_compat.py pins it."""

from __future__ import annotations

import os
import sys

import deepspeed
import torch.distributed


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator on the CPU.

    UPSTREAM: deepspeed 0.19.8: `init_distributed` compiles `deepspeed_shm_comm` with g++, which takes a minute, leaves
    a lock behind if it is killed, and fails in a path with a space. Only inference uses the operator. There is no
    setting for it. This can go when DeepSpeed compiles the operator on first use.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def exit_rank() -> None:
    """End this process without the teardown of Python and of its libraries.

    UPSTREAM: torch 2.13.0 with deepspeed 0.19.8: a rank sometimes aborts in its exit handlers after all work is saved,
    and torchrun then reports a failure. This can go when ranks of gloo and NCCL exit cleanly.
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
