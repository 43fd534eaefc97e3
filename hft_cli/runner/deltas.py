"""Models from deltas: the model after any round of a run, and a delta to publish. No torch.

The model after round K is the base with the deltas of rounds 1 to K applied in order, so that the base and the run's
directory give every round's model again, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.deltas import apply_deltas, write_delta_file
from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.checkpoint.tensors import read_header
from hft_cli.config.schema import read_config
from hft_cli.errors import UserError
from hft_cli.files import flatten, new_folder, read_json, read_record, write_json, write_text
from hft_cli.method.rounds import phases
from hft_cli.paths import resolve_path
from hft_cli.run_dir import Ledger, PlanRecord, RoundDir, RunDir
from hft_cli.runner.base import find_base
from hft_cli.runner.companions import companions
from hft_cli.text import format_score, markdown_table

# The files of a published delta.
ABOUT = "hft.json"
DELTA = "delta.safetensors"


@dataclass(frozen=True)
class DeltaRecord:
    """What must be in hft.json of a published delta."""

    base_sha256: str


def materialize(run: RunDir, number: int | None, out: Path, base: str | Path | None = None) -> None:
    """Write the model that a run had after round `number` (None: the last) to the new folder `out`.

    `base` is where the model that the run started from is now; None takes what the run recorded.

    Raises:
        UserError: if the round is missing, the base is missing or has other weights, or `out` exists.
    """
    _require_new(out)
    folders = _finished_rounds(run, number)
    deltas = [folder.delta for folder in folders]
    folder = find_base(run, base)
    apply_deltas(folder, deltas, out, companions(folders[-1], folder, read_config(run).model.changes_template))


def publish(run: RunDir, number: int | None, out: Path) -> None:
    """Write the changes up to round `number` (None: the last) as one delta to publish.

    The new folder `out` gets the tensors, the base's hash and a model card.

    Raises:
        UserError: if the round is missing, or `out` exists.
    """
    _require_new(out)
    folders = _finished_rounds(run, number)
    # A later round's tensor replaces an earlier one's.
    tensors = {name: tensor for folder in folders for name, tensor in read_header(folder.delta).items()}
    about = _about(run, len(folders))
    metadata = {"base_sha256": about["base_sha256"]}
    template = folders[-1].template if read_config(run).model.changes_template else None
    with new_folder(out) as part:
        write_delta_file(tensors, part / DELTA, metadata)
        for file in (template, folders[-1].answer_end):
            if file is not None and file.exists():
                write_text(part / file.name, file.read_text(encoding="utf-8"))
        write_json(part / ABOUT, about)
        write_text(part / "README.md", _card(about, out.resolve().name))


def apply(delta: Path, base: str, out: Path) -> None:
    """Write the model that a published delta and its base (a folder or a hub name) give to the new folder `out`.

    Raises:
        UserError: if `delta` is no published delta, the base is not the one that it belongs to, or `out` exists.
    """
    _require_new(out)
    if not (delta / ABOUT).exists() or not (delta / DELTA).exists():
        raise UserError(f"{delta} is neither a run nor a published delta: it has no {ABOUT} and {DELTA}.")
    folder = model_folder(resolve_path(str(base)), "base")
    sha256 = read_record(delta / ABOUT, DeltaRecord)["base_sha256"]
    if weights_hash(folder) != sha256:
        raise UserError(f"The weights in {folder} are not those that {delta} was made from (SHA-256 {sha256[:12]}…).")
    apply_deltas(folder, [delta / DELTA], out, companions(RoundDir(delta), folder, True))


def _require_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"out={out} exists already. Choose a new folder.")


def _finished_rounds(run: RunDir, number: int | None) -> list[RoundDir]:
    """The directories of all phases up to the end of a round, in order. Each has its delta."""
    config = read_config(run)
    if not config.method.save_model:
        raise UserError(f"{run.folder} wrote no deltas (method.save_model=false).")
    plan = phases(config)
    last = plan[-1].round if number is None else number
    if not 1 <= last <= plan[-1].round:
        raise UserError(f"round={last} is not one of the rounds of {run.folder}: 1 to {plan[-1].round}.")
    folders = []
    for phase in plan:
        if phase.round > last:
            break
        folder = run.round(phase.number, phase.name)
        if not folder.outcome.exists() or not folder.delta.exists():
            raise UserError(f"Round {phase.round}, {phase.name}, of {run.folder} is unfinished, or its delta is gone.")
        folders.append(folder)
    return folders


def _about(run: RunDir, count: int) -> dict[str, Any]:
    """The record of a delta of the first `count` phases. The base is named by its hub name, or else by its label."""
    config, plan = read_config(run), read_record(run.plan, PlanRecord)
    path = str(config.model.path)
    results = read_json(run.results) if run.results.exists() and count == len(phases(config)) else {}
    return {
        "base": path if path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists() else None,
        "base_label": config.model.name,
        "base_sha256": plan["base_sha256"],
        "method": config.method.name,
        "rounds": [
            {key: entry[key] for key in ("round", "name", "level", "ratio", "seed", "updated_fraction", "sha256")}
            for entry in read_record(run.draws, Ledger)["rounds"][:count]
        ],
        "eval": results.get("eval", {}),
        "verified": results.get("verification", {}).get("passed"),
    }


def _card(about: dict[str, Any], name: str) -> str:
    """The model card, in the hub's format: what the delta is, what was updated, its scores, and how to load it."""
    from jinja2 import Template

    rounds = [
        [str(r["round"]), r["name"], r["level"], f"{r['ratio']:g}", str(r["seed"]), f"{r['updated_fraction']:.1%}"]
        for r in about["rounds"]
    ]
    scores = _score_rows(about["eval"])
    template = Template(
        (Path(__file__).parent / "delta_card.md.jinja").read_text(encoding="utf-8"), keep_trailing_newline=True
    )
    card: str = template.render(
        about,
        name=name,
        rounds_table=markdown_table(["round", "data", "selection", "ratio", "seed", "updated"], rounds),
        scores_table=markdown_table(["score", "metric", "base", "this"], scores) if scores else "",
    )
    return card


def _score_rows(scores: dict[str, Any]) -> list[list[str]]:
    """A row for each task that was scored before and after: its first metric; shares are in percent."""
    rows = []
    before = flatten(scores.get("before", {}), separator="/")
    for suite, tasks in scores.get("after", {}).items():
        for task, values in tasks.items():
            metric, after = next(iter(values.items()))
            if (start := before.get(f"{suite}/{task}/{metric}")) is not None:
                scores_text = [format_score(metric, value) for value in (start, after)]
                rows.append([f"{suite}/{task}", metric.replace("_", " "), *scores_text])
    return rows
