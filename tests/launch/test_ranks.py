"""Ranks join, and wait for each other."""

from __future__ import annotations

import subprocess
import sys

from helpers import environment

JOIN = """
import torch
import torch.distributed as dist
from hft_cli.launch.ranks import RANKS_TIMEOUT, join_ranks
dist.init_process_group("gloo")  # as TrainingArguments does, with PyTorch's timeout of half an hour
ranks = join_ranks()
assert dist.get_backend(ranks.waiting) == "gloo"
assert ranks.waiting._get_backend(torch.device("cpu")).options._timeout == RANKS_TIMEOUT
assert ranks.gather("a") == ["a"]
ranks.leave()
"""


def test_ranks_wait_two_hours_whoever_made_their_group(port):
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], env={**environment(), **one_rank, "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
