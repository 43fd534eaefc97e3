"""Read and check everything that a run needs before it starts. Nothing is written."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import known_weights_hash, model_folder, stored_tensors
from hft_cli.checkpoint.interpolation import Blend, StoredModel, blends
from hft_cli.checkpoint.model_config import check_companions, read_model_config
from hft_cli.checkpoint.parameters import parameters_from_folder, require_trainable
from hft_cli.checkpoint.same_function import require_same_function
from hft_cli.config.data_sets import test_format
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import PlanConfig, RunConfig, TrackingConfig, read_config
from hft_cli.data.mixing import read_mixed, validation_rows
from hft_cli.data.model_template import check_thinking, dated, stored_template
from hft_cli.data.rows import count_repeats, read_chats
from hft_cli.data.templates import NO_TEMPLATE, read_template, template_file
from hft_cli.errors import UserError
from hft_cli.evaluation.suite import Suite, read_suite, uses_chat_template
from hft_cli.evaluation.texts import METRIC
from hft_cli.evaluation.vllm_engine import check_backend
from hft_cli.files import flatten, hash_values
from hft_cli.launch.environment import environment
from hft_cli.method.interpolation import kept_changes
from hft_cli.method.rounds import Phase, draws, phases, with_model_limits
from hft_cli.method.selection import Draw
from hft_cli.paths import resolve_path
from hft_cli.plan.automatic import automatic
from hft_cli.plan.planner import plan as make_plan
from hft_cli.plan.planner import slow_packing
from hft_cli.plan.preflight import preflight
from hft_cli.run_dir import RunDir
from hft_cli.runner.base import base_record, recorded_revision
from hft_cli.runner.importance import Importance, importance_of

# Keys that may differ between the nodes of a run.
FREE = (
    "output_dir",
    "resume",
    "engine.node_rank",
    "engine.rendezvous",
    "engine.check_memory",
    *(f"tracking.{spec.name}" for spec in fields(TrackingConfig)),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that is known of a run before it starts.

    `base` is the folder of the model that the run starts from; there is a draw for each phase. `record` is the content
    of plan.json, `deepspeed` that of deepspeed.json (empty without DeepSpeed).
    `importance` is what selection=importance has drawn by.
    """

    config: RunConfig
    base: Path
    phases: tuple[Phase, ...]
    draws: tuple[Draw, ...]
    suite: Suite
    record: dict[str, Any]
    deepspeed: dict[str, Any]
    importance: Importance | None = None


def fetch_model(config: RunConfig, run: RunDir) -> tuple[RunConfig, Path]:
    """The config with automatic values and the model's limits, and the folder of the model to start from.

    The model is downloaded if it is a hub's. If `run` is an unfinished run of a hub's model, the commit that it started
    from is taken. Raises UserError if there is no such model, or it cannot do what the config asks for.
    """
    path = config.model.path
    base = model_folder(resolve_path(path), revision=recorded_revision(run, path) or config.model.revision)
    config = automatic(config, folder=base)
    return with_model_limits(config, read_model_config(base / "config.json", config.model.part), base.name), base


def with_date(config: RunConfig, base: Path, run: RunDir) -> RunConfig:
    """The config with the day that the chat template writes: of a run that is continued, the one on which it began.

    Without this, a run that goes on for days or is continued would train and score on other tokens than it began with.
    """
    begun = read_config(run).model.date if run.config.exists() else None
    return replace(config, model=dated(config.model, base, begun))


def prepare(config: RunConfig, base: Path, run: RunDir) -> Prepared:
    """Read the data, draw the selections and estimate the costs of a run; `config` and `base` are from `fetch_model`.

    Raises:
        UserError: for a mistake in the config or the data, or a machine that cannot do the run.
    """
    params = parameters_from_folder(base, config.model.kinds, config.model.part)
    check_companions(base)
    plan, drawn = phases(config), draws(config, params)
    if not plan[0].trains:
        blended_tensors(config, drawn[0], stored_model(base, config), base)  # raises if the two models do not fit
        ignored = require_same_function(base, base_folder(config, base), config.model.part)
        if ignored:
            logger.info(f"config.json has other values than the base's, without an effect: {', '.join(ignored)}.")
    else:
        require_trainable(params, base)
        if not drawn[0].updated:
            raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    template = config.model.chat_template
    template_sha256 = None if template is None else hash_values(read_template(template_file(template)))
    check_thinking(config.model, base)
    check_backend("generation.backend", config.generation.backend)
    suite = read_suite(config.suite)
    uses_chat_template(config.suite, config.model, base)  # raises if suite.chat=true and the model has no template
    if any(task.metric != METRIC for task in suite.tasks.values()):
        _require_template(config, base)
    rounds = [asdict(phase) | {"data": phase.data} | rows_record(phase, config, base) for phase in plan]
    row_counts = {phase.number: row["rows"] for phase, row in zip(plan, rounds, strict=True) if "rows" in row}
    local = replace(config, model=replace(config.model, path=str(base)))  # not the hub's name: nothing to fetch
    costs = make_plan(PlanConfig(**vars(local)), row_counts)
    if config.model.part:
        logger.info(f"model.part={config.model.part}: {costs.model.source}")
    if hint := slow_packing(config):
        logger.warning(hint)
    preflight(config, costs, new=not run.config.exists())
    importance = importance_of(config, base, run)
    if importance is not None:
        drawn = draws(config, params, importance.scores)
    record = {
        "suite_sha256": suite.hashes,
        **base_record(config.model.path, base),
        "template_sha256": template_sha256,
        "rounds": rounds,
        "costs": costs.expected(),
    }
    return Prepared(config, base, plan, drawn, suite, record, deepspeed_settings(config), importance)


