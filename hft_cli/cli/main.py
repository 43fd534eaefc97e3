"""The entry point of `hft`: it calls the sub-command and turns errors and signals into an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType

from hft_cli.cli.commands import COMMANDS, overview, run_command
from hft_cli.errors import PipeClosed, Stopped, UserError, choose, file_error
from hft_cli.logs import set_up_logging, take_log_flags
from hft_cli.paths import home

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command in sys.argv and exit.

    Exit status: 0 done, 2 a user's mistake, 1 any other failure, 128 + n after signal n.
    """
    _use_utf8()
    _open_closed_streams()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # schedulers send them before they take the node away
        signal.signal(number, _raise_stopped)
    os.environ.setdefault("HOME", str(home()))  # or libraries would make a folder called ~
    argv = sys.argv[1:]
    try:
        argv = take_log_flags(argv)
        set_up_logging()
        status = _dispatch(argv)
    except UserError as error:
        logger.error("hft: %s", error)
        status = 2
    except (BrokenPipeError, PipeClosed):  # the program that read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (Stopped, KeyboardInterrupt) as stop:
        resume = " with resume=true" if argv[:1] == ["train"] else ""
        logger.error("hft: stopped. The same command%s continues.", resume)
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except MemoryError:
        logger.error("hft: out of memory.")
        status = 1
    except OSError as error:
        failure = file_error(error)
        if failure is None:
            raise
        logger.error("hft: %s", failure)
        status = 2 if isinstance(failure, UserError) else 1
    sys.exit(status)


def _use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if the locale is ASCII and that mode is off.

    Libraries could not open a path with other characters, which Python then holds as escaped bytes.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":  # `python -I` does not read it
        os.environ["PYTHONUTF8"] = "1"  # workers inherit it
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_closed_streams() -> None:
    """Give a process that was started with closed streams (`2>&-`) /dev/null in their place.

    Without it, sys.stderr is None, and the next file that is opened gets its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            lowest_free = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(lowest_free, mode, encoding="utf-8"))


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"hft {version('hft-cli')}")
        return 0
    return run_command(choose("command", argv[0], COMMANDS), list(argv[1:]))
