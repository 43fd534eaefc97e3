"""Config dataclasses, the checks across their fields, and the user's-mistake error. Standard library only.

Hydra composes these (conf/), `check` refuses what cannot work, and from then on nothing changes them: every worker
reads the sealed copy.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

REQUIRED = "???"  # Hydra's spelling of a value that must be given

PACKAGE = Path(__file__).parent


class UserError(Exception):
    """A mistake the user can mend: one line saying what, where, the choices and the fix. Exit status 2."""


@dataclass
class ModelConfig:
    """Group `model`: which weights to start from."""

    name: str = REQUIRED
    """Label in tables and figures."""
    path: str = REQUIRED
    """Folder in Hugging Face layout with safetensors weights, a hub name, or `pocket:model` (embedded)."""
    architecture: str | None = None
    """For `hft plan` where the weights are not here: a config.json, or the name of one that ships (llama2_70b, …)."""
    base: str | None = None
    """Half-Reset only: the model to go back to. The tuned one is model.path, which model.tuned is a name for."""
    dtype: str = "float32"
    """Precision of computing: float32, or bfloat16 with float32 master weights. The files keep their own."""
    attention: str | None = None
    """Attention implementation: sdpa, eager or flash_attention_2; null leaves the choice to transformers."""
    chat_template: str | None = None
    """tulu, plain, or a Jinja file; null takes the tokenizer's own. Saved with the trained model."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Regular expression over parameter names -> kind, for parameters that hft cannot place by itself."""


@dataclass
class DataConfig:
    """Group `data`: one set, or several in order, each a round of its own (section 3 of the paper)."""

    name: str = REQUIRED
    """Label in tables and figures."""
    path: Any = REQUIRED
    """File (JSON, JSONL, .gz, Parquet), folder or hub name of the training rows; of a list, each is a round."""
    test_path: Any = None
    """Rows scored before and after training: nothing, one place, or one for each training set."""
    tasks: list[str] = field(default_factory=list)
    """Folders below `path`, in order, each with train and test files: each task is a round, scored after it."""
    metric: Any = "exact_match"
    """exact_match (teacher-forced); of generated answers accuracy, rouge_l, sari, …: one, or a map from task to it."""
    format: str = "auto"
    """Shape of the rows: auto (from the first row), messages, prompt_completion, alpaca, sharegpt or trace."""
    split: Any = "train"
    """Split to read where `path` is a folder or a hub name: one, or a map from set to split."""
    max_rows: int | None = None
    """Use only the first rows of each training set, to try things; at least 1."""
    loss: str = "assistant"
    """Tokens that are trained on: assistant (its turns only) or all."""
    long_prompts: str = "drop"
    """Rows over max_length: drop those that would lose their answer, or cut the prompt's start first (TRACE)."""


@dataclass
class MethodConfig:
    """Group `method`: what a run does."""

    name: str = REQUIRED
    """fft and dpo (update every matrix), hft and hft_dpo (what is drawn), or half_reset (puts it back to the base)."""
    stages: list[str] = field(default_factory=lambda: ["sft"])
    """How the rounds train: sft or dpo, one for all or one for each training set."""
    shared_rows: bool = False
    """Half-Reset: where the tuned vocabulary is longer, put back the rows that both have, instead of refusing."""
    save_model: bool = True
    """Half-Reset: write the model. false only scores it, to try many draws without a model of each."""


@dataclass
class SelectionConfig:
    """Group `selection`: which matrices a round updates (sections 3 and 5 of the paper)."""

    level: str = "category"
    """all, category (the paper's own: within each category of each layer), layer, or model."""
    ratio: float = 0.5
    """Share of the matrices in the layers that is updated, in [0, 1]. The paper: 0.5, good from 0.4 to 0.6."""
    balance: str = "matrices"
    """What the ratio counts: matrices (the paper), or elements, which differ under grouped-query attention."""
    embeddings: str = "update"
    """update (the paper) or freeze the token and position embeddings."""
    head: str = "update"
    """update (the paper) or freeze the language-model head."""
    final_norm: str = "update"
    """update or freeze the norms outside the transformer layers."""
    redraw: str = "independent"
    """Later draws: independent (the paper), fixed, complementary (frozen ones first, in pairs) or balanced."""
    seed: int | None = None
    """Seed of the draw; null takes `seed`."""


