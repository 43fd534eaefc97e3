"""training/gem.py: the dual problem by property; on every engine the projected gradient reaches the optimizer.

Run as a program, this file is a rank of the tests with DeepSpeed: `torchrun … test_gem.py OUT`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import torchrun
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from hft_cli.errors import UserError
from hft_cli.launch.compat import exit_rank
from hft_cli.launch.ranks import join_ranks
from hft_cli.paths import resolve_path
from hft_cli.training import gem
from hft_cli.training.compat import use_zero_optimizer
from hft_cli.training.session import Projections
from hft_cli.training.weights import freeze

# How far a cosine of two gradients may be off in bfloat16, on any processor: each operation of two layers, forward and
# backward, rounds to 2^-8, and the errors add up as their squares do. Without projection a cosine is below -0.1.
ROUNDED = 4 * 2**-8

Rows = list[tuple[list[int], int]]  # tokens, and how many of them are the prompt

# The same prompts with other answers: what lowers one loss raises the other.
DATA: Rows = [([5, 6, first, 30 + first, 7], 3) for first in range(10, 18)]
AGAINST: Rows = [([5, 6, first, 40 + first, 8, 9, 8][: 5 + first % 3], 3) for first in range(10, 13)]
ALSO_AGAINST: Rows = [([5, 6, 14, 31, 32, 33], 3)]


def rows(made: Rows) -> Any:
    from datasets import Dataset

    labels = [[-100] * prompt + ids[prompt:] for ids, prompt in made]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in made], "labels": labels})


# ------------------------------------------------------------------------------------------------- the dual problem


def directions(elements: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[Any, Any]]:
    """g, and the gradients of up to 4 memories, in up to 5 dimensions."""
    return st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
        lambda shape: st.tuples(arrays(float, shape[1], elements=elements), arrays(float, shape, elements=elements))
    )


def solve(g: Any, memories: Any, margin: float = 0.0) -> Any:
    return np.array(gem.multipliers((memories @ memories.T).tolist(), (memories @ g).tolist(), margin))


def nearest(g: Any, memories: Any) -> Any:
    """The g̃ of the definition, by trying every set of constraints that may hold with equality."""
    found = []
    for count in range(len(memories) + 1):
        for active in itertools.combinations(range(len(memories)), count):
            held = memories[list(active)]
            candidate = g - np.linalg.pinv(held) @ (held @ g) if count else g
            if (memories @ candidate >= -1e-9).all():
                found.append(candidate)
    return min(found, key=lambda candidate: np.linalg.norm(candidate - g))


whole = st.integers(-3, 3).map(float)  # so that duplicates, opposites, zeros and right angles come often
ONE = np.array([1.0, 0.0])


@settings(deadline=None)
@given(directions(whole))
@example((-ONE, np.array([ONE, ONE, ONE])))
@example((-ONE, np.array([ONE, 0 * ONE, -ONE])))
@example((-ONE, np.array([0 * ONE])))
def test_the_projection_is_the_nearest_without_a_conflict(case: tuple[Any, Any]) -> None:
    g, memories = case
    v = solve(g, memories)
    assert (v >= 0).all()
    projected = g + v @ memories
    assert projected == pytest.approx(nearest(g, memories), abs=1e-6)
    assert memories @ projected == pytest.approx(np.maximum(memories @ projected, 0), abs=1e-6)
    assert np.linalg.norm(projected) <= np.linalg.norm(g) + 1e-9
    if (memories @ g >= 0).all():
        assert not v.any()


@settings(deadline=None)
@given(directions(st.floats(-1, 1, width=32)), st.integers(-9, 9), st.lists(st.integers(-9, 9), min_size=4, max_size=4))
def test_gradients_of_any_length_and_any_angle_are_projected(
    case: tuple[Any, Any], length: int, lengths: list[int]
) -> None:
    g, memories = case[0] * 10.0**length, case[1] * 10.0 ** np.array(lengths)[: len(case[1]), None]
    projected = g + solve(g, memories) @ memories
    sizes = np.linalg.norm(memories, axis=1) * np.linalg.norm(g)
    assert (memories @ projected >= -1e-6 * sizes).all()
    assert np.linalg.norm(projected) <= np.linalg.norm(g) * (1 + 1e-6)


@settings(deadline=None)
@given(directions(whole), st.sampled_from([0.0, 0.5, 2.0]))
def test_the_multipliers_solve_the_dual_problem(case: tuple[Any, Any], margin: float) -> None:
    g, memories = case
    v = solve(g, memories, margin)
    if (memories @ g >= 0).all():
        assert not v.any()
        return
    assert (v >= margin).all()
    after = memories @ (g + v @ memories)  # the dual's gradient: 0, or above 0 at the bound
    assert after == pytest.approx(np.maximum(after, 0), abs=1e-6)
    assert after * (v - margin) == pytest.approx(0 * v, abs=1e-5)

    def dual(v: Any) -> float:
        return 0.5 * float((v @ memories) @ (v @ memories)) + float(memories @ g @ v)

    other = minimize(dual, np.full(len(v), margin + 1.0), bounds=[(margin, None)] * len(v)).fun
    assert dual(v) <= other + 1e-6


# -------------------------------------------------------------------------------------------------- what trains here


@dataclass
class Trained:
    model: Any
    counted: Projections
    logs: list[dict[str, float]]
    start: dict[str, Any]
    reached: list[Any] = field(default_factory=list)  # of each step, the gradient that the optimizer was given
    memories: list[list[Any]] = field(default_factory=list)  # of each step, the g_k, computed in another way

    def cosines(self) -> Any:
        """Of each step and memory."""
        pairs = zip(self.reached, self.memories, strict=True)
        return torch.tensor([[float(torch.cosine_similarity(g, kept, dim=0)) for kept in all_] for g, all_ in pairs])


def tiny(dropout: float = 0.0) -> Any:
    """Two small layers of Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    size = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=2, initializer_range=0.1, attention_dropout=dropout)
    return AutoModelForCausalLM.from_config(config)


