"""The sub-commands."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.cli.hydra_app import Failure, composed_values, run_hydra
from hft_cli.cli.overrides import OF_MAPS, hydra_arguments, plain_override
from hft_cli.config.help import help_text
from hft_cli.config.schema import EvalConfig, PlanConfig, RunConfig
from hft_cli.errors import UserError, choose
from hft_cli.files import from_dict

if TYPE_CHECKING:
    from hft_cli.plan.planner import Plan

logger = logging.getLogger(__name__)


def _train(argv: list[str]) -> int:
    if set(argv) & {"-h", "--help"}:
        print(help_text("train"))
        return 0
    argv = hydra_arguments("train", argv)
    if {"-m", "--multirun"} & set(argv) and not any("launcher=submitit_slurm" in argument for argument in argv):
        nodes = next((text for text in argv if re.match(r"\+*engine\.num_nodes=(?!1$)", text)), None)
        if nodes:  # a run that fails on one node alone would have the others wait for it in the next
            raise UserError(
                f"A sweep with {nodes} needs a job of its own for each run: hydra/launcher=submitit_slurm, or one "
                "command after the other."
            )
    return _status(run_hydra("train", argv, _run), argv)


def _status(failures: list[Failure], argv: Sequence[str]) -> int:
    """The exit status of jobs of which some may have failed; those of a sweep are listed."""
    if {"-m", "--multirun"} & set(argv):
        for failure in failures:
            logger.error("hft: failed: %s: %s", failure.job, failure.reason)
    if not failures:
        return 0
    if failures[0].status == 2:
        raise UserError(failures[0].reason)
    return failures[0].status


def _run(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.report.summary import summary
    from hft_cli.runner.training import run

    values, typed = composed_values(composed, argv)
    named = any(override.startswith("output_dir=") for override in typed)
    done = run(from_dict(RunConfig, values), typed, search=not named)
    if done is not None:  # of several nodes, node 0 tells
        print(summary(done))


def _plan(argv: list[str]) -> int:
    import tempfile

    from hft_cli.plan.text import comparison, text

    if set(argv) & {"-h", "--help"}:
        print(help_text("plan"))
        return 0
    argv = hydra_arguments("plan", argv)
    _PLANNED.clear()
    if {"-m", "--multirun"} & set(argv):
        argv = [word for word in argv if not re.match(r"hydra[/.]launcher", word)]  # one process, for one table
        with tempfile.TemporaryDirectory(prefix="hft-") as folder:  # where Hydra notes a sweep
            failures = run_hydra("plan", [*argv, f"hydra.sweep.dir={folder}", "hydra/hydra_logging=none"], _make_plan)
        if _PLANNED:
            print(comparison(_PLANNED))
    else:
        failures = run_hydra("plan", argv, _make_plan)
        for _, made in _PLANNED:  # none, if only --cfg was asked for
            print(text(made))
    return _status(failures, argv)


_PLANNED: list[tuple[str, Plan]] = []  # what the jobs leave: what was swept, and the plan


def _make_plan(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.plan.planner import plan

    values, _ = composed_values(composed, argv)
    _PLANNED.append((Path(values["output_dir"]).name, plan(from_dict(PlanConfig, values))))


def _eval(argv: list[str]) -> int:
    if set(argv) & {"-h", "--help"}:
        print(help_text("eval"))
        return 0
    argv = [plain_override(argument, sweep=bool({"-m", "--multirun"} & set(argv))) for argument in argv]
    keys = {argument.split("=")[0].lstrip("+") for argument in argv}
    if "run" in keys and keys & {"model", "model.path"}:
        raise UserError("run=… scores the run's own models: leave out model and model.path, or leave out run.")
    if "model.path" in keys and "model" not in keys:
        argv.insert(0, "model=local")
    argv.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    argv = [re.sub(OF_MAPS, r"++\1=", argument) for argument in argv]
    return _status(run_hydra("eval", argv, _score), argv)


def _score(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.config.schema import read_config
    from hft_cli.run_dir import RunDir
    from hft_cli.runner.evaluation import run_eval, table

    values, typed = composed_values(composed, argv)
    if values["output_dir"] == "evals/local":  # each model of one's own has a folder of its own
        values["output_dir"] = str(Path("evals", Path(values["model"]["path"]).name))
    config = from_dict(EvalConfig, values)
    if config.run is not None and RunDir(Path(config.run)).config.exists():
        # The run's own precision and template, unless others are typed.
        named = {override.split("=")[0].lstrip("+") for override in typed}
        sealed = read_config(RunDir(Path(config.run))).model
        for key in ("dtype", "attention", "chat_template"):
            if f"model.{key}" not in named:
                setattr(config.model, key, getattr(sealed, key))
    print(table(run_eval(config)))


def _verify(argv: list[str]) -> int:
    from tqdm import tqdm

    from hft_cli.run_dir import finished
    from hft_cli.runner.verify import verify

    options = _parser("verify", "Prove from a run's files that every round kept its frozen matrices bit for bit.")
    options.add_argument("run", help="directory of a finished run")
    options.add_argument("--model", type=Path, help="check this folder as the final model, instead of RUN/model")
    given = options.parse_args(argv)
    with tqdm(
        desc="verify",
        unit=" tensors",
        leave=False,
        disable=not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO),
    ) as bar:
        proofs = verify(finished(given.run), given.model, tick=lambda name: bar.update() and None)
    for proof in proofs:
        print(
            f"round {proof.round} {proof.name}: {proof.updated} tensors updated, {proof.frozen} frozen: "
            f"{'FAILED' if proof.faults else 'frozen ones bit-identical'}"
        )
        if proof.unmoved:
            more = f" and {len(proof.unmoved) - 5} more" if len(proof.unmoved) > 5 else ""
            print(f"  did not move, though updated: {', '.join(proof.unmoved[:5])}{more}")
        for fault in proof.faults:
            print(f"  {fault}")
    failed = any(proof.faults for proof in proofs)
    print("NOT VERIFIED" if failed else f"verified: {len(proofs)} round{'s' * (len(proofs) > 1)}")
    return 1 if failed else 0


def _show(argv: list[str]) -> int:
    from hft_cli.report.summary import draws_table
    from hft_cli.run_dir import RunDir

    options = _parser("show", "Print what a run's ledger holds.")
    options.add_argument("what", choices=["draws"])
    options.add_argument("run", help="directory of a run")
    given = options.parse_args(argv)
    print(draws_table(RunDir(Path(given.run))))
    return 0


def _materialize(argv: list[str]) -> int:
    from hft_cli.run_dir import RunDir
    from hft_cli.runner.deltas import apply, materialize

    place, given = _keys_after("materialize", "RUN [round=K]|DELTA base=BASE", argv, ("round", "base", "out"))
    if (place / "config.yaml").exists() and "base" not in given:
        materialize(RunDir(place), _round_number(given), Path(given["out"]))
    else:
        if "round" in given:
            raise UserError(
                f"{place} is not the directory of a run, and a published delta has no rounds: leave out round."
            )
        if "base" not in given:
            raise UserError(f"{place} is not the directory of a run. If it is a published delta, give its base: base=…")
        apply(place, given["base"], Path(given["out"]))
    print(f"Model: {given['out']}")
    return 0


def _publish(argv: list[str]) -> int:
    from hft_cli.run_dir import RunDir
    from hft_cli.runner.deltas import publish

    place, given = _keys_after("publish", "RUN [round=K]", argv, ("round", "out"))
    publish(RunDir(place), _round_number(given), Path(given["out"]))
    print(f"Delta with its model card: {given['out']}")
    return 0


def _keys_after(name: str, what: str, argv: list[str], keys: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """A place, and then KEY=VALUE, of which out= must be there."""
    usage = f"hft {name} {what} out=FOLDER"
    if set(argv) & {"-h", "--help"}:
        print(usage)
        raise SystemExit(0)
    # The folders of a sweep's runs have = in their names.
    places = [word for word in argv if "=" not in word or (word.split("=")[0] not in keys and Path(word).exists())]
    given = dict(word.split("=", 1) for word in argv if word not in places)
    for key in given:
        choose("key", key, keys)
    if len(places) != 1 or not given.get("out"):
        raise UserError(f"{usage}: give one place, and out=.")
    return Path(places[0]).expanduser(), given | {"out": os.path.expanduser(given["out"])}


def _round_number(given: dict[str, str]) -> int | None:
    if "round" not in given:
        return None
    if not given["round"].isdigit():
        raise UserError(f"round={given['round']} is not a number.")
    return int(given["round"])


def _report(argv: list[str]) -> int:
    from hft_cli.report.write import report

    options = _parser(
        "report",
        "Put runs and sweeps side by side: tables (Markdown, CSV, JSON), figures (PNG, SVG) and one HTML page.",
    )
    options.add_argument("runs", nargs="+", help="directories of runs, or folders of such, at any depth")
    options.add_argument("--out", type=Path, default=Path("report"), help="folder for the files (default: report)")
    options.add_argument("--norms", action="store_true", help="measure how far each matrix moved (reads the weights)")
    given = options.parse_args(argv)
    print(report([Path(run) for run in given.runs], given.out, given.norms))
    return 0


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"hft {name}", description=description)


# Adding a sub-command is one function and one row.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "eval": _eval,
    "verify": _verify,
    "show": _show,
    "materialize": _materialize,
    "publish": _publish,
    "report": _report,
}
