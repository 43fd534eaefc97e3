"""The config of each command as dataclasses. Standard library only.

Hydra fills them in from conf/ and the command line, `validate` checks them, and nothing changes them afterwards: the
workers of a run read the sealed copy. Each field carries its help, unit, range and choices (see `settings`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hft_cli.config.settings import AUTO, FLASH_ATTENTION, FORCED_METRICS, REQUIRED, WITHOUT_TRAINING, setting
from hft_cli.config.suites import SuiteConfig
from hft_cli.config.training import AnchorConfig, ContinualConfig, DpoConfig, GenerationConfig, LoraConfig, TrainConfig
from hft_cli.errors import UserError
from hft_cli.files import from_dict, require_type
from hft_cli.run_dir import RunDir


@dataclass
class ModelConfig:
    """Group `model`: the weights to start from."""

    name: str = setting(REQUIRED, "Label in tables and figures.")
    path: str = setting(
        REQUIRED, "Folder in Hugging Face layout with safetensors weights, a hub name, or `pocket:model` (embedded)."
    )
    revision: str | None = setting(
        None, "Commit, branch or tag of a hub model; null: the newest. A run keeps the commit that it began with."
    )
    architecture: str | None = setting(
        None,
        "`hft plan` without the weights: a config.json, or the name of one that ships (llama2_70b, …). null: read it "
        "from model.path.",
    )
    part: str | None = setting(
        None,
        "text: of a model for images or sound, the text model alone; the rest is neither loaded nor changed. null: the "
        "whole model, which must be for text.",
        choices=("text",),
    )
    base: str | None = setting(
        None, "Half-Reset only: the model whose values are put back. model.path (or its alias model.tuned) is changed."
    )
    dtype: str = setting(
        "float32",
        "Precision of computation. bfloat16 keeps float32 master weights; auto: bfloat16 if the GPUs have it, else "
        "float32. The model's files keep their own dtypes.",
        choices=("float32", "bfloat16", AUTO),
    )
    attention: str | None = setting(
        None,
        "Attention implementation; null: transformers chooses.",
        choices=("sdpa", "eager", *FLASH_ATTENTION),
    )
    chat_template: str | None = setting(
        None,
        "tulu, plain, or a Jinja file; null: the tokenizer's own template. It is saved with the trained model.",
    )
    thinking: bool | None = setting(
        None,
        "Whether the chat template asks for reasoning before an answer (Qwen3's enable_thinking), in training and in "
        "scoring; null: the template's own default. Reasoning is no part of an answer that is scored.",
    )
    date: str | None = setting(
        None,
        "The day that the chat template writes as today's (Llama 3.2, gpt-oss), as 2026-12-31; null: the day on which "
        "the run began, also when it is continued later.",
    )
    kinds: dict[str, str] = setting(
        {},
        "Map from a regular expression over parameter names to a kind of parameter, for names that hft does not know.",
        choices=("hft_cli.checkpoint.naming:KINDS",),
    )

    @property
    def changes_template(self) -> bool:
        """Whether the chat template is another than the tokenizer's own."""
        return self.chat_template is not None or self.thinking is not None


@dataclass
class MixedSet:
    """A set of `data.mix`: its rows are trained on in the same batches as those of data.path."""

    path: str = setting(REQUIRED, "Its rows, as in data.path.")
    share: float | None = setting(
        None,
        "Share of the round's rows that are drawn from it. If all sets have a share, the round has as many rows as it "
        "can without repeating one.",
        range="(0, 1]",
    )
    rows: int | None = setting(
        None, "Rows that are drawn from it. null, and no share: all its rows.", unit="rows", range="[1, inf)"
    )
    split: str = setting("train", "As data.split.")
    subset: str | None = setting(None, "As data.subset.")
    revision: str | None = setting(None, "As data.revision.")
    format: str = setting("auto", "As data.format.", choices=("auto", "hft_cli.data.rows:READERS"))
    columns: dict[str, str] = setting({}, "As data.columns.")
    roles: dict[str, str] = setting({}, "As data.roles.")