@dataclass
class EngineConfig:
    """Group `engine`: what the training runs on. May change on resuming, but within a round not to or from single."""

    name: str = REQUIRED
    """Label: single, zero1, zero2, zero3, zero2_offload or zero3_offload."""
    zero_stage: int | None = None
    """DeepSpeed ZeRO stage, 1 to 3; null trains in one process without DeepSpeed."""
    num_processes: int = 1
    """Ranks on each node, one for each GPU (or CPU process); at least 1. More than one needs a ZeRO stage."""
    num_nodes: int = 1
    """Machines; at least 1. The same command runs on each, over one file system (scripts/slurm, scripts/hosts.sh)."""
    node_rank: int | None = None
    """This machine's number, from 0, which leads; null: what srun or torchrun says."""
    rendezvous: str | None = None
    """HOST:PORT of node 0, which the others reach; PORT and the one after it are used. Needed with several nodes."""
    offload_optimizer: bool = False
    """ZeRO-2 and 3: AdamW's moments and master weights lie in the host's memory, and it steps there."""
    offload_parameters: bool = False
    """ZeRO-3 with offload_optimizer: the weights' shards lie in the host's memory as well."""
    deepspeed: str | None = None
    """A DeepSpeed JSON of your own, for what hft has no key for (buckets, overlap); what contradicts is refused."""
    device: str = "auto"
    """auto (GPUs if there are any, but no large model on a CPU by accident), gpu or cpu."""
    check_memory: bool = True
    """Refuse a run that by `hft plan` cannot fit into memory; false tries it anyway."""

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.num_processes * self.num_nodes


@dataclass
class TrainConfig:
    """How a round is optimised. Learning rate, epochs, batch size, schedule and warmup default to Tulu V2's for SFT."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW; above 0."""
    epochs: Any = 2.0
    """Passes over each training set, above 0; one for all, or a map from task to passes. max_steps goes before it."""
    max_steps: int | None = None
    """Optimizer steps of each round; at least 1. null: by epochs."""
    batch_size: int = 128
    """Rows in an optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = 4
    """Rows that one rank handles at once; batch_size must be a multiple of micro_batch_size x ranks."""
    max_length: int | None = None
    """Tokens of a row; longer ones are cut, dropped if no answer is left (counted). null: the model's, at most 2048."""
    packing: bool = False
    """Pack short rows into sequences of max_length, without padding; rows do not see each other."""
    schedule: str = "linear"
    """Learning-rate schedule: linear, cosine, constant or constant_with_warmup."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, for updated matrices only; at least 0."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, in [0, 1)."""
    beta2: float = 0.999
    """AdamW's decay of the second moment, in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: int | None = None
    """Steps between checkpoints that a stopped run resumes from; null: by save_minutes, and when asked to stop."""
    save_minutes: float | None = None
    """Minutes between checkpoints, above 0, besides those of save_every; null: none by time."""
    save_limit: int = 1
    """Checkpoints kept of the running round; at least 1."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; at least 1."""


@dataclass
class DpoConfig:
    """DPO rounds (Rafailov et al. 2023); null: as in `train`. Rate, epochs, warmup and beta are Tulu 2's for DPO."""

    beta: float = 0.1
    """How strongly the model is held to the reference; above 0."""
    reference: str = "precomputed"
    """precomputed (no second model in memory), shared (frozen weights are the model's own; not ZeRO-3) or full."""
    ties: str = "keep"
    """keep or drop rows whose two answers have the same score."""
    learning_rate: float | None = 5e-7
    """Peak learning rate of DPO rounds; above 0."""
    epochs: float | None = 3.0
    """Passes over the set in DPO rounds; above 0."""
    max_steps: int | None = None
    """Optimizer steps of DPO rounds; at least 1."""
    warmup: float | None = 0.1
    """Share of the steps of DPO rounds over which the learning rate rises, in [0, 1)."""


