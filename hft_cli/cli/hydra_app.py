"""Composing a config with Hydra, once or for each job of a sweep."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hft_cli.config.help import config_keys
from hft_cli.config.schema import SCHEMAS, RunConfig
from hft_cli.errors import NodeError, UserError, choose
from hft_cli.logs import set_up_logging
from hft_cli.paths import conf_dir, group_options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A job that failed: its overrides, why, and the exit status that it asks for."""

    job: str
    reason: str
    status: int


def run_hydra(name: str, argv: list[str], run: Callable[[Any, Sequence[str]], None]) -> list[Failure]:
    """Compose the config of command `name` with the overrides in argv, and call `run` with it and argv.

    Once, or for each job of a sweep. Returns the failed jobs.
    """
    import tempfile

    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from hft_cli.files import read_json, write_json

    argv = _launched(argv)
    if not logger.isEnabledFor(logging.INFO) and not any("hydra_logging=" in argument for argument in argv):
        argv = [*argv, "hydra/hydra_logging=none"]  # Hydra lists the jobs of a sweep
    ConfigStore.instance().store(name="schema", node=SCHEMAS[name])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, to be said in one line
    sys.argv = ["hft " + name, *argv]
    # What fails is told by files: the jobs of a parallel launcher are processes of their own. Those of submitit, which
    # may be on other machines, return it.
    told = Path(tempfile.mkdtemp(prefix="hft-"))
    returned: dict[int, dict[str, Any]] = {}
    waited_for, requeued = _submitit(argv)

    def job(composed: Any) -> dict[str, Any] | None:
        # An exception that leaves a job is printed by Hydra over several lines, and ends a sweep.
        set_up_logging()  # a job of a sweep may be a process of its own
        task = hydra.core.hydra_config.HydraConfig.get()
        submitted = task.mode == RunMode.MULTIRUN and "submitit" in task.launcher._target_
        failed: Exception
        try:
            with requeued() if submitted else nullcontext():
                run(composed, argv)
        except (UserError, NodeError, subprocess.CalledProcessError) as error:
            failed = error
            if isinstance(error, NodeError) and not submitted:
                logger.error("hft: %s", error)
        except (FileExistsError, IsADirectoryError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
            failed = UserError(f"{error.strerror}: {error.filename}")
        except Exception as error:
            if task.mode != RunMode.MULTIRUN:
                raise
            traceback.print_exc()
            failed = error
        else:
            return None
        if not submitted and not told.is_dir():  # another machine, whose launcher has ways of its own to tell
            raise failed
        number = task.job.num if task.mode == RunMode.MULTIRUN else 0
        status = 2 if isinstance(failed, UserError) else 1
        if isinstance(failed, subprocess.CalledProcessError) and failed.returncode < 0:
            status = 128 - failed.returncode
        failure = vars(Failure(" ".join(task.overrides.task), str(failed), status))
        if submitted:
            logger.error("hft: %s", failed)  # in its log
            return {"number": number, **failure}
        write_json(told / f"{number:06d}", failure)
        return None

    try:
        with waited_for(returned):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=_primary(name))(job)()
        return [Failure(**returned[number]) for number in sorted(returned)] + [
            Failure(**read_json(path)) for path in sorted(told.iterdir())
        ]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, argv, name)) from None
    finally:
        shutil.rmtree(told)


LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}  # of which plugin


