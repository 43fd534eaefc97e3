"""The text of `hft train --help` and of its sisters: groups with their options, and every key with its facts."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hft_cli.config.conf import experiments, groups
from hft_cli.config.schema import SCHEMAS
from hft_cli.config.settings import REQUIRED, Setting, leaves
from hft_cli.paths import group_options

USAGE = {
    "train": "hft train method=METHOD [group=option …] [key=value …]",
    "plan": "hft plan method=METHOD [group=option …] [key=value …]   takes all that hft train takes, and more keys",
    "eval": "hft eval run=RUN|model.path=FOLDER suite=SUITE [key=value …]",
}
WIDTH = 120  # characters of a line


def help_text(command: str) -> str:
    """The help of `hft train`, `hft plan` or `hft eval`."""
    schema = SCHEMAS[command]
    options = {group: group_options(group) for group in groups()} | {"experiment": experiments()}
    if command == "eval":
        options = {group: options[group] for group in ("engine", "model", "suite", "tracking")}
    return "\n".join(
        [
            USAGE[command],
            "-m with key=a,b,c runs a sweep. --cfg job prints what the command composes.",
            "\nGroups and their options:",
            *(_two_columns(f"  {group}", ", ".join(names), 14) for group, names in sorted(options.items())),
            *_sections(schema, ""),
        ]
    )


def config_keys(schema: type[Any]) -> list[str]:
    """Every dotted key of a config class."""
    return [key for key, _, _ in leaves(schema)]


def choices_of(schema: type[Any], key: str) -> list[str]:
    """The choices of a dotted key; empty if it has none, or there is no such key."""
    return next((spec.metadata["setting"].names for name, spec, _ in leaves(schema) if name == key), [])


def limits_text(schema: type[Any], key: str) -> str:
    """ " It must be …." with the range or the choices of a key, for the end of a message; empty if it has none."""
    limits = next((spec.metadata["setting"].limits for name, spec, _ in leaves(schema) if name == key), "")
    return f" It must be {limits}." if limits else ""


def _sections(cls: type[Any], where: str) -> Iterator[str]:
    """A class's docstring and its keys, then the same of the dataclasses in it."""
    nested = {name: hint for name, hint in get_type_hints(cls).items() if is_dataclass(hint)}
    yield f"\n{inspect.getdoc(cls)}"
    for key, spec, value in leaves(cls, where):
        if key.removeprefix(where).partition(".")[0] not in nested:
            yield _entry(key, value, spec.metadata["setting"])
    for name, hint in nested.items():
        yield from _sections(hint, f"{where}{name}.")  # type: ignore[arg-type]


def _entry(key: str, default: Any, about: Setting) -> str:
    """A key with its default, and its help beside it."""
    value = "(set in conf/)" if default == REQUIRED else default if isinstance(default, str) else json.dumps(default)
    text = about.help + (f" [{about.limits}]" if about.limits else "")
    return _two_columns(f"  {key}={value}", text, 40)


def _two_columns(head: str, text: str, column: int) -> str:
    """`head`, and `text` in lines that begin at `column`; on the line of the head if that leaves room."""
    lines = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False)
    if len(head) >= column:
        lines.insert(0, "")
    return (head.ljust(column) + ("\n" + " " * column).join(lines)).rstrip()
