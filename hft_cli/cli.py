"""The `hft` command: sub-commands, composing a config with Hydra, and telling a user's mistake from a fault."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hft_cli.nodes import NodeError
from hft_cli.schema import EvalConfig, PlanConfig, RunConfig, Stopped, UserError, choose, from_dict

if TYPE_CHECKING:
    from hft_cli.plan import Plan

USAGE = """\
hft: fine-tune language models without making them forget (Half Fine-Tuning, ACL 2025)

  hft train +method=hft [group=option …] [key=value …]   run a fine-tuning; -m sweeps over a,b,c
  hft plan +method=hft [group=option …] [key=value …]    what that would train, need and cost; -m compares
  hft eval run=RUN suite=knowledge                       score a run's model, or any: model.path=FOLDER suite=…
  hft verify RUN                                         prove from the files that frozen matrices kept every bit
  hft show draws RUN                                     what each round updated, as layers by matrices
  hft materialize RUN round=K out=DIR                    the model after any round, from the base and the deltas
  hft publish RUN out=DIR                                what a run changed, with a model card; materialize loads it
  hft report RUN…                                        compare runs and sweeps: tables, figures, one page

Try it, without a GPU or a download:  hft train +method=hft suite=pocket
What there is to set:                 hft train --help"""


def main() -> None:
    """Entry point. Exit status: 0 done, 2 a user's mistake, 1 anything else, 128+n for signal n."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler's, when time is up or the nodes are wanted
        signal.signal(number, _interrupt)
    argv = sys.argv[1:]
    try:
        status = _command(argv)
    except UserError as error:
        print(f"hft: {error}", file=sys.stderr)
        status = 2
    except (Stopped, KeyboardInterrupt) as stop:
        again = " with resume=true" if argv[0] == "train" else ""
        print(f"hft: stopped. The same command{again} continues.", file=sys.stderr)
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"hft: {error.strerror}: {error.filename}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _command(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(f"hft {version('hft-cli')}")
        return 0
    return COMMANDS[choose("command", argv[0], COMMANDS)](list(argv[1:]))


# ------------------------------------------------------------------------------------------------------------- train


def _train(argv: list[str]) -> int:
    if set(argv) & {"-h", "--help"}:
        print(_help())
        return 0
    argv = _arguments("train", argv)
    if {"-m", "--multirun"} & set(argv) and not any("launcher=submitit_slurm" in argument for argument in argv):
        nodes = next((text for text in argv if re.match(r"\+*engine\.num_nodes=(?!1$)", text)), None)
        if nodes:  # a run that fails on one node alone would have the others wait for it in the next
            raise UserError(
                f"A sweep with {nodes} needs a job of its own for each run: hydra/launcher=submitit_slurm, or one "
                "command after the other."
            )
    return _status(_hydra("train", argv), argv)


def _arguments(name: str, argv: Sequence[str]) -> list[str]:
    """What was typed after `hft train` or `hft plan`, as Hydra's grammar has it."""
    # Hydra asks for a + before a group without a default and before a new key of a map; we do not.
    argv = [_plain(argument, sweep=bool({"-m", "--multirun"} & set(argv))) for argument in argv]
    keys = {argument.split("=")[0].lstrip("+") for argument in argv}
    # A path of the user's own goes with `local`, not with the embedded model's or data's settings.
    for group in ("model", "data"):
        if f"{group}.path" in keys and group not in keys:
            place = next(i for i, argument in enumerate(argv) if argument.lstrip("+").startswith(f"{group}.path="))
            argv.insert(place, f"{group}=local")
    # Hydra's parser takes overrides on one side of a flag only; -m may stand anywhere.
    argv.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    if {"-m", "--multirun"} & set(argv) and any(argument.startswith("--cfg") or argument == "-c" for argument in argv):
        raise UserError("--cfg shows one configuration: leave out -m and the lists of values.")
    argv = [re.sub(r"^method=", "+method=", re.sub(OF_MAPS, r"++\1=", argument)) for argument in argv]
    _sized(name, argv)
    if not any(re.match(r"[+~]*(method|experiment)[=@.]", a) for a in argv) and not any(
        a.startswith("-") for a in argv
    ):
        raise UserError(
            f"No method: what should the run do? Available: {', '.join(_options('method'))}. "
            f"For instance: hft {name} +method=hft"
        )
    return argv


