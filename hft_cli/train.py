"""Worker: one round of training in one process group, by TRL's SFTTrainer on DeepSpeed or in a single process.

Started by the runner, as `python -m hft_cli.train STEP.json` or under torchrun with one process a rank. It reads the
sealed step, trains, writes the round's delta and says how it went; it never composes a config.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli import dpo, gem, lora, universal
from hft_cli.continual import read_sources
from hft_cli.data import Tokenized, chat_template, content_hash, tokenize
from hft_cli.layout import Param, from_folder, to_stored
from hft_cli.preferences import preferences_hash, read_preferences
from hft_cli.run_dir import RoundDir, SealedStep, read_json, write_json, write_text
from hft_cli.schema import RunConfig, UserError, locate
from hft_cli.selection import names_hash
from hft_cli.weights import Place, Writer, tensors, weights_hash

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOConfig, SFTConfig

_SIGNALS: list[int] = []  # that came and asked us to stop
MARKER = "hft.json"  # written last into a checkpoint: without it the checkpoint is not whole


def main(argv: list[str]) -> int:
    """Train the round whose step file is argv[0]; a user's mistake goes into the round's mistake.txt."""
    path = Path(argv[0])
    try:
        train(SealedStep.read(path), RoundDir(path.parent))
    except UserError as error:
        write_text(RoundDir(path.parent).mistake, str(error))
        return 2
    return 0


def train(sealed: SealedStep, folder: RoundDir) -> None:
    """Train one round and write delta.safetensors and, last, outcome.json; none of them if it was asked to stop.

    Raises:
        UserError: for data with nothing to train on, or a checkpoint made under another draw or data, or by one
            process where DeepSpeed is to go on, or the other way round.
    """
    import torch
    from transformers import AutoTokenizer, set_seed

    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's, or our parent's end
        signal.signal(number, lambda number, _: _SIGNALS.append(number))
    config = sealed.config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Before DeepSpeed's settings exist: under ZeRO-3 they would reach for the weightless model that this may build.
    params = {p.name: p for p in from_folder(sealed.model, config.model.kinds)}
    arguments = _arguments(sealed, folder)
    if config.engine.zero_stage is not None:
        join_ranks()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    tokenizer = AutoTokenizer.from_pretrained(sealed.model)
    tokenizer.chat_template = chat_template(config.model.chat_template, tokenizer)
    if rank == 0:
        write_text(folder.template, tokenizer.chat_template)
    dataset, counts = _rows(sealed, folder, tokenizer, rank, world)

    set_seed(config.seed)
    model = load_model(sealed.model, config)
    if config.continual.name == "lora":
        model = lora.adapt(model, sealed.updated, config.continual, sealed.adapter)
    else:
        freeze(model, sealed.updated, sealed.frozen)

    identity = {
        "draw": names_hash(sealed.updated),
        "data": counts["sha256"],
        "ranks": world,
        "zero_stage": config.engine.zero_stage,
        "zero_optimization": sealed.deepspeed.get("zero_optimization"),
    }
    checkpoint, before = _checkpoint(folder.checkpoints, identity, rank, world)
    watch = _watch(sealed, folder, params, identity, rank, world, before)
    if checkpoint is not None and universal.needed(before, identity):
        if rank == 0:
            universal.convert(Path(checkpoint), identity["zero_stage"])
        _barrier(world)
        watch.converted = Path(checkpoint)
        arguments.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    if sealed.step.stage == "dpo":
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
    if _most(_asked(folder, rank), world):  # while all was being loaded
        _leave(world)
        return
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if watch.stopped:
        _leave(world)
        return

    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if config.continual.name == "lora":
        whole = {name: full_value(value) for name, value in own.items()}  # a collective, as below
        if rank == 0:
            lora.save(model, whole, folder.adapter)
            files = tensors(Path(sealed.model))

            def value(name: str) -> torch.Tensor:
                return lora.merged(model, name, whole, held(params[name], files))

            _write_delta(model.get_base_model(), sealed, params, folder.delta, value)
    elif rank == 0:
        _write_delta(model, sealed, params, folder.delta, lambda name: full_value(own[name]))
    else:
        for name in sealed.updated:
            full_value(own[name])  # a collective: every rank takes part
    if rank == 0:
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
    _leave(world)


def join_ranks() -> None:
    """Start DeepSpeed's process group; before the model is loaded, or ZeRO-3 on the CPU sees a world of one."""
    import deepspeed
    import torch

    # DeepSpeed would compile an operator that only inference uses: a minute, a compiler, a lock that a kill leaves
    # behind, and a link line that a path with a space breaks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The ranks wait while the first one tokenizes, which takes minutes for a large set.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(hours=2))


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


