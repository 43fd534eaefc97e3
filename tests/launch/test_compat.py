"""launch/compat.py: what it relies on in DeepSpeed and torch is still there."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

from hft_cli.launch import compat


def test_deepspeed_asks_its_table_before_it_compiles_the_shared_memory_op():
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    comm = importlib.import_module("deepspeed.comm.torch")
    assert get_accelerator().create_op_builder("ShareMemCommBuilder").NAME == "deepspeed_shm_comm"
    assert "__compatible_ops__" in inspect.getsource(comm.build_shm_op)
    compat.disable_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert comm.build_shm_op() is None


def test_a_rank_ends_with_status_0_and_all_its_output():
    code = (
        "import torch.distributed as dist; from hft_cli.launch import compat;"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1);"
        "print('written', end=''); compat.exit_rank(); print('not reached')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("written")
