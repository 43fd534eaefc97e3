"""Config of what is scored: a suite, and its entries for benchmarks and probes."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from hft_cli.config.settings import BACKENDS, REQUIRED, setting


@dataclass
class SuiteConfig:
    """Group `suite`: what is scored, by `hft train` before and after training, by `hft eval` for any model."""

    name: str = setting(REQUIRED, "Label in tables.")
    tasks: dict[str, str] = setting(
        {}, "Map from task to rows (as in data.path). A row counts if greedy decoding gives exactly its last answer."
    )
    text: dict[str, str] = setting(
        {},
        "Map from task to plain text that is not trained on, a .txt file or rows of {text: …}: its bits per byte are "
        "measured.",
    )
    batch_size: int | str = setting(
        64,
        "Rows scored or prompts answered at once. auto: as many as the memory of the GPU takes, up to 64.",
        unit="rows",
        range="[1, inf)",
        choices=("auto",),
    )
    backend: str = setting(
        "transformers",
        "The program that generates the answers to benchmarks. vllm, which must be installed, is faster for many "
        "prompts. generation.backend is that of test sets.",
        choices=BACKENDS,
    )
    seed: int = setting(
        42,
        "Seed of sampled answers and of a probe's examples. It is the same for all runs, so that all get the same "
        "prompts.",
        range="[0, inf)",
    )
    benchmarks: dict[str, Any] = setting(
        {},
        "Map from benchmark to its settings (task, shots, metric, chat, until, limit, sampling). conf/suite/ gives the "
        "source of each.",
    )
    harness: list[str] = setting(
        [], "More tasks, groups or tags of lm-evaluation-harness, with the harness's settings."
    )
    include_path: str | None = setting(
        None, "Folder with task files (YAML) in the harness's format, which suite.harness may name."
    )
    only: list[str] = setting([], "Run only these benchmarks of the suite; empty: all.")
    probe: dict[str, Any] = setting(
        {}, "Map from probe to its facts and settings: the right answer is ranked among wrong ones of its relation."
    )
    data_dir: str | None = setting(
        None,
        "Folder with the benchmarks' files, one sub-folder for each; nothing is downloaded. null: rows from the hub.",
    )
    limit: int | None = setting(
        None,
        "Items of each task of a benchmark (MMLU: subject; probe: relation). suite.tasks and suite.text have no limit. "
        "null: all.",
        unit="items",
        range="[1, inf)",
    )
    chat: str = setting(
        "auto",
        "Whether prompts go through the chat template; auto: if there is one and the benchmark wants it.",
        choices=("auto", "true", "false"),
    )
    allow_code: str = setting(
        "false",
        "Run programs that the model writes (HumanEval), in a process with limits. Read hft_cli/evaluation/README.md "
        "first; root: also as the user root.",
        choices=("false", "true", "root"),
    )


@dataclass(frozen=True)
class ProbeConfig:
    """An entry of suite.probe: how a suite runs a probe."""

    facts: str = setting(
        MISSING,
        "JSON lines with relation, sub and obj, or rows of messages with a relation. Below suite.data_dir, or pocket:…",
    )
    patterns: str | None = setting(
        None, "JSON lines with relation and pattern, which contains [X] and [Y]; null: the subjects are questions."
    )
    wrong: int = setting(
        9, "Wrong answers for each fact; fewer if the relation has fewer objects.", unit="answers", range="[1, inf)"
    )
    paraphrases: int = setting(4, "Most paraphrases of each fact.", unit="paraphrases", range="[1, inf)")
    shots: int = setting(4, "Examples before the fact.", unit="examples", range="[0, inf)")


@dataclass(frozen=True)
class BenchmarkConfig:
    """An entry of suite.benchmarks: how a suite runs a benchmark. null: as the harness's task file says."""

    task: str | None = setting(
        None,
        "The harness's name of the task, with * for all of its parts (MMLU: subjects); null: as in `BENCHMARKS`.",
    )
    shots: int | None = setting(None, "Examples before the question.", unit="examples", range="[0, inf)")
    metric: str | None = setting(
        None, "The metric that is reported, with its filter after a comma; null: the task's first metric."
    )
    mean: str = setting(
        "items",
        "Several tasks: the mean over all items, or over tasks.",
        choices=("items", "tasks"),
    )
    chat: bool = setting(True, "Whether suite.chat=auto uses the chat template, if the model has one.")
    limit: int | None = setting(
        None, "Items of each task; the smaller of this and suite.limit applies.", unit="items", range="[1, inf)"
    )
    max_new_tokens: int | None = setting(None, "Longest generated answer.", unit="tokens", range="[1, inf)")
    until: tuple[str, ...] | None = setting(
        None, "Texts that end a generated answer; []: only the model ends it. null: those of the task."
    )
    multiturn: bool = setting(
        True, "With a chat template: examples are turns of the chat; false: they are in one turn with the question."
    )
    samples: int = setting(1, "Programs generated for each HumanEval problem.", unit="programs", range="[1, inf)")
    temperature: float = setting(
        0.0, "0: greedy decoding. Above 0: sampling, with the seed suite.seed.", range="[0, inf)"
    )
    top_p: float = setting(1.0, "Sampling: share of the probability mass that tokens are drawn from.", range="(0, 1]")
    pass_at: tuple[int, ...] = setting((), "The k of HumanEval's pass@k; each at most `samples`.", range="[1, inf)")
    source: str = setting("", "Where these settings come from.")
