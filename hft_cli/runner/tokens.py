"""The rows of a run as they will be trained on. Nothing but the tokenizer is loaded, and nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import config_from_hub
from hft_cli.config.schema import RunConfig
from hft_cli.config.validate import check
from hft_cli.data.pairs import PairRow, prepare_pairs, tokenize_pairs
from hft_cli.data.preferences import read_pairs
from hft_cli.data.rendering import Renderer
from hft_cli.data.rows import read_sources
from hft_cli.data.shown import ShownRow, show_chat, show_pair
from hft_cli.data.store import Rows
from hft_cli.data.summary import Summary
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import TokenOptions, TokenRow, tokenize, tokenize_chats
from hft_cli.errors import UserError, first_line
from hft_cli.files import read_json
from hft_cli.method.rounds import Phase, phase_config, phases, with_model_limits
from hft_cli.paths import resolve_path

BATCH = 500  # rows that are tokenized at a time, to be shown


@dataclass(frozen=True)
class ShownPhase:
    """The rows of a phase as they will be trained on."""

    phase: Phase
    summary: Summary
    rows: Rows[Any]
    renderer: Renderer
    options: TokenOptions

    def shown(self, count: int | None) -> Iterator[ShownRow]:
        """The first rows, or all (None)."""
        rows = self.rows if count is None else self.rows.select(range(min(count, len(self.rows))))
        tokenizer, longest = self.renderer.tokenizer, self.options.max_length
        for start in range(0, len(rows), BATCH):
            part = rows.select(range(start, min(start + BATCH, len(rows))))
            places, items = list(part.places()), list(part)
            for offset, row in enumerate(self._tokens(items, places), start + 1):
                place = places[offset - start - 1]
                if isinstance(row, str):
                    yield ShownRow(offset, place, {}, f"bad: {row}")
                elif isinstance(row, PairRow):
                    yield show_pair(row, offset, place, tokenizer)
                else:
                    yield show_chat(row, offset, place, longest, tokenizer)

    def _tokens(self, items: Sequence[Any], places: Sequence[str]) -> Sequence[PairRow | TokenRow | str]:
        """The rows as tokens; of a bad row that is left out, the reason."""
        try:
            if self.phase.stage == "dpo":
                return tokenize_pairs(items, places, self.renderer, self.options.max_length)
            return tokenize_chats(items, places, self.renderer, self.options)
        except UserError as error:
            if len(items) == 1:
                return [str(error).removeprefix(places[0]).removeprefix(": ").removeprefix(", ")]
        return [row for item, place in zip(items, places, strict=True) for row in self._tokens([item], [place])]


def shown_phases(config: RunConfig) -> list[ShownPhase]:
    """The phases of a run with their rows as tokens.

    Raises:
        UserError: for a mistake in the config, the data or the chat template.
    """
    check(config)
    if config.method.name == "half_reset":
        raise UserError("method=half_reset trains on no rows, so there are no tokens to show.")
    path = resolve_path(config.model.path)
    folder = Path(path)
    model = read_json(folder / "config.json" if folder.is_dir() else config_from_hub(path))
    config = with_model_limits(config, model, config.model.name)
    tokenizer = load_tokenizer(path)
    template = chat_template(config.model.chat_template, tokenizer)
    if config.model.chat_template is not None:
        tokenizer.chat_template = template
    return [_shown_phase(phase, phase_config(config, phase), tokenizer) for phase in phases(config)]


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model's folder or hub repository; UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path} has no tokenizer that can be read: {first_line(error)}") from error


def _shown_phase(phase: Phase, config: RunConfig, tokenizer: Any) -> ShownPhase:
    options = TokenOptions(config.train.max_length or sys.maxsize, config.data.loss, config.data.long_prompts)
    rows: Rows[Any]
    if phase.stage == "dpo":
        rows = read_pairs(phase.sources[0], config.data, config.dpo.ties).rows
        summary = prepare_pairs(rows, tokenizer, options.max_length, phase.data, config.data.bad_rows).summary
    else:
        rows = read_sources(phase.sources, config.data, config.seed)
        settings: dict[str, Any] = vars(options)
        summary = tokenize(rows, tokenizer, **settings, where=phase.data, bad_rows=config.data.bad_rows).summary
    return ShownPhase(phase, summary, rows, Renderer(tokenizer), options)


def page(shown: Sequence[tuple[ShownPhase, Sequence[ShownRow]]], title: str) -> str:
    """One HTML page with the rows of each phase and their summary."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("tokens.html.jinja").render(title=title, phases=shown)
