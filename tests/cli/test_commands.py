"""What a user types and what a mistake says: exit status 2, one line, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Ended, command, composed, environment, hft

from hft_cli.config.schema import SCHEMAS, RunConfig
from hft_cli.config.settings import leaves
from hft_cli.config.validate import check
from hft_cli.errors import UserError, choose
from hft_cli.files import from_dict
from hft_cli.method.rounds import METHODS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GROUPS = {"model": "model", "data": "data", "method": "+method", "selection": "selection", "engine": "engine",
          "suite": "suite", "continual": "continual", "experiment": "experiment"}  # fmt: skip


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# ruff: noqa: E501
MISTAKES = {
    "no method": ((), r"No method: .* Available: dpo, fft, half_reset, hft, hft_dpo\. For instance: hft train \+method=hft"),
    "sweep without -m": (("experiment=level_ablation",), r"experiment=level_ablation is a sweep: hft train -m experiment=level_ablation"),
    "unknown experiment": (("-m", "experiment=levelablation"), r"Unknown experiment 'levelablation'\. Did you mean 'level_ablation'\?"),
    "unknown size": (("-m", "experiment=level_ablation", "size=small"), r"Unknown size 'small'\. Available: paper, pocket\."),
    "size of one size": (("-m", "experiment=demo", "size=pocket"), r"experiment=demo has one size only: leave out size="),
    "size of nothing": (("+method=hft", "size=pocket"), r"size= is of an experiment: experiment=NAME size=paper\|pocket"),
    "unknown method": (("+method=htf",), r"Unknown method 'htf'\. Did you mean 'hft'\? Available: dpo, fft, half_reset, hft, hft_dpo\."),
    "unknown engine": (("+method=hft", "engine=zero4"), r"Unknown engine 'zero4'\. Did you mean 'zero3'"),
    "unknown key": (("+method=hft", "train.learning_rat=1"), r"Unknown key 'train\.learning_rat'\. Did you mean 'train\.learning_rate'"),
    "added key": (("+method=hft", "+train.bogus=1"), r"Unknown key 'train\.bogus'"),
    "unknown top key": (("+method=hft", "outputdir=x"), r"Unknown key 'outputdir'\. Did you mean 'output_dir'"),
    "wrong type": (("+method=hft", "train.max_steps=ten"), r"train\.max_steps: Value 'ten' .* Integer"),
    "quoted number": (("+method=hft", "train.learning_rate='1e-5x'"), r"train\.learning_rate: .* Float"),
    "ratio": (("+method=hft", "selection.ratio=1.5"), r"selection\.ratio=1\.5 must be in \[0, 1\]"),
    "ratio of all": (("+method=fft", "selection.ratio=0.3"), r"has no meaning with selection=all"),
    "choice": (("+method=hft", "selection.redraw=independant"), r"Did you mean 'independent'\?"),
    "fft selects": (("+method=fft", "selection=layer"), r"method=fft updates every matrix.*Use method=hft"),
    "ranks": (("+method=hft", "engine.num_processes=2"), r"engine=single is one process.*Use engine=zero1, zero2 or zero3"),
    "batch": (("+method=hft", "train.batch_size=10", "train.micro_batch_size=4"), r"not a multiple .* Nearest that is: 8"),
    "steps": (("+method=hft", "train.max_steps=0"), r"train\.max_steps=0 must be at least 1"),
    "rate": (("+method=hft", "train.learning_rate=0"), r"train\.learning_rate=0(\.0)? must be above 0"),
    "warmup": (("+method=hft", "train.warmup=1"), r"train\.warmup=1(\.0)? must be in \[0, 1\)"),
    "tests": (("+method=hft", "data.test_path=[a,b]"), r"data\.test_path names 2 sets for 1 training sets"),
    "no data": (("+method=hft", "data.path=nowhere.jsonl"), r"No such file or folder: 'nowhere\.jsonl'"),
    "no model": (("+method=hft", "model.path=./nowhere"), r"model\.path=\./nowhere is not a folder"),
    "no hub": (("+method=hft", "model.path=meta/none"), r"model\.path=meta/none is neither a folder nor a model"),
    "no path": (("+method=hft", "data=local"), r"data\.path is not set\. Give it on the command line: data\.path=…"),
    "nothing trains": (
        ("+method=hft", "selection.ratio=0", "selection.embeddings=freeze", "selection.head=freeze", "selection.final_norm=freeze"),
        r"Nothing would be trained",
    ),
    "resume nothing": (("+method=hft", "resume=true"), r"no unfinished run of this configuration"),
    "resume elsewhere": (("+method=hft", "resume=true", "output_dir=there"), r"resume=true, but there is no run in there"),
    "sweep without method": (("-m", "train.learning_rate=1,2"), r"method\.name is not set"),
    "sweep and show": (("-m", "+method=hft,fft", "--cfg", "job"), r"--cfg shows one configuration"),
    "number for a path": (("+method=hft", "data.path=2024"), r"data\.path and data\.test_path are each a path or a list"),
    "accents": (("+method=hft", "data.path=données.jsonl"), r"No such file or folder: 'données\.jsonl'"),
    "spaces": (("+method=hft", "data.path=a (1) = b's.jsonl"), r"No such file or folder: 'a \(1\) = b's\.jsonl'"),
    "seed": (("+method=hft", "seed=5000000000"), r"seed=5000000000 must be in \[0, 4294967295\]"),
    "fft freezes": (("+method=fft", "selection.head=freeze"), r"method=fft updates every matrix, so selection\.head=freeze"),
    "positions": (("+method=hft", "train.max_length=4096"), r"more than the 512 positions of model\. Set train\.max_length=512"),
    "not a folder": (("+method=hft", "output_dir=/dev/null/x"), r"Not a directory: /dev/null/x"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_status_2_and_leaves_nothing(name, tmp_path):
    arguments, said = MISTAKES[name]
    ended = hft("train", *arguments, cwd=tmp_path)
    assert ended.status == 2, ended
    assert re.search(said, ended.err), ended.err
    assert ended.err.startswith("hft: ")
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("hft: failed: ")]  # a sweep's jobs
    assert len(lines) == 1
    if "-m" not in arguments:
        assert ended.out == ""
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian",), r"Unknown command 'trian'\. Did you mean 'train'\? Available: train, plan, eval, verify"),
        (("verify", "nowhere"), r"There is no run directory nowhere"),
        (("verify", "."), r"is not the directory of a run"),
        (("show", "draws", "."), r"Cannot read draws\.json: No such file"),
        (("report", "."), r"There is no run in \."),
    ],
)
def test_other_commands_say_a_mistake_in_one_line_too(arguments, said, tmp_path):
    ended = hft(*arguments, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert re.search(said, ended.err)
    assert len(ended.err.strip().splitlines()) == 1


def test_help_comes_without_torch_or_hydra_and_at_once():
    code = "import sys, hft_cli.cli.main as c; sys.argv=['hft','--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch','hydra','transformers'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hft train method=METHOD" in said
    assert said.endswith("[]\n")
    times = []
    for _ in range(5):
        start = os.times()  # of children's processor, not the clock: other tests run beside this one
        subprocess.run(command("--help"), capture_output=True, check=True)
        end = os.times()
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(times) < 0.3


def test_composing_a_run_does_not_import_torch():
    code = (
        "import sys, hft_cli.runner.training, hft_cli.cli.main, hft_cli.report.write; "
        "print(sorted({'torch','transformers','deepspeed','trl'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert said.stdout == "[]\n"


@pytest.mark.parametrize("spelling", ["method=hft", "+method=hft"])
def test_method_is_spelled_with_or_without_a_plus(spelling):
    ended: Ended = hft("train", spelling, "--cfg", "job")
    assert ended.status == 0
    assert "name: hft" in ended.out


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_config_file_composes_and_is_accepted(group, option):
    method = [] if group == "method" else ["+method=fft" if option == "all" else "+method=hft"]
    rest = (
        [f"{group}.path=of-your-own"] if group in ("model", "data") and option in ("local", "trace") else []
    )  # they have none by themselves
    if group == "continual":
        method, rest = [f"+method={'fft' if option == 'lora' else 'hft'}"], ["data=pocket_sequence"]
    if option in ("none", "half_reset", "half_reset_explorer") and group in ("data", "method", "experiment"):
        method, rest = ["+method=half_reset"], ["model.path=tuned", "model.base=base"]
    if option == "pocket_sft_then_dpo":
        rest = ["method.stages=[sft,dpo]"]
    if option == "half_reset_pilot":
        method, rest = ["+method=half_reset"], ["model.path=tuned", "model.base=base"]
    given = [] if group == "method" and method else [f"{GROUPS[group]}={option}"]
    sized = ["size=pocket"] if group == "experiment" and option in sized_experiments() else []
    check(composed(*method, *given, *sized, *rest))


def sized_experiments() -> list[str]:
    return [name for name in options("experiment") if "size=pocket" in (CONF / f"experiment/{name}.yaml").read_text()]


@pytest.mark.parametrize("name", sized_experiments())
def test_an_experiment_has_the_size_of_the_paper_unless_the_embedded_one_is_asked_for(name):
    method, rest = "+method=hft", ["data.path=[a,b]" if name == "dpo" else "data.path=of-your-own"]
    if name == "half_reset_pilot":
        method, rest = "+method=half_reset", ["model.path=tuned", "model.base=base"]
    paper = composed(method, f"experiment={name}", "size=paper", *rest)
    pocket = composed(method, f"experiment={name}", "size=pocket", *rest)
    check(paper)
    assert paper.engine.num_processes == (1 if name == "half_reset_pilot" else 8)
    assert pocket.engine.num_processes == 1
    assert pocket.suite.tasks == {"facts": "pocket:facts.jsonl"}
    if name != "half_reset_pilot":
        assert (paper.model.name, pocket.model.name) == ("llama2_7b", "pocket")


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiments_header_gives_its_command(name):
    text = (CONF / f"experiment/{name}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"experiment={name}" in header


def test_there_is_a_config_file_for_every_choice_that_the_contract_names():
    assert set(options("method")) == set(METHODS)
    assert set(options("selection")) == {"all", "category", "layer", "model"}
    assert {"single", "zero1", "zero2", "zero3"} <= set(options("engine"))


def test_every_field_has_help():
    for schema in SCHEMAS.values():
        for key, spec, _ in leaves(schema):
            assert spec.metadata["setting"].help.endswith("."), key


def test_every_field_is_read_by_something_other_than_its_check():
    """By its section's name, as in `train.warmup`; selection.py calls its section `config`."""
    config = ROOT / "hft_cli/config"
    sources = {
        str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "hft_cli").rglob("*.py") if config not in p.parents
    }
    for key, spec, _ in leaves(RunConfig):
        section, name = key.split(".")[0] if "." in key else "config", spec.name
        text = sources["hft_cli/method/selection.py"].replace("config.", "selection.") if section == "selection" else ""
        text += "".join(sources[stem] for stem in sorted(sources))
        assert re.search(rf"\b{section}\.{name}\b", text), f"{key} is set and checked, but nothing reads it"


def test_the_error_for_an_unknown_name_gives_the_nearest_and_all():
    with pytest.raises(UserError, match=r"Unknown thing 'aple'\. Did you mean 'apple'\? Available: apple, pear\."):
        choose("thing", "aple", ["apple", "pear"])


def test_a_sealed_config_comes_back_as_it_was():
    config = composed("+method=hft", "+model.kinds={mamba: attention}", "selection.seed=3")
    from dataclasses import asdict

    assert from_dict(RunConfig, json.loads(json.dumps(asdict(config)))) == config