@dataclass
class DataConfig:
    """Group `data`: one training set, or several in order. Each set is a round of its own (paper, section 3)."""

    name: str = setting(REQUIRED, "Label in tables and figures.")
    path: Any = setting(
        None,
        "Training rows: a file (JSON, JSONL, CSV, Parquet, Arrow), a folder or a hub name. A list: one round for each.",
    )
    test_path: Any = setting(
        None,
        "Rows scored before and after training: null, one path, or a list with one path for each training set.",
    )
    validation: Any = setting(
        None,
        "Rows whose loss is measured while training: null; rows as in data.path, and read like them; a share of each "
        "round's rows, which is split off (0.05); or a list with one for each training set.",
    )
    validation_split: str = setting("validation", "Split to read if data.validation is a folder or a hub name.")
    tasks: list[str] = setting(
        [],
        "Folders below data.path, each with train and test files. Each task is a round and is scored after it.",
    )
    mix: Any = setting(
        None,
        "Further sets in every round, or without data.path the sets of the one round: [{path: general.jsonl, share: "
        "0.01}]. Of each set, share is its part of the round's rows, and rows a number that is drawn; without both all "
        "rows are used. It may have its own split, subset, revision, format, columns and roles.",
    )
    general: str | None = setting(
        None,
        "Rows of what the model is to keep, as in data.path. continual=mixed_replay trains on them, and "
        "selection=importance ranks the matrices by them; other methods do not read them.",
    )
    rounds_per_set: int = setting(
        1,
        "Rounds on each training set. The training on the set, in one order of its rows over all epochs, is divided "
        "into so many equal parts; each is a round with a draw, an optimizer and a schedule of its own.",
        range="[1, inf)",
    )
    deduplicate: bool = setting(
        False, "Leave out training rows that equal an earlier row of the round, of any of its sets."
    )
    metric: Any = setting(
        "exact_match",
        "Score of the test rows; exact_match and token_accuracy (the share of an answer's tokens) are teacher-forced, "
        "the others score generated answers. One, or a map from task to metric.",
        choices=(*FORCED_METRICS, "hft_cli.evaluation.metrics:METRICS"),
    )
    format: str = setting(
        "auto",
        "Shape of the rows; auto: the shape of the first row.",
        choices=("auto", "hft_cli.data.rows:READERS"),
    )
    split: Any = setting(
        "train", "Split to read if data.path is a folder or a hub name. One, or a map from training set to split."
    )
    subset: Any = setting(None, "Subset (configuration) of a hub data set. One, or a map from training set to subset.")
    revision: Any = setting(
        None, "Commit, branch or tag of a hub data set. One, or a map from training set to revision."
    )
    max_rows: int | None = setting(
        None, "Use only the first rows of each training set; null: all rows.", unit="rows", range="[1, inf)"
    )
    loss: str = setting(
        "assistant",
        "Tokens that have a loss: those of the assistant's turns (without those of a prompt), of each of these at the "
        "end of a row of its own, of the last one, of the completion (what follows the last question), or all.",
        choices=("hft_cli.data.chats:LOSSES",),
    )
    roles: dict[str, str] = setting(
        {}, "Map from names of roles that hft does not know to user, assistant, system or tool: '{Alice: user}'."
    )
    bad_rows: str = setting(
        "stop",
        "Rows that cannot be trained on: stop and list all of them, or skip them (they are counted and listed in "
        "rounds/NN-NAME/data.json). Rows of a test set always stop.",
        choices=("hft_cli.data.bad_rows:BAD_ROWS",),
    )
    special_tokens: str = setting(
        "refuse",
        "Turns whose text holds a special token that the chat template writes around turns, such as its end of a turn, "
        "or the EOS token: refuse the row, tokenize it as other text, or keep it as that token.",
        choices=("hft_cli.data.special_tokens:SPECIAL_TOKENS",),
    )
    columns: dict[str, str] = setting(
        {}, "Map from hft's names of columns and fields of turns to those of the rows: '{messages: dialog, role: who}'."
    )
    long_prompts: str = setting(
        "drop",
        "Rows longer than train.max_length: drop those that would lose their answer, or cut the start of the prompt "
        "(as TRACE does).",
        choices=("hft_cli.data.tokenization:LONG_PROMPTS",),
    )


@dataclass
class MethodConfig:
    """Group `method`: what a run does."""

    name: str = setting(
        REQUIRED,
        "fft and dpo update every matrix, hft and hft_dpo a random selection, lora adapters beside them; half_reset "
        "puts a selection back to the base model's values, interpolate puts matrices a part of the way back.",
        choices=("hft_cli.method.rounds:METHODS",),
    )
    stages: list[str] = setting(
        ["sft"],
        "How each round trains: one stage for all rounds, or one for each training set.",
        choices=("sft", "dpo"),
    )
    alpha: float | None = setting(
        None,
        "Interpolation: the share of its change that each matrix keeps; 0 is the base, 1 the tuned model. After a "
        "method that trains, the base is the model that it began with.",
        range="[0, 1]",
    )
    alpha_last: float | None = setting(
        None,
        "Interpolation by depth: method.alpha is the share in the first layer, this that in the last, and layers "
        "between them are on a line. null: the same in all layers.",
        range="[0, 1]",
    )
    shared_rows: bool = setting(
        False,
        "Half-Reset and interpolation: if the tuned model has a longer vocabulary, put back the rows that both models "
        "have instead of refusing.",
    )
    save_model: bool = setting(
        True,
        "Half-Reset and interpolation: write the model. false only scores it, which lets you try many draws or shares "
        "without storing models.",
    )

    @property
    def trains(self) -> bool:
        """Whether it trains, and not only computes with files."""
        return self.name not in WITHOUT_TRAINING


