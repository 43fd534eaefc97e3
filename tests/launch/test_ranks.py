"""Ranks join, and wait for each other."""

from __future__ import annotations

import subprocess
import sys

from helpers import environment, torchrun

from hft_cli.launch.ranks import Flag, Ranks

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


FLAG = """
import os
from pathlib import Path
from hft_cli.launch.ranks import Flag, join_ranks
import sys
ranks = join_ranks()
flag = Flag(ranks)
seen = [flag(ranks.rank * number) for number in (0, 3, 0, 5, 0)]
Path(sys.argv[1], f"{ranks.rank}.txt").write_text(str(seen))
ranks.leave()
"""


def test_a_flag_of_one_rank_is_known_to_all_one_call_later(tmp_path):
    (tmp_path / "flag.py").write_text(FLAG)
    torchrun(2, tmp_path / "flag.py", tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["[0, 0, 3, 0, 5]"] * 2


def test_a_flag_of_a_single_process_is_known_at_once():
    flag = Flag(Ranks())
    assert [flag(value) for value in (0, 3, 0)] == [0, 3, 0]
