"""Run a command's function on configs that Hydra composes: once, or for each job of a sweep."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from hft_cli.cli.arguments import check_options
from hft_cli.cli.compat import hydra_parser
from hft_cli.cli.hydra_errors import one_line
from hft_cli.cli.launchers import follow_jobs, launcher_arguments
from hft_cli.config import defaults
from hft_cli.config.schema import SCHEMAS, RunConfig
from hft_cli.errors import FileError, JobFailure, NodeError, PipeClosed, Stopped, UserError, file_error
from hft_cli.files import read_json, write_json
from hft_cli.launch.parallel import stopped_by_command
from hft_cli.logs import set_up_logging
from hft_cli.paths import conf_dir

logger = logging.getLogger(__name__)
defaults.register()  # at import, because parallel launchers compose their jobs in processes that import this module

Run = Callable[[Any, Sequence[str]], None]


def run_hydra(name: str, argv: list[str], run: Run) -> list[JobFailure]:
    """Compose the config of the command `name` and call `run(config, argv)`, for a sweep once for each job.

    Args:
        name: a key of SCHEMAS.
        argv: overrides and flags of Hydra.
        run: called with the composed DictConfig, in a sweep perhaps in another process.

    Returns:
        The jobs that failed, in the order of the sweep.

    Raises:
        UserError: if the config cannot be composed, or the launcher cannot start the jobs.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    argv = sorted(argv, key=_is_override)  # Hydra's parser does not take overrides on both sides of a flag
    _check_flags(argv, name)
    argv = launcher_arguments(argv)
    if not logger.isEnabledFor(logging.INFO) and not any("hydra_logging=" in word for word in argv):
        argv = [*argv, "hydra/hydra_logging=none"]  # Hydra lists the jobs of a sweep
    ConfigStore.instance().store(name="schema", node=SCHEMAS[name])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
    sys.argv = [f"hft {name}", *argv]
    primary = "train" if issubclass(SCHEMAS[name], RunConfig) else name  # conf/train.yaml is also the plan's
    returned: list[JobFailure] = []
    with tempfile.TemporaryDirectory(prefix="hft-") as folder, follow_jobs(argv, Path(folder), returned):
        job = HydraJob(run, name, tuple(argv), Path(folder))
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=primary)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(one_line(error, argv, name)) from None
        written = [JobFailure(**read_json(file)) for file in Path(folder).glob("*.json")]
    return sorted([*returned, *written], key=lambda failure: failure.number)


def _is_override(word: str) -> bool:
    return ("=" in word and not word.startswith("-")) or word.startswith("~")


def _check_flags(argv: Sequence[str], name: str) -> None:
    """Refuse flags that Hydra would refuse with its whole usage.

    Raises:
        UserError: for an unknown flag, or one with a wrong value.
    """
    parser = hydra_parser()
    check_options(parser, argv)

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. More: hft {name} --hydra-help")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(argv))


# Errors whose message says all: without a traceback.
ONE_LINE = (UserError, NodeError, FileError, Stopped, subprocess.CalledProcessError)


@dataclass(frozen=True)
class HydraJob:
    """The function that Hydra calls with a composed config. Launchers pickle it for jobs in other processes.

    Attributes:
        run: the command's function.
        name: of the command.
        argv: what was typed.
        folder: of the sweep, for one file for each failed job.
    """

    run: Run
    name: str
    argv: tuple[str, ...]
    folder: Path

    def __call__(self, composed: Any) -> JobFailure | None:
        """Run the job. Exceptions do not leave it: Hydra would print them over several lines, and end the sweep."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        set_up_logging()  # this may be another process
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        launcher = settings.launcher._target_ if sweep else ""
        submitted = "submitit" in launcher
        error: BaseException
        try:
            with _signals_of_job(launcher, self.folder):
                self.run(composed, self.argv)
            return None
        except Stopped as stop:
            if "joblib" not in launcher:
                raise
            error = stop
        except BrokenPipeError:
            raise PipeClosed from None
        except Exception as failure:
            error = self._known(failure) or failure
        if isinstance(error, NodeError | FileError) and not submitted:
            logger.error("hft: %s", error)
        elif not isinstance(error, ONE_LINE):
            if not sweep:
                raise error
            traceback.print_exception(error)
        number = settings.job.num if sweep else 0
        reason = "stopped by a signal" if isinstance(error, Stopped) else str(error)
        report = JobFailure(number, " ".join(_typed(settings)), reason, _exit_status(error))
        if submitted:  # perhaps on another machine, where `failures` does not exist
            logger.error("hft: %s", error)
            return report
        if not self.folder.is_dir():  # another launcher's machine: the launcher reports the error
            raise error
        write_json(self.folder / f"{number}.json", asdict(report))
        return None

    def _known(self, failure: Exception) -> Exception | None:
        """An error of the file system, or of a value that OmegaConf resolves only now, as one line."""
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(failure, OmegaConfBaseException):
            return UserError(one_line(failure, self.argv, self.name))
        return file_error(failure) if isinstance(failure, OSError) else None


def _signals_of_job(launcher: str, folder: Path) -> AbstractContextManager[None]:
    """While it is entered, a job of a sweep receives signals as its launcher needs; `launcher` is its class."""
    if "submitit" in launcher:
        from hft_cli.launch.slurm import requeue_when_stopped  # needs submitit

        return requeue_when_stopped()
    return stopped_by_command(folder) if "joblib" in launcher else nullcontext()


def _exit_status(error: BaseException) -> int:
    """2 for a user's mistake, 128 + n if signal n ended the job or its worker, otherwise 1."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, subprocess.CalledProcessError) and error.returncode < 0:
        return 128 - error.returncode
    return 1


def _typed(settings: Any) -> list[str]:
    """The overrides of a job as they were typed: an interpolation in one, ${…}, is not resolved here."""
    from omegaconf import OmegaConf

    overrides: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    return [str(override) for override in overrides]


def composed_values(composed: Any, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The composed config as plain values, and the overrides of the job. In a sweep each job has its own output_dir."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from hft_cli.runner.sweeps import folder_name, params

    settings = HydraConfig.get()
    values: Any = OmegaConf.to_container(composed, resolve=True)
    overrides = _typed(settings)
    if settings.mode == RunMode.MULTIRUN:
        name = folder_name(overrides, [*argv, *params(settings.sweeper)])
        values["output_dir"] = str(Path(settings.sweep.dir) / name)
    return values, overrides
