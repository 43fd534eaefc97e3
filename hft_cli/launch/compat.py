"""Private or undocumented behaviour of other packages that `launch` relies on; tests/launch/test_compat.py pins it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator on the CPU.

    UPSTREAM: deepspeed 0.19.8: `init_distributed` compiles `deepspeed_shm_comm` with g++, which takes a minute, leaves
    a lock behind if it is killed, and fails in a path with a space. Only inference uses the operator. There is no
    setting for it. This can go when DeepSpeed compiles the operator on first use.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_data_only() -> None:
    """Have torch.load refuse all but data in this process: unpickling a file of somebody else could run its code.

    UPSTREAM: torch 2.13.0 with deepspeed 0.19.8: DeepSpeed loads its checkpoints with weights_only=False, which this
    variable of the environment overrules. The three classes are all that they hold beside tensors and plain values.
    This can go when DeepSpeed loads them with weights_only=True.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import add_safe_globals

    add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


# With them, a rank takes the store at MASTER_PORT as a client: see `store_for_ranks`.
STORE_VARIABLES = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def store_for_ranks() -> Any:
    """A store on a free port of this machine, over which ranks meet; it lives as long as the object.

    UPSTREAM: torch 2.13.0: the rendezvous `env://` reads STORE_VARIABLES, which torchrun sets for its ranks. Without
    them rank 0 would open the store, on a port that somebody else may have taken since it was found free. This can go
    when the variables are documented.
    """
    import torch.distributed

    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )


def exit_rank() -> None:
    """End this process without the teardown of Python and of its libraries.

    UPSTREAM: torch 2.13.0 with deepspeed 0.19.8: a rank sometimes aborts in its exit handlers after all work is saved,
    and torchrun then reports a failure. This can go when ranks of gloo and NCCL exit cleanly.
    """
    import torch.distributed

    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_process(status: int) -> NoReturn:
    """End this process: run what is registered for its exit, and leave the memory to the system.

    UPSTREAM: Python 3.11: freeing one by one what torch, transformers and TRL hold takes a third of a second. There is
    no public way to skip that and to run the functions of `atexit`.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def submitit_hooks(results: Callable[[Any, Callable[[Any], list[Any]]], list[Any]], watcher: Any) -> Iterator[None]:
    """Have submitit's jobs return `results(job, original method)`, and ask `watcher` for their states in SLURM.

    UPSTREAM: submitit 1.5.4 with hydra-submitit-launcher 1.2.0: the launcher asks one job after the other for its
    results, so that the first job that died ends the sweep. Jobs call register_job, is_done, get_state and get_info of
    the class attribute `watcher`. This can go when the launcher returns the failures of all jobs, and submitit can ask
    squeue.
    """
    from submitit.core.core import Job
    from submitit.slurm.slurm import SlurmJob

    original, original_watcher = Job.results, SlurmJob.watcher
    Job.results, SlurmJob.watcher = lambda job: results(job, original), watcher
    try:
        yield
    finally:
        Job.results, SlurmJob.watcher = original, original_watcher


def job_arguments(job: Any) -> tuple[list[str], int]:
    """The overrides and the number of the sweep's job that a job of submitit runs.

    UPSTREAM: hydra-submitit-launcher 1.2.0: it calls itself with (overrides, job_dir_key, number, id, state) in the
    job. This can go when the launcher returns the failures of all jobs.
    """
    overrides, _, number, *_ = job.submission().args
    return overrides, number


def raised_in_job(error: Exception) -> str:
    """The last line of the traceback in submitit's FailedJobError.

    UPSTREAM: submitit 1.5.4: the error holds the traceback as text between two lines of 22 dashes. This can go when it
    holds the exception.
    """
    return str(error).split("-" * 22)[1].strip().splitlines()[-1]


def requeue_handler() -> Callable[..., Any]:
    """In a job of submitit: the signal handler that puts the job back into the queue and ends the process.

    UPSTREAM: submitit 1.5.4: before it calls the function of a job, submitit registers this handler for the signal
    that JobEnvironment.USR_SIG names. This can go when submitit has a function that puts the job back.
    """
    from submitit.core.job_environment import JobEnvironment

    handler = signal.getsignal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
    assert callable(handler)
    return handler
