"""Run a worker from the parent: start its ranks, show its progress, and end it when the parent ends."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from hft_cli.errors import NodeError, Stopped, UserError, choose
from hft_cli.launch import preload
from hft_cli.launch.jobs import WORKERS, Job, write_job
from hft_cli.launch.lifetime import SAME_SIGNAL, handled, inherited, prepare_worker
from hft_cli.launch.nodes import Node
from hft_cli.launch.peer import Peer
from hft_cli.launch.rendezvous import Followers, is_goodbye
from hft_cli.run_dir import RoundDir, RunDir

logger = logging.getLogger(__name__)

Process = subprocess.Popen[bytes] | preload.Forked

FULL = 1 << 20  # bytes: with less left on a disk, a worker that failed did so for that


@dataclass(frozen=True)
class WorkerRun:
    """One run of a worker.

    Attributes:
        folder: for the job file, the log, the progress and a mistake.
        label: text beside the progress bar.
        ranks: processes on each node, started by torchrun; None for one plain process.
        checkpoints: whether the worker saves a checkpoint when it is asked to stop.
    """

    job: Job
    folder: RoundDir
    label: str
    ranks: int | None = None
    checkpoints: bool = False


def run_worker(run: WorkerRun, poll: Callable[[], None] = lambda: None, followers: Followers | None = None) -> None:
    """Start a worker, show its progress, and wait for its end. When this process is stopped, so are all ranks.

    A worker that `checkpoints` saves a checkpoint first; a second signal ends it at once.

    Args:
        poll: called about ten times a second while the worker runs.
        followers: the other nodes; each starts as many ranks of the worker.

    Raises:
        UserError: for a user's mistake that only the worker could see.
        subprocess.CalledProcessError: if the worker fails; its log is named on stderr.
        NodeError: if the worker fails on another node, or the connection to that node is lost.
    """
    folder, kind = run.folder, type(run.job).__name__
    for path in (folder.mistake, folder.progress, folder.stop):
        path.unlink(missing_ok=True)
    job_file = write_job(run.job, folder.folder)
    command = _command(kind, job_file, run.ranks, followers.node if followers else None)
    forked = None if followers else _start_in_fork(command[-2:], folder.log, run.ranks)
    process = forked or _start(command, folder.log, run.ranks)
    logger.debug("%s: %s\nLog: %s", run.label, shlex.join(command), folder.log)
    try:
        if followers is not None:
            run_folder = folder.folder.parents[1]  # other nodes may have it under another path
            names = (job_file, folder.folder / "worker-node{rank}.log")
            followers.start(kind, *(str(name.relative_to(run_folder)) for name in names))
        _wait(process, run, poll, followers)
    except NodeError:
        if folder.mistake.exists():  # all ranks saw it, those of another node a moment earlier
            raise UserError(folder.mistake.read_text(encoding="utf-8")) from None
        raise
    finally:
        if process.poll() != 0 and followers is not None:
            followers.end()
        _end(process)
    status = process.wait()
    if status == 0:
        return
    if folder.mistake.exists():
        raise UserError(folder.mistake.read_text(encoding="utf-8"))
    logger.error(_last_error(folder.log))
    if shutil.disk_usage(folder.folder).free < FULL:  # libraries say so in many ways
        logger.error("The disk of %s is full.", folder.folder)
    logger.error("%s failed (exit status %d). The whole log: %s", run.label, status, folder.log)
    raise subprocess.CalledProcessError(status, command)


def _wait(process: Process, run: WorkerRun, poll: Callable[[], None], followers: Followers | None) -> None:
    """Wait until all ranks have ended. When a signal stops us, let the worker save a checkpoint first.

    Raises:
        Stopped, KeyboardInterrupt: after the worker's checkpoint, or at once when a second signal comes.
        NodeError: if ranks on another node fail.
    """

    def check(stopping: bool = False) -> None:
        poll()
        if followers is not None:
            followers.check(stopping)

    try:
        _show_progress(process, run, check)
        while followers is not None and process.returncode == 0 and followers.running:
            followers.check()
            time.sleep(0.1)
    except (Stopped, KeyboardInterrupt):
        stopped = time.monotonic()
        while run.checkpoints and process.poll() is None:
            try:
                if not run.folder.stop.exists():
                    run.folder.stop.touch()
                    logger.info("Stopping after this step, with a checkpoint. A second signal ends it at once.")
                _show_progress(process, run, lambda: check(stopping=True))
            except (Stopped, KeyboardInterrupt):
                if followers is None or time.monotonic() - stopped > SAME_SIGNAL:
                    raise
        if run.checkpoints and process.returncode and _has_trained(run.folder.progress):
            return  # it failed to save a checkpoint, which `run_worker` reports
        raise


def _has_trained(progress: Path) -> bool:
    """Whether a worker has begun to train, so that it answers a signal by a checkpoint."""
    try:
        return json.loads(progress.read_text(encoding="utf-8"))["step"] is not None
    except FileNotFoundError:
        return False


def follow_leader(leader: Peer, node: Node, run: Path, ranks: int) -> None:
    """On a node other than node 0: start ranks of the workers that node 0 starts, until node 0 ends the run.

    A signal is passed on to node 0, which lets all ranks save a checkpoint. A second one ends this node at once. `run`
    is the run's directory, and `ranks` the number of processes on this node.

    Raises:
        UserError, Stopped, NodeError: as node 0 ended, or if the connection to it is lost.
    """
    process, log, forwarded = None, Path(), False
    with _recorded_signals() as signals:
        try:
            while True:
                message = leader.receive(0.1) or {}
                if signals and not forwarded:
                    leader.send(stop=signals[0][1])
                    forwarded = True
                if signals and signals[-1][0] - signals[0][0] > SAME_SIGNAL:
                    raise Stopped(signals[-1][1])
                if process is not None and process.poll() is not None:
                    leader.send(ended=process.returncode, log=str(log))
                    process = None
                if "start" in message:
                    job, log = (_below(run, message["start"][key], leader) for key in ("job", "log"))
                    log = log.with_name(log.name.format(rank=node.rank))
                    logger.info("Node %d: %s, ranks: %d. Log: %s", node.rank, job.parent.name, ranks, log)
                    kind = choose("worker", message["start"]["worker"], WORKERS)
                    command = _command(kind, job, ranks, node)
                    process = _start(command, log, ranks, RunDir(run).lock)
                if "end" in message and process is not None:
                    _end(process)
                    process = None
                if is_goodbye(message):
                    return
        finally:
            if process is not None:
                _end(process)


def _below(run: Path, name: str, leader: Peer) -> Path:
    """A file of the run's directory that node 0 names; NodeError if it is elsewhere."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise NodeError(f"{leader.name} names a file outside the run's directory: {name!r}.")
    return run / name


