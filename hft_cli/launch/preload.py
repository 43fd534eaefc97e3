"""A process that has loaded the libraries of the workers, and forks for each worker: they are loaded only once.

A command starts it with its first worker, and it ends with the command. It has no threads, no process group and no
device, and its own random state is never used. For each worker it forks a keeper, and the keeper forks the worker, or
its ranks: it does for them what torchrun would do. With GPUs, with several nodes, and on other systems than Linux,
workers are plain processes instead.

A command asks over a Unix socket, by a line of JSON that comes with the file descriptors of the log and of the locks.
The answers are lines too: the keeper's process number, then the worker's exit status. If the connection closes before
that, the keeper ends the worker.

    python -m hft_cli.launch.preload SOCKET [MODULE …]
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hft_cli.launch import work
from hft_cli.launch.compat import end_process
from hft_cli.launch.lifetime import end_with_parent, prepare_worker
from hft_cli.logs import set_up_logging

# Not HarnessJob, which sets variables before it loads libraries.
KINDS = ("PhaseJob", "RowsJob", "ProbeJob", "ImportanceJob")

MODULES = ("hft_cli.training.phase", "hft_cli.evaluation.rows_worker", "hft_cli.evaluation.probe_worker")

SHARED = "HFT_PRELOADED"  # environment variable: the socket of a process that several commands use, or "off"

# Environment variables that may differ between this process and a worker: no library reads them when it is loaded. A
# command that loads torch itself, to read the files of a model, gets TORCHINDUCTOR_CACHE_DIR from it.
FREE = re.compile("(HFT|HYDRA)_.*|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|TORCHINDUCTOR_CACHE_DIR|PATH|PWD|OLDPWD|SHLVL|_")

GRACE = 30.0  # seconds that a worker has after SIGTERM, as under torchrun

TITLE = 400  # letters of a worker's command line

logger = logging.getLogger(__name__)


@dataclass
class Forked:
    """A worker in a fork: what we use of `subprocess.Popen`, with the same meaning.

    Attributes:
        pid: the keeper's process number. It passes SIGTERM on, and the worker ends with it.
        returncode: the worker's exit status, or minus the signal that ended it; None while it runs.
    """

    connection: socket.socket
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while the worker runs."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; subprocess.TimeoutExpired if it does not come within `timeout` seconds."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return status

    def _status(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], seconds)[0]:
            answer = _receive(self.connection)
            self.returncode = -signal.SIGKILL if answer is None else int(answer["status"])
            self.connection.close()
        return self.returncode


def start(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], ranks: int | None, locks: Sequence[int]
) -> Forked | None:
    """Start a worker in a fork; None if it must be a plain process.

    Args:
        arguments: those of `work.main`: the kind and the job file.
        log: what the worker prints is added to it.
        environment: all of the worker's variables.
        ranks: number of its ranks on this machine; None for one process without a process group.
        locks: file descriptors that the worker keeps open.
    """
    place = os.environ.get(SHARED)
    if arguments[0] not in KINDS or place == "off" or not _can_fork():
        return None
    place = place or _own_process(environment, *(["deepspeed"] if ranks is not None else []))
    if place is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    request = {
        "arguments": list(arguments), "environment": dict(environment), "folder": os.getcwd(), "ranks": ranks,
    }  # fmt: skip
    with log.open("ab") as file:
        socket.send_fds(connection, [b"\0"], [file.fileno(), *locks])
    connection.sendall(json.dumps(request).encode() + b"\n")
    answer = _receive(connection)
    if answer is None:
        raise RuntimeError("The process that starts workers has ended.")
    if "pid" not in answer:
        connection.close()
        logger.debug("Not forked: the environment has other variables than the process that forks: %s", answer["other"])
        return None
    return Forked(connection, answer["pid"])


def _can_fork() -> bool:
    """Whether this is a machine on which forks were tried: not one with a GPU, whose driver does not survive them."""
    return sys.platform == "linux" and not Path("/dev/kfd").exists() and not list(Path("/dev").glob("nvidia*"))


_OWN: list[tuple[subprocess.Popen[bytes], Path] | None] = []  # this command's process and its socket; None: failed


def begin(environment: Mapping[str, str], *modules: str) -> None:
    """Start this command's process: it loads the libraries while the command prepares the first worker.

    Args:
        environment: variables of the workers.
        modules: what to load besides `MODULES`.
    """
    if _OWN or SHARED in os.environ or not _can_fork():
        return
    try:
        place = Path(tempfile.mkdtemp(prefix="hft-"), "socket")
    except OSError as error:
        logger.debug("Workers are not forked: %s", error)
        _OWN.append(None)
        return
    process = start_process("hft_cli.launch.preload", place, environment, [*MODULES, *modules])
    atexit.register(_end, process, place.parent)
    _OWN.append((process, place))


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.terminate()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _own_process(environment: Mapping[str, str], *modules: str) -> str | None:
    """The socket of this command's process, when it is ready; None if there is none."""
    begin(environment, *modules)
    if not _OWN or _OWN[0] is None:
        return None
    process, place = _OWN[0]
    try:
        wait_until_ready(process, place)
    except RuntimeError as error:  # the path is too long for a socket, or a library cannot be loaded
        logger.debug("Workers are not forked: %s", error)
        shutil.rmtree(place.parent, ignore_errors=True)
        _OWN[0] = None
        return None
    return str(place)


