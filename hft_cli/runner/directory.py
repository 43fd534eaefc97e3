"""The directory of a run: begin a new run in it, or continue the unfinished one that it holds."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from hft_cli.config.schema import EngineConfig, RunConfig, read_config
from hft_cli.errors import UserError
from hft_cli.files import flatten, read_record, write_json, write_text
from hft_cli.launch.environment import environment
from hft_cli.run_dir import PlanRecord, RunDir
from hft_cli.runner.prepare import FREE, Prepared

# Keys that may differ when a run is continued. The worker refuses engines that the checkpoint of a phase cannot go to.
RESUMED = (*FREE, "train.micro_batch_size", *(f"engine.{spec.name}" for spec in fields(EngineConfig)))

logger = logging.getLogger(__name__)


def find_unfinished(config: RunConfig) -> RunDir:
    """The newest unfinished run of this configuration among the runs in folders named by date; UserError if none."""
    root = Path(config.output_dir).parent.parent
    plans = sorted(root.glob("*/*/plan.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    free = ("model.date",) if config.model.date is None else ()  # a run that is continued keeps its own
    for run in (RunDir(path.parent) for path in plans):
        try:
            if run.config.exists() and not run.done.exists() and not _differences(run, config, free):
                return run
        except UserError:  # a config.yaml of another program
            continue
    raise UserError(f"There is no unfinished run of this configuration in {root}. Give its directory: output_dir=…")


def refuse_other_files(run: RunDir) -> None:
    """Raise UserError unless a directory is new, empty, or has only the files of a start that was cut off."""
    if not run.folder.exists():
        return
    if not run.folder.is_dir():
        raise UserError(f"output_dir={run.folder} is a file. Choose an empty or a new directory.")
    cut_off = {run.overrides, run.environment, run.plan, run.draws, run.importance, run.lock, run.nodes}
    written = "|".join(re.escape(path.name) for path in (*cut_off, run.config))
    parts = re.compile(rf"({written})\.\d+\.part")  # files.write_text
    others = sorted(
        path.name for path in run.folder.iterdir() if path not in cut_off and not parts.fullmatch(path.name)
    )
    if others:
        raise UserError(
            f"output_dir={run.folder} has other files in it ({', '.join(others[:3])}). "
            "Choose an empty or a new directory."
        )


def remove_parts(run: RunDir) -> None:
    """Remove the files that a killed command was writing (files.write_text). Only while the run is locked."""
    for path in run.folder.rglob("*.part"):
        if re.fullmatch(r".+\.\d+\.part", path.name):
            path.unlink()


def seal(run: RunDir, prepared: Prepared, overrides: Sequence[str]) -> None:
    """Write what the run is. config.yaml comes last: a directory that has it has the other files too."""
    write_text(run.overrides, yaml.safe_dump(list(overrides), sort_keys=False))
    write_json(run.environment, environment())
    write_json(run.plan, prepared.record)
    entries = [
        {"name": phase.name, **draw.as_dict()} for phase, draw in zip(prepared.phases, prepared.draws, strict=True)
    ]
    write_json(run.draws, {"rounds": entries})
    if prepared.importance is not None:
        write_json(run.importance, asdict(prepared.importance))
    write_text(run.config, yaml.safe_dump(asdict(prepared.config), sort_keys=False))


def continue_run(run: RunDir, prepared: Prepared) -> None:
    """Raise UserError unless the directory holds an unfinished run of this configuration, model and data.

    The model may be in another folder than before if it has the same weights: plan.json then records the new folder.
    """
    require_same_config(run, prepared.config, free=("model.path",))
    recorded, record = read_record(run.plan, PlanRecord), prepared.record
    _require_same_inputs(run, recorded, record)
    if recorded["base"] != record["base"]:
        write_json(run.plan, recorded | {key: record[key] for key in ("base", "base_path", "base_revision")})
    logger.info(f"Continuing the run in {run.folder}.")


def require_same_config(run: RunDir, config: RunConfig, free: Sequence[str] = ()) -> None:
    """Raise UserError if a run has another configuration, in other keys than RESUMED and `free`."""
    if different := _differences(run, config, free):
        raise UserError(
            f"{run.folder} holds a run of another configuration ({'; '.join(different[:3])}"
            f"{' …' if len(different) > 3 else ''}). Use the same configuration, or another output_dir."
        )


def _differences(run: RunDir, config: RunConfig, free: Sequence[str] = ()) -> list[str]:
    old, new = flatten(asdict(read_config(run))), flatten(asdict(config))
    keys = sorted((old.keys() | new.keys()) - {*RESUMED, *free})
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _require_same_inputs(run: RunDir, recorded: dict[str, Any], record: dict[str, Any]) -> None:
    if recorded["base_sha256"] != record["base_sha256"]:
        raise _changed(run, f"The weights in {record['base']} have", "them")
    if recorded.get("base_files") is not None:  # none in runs of earlier versions
        _require_same_use(run, recorded, record)
    if recorded.get("suite_sha256") != record["suite_sha256"]:
        raise _changed(run, f"The rows of suite={read_config(run).suite.name} have", "them")
    olds = recorded.get("rounds", [])
    if [old.get("name") for old in olds] != [new["name"] for new in record["rounds"]]:
        raise UserError(f"{run.plan} does not have the rounds of this run. Restore it from a copy.")
    for old, new in zip(olds, record["rounds"], strict=True):
        for key, what in (("data", "data"), ("test", "test data"), ("validation", "validation data")):
            if old.get(f"{key}_sha256") != new.get(f"{key}_sha256"):
                raise _changed(run, f"The {what} of round {old['name']} ({old.get(key)}) has", "it")


def _require_same_use(run: RunDir, recorded: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise UserError if the base's weights would be used in another way: its config, tokenizer or chat template."""
    old, new = recorded["base_files"], record["base_files"]
    if different := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise _changed(run, f"{different[0]} in {record['base']} has", "it")
    if recorded.get("template_sha256") != record["template_sha256"]:
        raise _changed(run, f"model.chat_template={read_config(run).model.chat_template} has", "it")


def _changed(run: RunDir, what: str, which: str) -> UserError:
    return UserError(
        f"{what} changed since {run.folder} was begun. Restore {which}, or start anew in another output_dir."
    )


def clear_folder(folder: Path) -> None:
    """Empty a directory, and remove it unless it is a link or the current directory."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink() and folder.resolve() != Path.cwd():
        folder.rmdir()