@dataclass
class SelectionConfig:
    """Group `selection`: which matrices a round updates (paper, sections 3 and 5)."""

    level: str = setting(
        "category",
        "What the updated matrices are drawn from: each category (attention, feed-forward, norm) of each layer (the "
        "paper's method), whole layers, or the whole model; all: no draw; names: those of selection.names; importance: "
        "in each category of each layer those that matter least to selection.importance_rows.",
        choices=("hft_cli.method.selection:STRATEGIES",),
    )
    names: list[str] = setting(
        [],
        "With selection=names: regular expressions over names of parameters in the layers, such as [q_proj, "
        "'layers\\.(0|1)\\.']. What one of them finds is updated, with its bias.",
    )
    importance_rows: str | None = setting(
        None,
        "With selection=importance: a set of rows, as in data.path, of what the model is to keep. The matrices of the "
        "base are ranked by their squared gradients on them (the Fisher information), averaged over the elements.",
    )
    importance_limit: int = setting(
        64, "At most so many of those rows, at equal distances.", unit="rows", range="[1, inf)"
    )
    importance_update: str = setting(
        "least",
        "The matrices that are updated: those that matter least, or as a control most.",
        choices=("least", "most"),
    )
    ratio: float = setting(
        0.5,
        "Share of the matrices in the transformer layers that is updated. The paper uses 0.5; 0.4 to 0.6 works well.",
        range="[0, 1]",
    )
    balance: str = setting(
        "matrices",
        "What the ratio counts: matrices (as in the paper) or elements. They differ under grouped-query attention.",
        choices=("matrices", "elements"),
    )
    embeddings: str = setting(
        "update", "The token and position embeddings. The paper updates them.", choices=("update", "freeze")
    )
    head: str = setting("update", "The language-model head. The paper updates it.", choices=("update", "freeze"))
    final_norm: str = setting("update", "Norms outside the transformer layers.", choices=("update", "freeze"))
    redraw: str = setting(
        "independent",
        "Draws after the first: independent (the paper), fixed (the same draw again), complementary (every second "
        "round updates what the round before froze), balanced (what was updated least comes first).",
        choices=("independent", "complementary", "balanced", "fixed"),
    )
    seed: int | None = setting(None, "Seed of the draw; null: the value of `seed`.", range="[0, 4294967295]")


@dataclass
class EngineConfig:
    """Group `engine`: what the training runs on. It may change when a run is resumed (README, Resuming)."""

    name: str = setting(REQUIRED, "Label in tables.")
    zero_stage: int | None = setting(None, "DeepSpeed ZeRO stage; null: one process without DeepSpeed.", range="[1, 3]")
    num_processes: int = setting(
        1,
        "Ranks on each node, one for each GPU (or CPU process). More than one needs a ZeRO stage. 0: as many as there "
        "are GPUs (engine=auto).",
        unit="processes",
        range="[0, inf)",
    )
    num_nodes: int = setting(
        1,
        "Machines. The same command runs on each of them, on one shared file system.",
        unit="nodes",
        range="[1, inf)",
    )
    node_rank: int | None = setting(
        None, "Number of this node, from 0; node 0 leads. null: as srun or torchrun says.", range="[0, inf)"
    )
    rendezvous: str | None = setting(
        None,
        "HOST:PORT of node 0, which the other nodes must reach; PORT + 1 is used too. Required with several nodes.",
    )
    offload_optimizer: bool = setting(
        False, "ZeRO-2 and 3: keep AdamW's moments and the master weights in host memory, and step there."
    )
    offload_parameters: bool = setting(
        False, "ZeRO-3 with offload_optimizer: keep the shards of the weights in host memory too."
    )
    deepspeed: str | None = setting(
        None,
        "A DeepSpeed JSON file for settings that hft has no key for (bucket sizes, overlap). Settings that contradict "
        "the run are refused.",
    )
    device: str = setting(
        "auto",
        "auto: GPUs if there are any; a model of over a billion parameters does not run on the CPU unless you set cpu.",
        choices=("auto", "gpu", "cpu"),
    )
    check_memory: bool = setting(
        True, "Refuse a run that does not fit into memory according to `hft plan`. false tries it anyway."
    )

    @property
    def ranks(self) -> int:
        """Number of processes over all nodes."""
        return self.num_processes * self.num_nodes


