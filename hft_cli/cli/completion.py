"""`hft completion`: scripts for shells, and what they ask for: the words that may come next on a command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from functools import partial

from hft_cli.cli.arguments import Parser
from hft_cli.config.conf import SIZES, experiments, groups
from hft_cli.config.help import choices_of, config_keys
from hft_cli.config.schema import SCHEMAS
from hft_cli.errors import UserError, choose
from hft_cli.method.formats import FORMATS
from hft_cli.paths import PACKAGE, group_options

SHELLS = ("bash", "zsh", "fish")
FLAGS = ("-m", "--help", "--cfg=job")


def complete(parser: Parser, words: list[str], commands: Iterable[str]) -> int:
    """`hft completion SHELL` prints a script; that calls `hft completion words LINE`."""
    parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    parser.add_argument("line", nargs="?", help="with SHELL=words: the command line up to the cursor")
    if words[:1] == ["words"]:
        print("\n".join(next_words(" ".join(words[1:]), commands)))
        return 0
    options = parser.parse(words)
    choose("shell", options.shell, SHELLS)
    if options.line is not None:
        raise UserError(f"One argument too many: '{options.line}'. Usage: {parser.usage}")
    print((PACKAGE / "assets" / "completion" / f"hft.{options.shell}").read_text(encoding="utf-8"), end="")
    return 0


def next_words(line: str, commands: Iterable[str]) -> list[str]:
    """The words that the last word of a command line may become, in order; of a word that ends with `=` more follows.

    Nothing is completed that is a path: shells know files.
    """
    words = _words(line)
    typed = words[-1]
    if len(words) < 3:
        found: Iterable[str] = commands
    elif words[1] in SCHEMAS:
        found = _of_config(words[1], typed)
    else:
        found = OPTIONS.get(words[1], list)()
    return sorted({word for word in found if word.startswith(typed)})


def _words(line: str) -> list[str]:
    """The words of an unfinished line, the last of which may be empty."""
    try:
        words = shlex.split(line)
    except ValueError:  # within quotes
        words = line.split()
    return [*words, ""] if not words or line[-1].isspace() else words


def _of_config(command: str, typed: str) -> list[str]:
    """Groups with their options, keys with their choices, and flags. A plus before a group is kept."""
    plus = "+" if typed.startswith("+") else ""
    key, equals, value = typed.removeprefix("+").partition("=")
    options: dict[str, Callable[[], list[str]]] = {group: partial(_options, group) for group in groups()}
    options |= {"experiment": experiments, "size": lambda: list(SIZES)}
    if not equals:
        keys = [*options, *([] if plus else config_keys(SCHEMAS[command]))]
        return [*(f"{plus}{name}=" for name in keys), *FLAGS]
    before, _, _ = value.rpartition(",")  # of a sweep
    start = f"{plus}{key}={before}{',' * bool(before)}"
    names = options[key]() if key in options else choices_of(SCHEMAS[command], key)
    return [f"{start}{name}" for name in names]


def _options(group: str) -> list[str]:
    return list(group_options(group))


# Command -> the options that it has.
OPTIONS: dict[str, Callable[[], list[str]]] = {
    "verify": lambda: ["--base", "--model", "--draw", "--infer"],
    "draw": lambda: [
        *_options("model"), "--ratio", "--seed", "--round", "--level", "--balance", "--redraw", "--embeddings",
        "--head", "--final-norm", "--names", "--format", *(f"--format={name}" for name in FORMATS),
    ],
    "gate": lambda: ["--max-loss", "--min-gain", "--suite"],
    "show": lambda: ["draws", "tokens"],
    "materialize": lambda: ["--out", "--round", "--base"],
    "publish": lambda: ["--out", "--round", "--push", "--public"],
    "report": lambda: ["--out", "--norms"],
    "completion": lambda: list(SHELLS),
}  # fmt: skip
