"""Settings that were typed and that nothing reads are refused."""

from __future__ import annotations

import pytest
from helpers import composed, hft

from hft_cli.config.typed import refuse_unread
from hft_cli.errors import UserError

HFT, DPO, OWN = "+method=hft", "+method=hft_dpo", ("data=local", "data.path=x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (HFT, "train.schedule=constant", "train.warmup=0.5"),
            r"train\.warmup=0\.5 has no effect without train\.schedule=linear, cosine or constant_with_warmup",
        ),
        ((HFT, "dpo.beta=0.3"), r"dpo\.beta=0\.3 has no effect without a DPO round \(method=hft_dpo or dpo\)"),
        ((HFT, "dpo.learning_rate=null"), r"dpo\.learning_rate=None has no effect without a DPO round"),
        ((HFT, "lora.rank=4"), r"lora\.rank=4 has no effect without method=lora\. Use that, or leave lora\.rank out"),
        ((HFT, "continual.replay_ratio=0.5"), "without continual=replay"),
        ((HFT, "continual.replay_shuffle=false"), "without continual=replay"),
        ((HFT, "continual.replay_share=0.5"), "without continual=mixed_replay"),
        ((HFT, "continual.gem_memory=5"), "without continual=gem"),
        ((HFT, "selection.importance_update=most"), "without selection=importance"),
        ((DPO, "train.learning_rate=1e-3"), r"without an SFT round \(for DPO set dpo\.learning_rate\)"),
        ((HFT, "train.epochs=7"), r"train\.epochs=7 has no effect without train\.max_steps=null"),
        ((DPO, "dpo.epochs=7"), r"dpo\.epochs=7\.0 has no effect without dpo\.max_steps=null"),
    ],
)
def test_a_typed_setting_that_nothing_reads_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        refuse_unread(composed(*overrides), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (HFT,),
        (HFT, "train.schedule=constant", "train.warmup=0"),
        (HFT, "train.schedule=constant"),  # the warmup is that of the recipe
        (HFT, "lora.rank=8"),  # the default
        (HFT, *OWN, "train.epochs=7"),
        (HFT, "train.max_steps=5", "train.epochs=7"),
        ("+method=lora", "lora.rank=4"),
        (DPO, "dpo.beta=0.3", "dpo.warmup=0", "train.max_steps=4", "dpo.max_steps=4"),
        (DPO, "train.max_steps=4", "dpo.max_steps=null"),
        (DPO, "data=pocket_sft_then_dpo", "method.stages=[sft,dpo]", "train.learning_rate=1e-3", "dpo.beta=0.3"),
        (HFT, "data=pocket_sequence", "continual=replay", "continual.replay_ratio=0.5"),
    ],
)
def test_what_is_read_or_not_typed_is_accepted(overrides):
    refuse_unread(composed(*overrides), overrides)


def test_a_sweep_gives_a_setting_to_all_its_jobs():
    alone = hft("plan", HFT, "lora.rank=4")
    assert (alone.status, alone.err.count("\n")) == (2, 1)
    swept = hft("plan", "-m", "+method=hft,lora", "lora.rank=4")
    assert swept.status == 0, swept.err
