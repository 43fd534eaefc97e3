"""training/dpo.py with the embedded model: all kinds of reference train alike, and a wrong one stops the run.

Run as a program, this file is a rank of the tests with DeepSpeed: `torchrun … test_dpo.py OUT STAGE DTYPE RUNS`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import torchrun

from hft_cli.checkpoint.folders import weights_hash
from hft_cli.config.schema import RunConfig
from hft_cli.config.training import DpoConfig
from hft_cli.data.pairs import prepare_pairs
from hft_cli.data.preferences import ANSWERS, Preference
from hft_cli.errors import UserError
from hft_cli.launch.compat import exit_rank
from hft_cli.launch.ranks import join_ranks
from hft_cli.live.checksum import frozen_checksum
from hft_cli.paths import resolve_path
from hft_cli.training import dpo
from hft_cli.training.compat import salted
from hft_cli.training.procedures import PROCEDURES
from hft_cli.training.session import TrainerParts
from hft_cli.training.weights import freeze

BASE = Path(resolve_path("pocket:model"))
LN2 = math.log(2)
BETA, ANSWER_TOKENS = 0.1, 8.0


def preference(question: str, chosen: str, rejected: str) -> Preference:
    prompt, *answers = (
        {"role": role, "content": text}
        for role, text in (("user", question), ("assistant", chosen), ("assistant", rejected))
    )
    return Preference.of([prompt], *answers)


ROWS = [
    preference(f"What is the capital of {country}?", chosen, rejected)
    for country, chosen, rejected in (
        ("France", "Paris", "I do not know, sorry."), ("Italy", "It is Rome, in Italy.", "No"),
        ("Spain", "Madrid", "Oslo"), ("Norway", "Oslo", "Madrid it is"), ("Peru", "Lima", "Rome"),
        ("Japan", "Tokyo", "Kyoto"), ("Chad", "Ndjamena", "Who knows"), ("Iran", "Teheran", "Shiraz, I think"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = load(BASE)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    shutil.copy(BASE / "tokenizer.json", folder)
    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def half(model: Any) -> Any:
    """Every second parameter frozen."""
    names = [name for name, _ in model.named_parameters()]
    return freeze(model, names[::2], names[1::2])


def settings(kind: str) -> dict[str, Any]:
    config = RunConfig(dpo=DpoConfig(reference=kind))
    return PROCEDURES["dpo"].settings(config)[1]


@dataclass
class Trained:
    logs: list[dict[str, float]]
    model: Any
    frozen_unchanged: bool


def train(
    out: Path,
    kind: str,
    start: Path = BASE,
    reference: Path | None = None,
    reference_dtype: str | None = None,
    stage: int | None = None,
    dtype: str = "float32",
    resume: bool = False,
    **options: Any,
) -> Trained:
    """A few steps of DPO, in the order of train_phase; out/tokens holds the rows."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig

    deepspeed = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
    }
    given = {
        "output_dir": str(out / "checkpoints"), "deepspeed": deepspeed if stage else None, "learning_rate": 1e-3,
        "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 64,
        "bf16": dtype == "bfloat16", "use_cpu": True, "logging_steps": 1, "logging_first_step": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "activation_checkpointing": False,
        "dataloader_pin_memory": False, **settings(kind),
    }  # fmt: skip
    arguments = DPOConfig(**given | options)
    if stage:
        join_ranks()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if os.environ.get("RANK", "0") == "0" and not resume:
        salted(prepare_pairs(ROWS, tokenizer, 64, "x").dataset, weights_hash(start)).save_to_disk(out / "tokens")
    if stage:
        torch.distributed.barrier()

    model = half(load(start, dtype if stage else "float32"))
    before = frozen_checksum(model)
    logs: list[dict[str, float]] = []

    class Seen(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                seen.append({key: logs[key] for key in ("loss", *dpo.METRICS)})

    seen = logs
    loaded = partial(load, reference or start, reference_dtype or (dtype if stage else "float32"))
    rows = load_from_disk(str(out / "tokens"))
    callbacks = [Seen(), dpo.FirstStep(BETA, ANSWER_TOKENS, dtype)]
    parts = TrainerParts(model, arguments, rows, tokenizer, callbacks)
    trainer = dpo.dpo_trainer(parts, dpo.reference_model(kind, model, loaded))
    trainer.train(resume_from_checkpoint=resume)
    return Trained(logs, model, frozen_checksum(model) == before)


def assert_same_logs(logs: list[dict[str, float]], others: list[dict[str, float]], dtype: str = "float32") -> None:
    """Up to the rounding of `dtype`: 1e-5 in float32, and in bfloat16 what it can hold of a log-probability."""
    assert len(logs) == len(others)
    for step, (mine, theirs) in enumerate(zip(logs, others, strict=True), start=1):
        within = dict.fromkeys(mine, 1e-5)
        if dtype == "bfloat16":
            within |= {f"logps/{key}": 2**-7 * (ANSWER_TOKENS + abs(theirs[f"logps/{key}"])) for key in ANSWERS}
            within |= {f"rewards/{key}": BETA * within[f"logps/{key}"] for key in ANSWERS}
            within["rewards/margins"] = sum(within[f"rewards/{key}"] for key in ANSWERS)
            within["loss"] = within["rewards/margins"]  # the slope of the loss is at most 1
        if step == 1:  # rewards are 0 but for rounding, which decides which of the two is larger
            del within["rewards/accuracies"]
        for key, bound in within.items():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=bound), f"{key} of step {step}"


