"""Jobs of submitit, on SLURM or on this machine: wait for all of them, and put stopped ones back into the queue."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmJob

from hft_cli.errors import JobFailure, Stopped, UserError
from hft_cli.launch import compat

logger = logging.getLogger(__name__)

# States in which a job has ended. GONE is ours: squeue forgets a job some minutes after its end.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip

INTERVAL = 10.0  # seconds between calls of squeue


@contextmanager
def wait_for_jobs(failures: list[JobFailure]) -> Iterator[None]:
    """While a sweep runs, wait for every job of submitit, and add those that fail or die to `failures`.

    Without this, submitit ends the sweep at the first job that died, and without SLURM's accounting it does not notice
    that a job died.

    Raises:
        UserError: if SLURM does not accept the jobs.
    """

    def results(job: Any, original: Callable[[Any], list[Any]]) -> list[Any]:
        try:
            result, *_ = original(job)  # a job on several nodes has several; the first is node 0's
        except UncompletedJobError as error:
            overrides, number = compat.job_arguments(job)
            reason = f"{_reason(job, error)} Its log: {job.paths.stderr}"
            failures.append(JobFailure(number, " ".join(filter_overrides(overrides)), reason, 1))
            result = JobReturn(status=JobStatus.COMPLETED)
        except (Stopped, KeyboardInterrupt):
            if isinstance(job, SlurmJob):
                array = job.job_id.split("_")[0]
                logger.warning("The jobs continue in SLURM. To end them: scancel %s", array)
            raise
        if result.status == JobStatus.COMPLETED and result.return_value is not None:
            failures.append(result.return_value)
        return [result]

    try:
        with compat.submitit_hooks(results, SqueueWatcher()):
            yield
    except UncompletedJobError as error:  # with the message of sbatch
        raise UserError(f"SLURM did not take the jobs: {' '.join(str(error).split())}") from None


def _reason(job: Any, error: UncompletedJobError) -> str:
    """Why a job has no result."""
    if isinstance(error, FailedJobError):  # raised outside of the code that reports failures
        return compat.raised_in_job(error)
    if not isinstance(job, SlurmJob):
        return "It ended without a result."
    return f"It ended without a result; SLURM says {job.state}."


class SqueueWatcher:
    """The states of SLURM jobs, from squeue. It has the methods that submitit's jobs call on their `watcher`.

    submitit's own watcher asks sacct, which knows no job where SLURM keeps no accounts.
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.ended: set[str] = set()
        self._jobs: set[str] = set()
        self._seen_ended: set[str] = set()  # at the last call of squeue
        self._last_update = float("-inf")

    def register_job(self, job_id: str) -> None:
        """Watch a job."""
        self._jobs.add(job_id)
        self._last_update = float("-inf")

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job has ended. `mode` is submitit's: "force", "standard" (at intervals) or "cache" (no call)."""
        self._update_if_due(mode)
        return job_id in self.ended

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """SLURM's state of a job, with its reason if there is one."""
        self._update_if_due(mode)
        return self.states.get(job_id, "UNKNOWN")

    def get_info(self, job_id: str, mode: str = "standard") -> dict[str, str]:
        """What is known of a job, by sacct's name of the column."""
        return {"State": self.get_state(job_id, mode)}

    def _update_if_due(self, mode: str) -> None:
        due = time.monotonic() - self._last_update >= INTERVAL
        if mode == "force" or (mode == "standard" and due):
            self.update()

    def update(self) -> None:
        """Call squeue for all jobs that have not ended."""
        command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r"]
        answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        self._last_update = time.monotonic()
        if answer.returncode != 0:  # the controller may be away for a while
            logger.warning("squeue does not answer: %s. Trying again.", " ".join(answer.stderr.split()))
            return
        lines = dict(line.split("|", 1) for line in answer.stdout.splitlines())
        seen = set()
        for job in self._jobs - self.ended:
            state, _, reason = lines.get(job, "GONE|").partition("|")
            self.states[job] = f"{state} ({reason})" if reason not in ("", "None") else state
            if state in ENDED:
                seen.add(job)
        # A job that is put back into the queue has such a state for a moment, so it must be seen twice.
        self.ended |= seen & self._seen_ended
        self._seen_ended = seen


@contextmanager
def requeue_when_stopped() -> Iterator[None]:
    """In a job of submitit: when a signal comes, let the run save a checkpoint, then put the job back into the queue.

    submitit's own handler would put it back and end the process at once, in the middle of a step. SIGTERM alone comes
    from scancel, which ends the job, or from a preemption, after which it is put back.
    """
    put_back = compat.requeue_handler()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # schedulers send two in a row; a second Stopped would end the worker at once
            raise Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        if {stopped.number, *received} - {signal.SIGTERM} or _preempted():
            put_back(signal.SIGUSR1, None)  # exits; raises an error if the job was put back too often
        sys.exit(128 + stopped.number)  # leaves no result
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # what is left to do is short


def _preempted() -> bool:
    """Whether SLURM preempts this job and has not ended it yet."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    command = ["scontrol", "show", "job", "--oneliner", JobEnvironment().job_id]
    job = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return "JobState=RUNNING" in job and "PreemptTime=" in job and "PreemptTime=None" not in job