def _arguments(sealed: SealedStep, folder: RoundDir) -> SFTConfig | DPOConfig:
    import torch
    from trl import DPOConfig, SFTConfig

    config, train, engine = sealed.config, sealed.config.train, sealed.config.engine
    gpu = torch.cuda.is_available()
    if sealed.step.stage == "dpo":
        make, own = DPOConfig, dpo.settings(config.dpo.reference, config.dpo.beta)
    else:
        make, own = SFTConfig, {"packing": train.packing}
        if not train.packing:
            own["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows are tokenized and cut already
    if sealed.step.replays and not config.continual.replay_shuffle:
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
    sealed: SealedStep, folder: RoundDir, tokenizer: PreTrainedTokenizerBase, rank: int, world: int
) -> tuple[Dataset, dict[str, Any]]:
    """The rows as the trainer takes them, made once by rank 0 and read by all, with their counts and hash."""
    from datasets import load_from_disk

    counts_file = folder.tokens / "counts.json"
    if rank == 0 and not counts_file.exists():
        shutil.rmtree(folder.tokens, ignore_errors=True)
        dataset, counts = (_pairs if sealed.step.stage == "dpo" else _chats)(sealed, tokenizer)
        dataset.save_to_disk(str(folder.tokens))
        write_json(counts_file, counts)
    _barrier(world)
    return load_from_disk(str(folder.tokens)), read_json(counts_file)


def _chats(sealed: SealedStep, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any]]:
    data = sealed.config.data
    longest = sealed.config.train.max_length or sys.maxsize  # the runner has filled it in
    chats = read_sources(sealed.step.sources, data, sealed.config.seed)
    made = tokenize(
        chats,
        tokenizer,
        max_length=longest,
        loss=data.loss,
        long_prompts=data.long_prompts,
        where=sealed.step.data,
    )
    return made.dataset, _counts(made) | {"rows_prompt_cut": made.cut, "sha256": content_hash(chats)}


def _memories(sealed: SealedStep, tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
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
        for source in sealed.step.memories
    ]


def _pairs(sealed: SealedStep, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any]]:
    data = sealed.config.data
    longest = sealed.config.train.max_length or sys.maxsize
    read = read_preferences(
        locate(sealed.step.data),
        split=sealed.step.sources[0].split,
        max_rows=data.max_rows,
        ties=sealed.config.dpo.ties,
    )
    start = weights_hash(Path(sealed.model))
    made = dpo.prepare(read.rows, tokenizer, max_length=longest, start=start, where=sealed.step.data)
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


def _checkpoint(folder: Path, identity: Mapping[str, Any], rank: int, world: int) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint and its marker; what a kill left half written is removed.

    Raises:
        UserError: if it was made under another draw or data.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    whole = [path for path in found if (path / MARKER).exists()]
    if rank == 0:
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    _barrier(world)
    if not whole:
        return None, {}
    marker = read_json(whole[0] / MARKER)
    for key in identity.keys() - universal.LAYOUT:
        if marker[key] != identity[key]:
            raise UserError(
                f"{whole[0]} was made under another {key} ({marker[key]}, now {identity[key]}); resuming it "
                "would go wrong silently. Use the same configuration and data, or another output_dir."
            )
    return str(whole[0]), marker


