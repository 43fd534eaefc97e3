"""What was typed, as Hydra's grammar has it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hft_cli.errors import UserError, choose
from hft_cli.paths import conf_dir, group_options


def is_sweep(argv: Sequence[str]) -> bool:
    """Whether the words after a command ask for a sweep."""
    return bool({"-m", "--multirun"} & set(argv))


def eval_arguments(words: Sequence[str]) -> list[str]:
    """What was typed after `hft eval`, in Hydra's grammar.

    Raises:
        UserError: if both a run and a model are given.
    """
    argv = [plain_override(word, sweep=is_sweep(words)) for word in words]
    keys = {word.split("=")[0].lstrip("+") for word in argv}
    if "run" in keys and keys & {"model", "model.path"}:
        raise UserError("run=… scores the run's own models: leave out model and model.path, or leave out run.")
    if "model.path" in keys and "model" not in keys:
        argv.insert(0, "model=local")
    argv.sort(key=lambda word: word not in ("-m", "--multirun"))
    return [re.sub(OF_MAPS, r"++\1=", word) for word in argv]


def hydra_arguments(name: str, argv: Sequence[str]) -> list[str]:
    """What was typed after `hft train` or `hft plan`, as Hydra's grammar has it."""
    # Hydra asks for a + before a group without a default and before a new key of a map; we do not.
    argv = [plain_override(argument, sweep=is_sweep(argv)) for argument in argv]
    keys = {argument.split("=")[0].lstrip("+") for argument in argv}
    # A path of the user's own goes with `local`, not with the embedded model's or data's settings.
    for group in ("model", "data"):
        if f"{group}.path" in keys and group not in keys:
            place = next(i for i, argument in enumerate(argv) if argument.lstrip("+").startswith(f"{group}.path="))
            argv.insert(place, f"{group}=local")
    # Hydra's parser takes overrides on one side of a flag only; -m may stand anywhere.
    argv.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    if is_sweep(argv) and any(argument.startswith("--cfg") or argument == "-c" for argument in argv):
        raise UserError("--cfg shows one configuration: leave out -m and the lists of values.")
    argv = [re.sub(r"^method=", "+method=", re.sub(OF_MAPS, r"++\1=", argument)) for argument in argv]
    _sized(name, argv)
    if not any(re.match(r"[+~]*(method|experiment)[=@.]", a) for a in argv) and not any(
        a.startswith("-") for a in argv
    ):
        raise UserError(
            f"No method: what should the run do? Available: {', '.join(group_options('method'))}. "
            f"For instance: hft {name} +method=hft"
        )
    return argv


def _sized(name: str, argv: list[str]) -> None:
    """See that an experiment which sweeps is swept, and give it the paper's size unless another is typed."""
    place = next((i for i, text in enumerate(argv) if re.match(r"\+?experiment=", text)), None)
    sized = [text.partition("=")[2] for text in argv if re.match(r"\+?size=", text)]
    for size in sized:
        choose("size", size, group_options("size"))
    if place is None:
        if sized:
            raise UserError("size= is of an experiment: experiment=NAME size=paper|pocket.")
        return
    argv[place] = argv[place].lstrip("+")
    experiment = argv[place].partition("=")[2]
    choose("experiment", experiment, group_options("experiment"))
    text = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text()
    if "sweeper:" in text and not {"-m", "--multirun", "--cfg", "-c"} & set(argv):
        raise UserError(f"experiment={experiment} is a sweep: hft {name} -m experiment={experiment} …")
    if "size=pocket" in text and not sized:
        argv.append("size=paper")
    elif sized and "size=pocket" not in text:
        raise UserError(f"experiment={experiment} has one size only: leave out size=.")


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


def plain_override(argument: str, sweep: bool) -> str:
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
