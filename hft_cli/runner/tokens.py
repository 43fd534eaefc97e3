"""The rows of a run as they will be trained on. Nothing but the tokenizer is loaded, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import config_from_hub, model_folder
from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.config.schema import RunConfig
from hft_cli.config.validate import check
from hft_cli.data.bad_rows import BadRow, reason_of, try_rows
from hft_cli.data.encoding import BATCH
from hft_cli.data.model_template import use_template
from hft_cli.data.pairs import PairRow
from hft_cli.data.phase_rows import phase_rows, tokenizing
from hft_cli.data.shown import ShownRow, show_chat, show_pair
from hft_cli.data.sources import Part
from hft_cli.data.store import Rows
from hft_cli.data.summary import Summary
from hft_cli.data.templates import load_tokenizer
from hft_cli.data.tokenization import TokenOptions, TokenRow
from hft_cli.errors import UserError
from hft_cli.method.rounds import Phase, phase_config, phases, with_model_limits
from hft_cli.paths import resolve_path


@dataclass(frozen=True)
class ShownPhase:
    """The rows of a phase as they will be trained on; `config` is that of the phase."""

    phase: Phase
    config: RunConfig
    tokenizer: Any
    rows: Rows[Any]
    summary: Summary

    def shown(self, count: int | None) -> Iterator[ShownRow]:
        """The first rows of each set, `count` in all, or all rows (None)."""
        indices = range(len(self.rows)) if count is None else first_of_each(self.summary.parts, count)
        rows = self.rows.select(indices)
        function = tokenizing(self.phase.stage, self.config, self.tokenizer)
        places = rows.places()
        for start in range(0, len(rows), BATCH):
            items = rows[start : start + BATCH]
            some = list(islice(places, len(items)))
            for row, index, place in zip(try_rows(function, items, some), indices[start:], some, strict=False):
                yield self._shown(row, index + 1, place)

    def _shown(self, row: TokenRow | PairRow | BadRow, number: int, place: str) -> ShownRow:
        if isinstance(row, BadRow):
            return ShownRow(number, place, {}, f"bad: {reason_of(place, row.error)}")
        if isinstance(row, PairRow):
            return show_pair(row, number, place, self.tokenizer)
        return show_chat(row, number, place, TokenOptions.of(self.config).max_length, self.tokenizer)


def first_of_each(parts: Sequence[Part], count: int) -> list[int]:
    """The indices of `count` rows, or of all if there are fewer: as many as possible of each set, from its start."""
    starts = accumulate((part.taken for part in parts), initial=0)
    order = ((number, start) for start, part in zip(starts, parts, strict=False) for number in range(part.taken))
    return sorted(number + start for number, start in nsmallest(count, order))


def shown_phases(config: RunConfig) -> list[ShownPhase]:
    """The phases of a run with their rows as tokens.

    Raises:
        UserError: for a mistake in the config, the data or the chat template.
    """
    check(config)
    if not config.method.trains:
        raise UserError(f"method={config.method.name} trains on no rows, so there are no tokens to show.")
    path, revision = resolve_path(config.model.path), config.model.revision
    if Path(path).is_dir():
        path = str(model_folder(path, revision=revision))
    file = Path(path, "config.json") if Path(path).is_dir() else config_from_hub(path, revision)
    model = read_model_config(file, config.model.part)
    config = with_model_limits(config, model, config.model.name)
    tokenizer = load_tokenizer(path, revision)
    use_template(config.model, tokenizer)
    return [_shown_phase(phase, phase_config(config, phase), tokenizer) for phase in phases(config) if phase.trains]


def _shown_phase(phase: Phase, config: RunConfig, tokenizer: Any) -> ShownPhase:
    rows = phase_rows(phase.stage, phase.sources, config, tokenizer, phase.validation)
    return ShownPhase(phase, config, tokenizer, rows.rows, rows.summary)


def page(shown: Sequence[tuple[ShownPhase, Sequence[ShownRow]]], title: str) -> str:
    """One HTML page with the rows of each phase and their summary."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("tokens.html.jinja").render(title=title, phases=shown)