def _watch(
    sealed: SealedStep,
    folder: RoundDir,
    params: Mapping[str, Param],
    identity: Mapping[str, Any],
    rank: int,
    world: int,
    before: Mapping[str, Any],
) -> Any:
    """The callback that logs, reports progress, marks checkpoints and watches that frozen weights stay as they are.

    `before` is the marker of the checkpoint that is resumed from, or empty.
    """
    import torch
    from transformers import TrainerCallback

    metrics, minutes = Path(sealed.metrics), sealed.config.train.save_minutes

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.start = self.end = 0.0
            self.first = 0  # the step that this session went on from
            self.tokens = self.tokens_at_start = 0
            self.loss: float | None = None
            self.last: dict[str, float] = {}  # what DPO logged last
            self.checksums: list[int] = []
            self.engines: list[dict[str, Any]] = list(before.get("engines", []))  # that the round was trained on
            self.projections: gem.Steps | None = None
            self.converted: Path | None = None  # the checkpoint that is resumed from, if it was laid out otherwise
            self.stopped = False
            self.saved = self.step_end = 0.0  # when
            self.checkpoint: dict[str, float] = {}  # what the last one cost
            self.losses, self.logged = list(before.get("losses", (0.0, 0))), 0  # their sum and number, up to a log

        def seconds(self) -> float:
            """Training time in all, over resumed sessions."""
            return float(before.get("seconds", 0.0)) + (self.end or time.perf_counter()) - self.start

        def mean_loss(self, own: float, last: int) -> float:
            """Over the round's steps, from this session's mean and what the checkpoint had up to its last log."""
            total, steps = map(float, before.get("losses", (0.0, 0)))
            return round((total + own * (last - self.first)) / max(steps + last - self.first, 1), 6)

        def tokens_per_second(self) -> float:
            """Of this session."""
            return (self.tokens - self.tokens_at_start) / max((self.end or time.perf_counter()) - self.start, 1e-9)

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            model = parts["model"]
            if state.global_step == 0 and sealed.config.engine.zero_stage and sealed.config.model.dtype == "bfloat16":
                plain = getattr(model, "module", model)
                if sealed.adapter is not None:
                    lora.restore_masters(plain, sealed.adapter)
                elif sealed.config.continual.name != "lora":
                    restore_masters(plain, params, Path(sealed.model))
            self.checksums = _gather(frozen_checksum(model), world)
            if self.converted is not None:
                plain = getattr(model, "module", model)
                universal.mend_and_prove(plain, parts["optimizer"], self.converted, state.global_step, rank)
                universal.prove_frozen(plain, params, Path(sealed.model))
            elif self.checksums != before.get("frozen", self.checksums):
                raise RuntimeError(
                    "The frozen weights that the checkpoint restored are not those of the model's files."
                )
            self.tokens = self.tokens_at_start = state.num_input_tokens_seen
            now = {"name": sealed.config.engine.name, "zero_stage": identity["zero_stage"], "ranks": world}
            now |= {"micro_batch_size": args.per_device_train_batch_size}
            now |= {"deepspeed": sealed.config.engine.deepspeed} if sealed.config.engine.deepspeed else {}
            if not self.engines or self.engines[-1] | {"from_step": 0} != now | {"from_step": 0}:
                self.engines.append({"from_step": state.global_step, **now})
            if rank == 0:
                _forget_after(metrics, sealed.step.name, state.global_step)
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            self.logged = self.first = state.global_step
            self.start = self.saved = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.tokens = state.num_input_tokens_seen
            if rank == 0:
                progress = {"step": state.global_step, "of": state.max_steps, "loss": self.loss}
                folder.progress.write_text(json.dumps(progress | {"tokens_per_second": self.tokens_per_second()}))
            self.step_end = time.perf_counter()
            if state.global_step == state.max_steps:  # the round's end is better than a checkpoint
                return
            wanted = _asked(folder, rank) * STOP
            if rank == 0 and minutes is not None and self.step_end - self.saved >= 60 * minutes:
                wanted = max(wanted, SAVE)
            wanted = _most(wanted, world)
            control.should_save = control.should_save or wanted >= SAVE
            control.should_log = control.should_log or control.should_save  # or a resumed round would lack these losses
            self.stopped = wanted == STOP
            control.should_training_stop = control.should_training_stop or self.stopped

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs and not math.isfinite(logs["loss"]):
                raise UserError(
                    f"The loss is {logs['loss']} at step {state.global_step}: training has diverged. "
                    f"Lower train.learning_rate={sealed.config.train.learning_rate:g}, or raise train.warmup."
                )
            if "loss" in logs:
                steps = state.global_step - self.logged
                self.losses = [self.losses[0] + logs["loss"] * steps, self.losses[1] + steps]
                self.logged = state.global_step
            if rank == 0 and "loss" in logs:
                self.loss = logs["loss"]
                self.last = {key: logs[key] for key in dpo.METRICS if key in logs}
                line = {
                    "round": sealed.step.round,
                    "name": sealed.step.name,
                    "step": state.global_step,
                    "tokens_per_second": self.tokens_per_second(),
                }
                keys = ("loss", "learning_rate", "grad_norm", "epoch", *dpo.METRICS)
                line |= {key: logs[key] for key in keys if key in logs}
                with metrics.open("a") as file:
                    file.write(json.dumps(line) + "\n")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _barrier(world)  # every rank has written its part
            if rank == 0:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                marker = {**identity, "seconds": self.seconds(), "frozen": self.checksums, "losses": self.losses}
                marker["engines"] = self.engines
                marker |= {"projected": self.projections.projected} if self.projections else {}
                write_json(place / MARKER, marker)
                held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
                took = time.perf_counter() - self.step_end
                self.checkpoint = {"checkpoint_seconds": round(took, 3), "checkpoint_bytes": held}
            self.saved = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.end = time.perf_counter()
            if _gather(frozen_checksum(model), world) != self.checksums:
                raise RuntimeError("A frozen weight changed in memory during training: this is a fault of the engine.")

    return Watch()