def _require_template(config: RunConfig, base: Path) -> None:
    """Raise UserError if there is no chat template. Rows of chats need one, trained on or scored."""
    if not stored_template(config.model, base):
        raise UserError(NO_TEMPLATE)


def node_facts(prepared: Prepared) -> dict[str, Any]:
    """What must be equal on all nodes of a run."""
    versions, record = environment(), prepared.record
    config = {key: value for key, value in flatten(asdict(prepared.config)).items() if key not in FREE}
    data = {f"the data of {row['name']}": row["data_sha256"] for row in record["rounds"]}
    return {
        "versions": {"hft": versions["hft"], "python": versions["python"], **versions["packages"]},
        "config": config | {"the model's folder": str(prepared.base)},
        "files": {"weights": record["base_sha256"], **record["base_files"], **data},
    }


def blended_tensors(config: RunConfig, draw: Draw, tuned: StoredModel, start: Path) -> dict[str, Blend]:
    """What a Half-Reset or an interpolation makes of a tuned model; UserError if it and its base do not fit.

    `start` is the folder of the model that the run began with. It is the base, unless there is model.base.
    """
    kept = kept_changes(tuned.params, draw.updated, config.method)
    return blends(tuned, stored_model(base_folder(config, start), config), kept, config.method.shared_rows)


def stored_model(folder: Path, config: RunConfig) -> StoredModel:
    params = parameters_from_folder(folder, config.model.kinds, config.model.part)
    return StoredModel(folder, params, stored_tensors(folder))


def base_folder(config: RunConfig, start: Path) -> Path:
    """The folder of the model that tensors go back to."""
    if config.model.base is None:
        return start
    return model_folder(resolve_path(config.model.base), "model.base")


def rows_record(phase: Phase, config: RunConfig, base: Path) -> dict[str, Any]:
    """What plan.json records of a phase's data; UserError for a bad row.

    These are `data_sha256` (without training: the hash of the base's weights), `rows`, `parts` (what is taken of
    each set), and with a test set `test_sha256` and, for SFT, the number of rows that repeat an earlier one or are in
    the test set too.
    """
    data = config.data
    if not phase.trains:
        record: dict[str, Any] = {"data_sha256": known_weights_hash(base_folder(config, base))}
    else:
        mixed = read_mixed(phase.stage, phase.sources, config, phase.validation)
        chats = mixed.rows
        if any(facts.get("shapes", {}).keys() != {"text"} for facts in chats.facts):
            _require_template(config, base)
        record = {"data_sha256": chats.sha256(), "rows": len(chats), "parts": [vars(part) for part in mixed.parts]}
    if phase.validation is not None:
        rows = validation_rows(phase.stage, mixed.held_out, config, phase.validation)
        repeated, shared = count_repeats(chats.digests(), rows.digests())
        record |= {"validation_sha256": rows.sha256(), "validation_rows": len(rows), "rows_in_validation": shared}
        if shared:
            logger.warning(f"{phase.name}: {shared:,} of {len(chats):,} rows are in the validation set too.")
    if phase.test is None:
        return record
    _require_template(config, base)
    test = read_chats(resolve_path(phase.test), format=test_format(data), split="test", hub=phase.test_hub)
    record["test_sha256"] = test.sha256()
    if phase.stage == "sft" and not phase.replays:
        repeated, shared = count_repeats(chats.digests(), test.digests())
        record |= {"rows_repeated": repeated, "rows_in_test": shared}
        if repeated or shared:
            logger.warning(
                f"{phase.name}: of {len(chats):,} rows {repeated:,} repeat an earlier one and {shared:,} are in the "
                "test set too."
            )
    return record
