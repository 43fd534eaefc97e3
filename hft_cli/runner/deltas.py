"""Models out of deltas: that of any round of a run, and a delta by itself, to publish. No torch.

The model after round K is the base with the deltas of rounds 1 to K laid over it, the later before the earlier. So that
of every round can be had again, bit for bit, from the base and the run's directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hft_cli.checkpoint.deltas import apply_deltas, write_delta_file
from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.checkpoint.tensors import read_header
from hft_cli.config.schema import read_config
from hft_cli.errors import UserError
from hft_cli.files import read_json, write_json, write_text
from hft_cli.method.rounds import phases
from hft_cli.run_dir import RoundDir, RunDir
from hft_cli.text import markdown_table

ABOUT = "hft.json"  # what a published delta says of itself

DELTA = "delta.safetensors"


def materialize(run: RunDir, number: int | None, out: Path) -> None:
    """Write the model that a run had after round `number` (None: its last) to the folder `out`.

    Raises:
        UserError: if the round or the base is not there, the base's weights have changed, or `out` is there already.
    """
    _new(out)
    config, plan = read_config(run), read_json(run.plan)
    done = _rounds(run, number)
    base = model_folder(plan["base"])
    _same_base(base, plan["base_sha256"], "the run began with")
    apply_deltas(base, [folder.delta for folder in done], out, _template(done[-1], config.model.chat_template))


def publish(run: RunDir, number: int | None, out: Path) -> None:
    """Write what round `number` (None: the last) and those before it changed as a delta to publish: a folder with the
    tensors, the base's hash, and a model card.

    Raises:
        UserError: if the round is not there, or `out` is there already.
    """
    _new(out)
    plan, done = read_json(run.plan), _rounds(run, number)
    changes = {name: tensor for folder in done for name, tensor in read_header(folder.delta).items()}
    about = _about(run, plan, len(done))
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    write_delta_file(
        {name: [tensor] for name, tensor in changes.items()}, part / DELTA, {"base_sha256": plan["base_sha256"]}
    )
    for name, text in _template(done[-1], read_config(run).model.chat_template).items():
        write_text(part / name, text)
    write_json(part / ABOUT, about)
    write_text(part / "README.md", _card(about, out.resolve().name))
    part.rename(out)


def apply(delta: Path, base: str, out: Path) -> None:
    """Write the model that a published delta makes of its base (a folder or a hub name) to the folder `out`.

    Raises:
        UserError: if it is no such delta, the base is not the one that it was made from, or `out` is there already.
    """
    _new(out)
    if not (delta / ABOUT).exists() or not (delta / DELTA).exists():
        raise UserError(f"{delta} is neither a run nor a published delta: it has no {ABOUT} and {DELTA}.")
    folder = model_folder(base, "base")
    _same_base(folder, read_json(delta / ABOUT)["base_sha256"], f"{delta} was made from")
    apply_deltas(folder, [delta / DELTA], out, _template(RoundDir(delta), "as published"))


def _template(folder: RoundDir, asked: str | None) -> dict[str, str]:
    """The chat template that goes with the model, by file name; none where it is the base's own."""
    there = asked is not None and folder.template.exists()
    return {folder.template.name: folder.template.read_text()} if there else {}


def _new(out: Path) -> None:
    if out.exists():
        raise UserError(f"out={out} is there already. Choose a new folder.")


def _same_base(base: Path, sha256: str, what: str) -> None:
    if weights_hash(base) != sha256:
        raise UserError(f"The weights in {base} are not those that {what} (SHA-256 {sha256[:12]}…).")


def _rounds(run: RunDir, number: int | None) -> list[RoundDir]:
    """The directories of the steps up to the end of a round, in order; each has its delta."""
    config = read_config(run)
    if not config.method.save_model:
        raise UserError(f"{run.folder} wrote no deltas (method.save_model=false).")
    planned = phases(config)
    last = planned[-1].round if number is None else number
    if not 1 <= last <= planned[-1].round:
        raise UserError(f"round={last} is not one of the rounds of {run.folder}: 1 to {planned[-1].round}.")
    wanted = [(step, run.round(step.number, step.name)) for step in planned if step.round <= last]
    for step, folder in wanted:
        if not folder.outcome.exists() or not folder.delta.exists():
            raise UserError(f"Round {step.round}, {step.name}, of {run.folder} is not finished, or its delta is gone.")
    return [folder for _, folder in wanted]


def _about(run: RunDir, plan: dict[str, Any], count: int) -> dict[str, Any]:
    """What a delta says of itself; the base by its hub name, or by the model's label if it lies in a folder."""
    config = read_config(run)
    path = str(config.model.path)
    results = read_json(run.results) if run.results.exists() and count == len(plan["rounds"]) else {}
    drawn = read_json(run.draws)["rounds"][:count]
    return {
        "base": path if path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists() else None,
        "base_label": config.model.name,
        "base_sha256": plan["base_sha256"],
        "method": config.method.name,
        "rounds": [
            {key: entry[key] for key in ("round", "name", "level", "ratio", "seed", "updated_fraction", "sha256")}
            for entry in drawn
        ],
        "eval": results.get("eval", {}),
        "verified": results.get("verification", {}).get("passed"),
    }


def _card(about: dict[str, Any], name: str) -> str:
    """The model card, in the hub's format: what it is, what was updated, its scores, and how to load it."""
    base = about["base"] or "BASE"
    rounds = [
        [str(r["round"]), r["name"], r["level"], f"{r['ratio']:g}", str(r["seed"]), f"{r['updated_fraction']:.1%}"]
        for r in about["rounds"]
    ]
    front = [
        "---",
        *([f"base_model: {about['base']}"] if about["base"] else []),
        "tags: [hft, half-fine-tuning]",
        "---",
    ]
    parts = [
        f"# {name}",
        f"What fine-tuning changed of {about['base'] or about['base_label']}, as whole matrices (method "
        f"`{about['method']}` of `hft`; Half Fine-Tuning: Hui et al., ACL 2025). All else is the base's, bit for bit. "
        f"SHA-256 over the base's weight files: `{about['base_sha256']}`; another base is refused.",
        f"```\nhft materialize {name} base={base} out=model\n```",
        'Then `AutoModelForCausalLM.from_pretrained("model")`.',
        markdown_table(["round", "data", "selection", "ratio", "seed", "updated"], rounds),
    ]
    scores = [
        [f"{suite}/{task}", metric.replace("_", " "), f"{100 * before:.1f}", f"{100 * after[metric]:.1f}"]
        for suite, tasks in about["eval"].get("after", {}).items()
        for task, after in tasks.items()
        for metric in [next(iter(after))]
        if (before := about["eval"].get("before", {}).get(suite, {}).get(task, {}).get(metric)) is not None
    ]
    if scores:
        parts.append(markdown_table(["score (%)", "metric", "base", "this"], scores))
    return "\n".join(front) + "\n\n" + "\n\n".join(parts) + "\n"