def _status(failures: list[Failure], argv: Sequence[str]) -> int:
    """The exit status of jobs of which some may have failed; those of a sweep are listed."""
    if {"-m", "--multirun"} & set(argv):
        for failure in failures:
            print(f"hft: failed: {failure.job}: {failure.reason}", file=sys.stderr)
    if not failures:
        return 0
    if failures[0].status == 2:
        raise UserError(failures[0].reason)
    return failures[0].status


def _sized(name: str, argv: list[str]) -> None:
    """See that an experiment which sweeps is swept, and give it the paper's size unless another is typed."""
    place = next((i for i, text in enumerate(argv) if re.match(r"\+?experiment=", text)), None)
    sized = [text.partition("=")[2] for text in argv if re.match(r"\+?size=", text)]
    for size in sized:
        choose("size", size, _options("size"))
    if place is None:
        if sized:
            raise UserError("size= is of an experiment: experiment=NAME size=paper|pocket.")
        return
    argv[place] = argv[place].lstrip("+")
    experiment = argv[place].partition("=")[2]
    choose("experiment", experiment, _options("experiment"))
    text = (_conf() / "experiment" / f"{experiment}.yaml").read_text()
    if "sweeper:" in text and not {"-m", "--multirun", "--cfg", "-c"} & set(argv):
        raise UserError(f"experiment={experiment} is a sweep: hft {name} -m experiment={experiment} …")
    if "size=pocket" in text and not sized:
        argv.append("size=paper")
    elif sized and "size=pocket" not in text:
        raise UserError(f"experiment={experiment} has one size only: leave out size=.")


@dataclass(frozen=True)
class Failure:
    """A job that failed: its overrides, why, and the exit status that it asks for."""

    job: str
    reason: str
    status: int


PATHS = (
    "model.path",
    "model.base",
    "model.tuned",
    "model.chat_template",
    "data.path",
    "data.test_path",
    "continual.replay_general",
    "model.architecture",
    "engine.deepspeed",
    "output_dir",
    "run",
    "suite.data_dir",
)


OF_MAPS = r"^(suite\.(?:benchmarks|probe|tasks)[.\w]*|model\.kinds)="  # keys that may be new


def _plain(argument: str, sweep: bool) -> str:
    """Quote a path that Hydra's grammar would trip over (spaces, accents, =, ~), and spell the tuned model's key."""
    key, _, value = argument.partition("=")
    if key not in PATHS or not value:
        return argument
    if value.startswith("~"):
        value = os.path.expanduser(value)
    plain = re.fullmatch(r"[\w./:\-+%*@?|$]*", value, re.ASCII)
    special = value[0] in "'\"[" or "${" in value or (sweep and "," in value) or value == "null"
    if not plain and not special:
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{'model.path' if key == 'model.tuned' else key}={value}"  # Half-Reset starts from the tuned model


