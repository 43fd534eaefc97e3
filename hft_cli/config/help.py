"""The text of `hft train --help` and of its sisters: groups with their options, and every key with its facts."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from hft_cli.config.schema import SCHEMAS
from hft_cli.config.settings import REQUIRED, Setting, leaves
from hft_cli.paths import conf_dir, group_options

USAGE = {
    "train": "hft train method=METHOD [group=option …] [key=value …]",
    "plan": "hft plan method=METHOD [group=option …] [key=value …]   takes all that hft train takes, and more keys",
    "eval": "hft eval run=RUN|model.path=FOLDER suite=SUITE [key=value …]",
}
COLUMN = 40  # where the help of a key begins
WIDTH = 120


def help_text(command: str) -> str:
    """The help of `hft train`, `hft plan` or `hft eval`."""
    schema = SCHEMAS[command]
    groups = [f"  {group:<11} {', '.join(group_options(group))}" for group in option_groups(schema)]
    return "\n".join(
        [
            USAGE[command],
            "-m with key=a,b,c runs a sweep. --cfg job prints what the command composes.",
            "\nGroups and their options:",
            *groups,
            *_sections(schema, ""),
        ]
    )


def option_groups(schema: type[Any]) -> list[str]:
    """The groups of conf/ that a command takes: those that set a part of its config, and those that set several."""
    names = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and group_options(path.name))
    if schema is not SCHEMAS["eval"]:
        return names
    return [name for name in names if name in {spec.name for spec in fields(schema)}]


def config_keys(schema: type[Any]) -> list[str]:
    """Every dotted key of a config class."""
    return [key for key, _, _ in leaves(schema)]


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
    value = "(from its group)" if default == REQUIRED else default if isinstance(default, str) else json.dumps(default)
    text = about.help + (f" [{about.limits}]" if about.limits else "")
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)
    head = f"  {key}={value} "
    if len(head) > COLUMN:
        lines.insert(0, "")
    return head.ljust(COLUMN) + ("\n" + " " * COLUMN).join(lines)
