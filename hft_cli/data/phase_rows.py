"""The rows of a phase, read and tokenized by the settings of its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.data.mixing import read_mixed, validation_rows
from hft_cli.data.pairs import TokenizedPairs, prepare_pairs, tokenize_pairs
from hft_cli.data.rendering import Renderer
from hft_cli.data.sources import Source, ValidationSet
from hft_cli.data.store import Rows
from hft_cli.data.summary import Summary
from hft_cli.data.tokenization import Tokenized, TokenOptions, tokenize, tokenize_chats
from hft_cli.errors import UserError


@dataclass(frozen=True)
class PhaseRows:
    """Rows of a phase, in the form of its stage.

    Attributes:
        rows: chats, or preference pairs for DPO.
        dataset: their tokens, for TRL's trainer.
        summary: of the rows.
        held_out: rows that are split off for validation.
    """

    rows: Rows[Any]
    dataset: Any
    summary: Summary
    held_out: Rows[Any]

    def counts(self) -> dict[str, Any]:
        """Counts for a phase's outcome, and `sha256` of the rows, by which a checkpoint knows its data."""
        return {
            "rows": self.summary.used,
            "rows_dropped": sum(self.summary.dropped.values()),
            "rows_truncated": self.summary.truncated,
            "tokens": self.summary.tokens,
            "tokens_trained_on": self.summary.trained_tokens,
            "sha256": self.rows.sha256(),
        }


def phase_rows(
    stage: str, sources: Sequence[Source], config: RunConfig, tokenizer: Any, validation: ValidationSet | None = None
) -> PhaseRows:
    """The rows of `sources` for a stage, "sft" or "dpo", without those that are split off for validation.

    Raises:
        UserError: for a bad row or a template that does not allow this, or if no row is left.
    """
    mixed = read_mixed(stage, sources, config, validation)
    made = _prepared(stage, mixed.rows, config, tokenizer, ", ".join(source.path for source in sources))
    return PhaseRows(mixed.rows, made.dataset, replace(made.summary, parts=mixed.parts), mixed.held_out)


def rows_to_validate(
    stage: str, held_out: Rows[Any], config: RunConfig, tokenizer: Any, validation: ValidationSet
) -> Tokenized | TokenizedPairs:
    """The tokens of the rows whose loss is measured in training; see `validation_rows`.

    Raises:
        UserError: as for `phase_rows`.
    """
    where = "the rows split off by data.validation" if isinstance(validation, float) else validation.path
    return _prepared(stage, validation_rows(stage, held_out, config, validation), config, tokenizer, where)


def require_tokens_below(dataset: Any, vocabulary: int, tokenizer: Any, model: str) -> None:
    """Check the tokens of a phase's rows against the number of rows of the model's embedding.

    Raises:
        UserError: if a token has none, as with the tokenizer of another model.
    """
    import pyarrow.compute as pc

    for name in (name for name in dataset.column_names if name.endswith("_ids")):
        for batch in dataset.select_columns(name).with_format("arrow").iter(10_000):
            largest = pc.max(pc.list_flatten(batch[name])).as_py()
            if largest is not None and largest >= vocabulary:
                raise UserError(
                    f"The rows have the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but {model} "
                    f"has {vocabulary} tokens (vocab_size of its config.json). Put the model's own tokenizer there."
                )


def _prepared(stage: str, rows: Rows[Any], config: RunConfig, tokenizer: Any, where: str) -> Tokenized | TokenizedPairs:
    options, bad_rows = TokenOptions.of(config), config.data.bad_rows
    if stage == "dpo":
        return prepare_pairs(rows, tokenizer, options.max_length, where, bad_rows, options.special_tokens)
    return tokenize(rows, tokenizer, where=where, bad_rows=bad_rows, **vars(options))


def tokenizing(stage: str, config: RunConfig, tokenizer: Any) -> Callable[[Sequence[Any], Sequence[str]], list[Any]]:
    """The function by which `phase_rows` tokenizes a batch: (rows, places) -> a TokenRow or PairRow for each."""
    options = TokenOptions.of(config)
    renderer = Renderer(tokenizer, options.special_tokens)
    if stage == "dpo":
        return partial(tokenize_pairs, renderer=renderer, max_length=options.max_length)
    return partial(tokenize_chats, renderer=renderer, options=options)
