"""launch/compat.py: what it relies on in DeepSpeed and torch is still there."""

from __future__ import annotations

import importlib
import inspect
import re
import signal
import subprocess
import sys

import pytest

from hft_cli.launch import compat


def test_deepspeed_looks_the_shared_memory_op_up_in_its_table():
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    comm = importlib.import_module("deepspeed.comm.torch")
    assert get_accelerator().create_op_builder("ShareMemCommBuilder").NAME == "deepspeed_shm_comm"
    assert "__compatible_ops__" in inspect.getsource(comm.build_shm_op)
    compat.disable_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert comm.build_shm_op() is None


PLANTED = """
import pathlib, sys, torch
from hft_cli.launch.compat import load_data_only

class Planted:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(sys.argv[1]) / "ran",)

file = pathlib.Path(sys.argv[1]) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
torch.save({"optimizer_state_dict": Planted()}, file)
if sys.argv[2] == "data only":
    load_data_only()
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
TorchCheckpointEngine().load(str(file), map_location="cpu")
"""


@pytest.mark.parametrize("how", ["as DeepSpeed does", "data only"])
def test_a_planted_checkpoint_runs_no_code(how, tmp_path):
    ended = subprocess.run([sys.executable, "-c", PLANTED, tmp_path, how], capture_output=True, text=True)
    assert (tmp_path / "ran").exists() == (how != "data only")  # without the restriction it does
    assert ("Weights only load failed" in ended.stderr) == (how == "data only")


def test_a_rank_ends_with_status_0_and_all_its_output():
    code = (
        "import torch.distributed as dist; from hft_cli.launch import compat;"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1);"
        "print('written', end=''); compat.exit_rank(); print('not reached')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("written")


def test_the_launcher_asks_each_job_of_submitit_for_its_results():
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

    assert "return [j.results()[0] for j in jobs]" in inspect.getsource(BaseSubmititLauncher.launch)
    arguments = list(inspect.signature(BaseSubmititLauncher.__call__).parameters)
    assert arguments[1:4] == ["sweep_overrides", "job_dir_key", "job_num"]


def test_jobs_of_submitit_call_these_methods_of_their_watcher():
    from submitit.core.core import Job
    from submitit.slurm.slurm import SlurmJob

    called = set(re.findall(r"watcher\.(\w+)\(", inspect.getsource(Job)))
    assert called == {"register_job", "is_done", "get_state", "get_info"}
    original = Job.results
    with compat.submitit_hooks(lambda job, original: ["ours"], "watcher"):
        assert SlurmJob.watcher == "watcher"
        assert Job.results(None) == ["ours"]
    assert Job.results is original


def test_the_error_of_a_submitit_job_ends_with_what_it_raised(tmp_path):
    from submitit import LocalExecutor
    from submitit.core.utils import FailedJobError

    job = LocalExecutor(tmp_path).submit(divmod, 1, 0)
    with pytest.raises(FailedJobError) as failed:
        job.results()
    assert compat.raised_in_job(failed.value) == "ZeroDivisionError: integer division or modulo by zero"
    assert job.submission().args == (1, 0)


def test_submitit_registers_its_requeue_handler_for_the_signal(monkeypatch):
    from submitit.core.job_environment import JobEnvironment

    source = inspect.getsource(JobEnvironment._handle_signals)
    assert "signal.signal(self._usr_sig(), handler.checkpoint_and_try_requeue)" in source
    monkeypatch.setattr(JobEnvironment, "USR_SIG", "USR2")
    before = signal.signal(signal.SIGUSR2, handler := lambda number, frame: None)
    assert compat.requeue_handler() is handler
    signal.signal(signal.SIGUSR2, before)


def test_a_process_ends_with_its_exit_functions_and_no_teardown():
    code = """
import atexit, sys
from hft_cli.launch.compat import end_process

class Held:
    def __del__(self):
        print("freed")

held = Held()
atexit.register(print, "at exit")
sys.stdout.write("written, ")
end_process(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "written, at exit\n", "")
