"""SFT, supervised fine-tuning on chats, by TRL's SFTTrainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trl

from hft_cli.config.schema import RunConfig
from hft_cli.data.chats import Chat
from hft_cli.data.rows import Source, read_sources
from hft_cli.data.store import Rows
from hft_cli.data.summary import Summary
from hft_cli.data.tokenization import Tokenized, tokenize
from hft_cli.launch.jobs import PhaseJob
from hft_cli.training.session import Session, TrainerParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_rows(job: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, Any], Summary]:
    """The data set of an SFT phase, its counts and hash for the outcome, and its summary.

    Raises:
        UserError: for a bad row, or if no row is left.
    """
    data, chats = tokenized(job, job.phase.sources, tokenizer)
    summary = data.summary
    return (
        data.dataset,
        {
            "rows": summary.used,
            "rows_dropped": sum(summary.dropped.values()),
            "rows_truncated": summary.truncated,
            "tokens": summary.tokens,
            "tokens_trained_on": summary.trained_tokens,
            "rows_prompt_cut": summary.cut,
            "sha256": chats.sha256(),
        },
        summary,
    )


def tokenized(
    job: PhaseJob, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokenized, Rows[Chat]]:
    """The rows of `sources` as tokens, by the settings of the run, and as chats."""
    data = job.config.data
    chats = read_sources(sources, data, job.config.seed)
    tokens = tokenize(
        chats,
        tokenizer,
        max_length=job.config.train.max_length or sys.maxsize,
        loss=data.loss,
        long_prompts=data.long_prompts,
        where=", ".join(source.path for source in sources),
        bad_rows=data.bad_rows,
    )
    return tokens, chats


def settings(config: RunConfig) -> tuple[type, dict[str, Any]]:
    """The class of the trainer's arguments, and what SFT sets in them."""
    packing = config.train.packing
    # Rows that are not packed are tokenized and cut already.
    return trl.SFTConfig, {"packing": packing, "dataset_kwargs": None if packing else {"skip_prepare_dataset": True}}


def build_trainer(parts: TrainerParts, session: Session) -> Any:
    """TRL's SFTTrainer for a phase."""
    return trl.SFTTrainer(
        model=parts.model,
        args=parts.arguments,
        train_dataset=parts.dataset,
        processing_class=parts.tokenizer,
        callbacks=list(parts.callbacks),
    )