@contextmanager
def _recorded_signals() -> Iterator[list[tuple[float, int]]]:
    """Record SIGTERM, SIGUSR1 and SIGINT, as (seconds, number), instead of being stopped by them."""
    received: list[tuple[float, int]] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append((time.monotonic(), number))

    with handled(record):
        yield received


def _command(kind: str, job_file: Path, ranks: int | None, node: Node | None) -> list[str]:
    """The command that starts a worker on this node: one process, or torchrun with this node's ranks."""
    rendezvous = ["--standalone"] if node is None else node.torchrun_options()
    torchrun = ["torch.distributed.run", *rendezvous, "--nproc_per_node", str(ranks), "-m"] if ranks is not None else []
    return [sys.executable, "-m", *torchrun, "hft_cli.launch.work", kind, str(job_file)]


def _start(command: list[str], log: Path, ranks: int | None, lock: Path | None = None) -> subprocess.Popen[bytes]:
    descriptors, variables = inherited(lock)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_environment(ranks) | variables,
            start_new_session=True,
            pass_fds=descriptors,
            preexec_fn=prepare_worker,
        )


def _start_in_fork(arguments: list[str], log: Path, ranks: int | None) -> preload.Forked | None:
    locks, variables = inherited(None)
    return preload.start(arguments, log, _environment(ranks) | variables, ranks, locks)


def load_libraries(deepspeed: bool) -> None:
    """Let workers' libraries be loaded while the parent prepares the first worker (launch/preload.py)."""
    preload.begin(_environment(None), *(["deepspeed"] if deepspeed else []))


def _environment(ranks: int | None) -> dict[str, str]:
    """Environment variables of a worker."""
    environment = {key: value for key, value in os.environ.items() if not re.match(NOT_FOR_WORKERS, key)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (ranks or 1))))
    if ranks is None:  # if it saw several GPUs, transformers would split each batch over them
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return environment


# What a torchrun, `accelerate launch` or mpirun that started `hft` set for its own ranks, and settings of accelerate:
# transformers would take precision, engine and number of ranks from them instead of from the configuration.
NOT_FOR_WORKERS = (
    r"((TORCHELASTIC|ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|FORK_LAUNCHED)$"
)


def _end(process: Process) -> None:
    """End a worker's process group: SIGTERM, and SIGKILL if it has not ended 15 seconds later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue


def _ended(process: Process, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _show_progress(process: Process, run: WorkerRun, poll: Callable[[], None]) -> None:
    """Wait for a worker to end, with a progress bar."""
    with tqdm(
        desc=run.label,
        bar_format=WITHOUT_COUNT,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        total=0,
        postfix=STARTING,
        disable=not logger.isEnabledFor(logging.INFO),
    ) as bar:
        while not _ended(process, 0.1):
            _update(bar, run.folder.progress)
            poll()
        _update(bar, run.folder.progress)
        bar.refresh()


WITHOUT_COUNT = "{desc} [{elapsed}{postfix}]"
WITH_COUNT = "{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
STARTING = "starting"  # until the worker writes its progress file


def _update(bar: Any, progress: Path) -> None:
    """Show what a worker's progress file says (its keys: jobs.Progress)."""
    try:
        values = json.loads(progress.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    step, total, loss, rate = (values[key] for key in ("step", "total", "loss", "tokens_per_second"))
    parts = [
        "" if loss is None else f"loss {loss:.3f}",
        "" if values["validation_loss"] is None else f"validation {values['validation_loss']:.3f}",
        "" if rate is None else f"{rate:,.0f} tokens/s",
        values["activity"] or "",
    ]
    bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)
    if total is not None and bar.total != total:
        bar.reset(total=total)
        bar.bar_format = WITH_COUNT
        bar.initial = bar.n = step - 1
    bar.update(0 if step is None else step - bar.n)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, or the last five lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return "\n".join(errors[-1:] or lines[-5:])
