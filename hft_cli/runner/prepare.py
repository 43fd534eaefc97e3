"""All that is known of a run before it starts, and whether a directory can take it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hft_cli.checkpoint.deltas import reset_tensors
from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.config.data_sets import test_format
from hft_cli.config.schema import EngineConfig, PlanConfig, RunConfig, TrackingConfig, read_config
from hft_cli.data.preferences import preferences_hash, read_preferences
from hft_cli.data.rows import content_hash, count_repeats, read_chats, read_sources
from hft_cli.errors import UserError
from hft_cli.evaluation.suite import Suite, read_suite, uses_template
from hft_cli.files import flatten, read_json, write_json, write_text
from hft_cli.launch.environment import environment
from hft_cli.method.rounds import Phase, draws, phases
from hft_cli.method.selection import Draw
from hft_cli.paths import resolve_path
from hft_cli.plan.planner import plan as make_plan
from hft_cli.plan.preflight import preflight
from hft_cli.run_dir import RunDir

# Keys that may differ between a run's nodes.
FREE = (
    "output_dir",
    "resume",
    "engine.node_rank",
    "engine.rendezvous",
    "engine.check_memory",
    *(f"tracking.{spec.name}" for spec in fields(TrackingConfig)),
)

logger = logging.getLogger(__name__)

# Keys that may differ when a run is continued; where the engine may not, within a round, the worker says why.
RESUMED = (*FREE, "train.micro_batch_size", *(f"engine.{spec.name}" for spec in fields(EngineConfig)))


@dataclass(frozen=True)
class Prepared:
    """All that is known of a run before it starts."""

    config: RunConfig
    base: Path
    phases: tuple[Phase, ...]
    drawn: tuple[Draw, ...]
    asked: Suite
    inputs: dict[str, Any]


def prepare(config: RunConfig, base: Path, where: RunDir) -> Prepared:
    """Read what the run needs besides the model at `base`, and refuse what cannot work; nothing is written.

    Raises:
        UserError: for a mistake in the config or the data, or a machine that cannot do it.
    """
    params = parameters_from_folder(base, config.model.kinds)
    plan, drawn = phases(config), draws(config, params)
    if not drawn[0].updated and plan[0].stage != "half_reset":
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    if plan[0].stage == "half_reset":
        half_reset_tensors(plan[0], drawn[0], base, config)  # whether the two models fit
    asked = read_suite(config.suite)
    uses_template(config.suite, config.model, base)  # or says why it cannot
    rounds = [asdict(step) | {"data": step.data} | rows_of_step(step, config) for step in plan]
    counted = {step.number: row["rows"] for step, row in zip(plan, rounds, strict=True) if "rows" in row}
    local = replace(config, model=replace(config.model, path=str(base)))  # of the hub's name: the folder it is in now
    costs = make_plan(PlanConfig(**vars(local)), counted)
    preflight(config, costs, new=not where.config.exists())
    inputs = {
        "suite_sha256": asked.rows,
        "base": str(base.resolve()),
        "base_sha256": weights_hash(base),
        "rounds": rounds,
        "costs": costs.expected(),
    }
    return Prepared(config, base, plan, drawn, asked, inputs)


def node_facts(prepared: Prepared) -> dict[str, Any]:
    """What must be the same on all nodes."""
    here, inputs = environment(), prepared.inputs
    data = {f"the data of {row['name']}": row["data_sha256"] for row in inputs["rounds"]}
    return {
        "versions": {"hft": here["hft"], "python": here["python"], **here["packages"]},
        "config": {key: value for key, value in flatten(asdict(prepared.config)).items() if key not in FREE}
        | {"the model's folder": str(prepared.base)},
        "files": {"weights": inputs["base_sha256"], **data},
    }


def clear_folder(folder: Path) -> None:
    """Empty a directory, and remove it if it is not a link or a place that we stand in."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink() and folder.resolve() != Path.cwd():
        folder.rmdir()


def half_reset_tensors(step: Phase, chosen: Draw, tuned: Path, config: RunConfig) -> dict[str, list[StoredTensor]]:
    folders = (tuned, model_folder(resolve_path(step.data), "model.base"))
    own, base = (parameters_from_folder(folder, config.model.kinds) for folder in folders)
    return reset_tensors(own, base, folders, chosen.updated, config.method.shared_rows)