def _launched(argv: list[str]) -> list[str]:
    """`argv` with our defaults for the launcher of jobs that it names, if it does.

    Raises:
        UserError: if what the launcher needs is not there.
    """
    launcher = next((text.partition("=")[2] for text in argv if re.match(r"\+*hydra/launcher=", text)), "basic")
    if launcher not in LAUNCHERS:
        return argv
    package = f"hydra-{LAUNCHERS[launcher]}-launcher"
    try:
        version(package)
    except PackageNotFoundError:
        raise UserError(
            f"hydra/launcher={launcher} needs a package that is missing: pip install 'hft-cli[cluster]', or {package}."
        ) from None
    if launcher == "joblib":
        return argv
    if not {"-m", "--multirun"} & set(argv):
        raise UserError(
            f"hydra/launcher={launcher} starts the jobs of a sweep: add -m. For one run there is scripts/slurm."
        )
    given = dict(text.lstrip("+").partition("=")[::2] for text in argv)
    ours = {}
    if launcher == "submitit_local":
        ours["timeout_min"] = str(7 * 24 * 60)  # submitit's own is an hour
    elif shutil.which("sbatch") is None:
        raise UserError("hydra/launcher=submitit_slurm needs SLURM, and there is no sbatch here.")
    else:
        minutes = given.get("hydra.launcher.timeout_min", "60")
        # SLURM's warning: five minutes before the end, of a short time a quarter.
        ours["signal_delay_s"] = str(min(300, 15 * int(minutes)) if minutes.isdigit() else 300)
        ours["max_num_timeout"] = "20"
        if "hydra.launcher.cpus_per_task" in given:  # which srun does not take from sbatch by itself
            ours["setup"] = '["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]'
    keys = {f"hydra.launcher.{key}": value for key, value in ours.items()}
    return [*argv, *(f"{key}={value}" for key, value in keys.items() if key not in given)]


def _submitit(argv: Sequence[str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What hft_cli/slurm.py does for a sweep and for each of its jobs, if submitit is there."""
    if not {"-m", "--multirun"} & set(argv) or importlib.util.find_spec("submitit") is None:
        return nullcontext, nullcontext
    # Before it is imported. Its own choice, USR2, would kill a worker on clusters that signal all processes of a job.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    from hft_cli.launch.slurm import requeued, waited_for

    return waited_for, requeued


def _primary(name: str) -> str:
    """The file in conf/ that an application composes: a plan is of what `hft train` composes, and a few keys more."""
    return "train" if issubclass(SCHEMAS[name], RunConfig) else name


def composed_values(composed: Any, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A composed config as plain values, in a sweep with the job's own output_dir, and the job's overrides."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from hft_cli.runner.sweeps import folder_name, params

    hydra = HydraConfig.get()
    values: Any = OmegaConf.to_container(composed, resolve=True)
    typed = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        values["output_dir"] = str(Path(hydra.sweep.dir) / folder_name(typed, [*argv, *params(hydra.sweeper)]))
    return values, typed


def _one_line(error: BaseException, argv: Sequence[str], name: str = "train") -> str:
    """Hydra's and OmegaConf's errors, which take several lines, in one with the nearest name."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if found := re.search(r"Could not find '(hydra/launcher|\w+)/([^']*)'", text):
        group, option = found.groups()
        if group == "hydra/launcher" or (conf_dir() / group).is_dir():
            try:
                choose(group, option, ["basic", *LAUNCHERS] if group == "hydra/launcher" else group_options(group))
            except UserError as unknown:
                return str(unknown)
    if found := re.search(r"Could not override '([^']+)'", text) or re.search(r"[Kk]ey '([^']+)' (?:is )?not in", text):
        key = found.group(1)
        keys = config_keys(SCHEMAS[name]) + [path.name for path in conf_dir().iterdir() if path.is_dir()]
        if key not in keys:
            full = next((a.split("=")[0].lstrip("+~") for a in argv if a.split("=")[0].endswith(key)), key)
            if full.startswith("hydra."):
                return " ".join(line for line in map(str.strip, text.splitlines()) if not line.startswith("full_key:"))
            near = difflib.get_close_matches(full, keys, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            return f"Unknown key '{full}'.{hint} All keys: hft {name} --help"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found.group(1)} is not set. Give it on the command line: {found.group(1)}=…"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not re.match(r"(reference_type|object_type|See https|Available options|Config search)", line)
    ]
    key = next((m.group(1) for line in lines if (m := re.match(r"full_key: (\S+)", line))), "")
    kept = [line for line in kept if not line.startswith(("full_key:", "Error merging override"))] or lines
    return f"{key}: {kept[0]}" if key else " ".join(kept[:2])
