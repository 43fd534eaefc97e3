"""Start a worker and follow it: its ranks, its output in a log, a progress bar here, and its end together with ours."""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.launch.nodes import Followers, Node, Peer, is_goodbye
from hft_cli.run_dir import RoundDir

logger = logging.getLogger(__name__)


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Hold the directory of `lock` alone. Workers hold it too, so that one still dying keeps the next from starting."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process works on {lock.parent}. Wait for it, or stop it.") from None
        _LOCKS.append(file.fileno())
        try:
            yield
        finally:
            _LOCKS.remove(file.fileno())


_LOCKS: list[int] = []  # descriptors that workers inherit


def run_worker(
    module: str,
    job: Path,
    folder: RoundDir,
    label: str,
    ranks: int | None = None,
    send: Callable[[], None] = lambda: None,
    checkpoints: bool = False,
    others: Followers | None = None,
) -> None:
    """Run a worker on its job, its output into the log, a progress bar here; when we are stopped, so are all its ranks.

    With `ranks` torchrun starts that many; without it is a plain process. Meanwhile `send` is called all the time.
    One that `checkpoints` is asked to do so when we are stopped, and is ended at a second signal. With `others` the
    worker has as many ranks on each other node.

    Raises:
        UserError: for a user's mistake that only the worker could see.
        subprocess.CalledProcessError: if it fails; its log is named on stderr.
        NodeError: if it fails on another node, or that is gone.
    """
    for path in (folder.mistake, folder.progress, folder.stop):
        path.unlink(missing_ok=True)
    command = _command(module, job, ranks, others.node if others else None)
    process = _start(command, folder.log, ranks)
    logger.debug(f"{label}: {shlex.join(command)}\nLog: {folder.log}")

    def meanwhile(stopping: bool = False) -> None:
        send()
        if others is not None:
            others.check(stopping)

    try:
        if others is not None:
            run = folder.folder.parents[1]  # which has another path on other nodes, perhaps
            names = (job, folder.folder / "worker-node{rank}.log")
            others.start(module, *(str(name.relative_to(run)) for name in names))
        try:
            _follow(process, folder.progress, label, meanwhile)
            while others is not None and process.returncode == 0 and others.running:
                others.check()
                time.sleep(0.1)
        except (Stopped, KeyboardInterrupt):
            first, told = time.monotonic(), False
            while checkpoints and process.poll() is None:
                try:
                    if not told:
                        folder.stop.touch()
                        logger.info("Stopping after this step, with a checkpoint. A second signal ends it at once.")
                        told = True
                    _follow(process, folder.progress, label, lambda: meanwhile(stopping=True))
                except (Stopped, KeyboardInterrupt):  # a scheduler tells all nodes, and so us twice
                    if others is None or time.monotonic() - first > AT_ONCE:
                        raise
            raise
        except NodeError:
            if folder.mistake.exists():  # all ranks saw it, those of the other nodes a moment before ours
                raise UserError(folder.mistake.read_text()) from None
            raise
    finally:
        if process.poll() != 0 and others is not None:
            others.end()
        _end(process)
    if process.returncode == 0:
        return
    if folder.mistake.exists():
        raise UserError(folder.mistake.read_text())
    logger.error(_tail(folder.log))
    logger.error(f"{label} failed (exit status {process.returncode}). The whole log: {folder.log}")
    raise subprocess.CalledProcessError(process.returncode, command)


AT_ONCE = 5.0  # seconds within which signals to several nodes are one


def follow_leader(leader: Peer, node: Node, run: Path, ranks: int) -> None:
    """Start our ranks whenever node 0 says so, on the files of the run in `run`, until it says goodbye.

    A signal is passed on to node 0, which has all ranks keep a checkpoint; a second one ends us at once.

    Raises:
        UserError, Stopped, NodeError: as node 0 ended, or if it is gone.
    """
    came: list[tuple[float, int]] = []
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    usual = {one: signal.signal(one, lambda one, _: came.append((time.monotonic(), one))) for one in signals}
    process, log, told = None, Path(), False
    try:
        while True:
            message = leader.receive(0.1) or {}
            if came and not told:
                leader.send(stop=came[0][1])
                told = True
            if came and came[-1][0] - came[0][0] > AT_ONCE:
                raise Stopped(came[-1][1])
            if process is not None and process.poll() is not None:
                leader.send(ended=process.returncode, log=str(log))
                process = None
            if "start" in message:
                job, log = (run / message["start"][key] for key in ("job", "log"))
                log = log.with_name(log.name.format(rank=node.rank))
                logger.info(f"Node {node.rank}: {job.parent.name}, ranks: {ranks}. Their log: {log}")
                process = _start(_command(message["start"]["module"], job, ranks, node), log, ranks)
            if "end" in message and process is not None:
                _end(process)
                process = None
            if is_goodbye(message):
                return
    finally:
        for one, handler in usual.items():
            signal.signal(one, handler)
        if process is not None:
            _end(process)


def _command(module: str, job: Path, ranks: int | None, node: Node | None) -> list[str]:
    """What starts a worker here: a plain process, or torchrun with our share of its ranks."""
    together = ["--standalone"] if node is None else node.torchrun()
    start = [] if ranks is None else ["torch.distributed.run", *together, "--nproc_per_node", str(ranks), "-m"]
    return [sys.executable, "-m", *start, module, str(job)]


def _start(command: list[str], log: Path, ranks: int | None) -> subprocess.Popen[bytes]:
    # Not what a torchrun around us has said to its own ranks.
    environment = {key: value for key, value in os.environ.items() if not re.match(TORCHRUNS, key)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (ranks or 1))))
    if ranks is None:  # with several GPUs in sight, transformers would split each batch over them
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
            pass_fds=_LOCKS,
            preexec_fn=_die_with_parent,
        )


TORCHRUNS = r"(TORCHELASTIC_\w+|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT))$"


def _die_with_parent() -> None:
    """Ask Linux to end the worker if we are killed outright; elsewhere only an orderly stop ends it."""
    if sys.platform == "linux":
        _PRCTL(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    # Some schedulers signal every process of a job: torchrun would die of it, and a worker heeds it by itself.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# Looked up ahead: after the fork a thread of ours (a tracker's) may have left the loader's lock held.
_PRCTL: Any = getattr(ctypes.CDLL(None), "prctl", None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker's whole process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue


def _follow(process: subprocess.Popen[bytes], progress: Path, label: str, send: Callable[[], None]) -> None:
    """Wait for a worker, showing how far it is; one that keeps no progress file only takes its time."""
    with tqdm(
        desc=label,
        bar_format="{desc} [{elapsed}]",
        mininterval=0.2 if sys.stderr.isatty() else 15,
        total=0,
        disable=not logger.isEnabledFor(logging.INFO),
    ) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            _show(bar, progress, label)
            send()
        _show(bar, progress, label)
        bar.refresh()


def _show(bar: Any, progress: Path, label: str) -> None:
    try:
        at = json.loads(progress.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or in the middle of being written
        return
    if bar.total != at["of"]:
        bar.reset(total=at["of"])
        bar.bar_format = "{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        bar.initial = at["step"] - 1
        bar.n = bar.initial
    shown = [] if at["loss"] is None else [f"loss {at['loss']:.3f}"]
    shown += [] if at["tokens_per_second"] is None else [f"{at['tokens_per_second']:,.0f} tokens/s"]
    shown += [at["what"]] if "what" in at else []
    bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update(at["step"] - bar.n)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return "\n".join(errors[-1:] or lines[-5:])