def frozen_checksum(model: Any) -> int:
    """One number over the bits of all frozen weights that this rank holds (under ZeRO-3: its shards)."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in getattr(model, "module", model).named_parameters():
        if not parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", parameter).detach()
            digest.update(name.encode())
            digest.update(held.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:6], "big")


def _sft_trainer(model: Any, arguments: SFTConfig, dataset: Dataset, tokenizer: Any, watch: Any) -> Any:
    from trl import SFTTrainer

    return SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[watch])


def _write_delta(
    model: Any, sealed: SealedStep, params: Mapping[str, Param], path: Path, value: Callable[[str], torch.Tensor]
) -> None:
    """Stream what was trained into the delta, a parameter at a time, under the names and dtypes of the files."""
    base = tensors(Path(sealed.model))
    announced = {stored: base[stored][1] for name in sealed.updated for stored in params[name].stored}
    metadata = {"format": "pt", "round": str(sealed.step.round), "base_sha256": sealed.base_sha256}
    with Writer(path, announced, metadata) as writer:
        for name in sealed.updated:
            parts = to_stored(model, {name: value(name)}, [params[name]])
            for stored in params[name].stored:
                writer.add(stored, [_bytes(parts[stored], announced[stored].dtype)])


def restore_masters(model: Any, params: Mapping[str, Param], folder: Path) -> None:
    """Give DeepSpeed's float32 master weights the values in the files, which it has rounded to bfloat16.

    Raises:
        UserError: for a parameter that the files hold in parts (experts) and in more than bfloat16.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    files = tensors(folder)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and files[params[name].stored[0]][1].dtype != "BF16":
            safe_set_full_fp32_param(parameter, held(params[name], files).to(parameter.device))


def held(param: Param, files: Mapping[str, Place]) -> torch.Tensor:
    """The float32 value that the files hold of a parameter.

    Raises:
        UserError: if they hold it in parts (experts).
    """
    from safetensors import safe_open

    file, info = files[param.stored[0]]
    if info.shape != param.shape:
        raise UserError(
            f"{param.name} lies in the files in parts and as {info.dtype}, which bfloat16 under DeepSpeed would round. "
            "Convert the model to bfloat16 first, or set model.dtype=float32."
        )
    with safe_open(file, "pt") as opened:
        value: torch.Tensor = opened.get_tensor(param.stored[0])
    return value.float()


def full_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole float32 master value of a parameter, wherever ZeRO keeps it. Collective over the ranks."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        value: torch.Tensor = safe_get_full_fp32_param(parameter)
        return value.detach().cpu()
    return parameter.detach().cpu()


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    cast = tensor.to(getattr(torch, DTYPES[dtype])).contiguous()
    return cast.reshape(-1).view(torch.uint8).numpy().data


# The dtypes of a safetensors file that weights are trained from.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def peak_memory() -> int:
    """Bytes: the most that this process had allocated on its GPU, or without one the most that was resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_after(metrics: Path, name: str, last: int) -> None:
    """Drop the lines that a stopped session wrote after the checkpoint that this one resumes from."""
    if metrics.exists():
        kept = []
        for text in metrics.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by what stopped the session
                continue
            if line["name"] != name or line["step"] <= last:
                kept.append(text + "\n")
        write_text(metrics, "".join(kept))


def _gather(value: int, world: int) -> list[int]:
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[int] = [0] * world
    dist.all_gather_object(values, value)
    return values


SAVE, STOP = 1, 2  # what a rank may ask for after a step


def _asked(folder: RoundDir, rank: int) -> bool:
    """Whether this rank was asked to stop: by a signal, or the first one by its file."""
    return bool(_SIGNALS) or (rank == 0 and folder.stop.exists())


def _most(value: int, world: int) -> int:
    """The largest of the ranks' values, so that they all do the same after the same step."""
    if world == 1:
        return value
    import torch
    import torch.distributed as dist

    held = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def _barrier(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def _leave(world: int) -> None:
    """End a rank at once when all is written: torn down in its own time, it sometimes aborts at exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        _barrier(world)
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
