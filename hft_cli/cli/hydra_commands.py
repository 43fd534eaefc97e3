"""The sub-commands that compose a config with Hydra: train, plan, eval."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.cli.arguments import Parser
from hft_cli.cli.hydra_app import composed_values, run_hydra
from hft_cli.cli.overrides import hydra_arguments, is_sweep
from hft_cli.config.schema import EvalConfig, PlanConfig, RunConfig
from hft_cli.config.typed import refuse_unread
from hft_cli.errors import JobFailure, UserError
from hft_cli.files import from_dict
from hft_cli.paths import expanded
from hft_cli.run_dir import RunDir

if TYPE_CHECKING:
    from hft_cli.plan.planner import Plan

logger = logging.getLogger(__name__)


def train(parser: Parser, words: list[str]) -> int:
    """`hft train`."""
    argv = hydra_arguments("train", words)
    if is_sweep(argv):
        _refuse_sweep_of_several_nodes(argv)
    return exit_status(run_hydra("train", argv, _train), argv)


def _refuse_sweep_of_several_nodes(argv: Sequence[str]) -> None:
    """A run that fails on one node alone would have the other nodes wait for that node in the next run.

    Raises:
        UserError: for a sweep over runs of several nodes, unless each run is a SLURM job.
    """
    nodes = next((word for word in argv if re.match(r"\+*engine\.num_nodes=(?!1$)", word)), None)
    if nodes and not any("launcher=submitit_slurm" in word for word in argv):
        raise UserError(
            f"A sweep with {nodes} needs a job of its own for each run: hydra/launcher=submitit_slurm, or one command "
            "after the other."
        )


def _train(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.report.summary import summary
    from hft_cli.runner.training import run

    values, overrides = composed_values(composed, argv)
    config = from_dict(RunConfig, values)
    begun = config.resume or RunDir(expanded(config.output_dir)).config.exists()  # perhaps by an earlier version
    if not begun and not is_sweep(argv):
        refuse_unread(config, overrides)
    has_folder = any(override.startswith("output_dir=") for override in overrides)
    finished = run(config, overrides, search=not has_folder)
    if finished is not None:  # only node 0 prints the summary
        print(summary(finished))


def plan(parser: Parser, words: list[str]) -> int:
    """`hft plan`: one plan, or with -m a table that compares several."""
    from hft_cli.plan.text import comparison_text, plan_text

    argv = hydra_arguments("plan", words)
    plans: list[tuple[str, Plan]] = []  # the values that are swept, and the plan
    if not is_sweep(argv):
        failures = run_hydra("plan", argv, partial(_plan, plans))
        for _, result in plans:  # empty after --cfg
            print(plan_text(result))
        return exit_status(failures, argv)
    argv = [word for word in argv if not re.match(r"hydra[/.]launcher", word)]  # all plans in this process
    with tempfile.TemporaryDirectory(prefix="hft-") as folder:  # Hydra writes multirun.yaml into it
        argv = [*argv, f"hydra.sweep.dir={folder}", "hydra/hydra_logging=none"]
        failures = run_hydra("plan", argv, partial(_plan, plans))
    if plans:
        print(comparison_text(plans))
    return exit_status(failures, argv)


def _plan(plans: list[tuple[str, Plan]], composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.plan.automatic import automatic
    from hft_cli.plan.planner import plan

    values, overrides = composed_values(composed, argv)
    config = from_dict(PlanConfig, values)
    if not is_sweep(argv):
        refuse_unread(config, overrides)
    plans.append((Path(values["output_dir"]).name, plan(automatic(config))))


def evaluate(parser: Parser, words: list[str]) -> int:
    """`hft eval`."""
    argv = hydra_arguments("eval", words)
    return exit_status(run_hydra("eval", argv, _evaluate), argv)


def _evaluate(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.runner.evaluation import run_eval, table

    values, overrides = composed_values(composed, argv)
    if values["output_dir"] == "evals/local":  # models of the user's own do not share a folder
        values["output_dir"] = str(Path("evals", Path(values["model"]["path"]).name))
    config = from_dict(EvalConfig, values)
    _keep_settings_of_run(config, overrides)
    print(table(run_eval(config)))


def _keep_settings_of_run(config: EvalConfig, overrides: Sequence[str]) -> None:
    """Score a run's models with the precision, attention and template of the run, unless others are typed."""
    from hft_cli.config.schema import read_config

    if config.run is None or not RunDir(Path(config.run)).config.exists():
        return
    typed = {override.split("=")[0].lstrip("+") for override in overrides}
    of_run = read_config(RunDir(Path(config.run))).model
    for key in ("dtype", "attention", "chat_template", "thinking", "date", "part", "kinds"):
        if f"model.{key}" not in typed:
            setattr(config.model, key, getattr(of_run, key))


def exit_status(failures: Sequence[JobFailure], argv: Sequence[str]) -> int:
    """The exit status of a command of which some jobs may have failed. The failed jobs of a sweep are listed.

    Raises:
        UserError: if the first failure is a user's mistake.
    """
    if is_sweep(argv):
        for failure in failures:
            logger.error("hft: failed: %s: %s", failure.job, failure.reason)
    if not failures:
        return 0
    if failures[0].status == 2:
        raise UserError(failures[0].reason)
    return failures[0].status
