"""Stopping a sweep whose jobs joblib runs in parallel processes.

joblib kills its processes when the command is stopped. So the command passes a signal on to its jobs instead, each of
which saves a checkpoint and ends as it would alone, and is stopped itself when all have ended.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from hft_cli.errors import Stopped
from hft_cli.launch.lifetime import SAME_SIGNAL, handled

STOP = "stop"  # file in the sweep's folder: no further job starts

logger = logging.getLogger(__name__)


@contextmanager
def stop_together(folder: Path) -> Iterator[None]:
    """In the command, while joblib runs the jobs: pass the first signal on to them. `folder` is the sweep's own.

    Raises:
        Stopped: after a signal, when all jobs have ended, or at once after a second one.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise Stopped(number)
        (folder / STOP).touch()
        logger.info("Stopping the jobs of the sweep, each with a checkpoint. A second signal ends them at once.")
        for file in folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(file.stem), signal.SIGTERM)

    with handled(pass_on):
        yield
    if received:
        raise Stopped(received[0])


@contextmanager
def stopped_by_command(folder: Path) -> Iterator[None]:
    """In a job: receive the signals of the command.

    Raises:
        Stopped: for a signal, or at once if the sweep is being stopped.
    """
    received: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if len(received) == 1 or received[-1] - received[0] > SAME_SIGNAL:
            raise Stopped(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which the command receives too
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    file = folder / f"{os.getpid()}.pid"
    file.touch()  # before the question whether the sweep is being stopped: one of the two is seen
    try:
        if (folder / STOP).exists():
            raise Stopped(signal.SIGTERM)
        yield
    finally:
        file.unlink(missing_ok=True)
