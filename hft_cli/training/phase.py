"""The training of one phase, from its job to its delta."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase, set_seed

from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import RunConfig
from hft_cli.data import templates
from hft_cli.data.model_template import use_template
from hft_cli.data.pairs import TokenizedPairs
from hft_cli.data.phase_rows import PhaseRows, phase_rows, require_tokens_below, rows_to_validate
from hft_cli.data.tokenization import Tokenized
from hft_cli.errors import UserError
from hft_cli.files import read_json, sync_tree, write_json, write_text
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks, join_ranks
from hft_cli.method.rounds import Phase, phases, rows_read
from hft_cli.method.selection import names_hash
from hft_cli.run_dir import RoundDir
from hft_cli.training import universal
from hft_cli.training.anchors import require_same_layout
from hft_cli.training.arguments import trainer_arguments
from hft_cli.training.batches import ByLength, row_lengths, rows_of_steps
from hft_cli.training.callbacks import peak_memory, phase_callbacks
from hft_cli.training.compat import (
    leave_frozen_out_of_checkpoints,
    load_universal,
    use_sampler,
    use_zero_optimizer,
)
from hft_cli.training.procedures import Procedure, procedure_of
from hft_cli.training.proof import write_frozen
from hft_cli.training.resume import Identity, newest_checkpoint, stop_requested
from hft_cli.training.session import Session, SessionCallback, SessionState, TrainerParts, diverged
from hft_cli.training.validation import Validation, keeps_best, use_best, validation_outcome
from hft_cli.training.weights import load_model, store_frozen_in_bfloat16


def train_phase(job: PhaseJob, folder: RoundDir, progress: Progress) -> None:
    """Train one phase and write delta.safetensors and then outcome.json; neither of them if a stop is requested.

    Raises:
        UserError: for data with nothing to train on; for a checkpoint made with another draw or other data, or by a
            single process where DeepSpeed is to continue, or the other way round.
    """
    config, procedure = job.config, procedure_of(job)
    # Read before DeepSpeed's settings exist: with ZeRO-3 they would partition the model without weights that this may
    # build. The ranks join before the arguments are made, which would start a process group that waits for half an hour
    # only, and both come before the model is loaded.
    params = {param.name: param for param in parameters_from_folder(job.model, config.model.kinds, config.model.part)}
    ranks = Ranks()
    if config.engine.zero_stage is not None:
        progress.activity("joining the ranks")
        ranks = join_ranks()
        use_zero_optimizer()
    arguments = trainer_arguments(job, folder, procedure)

    progress.activity("tokenizing")
    tokenizer = load_tokenizer(job, folder, ranks)
    dataset, counts = load_rows(job, folder, tokenizer, ranks, procedure)
    progress.activity("loading the model")
    model = model_to_train(job, params, procedure)

    zero_optimization = job.deepspeed.get("zero_optimization")
    identity = Identity(
        names_hash(job.updated), counts["sha256"], ranks.count, config.engine.zero_stage, zero_optimization
    )
    checkpoint = newest_checkpoint(folder.checkpoints, identity, ranks)
    if checkpoint and universal.needs_conversion(checkpoint.marker, identity):
        require_same_layout(job, checkpoint, identity)
        universal.convert(checkpoint.folder, identity, ranks)
        load_universal(arguments)
        checkpoint = replace(checkpoint, converted=True)
    state = SessionState.resumed(checkpoint.marker if checkpoint else {})
    session = Session(job, folder, ranks, params, counts, identity, checkpoint, state)

    validation = make_validation(session, procedure, progress)
    callbacks = phase_callbacks(session, procedure, progress, dataset, validation)
    trainer = make_trainer(TrainerParts(model, arguments, dataset, tokenizer, callbacks), session, procedure)
    if not ranks.maximum(stop_requested(folder, ranks)):
        result = trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        if not math.isfinite(result.training_loss):  # of steps that were not logged, too
            raise diverged("The loss of a step is not finite", config)
        if not state.stopped:
            progress.activity("writing the delta")
            frozen = write_frozen(model, session)
            write_weights(model, session, procedure)
            if ranks.first:
                write_outcome(session, trainer.state.global_step, result.training_loss, procedure, frozen)
    ranks.leave()


def model_to_train(job: PhaseJob, params: Mapping[str, Param], procedure: Procedure) -> Any:
    """The model with `requires_grad` set, as it is held in memory while it is trained."""
    config = job.config
    set_seed(config.seed)
    model = procedure.prepare_model(load_model(job.model, config), job)
    if config.model.dtype == "bfloat16" and config.engine.zero_stage is None:
        store_frozen_in_bfloat16(model, params, job.model)
    return model


def make_trainer(parts: TrainerParts, session: Session, procedure: Procedure) -> Any:
    """The trainer of the phase, known to its callbacks."""
    config, trainer = session.job.config, procedure.build_trainer(parts, session)
    leave_frozen_out_of_checkpoints(trainer)
    if config.train.group_by_length:
        use_sampler(trainer, ByLength(row_lengths(parts.dataset), config.train.batch_size, config.seed))
    for callback in parts.callbacks:
        if isinstance(callback, SessionCallback):
            callback.trainer = trainer
    return trainer


def load_tokenizer(job: PhaseJob, folder: RoundDir, ranks: Ranks) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the run's chat template, which is also written into the phase's folder."""
    tokenizer = templates.load_tokenizer(job.model)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"The tokenizer in {job.model} has neither a pad nor an end-of-sequence token, so rows cannot be filled up "
            "to one length. Set eos_token or pad_token in its tokenizer_config.json."
        )
    template = use_template(job.config.model, tokenizer)
    if ranks.first and template is not None:
        write_text(folder.template, template)
    return tokenizer


