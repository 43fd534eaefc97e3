"""The lock that a command shares with its workers, and ranks that end with torchrun."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from hft_cli.errors import UserError
from hft_cli.launch.lifetime import LOCK, hold_lock, inherited

SHARES = """
import sys
from hft_cli.launch.lifetime import end_with_torchrun, share_lock
end_with_torchrun()
share_lock()
print("here", flush=True)
sys.stdin.read()
"""
# A parent as torchrun is: it starts a rank, says its number, and waits.
STARTS = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
sys.stdin.read()
"""


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_directory_is_locked_by_one_command(tmp_path):
    lock = tmp_path / ".lock"
    with hold_lock(lock), pytest.raises(UserError, match="Another process works on"), hold_lock(lock):
        pass
    with hold_lock(lock):
        pass


def test_a_directory_is_locked_while_a_rank_is_there(tmp_path):
    lock = tmp_path / ".lock"
    with hold_lock(lock):
        _, variables = inherited(None)
        rank = start(SHARES, **variables)
        rank.stdout.readline()
    with pytest.raises(UserError, match="Another process works on"), hold_lock(lock):
        pass
    rank.communicate()
    with hold_lock(lock):
        pass


def test_ranks_of_another_node_share_the_lock_of_the_run(tmp_path):
    assert inherited(tmp_path / ".lock") == ((), {LOCK: str(tmp_path / ".lock")})
    assert inherited(None) == ((), {})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_rank_that_hangs_ends_when_torchrun_is_killed(tmp_path):
    (tmp_path / ".lock").touch()
    torchrun = start(STARTS, SHARES, TORCHELASTIC_RUN_ID="1", HFT_LOCK=str(tmp_path / ".lock"))
    rank = int(torchrun.stdout.readline())
    os.kill(rank, signal.SIGSTOP)
    descriptor = os.pidfd_open(rank)
    torchrun.kill()
    torchrun.communicate()
    assert select.select([descriptor], [], [], 600)[0], "the rank is still there"
    os.close(descriptor)
    with hold_lock(tmp_path / ".lock"):
        pass
