"""`hft show tokens`: the rows of a run as they will be trained on."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hft_cli.cli.arguments import Parser, path
from hft_cli.cli.compat import hydra_parser, option_names
from hft_cli.cli.hydra_app import composed_values, run_hydra
from hft_cli.cli.hydra_commands import exit_status
from hft_cli.cli.overrides import hydra_arguments, is_sweep
from hft_cli.config.help import help_text
from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError, choose
from hft_cli.files import from_dict, write_text

SHOWN = 3  # rows, without --rows

OPTIONS = """hft show tokens [--rows N|all] [--html FILE] [--json] method=METHOD [group=option …] [key=value …]

Print rows as they will be trained on: ⟦…⟧, or green, is what has a loss. It takes what `hft train` takes, loads nothing
but the tokenizer, and writes nothing but FILE.

  --rows N|all   rows of each round to show (default: 3; with --json all)
  --html FILE    write them as a page
  --json         print one object a row: row, text, tokens, trained (0 or 1), trained_text; of a pair both answers
"""


def show_tokens(words: Sequence[str]) -> int:
    """`hft show tokens`, from the words after it."""
    if {"-h", "--help"} & set(words):
        print(OPTIONS)
        print(help_text("train").split("\n", 1)[1])
        return 0
    parser = Parser("hft show tokens", "[--rows N|all] [--html FILE] [--json] method=METHOD [KEY=VALUE …]", OPTIONS)
    parser.add_argument("--rows", type=_count)
    parser.add_argument("--html", type=path)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(words)
    known = [*option_names(parser), *option_names(hydra_parser())]
    for name in (word.partition("=")[0] for word in rest if word.startswith("-")):
        choose("option", name, known)
    argv = hydra_arguments("train", rest)
    if is_sweep(argv):
        raise UserError("hft show tokens shows one run: leave out -m and the lists of values.")
    return exit_status(run_hydra("train", argv, partial(_show, options)), argv)


def _count(text: str) -> int | str:
    if text != "all" and (not text.isdecimal() or int(text) < 1):
        raise UserError(f"--rows {text} is not a number of rows. Give a number from 1 on, or all.")
    return text if text == "all" else int(text)


def _show(options: Namespace, composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.runner.tokens import page, shown_phases

    values, _ = composed_values(composed, argv)
    config: RunConfig = from_dict(RunConfig, values)
    rows = options.rows or ("all" if options.json else SHOWN)
    count = None if rows == "all" else int(rows)
    phases = shown_phases(config)
    if options.html is not None:
        title = f"{config.data.name}: rows as they are trained on"
        write_text(Path(options.html), page([(phase, list(phase.shown(count))) for phase in phases], title))
        print(f"Page: {options.html}", file=sys.stderr)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for phase in phases:
        head = f"round {phase.phase.round}, {phase.phase.name} ({phase.phase.stage}): {phase.phase.data}"
        if options.json:
            print(f"{head}\n{phase.summary.text()}", file=sys.stderr)
            labels = {"round": phase.phase.round, "name": phase.phase.name} if len(phases) > 1 else {}
            for row in phase.shown(count):
                print(json.dumps({**labels, **row.to_json()}, ensure_ascii=False))
            continue
        if options.html is None:
            for row in phase.shown(count):
                print("\n".join(row.lines(colours)))
        print(f"{head}\n{phase.summary.text()}\n")