def half(model: Any) -> Any:
    """Every second parameter frozen."""
    names = [name for name, _ in model.named_parameters()]
    return freeze(model, names[::2], names[1::2])


@cache
def learned() -> dict[str, Any]:
    """Weights of `tiny` that give the answers of AGAINST and ALSO_AGAINST."""
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        sum(mean_loss(model, made) for made in (AGAINST, ALSO_AGAINST)).backward()
        optimizer.step()
    return model.state_dict()


def mean_loss(model: Any, made: Rows) -> Any:
    """Over all trained tokens, a row at a time, by the loss of the model itself."""
    total, tokens = 0.0, sum(len(ids) - prompt for ids, prompt in made)
    for ids, prompt in made:
        labels = torch.tensor([[-100] * prompt + ids[prompt:]])
        total = total + model(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - prompt) / tokens
    return total


def flat(parts: Any) -> Any:
    return torch.cat([part.detach().float().reshape(-1) for part in parts])


def gradient(model: Any, made: Rows) -> Any:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return flat(torch.autograd.grad(mean_loss(model, made), trainable))


def train(
    out: Path,
    memories: list[Rows],
    projecting: bool = True,
    stage: int | None = None,
    dtype: str = "float32",
    margin: float = 0.0,
    dropout: float = 0.0,
    resume: bool = False,
    **options: Any,
) -> Trained:
    """A few steps on all of DATA, in the order of train_phase."""
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
    }
    settings = {
        "output_dir": str(out / "checkpoints"), "deepspeed": deepspeed if stage else None, "learning_rate": 1e-2,
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world, "max_length": 64,
        "bf16": dtype == "bfloat16", "use_cpu": True, "logging_steps": 1, "logging_first_step": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "activation_checkpointing": False,
        "dataloader_pin_memory": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "optim": "adamw_torch",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "adam_epsilon": 1e-3,
    }  # fmt: skip
    arguments = SFTConfig(**settings | options)
    if stage:
        join_ranks()
        use_zero_optimizer()
    model = tiny(dropout)
    if stage != 3:  # which has no whole weights to load into
        model.load_state_dict(learned())
    half(model.to(getattr(torch, dtype if stage else "float32")))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows(DATA),
        processing_class=AutoTokenizer.from_pretrained(resolve_path("pocket:model")),
    )  # fmt: skip
    counted = Projections()
    if projecting and memories:
        datasets = [rows(made) for made in memories]
        counted = gem.project_gradients(trainer, datasets, micro_batch_size=2, margin=margin)
    trained = Trained(model, counted, [], start)

    def see(get: Any) -> None:
        own = [value for value in model.parameters() if value.requires_grad]
        trained.reached.append(flat(map(get, own)))
        with torch.random.fork_rng(devices=[]):
            trained.memories.append([gradient(model, made) for made in memories])

    class Seen(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stage:  # the optimizer's step, which clips and which the engine's step calls
                from deepspeed.utils import safe_get_full_grad

                optimizer = trainer.model_wrapped.optimizer
                step = optimizer.step

                def seen(*args: Any, **kwargs: Any) -> Any:
                    see(safe_get_full_grad)
                    return step(*args, **kwargs)

                optimizer.step = seen

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not stage:
                see(lambda parameter: parameter.grad)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                trained.logs.append({key: logs[key] for key in ("loss", "grad_norm") if key in logs})

    trainer.add_callback(Seen())
    trainer.train(resume_from_checkpoint=resume)
    return trained


def assert_frozen(trained: Trained) -> None:
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, trained.start[name]) != value.requires_grad, name


