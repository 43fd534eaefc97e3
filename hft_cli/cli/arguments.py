"""Arguments of the commands that read files: argparse, with errors in one line and KEY=VALUE as another spelling."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hft_cli.cli.compat import option_names
from hft_cli.errors import UserError, choose
from hft_cli.logs import LOG_HELP
from hft_cli.paths import expanded


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and that reads `out=DIR` as `--out DIR`.

    Args:
        prog: the command, such as "hft verify".
        usage: the words after it.
        description: what it does.
    """

    def __init__(self, prog: str, usage: str, description: str) -> None:
        super().__init__(prog, f"{prog} {usage}", description, epilog=LOG_HELP, allow_abbrev=False)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the command.

        Raises:
            UserError: if a word is unknown, missing or has a wrong value.
        """
        words = [self._without_alias(word) for word in words]
        check_options(self, words)
        options, rest = self.parse_known_intermixed_args(words)
        if rest:
            self.error(f"one argument too many: '{rest[0]}'")
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. Usage: {self.usage}")

    def _without_alias(self, word: str) -> str:
        """`out=DIR` as `--out=DIR`. Other words are returned as they are: names of a sweep's folders contain `=`."""
        key, equals, _ = word.partition("=")
        keys = [name.removeprefix("--") for name in option_names(self) if name not in ("-h", "--help")]
        if not equals or not re.fullmatch(r"[a-z][a-z-]*", key) or (key not in keys and Path(word).exists()):
            return word
        return f"--{choose('key', key, keys)}{word.removeprefix(key)}"


def check_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse options that a parser does not have.

    Raises:
        UserError: for the first one, with the nearest name.
    """
    names = option_names(parser)
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        if option not in names:
            choose("option", option, [name for name in names if name.startswith("--")])


def path(text: str) -> Path:
    """The type of an argument that is a path; `~` is the home directory.

    Raises:
        UserError: if it is empty, which would be the current directory.
    """
    if not text:
        raise UserError("A path is empty: give a folder, for instance --out models/first.")
    return expanded(text)


def points(text: str) -> float:
    """The type of an argument in points of a score.

    Raises:
        UserError: if it is no number from 0 to 100.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise UserError(f"{text} is no number of points from 0 to 100.")
    return value


def number(text: str) -> float:
    """The type of an argument that is a number.

    Raises:
        UserError: if it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text} is not a number.") from None


def round_number(text: str) -> int:
    """The type of an argument that is the number of a round, counted from 1.

    Raises:
        UserError: if it is not a number.
    """
    if not text.isdecimal():
        raise UserError(f"round={text} is not a number. Rounds are counted from 1.")
    return int(text)