def first_loss_tolerance(logs: dict[str, float], dtype: str) -> float:
    return dpo.first_step_tolerances(logs, BETA, ANSWER_TOKENS, dtype)["loss"]


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("full"), "full")


@pytest.mark.parametrize("kind", ["precomputed", "shared"])
def test_every_reference_gives_the_losses_of_a_full_one(kind: str, full: Trained, tmp_path: Path) -> None:
    found = train(tmp_path, kind)
    assert_same_logs(found.logs, full.logs)
    assert found.logs[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert found.logs[-1]["loss"] < 0.5
    assert found.logs[-1]["rewards/margins"] > 0.5
    start = dict(load(BASE).named_parameters())
    for name, value in found.model.named_parameters():
        assert torch.equal(value, start[name]) != value.requires_grad, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_reference_stops_the_run_at_its_first_step(dtype: str, other: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"The DPO reference is wrong\..*in " + dtype):
        train(tmp_path, "full", reference=other, dtype=dtype)


def test_rounding_to_bfloat16_is_not_a_wrong_reference(tmp_path: Path) -> None:
    """Weights rounded as well: further from the policy than another processor's arithmetic."""
    found = train(tmp_path, "full", reference_dtype="bfloat16", dtype="bfloat16", max_steps=1)
    assert abs(found.logs[0]["rewards/rejected"]) > 1e-4


# What TRL logged on a processor without bfloat16 instructions, and what is wrong in it.
FIRST = {
    "loss": 0.693130,
    "rewards/chosen": 0.0,
    "rewards/rejected": -3.4e-5,
    "logps/chosen": -12,
    "logps/rejected": -127,
}


@pytest.mark.parametrize(
    ("step", "change", "stops"),
    [
        (1, {}, False),
        (1, {"loss": LN2 + 0.1}, True),
        (1, {"loss": math.nan}, True),
        (1, {"rewards/chosen": 0.1}, True),
        (1, {"rewards/chosen": 1.0, "rewards/rejected": 1.0}, True),  # which leaves the loss as it is
        (2, {"loss": 0.5}, False),
    ],
)
def test_only_the_first_step_is_judged(step: int, change: dict[str, float], stops: bool) -> None:
    from transformers import TrainerState

    check = dpo.FirstStep(BETA, ANSWER_TOKENS, "bfloat16")
    with pytest.raises(RuntimeError, match="The DPO reference is wrong") if stops else nullcontext():
        check.on_log(None, TrainerState(global_step=step), None, logs=FIRST | change)


def test_a_resumed_run_reads_the_precomputed_and_ends_the_same(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    whole = train(tmp_path, "precomputed", **saving)
    cached = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-5", ignore_errors=True)
    resumed = train(tmp_path, "precomputed", resume=True, **saving)
    assert resumed.logs == whole.logs[2:]
    mine, theirs = (dict(run.model.named_parameters()) for run in (resumed, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == cached


def test_a_shared_reference_copies_only_what_is_updated() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=True))
    for model in (half(load(BASE)), half(tied)):
        made = dpo.reference_model("shared", model, lambda: pytest.fail("loads a model"))
        assert made is not None
        theirs = dict(made.named_parameters())
        for name, own in model.named_parameters():
            assert torch.equal(theirs[name], own)
            assert (theirs[name].data_ptr() == own.data_ptr()) != own.requires_grad
            assert not theirs[name].requires_grad
        assert any(own.requires_grad for own in model.parameters())
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
        ("qwen2", {"attention_dropout": 0.3}),
        ("gpt2", {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
    ],
)
def test_nothing_is_random_in_the_policy(model_type: str, settings: dict[str, float]) -> None:
    from model_types import tiny_config
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import disable_dropout_in_model

    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.arange(3, 15)[None]
    disable_dropout_in_model(model)  # as TRL does
    dpo.without_dropout(model)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert torch.equal(model(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["precomputed", "full"])
def test_a_model_with_dropout_starts_at_its_reference(kind: str, tmp_path: Path) -> None:
    start = Path(shutil.copytree(BASE, tmp_path / "base"))
    config = json.loads((start / "config.json").read_text()) | {"attention_dropout": 0.3}
    (start / "config.json").write_text(json.dumps(config))
    found = train(tmp_path, kind, start=start, max_steps=1)
    assert found.logs[0]["loss"] == pytest.approx(LN2, abs=1e-5)


def test_without_a_reference_nothing_is_loaded_from_elsewhere(tokenizer: Any) -> None:
    from trl import DPOConfig

    arguments = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **settings("full"))
    with pytest.raises(ValueError, match="pass a reference"):
        dpo.dpo_trainer(TrainerParts(load(BASE), arguments, None, tokenizer, []), None)


# --------------------------------------------------------------------------------------------------------- the rows


LONG_PROMPT = preference("Why? " * 30, "Because.", "No.")
LONG_ANSWER = preference("Why?", "Because. " * 30, "No.")
ALIKE = preference("Why?", "Because " * 30 + "it is.", "Because " * 30 + "it was.")


def test_the_tokens_are_those_of_trl_through_the_end(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [*ROWS, LONG_PROMPT, LONG_ANSWER, ALIKE]
    pairs = prepare_pairs(rows, tokenizer, 48, "x")
    assert (len(pairs.dataset), pairs.summary.truncated) == (9, 1)
    assert pairs.summary.dropped == {"prompt fills max_length": 1, "alike when cut": 1}

    arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=48, report_to=[])
    columns = [
        {"prompt": row.chosen.turns[:1], "chosen": row.chosen.turns[1:], "rejected": row.rejected.turns[1:]}
        for row in rows
    ]
    trainer = DPOTrainer(
        load(BASE), load(BASE), arguments, train_dataset=Dataset.from_list(columns), processing_class=tokenizer,
    )  # fmt: skip
    theirs = trainer.train_dataset.to_list()
    assert len(theirs) == len(pairs.dataset) + 1
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    for mine, other in zip(pairs.dataset, theirs[:-1], strict=True):
        for key in keys:
            room = 48 - len(mine["prompt_ids"]) if key != "prompt_ids" else 48
            assert mine[key] == other[key][:room]
    batch = trainer.data_collator(pairs.dataset.to_list())
    assert batch["attention_mask"].sum() == pairs.summary.tokens
    assert batch["completion_mask"].sum() == pairs.summary.trained_tokens
    assert batch["input_ids"].shape[1] == 48


def test_nothing_left_at_max_length_says_what_to_do(tokenizer: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"No row of x .* train\.max_length=48: the prompt fills it in 1 of 2 rows, .* same tokens in 1\.",
    ):
        prepare_pairs([LONG_PROMPT, ALIKE], tokenizer, 48, "x")


def test_a_template_that_would_train_wrongly_is_refused(tokenizer: Any) -> None:
    other = type(tokenizer).from_pretrained(BASE)
    for template, said in (
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing after an answer"),
        ("{% for m in messages %}{{ m['role'] }}.{% endfor %}", "leaves out the assistant's turns"),
        (
            "{{ raise_exception('no') if messages[0]['content'] == 'Why?' }}" + tokenizer.chat_template,
            "example 2: chosen: the",
        ),
    ):
        other.chat_template = template
        with pytest.raises(UserError, match=said):
            prepare_pairs([ROWS[0], preference("Why?", "Because.", "No.")], other, 48, "the data")


def test_the_reference_of_other_rows_or_weights_is_not_read(tokenizer: Any, other: Path) -> None:
    mine, theirs = weights_hash(BASE), weights_hash(other)
    keys = [("a", 48, mine), ("b", 48, mine), ("a", 49, mine), ("a", 48, theirs)]
    assert len({dpo.reference_key(rows, tokenizer, length, start) for rows, length, start in keys}) == 4


# -------------------------------------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("stage", "dtype", "runs"),
    [
        # In the same folder, one after the other: with the other weights nothing that was precomputed may be taken.
        (2, "float32", ["precomputed", "full", "shared", "precomputed other"]),
        (3, "float32", ["precomputed", "full", "precomputed other"]),
        (2, "bfloat16", ["precomputed", "full", "shared"]),
    ],
    ids=["zero2", "zero3", "zero2 bfloat16"],
)
def test_two_ranks_of_deepspeed(stage: int, dtype: str, runs: list[str], other: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "other")
    torchrun(2, __file__, tmp_path, stage, dtype, *runs)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == runs
    for run in found.values():
        assert run["frozen_unchanged"]
        assert run["logs"][0]["loss"] == pytest.approx(LN2, abs=first_loss_tolerance(run["logs"][0], dtype))
        assert run["logs"][-1]["loss"] < 0.5
        if run is not found.get("precomputed other"):
            assert_same_logs(run["logs"], found["full"]["logs"], dtype)


def rank(out: Path, stage: int, dtype: str, runs: list[str]) -> None:
    """One of the ranks: train each of `runs` and write what came out."""
    found = {}
    for run in runs:
        kind, *with_other = run.split()
        trained = train(out, kind, out / "other" if with_other else BASE, stage=stage, dtype=dtype, max_steps=3)
        found[run] = {"logs": trained.logs, "frozen_unchanged": trained.frozen_unchanged}
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        (out / "found.json").write_text(json.dumps(found))
    exit_rank()


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
