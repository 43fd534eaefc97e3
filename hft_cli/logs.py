"""Messages to the user: the standard `logging` module, bare messages on stderr."""

from __future__ import annotations

import logging
import os
import sys

from hft_cli.errors import UserError, choose

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FLAGS = {"-q": "WARNING", "--quiet": "WARNING", "-v": "DEBUG", "--verbose": "DEBUG"}
VARIABLE = "HFT_LOG_LEVEL"
LOG_HELP = """\
Every command takes -q, --quiet (warnings and results only) and -v, --verbose (what is started, and where it logs).
HFT_LOG_LEVEL=DEBUG|INFO|WARNING|ERROR sets the same for all commands."""


def take_log_flags(argv: list[str]) -> list[str]:
    """Apply -q, -v, --quiet and --verbose, wherever they stand in `argv`, and return the other arguments.

    The level goes into the environment variable HFT_LOG_LEVEL, which the processes that this one starts inherit.

    Raises:
        UserError: if quiet and verbose are both given.
    """
    levels = {FLAGS[argument] for argument in argv if argument in FLAGS}
    if len(levels) > 1:
        raise UserError("-q (quiet) and -v (verbose) exclude each other. Give one of them.")
    if levels:
        os.environ[VARIABLE] = levels.pop()
    return [argument for argument in argv if argument not in FLAGS]


def set_up_logging() -> None:
    """Send the messages of `hft_cli` to stderr, from the level that HFT_LOG_LEVEL names (INFO by default).

    Every process that runs a command or a job of a sweep calls this once.

    Raises:
        UserError: if HFT_LOG_LEVEL does not name a level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("hft_cli")
    logger.handlers = [handler]
    logger.propagate = False  # Hydra and submitit have handlers of their own on the root logger
    logger.setLevel("INFO")
    logger.setLevel(choose(VARIABLE, os.environ.get(VARIABLE, "INFO").upper(), LEVELS))