@dataclass
class ContinualConfig:
    """Group `continual`: what a sequence of tasks does against forgetting, besides the selection."""

    name: str = "seqft"
    """seqft (nothing), replay, gem (Lopez-Paz & Ranzato 2017; not ZeRO-3) or lora (Hu et al. 2021; not ZeRO-3)."""
    score_unseen: bool = False
    """After each round, score the tasks to come as well as those seen so far."""
    replay_ratio: float = 0.1
    """Replay: share of each past task's rows that is trained on again after a task, in (0, 1]."""
    replay_epochs: float = 1.0
    """Replay: passes over those rows; above 0."""
    replay_general: str | None = None
    """Replay: rows of general instructions (TRACE: LIMA), as in data.path, trained on whole beside them."""
    replay_shuffle: bool = True
    """Replay: mix the rows of all past tasks; false goes through them task by task, in the order of the files."""
    gem_memory: int = 64
    """GEM: rows of each past task whose gradients no step may go against; at least 1."""
    gem_margin: float = 0.0
    """GEM: memory strength, the least weight of a past task's gradient in a step that is corrected; at least 0."""
    lora_rank: int = 8
    """LoRA: rank of the adapters; at least 1."""
    lora_alpha: float = 16.0
    """LoRA: the adapters' product is scaled by alpha / rank; above 0."""
    lora_dropout: float = 0.0
    """LoRA: dropout before the adapters, in [0, 1)."""


@dataclass
class GenerationConfig:
    """How answers are generated, for the metrics that need them."""

    max_new_tokens: int = 512
    """Tokens of an answer; at least 1. A prompt is cut at its start if it does not leave room for them."""
    max_prompt_length: int | None = None
    """Tokens of a prompt, cut at its start; at least 1. null: what max_new_tokens leaves of the model's positions."""
    batch_size: int = 16
    """Prompts answered at once; at least 1. Their keys and values take memory for prompt and answer together."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: sampling, under `seed`."""


@dataclass
class SuiteConfig:
    """Group `suite`: what is scored: by `hft train` before and after training, by `hft eval` of any model."""

    name: str = REQUIRED
    """Label in tables: none, pocket, general, knowledge, quick, probe or harness."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Task -> rows (as in data.path) whose answers must come out exactly, under greedy decoding."""
    batch_size: int = 64
    """Rows scored at once, or prompts answered; at least 1."""
    seed: int = 42
    """Seed of sampled answers and of what a probe asks: one for all runs, which so answer the same; at least 0."""
    benchmarks: dict[str, Any] = field(default_factory=dict)
    """Benchmark -> its settings (task, shots, metric, chat, limit, sampling); their source is in the file."""
    harness: list[str] = field(default_factory=list)
    """More tasks, groups or tags of lm-evaluation-harness, by its names and with its settings."""
    only: list[str] = field(default_factory=list)
    """Run these benchmarks of the suite alone; empty runs all."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Relations whose right answer is ranked among wrong ones: set -> its facts and settings."""
    data_dir: str | None = None
    """Folder with a sub-folder of files for each benchmark, and nothing is downloaded; null: from the hub."""
    limit: int | None = None
    """Items of each benchmark's task (MMLU: subject; a probe: relation), not of sets of rows; at least 1. null: all."""
    chat: str = "auto"
    """Prompts through the chat template: auto (if there is one, as the benchmark says), true or false."""
    allow_code: bool = False
    """Run programs that the model writes (HumanEval), in a process with limits. Read about them first."""


@dataclass
class TrackingConfig:
    """Group `tracking`: where metrics, scores and results go besides the run's own files. May change on resuming."""

    name: str = "none"
    """none, tensorboard (event files in the run's directory), wandb (Weights & Biases) or trackio."""
    project: str = "hft"
    """wandb and trackio: the project that the run is put into."""
    run_name: str | None = None
    """The run's name there; null: that of output_dir."""


@dataclass
class EvalConfig:
    """All that `hft eval` is told: the primary config conf/eval.yaml."""

    run: str | None = None
    """A finished run whose models are scored, instead of model.path. Results go below it."""
    models: list[str] = field(default_factory=lambda: ["after"])
    """With `run`: after (the model that the run made), before (the one that it started from), or both."""
    output_dir: str = REQUIRED
    """Without `run`: results go to OUTPUT_DIR/eval/SUITE.json. What is there and still holds is not scored again."""
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class RunConfig:
    """All that `hft train` is told: the primary config conf/train.yaml."""

    seed: int = 42
    """Seed of data order, dropout and, unless selection.seed is set, the draw; at least 0."""
    output_dir: str = REQUIRED
    """The run's directory. An unfinished run there is continued, a finished one is left alone."""
    resume: bool = False
    """Continue the newest unfinished run of the same configuration when output_dir is not given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PlanConfig(RunConfig):
    """What `hft plan` is told besides. It prints, and neither trains nor writes anything."""

    gpu_memory: float | None = None
    """Memory of a GPU in GiB, above 0: which engines fit into it, under the worst draw."""
    tflops: float | None = None
    """Peak rate of a GPU in the dtype of training, in TFLOP/s, above 0 (A100 312, H100 989 in bfloat16): hours."""
    utilization: float = 0.4
    """Share of `tflops` that training reaches, in (0, 1]. An assumption: measure yours, and put it here."""
    rows: int | None = None
    """Rows of each training set that is not on this machine, at least 1."""
    row_tokens: int | None = None
    """Tokens of a row on average, at least 1; null takes every row as full (train.max_length). Not for memory."""


class Stopped(BaseException):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a UserError with the nearest one.

    Raises:
        UserError: "Unknown WHAT 'x'. Did you mean 'y'? Available: …".
    """
    names = list(choices)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"Unknown {what} '{value}'.{hint} Available: {', '.join(names)}.")


