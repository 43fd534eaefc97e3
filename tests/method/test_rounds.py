"""The phases of a run, the draw of each phase, and what the model limits."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import composed

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import RunConfig
from hft_cli.data.sources import Source
from hft_cli.errors import UserError
from hft_cli.method.rounds import METHODS, draws, phase_config, phases, with_model_limits
from hft_cli.paths import resolve_path

TASKS = ("C-STANCE", "Py150", "20Minuten")
MODEL = {"model_type": "llama", "max_position_embeddings": 128}


def trace(*overrides: str) -> RunConfig:
    """A sequence of three tasks."""
    return composed("+method=hft", "data=trace", "data.path=root", f"data.tasks=[{','.join(TASKS)}]", *overrides)


def test_each_task_is_a_phase_with_its_own_settings():
    epochs = "train.epochs={C-STANCE: 1, Py150: 5, 20Minuten: 5}"
    run = phases(trace("data.metric=accuracy", epochs))
    assert [(p.number, p.round, p.name, p.data, p.test, p.epochs, p.metric) for p in run] == [
        (1, 1, "C-STANCE", "root/C-STANCE", "root/C-STANCE", 1, "accuracy"),
        (2, 2, "Py150", "root/Py150", "root/Py150", 5, "accuracy"),
        (3, 3, "20Minuten", "root/20Minuten", "root/20Minuten", 5, "accuracy"),
    ]


def test_a_replay_follows_each_task_in_the_same_round():
    run = phases(trace("continual=replay", "continual.replay_general=lima"))
    assert [(p.number, p.round, p.name, p.replays) for p in run] == [
        (1, 1, "C-STANCE", False), (2, 1, "C-STANCE-replay", True), (3, 2, "Py150", False),
        (4, 2, "Py150-replay", True), (5, 3, "20Minuten", False), (6, 3, "20Minuten-replay", True),
    ]  # fmt: skip
    general = Source("lima")
    assert run[1].sources == (general,)
    past = [Source(f"root/{task}", format="trace", fraction=0.1) for task in ("C-STANCE", "Py150")]
    assert run[5].sources == (*past, general)
    assert run[5].epochs == 1


def test_without_a_general_set_the_first_task_has_no_replay():
    assert [p.name for p in phases(trace("continual=replay"))][:3] == ["C-STANCE", "Py150", "Py150-replay"]


def test_a_mixed_replay_is_within_each_round():
    run = phases(trace("continual=mixed_replay", "continual.replay_share=0.06", "continual.replay_general=lima"))
    assert [(p.number, p.round, p.replays) for p in run] == [(1, 1, False), (2, 2, False), (3, 3, False)]
    assert [[(each.path, each.share) for each in p.sources] for p in run] == [
        [("root/C-STANCE", None), ("lima", 0.06)],
        [("root/Py150", None), ("root/C-STANCE", 0.03), ("lima", 0.03)],
        [("root/20Minuten", None), ("root/C-STANCE", 0.02), ("root/Py150", 0.02), ("lima", 0.02)],
    ]
    assert run[2].sources[1].format == "trace"
    first = phases(trace("continual=mixed_replay"))[0]
    assert [each.share for each in first.sources] == [None]


def test_every_round_has_the_sets_of_a_mix():
    run = phases(trace("data.mix=[{path: a, share: 0.1},{path: b, rows: 5, split: test}]"))
    mixed = (Source("a", share=0.1), Source("b", split="test", rows=5))
    assert [p.sources[1:] for p in run] == [mixed] * 3
    alone = composed("+method=hft", "data=local", "data.mix=[{path: a},{path: b}]")
    assert [(p.name, p.data) for p in phases(alone)] == [("mix", "a, b")]


def test_a_set_is_divided_into_rounds_and_scored_at_its_end():
    run = phases(trace("data.rounds_per_set=2", "continual=replay"))
    assert [(p.number, p.round, p.name, p.set_part, p.set_parts, p.test is None) for p in run] == [
        (1, 1, "C-STANCE-1of2", 1, 2, True), (2, 2, "C-STANCE-2of2", 2, 2, False), (3, 3, "Py150-1of2", 1, 2, True),
        (4, 4, "Py150-2of2", 2, 2, False), (5, 4, "Py150-replay", 1, 1, False), (6, 5, "20Minuten-1of2", 1, 2, True),
        (7, 6, "20Minuten-2of2", 2, 2, False), (8, 6, "20Minuten-replay", 1, 1, False),
    ]  # fmt: skip
    assert [p.task for p in run if p.test and not p.replays] == list(TASKS)
    assert [p.round for p in phases(trace("data.rounds_per_set=2", "method.alpha=0.5"))] == [1, 2, 3, 4, 5, 6, 6]


def test_each_part_of_a_set_has_a_draw_of_its_own():
    config = composed("+method=hft", "data=pocket_capitals", "data.rounds_per_set=2")
    again = composed("+method=hft", "data=pocket_two_tasks")
    params = parameters_from_folder(resolve_path("pocket:model"))
    first, second = draws(config, params)
    assert first.updated != second.updated
    assert draws(again, params) == (first, second)


def test_validation_rows_are_read_like_the_rounds_own():
    config = trace("data.validation=[a,0.1,root/20Minuten]", "continual=replay", "data.validation_split=eval")
    run = [phase for phase in phases(config) if not phase.replays]
    assert run[1].validation == 0.1
    assert run[2].validation == Source("root/20Minuten", split="eval", format="trace")
    assert run[0].validation == Source("a", split="eval", format="trace")
    assert {phase.validation for phase in phases(config) if phase.replays} == {None}


def test_each_training_set_may_have_its_own_part_of_the_hub():
    config = composed("+method=hft", "data=local", "data.path=[org/a,org/b]", "data.subset={a: main, b: null}",
                      "data.revision=v1")  # fmt: skip
    sources = [phase.sources[0] for phase in phases(config)]
    assert [(each.subset, each.revision) for each in sources] == [("main", "v1"), (None, "v1")]


def test_gem_remembers_rows_of_every_past_task():
    run = phases(trace("continual=gem", "continual.gem_memory=5"))
    assert [len(p.memories) for p in run] == [0, 1, 2]
    assert run[2].memories == tuple(Source(f"root/{task}", format="trace", at_most=5) for task in TASKS[:2])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("[a/x.jsonl,b/y.jsonl.gz]", ["x", "y"]),
        ("[a/x,b/x,c/x-1]", ["x-1-1", "x-2", "x-1-3"]),
        ("[a/train.jsonl,pocket:skills/order/train.jsonl]", ["a", "order"]),
        ("[org/set,train.json]", ["set", "train"]),
    ],
)
def test_each_round_has_a_name_of_its_own(paths, names):
    config = composed("+method=hft", "data=pocket_order", "data.test_path=null", f"data.path={paths}")
    assert [p.name for p in phases(config)] == names


def test_a_half_reset_is_one_phase_named_by_its_test_rows():
    config = composed("+method=half_reset", "model.base=BASE", "data.test_path=rows/skill.jsonl")
    (phase,) = phases(config)
    assert (phase.stage, phase.data, phase.test, phase.task) == ("half_reset", "BASE", "rows/skill.jsonl", "skill")


def test_phases_of_one_round_share_its_draw():
    params = parameters_from_folder(resolve_path("pocket:model"))
    drawn = draws(trace("continual=replay", "continual.replay_general=lima"), params)
    assert [d.round for d in drawn] == [1, 1, 2, 2, 3, 3]
    assert [drawn[i] == drawn[i + 1] for i in range(5)] == [True, False, True, False, True]


def test_the_seed_of_the_run_is_that_of_the_draw_unless_given():
    params = parameters_from_folder(resolve_path("pocket:model"))
    assert draws(composed("+method=hft", "seed=3"), params)[0].seed == 3
    assert draws(composed("+method=hft", "seed=3", "selection.seed=9"), params)[0].seed == 9


def test_a_dpo_phase_takes_its_settings_from_dpo():
    config = composed("+method=hft_dpo", "data=pocket_sft_then_dpo", "method.stages=[sft,dpo]",
                      "dpo.learning_rate=3e-6", "dpo.epochs=null",
                      "train.learning_rate=1e-3", "train.epochs=4")  # fmt: skip
    sft, dpo = (phase_config(config, phase).train for phase in phases(config))
    assert (sft.learning_rate, sft.epochs, sft.warmup) == (1e-3, 4, config.train.warmup)
    assert (dpo.learning_rate, dpo.epochs, dpo.warmup) == (3e-6, 4, config.dpo.warmup)


def test_a_replay_is_by_epochs_where_max_steps_is_set():
    config = trace("continual=replay", "continual.replay_general=lima", "train.max_steps=7")
    steps = [phase_config(config, phase).train.max_steps for phase in phases(config)]
    assert steps == [7, None] * 3


def test_max_length_is_at_most_the_models_positions():
    config = composed("+method=hft", "train.max_length=null")
    assert with_model_limits(config, MODEL, "m").train.max_length == 128
    assert with_model_limits(config, {"text_config": MODEL}, "m").train.max_length == 128
    assert with_model_limits(config, {"n_positions": 9999}, "m").train.max_length == 2048
    assert with_model_limits(config, {}, "m").train.max_length == 2048


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (("train.max_length=129",), MODEL, r"more than the 128 positions of m\. Set train\.max_length=128 "),
        (("train.packing=true",), {"model_type": "opt"}, r"m is of type 'opt', .* Set train\.packing=false"),
        (("train.padding_free=true",), {"model_type": "opt"}, r"of type 'opt', .* Set train\.padding_free=false"),
        (("generation.max_new_tokens=127", "data.metric=accuracy", "train.max_length=9"), MODEL,
         r"max_new_tokens=127 leaves no room for a prompt .* Set generation\.max_new_tokens=64"),
    ],
)  # fmt: skip
def test_a_config_beyond_the_model_is_refused_with_the_fix(overrides: Any, model: Any, message: str):
    with pytest.raises(UserError, match=message):
        with_model_limits(trace(*overrides), model, "m")


def test_an_unknown_method_is_answered_with_the_choices():
    config = composed("+method=hft")
    config.method.name = "hfft"
    with pytest.raises(UserError, match=rf"Did you mean 'hft'\? Available: {', '.join(METHODS)}"):
        phases(config)
