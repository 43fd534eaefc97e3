"""Worker: one round of training in one process group, by TRL's SFTTrainer on DeepSpeed or in a single process.

Started by the runner through hft_cli.launch.work, in one process or under torchrun with one process a rank. It reads
 the sealed step, trains, writes the round's delta and says how it went; it never composes a config.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.folders import stored_tensors, weights_hash
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import RunConfig
from hft_cli.data.preferences import preferences_hash, read_preferences
from hft_cli.data.rows import content_hash, read_sources
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import Tokenized, tokenize
from hft_cli.errors import UserError
from hft_cli.files import read_json, write_json, write_text
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks, join_ranks
from hft_cli.method.selection import names_hash
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir
from hft_cli.training import dpo, gem, lora, resume
from hft_cli.training.callbacks import SIGNALS, peak_memory, stop_asked, watching
from hft_cli.training.resume import newest_checkpoint
from hft_cli.training.weights import full_value, held, write_delta

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOConfig, SFTConfig


def train(sealed: PhaseJob, folder: RoundDir, progress: Progress) -> None:
    """Train one round and write delta.safetensors and, last, outcome.json; none of them if it was asked to stop.

    Raises:
        UserError: for data with nothing to train on, or a checkpoint made under another draw or data, or by one
            process where DeepSpeed is to go on, or the other way round.
    """
    import torch

    progress.activity("loading transformers and TRL")
    from transformers import AutoTokenizer, set_seed

    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's, or our parent's end
        signal.signal(number, lambda number, _: SIGNALS.append(number))
    config = sealed.config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Before DeepSpeed's settings exist: under ZeRO-3 they would reach for the weightless model that this may build.
    params = {p.name: p for p in parameters_from_folder(sealed.model, config.model.kinds)}
    arguments = _arguments(sealed, folder)
    ranks = Ranks()
    if config.engine.zero_stage is not None:
        progress.activity("joining the ranks")
        ranks = join_ranks()

    progress.activity("tokenizing")
    tokenizer = AutoTokenizer.from_pretrained(sealed.model)
    tokenizer.chat_template = chat_template(config.model.chat_template, tokenizer)
    if ranks.first:
        write_text(folder.template, tokenizer.chat_template)
    dataset, counts = _rows(sealed, folder, tokenizer, ranks)

    set_seed(config.seed)
    progress.activity("loading the model")
    model = load_model(sealed.model, config)
    if config.continual.name == "lora":
        model = lora.adapt(model, sealed.updated, config.continual, sealed.adapter)
    else:
        freeze(model, sealed.updated, sealed.frozen)

    identity = {
        "draw": names_hash(sealed.updated),
        "data": counts["sha256"],
        "ranks": ranks.count,
        "zero_stage": config.engine.zero_stage,
        "zero_optimization": sealed.deepspeed.get("zero_optimization"),
    }
    checkpoint, before = newest_checkpoint(folder.checkpoints, identity, ranks)
    watch = watching(sealed, folder, params, identity, ranks, before, progress)
    if checkpoint is not None and resume.needed(before, identity):
        if ranks.first:
            resume.convert(Path(checkpoint), identity["zero_stage"])
        ranks.barrier()
        watch.converted = Path(checkpoint)
        arguments.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    if sealed.phase.stage == "dpo":
        kind = config.dpo.reference
        other = dpo.reference(kind, model, lambda: load_model(sealed.model, config))
        trainer = dpo.dpo_trainer(model, other, arguments, dataset, tokenizer, [watch])
    else:
        trainer = _sft_trainer(model, arguments, dataset, tokenizer, watch)
    projections, memories = None, _memories(sealed, tokenizer)
    if memories:
        projections = gem.attach(
            trainer,
            memories,
            micro_batch_size=config.train.micro_batch_size,
            margin=config.continual.gem_margin,
        )
        projections.projected = before.get("projected", 0)
        watch.projections = projections
    if ranks.maximum(stop_asked(folder, ranks)):  # while all was being loaded
        ranks.leave()
        return
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if watch.stopped:
        ranks.leave()
        return

    progress.activity("writing the delta")
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if config.continual.name == "lora":
        whole = {name: full_value(value) for name, value in own.items()}  # a collective, as below
        if ranks.first:
            lora.save(model, whole, folder.adapter)
            files = stored_tensors(Path(sealed.model))

            def value(name: str) -> torch.Tensor:
                return lora.merged(model, name, whole, held(params[name], files))

            write_delta(model.get_base_model(), sealed, params, folder.delta, value)
    elif ranks.first:
        write_delta(model, sealed, params, folder.delta, lambda name: full_value(own[name]))
    else:
        for name in sealed.updated:
            full_value(own[name])  # a collective: every rank takes part
    if ranks.first:
        write_json(
            folder.outcome,
            {
                "steps": trainer.state.global_step,
                "loss": watch.mean_loss(result.training_loss, trainer.state.global_step),
                "train_seconds": round(watch.seconds(), 3),
                "tokens_per_second": round(watch.tokens_per_second(), 1),
                "peak_memory_bytes": peak_memory(),
                "engines": watch.engines,
                **watch.last,
                **watch.checkpoint,
                **({"steps_projected": projections.projected} if projections else {}),
                **({"memory_rows": [len(memory) for memory in memories]} if memories else {}),
                **counts,
            },
        )
    ranks.leave()


def load_model(path: str, config: RunConfig) -> PreTrainedModel:
    """The model at `path`, in the precision that its weights are trained in.

    Master weights are always float32: in a single process the model itself, under autocast; under DeepSpeed the
    optimizer's own copy, beside a model in bfloat16.
    """
    import torch
    from transformers import AutoModelForCausalLM

    low = config.model.dtype == "bfloat16" and config.engine.zero_stage is not None
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if low else torch.float32,
        attn_implementation=config.model.attention,
    )
    model.config.use_cache = False
    return model


def freeze(model: PreTrainedModel, updated: Iterable[str], frozen: Iterable[str]) -> None:
    """Set requires_grad by name, before any engine or optimizer exists: flipping it later silently does nothing.

    Raises:
        UserError: if the names are not exactly the model's.
    """
    wanted = dict.fromkeys(updated, True) | dict.fromkeys(frozen, False)
    own = dict(model.named_parameters())
    if wanted.keys() != own.keys():
        odd = sorted(wanted.keys() ^ own.keys())
        raise UserError(
            f"The model's parameters are not those that the draw was made for: {', '.join(odd[:3])}"
            f"{' …' if len(odd) > 3 else ''} ({len(odd)} differ). Its files and its class do not fit each other."
        )
    for name, parameter in own.items():
        parameter.requires_grad_(wanted[name])


def _arguments(sealed: PhaseJob, folder: RoundDir) -> SFTConfig | DPOConfig:
    import torch
    from trl import DPOConfig, SFTConfig

    config, train, engine = sealed.config, sealed.config.train, sealed.config.engine
    gpu = torch.cuda.is_available()
    if sealed.phase.stage == "dpo":
        make, own = DPOConfig, dpo.settings(config.dpo.reference, config.dpo.beta)
    else:
        make, own = SFTConfig, {"packing": train.packing}
        if not train.packing:
            own["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows are tokenized and cut already
    if sealed.phase.replays and not config.continual.replay_shuffle:
        own["train_sampling_strategy"] = "sequential"
    return make(
        **own,
        output_dir=str(folder.checkpoints),
        seed=config.seed,
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.batch_size // (train.micro_batch_size * engine.ranks),
        max_length=train.max_length,
        lr_scheduler_type=train.schedule,
        warmup_steps=0 if train.schedule == "constant" else train.warmup,  # below 1: a share of the steps
        # Where it steps on the CPU after all, one pass over the moments is what makes it bearable.
        optim="adamw_torch_fused" if gpu or engine.offload_optimizer else "adamw_torch",
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not gpu,
        activation_checkpointing=train.gradient_checkpointing,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 0.5,
        save_total_limit=train.save_limit,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must show
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
        report_to=[],
        deepspeed=sealed.deepspeed or None,
        dataloader_pin_memory=gpu,
    )


def _rows(
    sealed: PhaseJob, folder: RoundDir, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> tuple[Dataset, dict[str, Any]]:
    """The rows as the trainer takes them, made once by rank 0 and read by all, with their counts and hash."""
    from datasets import load_from_disk

    counts_file = folder.tokens / "counts.json"
    if ranks.first and not counts_file.exists():
        shutil.rmtree(folder.tokens, ignore_errors=True)
        dataset, counts = (_pairs if sealed.phase.stage == "dpo" else _chats)(sealed, tokenizer)
        dataset.save_to_disk(str(folder.tokens))
        write_json(counts_file, counts)
    ranks.barrier()
    return load_from_disk(str(folder.tokens)), read_json(counts_file)


def _chats(sealed: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any]]:
    data = sealed.config.data
    longest = sealed.config.train.max_length or sys.maxsize  # the runner has filled it in
    chats = read_sources(sealed.phase.sources, data, sealed.config.seed)
    made = tokenize(
        chats,
        tokenizer,
        max_length=longest,
        loss=data.loss,
        long_prompts=data.long_prompts,
        where=sealed.phase.data,
    )
    return made.dataset, _counts(made) | {"rows_prompt_cut": made.cut, "sha256": content_hash(chats)}


def _memories(sealed: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
    """GEM: the kept rows of each past task that fit into train.max_length; none for a round without a past."""
    data = sealed.config.data
    longest = sealed.config.train.max_length or sys.maxsize
    return [
        tokenize(
            read_sources([source], data, sealed.config.seed),
            tokenizer,
            max_length=longest,
            loss=data.loss,
            long_prompts=data.long_prompts,
            where=source.path,
        ).dataset
        for source in sealed.phase.memories
    ]


def _pairs(sealed: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any]]:
    data = sealed.config.data
    longest = sealed.config.train.max_length or sys.maxsize
    read = read_preferences(
        resolve_path(sealed.phase.data),
        split=sealed.phase.sources[0].split,
        max_rows=data.max_rows,
        ties=sealed.config.dpo.ties,
    )
    start = weights_hash(Path(sealed.model))
    made = dpo.prepare(read.rows, tokenizer, max_length=longest, start=start, where=sealed.phase.data)
    left_out = read.left_out | {"prompt fills max_length": made.dropped, "alike when cut": made.alike}
    counts = _counts(made) | {"rows_dropped": sum(left_out.values()), "rows_left_out": left_out}
    return made.dataset, counts | {"sha256": preferences_hash(read.rows)}


def _counts(made: Tokenized | dpo.Prepared) -> dict[str, Any]:
    return {
        "rows": made.rows,
        "rows_dropped": made.dropped,
        "rows_truncated": made.truncated,
        "tokens": made.total_tokens,
        "tokens_trained_on": made.trained_tokens,
    }


def _sft_trainer(model: Any, arguments: SFTConfig, dataset: Dataset, tokenizer: Any, watch: Any) -> Any:
    from trl import SFTTrainer

    return SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[watch])
