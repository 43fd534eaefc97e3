"""What `hft train` prints at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_cli.config.settings import WITHOUT_TRAINING
from hft_cli.evaluation.score_files import notes_on, read_scores
from hft_cli.files import read_record
from hft_cli.report.items import change_cell, score_cell, score_changes
from hft_cli.report.reading import read_run
from hft_cli.report.tables import Column, plain
from hft_cli.run_dir import ResultsRecord, RunDir
from hft_cli.text import mebibytes, text_table

Entry = Mapping[str, Any]  # one of the rounds in results.json

ROUND_COLUMNS: dict[str, Callable[[Entry], str]] = {
    "round": lambda entry: entry["name"],
    "updated": lambda entry: f"{entry['updated_fraction']:.1%}",
    "steps": lambda entry: str(entry["steps"]),
    "mean loss": lambda entry: f"{entry['loss']:.3f}",
    "seconds": lambda entry: f"{entry['train_seconds']:.1f}",
    "tokens/s": lambda entry: f"{entry['tokens_per_second']:,.0f}",
    "peak memory": lambda entry: mebibytes(entry["peak_memory_bytes"]),
    "frozen weights": lambda entry: _frozen(entry),
}

COLUMNS_WITHOUT_TRAINING = ("round", "updated", "seconds")  # nothing was trained

SCORE_COLUMNS: list[Column] = [
    ("score", plain("task")),
    ("metric", lambda record: str(record["metric"]).replace("_", " ")),
    ("before", score_cell("before")),
    ("after", score_cell("after")),
    ("change in points [95%]", change_cell),
    ("lost", plain("lost")),
    ("gained", plain("gained")),
]


def _frozen(entry: Entry) -> str:
    if not entry["frozen_bit_identical"]:
        return "CHANGED"
    return "bit-identical" if entry["updated_fraction"] < 1 else "none"


def summary(run: RunDir) -> str:
    """What a finished run did and scored, in a few lines."""
    results = read_record(run.results, ResultsRecord)
    rounds, sequence = results["rounds"], results["continual"]
    names = COLUMNS_WITHOUT_TRAINING if results["stage"] in WITHOUT_TRAINING else tuple(ROUND_COLUMNS)
    shown_rounds = [entry for entry in rounds if results["stage"] in WITHOUT_TRAINING or "steps" in entry]
    parts = [text_table(names, [[ROUND_COLUMNS[name](entry) for name in names] for entry in shown_rounds])]
    if changes := score_changes(read_run(run)):
        shown = [column for column in SCORE_COLUMNS if any(column[1](change) for change in changes)]
        cells = [[cell(change) for _, cell in shown] for change in changes]
        parts.append(text_table([heading for heading, _ in shown], cells))
    if "R" in sequence:
        parts.append(_task_matrix(sequence))
    parts += _notes(rounds)
    if notes := _score_notes(run):
        parts.append("\n".join(notes))
    folder = run.folder.relative_to(Path.cwd()) if run.folder.is_relative_to(Path.cwd()) else run.folder
    if run.model.exists():
        parts.append(f"Model: {folder / run.model.name}   everything else: {folder}   check: hft verify {folder}")
    return "\n\n".join(parts)


def _notes(rounds: Sequence[Entry]) -> list[str]:
    """Checkpoints, rewards of DPO, tensors that did not move, and rows that were cut or left out."""
    notes = []
    for entry in rounds:
        if "checkpoint_bytes" in entry:
            cost = f"{entry['checkpoint_seconds']:.1f} s and {mebibytes(entry['checkpoint_bytes'])}"
            notes.append(f"{entry['name']}: a checkpoint took {cost}.")
        if "rewards/margins" in entry:
            margin, accuracy = entry["rewards/margins"], entry["rewards/accuracies"]
            notes.append(f"{entry['name']}: reward margin {margin:.3f}, accuracy {accuracy:.1%}.")
    if unmoved := [name for entry in rounds for name in entry.get("unmoved", ())]:
        notes.append(f"{len(unmoved)} updated tensors did not move, such as {unmoved[0]}; see hft verify.")
    truncated, dropped = (sum(entry.get(key, 0) for entry in rounds) for key in ("rows_truncated", "rows_dropped"))
    if truncated or dropped:
        notes.append(f"Rows cut at train.max_length: {truncated}; left out (see results.json): {dropped}.")
    return notes


def _score_notes(run: RunDir) -> list[str]:
    """Notes on the scores after the run, as `hft eval` gives them."""
    notes = []
    for file in sorted((run.folder / "eval" / "after").glob("*/*.json")):
        notes += notes_on(f"{file.parent.name}/{file.stem}", *read_scores(file))
    return notes


def _task_matrix(sequence: Mapping[str, Any]) -> str:
    """R in percent: a row after each round, a column for each task. A cell is empty if the task was not scored."""
    tasks = sequence["tasks"]
    rows = [
        [f"after {task}", *("" if value is None else f"{value:.1%}" for value in row)]
        for task, row in zip(tasks, sequence["R"], strict=True)
    ]
    measures = f"OP {100 * sequence['OP']:.1f}   BWT {100 * sequence['BWT']:+.1f} (absolute points)"
    return f"{text_table(['R', *tasks], rows)}\n{measures}"
