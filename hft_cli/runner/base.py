"""The model that a run starts from: what plan.json records of it, and how it is found again later."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import effective_hashes, hub_revision, known_weights_hash, model_folder, weights_hash
from hft_cli.config.schema import read_config
from hft_cli.errors import UserError
from hft_cli.files import read_json, read_record
from hft_cli.paths import expanded, resolve_path
from hft_cli.run_dir import PlanRecord, RunDir


def base_record(path: str, folder: Path) -> dict[str, Any]:
    """What plan.json records of the base: `path` as the user gave it, and the folder that it resolved to."""
    return {
        "base": str(folder.resolve()),
        "base_path": path,
        "base_revision": hub_revision(folder),
        "base_sha256": known_weights_hash(folder),
        "base_files": effective_hashes(folder),
    }


def recorded_revision(run: RunDir, path: str) -> str | None:
    """The commit of the hub repository `path` that a run started from; None for a new run or another path."""
    record = read_json(run.plan) if run.plan.exists() else {}
    return record.get("base_revision") if record.get("base_path") == path else None


def find_base(
    run: RunDir,
    base: str | Path | None = None,
    hash_of: Callable[[Path], str] = weights_hash,
    fix: str = "Give a folder with the same weights: --base FOLDER.",
) -> Path:
    """The folder of the model that a run started from: the recorded one, or what the recorded path leads to today.

    Args:
        run: a run with a plan.json. Runs of earlier versions, which have no `base_path` in it, work too.
        base: a folder, hub name or `pocket:` path to use instead.
        hash_of: returns the hash of a folder's weights. A caller with many runs can pass a cached one.
        fix: what the error tells the user to do.

    Raises:
        UserError: if no folder has the recorded weights.
    """
    plan = read_record(run.plan, PlanRecord)
    sha256 = plan["base_sha256"]
    if base is not None:
        folder = model_folder(resolve_path(str(base)), "base")
        if hash_of(folder) == sha256:
            return folder
        raise UserError(
            f"The weights in {folder} are not those that the run in {run.folder} started from (SHA-256 {sha256[:12]}…)."
        )
    recorded = Path(plan["base"])
    path = plan.get("base_path") or read_config(run).model.path
    for folder in dict.fromkeys((recorded, expanded(resolve_path(path)))):
        if _has_weights(folder, sha256, hash_of):
            return folder
    if revision := plan.get("base_revision") or hub_revision(recorded):
        with suppress(UserError):  # the hub cannot be reached, or does not have the model any more
            folder = model_folder(path, revision=revision)
            if _has_weights(folder, sha256, hash_of):
                return folder
    reason = "holds other weights now" if recorded.is_dir() else "does not exist any more"
    raise UserError(
        f"The run in {run.folder} started from {recorded}, which {reason} (SHA-256 at the start: {sha256[:12]}…). {fix}"
    )


def _has_weights(folder: Path, sha256: str, hash_of: Callable[[Path], str]) -> bool:
    try:
        return folder.is_dir() and hash_of(folder) == sha256
    except UserError:  # not a checkpoint
        return False
