"""The chat template of a model: `model.chat_template`, `model.thinking` and `model.date`."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from hft_cli.config.schema import ModelConfig
from hft_cli.data.templates import (
    MARKS,
    TODAY,
    chat_template,
    fix_date,
    own_template,
    read_template,
    template_file,
)
from hft_cli.errors import UserError
from hft_cli.files import read_json

SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn reasoning on and off


def use_template(config: ModelConfig, tokenizer: Any) -> str | None:
    """Give the tokenizer the chat template of `model.chat_template`, `model.thinking` and `model.date`.

    With neither of the first two, a tokenizer keeps several named templates.

    Returns:
        The template to save with the model, which writes the day on which it is used. None if neither the config nor
        the tokenizer has one: rows of raw text need none, and others are refused where they are rendered.

    Raises:
        UserError: if there is no such template, or it has no switch for `model.thinking`.
    """
    if not (config.changes_template or tokenizer.chat_template):
        return None
    template = chat_template(config.chat_template, tokenizer)
    if config.chat_template is not None:
        tokenizer.chat_template = template
    if config.thinking is not None:
        template = _set_thinking(config.thinking, tokenizer)
    if config.date is not None:
        day, own = date.fromisoformat(config.date), tokenizer.chat_template
        named = isinstance(own, dict)
        fixed = {name: fix_date(text, day) for name, text in (own if named else {"": own}).items()}
        tokenizer.chat_template = fixed if named else fixed[""]
    return template


def _set_thinking(thinking: bool, tokenizer: Any) -> str:
    """Make `thinking` the default of the switch of the tokenizer's chat template, and return the template.

    Raises:
        UserError: if the template has no switch.
    """
    template = own_template(tokenizer)
    switch, value = switch_of(template, thinking), str(thinking).lower()
    # `+%}` keeps a newline with which the template begins.
    tokenizer.chat_template = (
        f"{{%- if {switch} is not defined %}}{{%- set {switch} = {value} %}}{{%- endif +%}}{template}"
    )
    return str(tokenizer.chat_template)


def switch_of(template: str, thinking: bool) -> str:
    """The variable by which a chat template turns reasoning on and off.

    Raises:
        UserError: if it has none.
    """
    import jinja2
    from jinja2 import meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        variables = meta.find_undeclared_variables(environment.parse(MARKS.sub("", template)))
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template fails: {error}") from error
    switch = next((name for name in SWITCHES if name in variables), None)
    if switch is None:
        raise UserError(
            f"model.thinking={str(thinking).lower()}: the chat template has no switch for reasoning "
            f"({' or '.join(SWITCHES)}). Leave model.thinking out: reasoning is no part of an answer that is scored."
        )
    return switch


def check_thinking(config: ModelConfig, folder: Path) -> None:
    """Raise UserError if `model.thinking` is set and the template has no switch. Does not load the tokenizer."""
    if config.thinking is None:
        return
    template = stored_template(config, folder)
    if isinstance(template, str):  # of several named ones the worker takes the default
        switch_of(template, config.thinking)


def stored_template(config: ModelConfig, folder: Path) -> Any:
    """The chat template of a model in its files: a text, several named ones as a list, or None."""
    files = [folder / "chat_template.jinja"]
    if config.chat_template is not None:
        files = [template_file(config.chat_template)]
    template = next((read_template(file) for file in files if file.is_file()), None)
    if template is None and (settings := folder / "tokenizer_config.json").is_file():
        template = read_json(settings).get("chat_template")
    return template


def dated(config: ModelConfig, folder: Path, day: str | None = None) -> ModelConfig:
    """The config with `model.date` if the chat template writes the date: its own, else `day`, else today."""
    if config.date is not None or TODAY not in str(stored_template(config, folder)):
        return config
    return replace(config, date=day or date.today().isoformat())