# ------------------------------------------------------------------------------------------------------ one process


def test_without_gem_the_steps_go_against_the_memory(tmp_path: Path) -> None:
    assert (train(tmp_path, [AGAINST], projecting=False).cosines()[0] < -0.1).all()


def test_the_optimizers_gradient_is_not_against_the_memory(tmp_path: Path) -> None:
    plain = train(tmp_path, [AGAINST], projecting=False)
    found = train(tmp_path, [AGAINST])
    assert (found.counted.steps, found.counted.projected) == (4, 4)
    assert found.cosines().min() > -1e-5
    assert found.cosines().abs().max() < 1e-5  # nearest to the data's: the constraint holds with equality
    assert_frozen(found)
    # The first step is that of the definition, for one memory.
    g, kept = plain.reached[0], plain.memories[0][0]
    assert found.reached[0] == pytest.approx(g - (g @ kept) / (kept @ kept) * kept, abs=1e-6)


def test_memories_are_read_again_at_the_weights_of_every_step(tmp_path: Path) -> None:
    found = train(tmp_path, [AGAINST])
    first, last = found.memories[0][0], found.memories[-1][0]
    assert torch.cosine_similarity(first, last, dim=0) < 0.999
    assert abs(torch.cosine_similarity(found.reached[-1], first, dim=0)) > 1e-3  # what was right at the first step


def test_every_memory_of_several_is_kept_also_a_repeated_one(tmp_path: Path) -> None:
    found = train(tmp_path, [AGAINST, ALSO_AGAINST, AGAINST])
    assert found.counted.projected == 4
    assert found.cosines().min() > -1e-5


def test_the_memory_is_kept_where_without_gem_it_is_forgotten(tmp_path: Path) -> None:
    model = tiny()
    model.load_state_dict(learned())
    before = mean_loss(model, AGAINST).item()
    after, kept = (
        mean_loss(train(tmp_path, [AGAINST], projecting, optim="sgd").model, AGAINST).item()
        for projecting in (False, True)
    )
    assert after > before + 0.1
    assert kept < before + 0.1 * (after - before)  # not 0: a step is no differential


def test_a_margin_pulls_further_and_clipping_has_the_last_word(tmp_path: Path) -> None:
    plain = train(tmp_path, [AGAINST], projecting=False, max_steps=1)
    g, kept = plain.reached[0], plain.memories[0][0]
    wanted = g + 3.0 * kept
    assert -(g @ kept) / (kept @ kept) < 3.0
    found = train(tmp_path, [AGAINST], margin=3.0, max_steps=1)
    assert found.reached[0] == pytest.approx(wanted, abs=1e-6)
    clipped = train(tmp_path, [AGAINST], margin=3.0, max_steps=1, max_grad_norm=0.1)
    assert clipped.reached[0] == pytest.approx(wanted * 0.1 / wanted.norm(), abs=1e-6)
    assert clipped.logs[0]["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_in_bfloat16_the_memory_is_read_under_autocast(tmp_path: Path) -> None:
    same = train(tmp_path, [DATA], dtype="bfloat16", max_steps=1, per_device_train_batch_size=8,
                 gradient_accumulation_steps=1)  # fmt: skip
    assert same.cosines().min() > 0.999
    found = train(tmp_path, [AGAINST], dtype="bfloat16")
    assert found.counted.projected == 4
    assert found.cosines().abs().max() < ROUNDED


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_conflict_training_ends_with_the_same_bits(checkpointing: bool, tmp_path: Path) -> None:
    # With dropout: the memory's pass must not take random numbers from training's.
    settings = {"dropout": 0.1, "activation_checkpointing": checkpointing}
    plain = train(tmp_path, [], **settings)
    found = train(tmp_path, [DATA, DATA[:5]], **settings)
    assert (found.counted.steps, found.counted.projected) == (4, 0)
    assert (plain.counted.steps, plain.counted.projected) == (0, 0)
    assert found.logs == plain.logs
    theirs = dict(plain.model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in found.model.named_parameters())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, [AGAINST], **settings)
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    resumed = train(tmp_path, [AGAINST], resume=True, **settings)
    assert (whole.counted.steps, resumed.counted.steps) == (4, 2)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.model.named_parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_by_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite at step [23]: training has diverged. Lower train.learning_rate"):
        train(tmp_path, [AGAINST], learning_rate=1e30)


