"""conf/: every file composes to a config that is accepted, and experiments come in the sizes that they have."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import yaml
from helpers import composed

from hft_cli.cli.overrides import hydra_arguments
from hft_cli.config.conf import SIZES, experiment_option, groups, options_of, sweep_params
from hft_cli.config.schema import DataConfig, EngineConfig, RunConfig
from hft_cli.config.validate import check
from hft_cli.errors import UserError
from hft_cli.files import from_dict
from hft_cli.method.rounds import METHODS
from hft_cli.method.selection import STRATEGIES
from hft_cli.paths import conf_dir, group_options
from hft_cli.runner.tracking import TRACKERS

TUNED = ("model.path=tuned", "model.base=base")  # what Half-Reset needs
BOTH_SIZES = sorted(set(group_options("experiment/paper")) & set(group_options("experiment/pocket")))


def file_cases():
    """(overrides) that compose each file of conf/."""
    for group in groups():
        for option in group_options(group):
            method = ["+method=fft" if option == "all" else "+method=hft"]
            if group == "method":
                method = []
            rest = ["data=pocket_sequence"] if group == "continual" else []
            if group == "model" and option != "pocket":
                rest = ["data=pocket_capitals", *(["model.path=F"] if option == "local" else [])]
            if group == "data":
                rest = ["data.path=F"] if option in ("local", "trace") else []
                rest += ["method.stages=[sft,dpo]"] if option.endswith(("then_dpo", "v2_ultrafeedback")) else []
            if option in ("none", "half_reset", "interpolate") and group in ("data", "method"):
                method, rest = ["+method=half_reset"] * (group == "data"), [*TUNED]
            if option.startswith("trace") and group == "recipe":
                rest = ["data=trace", "data.path=F"]
            if group == "anchor":
                method = ["+method=hft"]
            if option == "importance" or (group, option) == ("method", "replay"):
                rest = ["data.general=F"]
            if option == "names":
                rest = ["selection.names=[q_proj]"]
            if option == "tulu2_packed":
                rest = ["data=tulu_v2"]
            yield pytest.param([*method, f"{group}={option}", *rest], id=f"{group}={option}")


@pytest.mark.parametrize("overrides", list(file_cases()))
def test_every_option_composes_and_is_accepted(overrides):
    check(composed(*overrides))


@pytest.mark.parametrize("option", [f"{size}/{name}" for size in SIZES for name in group_options(f"experiment/{size}")])
def test_every_experiment_composes_and_is_accepted(option):
    rest = [] if sweep_params(option) else ["+method=hft"]
    if "half_reset" in option:
        rest += TUNED
    elif composed(f"experiment={option}", *rest).data.path is None:
        rest += ["data.path=F"]
    check(composed(f"experiment={option}", *rest))


@pytest.mark.parametrize("name", BOTH_SIZES)
def test_size_pocket_is_the_embedded_model_and_paper_the_default(name):
    rest = ("output_dir=x", *(TUNED if name == "half_reset_pilot" else ()))
    paper = composed(f"experiment={name}", *rest)
    pocket = composed(f"experiment={name}", "size=pocket", *rest)
    assert paper == composed(f"experiment=paper/{name}", *rest)
    assert paper == composed(f"experiment={name}", "size=paper", *rest)
    assert pocket.engine == EngineConfig("single")
    assert pocket.suite.tasks == {"facts": "pocket:facts.jsonl"}
    if name != "half_reset_pilot":
        assert (paper.model.name, paper.engine.num_processes, paper.train.save_every) == ("llama2_7b", 8, 200)
        assert (pocket.model.name, pocket.train.batch_size, pocket.train.save_every) == ("pocket", 16, None)
        assert not pocket.train.packing


@pytest.mark.parametrize("name", BOTH_SIZES)
def test_the_small_size_sweeps_the_same_with_three_seeds(name):
    paper, pocket = (sweep_params(f"{size}/{name}") for size in SIZES)
    assert list(pocket)[: len(paper)] == list(paper)
    assert pocket["seed"] == ("1,2,3,4,5" if name == "forgetting" else "1,2,3")
    if name not in ("frontier", "forgetting"):  # whose rates are those of the model
        assert paper.items() <= pocket.items()


def test_an_experiments_data_path_completes_its_data():
    config = composed("experiment=trace", "data.path=/data/TRACE")
    assert (config.data.name, config.data.path, len(config.data.tasks)) == ("trace", "/data/TRACE", 8)
    other = composed("experiment=sft_then_dpo", "+method=hft", "data.path=[a,b]")
    assert (other.data.name, other.data.path, other.data.test_path) == ("local", ["a", "b"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("experiment=levelablation",), r"Unknown experiment 'levelablation'\. Did you mean 'level_ablation'\?"),
        (("experiment=level_ablation", "size=small"), r"Unknown size 'small'\. Available: paper, pocket\."),
        (("experiment=demo", "size=paper"), r"experiment=demo has one size only: leave out size=paper"),
        (("+method=hft", "size=pocket"), r"size= belongs to an experiment: experiment=NAME size=paper\|pocket"),
        (("model=null",), r"Unknown model 'null'\. Available: llama2_13b"),
        (("-m", "+method=hft,fft", "--cfg", "job"), r"--cfg shows one configuration"),
    ],
)
def test_a_mistake_in_groups_is_refused_before_composing(arguments, message):
    with pytest.raises(UserError, match=message):
        hydra_arguments("train", ["-m", *arguments])


def test_an_experiment_that_sweeps_needs_the_flag():
    with pytest.raises(UserError, match=r"experiment=trace is a sweep: hft plan -m experiment=trace …"):
        hydra_arguments("plan", ["experiment=trace", "+method=hft"])
    assert hydra_arguments("train", ["experiment=trace", "-m"]) == ["-m", "experiment=paper/trace"]
    assert hydra_arguments("train", ["+method=hft", "experiment=sft_then_dpo"])[-1] == "experiment=pocket/sft_then_dpo"


def test_an_experiment_has_the_papers_size_by_default():
    assert experiment_option("trace", None) == "paper/trace"
    assert experiment_option("trace", "pocket") == experiment_option("pocket/trace", None) == "pocket/trace"
    assert experiment_option("demo", None) == "pocket/demo"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("+method=hft", "method=hft"),
        ("method=hft", "method=hft"),
        ("+recipe=trace", "recipe=trace"),
        ("suite.benchmarks.mmlu.shots=5", "++suite.benchmarks.mmlu.shots=5"),
        ("data.path=a b.jsonl", "data.path='a b.jsonl'"),
        ("data.path=it's.jsonl", "data.path='it\\'s.jsonl'"),
        ("data.path=[a,b]", "data.path=[a,b]"),
        ("model.tuned=T", "model.path=T"),
        ("output_dir=x=1", "output_dir='x=1'"),
        ("train.max_steps=3", "train.max_steps=3"),
    ],
)
def test_an_argument_is_translated_into_hydras_grammar(typed, expected):
    assert hydra_arguments("train", [typed])[-1] == expected


def test_data_files_set_data_only_and_nothing_else():
    names = {spec.name for spec in fields(DataConfig)}
    for option, values in options_of("data").items():
        text = (conf_dir() / f"data/{option}.yaml").read_text()
        assert "@package" not in text
        assert values.keys() <= names


def test_a_small_experiment_starts_from_the_papers():
    for name in BOTH_SIZES:
        values = yaml.safe_load((conf_dir() / f"experiment/pocket/{name}.yaml").read_text())
        assert values["defaults"][0] == f"/experiment/paper/{name}"


def test_every_entry_of_a_registry_has_an_option():
    presets = {"importance", "kl", "l2_sp", "mofo", "replay", "wise_ft"}  # of fft and hft
    assert set(group_options("method")) == set(METHODS) | presets
    assert set(group_options("selection")) == set(STRATEGIES)
    assert set(group_options("tracking")) == set(TRACKERS)


def test_a_sealed_config_comes_back_as_it_was():
    config = composed("+method=hft", "+model.kinds={mamba: attention}", "selection.seed=3")
    assert from_dict(RunConfig, json.loads(json.dumps(asdict(config)))) == config
