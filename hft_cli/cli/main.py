"""The `hft` command: sub-commands, composing a config with Hydra, and telling a user's mistake from a fault."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType

from hft_cli.cli.commands import COMMANDS
from hft_cli.errors import Stopped, UserError, choose
from hft_cli.logs import set_up_logging, take_log_flags

logger = logging.getLogger(__name__)

USAGE = """\
hft: fine-tune language models without making them forget (Half Fine-Tuning, ACL 2025)

  hft train +method=hft [group=option …] [key=value …]   run a fine-tuning; -m sweeps over a,b,c
  hft plan +method=hft [group=option …] [key=value …]    what that would train, need and cost; -m compares
  hft eval run=RUN suite=knowledge                       score a run's model, or any: model.path=FOLDER suite=…
  hft verify RUN                                         prove from the files that frozen matrices kept every bit
  hft show draws RUN                                     what each round updated, as layers by matrices
  hft materialize RUN round=K out=DIR                    the model after any round, from the base and the deltas
  hft publish RUN out=DIR                                what a run changed, with a model card; materialize loads it
  hft report RUN…                                        compare runs and sweeps: tables, figures, one page

Try it, without a GPU or a download:  hft train +method=hft suite=pocket
What there is to set:                 hft train --help"""


def main() -> None:
    """Entry point. Exit status: 0 done, 2 a user's mistake, 1 anything else, 128+n for signal n."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's, when time is up or the nodes are wanted
        signal.signal(number, _interrupt)
    argv = sys.argv[1:]
    try:
        argv = take_log_flags(argv)
        set_up_logging()
        status = _command(argv)
    except UserError as error:
        logger.error("hft: %s", error)
        status = 2
    except (Stopped, KeyboardInterrupt) as stop:
        again = " with resume=true" if argv[:1] == ["train"] else ""
        logger.error("hft: stopped. The same command%s continues.", again)
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        logger.error("hft: %s: %s", error.strerror, error.filename)
        status = 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _command(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(f"hft {version('hft-cli')}")
        return 0
    return COMMANDS[choose("command", argv[0], COMMANDS)](list(argv[1:]))