def load_rows(
    job: PhaseJob, folder: RoundDir, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, procedure: Procedure
) -> tuple[Dataset, dict[str, Any]]:
    """The phase's rows and their counts, made once by the first rank and read from files by all."""
    counts_file = folder.tokens / "counts.json"
    if ranks.first and not counts_file.exists():
        shutil.rmtree(folder.tokens, ignore_errors=True)
        if job.phase.number == 1:
            for phase in phases(job.config)[1:]:  # a row that a later round refuses is refused now, not hours later
                if not phase.trains or phase.set_part > 1:
                    continue
                later = phase_rows(phase.stage, phase.sources, job.config, tokenizer, phase.validation)
                _require_known_tokens(job, tokenizer, later, validated_rows(phase, later, job.config, tokenizer))
        rows, counts = procedure.rows(job, tokenizer)
        validated = validated_rows(job.phase, rows, job.config, tokenizer)
        _require_known_tokens(job, tokenizer, rows, validated)
        summaries = {"validation": validated.summary.to_json()} if validated else {}
        write_json(folder.data, rows.summary.to_json() | summaries)
        if set(rows.summary.shapes) != {"text"} and (end := templates.answer_end(tokenizer)):
            write_json(folder.answer_end, {"token": end[0], "id": end[1]})
        _rows_in_order(job, rows.dataset).save_to_disk(str(folder.tokens))
        if validated:
            validated.dataset.save_to_disk(str(folder.validation_tokens))
        sync_tree(folder.tokens)
        write_json(counts_file, counts)
    ranks.barrier()
    return load_from_disk(str(folder.tokens)), read_json(counts_file)


def _rows_in_order(job: PhaseJob, dataset: Dataset) -> Dataset:
    """The rows of the phase's part of the training on its set, in their order; all of them if there is one part.

    Raises:
        UserError: if the part has no step.
    """
    phase, train = job.phase, job.config.train
    if phase.set_parts == 1:
        return dataset
    length, steps = rows_read(train, len(dataset)), phase.steps_of_set(train, len(dataset))
    if not steps:
        count = math.ceil(length / train.batch_size)
        raise UserError(
            f"data.rounds_per_set={phase.set_parts} is more than the {count} optimizer steps of {phase.name}. Set "
            f"data.rounds_per_set={count} or less."
        )
    return dataset.select(rows_of_steps(len(dataset), length, train.batch_size, job.config.seed, steps))


def _require_known_tokens(
    job: PhaseJob, tokenizer: PreTrainedTokenizerBase, *rows: PhaseRows | Tokenized | TokenizedPairs | None
) -> None:
    """Raise UserError if the model's embedding has no row for a token."""
    config = read_model_config(Path(job.model) / "config.json", job.config.model.part)
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    for part in rows:
        if part is not None and vocabulary is not None:
            require_tokens_below(part.dataset, vocabulary, tokenizer, job.model)


def validated_rows(
    phase: Phase, rows: PhaseRows, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> Tokenized | TokenizedPairs | None:
    """The tokens of the rows whose loss is measured while a phase trains on `rows`; None if there are none."""
    if phase.validation is None:
        return None
    return rows_to_validate(phase.stage, rows.held_out, config, tokenizer, phase.validation)


def make_validation(session: Session, procedure: Procedure, progress: Progress) -> Validation | None:
    """The callback that measures the loss of the phase's validation rows; None if it has none."""
    if session.job.phase.validation is None:
        return None
    rows = load_from_disk(str(session.folder.validation_tokens))
    return Validation(session, procedure.objective, rows, procedure.write_delta, progress)


def write_weights(model: Any, session: Session, procedure: Procedure) -> None:
    """Write the delta of the last step, or of the step with the lowest validation loss. Collective over the ranks."""
    if session.state.validations and keeps_best(session.job.config):
        if session.ranks.first:
            use_best(session)
    else:
        procedure.write_delta(model, session)


def write_outcome(session: Session, steps: int, session_loss: float, procedure: Procedure, frozen: str) -> None:
    """Write outcome.json after `steps` optimizer steps of the phase.

    `session_loss` is the mean of this session's steps, and `frozen` the hash of frozen.json.
    """
    state = session.state
    outcome = {
        "steps": steps,
        "loss": state.mean_loss(session_loss, steps),
        "train_seconds": round(state.seconds(), 3),
        "tokens_per_second": round(state.tokens_per_second(), 1),
        "peak_memory_bytes": peak_memory(),
        "engines": state.engines,
        "frozen_sha256": frozen,
        **state.metrics,
        **state.checkpoint,
        **procedure.outcome(state),
        **validation_outcome(session, steps),
        **session.counts,
    }
    write_json(session.folder.outcome, outcome)
