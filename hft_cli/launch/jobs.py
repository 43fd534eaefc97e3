"""The protocol between a parent and its workers: job files, the progress file, and which worker does which job.

The parent writes a job file and starts `python -m hft_cli.launch.work`, which calls the worker's function. While it
works, the worker writes progress.json; a user's mistake that only it could see goes into mistake.txt.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.config.schema import ModelConfig, RunConfig
from hft_cli.config.suites import ProbeConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.data.files import ANY_HUB, Hub
from hft_cli.files import read_json, require_type, write_json
from hft_cli.method.rounds import Phase


@dataclass(frozen=True)
class PhaseJob:
    """Train one phase.

    Attributes:
        model: folder of the weights that the phase starts from.
        metrics: the run's metrics.jsonl.
        updated, frozen: names of parameters.
        adapter: folder of the LoRA adapters to continue with.
        base_sha256: hash of the weights that the run started from.
        deepspeed: DeepSpeed's settings; empty without DeepSpeed.
    """

    config: RunConfig
    phase: Phase
    model: str
    metrics: str
    updated: tuple[str, ...]
    frozen: tuple[str, ...]
    adapter: str | None = None
    base_sha256: str = ""
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsTask:
    """A set of rows to score a model on: a file or hub name and its part of it, the metric, the format of the rows.

    `special_tokens` is data.special_tokens.
    """

    path: str
    metric: str = "exact_match"
    format: str = "auto"
    hub: Hub = ANY_HUB
    special_tokens: str = "refuse"


@dataclass(frozen=True)
class RowsJob:
    """Score the model in the folder `path` on sets of rows; `tasks` is suite -> task -> rows.

    The parameters in `kept` go back to those of the model in the folder `base` first, and keep this share of their
    change, in memory only: a Half-Reset or an interpolation that writes no model.
    """

    model: ModelConfig
    path: str
    tasks: dict[str, dict[str, RowsTask]]
    batch_size: int | str
    generation: GenerationConfig
    seed: int
    base: str | None = None
    kept: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeJob:
    """Score the model in the folder `path` on probes; `outs` is probe -> file of its scores.

    The scores of single items go beside that file, as .jsonl. `limit` is the number of facts of each relation.
    """

    model: ModelConfig
    path: str
    probes: dict[str, ProbeConfig]
    outs: dict[str, str]
    limit: int | None
    chat: bool
    batch_size: int | str
    seed: int


@dataclass(frozen=True)
class HarnessTask:
    """A benchmark of lm-evaluation-harness, and the file `out` of its scores, with those of its items beside it.

    `settings` is a BenchmarkConfig as plain values, or None for a task that is known to the harness only.
    """

    name: str
    settings: dict[str, Any] | None
    limit: int | None
    chat: bool
    out: str


@dataclass(frozen=True)
class HarnessJob:
    """Score the model in the folder `path` on benchmarks, from the files in `data_dir` or else from the hub.

    `backend` is the program that generates answers.
    """

    model: ModelConfig
    path: str
    todo: tuple[HarnessTask, ...]
    data_dir: str | None
    batch_size: int | str
    seed: int
    include_path: str | None = None
    backend: str = "transformers"


@dataclass(frozen=True)
class ImportanceJob:
    """Measure the importance of the matrices of the model in the folder `path` on at most `limit` rows of a set.

    `out` is the name of the file to write, in the folder of the job.
    """

    model: ModelConfig
    path: str
    rows: str
    limit: int
    out: str


Job = PhaseJob | RowsJob | HarnessJob | ProbeJob | ImportanceJob


@dataclass(frozen=True)
class Worker:
    """How a kind of job is done: the name of its job file, and the MODULE:FUNCTION that does it.

    Only the worker's process imports the function. It is called with (job, folder, progress).
    """

    job: type[Any]
    file: str
    function: str


# By the name of the job's class, which is the first argument of launch/work.py.
WORKERS = {
    "PhaseJob": Worker(PhaseJob, "step.json", "hft_cli.training.worker:train"),
    "RowsJob": Worker(RowsJob, "job.json", "hft_cli.evaluation.rows_worker:score_rows"),
    "HarnessJob": Worker(HarnessJob, "harness.json", "hft_cli.evaluation.harness_worker:score_benchmarks"),
    "ImportanceJob": Worker(
        ImportanceJob, "importance_job.json", "hft_cli.evaluation.importance_worker:measure_importance"
    ),
    "ProbeJob": Worker(ProbeJob, "probe.json", "hft_cli.evaluation.probe_worker:score_probes"),
}


def write_job(job: Job, folder: Path) -> Path:
    """Write the job file, a JSON object with the fields of the job, into a folder and return its path."""
    path = folder / WORKERS[type(job).__name__].file
    write_json(path, asdict(job))
    return path


def read_job(kind: str, path: Path) -> Any:
    """Read the job file of a key of WORKERS; UserError if it is not as the parent wrote it."""
    return require_type(read_json(path), WORKERS[kind].job, path)


class Progress:
    """Writes progress.json, from which the parent draws its progress bar. Only rank 0 writes it.

    The file holds one JSON object:
        activity: what the worker does besides counting, for example "loading torch", or null.
        step, total: how much is done and how much there is (optimizer steps, rows); null before the count starts.
        loss: the last loss, or null.
        validation_loss: the last one, or null.
        tokens_per_second: or null.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self.rank = path, rank
        names = ("activity", "step", "total", "loss", "validation_loss", "tokens_per_second")
        self.values: dict[str, Any] = dict.fromkeys(names)
        self.tokens, self.start = 0, 0.0

    def activity(self, text: str | None) -> None:
        """Say what the worker does now; the count stays as it is."""
        self._write(activity=text)

    def count(
        self, step: int, total: int, loss: float | None = None, rate: float | None = None, activity: str | None = None
    ) -> None:
        """Say that `step` of `total` is done, at `rate` tokens per second."""
        self._write(step=step, total=total, loss=loss, tokens_per_second=rate, activity=activity)

    def validated(self, loss: float) -> None:
        """Say that the loss on the validation rows is `loss`."""
        self._write(validation_loss=loss)

    def begin(self, total: int) -> None:
        """Start to count `total` items with `advance`."""
        self.tokens, self.start = 0, time.perf_counter()
        self.values |= {"step": 0, "total": total}

    def advance(self, items: int, tokens: int) -> None:
        """Add to the items and tokens that are done since `begin`."""
        self.tokens += tokens
        rate = self.tokens / max(time.perf_counter() - self.start, 1e-9)
        self.count(self.values["step"] + items, self.values["total"], rate=rate)

    def _write(self, **values: Any) -> None:
        self.values |= values
        if self.rank != 0:
            return
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values), encoding="utf-8")
        part.replace(self.path)
