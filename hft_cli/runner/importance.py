"""Importance of the base's matrices, which selection=importance draws by: measured once, and kept for other runs."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hft_cli.checkpoint.folders import known_weights_hash
from hft_cli.config.schema import RunConfig
from hft_cli.data.rows import read_chats
from hft_cli.errors import UserError
from hft_cli.evaluation.score_files import cache_key
from hft_cli.evaluation.scorer import ScoredModel, model_identity
from hft_cli.files import read_record, write_json
from hft_cli.launch.jobs import ImportanceJob
from hft_cli.launch.worker import WorkerRun, run_worker
from hft_cli.paths import resolve_path, user_cache
from hft_cli.run_dir import RoundDir, RunDir

VERSION = 1  # of how importance is measured; with a higher one, what earlier versions measured is not used

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Importance:
    """The content of importance.json in a run's directory.

    Attributes:
        weights_sha256, rows_sha256: of the model and of the rows that it was measured on.
        scores: unit -> mean squared gradient of its elements.
    """

    weights_sha256: str
    rows_sha256: str
    scores: dict[str, float]


def importance_of(config: RunConfig, base: Path, run: RunDir) -> Importance | None:
    """The importance of the matrices of the model in `base`; None if the selection does not ask for it.

    An unfinished run keeps what it began with. Otherwise it is read from the cache, or measured in a worker process.

    Raises:
        UserError: for rows that cannot be read, or if they or the weights have changed since the run was begun.
    """
    selection = config.selection
    if selection.level != "importance":
        return None
    rows = read_chats(resolve_path(str(selection.importance_rows)), split="train").sha256()
    weights = known_weights_hash(base)
    if run.importance.exists():
        known = read_importance(run)
        if (known.weights_sha256, known.rows_sha256) != (weights, rows):
            raise UserError(
                f"The weights in {base} or the rows of selection.importance_rows={selection.importance_rows} have "
                f"changed since {run.folder} was begun. Restore them, or start anew in another output_dir."
            )
        return known
    identity = model_identity(ScoredModel(base, config.model, weights))
    key = cache_key("importance", VERSION, identity, rows, selection.importance_limit)
    file = user_cache() / "importance" / f"{key}.json"
    if not file.exists():
        _measure(config, base, file)
    else:
        logger.info(f"The importance of the matrices is taken from {file.parent}.")
    return Importance(weights, rows, read_record(file, dict[str, float]))


def _measure(config: RunConfig, base: Path, file: Path) -> None:
    """Measure the importance in a worker process, and write it into the cache."""
    folder, out = Path(tempfile.mkdtemp(prefix="hft-")), "importance.json"
    rows, limit = str(config.selection.importance_rows), config.selection.importance_limit
    job = ImportanceJob(config.model, str(base), rows, limit, out)
    run_worker(WorkerRun(job, RoundDir(folder), "Importance of the matrices"))  # if it fails, its log stays there
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, read_record(folder / out, dict[str, float]))
    shutil.rmtree(folder)


def read_importance(run: RunDir) -> Importance:
    """The importance that a run's draws were made by; UserError if it cannot be read."""
    record = read_record(run.importance, Importance)
    return Importance(**record)