def find_unfinished(config: RunConfig) -> RunDir:
    """The newest unfinished run of the same configuration among those in directories named by date."""
    root = Path(config.output_dir).parent.parent
    found = sorted(root.glob("*/*/plan.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (RunDir(path.parent) for path in found):
        try:
            if run.config.exists() and not run.done.exists() and not _differences(run, config):
                return run
        except UserError:  # something else's config.yaml
            continue
    raise UserError(f"There is no unfinished run of this configuration in {root}. Give its directory: output_dir=…")


def refuse_other_files(where: RunDir) -> None:
    if where.folder.exists() and not where.folder.is_dir():
        raise UserError(f"output_dir={where.folder} is a file. Choose an empty or a new directory.")
    ours = {
        where.overrides,
        where.environment,
        where.plan,
        where.draws,
        where.lock,
        where.nodes,
    }  # a start that was cut off
    there = set(where.folder.iterdir()) if where.folder.exists() else set()
    if others := sorted(path.name for path in there - ours if path.suffix != ".part"):
        raise UserError(
            f"output_dir={where.folder} has other files in it ({', '.join(others[:3])}). "
            "Choose an empty or a new directory."
        )


def seal(
    where: RunDir, config: RunConfig, overrides: Sequence[str], drawn: Sequence[Draw], inputs: dict[str, Any]
) -> None:
    """Write what the run is, config.yaml last: a directory with it has all the rest."""
    write_text(where.overrides, yaml.safe_dump(list(overrides), sort_keys=False))
    write_json(where.environment, environment())
    write_json(where.plan, inputs)
    names = [entry["name"] for entry in inputs["rounds"]]
    entries = [{"name": name, **chosen.as_dict()} for name, chosen in zip(names, drawn, strict=True)]
    write_json(where.draws, {"rounds": entries})
    write_text(where.config, yaml.safe_dump(asdict(config), sort_keys=False))


def same_config(where: RunDir, config: RunConfig) -> None:
    if different := _differences(where, config):
        raise UserError(
            f"{where.folder} holds a run of another configuration ({'; '.join(different[:3])}"
            f"{' …' if len(different) > 3 else ''}). Use the same configuration, or another output_dir."
        )


def _differences(where: RunDir, config: RunConfig) -> list[str]:
    old, new = flatten(asdict(read_config(where))), flatten(asdict(config))
    keys = sorted((old.keys() | new.keys()) - set(RESUMED))
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def same_inputs(where: RunDir, inputs: dict[str, Any]) -> None:
    sealed = read_json(where.plan)
    if sealed["base_sha256"] != inputs["base_sha256"]:
        raise UserError(
            f"The weights in {inputs['base']} have changed since {where.folder} was begun. "
            "Restore them, or start anew in another output_dir."
        )
    if sealed["suite_sha256"] != inputs["suite_sha256"]:
        raise UserError(
            f"The rows of suite={read_config(where).suite.name} have changed since {where.folder} was begun. "
            "Restore them, or start anew in another output_dir."
        )
    for old, new in zip(sealed["rounds"], inputs["rounds"], strict=True):
        for key, what in (("data_sha256", "data"), ("test_sha256", "test")):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"The {'test ' * (what == 'test')}data of round {old['name']} ({old[what]}) has changed since "
                    f"{where.folder} was begun. Restore it, or start anew in another output_dir."
                )


def rows_of_step(step: Phase, config: RunConfig) -> dict[str, Any]:
    """What is known of a step's rows: the hash of what it trains on (or of the weights that a Half-Reset puts back),
    that of its test set, and how many rows are repeated or in the test set too.

    Raises:
        UserError: for a bad row of either.
    """
    data = config.data
    if step.stage == "half_reset":
        known: dict[str, Any] = {"data_sha256": weights_hash(model_folder(resolve_path(step.data), "model.base"))}
    elif step.stage == "dpo":
        read = read_preferences(
            resolve_path(step.data), split=step.sources[0].split, max_rows=data.max_rows, ties=config.dpo.ties
        )
        known = {"data_sha256": preferences_hash(read.rows), "rows": len(read.rows)}
    else:
        chats = read_sources(step.sources, data, config.seed)
        known = {"data_sha256": content_hash(chats), "rows": len(chats)}
    if step.test is None:
        return known
    test = read_chats(resolve_path(step.test), format=test_format(data), split="test")
    known["test_sha256"] = content_hash(test)
    if step.stage == "sft" and not step.replays:
        repeated, shared = count_repeats(chats, test)
        known |= {"rows_repeated": repeated, "rows_in_test": shared}
        if repeated or shared:
            logger.warning(
                f"{step.name}: of {known['rows']:,} rows {repeated:,} repeat an earlier one and {shared:,} are in the "
                "test set too."
            )
    return known
