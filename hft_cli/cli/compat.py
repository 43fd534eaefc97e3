"""Private or undocumented behaviour of other packages that `cli` relies on; tests/cli/test_compat.py pins it."""

from __future__ import annotations

import argparse


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser: -h, --help, --out, ….

    UPSTREAM: Python 3.11: argparse has no public way to list them. This can go when it suggests the nearest option.
    """
    return [name for action in parser._actions for name in action.option_strings]


def hydra_parser() -> argparse.ArgumentParser:
    """The parser with which Hydra reads the flags and overrides of an application.

    UPSTREAM: hydra-core 1.3.8: hydra.main uses it on sys.argv, and prints the whole usage after a mistake. With it the
    flags are checked beforehand. This can go when hydra.main takes a parser.
    """
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    return parser
