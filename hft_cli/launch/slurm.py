"""Sweeps by submitit, on SLURM or here: every job is waited for, also one that died; a checkpoint before a requeue."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from submitit.core.core import Job
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from hft_cli.errors import Stopped, UserError

logger = logging.getLogger(__name__)

# States of a job that does not go on. GONE is ours: squeue forgets a job some minutes after its end.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

ENDED |= {"REVOKED", "TIMEOUT"}


@contextmanager
def waited_for(failures: dict[int, dict[str, Any]]) -> Iterator[None]:
    """While a sweep runs: wait for each of submitit's jobs, and note by its number one that failed or died.

    By itself submitit ends the sweep at the first one that died, and without SLURM's accounting never learns of it.

    Raises:
        UserError: if SLURM does not take the jobs.
    """
    results, watcher = Job.results, SlurmJob.watcher

    def noted(job: Any) -> list[Any]:
        try:
            returned, *_ = results(job)  # of several nodes, the first one's
        except UncompletedJobError as error:
            overrides, _, number, *_ = job.submission().args
            reason = f"{_why(job, error)} Its log: {job.paths.stderr}"
            failures[number] = {"job": " ".join(filter_overrides(overrides)), "reason": reason, "status": 1}
            returned = JobReturn()
            returned.status, returned.return_value = JobStatus.COMPLETED, None
        except (Stopped, KeyboardInterrupt):
            if isinstance(job, SlurmJob):
                logger.warning(f"The jobs stay with SLURM: `scancel {job.job_id.split('_')[0]}` ends them.")
            raise
        if returned.status == JobStatus.COMPLETED and returned.return_value is not None:
            failure = dict(returned.return_value)
            failures[failure.pop("number")] = failure
        return [returned]

    Job.results, SlurmJob.watcher = noted, Watcher()
    try:
        yield
    except UncompletedJobError as error:  # sbatch's own words
        raise UserError(f"SLURM did not take the jobs: {' '.join(str(error).split())}") from None
    finally:
        Job.results, SlurmJob.watcher = results, watcher


def _why(job: Any, error: UncompletedJobError) -> str:
    if isinstance(error, FailedJobError):  # something was raised outside of our own code, and its traceback kept
        return str(error).split("-" * 22)[1].strip().splitlines()[-1]
    if not isinstance(job, SlurmJob):
        return "It ended without a result."
    return f"It ended without a result; SLURM says {job.state}."


class Watcher(SlurmInfoWatcher):  # type: ignore[misc]
    """Asks squeue, which every SLURM answers; sacct, which submitit asks, knows nothing without accounting."""

    def __init__(self) -> None:
        super().__init__(delay_s=10)
        self._ended: set[str] = set()  # at the last look

    def update(self) -> None:
        command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r"]
        asked = subprocess.run(command, capture_output=True, text=True)
        self._last_status_check = time.time()
        if asked.returncode != 0:  # the controller is away for a while
            logger.warning(f"squeue does not answer: {' '.join(asked.stderr.split())}. Asking again.")
            return
        states = dict(line.split("|", 1) for line in asked.stdout.splitlines())
        ended = set()
        for job in self._registered - self._finished:
            state, _, reason = states.get(job, "GONE|").partition("|")
            self._info_dict[job] = {"State": f"{state} ({reason})" if reason not in ("", "None") else state}
            if state in ENDED:
                ended.add(job)
        # On its way back into the queue a job passes through such a state too; so it counts when seen twice.
        self._finished |= ended & self._ended
        self._ended = ended

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        self.get_info(job_id, mode)
        return job_id in self._finished


@contextmanager
def requeued() -> Iterator[None]:
    """In a job of submitit: when a signal comes, the run within keeps a checkpoint, and then the job is put back.

    submitit's own handler would put it back, and end the process, with the worker in the middle of a step. SLURM's
    TERM alone is of scancel, which is the end, or of a preemption.
    """
    put_back: Any = signal.getsignal(JobEnvironment._usr_sig())
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:  # schedulers send two in a row, and a second one would end the worker at once
            raise Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        if {stopped.number, *came} - {signal.SIGTERM} or _preempted():
            put_back(signal.SIGUSR1)  # ends the process; raises an error if it was put back too often
        sys.exit(128 + stopped.number)  # without a result
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # what is left to do is short


def _preempted() -> bool:
    if "SLURM_JOB_ID" not in os.environ:
        return False
    command = ["scontrol", "show", "job", "--oneliner", JobEnvironment().job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "JobState=RUNNING" in shown and "PreemptTime=" in shown and "PreemptTime=None" not in shown