def _hydra(name: str, argv: list[str]) -> list[Failure]:
    """Compose conf/NAME.yaml with the overrides in argv and run it, once or as a sweep. Returns the failed jobs."""
    import tempfile

    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from hft_cli.run_dir import read_json, write_json

    argv = _launched(argv)
    schema, run = APPLICATIONS[name]
    ConfigStore.instance().store(name="schema", node=schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, to be said in one line
    sys.argv = ["hft " + name, *argv]
    # What fails is told by files: the jobs of a parallel launcher are processes of their own. Those of submitit, which
    # may be on other machines, return it.
    told = Path(tempfile.mkdtemp(prefix="hft-"))
    returned: dict[int, dict[str, Any]] = {}
    waited_for, requeued = _submitit(argv)

    def job(composed: Any) -> dict[str, Any] | None:
        # An exception that leaves a job is printed by Hydra over several lines, and ends a sweep.
        task = hydra.core.hydra_config.HydraConfig.get()
        submitted = task.mode == RunMode.MULTIRUN and "submitit" in task.launcher._target_
        failed: Exception
        try:
            with requeued() if submitted else nullcontext():
                run(composed, argv)
        except (UserError, NodeError, subprocess.CalledProcessError) as error:
            failed = error
            if isinstance(error, NodeError) and not submitted:
                print(f"hft: {error}", file=sys.stderr)
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
            print(f"hft: {failed}", file=sys.stderr)  # in its log
            return {"number": number, **failure}
        write_json(told / f"{number:06d}", failure)
        return None

    try:
        with waited_for(returned):
            hydra.main(version_base="1.3", config_path=str(_conf()), config_name=_primary(name))(job)()
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
    from hft_cli.slurm import requeued, waited_for

    return waited_for, requeued


def _primary(name: str) -> str:
    """The file in conf/ that an application composes: a plan is of what `hft train` composes, and a few keys more."""
    return "train" if issubclass(APPLICATIONS[name][0], RunConfig) else name


def _run(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.report import summary
    from hft_cli.runner import run

    values, typed = _values(composed, argv)
    named = any(override.startswith("output_dir=") for override in typed)
    done = run(from_dict(RunConfig, values), typed, search=not named)
    if done is not None:  # of several nodes, node 0 tells
        print(summary(done))


def _values(composed: Any, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A composed config as plain values, in a sweep with the job's own output_dir, and the job's overrides."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from hft_cli.sweeps import folder_name, params

    hydra = HydraConfig.get()
    values: Any = OmegaConf.to_container(composed, resolve=True)
    typed = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        values["output_dir"] = str(Path(hydra.sweep.dir) / folder_name(typed, [*argv, *params(hydra.sweeper)]))
    return values, typed


def _conf() -> Path:
    """The config tree: beside the module in a wheel, at the top level in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (_conf() / group).glob("*.yaml"))


def _one_line(error: BaseException, argv: Sequence[str], name: str = "train") -> str:
    """Hydra's and OmegaConf's errors, which take several lines, in one with the nearest name."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if found := re.search(r"Could not find '(hydra/launcher|\w+)/([^']*)'", text):
        group, option = found.groups()
        if group == "hydra/launcher" or (_conf() / group).is_dir():
            try:
                choose(group, option, ["basic", *LAUNCHERS] if group == "hydra/launcher" else _options(group))
            except UserError as unknown:
                return str(unknown)
    if found := re.search(r"Could not override '([^']+)'", text) or re.search(r"[Kk]ey '([^']+)' (?:is )?not in", text):
        key = found.group(1)
        keys = _keys(APPLICATIONS[name][0]) + [path.name for path in _conf().iterdir() if path.is_dir()]
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


def _help(name: str = "train") -> str:
    """The groups with their options, and every key with its default and what its docstring says."""
    import ast

    from hft_cli import schema

    tree = ast.parse(Path(schema.__file__).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def section(name: str, where: str) -> list[str]:
        lines, inner = [], []
        body = classes[name].body
        for spec, doc in zip(body, [*body[1:], None], strict=True):
            if not isinstance(spec, ast.AnnAssign):
                continue
            kind, key = ast.unparse(spec.annotation), where + ast.unparse(spec.target)
            if kind in classes:
                inner += section(kind, key + ".")
                continue
            default = ast.unparse(spec.value) if spec.value else ""
            default = re.sub(r"field\(default_factory=(?:lambda: )?(.*)\)", r"\1", default)
            default = {"REQUIRED": "(its group sets it)", "dict": "{}", "list": "[]"}.get(default, default)
            text = ast.literal_eval(doc.value) if isinstance(doc, ast.Expr) else ""
            lines.append(f"  {key + '=' + default:<38} {text}")
        return [f"\n{ast.get_docstring(classes[name])}", *lines, *inner]

    groups = sorted(path.name for path in _conf().iterdir() if path.is_dir() and path.name != "hydra")
    if name == "eval":
        groups = ["engine", "model", "suite", "tracking"]
    usage = {
        "train": "hft train +method=METHOD [group=option …] [key=value …]   once;  -m and key=a,b,c: a sweep",
        "plan": "hft plan …   all that hft train takes, and the keys of PlanConfig below;  -m compares",
        "eval": "hft eval run=RUN|model.path=FOLDER suite=SUITE [key=value …]   once;  -m and key=a,b,c: a sweep",
    }
    options = [f"  {group:<11} {', '.join(_options(group))}" for group in groups if _options(group)]
    return "\n".join(
        [
            usage[name],
            "--cfg job prints what a command composes.",
            "\nGroups and their options:",
            *options,
            *(line for cls in reversed(APPLICATIONS[name][0].__mro__[:-1]) for line in section(cls.__name__, "")),
        ]
    )


def _keys(cls: type[Any], where: str = "") -> list[str]:
    from dataclasses import is_dataclass
    from typing import get_type_hints

    keys = []
    for name, hint in get_type_hints(cls).items():
        keys += _keys(hint, f"{where}{name}.") if is_dataclass(hint) and isinstance(hint, type) else [where + name]
    return keys


# -------------------------------------------------------------------------------------------------------------- plan


def _plan(argv: list[str]) -> int:
    import tempfile

    from hft_cli.plan import comparison, text

    if set(argv) & {"-h", "--help"}:
        print(_help("plan"))
        return 0
    argv = _arguments("plan", argv)
    _PLANNED.clear()
    if {"-m", "--multirun"} & set(argv):
        argv = [word for word in argv if not re.match(r"hydra[/.]launcher", word)]  # one process, for one table
        with tempfile.TemporaryDirectory(prefix="hft-") as folder:  # where Hydra notes a sweep
            failures = _hydra("plan", [*argv, f"hydra.sweep.dir={folder}", "hydra/hydra_logging=none"])
        if _PLANNED:
            print(comparison(_PLANNED))
    else:
        failures = _hydra("plan", argv)
        for _, made in _PLANNED:  # none, if only --cfg was asked for
            print(text(made))
    return _status(failures, argv)


_PLANNED: list[tuple[str, Plan]] = []  # what the jobs leave: what was swept, and the plan


def _make_plan(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.plan import plan

    values, _ = _values(composed, argv)
    _PLANNED.append((Path(values["output_dir"]).name, plan(from_dict(PlanConfig, values))))


# -------------------------------------------------------------------------------------------------------------- eval


def _eval(argv: list[str]) -> int:
    if set(argv) & {"-h", "--help"}:
        print(_help("eval"))
        return 0
    argv = [_plain(argument, sweep=bool({"-m", "--multirun"} & set(argv))) for argument in argv]
    keys = {argument.split("=")[0].lstrip("+") for argument in argv}
    if "run" in keys and keys & {"model", "model.path"}:
        raise UserError("run=… scores the run's own models: leave out model and model.path, or leave out run.")
    if "model.path" in keys and "model" not in keys:
        argv.insert(0, "model=local")
    argv.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    return _status(_hydra("eval", [re.sub(OF_MAPS, r"++\1=", argument) for argument in argv]), argv)


def _score(composed: Any, argv: Sequence[str]) -> None:
    from hft_cli.run_dir import RunDir, read_config
    from hft_cli.scoring import run_eval, table

    values, typed = _values(composed, argv)
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


# What Hydra composes: command -> its config's dataclass and what is done with it.
APPLICATIONS: dict[str, tuple[type[Any], Callable[[Any, Sequence[str]], None]]] = {
    "train": (RunConfig, _run),
    "plan": (PlanConfig, _make_plan),
    "eval": (EvalConfig, _score),
}


# -------------------------------------------------------------------------------------------------- verify and show


def _verify(argv: list[str]) -> int:
    from tqdm import tqdm

    from hft_cli.run_dir import finished
    from hft_cli.verify import verify

    options = _parser("verify", "Prove from a run's files that every round kept its frozen matrices bit for bit.")
    options.add_argument("run", help="directory of a finished run")
    options.add_argument("--model", type=Path, help="check this folder as the final model, instead of RUN/model")
    given = options.parse_args(argv)
    with tqdm(desc="verify", unit=" tensors", leave=False, disable=not sys.stderr.isatty()) as bar:
        proofs = verify(finished(given.run), given.model, lambda name: bar.update() and None)
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
    from hft_cli.report import draws_table
    from hft_cli.run_dir import RunDir

    options = _parser("show", "Print what a run's ledger holds.")
    options.add_argument("what", choices=["draws"])
    options.add_argument("run", help="directory of a run")
    given = options.parse_args(argv)
    print(draws_table(RunDir(Path(given.run))))
    return 0


def _materialize(argv: list[str]) -> int:
    from hft_cli.deltas import apply, materialize
    from hft_cli.run_dir import RunDir

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
    from hft_cli.deltas import publish
    from hft_cli.run_dir import RunDir

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
    from hft_cli.report import report

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


if __name__ == "__main__":
    main()
