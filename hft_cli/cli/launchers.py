"""Hydra's launchers, which start the jobs of a sweep: what each needs, and the settings that hft gives it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hft_cli.cli.overrides import is_sweep
from hft_cli.errors import JobFailure, UserError
from hft_cli.launch.parallel import stop_together

WEEK = 7 * 24 * 60  # minutes
PREFIX = "hydra.launcher."


def launcher_arguments(argv: list[str]) -> list[str]:
    """`argv` with hft's settings for the launcher that it names, except those that were typed.

    Raises:
        UserError: if what the launcher needs is missing.
    """
    name = _launcher(argv)
    if name not in LAUNCHERS:
        return argv
    package = f"hydra-{name.partition('_')[0]}-launcher"
    try:
        version(package)
    except PackageNotFoundError:
        raise UserError(
            f"hydra/launcher={name} needs a package that is missing: pip install 'hft-cli[cluster]', or {package}."
        ) from None
    if name != "joblib" and not is_sweep(argv):
        raise UserError(
            f"hydra/launcher={name} starts the jobs of a sweep: add -m. For one run there is scripts/slurm."
        )
    typed = dict(word.lstrip("+").removeprefix(PREFIX).partition("=")[::2] for word in argv if PREFIX in word)
    settings = LAUNCHERS[name](typed)
    return [*argv, *(f"{PREFIX}{key}={value}" for key, value in settings.items() if key not in typed)]


def _launcher(argv: Sequence[str]) -> str:
    return next((word.partition("=")[2] for word in argv if re.match(r"\+*hydra/launcher=", word)), "basic")


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


def follow_jobs(argv: Sequence[str], folder: Path, failures: list[JobFailure]) -> AbstractContextManager[None]:
    """While it is entered, jobs in other processes are stopped or waited for as their launcher needs.

    Jobs of submitit that fail are added to `failures`. `folder` is the sweep's own.
    """
    if not is_sweep(argv):
        return nullcontext()
    if _launcher(argv) == "joblib":
        return stop_together(folder)
    if importlib.util.find_spec("submitit") is None:
        return nullcontext()
    # Must be set before submitit is imported. Its default, USR2, would end a worker on clusters that signal all
    # processes of a job.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    from hft_cli.launch.slurm import wait_for_jobs

    return wait_for_jobs(failures)


# Launcher -> its settings below hydra.launcher, from those that were typed. Its package: hydra-NAME-launcher.
LAUNCHERS: dict[str, Callable[[Mapping[str, str]], dict[str, str]]] = {
    "joblib": lambda typed: {},
    "submitit_local": lambda typed: {"timeout_min": str(WEEK)},  # submitit's default is an hour
    "submitit_slurm": _slurm_settings,
}