@dataclass
class TrackingConfig:
    """Group `tracking`: where metrics, scores and results are sent, in addition to the run's files."""

    name: str = setting(
        "none",
        "tensorboard writes event files into the run's directory; wandb is Weights & Biases.",
        choices=("hft_cli.runner.tracking:TRACKERS",),
    )
    project: str = setting("hft", "wandb and trackio: project of the run.")
    run_name: str | None = setting(None, "Name of the run in the tracker; null: the name of output_dir.")


@dataclass
class EvalConfig:
    """Keys of `hft eval` (conf/eval.yaml)."""

    run: str | None = setting(
        None, "A finished run whose models are scored, instead of model.path. The results go into its directory."
    )
    models: list[str] = setting(
        ["after"],
        "With `run`: the model after training, the model before it, or both; base: that to which a Half-Reset or an "
        "interpolation puts a model back.",
        choices=("after", "before", "base"),
    )
    again: bool = setting(
        False,
        "Score the models once more, and print how far two scores of one model differ; hft gate takes it into account.",
    )
    output_dir: str = setting(
        REQUIRED, "Without `run`: results go to OUTPUT_DIR/eval/SUITE.json. Scores that are still valid are reused."
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class RunConfig:
    """Keys of `hft train` (conf/train.yaml)."""

    seed: int = setting(
        42,
        "Seed of data order, dropout and, unless selection.seed is set, of the draw.",
        range="[0, 4294967295]",
    )
    output_dir: str = setting(
        REQUIRED, "The run's directory. An unfinished run there is continued; a finished run is left as it is."
    )
    resume: bool = setting(False, "Without output_dir: continue the newest unfinished run of the same configuration.")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank processes in an optimizer step."""
        return self.train.batch_size // (self.train.micro_batch_size * self.engine.ranks)


@dataclass
class PlanConfig(RunConfig):
    """Keys of `hft plan`: those of `hft train`, and facts about the machines. It trains and writes nothing."""

    gpu_memory: float | None = setting(
        None, "Memory of a GPU: marks the engines that fit into it under the worst draw.", unit="GiB", range="(0, inf)"
    )
    tflops: float | None = setting(
        None,
        "Peak rate of a GPU in the dtype of training, for an estimate of hours (bfloat16: A100 312, H100 989).",
        unit="TFLOP/s",
        range="(0, inf)",
    )
    utilization: float = setting(
        0.4, "Share of tflops that training reaches. This is an assumption: measure yours.", range="(0, 1]"
    )
    rows: int | None = setting(
        None, "Rows of each training set that is not on this machine.", unit="rows", range="[1, inf)"
    )
    row_tokens: int | None = setting(
        None,
        "Average length of a row; null: every row has train.max_length tokens. The memory estimate does not use it.",
        unit="tokens",
        range="[1, inf)",
    )


def read_config(run: RunDir) -> RunConfig:
    """The sealed configuration of a run.

    Raises:
        UserError: if it is missing or not one of ours.
    """
    import yaml

    try:
        values = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or no such date
        raise UserError(f"{run.config} cannot be read: {error}".splitlines()[0]) from None
    if not isinstance(values, dict):
        raise UserError(f"{run.config} is not the configuration of a run.")
    suite = values.get("suite")
    if isinstance(suite, dict) and isinstance(suite.get("allow_code"), bool):  # as earlier versions wrote it
        suite["allow_code"] = str(suite["allow_code"]).lower()
    _move_lora(values)
    config: RunConfig = from_dict(RunConfig, values)
    require_type(asdict(config), RunConfig, run.config)
    require_type([config.data.path, config.data.test_path], list[str | list[str] | None], f"{run.config}, data")
    return config


def _move_lora(values: dict[str, Any]) -> None:
    """Earlier versions had LoRA among the strategies of continual learning."""
    continual = values.get("continual")
    if not isinstance(continual, dict):
        return
    old = {key: continual.pop(f"lora_{key}") for key in ("rank", "alpha", "dropout") if f"lora_{key}" in continual}
    if old:
        values["lora"] = old
    if continual.get("name") == "lora" and isinstance(values.get("method"), dict):
        continual["name"], values["method"]["name"] = "seqft", "lora"


# The commands that compose a config, and its class.
SCHEMAS: dict[str, type[Any]] = {"train": RunConfig, "plan": PlanConfig, "eval": EvalConfig}
