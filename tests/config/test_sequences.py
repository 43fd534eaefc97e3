"""Settings of a sequence of tasks that are refused, in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hft_cli.config.data_sets import test_format as format_of_test_rows
from hft_cli.config.schema import DataConfig, MethodConfig, ModelConfig, RunConfig
from hft_cli.config.validate import check
from hft_cli.errors import UserError
from hft_cli.method.rounds import phases

TASKS = ("C-STANCE", "Py150", "20Minuten")


def sequence(**changes: object) -> RunConfig:
    """A run over three tasks; a change is SECTION__KEY=VALUE."""
    config = RunConfig(
        output_dir="x",
        model=ModelConfig(name="m", path="p"),
        data=DataConfig(name="d", path="root", tasks=list(TASKS), metric={**dict.fromkeys(TASKS, "accuracy")}),
        method=MethodConfig(name="hft"),
        train=replace(RunConfig().train, epochs={"C-STANCE": 1, "Py150": 5, "20Minuten": 5}),
    )
    config.engine.name = config.suite.name = "none"
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def plan(config: RunConfig) -> None:
    check(config)
    phases(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__epochs": {"C-STANCE": 1}}, r"train\.epochs has no value for Py150 .*'train\.epochs=\{Py150: …, …\}'"),
        ({"train__epochs": {**dict.fromkeys(TASKS, 1), "Py150": 0}}, r"train\.epochs\.Py150=0 must be above 0"),
        ({"data__metric": "bleu"}, r"Unknown data\.metric 'bleu'\. .*Available: exact_match, token_accuracy"),
        ({"data__test_path": "x"}, r"data\.tasks names folders below data\.path, which also hold the test rows"),
        ({"continual__name": "ewc"}, r"Unknown continual\.name 'ewc'\. .*Available: seqft, replay, mixed_replay"),
        ({"continual__name": "gem", "data__tasks": ["Py150"]}, r"continual=gem needs a sequence of tasks"),
        ({"continual__name": "gem", "engine__zero_stage": 3}, r"does not work on engine=zero3: use engine=single"),
        ({"continual__name": "gem", "train__packing": True}, r"set train\.packing=false"),
        ({"continual__name": "replay", "method__stages": ["dpo"]}, r"continual=replay is for SFT"),
        ({"train__epochs": None}, r"train\.epochs=null is not a number\. It must be above 0"),
        ({"train__epochs": [1, 2, 3]}, r"train\.epochs=\[1, 2, 3\] is not a number\. It must be above 0"),
        ({"continual__replay_general": "x"}, r"continual\.replay_general is for continual=replay"),
        (
            {"continual__name": "replay", "continual__replay_shuffle": False, "train__packing": True},
            r"set continual\.replay_shuffle=true",
        ),
        ({"continual__replay_ratio": 1.5}, r"continual\.replay_ratio=1\.5 must be in \(0, 1\]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        plan(sequence(**changes))
    assert "\n" not in str(error.value)


def test_rows_of_a_tasks_test_have_the_format_of_its_training():
    """Even if a row fits two formats: what is trained is what is scored."""
    assert format_of_test_rows(DataConfig(name="d", path="p", tasks=["a"], format="trace")) == "trace"
    assert format_of_test_rows(DataConfig(name="d", path="p", format="trace")) == "auto"
