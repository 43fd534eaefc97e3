"""Hydra's launchers, which start the jobs of a sweep: what each needs, and the settings that hft gives it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from hft_cli.cli.overrides import is_sweep
from hft_cli.errors import JobFailure, UserError

WEEK = 7 * 24 * 60  # minutes


@dataclass(frozen=True)
class Launcher:
    """A launcher.

    Attributes:
        package: the package on PyPI that has it.
        settings: keys below hydra.launcher that are set unless the user typed them, from what the user typed.
        only_sweeps: whether a single run cannot use it.
    """

    package: str
    settings: Callable[[Mapping[str, str]], dict[str, str]]
    only_sweeps: bool


def launcher_arguments(argv: list[str]) -> list[str]:
    """`argv` with hft's settings for the launcher that it names.

    Raises:
        UserError: if what the launcher needs is missing.
    """
    name = next((word.partition("=")[2] for word in argv if re.match(r"\+*hydra/launcher=", word)), None)
    if name not in LAUNCHERS:
        return argv
    launcher = LAUNCHERS[name]
    try:
        version(launcher.package)
    except PackageNotFoundError:
        raise UserError(
            f"hydra/launcher={name} needs a package that is missing: pip install 'hft-cli[cluster]', or "
            f"{launcher.package}."
        ) from None
    if launcher.only_sweeps and not is_sweep(argv):
        raise UserError(
            f"hydra/launcher={name} starts the jobs of a sweep: add -m. For one run there is scripts/slurm."
        )
    prefix = "hydra.launcher."
    typed = dict(word.lstrip("+").removeprefix(prefix).partition("=")[::2] for word in argv if prefix in word)
    settings = {key: value for key, value in launcher.settings(typed).items() if key not in typed}
    return [*argv, *(f"{prefix}{key}={value}" for key, value in settings.items())]


def _joblib_settings(typed: Mapping[str, str]) -> dict[str, str]:
    return {}


def _local_settings(typed: Mapping[str, str]) -> dict[str, str]:
    return {"timeout_min": str(WEEK)}  # submitit's default is an hour


def _slurm_settings(typed: Mapping[str, str]) -> dict[str, str]:
    if shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=submitit_slurm needs SLURM, and there is no sbatch here.")
    minutes = typed.get("timeout_min", "60")
    # SLURM's warning: five minutes before the time limit, or a quarter of a short one.
    seconds = min(300, 15 * int(minutes)) if minutes.isdigit() else 300
    settings = {"signal_delay_s": str(seconds), "max_num_timeout": "20"}
    if "cpus_per_task" in typed:  # srun does not take it from sbatch by itself
        settings["setup"] = '["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]'
    return settings


def follow_jobs(argv: Sequence[str], failures: list[JobFailure]) -> AbstractContextManager[None]:
    """While it is entered, submitit's jobs are waited for and those that fail are added to `failures`.

    Without a sweep, or without submitit, it does nothing.
    """
    if not is_sweep(argv) or importlib.util.find_spec("submitit") is None:
        return nullcontext()
    # Must be set before submitit is imported. Its default, USR2, would end a worker on clusters that signal all
    # processes of a job.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    from hft_cli.launch.slurm import wait_for_jobs

    return wait_for_jobs(failures)


LAUNCHERS = {
    "joblib": Launcher("hydra-joblib-launcher", _joblib_settings, only_sweeps=False),
    "submitit_local": Launcher("hydra-submitit-launcher", _local_settings, only_sweeps=True),
    "submitit_slurm": Launcher("hydra-submitit-launcher", _slurm_settings, only_sweeps=True),
}
