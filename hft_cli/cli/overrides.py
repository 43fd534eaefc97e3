"""Translate the arguments of `hft train`, `hft plan` and `hft eval` into Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hft_cli.config.conf import experiment_option, experiments, groups, needs_data_path, sweep_params
from hft_cli.errors import UserError, choose
from hft_cli.paths import expand_home, group_options

SWEEP_FLAGS = {"-m", "--multirun"}

# Keys that hold a path, which may contain characters of Hydra's grammar.
PATHS = (
    "model.path",
    "model.base",
    "model.tuned",
    "model.chat_template",
    "model.architecture",
    "data.path",
    "data.test_path",
    "data.validation",
    "data.general",
    "continual.replay_general",
    "selection.importance_rows",
    "engine.deepspeed",
    "output_dir",
    "run",
    "suite.data_dir",
    "suite.include_path",
)

# Keys that may be new.
MAP_KEY = re.compile(r"(suite\.(?:benchmarks|probe|tasks|text)[.\w]*|model\.kinds|data\.(?:columns|roles)(?:\.\w+)?)=")


def hydra_arguments(command: str, argv: Sequence[str]) -> list[str]:
    """The arguments after `hft COMMAND` as Hydra takes them.

    Raises:
        UserError: for an unknown experiment, a sweep without -m, or arguments that contradict each other.
    """
    if unnamed := next((argument for argument in argv if re.match(r"[+~]*=", argument)), None):
        raise UserError(f"'{unnamed}' has no key before =. Write KEY=VALUE.")
    sweep = is_sweep(argv)
    shows = any(argument == "-c" or argument.startswith("--cfg") for argument in argv)
    if sweep and shows:
        raise UserError("--cfg shows one configuration: leave out -m and the lists of values.")
    arguments = [_translated(argument, sweep) for argument in argv]
    if command == "eval":
        _refuse_two_models(arguments)
    else:
        arguments = _with_experiment(command, arguments, runs_one=not sweep and not shows, shows=shows)
    return _with_own_paths(command, arguments)


def is_sweep(argv: Iterable[str]) -> bool:
    """Whether the arguments ask for a sweep."""
    return not SWEEP_FLAGS.isdisjoint(argv)


def _translated(argument: str, sweep: bool) -> str:
    """One argument: the + of groups is taken off, new keys of maps get theirs, and paths are quoted."""
    key, _, value = argument.lstrip("+").partition("=")
    if key in groups():
        if value in ("", "null"):
            choose(key, value, experiments() if key == "experiment" else group_options(key))
        return f"{key}={value}"
    if MAP_KEY.match(argument):
        return f"++{argument}"
    return _quoted_path(key, value, sweep) if key in PATHS and value else argument


def _quoted_path(key: str, value: str, sweep: bool) -> str:
    """`key=value`, quoted if Hydra's grammar does not read the path as text (spaces, accents, =, ~)."""
    key = "model.path" if key == "model.tuned" else key  # Half-Reset starts from the tuned model
    value = expand_home(value)
    plain = re.fullmatch(r"[\w./:\-+%*@?|$]*", value, re.ASCII)
    grammar = value[0] in "'\"[" or "${" in value or (sweep and "," in value)
    if not plain and not grammar:
        # In Hydra's grammar a backslash is one, except before a quote.
        value = "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"
    return f"{key}={value}"


def _keys(arguments: Iterable[str]) -> set[str]:
    return {argument.lstrip("+~").partition("=")[0] for argument in arguments}


def _refuse_two_models(arguments: Sequence[str]) -> None:
    keys = _keys(arguments)
    if "run" in keys and keys & {"model", "model.path"}:
        raise UserError("run=… scores the run's own models: leave out model and model.path, or leave out run.")


def _with_own_paths(command: str, arguments: Sequence[str]) -> list[str]:
    """With a path of the user's own, the option `local`: the settings of the default model or data are not for it.

    The path of an experiment's data that have none, such as TRACE, completes them instead.
    """
    values = dict(argument.partition("=")[::2] for argument in arguments)
    added = []
    if "model.path" in values and "model" not in values:
        added.append("model=pocket" if values["model.path"].startswith("pocket:") else "model=local")
    experiment = values.get("experiment")
    if (
        command != "eval"
        and {"data.path", "data.mix"} & values.keys()
        and "data" not in values
        and not (experiment and needs_data_path(experiment))
    ):
        added.append("data=local")
    return [*added, *arguments]


def _with_experiment(command: str, arguments: Sequence[str], *, runs_one: bool, shows: bool) -> list[str]:
    """Replace experiment=NAME size=SIZE by the option of group `experiment`.

    An experiment that is a sweep needs -m; --cfg shows its first job.
    """
    named = dict(argument.split("=", 1) for argument in arguments if re.match(r"(experiment|size)=", argument))
    if "experiment" not in named:
        if named:
            raise UserError("size= belongs to an experiment: experiment=NAME size=paper|pocket.")
        return list(arguments)
    option = experiment_option(named["experiment"], named.get("size"))
    swept = sweep_params(option)
    if swept and runs_one:
        name = option.rpartition("/")[2]
        raise UserError(f"experiment={name} is a sweep: hft {command} -m experiment={name} …")
    others = [argument for argument in arguments if not re.match(r"(experiment|size)=", argument)]
    first = [f"{key}={values.split(',')[0]}" for key, values in swept.items() if key not in _keys(others)]
    return [*others, f"experiment={option}", *(first if shows else [])]
