"""Rules across keys: each refuses what it is for, in one line, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import composed, composed_by

from hft_cli.config.schema import EngineConfig, EvalConfig, ModelConfig
from hft_cli.config.settings import check_settings
from hft_cli.config.suites import SuiteConfig
from hft_cli.config.validate import RULES, check, check_eval
from hft_cli.errors import UserError

TWO_NODES = ("engine.num_nodes=2", "engine.rendezvous=a:1")
BY_IMPORTANCE = ("selection=importance", "selection.importance_rows=x")
HFT, RESET = "+method=hft", ("+method=half_reset", "model.path=tuned", "model.base=base")
SEQUENCE = "data=pocket_sequence"

# rule -> overrides that break it, and the message
BROKEN = {
    "_folders_are_named": ((HFT, "output_dir="), r"output_dir= is empty\. Give a folder"),
    "_suite_is_no_path": (
        (HFT, "suite.name=../results"),
        r"suite\.name=\.\./results: files have that name",
    ),
    "_paths_are_text": ((HFT, "data.path=2024"), r"data\.path and data\.test_path are each a path or a list"),
    "_data_are_named": (
        (HFT, "model=llama2_7b"),
        r"No data: give data\.path=FILE\|FOLDER\|HUB_NAME or data=NAME",
    ),
    "_selection_has_a_ratio_to_meet": ((HFT, "selection=all", "selection.ratio=0.3"), r"no meaning with selection=all"),
    "_sets_can_be_divided": (
        ("+method=lora", "data.rounds_per_set=2"),
        r"method=lora trains the same adapters in all rounds: leave out data\.rounds_per_set",
    ),
    "_base_is_named": (RESET[:2], r"method=half_reset needs model\.base"),
    "_method_has_its_keys": ((HFT, "model.base=x"), r"model\.base is for method=half_reset and method=interpolate"),
    "_benchmarks_need_a_model_on_disk": (
        (*RESET, "method.save_model=false", "suite=knowledge"),
        r"leaves no model that the benchmarks of suite=knowledge",
    ),
    "_vllm_needs_a_model_on_disk": (
        (*RESET, "method.save_model=false", "generation.backend=vllm"),
        r"generation\.backend=vllm loads the model .* method\.save_model=false writes none",
    ),
    "_ranks_train": ((*RESET, "engine=zero2"), r"needs no ranks: leave out engine=zero2"),
    "_anchor_can_hold": ((HFT, "anchor=l2_sp", "engine=zero2_offload"), r"keeps the start .* without offload"),
    "_momentum_is_whole": ((HFT, "train.momentum_filter=0.1", "engine=zero2"), r"ZeRO gives .* use engine=single"),
    "_lora_is_sft_of_all_matrices": (("+method=lora", "method.stages=[dpo]"), r"method=lora is for SFT"),
    "_full_methods_freeze_nothing": (("+method=fft", "selection=layer"), r"method=fft updates .* Use method=hft"),
    "_ranks_are_counted": ((HFT, "engine.num_processes=0"), r"num_processes=0 is for engine=auto"),
    "_ranks_need_a_zero_stage": ((HFT, "engine.num_processes=2"), r"engine=single is one process.*zero1, zero2 or"),
    "_offload_needs_its_zero_stage": ((HFT, "engine=zero1", "engine.offload_optimizer=true"), r"for ZeRO-2 and 3"),
    "_deepspeed_file_needs_deepspeed": ((HFT, "engine.deepspeed=x.json"), r"runs without it\. Use engine=zero1"),
    "_nodes_can_meet": ((HFT, "engine=zero2", "engine.rendezvous=head"), r"engine\.rendezvous=head is not HOST:PORT"),
    "_stages_match_training_sets": ((HFT, "method.stages=[sft,dpo]"), r"names 2 stages for 1 training sets"),
    "_replay_keys_need_replay": ((HFT, "continual.replay_general=x"), r"replay_general is for continual=replay"),
    "_continual_suits_the_method": (("+method=dpo", SEQUENCE, "continual=gem"), r"is for SFT by method=fft, hft"),
    "_continual_suits_the_engine": ((HFT, SEQUENCE, "continual=gem", "engine=zero3"), r"does not work on engine=zero3"),
    "_dpo_can_be_done": (
        ("+method=hft_dpo", "engine=zero3", "dpo.reference=shared"),
        r"dpo\.reference=shared does not work on engine=zero3",
    ),
    "_importance_has_rows": ((HFT, "selection=importance"), r"needs data\.general=PATH"),
    "_names_are_given": ((HFT, "selection=names"), r"give both selection=names and selection\.names=\[PATTERN"),
    "_optimizer_suits_the_engine": ((HFT, "engine=zero2", "train.optimizer=sgd"), r"sgd is for engine=single"),
    "_date_is_a_day": ((HFT, "model.date=2026-13-31"), r"model\.date=2026-13-31 is no day, as 2026-12-31"),
    "_rows_have_one_order": (
        (HFT, "train.packing=true", "train.group_by_length=true"),
        r"no effect on packed rows",
    ),
    "_padding_is_there_to_leave_out": (
        (HFT, "train.packing=true", "train.padding_free=true"),
        r"padding_free=true has no effect on packed rows",
    ),
    "_flash_attention_is_in_bfloat16": ((HFT, "model.attention=flash_attention_2"), r"computes in bfloat16 only"),
    "_batch_is_whole": ((HFT, "train.batch_size=10", "train.micro_batch_size=4"), r"not a multiple .* that is: 8"),
    "_shares_leave_room": (
        (HFT, "data=local", "data.mix=[{path: a, share: 0.3},{path: b, share: 0.1}]"),
        r"they add up to 0\.4, not 1\. Use 0\.75, 0\.25, or give data\.path",
    ),
    "_mix_is_of_one_stage": (
        ("+method=hft_dpo", "data=pocket_sft_then_dpo", "method.stages=[sft,dpo]", "data.mix=[{path: a}]"),
        r"data\.mix adds the same rows to every round",
    ),
    "_validation_sets_are_known": (
        (HFT, "data.validation=1.5"),
        r"data\.validation=1\.5 is neither a path nor a share above 0 and below 1",
    ),
    "_tasks_are_in_one_folder": ((HFT, "data=trace", "data.path=[a,b]"), r"give one data\.path and no data\.test_path"),
    "_test_sets_match_training_sets": ((HFT, "data.test_path=[a,b]"), r"names 2 sets for 1 training sets"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_one_line(name):
    overrides, message = BROKEN[name]
    config = composed(*overrides)
    with pytest.raises(UserError, match=message) as error:
        check(config)
    assert "\n" not in str(error.value)
    broken = [rule.__name__ for rule in RULES if rule(config)]
    assert name in broken


def test_every_rule_has_a_case_above():
    assert set(BROKEN) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((HFT, "selection.redraw=balanced", "selection.balance=elements"), r"needs selection\.balance=matrices"),
        ((*RESET, "data.rounds_per_set=2"), r"method=half_reset does not train: leave out data\.rounds_per_set"),
        ((HFT, "data.rounds_per_set=2", "train.packing=true"), r"fixes the order of rows: set train\.packing=false"),
        (("+method=fft", "selection.head=freeze"), r"method=fft updates every matrix, so selection\.head=freeze"),
        (("+method=dpo", "selection=layer"), r"method=dpo updates .* Use method=hft_dpo"),
        ((HFT, "suite.name=data"), r"the test sets of the data have that name"),
        ((HFT, "suite.name=.."), r"files have that name"),
        ((HFT, "method.save_model=false"), r"are not for method=hft"),
        ((HFT, "engine=zero2", "engine.num_nodes=2", "engine.node_rank=2"), r"is not one of engine\.num_nodes=2"),
        ((HFT, "engine=zero2", "engine.offload_parameters=true"), r"is for ZeRO-3 with engine\.offload_optimizer"),
        ((HFT, "engine=zero2", "engine.num_nodes=3"), r"x engine\.num_nodes=3\. Nearest that is"),
        (("+method=lora", "engine=zero2_offload"), r"was not tried with offload"),
        ((HFT, "anchor=kl", "engine=zero3"), r"engine=zero3 has shards: use engine=single"),
        ((HFT, "anchor=kl", "anchor.weight=0"), r"anchor=kl, anchor\.weight=0.0: give .* a weight above 0"),
        ((HFT, "anchor.weight=1"), r"anchor=none, anchor\.weight=1.0: give anchor=l2_sp or kl"),
        (("+method=hft_dpo", "anchor=kl"), r"anchor=kl is for SFT"),
        (("+method=lora", "anchor=kl"), r"which method=lora has none of"),
        ((HFT, SEQUENCE, "continual=gem", "anchor=kl"), r"anchor=kl was not tried with continual=gem"),
        ((HFT, "anchor=l2_sp", "train.optimizer=sgd"), r"train\.optimizer=adamw_torch_fused or adafactor"),
        ((HFT, "train.momentum_filter=0.1", "train.optimizer=sgd"), r"needs AdamW's first moments"),
        ((HFT, "selection.importance_rows=x"), r"importance_rows is for selection=importance, not"),
        ((HFT, *BY_IMPORTANCE, "selection.balance=elements"), r"leave out selection\.redraw and"),
        ((HFT, *BY_IMPORTANCE, "engine=zero2", *TWO_NODES), r"use engine\.num_nodes=1"),
        (("+method=lora", "engine=zero3"), r"method=lora does not work on engine=zero3"),
        (("+method=lora", SEQUENCE, "continual=gem"), r"gradients of matrices, not of adapters"),
        (("+method=lora", "selection=layer"), r"method=lora updates every matrix"),
        ((HFT, "continual=replay"), r"continual=replay needs a sequence of tasks, but there is 1 round"),
        (("+method=hft_dpo", "train.packing=true"), r"train\.packing=true is for SFT"),
        (("+method=hft_dpo", "train.padding_free=true"), r"padding_free=true is for SFT; DPO's pairs are padded"),
        ((*RESET, "data=trace", "data.path=x"), r"method=half_reset does not train: leave out data\.tasks"),
        ((HFT, "data=local"), r"No data: give data\.path=FILE\|FOLDER\|HUB_NAME or data=NAME"),
        ((HFT, "data=trace"), r"data\.path is not set\. Give the folder that holds C-STANCE, …: data\.path=FOLDER"),
        (
            (HFT, "data.path=x", "data.mix=[{path: a, share: 0.6},{path: b, share: 0.4}]"),
            r"add up to 1 and leave no room for data\.path",
        ),
        ((HFT, "data=local", "data.mix=[{path: a, share: 1},{path: b}]"), r"no room for the sets without a share"),
        ((HFT, "data.mix=[{path: a, share: 0.1, rows: 5}]"), r"data\.mix\[0\] has a share and a number of rows"),
        ((HFT, "data.mix=[{path: a},{share: 0.1}]"), r"data\.mix\[1\] has no path\. Write it as"),
        ((HFT, "data.mix=[{path: a, shar: 0.1}]"), r"Unknown key 'data\.mix\[0\]\.shar'\. Did you mean '.*\.share'\?"),
        ((HFT, "data.mix=[{path: a, share: x}]"), r"data\.mix\[0\]\.share: Value 'x' of type 'str' could not be"),
        ((HFT, "data.mix=[a.jsonl]"), r"data\.mix\[0\]=a\.jsonl is not an object\. Write it as"),
        ((HFT, "data.mix={path: a}"), r"data\.mix=.* is not a list\. Write it as"),
        ((HFT, "data.mix=[{path: a, share: 0}]"), r"data\.mix\[0\]\.share=0\.0 must be in \(0, 1\]"),
        (
            (HFT, "data.mix=[{path: a, format: alpca}]"),
            r"Unknown data\.mix\[0\]\.format 'alpca'\. Did you mean 'alpaca'",
        ),
        ((*RESET, "data.mix=[{path: a}]"), r"method=half_reset does not train: leave out data\.mix"),
        ((HFT, "continual=mixed_replay"), r"continual=mixed_replay has nothing to replay in one round"),
        (
            (
                HFT,
                "data=local",
                "data.mix=[{path: a}]",
                "continual=mixed_replay",
                "continual.replay_general=g",
                "continual.replay_share=0.5",
                "data.mix=[{path: a, share: 0.5}]",
            ),
            r"continual=mixed_replay needs data\.path",
        ),
        ((HFT, "data.validation=[0.1,0.2,a]"), r"data\.validation names 3 sets for 1 training sets"),
        ((HFT, "data.validation=true"), r"data\.validation=True is neither a path nor a share"),
        ((HFT, "train.early_stopping=3"), r"train\.early_stopping=3 needs validation rows: give data\.validation=PATH"),
        ((HFT, "train.keep_best=true"), r"train\.keep_best=True needs validation rows"),
        ((*RESET, "data.validation=0.1"), r"method=half_reset does not train: leave out data\.validation"),
        ((HFT, "data.path=''"), r"data\.path and data\.test_path are each a path"),
        ((HFT, "seed=5000000000"), r"seed=5000000000 must be in \[0, 4294967295\]"),
        ((HFT, "train.epochs=nan"), r"train\.epochs=nan is not a finite number"),
        ((HFT, "train.max_grad_norm=inf"), r"train\.max_grad_norm=inf is not a finite number"),
        ((HFT, "suite.chat=maybe"), r"Unknown suite\.chat 'maybe'\. Available: auto, true, false"),
        ((HFT, "data.format=mesages"), r"Unknown data\.format 'mesages'\. Did you mean 'messages'\?"),
        ((HFT, "model.kinds={x: norms}"), r"Unknown model\.kinds\.x 'norms'\. Did you mean 'norm'\?"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check(composed(*overrides))


@pytest.mark.parametrize("overrides", [(HFT,), RESET, (HFT, "suite.chat=true"), (HFT, SEQUENCE, "continual=gem")])
def test_what_can_work_is_accepted(overrides):
    check(composed(*overrides))


def evaluation(**values: object) -> EvalConfig:
    config = EvalConfig(output_dir="x", model=ModelConfig("m", "m"), engine=EngineConfig("single"))
    return replace(config, **{"suite": SuiteConfig("s"), **values})


def test_an_evaluation_uses_one_node_and_known_models():
    check_eval(evaluation())
    with pytest.raises(UserError, match="scores on one node"):
        check_eval(evaluation(engine=EngineConfig("zero2", zero_stage=2, num_nodes=2)))
    with pytest.raises(UserError, match="models is empty: give after, before or both"):
        check_eval(evaluation(models=[]))
    with pytest.raises(UserError, match=r"Unknown models 'x'\. Available: after, before"):
        check_eval(evaluation(models=["x"]))
    with pytest.raises(UserError, match=r"No model: give model=NAME\. Available: llama2_13b"):
        check_eval(evaluation(model=ModelConfig()))


@pytest.mark.parametrize("size", ["0", "foo", "-3"])
def test_a_size_of_batches_is_a_number_or_auto(size):
    assert composed_by("eval", "suite=pocket", "suite.batch_size=auto").suite.batch_size == "auto"
    assert composed_by("eval", "suite=pocket", "suite.batch_size=3").suite.batch_size == 3
    with pytest.raises(UserError, match=r"suite\.batch_size"):
        check_settings(composed_by("eval", "suite=pocket", f"suite.batch_size={size}"))