def locate(path: str) -> str:
    """The file or folder behind a config's path: `pocket:x` is x among the embedded files."""
    return str(PACKAGE / "pocket" / path.removeprefix("pocket:")) if path.startswith("pocket:") else path


def places(value: Any) -> tuple[str, ...]:
    """data.path or data.test_path as a tuple: nothing, one place or several."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def training_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the rows of each round are."""
    return tuple(f"{data.path}/{task}" for task in data.tasks) if data.tasks else places(data.path)


def test_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the test rows are: of none, of all rounds together, or of each round."""
    return training_sets(data) if data.tasks else places(data.test_path)


def test_format(data: DataConfig) -> str:
    """The shape of test rows: that of the training rows, where both are a task's; otherwise told from the first row."""
    return data.format if data.tasks else "auto"


def of_task(key: str, value: Any, task: str) -> Any:
    """A task's own value of a key that holds one for all tasks or a map from task to value.

    Raises:
        UserError: if the map lacks the task.
    """
    if not isinstance(value, dict):
        return value
    if task not in value:
        near = difflib.get_close_matches(task, value, n=1)
        hint = f"; did you mean '{near[0]}'" if near else ""
        raise UserError(
            f"{key} has nothing for {task} (it has: {', '.join(value) or 'nothing'}{hint}). Give one value for all, "
            f"{key}=…, or one for each task, '{key}={{{task}: …, …}}'."
        )
    return value[task]


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """Build a config dataclass, nested ones too, from plain values such as a sealed config.yaml holds.

    Raises:
        UserError: for a key that the dataclass does not have, with the nearest one.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        choose("key", where + key, [where + name for name in hints])
    return cls(
        **{
            key: from_dict(hints[key], value, f"{where}{key}.") if is_dataclass(hints[key]) else value
            for key, value in values.items()
        }
    )


def check(config: RunConfig) -> None:
    """Refuse what cannot work, before anything expensive starts.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    resets = config.method.name == "half_reset"
    _check_missing(config)
    model, data, selection, engine, train = config.model, config.data, config.selection, config.engine, config.train
    choose("method.name", config.method.name, METHODS)
    _check_model(model)
    _check_suite(config.suite)
    choose("data.format", data.format, ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "trace"))
    choose("data.loss", data.loss, ("assistant", "all"))
    choose("selection.level", selection.level, ("all", "category", "layer", "model"))
    choose("selection.balance", selection.balance, ("matrices", "elements"))
    choose("selection.redraw", selection.redraw, ("independent", "complementary", "balanced", "fixed"))
    choose("data.long_prompts", data.long_prompts, ("drop", "cut"))
    choose("continual", config.continual.name, ("seqft", "replay", "gem", "lora"))
    for metric in data.metric.values() if isinstance(data.metric, dict) else [data.metric]:
        choose("data.metric", metric, METRICS)
    choose("tracking", config.tracking.name, TRACKERS)
    choose("train.schedule", train.schedule, ("linear", "cosine", "constant", "constant_with_warmup"))
    for name in ("embeddings", "head", "final_norm"):
        choose(f"selection.{name}", getattr(selection, name), ("update", "freeze"))

    for path, value, low in (
        ("continual.gem_margin", config.continual.gem_margin, 0),
        ("continual.gem_memory", config.continual.gem_memory, 1),
        ("continual.lora_rank", config.continual.lora_rank, 1),
        ("data.max_rows", data.max_rows, 1),
        ("dpo.max_steps", config.dpo.max_steps, 1),
        ("engine.num_nodes", engine.num_nodes, 1),
        ("engine.num_processes", engine.num_processes, 1),
        ("generation.batch_size", config.generation.batch_size, 1),
        ("generation.max_new_tokens", config.generation.max_new_tokens, 1),
        ("generation.max_prompt_length", config.generation.max_prompt_length, 1),
        ("generation.temperature", config.generation.temperature, 0),
        ("seed", config.seed, 0),
        ("selection.seed", selection.seed, 0),
        ("train.batch_size", train.batch_size, 1),
        ("train.log_every", train.log_every, 1),
        ("train.max_grad_norm", train.max_grad_norm, 0),
        ("train.max_length", train.max_length, 2),
        ("train.max_steps", train.max_steps, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.save_every", train.save_every, 1),
        ("train.save_limit", train.save_limit, 1),
        ("train.weight_decay", train.weight_decay, 0),
    ):
        _at_least(path, value, low)
    for path, value in (("seed", config.seed), ("selection.seed", selection.seed)):
        if value is not None and value >= 2**32:
            raise UserError(f"{path}={value} is too large: it must be below 2^32.")
    for path, value in (
        ("train.learning_rate", train.learning_rate),
        ("train.save_minutes", train.save_minutes),
        *_each("train.epochs", train.epochs),
        ("continual.replay_ratio", config.continual.replay_ratio),
        ("continual.replay_epochs", config.continual.replay_epochs),
        ("continual.lora_alpha", config.continual.lora_alpha),
        ("dpo.beta", config.dpo.beta),
        ("dpo.learning_rate", config.dpo.learning_rate),
        ("dpo.epochs", config.dpo.epochs),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{path}={value} must be above 0.")
    for path, value in (
        ("train.warmup", train.warmup),
        ("train.beta1", train.beta1),
        ("train.beta2", train.beta2),
        ("dpo.warmup", config.dpo.warmup),
        ("continual.lora_dropout", config.continual.lora_dropout),
    ):
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{path}={value} must be in [0, 1).")
    if config.continual.replay_ratio > 1:
        raise UserError(f"continual.replay_ratio={config.continual.replay_ratio} is a share: it must be in (0, 1].")
    if not 0 <= selection.ratio <= 1:
        raise UserError(f"selection.ratio={selection.ratio} is a share: it must be in [0, 1].")
    if selection.redraw == "balanced" and selection.balance == "elements":
        raise UserError("selection.redraw=balanced counts matrices, so it needs selection.balance=matrices.")
    if selection.level == "all" and selection.ratio not in (0.5, 1.0):
        raise UserError(
            f"selection.ratio={selection.ratio} has no meaning with selection=all, which updates every matrix. "
            "Use selection=category, layer or model."
        )

    if resets and model.base is None:
        raise UserError(
            "method=half_reset needs model.base=…, the model to go back to (and model.tuned=…, the tuned one)."
        )
    if not resets and model.base is not None:
        raise UserError(
            f"model.base is for method=half_reset alone; method={config.method.name} starts from model.path."
        )
    if not resets and not (config.method.save_model and not config.method.shared_rows):
        raise UserError(f"method.save_model and method.shared_rows are not for method={config.method.name}.")
    if not config.method.save_model and (config.suite.benchmarks or config.suite.harness or config.suite.probe):
        raise UserError(
            f"method.save_model=false leaves no model that the benchmarks of suite={config.suite.name} could be scored "
            "on. Use suite=pocket or data.test_path, or write the model."
        )
    if resets and engine.zero_stage is not None:
        raise UserError(f"method=half_reset copies files and needs no ranks: leave out engine={engine.name}.")
    every = config.method.name in ("fft", "dpo")
    if every and selection.level != "all":
        raise UserError(
            f"method={config.method.name} updates every matrix, so selection={selection.level} cannot hold. "
            f"Use method={'hft' if config.method.name == 'fft' else 'hft_dpo'}, or leave selection out."
        )
    outside = {name: getattr(selection, name) for name in ("embeddings", "head", "final_norm")}
    if every and "freeze" in outside.values():
        frozen = ", ".join(f"selection.{name}=freeze" for name, state in outside.items() if state == "freeze")
        raise UserError(f"method={config.method.name} updates every matrix, so {frozen} cannot hold. Use method=hft.")
    _check_engine(engine)
    for stage in config.method.stages:
        choose("stage in method.stages", stage, ("sft", "dpo"))
    rounds = training_sets(data)
    if not resets and len(config.method.stages) not in (1, len(rounds)):
        raise UserError(
            f"method.stages names {len(config.method.stages)} stages for {len(rounds)} training sets: give "
            "one for all, or one for each."
        )
    _check_continual(config)
    choose("dpo.reference", config.dpo.reference, ("precomputed", "shared", "full"))
    choose("dpo.ties", config.dpo.ties, ("keep", "drop"))
    if "dpo" in config.method.stages and config.dpo.reference == "shared" and engine.zero_stage == 3:
        raise UserError(
            "dpo.reference=shared cannot be with engine=zero3, which shards every tensor for one model only. Use "
            "dpo.reference=precomputed, which needs no second model in memory, or full."
        )
    if "dpo" in config.method.stages and train.packing:
        raise UserError("train.packing=true is for SFT; DPO's pairs are not packed. Set train.packing=false.")
    if model.attention == "flash_attention_2" and model.dtype != "bfloat16":
        raise UserError(
            "model.attention=flash_attention_2 computes in bfloat16 only: set model.dtype=bfloat16, or "
            "model.attention=sdpa."
        )
    step_rows = train.micro_batch_size * engine.ranks
    if train.batch_size % step_rows:
        nodes = f" x engine.num_nodes={engine.num_nodes}" if engine.num_nodes > 1 else ""
        raise UserError(
            f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size} "
            f"x engine.num_processes={engine.num_processes}{nodes}. Nearest that is: "
            f"{max(1, round(train.batch_size / step_rows)) * step_rows}."
        )
    if not all(isinstance(place, str) for value in (data.path, data.test_path) for place in places(value)):
        raise UserError("data.path and data.test_path are each a path or a list of paths.")
    if data.tasks and (not isinstance(data.path, str) or data.test_path is not None):
        raise UserError(
            "data.tasks names folders below data.path, which hold their test rows too: give one data.path, and no "
            "data.test_path."
        )
    if data.tasks and resets:
        raise UserError("method=half_reset trains on nothing: leave out data.tasks; data.test_path can be scored.")
    if not rounds and not resets:
        raise UserError("data.path is empty: give a file, a folder, a hub name, or a list of them.")
    if len(test_sets(data)) not in (0, 1, len(rounds) * (not resets)):
        raise UserError(
            f"data.test_path names {len(test_sets(data))} sets for {len(rounds)} training sets: "
            "give none, one, or one for each."
        )


def check_eval(config: EvalConfig) -> None:
    """The same for `hft eval`.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    _check_missing(config)
    _check_model(config.model)
    _check_suite(config.suite)
    _at_least("engine.num_processes", config.engine.num_processes, 1)
    choose("engine.device", config.engine.device, ("auto", "gpu", "cpu"))
    if config.engine.num_nodes > 1:
        raise UserError("hft eval scores on one node: leave out engine.num_nodes.")
    if not config.models:
        raise UserError("models is empty: give after, before or both.")
    for name in config.models:
        choose("models", name, ("after", "before"))


def _check_missing(config: RunConfig | EvalConfig) -> None:
    for path, value in _leaves(config):
        if value == REQUIRED and path == "method.name":
            raise UserError(f"No method: give one of +method={'|'.join(METHODS)}. For instance: hft train +method=hft")
        if value == REQUIRED:
            raise UserError(f"{path} is not set. Give it on the command line: {path}=…")


def _check_model(model: ModelConfig) -> None:
    choose("model.dtype", model.dtype, ("float32", "bfloat16"))
    if model.attention is not None:
        choose("model.attention", model.attention, ("sdpa", "eager", "flash_attention_2"))


def _check_suite(suite: SuiteConfig) -> None:
    for path, value, low in (
        ("suite.batch_size", suite.batch_size, 1),
        ("suite.limit", suite.limit, 1),
        ("suite.seed", suite.seed, 0),
    ):
        _at_least(path, value, low)
    choose("suite.chat", suite.chat.lower(), ("auto", "true", "false"))


def _at_least(path: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise UserError(f"{path}={value} is too small: it must be at least {low}.")


def _check_engine(engine: EngineConfig) -> None:
    """Refuse ranks, nodes and offload that an engine cannot have."""
    choose("engine.device", engine.device, ("auto", "gpu", "cpu"))
    if engine.zero_stage not in (None, 1, 2, 3):
        raise UserError(f"engine.zero_stage={engine.zero_stage} does not exist: choose 1, 2 or 3.")
    for key in ("num_processes", "num_nodes"):
        if engine.zero_stage is None and getattr(engine, key) > 1:
            raise UserError(
                f"engine={engine.name} is one process, but engine.{key}={getattr(engine, key)}. "
                "Use engine=zero1, zero2 or zero3."
            )
    if engine.offload_optimizer and engine.zero_stage not in (2, 3):
        raise UserError(
            f"engine.offload_optimizer=true is for ZeRO-2 and 3, not for engine={engine.name}. Use "
            "engine=zero2_offload or zero3_offload."
        )
    if engine.offload_parameters and not (engine.zero_stage == 3 and engine.offload_optimizer):
        raise UserError(
            "engine.offload_parameters=true is for ZeRO-3 with engine.offload_optimizer=true. Use engine=zero3_offload."
        )
    if engine.deepspeed is not None and engine.zero_stage is None:
        raise UserError(
            f"engine.deepspeed={engine.deepspeed} is for DeepSpeed, and engine={engine.name} runs without it. Use "
            "engine=zero1, zero2 or zero3, whichever stage the file has."
        )
    if engine.node_rank is not None and not 0 <= engine.node_rank < engine.num_nodes:
        raise UserError(
            f"engine.node_rank={engine.node_rank} is not one of engine.num_nodes={engine.num_nodes} nodes: they count "
            "from 0."
        )
    if engine.rendezvous is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", engine.rendezvous):
        raise UserError(f"engine.rendezvous={engine.rendezvous} is not HOST:PORT, for instance node0:29500.")


def _check_continual(config: RunConfig) -> None:
    """Refuse strategies of continual learning where they cannot do what they are for."""
    name, rounds = config.continual.name, training_sets(config.data)
    if config.continual.replay_general is not None and name != "replay":
        raise UserError(f"continual.replay_general is for continual=replay; with continual={name} nothing reads it.")
    if name == "replay" and config.train.packing and not config.continual.replay_shuffle:
        raise UserError("train.packing=true packs rows in an order of its own: set continual.replay_shuffle=true.")
    if name == "seqft":
        return
    if config.method.name not in ("fft", "hft") or set(config.method.stages) != {"sft"}:
        raise UserError(f"continual={name} is for SFT by method=fft or hft, not for DPO or Half-Reset.")
    if name in ("replay", "gem") and len(rounds) < 2:
        raise UserError(
            f"continual={name} needs a sequence of tasks, and there is {len(rounds)} round. Give several training sets "
            "(data.path=[…]) or data=trace."
        )
    if name == "lora" and config.method.name != "fft":
        raise UserError(
            "continual=lora trains adapters beside all matrices, so there is no half to draw: use method=fft."
        )
    if name in ("gem", "lora") and config.engine.offload_optimizer:
        raise UserError(f"continual={name} was never tried with offload: use engine=single, zero1 or zero2.")
    if name in ("gem", "lora") and config.engine.zero_stage == 3:
        raise UserError(f"continual={name} cannot be with engine=zero3: use engine=single, zero1 or zero2.")
    if config.train.packing and name == "gem":
        raise UserError("continual=gem takes gradients of single rows: set train.packing=false.")


def _each(key: str, value: Any) -> list[tuple[str, float]]:
    """A key's number, or those of its map from task to number, each under its own name.

    Raises:
        UserError: for anything else.
    """
    found = {f"{key}.{task}": own for task, own in value.items()} if isinstance(value, dict) else {key: value}
    for name, own in found.items():
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise UserError(f"{name}={own} is neither a number nor a map from task to number.")
    return list(found.items())


METRICS = (
    "exact_match",
    "accuracy",
    "first_character",
    "rouge_l",
    "edit_similarity",
    "code_edit_similarity",
    "sari",
)
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
METHODS = ("fft", "hft", "half_reset", "dpo", "hft_dpo")


def _leaves(config: Any, where: str = "") -> Iterable[tuple[str, Any]]:
    for spec in fields(config):
        path = f"{where}.{spec.name}" if where else spec.name
        value = getattr(config, spec.name)
        if is_dataclass(value):
            yield from _leaves(value, path)
        else:
            yield path, value