def test_a_memory_without_a_trained_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory of past task 2 has no token with a loss"):
        train(tmp_path, [AGAINST, [([5, 6, 7], 3)]])


# -------------------------------------------------------------------------------------------------------- DeepSpeed

# Clipped hard enough that projecting after it would give another step; the second memory has a row for one rank only.
COMPARED = {"memories": [AGAINST, ALSO_AGAINST], "max_grad_norm": 0.2}
WITH_MARGIN = {"margin": 2.0, "max_steps": 1}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is trained on two ranks, by one launch."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun(2, __file__, out)
    return out


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("single"), **COMPARED)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_of_zero_end_as_one_process(stage: int, two_ranks: Path, one_process: Trained) -> None:
    found = json.loads((two_ranks / f"zero{stage}.json").read_text())
    assert found["counted"] == [one_process.counted.steps, one_process.counted.projected] == [4, 4]
    assert min(itertools.chain(*found["cosines"])) > -1e-5
    assert found["moved"] == found["trainable"]
    for mine, theirs in zip(found["logs"], one_process.logs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert_same_weights(two_ranks / f"zero{stage}.pt", one_process)


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_ranks_divide_the_gradients_of_memories(elements: int, ranks: int) -> None:
    tensor = torch.arange(elements)
    parts = []
    for rank in range(ranks):
        accelerator = SimpleNamespace(num_processes=ranks, process_index=rank)
        projector = gem._Projector(SimpleNamespace(accelerator=accelerator), [], 0.0, Projections())
        parts.append(projector._own(tensor))
    assert torch.equal(torch.cat(parts), tensor)
    assert max(map(len, parts)) == -(-elements // ranks)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_margin_means_the_same_on_two_ranks(stage: int, two_ranks: Path, tmp_path: Path) -> None:
    # With it, unlike without, it matters how long the gradients of the data and of the memories are.
    alone = train(tmp_path, **COMPARED | WITH_MARGIN)
    found = json.loads((two_ranks / f"zero{stage} margin.json").read_text())
    assert found["counted"] == [alone.counted.steps, alone.counted.projected] == [1, 1]
    assert max(alone.cosines()[0]) > 0.1
    assert_same_weights(two_ranks / f"zero{stage} margin.pt", alone)


def assert_same_weights(saved: Path, trained: Trained) -> None:
    weights = torch.load(saved)
    for name, value in trained.model.named_parameters():
        assert weights[name] == pytest.approx(value.detach(), abs=1e-5), name


@pytest.mark.parametrize("stage", [1, 2])
def test_without_gem_the_same_steps_go_against_the_memories(stage: int, two_ranks: Path) -> None:
    found = json.loads((two_ranks / f"zero{stage} plain.json").read_text())
    assert min(found["cosines"][0]) < -0.1


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_in_bfloat16_projects_too(stage: int, two_ranks: Path) -> None:
    found = json.loads((two_ranks / f"zero{stage} bfloat16.json").read_text())
    assert found["counted"] == [4, 4]
    assert min(itertools.chain(*found["cosines"])) > -ROUNDED
    assert found["moved"] == found["trainable"]


def test_zero_3_is_refused_by_message(two_ranks: Path) -> None:
    said = (two_ranks / "zero3.txt").read_text()
    assert "continual=gem does not work with engine=zero3" in said
    assert "use engine=single, zero1 or zero2" in said


def rank(out: Path) -> None:
    """One of the ranks: train all that the tests look at, and write what came out."""
    first = os.environ["RANK"] == "0"
    runs = {
        "": {}, " plain": {"projecting": False, "max_steps": 1}, " margin": WITH_MARGIN,
        " bfloat16": {"dtype": "bfloat16"},
    }  # fmt: skip
    for stage, name in itertools.product((1, 2), runs):
        trained = train(out, stage=stage, **COMPARED | runs[name])
        if first:
            weights = {key: value.detach() for key, value in trained.model.named_parameters()}
            found = {
                "counted": [trained.counted.steps, trained.counted.projected],
                "cosines": trained.cosines().tolist(),
                "logs": trained.logs,
                "moved": [key for key, value in weights.items() if not torch.equal(value, trained.start[key])],
                "trainable": [key for key, value in trained.model.named_parameters() if value.requires_grad],
            }
            (out / f"zero{stage}{name}.json").write_text(json.dumps(found))
            torch.save(weights, out / f"zero{stage}{name}.pt")
    try:
        train(out, stage=3, **COMPARED)
    except UserError as error:
        if first:
            (out / "zero3.txt").write_text(str(error))
    torch.distributed.barrier()
    exit_rank()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
