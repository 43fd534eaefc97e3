"""hft_cli.dpo with the embedded model: all ways to have the reference train alike, and a wrong one is noticed.

Run as a program, this file is a rank of the tests with DeepSpeed: `torchrun … test_dpo.py OUT STAGE DTYPE RUNS`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment

from hft_cli.checkpoint.folders import weights_hash
from hft_cli.errors import UserError
from hft_cli.launch.ranks import join_ranks
from hft_cli.paths import resolve_path
from hft_cli.training import dpo
from hft_cli.training.weights import frozen_checksum
from hft_cli.training.worker import freeze

BASE = Path(resolve_path("pocket:model"))
LN2 = math.log(2)


def preference(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": [{"role": "user", "content": question}]} | {
        key: [{"role": "assistant", "content": text}] for key, text in answers.items()
    }


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
    freeze(model, names[::2], names[1::2])
    return model


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
    stage: int | None = None,
    dtype: str = "float32",
    resume: bool = False,
    **options: Any,
) -> Trained:
    """A few steps of DPO, in the order that hft_cli.train has; out/tokens holds the rows."""
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
    settings = {
        "output_dir": str(out / "checkpoints"), "deepspeed": deepspeed if stage else None, "learning_rate": 1e-3,
        "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 64,
        "bf16": dtype == "bfloat16", "use_cpu": True, "logging_steps": 1, "logging_first_step": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "activation_checkpointing": False,
        "dataloader_pin_memory": False, **dpo.settings(kind, beta=0.1),
    }  # fmt: skip
    arguments = DPOConfig(**settings | options)
    if stage:
        join_ranks()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if os.environ.get("RANK", "0") == "0" and not resume:
        dpo.prepare(ROWS, tokenizer, max_length=64, start=weights_hash(start)).dataset.save_to_disk(out / "tokens")
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
    compared_with = dpo.reference(kind, model, partial(load, reference or start, dtype if stage else "float32"))
    rows = load_from_disk(str(out / "tokens"))
    trainer = dpo.dpo_trainer(model, compared_with, arguments, rows, tokenizer, [Seen()])
    trainer.train(resume_from_checkpoint=resume)
    return Trained(logs, model, frozen_checksum(model) == before)


def assert_equal_logs(one: list[dict[str, float]], other: list[dict[str, float]], within: float) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=within)


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("full"), "full")


@pytest.mark.parametrize("kind", ["precomputed", "shared"])
def test_every_reference_gives_the_losses_and_rewards_of_a_full_one(kind: str, full: Trained, tmp_path: Path) -> None:
    found = train(tmp_path, kind)
    assert_equal_logs(found.logs, full.logs, within=1e-5)
    assert found.logs[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert found.logs[-1]["loss"] < 0.5
    assert found.logs[-1]["rewards/margins"] > 0.5
    start = dict(load(BASE).named_parameters())
    for name, value in found.model.named_parameters():
        assert torch.equal(value, start[name]) != value.requires_grad, name


def test_in_bfloat16_the_first_loss_is_near_enough(tmp_path: Path) -> None:
    assert train(tmp_path, "precomputed", dtype="bfloat16", max_steps=1).logs[0]["loss"] == pytest.approx(LN2, abs=1e-2)


def test_a_wrong_reference_stops_the_run_at_its_first_step(other: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"the reference is wrong: the first DPO loss is \d\.\d{4}, and must be ln 2"
    ):
        train(tmp_path, "full", reference=other)


@pytest.mark.parametrize(("step", "loss", "stops"), [(1, LN2, 0), (1, 0.7, 1), (1, math.nan, 1), (2, 0.5, 0)])
def test_only_the_very_first_loss_is_judged(step: int, loss: float, stops: int) -> None:
    from transformers import TrainerState

    def log() -> None:
        dpo.first_loss("float32").on_log(None, TrainerState(global_step=step), None, logs={"loss": loss})

    if stops:
        with pytest.raises(RuntimeError, match="the reference is wrong"):
            log()
    else:
        log()


def test_a_resumed_run_reads_what_was_precomputed_and_ends_with_the_same_bits(tmp_path: Path) -> None:
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


def test_a_shared_reference_copies_what_is_updated_and_nothing_else() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=True))
    for model in (half(load(BASE)), half(tied)):
        made = dpo.reference("shared", model, lambda: pytest.fail("loads a model"))
        assert made is not None
        theirs = dict(made.named_parameters())
        for name, own in model.named_parameters():
            assert torch.equal(theirs[name], own)
            assert (theirs[name].data_ptr() == own.data_ptr()) != own.requires_grad
            assert not theirs[name].requires_grad
        assert any(own.requires_grad for own in model.parameters())
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight


def test_without_a_reference_nothing_is_loaded_from_elsewhere(tokenizer: Any) -> None:
    from trl import DPOConfig

    arguments = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **dpo.settings("full", 0.1))
    with pytest.raises(ValueError, match="pass a reference"):
        dpo.dpo_trainer(load(BASE), None, arguments, None, tokenizer, [])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- the rows


LONG_PROMPT = preference("Why? " * 30, "Because.", "No.")
LONG_ANSWER = preference("Why?", "Because. " * 30, "No.")
ALIKE = preference("Why?", "Because " * 30 + "it is.", "Because " * 30 + "it was.")


def test_rows_are_counted_as_trl_will_treat_them(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [*ROWS, LONG_PROMPT, LONG_ANSWER, ALIKE]
    found = dpo.prepare(rows, tokenizer, max_length=48, start="s")
    assert (found.rows, found.dropped, found.alike, found.truncated) == (9, 1, 1, 1)
    assert found.dataset["chosen"][:] == [row["chosen"] for row in [*ROWS, LONG_ANSWER]]

    arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=48, report_to=[])
    model = load(BASE)
    trainer = DPOTrainer(
        model, dpo.reference("full", model, partial(load, BASE)), arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs = trainer.train_dataset.to_list()
    assert len(theirs) == found.rows + found.alike
    batch = trainer.data_collator([row for row in theirs if row["chosen"] != ALIKE["chosen"]])
    assert batch["attention_mask"].sum() == found.total_tokens
    assert batch["completion_mask"].sum() == found.trained_tokens
    assert batch["input_ids"].shape[1] == 48


def test_nothing_left_at_max_length_says_what_to_do(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"the 2 rows of x at train\.max_length=48: 1 have prompts .*, 1 have the same"):
        dpo.prepare([LONG_PROMPT, ALIKE], tokenizer, max_length=48, start="s", where="x")


def test_a_template_that_would_train_wrongly_is_refused(tokenizer: Any) -> None:
    other = type(tokenizer).from_pretrained(BASE)
    for template, said in (
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing after an answer"),
        ("{% for m in messages %}{{ m['role'] }}.{% endfor %}", "leaves out the assistant's turns"),
        ("{{ raise_exception('no') if messages[0]['content'] == 'Why?' }}" + tokenizer.chat_template, "example 2: the"),
    ):
        other.chat_template = template
        with pytest.raises(UserError, match=said):
            dpo.prepare([ROWS[0], preference("Why?", "Because.", "No.")], other, max_length=48, start="s")


def test_the_fingerprint_tells_rows_and_starts_apart(tokenizer: Any, other: Path) -> None:
    def fingerprint(rows: list[Any], start: str) -> str:
        return dpo.prepare(rows, tokenizer, max_length=48, start=start).dataset._fingerprint

    mine, theirs = weights_hash(BASE), weights_hash(other)
    assert fingerprint(ROWS, mine) == fingerprint(list(ROWS), mine)
    assert len({fingerprint(ROWS, mine), fingerprint(ROWS, theirs), fingerprint(ROWS[1:], mine)}) == 3


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
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
        str(tmp_path), str(stage), dtype, *runs,
    ]  # fmt: skip
    binaries = str(Path(sys.executable).parent)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": os.pathsep.join([binaries, os.environ["PATH"]])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == runs
    for run in found.values():
        assert run["frozen_unchanged"]
        assert run["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert run["logs"][-1]["loss"] < 0.5
        if run is not found.get("precomputed other"):
            assert_equal_logs(run["logs"], found["full"]["logs"], within=1e-5)


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
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
