"""Config dataclasses, the checks across their fields, and the user's-mistake error. Standard library only.

Hydra composes these (conf/), `check` refuses what cannot work, and from then on nothing changes them: every worker
reads the sealed copy.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from hft_cli.errors import UserError
from hft_cli.files import from_dict
from hft_cli.run_dir import RunDir

REQUIRED = "???"  # Hydra's spelling of a value that must be given


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


def as_paths(value: Any) -> tuple[str, ...]:
    """data.path or data.test_path as a tuple: nothing, one place or several."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def training_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the rows of each round are."""
    return tuple(f"{data.path}/{task}" for task in data.tasks) if data.tasks else as_paths(data.path)


def test_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the test rows are: of none, of all rounds together, or of each round."""
    return training_sets(data) if data.tasks else as_paths(data.test_path)


def test_format(data: DataConfig) -> str:
    """The shape of test rows: that of the training rows, where both are a task's; otherwise told from the first row."""
    return data.format if data.tasks else "auto"


def value_for_task(key: str, value: Any, task: str) -> Any:
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


def read_config(run: RunDir) -> RunConfig:
    """The sealed configuration of a run.

    Raises:
        UserError: if it is missing or not one of ours.
    """
    import yaml

    try:
        values = yaml.safe_load(run.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run.config} cannot be read: {error}".splitlines()[0]) from None
    if not isinstance(values, dict):
        raise UserError(f"{run.config} is not the configuration of a run.")
    config: RunConfig = from_dict(RunConfig, values)
    return config


@dataclass(frozen=True)
class ProbeConfig:
    """How a suite runs a probe: an entry of suite.probe."""

    facts: str
    """JSON lines: relation, sub, obj; or rows of messages with a relation. Below suite.data_dir, or pocket:…"""
    patterns: str | None = None
    """JSON lines: relation, pattern with [X] and [Y]; null: the subjects are questions."""
    wrong: int = 9
    """Wrong answers for each fact, fewer where the relation has fewer objects; at least 1."""
    paraphrases: int = 4
    """Paraphrases of each fact at most; at least 1."""
    shots: int = 4
    """Examples before the fact; at least 0."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """How a suite runs a benchmark: an entry of suite.benchmarks. Null leaves it to the harness's task file."""

    task: str | None = None
    """The harness's name of the task, * for all of its parts (MMLU's subjects); null: as in `BENCHMARKS`."""
    shots: int | None = None
    """Examples before the question; at least 0."""
    metric: str | None = None
    """The metric that stands for the benchmark, and with a comma the filter it is of; null: the first."""
    mean: str = "items"
    """Of several tasks: the mean over all items, or over tasks."""
    chat: bool = True
    """Whether suite.chat=auto uses the chat template, if the model has one."""
    limit: int | None = None
    """Items of each task; the smaller of this and suite.limit holds."""
    max_new_tokens: int | None = None
    """Tokens of a generated answer; at least 1."""
    samples: int = 1
    """Programs generated for each HumanEval problem; at least 1."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: sampling, under `seed`."""
    top_p: float = 1.0
    """Of sampling: the share of the probability that tokens are drawn from, in (0, 1]."""
    pass_at: tuple[int, ...] = ()
    """The k of HumanEval's pass@k; each at most `samples`."""
    source: str = ""
    """Where these settings are from."""