def start_process(
    program: str, place: Path, environment: Mapping[str, str], modules: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start a process that loads `modules` and then listens on the socket `place`. It ends with this process.

    `program` is the module that it runs. What it prints goes to the file `log` beside the socket.
    """
    with place.with_name("log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", program, str(place), *modules, " " * TITLE], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=dict(environment), preexec_fn=prepare_worker, start_new_session=True,
        )  # fmt: skip


def wait_until_ready(process: subprocess.Popen[bytes], place: Path) -> None:
    """Wait until a process listens on its socket; RuntimeError if it ends instead."""
    while not place.exists():
        if process.poll() is not None:
            raise RuntimeError(
                f"The process that starts workers failed.\n{place.with_name('log').read_text(encoding='utf-8')}"
            )
        time.sleep(0.02)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message, which is a line of JSON; None if the connection is closed."""
    data = b""
    while not data.endswith(b"\n"):
        try:
            part = connection.recv(1 << 16)
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    message: dict[str, Any] = json.loads(data)
    return message


# The process, its keepers, and the workers.


def main(place: str, modules: Sequence[str]) -> int:
    """Load the modules, and fork for each request."""
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(place))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.part")  # before the libraries are loaded: the path may be too long for a socket
    loaded_in = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # there is no GPU; read when DeepSpeed is imported
    work.load_modules(*modules)
    with listener:
        listener.listen(128)
        os.rename(f"{place}.part", place)  # it is there when it can be used
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGTERM)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 16)
    request = _receive(connection)
    if not descriptors or request is None:  # the command was killed
        return 1
    if other := _other_variables(loaded_in, request["environment"]):
        connection.sendall(json.dumps({"other": other}).encode() + b"\n")
        return 0
    return _keep(connection, request, descriptors[0])


def _leave(place: str) -> NoReturn:
    """End with the command, also with one that was killed."""
    shutil.rmtree(os.path.dirname(place), ignore_errors=True)
    os._exit(0)


def _other_variables(loaded_in: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The variables that a library may have read with another value than a worker's."""
    keys = sorted(loaded_in.keys() | wanted.keys())
    return [key for key in keys if loaded_in.get(key) != wanted.get(key) and not FREE.fullmatch(key)]


def _keep(connection: socket.socket, request: Mapping[str, Any], log: int) -> NoReturn:
    """Fork the worker or its ranks, pass signals on to them, and report their end."""
    os.setsid()
    workers: dict[int, int | None] = {}
    stopped: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(time.monotonic())
        _signal(workers, signal.SIGTERM)

    ranks = request["ranks"]
    read, write = os.pipe()  # through which the ranks learn the port of their store, which has threads
    for rank in range(ranks or 1):
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.close(write)
            _become_worker(request, log)
            if ranks is not None:
                os.environ.update(_variables_of_rank(rank, ranks, os.read(read, 5).decode()))
            _work(request["arguments"], rank if ranks is not None else None)
        workers[pid] = None
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    connection.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
    if ranks is not None:
        from hft_cli.launch.compat import store_for_ranks

        store = store_for_ranks()
        os.write(write, f"{store.port:05d}".encode() * ranks)
    status = _wait(workers, connection, stopped)
    with suppress(OSError):
        connection.sendall(json.dumps({"status": status}).encode() + b"\n")
    os._exit(0)


def _wait(workers: dict[int, int | None], connection: socket.socket, stopped: list[float]) -> int:
    """Wait for the end of all workers. If one fails, or the command has gone, end the others."""
    while None in workers.values():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            workers[pid] = os.waitstatus_to_exitcode(status)
            if workers[pid] != 0 and not stopped:
                stopped.append(time.monotonic())
                _signal(workers, signal.SIGTERM)
            continue
        if not stopped and select.select([connection], [], [], 0.01)[0]:
            stopped.append(time.monotonic())
            _signal(workers, signal.SIGTERM)
        if stopped:
            time.sleep(0.05)
            if time.monotonic() - stopped[0] > GRACE:
                _signal(workers, signal.SIGKILL)
    ended = [status for status in workers.values() if status is not None]
    return ended[0] if len(ended) == 1 else int(any(ended))


def _signal(workers: Mapping[int, int | None], number: int) -> None:
    """Send a signal to the workers that run."""
    for pid, status in workers.items():
        if status is None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _become_worker(request: Mapping[str, Any], log: int) -> None:
    """In the fork: what a new process has of its own."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.setsid()
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]  # as for python -m
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    if "OMP_NUM_THREADS" in os.environ and (torch := sys.modules.get("torch")):  # OpenMP read it when it was loaded
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _variables_of_rank(rank: int, ranks: int, port: str) -> dict[str, str]:
    """The variables that torchrun sets for a rank of one node."""
    from hft_cli.launch.compat import STORE_VARIABLES

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.lstrip("0")}
    return {**{key: str(value) for key, value in numbers.items()}, **address, **STORE_VARIABLES}


def _work(arguments: Sequence[str], rank: int | None) -> NoReturn:
    """Do the work and end, under the command line that a plain process would have."""
    place = [] if rank is None else [f"RANK={rank}"]
    _set_command_line([sys.executable, "-m", "hft_cli.launch.work", *arguments, *place])
    set_up_logging()
    end_process(work.main(arguments))


def _set_command_line(words: Sequence[str]) -> None:
    """Overwrite the command line that `ps` shows: fields 48 and 49 of /proc/self/stat say where it is in memory."""
    import ctypes

    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = (int(fields[number - 3]) for number in (48, 49))
    if 0 < start < end:
        line = b"\0".join(os.fsencode(word) for word in words)[: end - start - 1]
        ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [word for word in sys.argv[2:] if word.strip()]))
