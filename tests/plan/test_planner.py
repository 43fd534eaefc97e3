"""`hft plan` and hft_cli.costs: by property, against what autograd saves, and against what DeepSpeed's ranks hold.

Run as a program, this file is a rank of the tests with DeepSpeed: `torchrun … test_plan.py OUT STEP.json…`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import as_plan, command, environment, hft
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.checkpoint.architectures import KNOWN_SHAPES
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_fields, parameters_from_folder
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import PlanConfig, RunConfig, SelectionConfig
from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob
from hft_cli.method.rounds import draws, phase_config, phases
from hft_cli.method.selection import draw, heaviest_draw
from hft_cli.method.units import group_units
from hft_cli.paths import ARCHITECTURES, resolve_path
from hft_cli.plan import costs
from hft_cli.plan.costs import PARTS, Memory, Setup
from hft_cli.plan.planner import plan
from hft_cli.run_dir import RoundDir

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama with groups": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with a tied head": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "olmo2": {"model_type": "olmo2"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
MODELS = {name: parameters_from_fields({**SMALL, **own}) for name, own in FAMILIES.items()}
SHAPES = {name: costs.shape({**SMALL, **own}, MODELS[name] or ()) for name, own in FAMILIES.items()}

# Elements of the published checkpoints, as the hub counts them in their files.
PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "qwen3_8b": 8_190_735_360,
    "olmo2_7b": 7_298_617_344, "mixtral_8x7b": 46_702_792_704,
}  # fmt: skip

families = st.sampled_from(sorted(FAMILIES))
engines = st.sampled_from([None, 1, 2, 3])
setups = st.builds(
    Setup,
    zero_stage=engines,
    ranks=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rows=st.integers(1, 4),
    length=st.integers(2, 99),
    accumulation=st.integers(1, 3),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    checkpointing=st.booleans(),
    stage=st.sampled_from(["sft", "dpo"]),
    reference=st.sampled_from(["precomputed", "full"]),
).map(lambda made: replace(made, ranks=1) if made.zero_stage is None else made)
selections = st.builds(
    SelectionConfig,
    level=st.sampled_from(["category", "layer", "model"]),
    ratio=st.integers(0, 20).map(lambda twentieth: twentieth / 20),
    balance=st.sampled_from(["matrices", "elements"]),
    embeddings=st.sampled_from(["update", "freeze"]),
    final_norm=st.sampled_from(["update", "freeze"]),
).map(lambda made: replace(made, head=made.embeddings))
few = settings(deadline=None, max_examples=60)


def of(family: str) -> tuple[tuple[Param, ...], costs.Shape]:
    return MODELS[family] or (), SHAPES[family]


def names(params: tuple[Param, ...]) -> frozenset[str]:
    return frozenset(p.name for p in params)


# ----------------------------------------------------------------------------------------------- shapes without weights


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_from_the_fields_are_those_that_transformers_builds(family):
    from transformers import AutoConfig

    from hft_cli.checkpoint.parameters import parameters_from_config

    own = {**SMALL, **FAMILIES[family]}
    made = parameters_from_config(AutoConfig.for_model(own.pop("model_type"), **own))
    assert {(p.name, p.shape, p.kind, p.layer) for p in made} == {
        (p.name, p.shape, p.kind, p.layer) for p in MODELS[family] or ()
    }
    assert [p.name for p in made] == [p.name for p in MODELS[family] or ()]


def test_every_family_whose_shapes_follow_from_its_fields_is_tried():
    assert {own["model_type"] for own in FAMILIES.values()} == set(KNOWN_SHAPES)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_shipped_architecture_has_the_published_number_of_elements(name):
    config = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    assert sum(p.elements for p in parameters_from_fields(config) or ()) == PUBLISHED[name]


def test_every_shipped_architecture_has_a_model_config_and_a_published_number():
    shipped = {path.stem for path in ARCHITECTURES.glob("*.json")}
    conf = Path(__file__).parents[2] / "conf/model"
    assert shipped == set(PUBLISHED)
    assert all(f"architecture: {name}\n" in (conf / f"{name}.yaml").read_text() for name in shipped)


# ------------------------------------------------------------------------------------------------------- the worst draw


@few
@given(
    families, selections, st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["independent", "complementary"])
)
def test_no_draw_has_more_elements_than_the_heaviest(family, selection, seed, round, redraw):
    params, _ = of(family)
    own = replace(selection, redraw=redraw)
    try:
        drawn = draw(params, own, round, seed)
    except UserError:  # complementary by elements is for ratio 0.5
        return
    most = set(heaviest_draw(params, own))
    assert sum(p.elements for p in params if p.name in most) >= drawn.updated_elements
    if own.balance == "matrices" and redraw == "independent":  # it is a draw: the same number of matrices
        assert sum(u.params[0] in most for u in group_units(params)) == sum(
            u.params[0] in drawn.updated for u in group_units(params)
        )


def test_the_heaviest_draw_of_a_grouped_attention_takes_queries_and_output():
    params, _ = of("llama with a tied head")
    chosen = heaviest_draw(params, SelectionConfig(level="category", ratio=0.5))
    attention = {name.split(".")[-2] for name in chosen if "self_attn" in name}
    assert attention == {"q_proj", "o_proj"}


# ------------------------------------------------------------------------------------------------------------- memory


def planned(**changes: Any) -> PlanConfig:
    """A plan's config over the embedded model."""
    return as_plan(composed("+method=hft", *(f"{key}={value}" for key, value in changes.items())))


def composed(*overrides: str) -> RunConfig:
    from helpers import composed

    return composed(*overrides)


@few
@given(families, setups)
def test_hft_at_ratio_1_costs_what_fft_does(family, setup):
    params, net = of(family)
    all_drawn = frozenset(draw(params, SelectionConfig(ratio=1.0), 1, 7).updated)
    assert costs.memory(params, all_drawn, net, setup) == costs.memory(params, names(params), net, setup)
    assert costs.flops(params, all_drawn, net, setup, 8, 32) == costs.flops(params, names(params), net, setup, 8, 32)


@few
@given(families, setups, selections, st.integers(0, 10**6))
def test_training_less_never_costs_more(family, setup, selection, seed):
    params, net = of(family)
    drawn = frozenset(draw(params, replace(selection, redraw="independent"), 1, seed).updated)
    half, full = (costs.memory(params, trained, net, setup) for trained in (drawn, names(params)))
    # ZeRO-2 keeps whole gradients of the parameters at both ends of a rank's part, and which those are changes with
    # what is trained.
    ends = 2 * max(p.elements for p in params) * 4 * 2 if setup.zero_stage == 2 else 0
    slack = {"gradients": ends}
    assert all(getattr(half, part) <= getattr(full, part) + slack.get(part, 0) for part in PARTS)
    less, more = (costs.flops(params, trained, net, setup, 8, 32) for trained in (drawn, names(params)))
    assert less.total <= more.total
    assert less.forward == more.forward


@few
@given(families, setups)
def test_the_parts_make_the_total(family, setup):
    params, net = of(family)
    found = asdict(costs.memory(params, names(params), net, setup))
    either = max(found.pop("activations") + found.pop("buffers"), found.pop("step"))
    assert sum(found.values()) + either == costs.memory(params, names(params), net, setup).total
    counted = asdict(costs.flops(params, names(params), net, setup, 8, 32))
    assert sum(counted.values()) == costs.flops(params, names(params), net, setup, 8, 32).total


SHARDED = {
    1: ("optimizer", "masters", "step"),
    2: ("optimizer", "masters", "step", "gradients"),
    3: ("optimizer", "masters", "step", "gradients", "weights"),
}


@few
@given(families, setups, st.integers(2, 5))
def test_more_ranks_never_take_more_of_what_is_sharded(family, setup, times):
    params, net = of(family)
    few_ranks, many = (
        costs.memory(params, names(params), net, replace(setup, ranks=ranks))
        for ranks in (setup.ranks, setup.ranks * times)
    )
    assert all(getattr(many, part) <= getattr(few_ranks, part) for part in SHARDED.get(setup.zero_stage or 0, ()))


@given(families)
def test_many_ranks_of_zero_3_divide_a_model_without_small_parameters(family):
    """Weights, gradients, masters and moments of 16 bytes a parameter (ZeRO, section 3) over the ranks."""
    params, net = of(family)
    large = tuple(replace(p, shape=(p.shape[0] * 10_000, *p.shape[1:])) for p in params)
    held = costs.memory(large, names(large), net, Setup(3, 100, "bfloat16", 1, 8))
    whole = sum(p.elements for p in large)
    assert held.weights + held.gradients + held.masters + held.optimizer == pytest.approx(16 * whole / 100, rel=1e-3)


def test_a_single_process_holds_sixteen_bytes_a_parameter():
    params, net = of("llama")
    held = costs.memory(params, names(params), net, Setup(None, 1, "float32", 1, 8))
    assert held.weights + held.gradients + held.optimizer == 16 * sum(p.elements for p in params)
    assert (held.masters, held.step, held.reference) == (0, 0, 0)


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_a_plans_worst_draw_is_at_least_its_own_under_any_seed(level):
    for seed in range(6):
        ratio = 0.1 + 0.15 * seed
        made = plan(planned(selection=level, **{"selection.seed": seed, "selection.ratio": ratio}))
        found = made.rounds[0]
        assert all(getattr(found.worst, part) >= getattr(found.memory, part) for part in PARTS)
        assert made.worst_elements >= found.draw.updated_elements
        assert found.full.total >= found.worst.total


def test_lora_trains_its_adapters_alone():
    params, net = of("llama")
    matrices = [p for p in params if p.kind in ("attention", "feed_forward")]
    added = costs.adapters(params, {p.name for p in matrices}, 4)
    assert sum(p.elements for p in added) == sum(4 * sum(p.shape) for p in matrices)
    held = costs.memory(params + added, names(added), net, Setup(2, 2, "bfloat16", 1, 8))
    assert held.optimizer == pytest.approx(8 * sum(p.elements for p in added) / 2, rel=1e-3)
    counted = costs.flops(params + added, names(added), net, Setup(2, 2, "bfloat16", 1, 8), 4, 8)
    assert counted.weights < 0.2 * counted.forward


# -------------------------------------------------------------------------------------------------------------- FLOPs


def test_full_fine_tuning_takes_6_operations_a_parameter_and_token():
    """Kaplan et al.'s 6 N, for a model whose head and layers are all there is, and rows too short for attention."""
    params, net = of("llama")
    matrices = sum(p.elements for p in params if len(p.shape) == 2 and p.kind != "embedding")
    counted = costs.flops(params, names(params), net, Setup(2, 2, "bfloat16", 1, 1), 128, 1)
    assert counted.total == pytest.approx(6 * matrices * 128, rel=0.02)


@few
@given(families, st.integers(0, 10**6), st.integers(1, 9))
def test_a_frozen_matrix_saves_the_gradient_of_its_weight_and_no_more(family, seed, rows):
    params, net = of(family)
    setup = Setup(2, 2, "bfloat16", 1, 8)
    drawn = frozenset(draw(params, SelectionConfig(), 1, seed).updated)
    half, full = (costs.flops(params, own, net, setup, rows, 8) for own in (drawn, names(params)))
    saved = sum(
        2 * rows * 8 * p.elements * (net.experts_used / net.experts if len(p.shape) == 3 else 1)
        for p in params
        if p.name not in drawn and len(p.shape) > 1
    )
    assert full.total - half.total == pytest.approx(saved)
    assert (half.forward, half.inputs) == (full.forward, full.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_below_the_lowest_trained_parameter_has_a_backward_pass(family):
    params, net = of(family)
    setup = Setup(None, 1, "float32", 1, 8, checkpointing=True)
    at = [frozenset(p.name for p in params if p.layer == layer) for layer in range(net.layers)]
    counted = [costs.flops(params, own, net, setup, 1, 8) for own in at]
    assert [c.inputs for c in counted] == sorted((c.inputs for c in counted), reverse=True)
    assert len({c.inputs for c in counted}) == net.layers
    assert counted[-1].recompute == pytest.approx(counted[0].recompute / net.layers)
    held = [costs.activations(params, own, net, replace(setup, checkpointing=False)) for own in at]
    assert held == sorted(held, reverse=True)
    assert held[0] > 2 * held[-1]


def test_the_network_carries_what_the_zero_paper_says_of_stage_3():
    """Three times the model's bytes, less a rank's own share, for FFT in one micro batch (section 7.2.2)."""
    params, net = of("llama")
    large = tuple(replace(p, shape=(p.shape[0] * 10_000, *p.shape[1:])) for p in params if p.kind != "embedding")
    sent = costs.network(large, names(large), net, Setup(3, 4, "bfloat16", 1, 8))
    assert sent.total == pytest.approx(3 * 2 * sum(p.elements for p in large) * 3 / 4)
    assert costs.network(large, names(large), net, Setup(None, 1, "bfloat16", 1, 8)).total == 0


# ----------------------------------------------------------------------------------------- against what autograd saves


@pytest.mark.parametrize("family", ["llama with groups", "qwen3", "olmo2", "mixtral"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_activations_are_what_autograd_saves(family, mode, ratio):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {**SMALL, **FAMILIES[family], "attention_bias": False, "mlp_bias": False}
    params = parameters_from_fields(own) or ()
    net = costs.shape(own, params)
    config = AutoConfig.for_model(own.pop("model_type"), **own, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(torch.bfloat16 if mode == "bfloat16" else torch.float32).train()
    trained = frozenset(draw(params, SelectionConfig(ratio=ratio), 1, 3).updated)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        cast = mode == "autocast" and tuple(tensor.shape) in sizes  # a weight in bfloat16: counted in the buffers
        if tensor.untyped_storage().data_ptr() not in held and not cast:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # 2 x 70 tokens, each for two experts: numbers that no weight has as its size
    ids = torch.randint(5, 300, (2, 70))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        model.model(input_ids=ids)
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    # Without a mask of padding keys and values are not repeated, as under flash attention; the head has not read yet.
    setup = Setup(
        2 if mode == "bfloat16" else None, 1, "float32" if mode == "float32" else "bfloat16", 2, 70,
        attention="flash_attention_2",
    )  # fmt: skip
    expected = costs.activations(params, trained, net, setup) - ids.numel() * setup.compute_bytes * net.hidden
    assert expected == pytest.approx(found, rel=0.1 if family == "mixtral" else 0.05)


# ----------------------------------------------------------------------------- against what the ranks of DeepSpeed hold

MEASURED = [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (3, "float32")]


def sealed(folder: Path, model: Path, stage: int, dtype: str) -> PhaseJob:
    """A step of HFT of two micro batches, as the runner seals it."""
    config = composed(
        "+method=hft", f"engine=zero{stage}", "engine.num_processes=2", "data=pocket_order", "data.test_path=null",
        "data.max_rows=16", "train.max_steps=1", "train.batch_size=8", "train.micro_batch_size=2",
        "train.max_length=64", "train.save_every=1", "model=local", f"model.path={model}", f"model.dtype={dtype}",
        f"output_dir={folder}",
    )  # fmt: skip
    (step,), (drawn,) = phases(config), draws(config, parameters_from_folder(model))
    log = str(folder / "metrics.jsonl")
    return PhaseJob(
        phase_config(config, step), step, str(model), log, drawn.updated, drawn.frozen,
        deepspeed=deepspeed_settings(config),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that train a step under each stage and say what they hold, by one launch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("ranks")
    model = Path(shutil.copytree(resolve_path("pocket:model"), out / "model"))
    own = {**SMALL, "vocab_size": 512, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**own)).to(torch.bfloat16).save_pretrained(model)
    files = []
    for stage, dtype in MEASURED:
        folder = out / f"zero{stage}-{dtype}"
        folder.mkdir()
        sealed(folder, model, stage, dtype).write(folder / "step.json")
        files.append(folder / "step.json")
    binaries = str(Path(sys.executable).parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, *files],
        capture_output=True, text=True, timeout=300,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": os.pathsep.join([binaries, os.environ["PATH"]])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.end_to_end
@pytest.mark.xdist_group("plan")
@pytest.mark.parametrize(("stage", "dtype"), MEASURED)
def test_the_ranks_of_deepspeed_hold_what_was_foretold(stage, dtype, ranks):
    folder = ranks / f"zero{stage}-{dtype}"
    told = PhaseJob.read(folder / "step.json")
    params = parameters_from_folder(told.model)
    net = costs.shape(json.loads((Path(told.model) / "config.json").read_text()), params)
    setup = Setup(stage, 2, dtype, 2, 64, accumulation=2)
    expected = asdict(costs.memory(params, frozenset(told.updated), net, setup))
    held = [json.loads((folder / f"held.{rank}").read_text()) for rank in (0, 1)]
    for part in ("weights", "gradients", "optimizer", "masters"):
        assert expected[part] == pytest.approx(max(own[part] for own in held), rel=0.05), part
    # What is not in a tensor (names, settings) is large beside so small a model.
    files = [path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors") and "checkpoint" in str(path)]
    kept = sum(path.stat().st_size for path in files)
    # On a CPU stage 2 does not write frozen weights a third time: there they share memory with the module's.
    third = setup.weight_bytes * sum(p.elements for p in params if p.name in told.frozen) if stage == 2 else 0
    assert costs.checkpoint(params, frozenset(told.updated), setup) - third == pytest.approx(kept, rel=0.05)


def bytes_of(*values: Any, but: frozenset[int] = frozenset()) -> int:
    """Bytes of the storages behind all tensors in nested values, each storage once."""
    import torch

    def inside(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                yield from inside(one)

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inside(values) if t.numel()}
    return sum(size for place, size in storages.items() if place not in but)


def storages_of(values: Any) -> frozenset[int]:
    return frozenset(value.untyped_storage().data_ptr() for value in values)


def rank(files: list[Path]) -> None:
    """One of the ranks: train each step as `hft train` does, and write down what the engine held at its fullest."""
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from hft_cli.launch.ranks import Ranks
    from hft_cli.training import worker

    Ranks.leave = lambda self: None  # it would end the process
    held: dict[str, int] = {}

    def note(part: str, size: int) -> None:
        held[part] = max(held.get(part, 0), size)

    def note_gradients(zero: Any) -> None:
        """Of stage 1 and 2: in .grad, summed over micro batches, and averaged; not those in a bucket on their way."""
        buckets = storages_of(buffer for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer)
        found = [p.grad for group in zero.bit16_groups for p in group if p.grad is not None]
        note("gradients", bytes_of(found, zero.all_grad_tensors, zero.averaged_gradients, but=buckets))

    def before(cls: type, name: str, look: Any) -> None:
        own = getattr(cls, name)

        def looked(self: Any, *args: Any, **kwargs: Any) -> Any:
            look(self)
            return own(self, *args, **kwargs)

        setattr(cls, name, looked)

    before(DeepSpeedZeroOptimizer, "reduce_gradients", note_gradients)  # stage 1, before any is given away
    before(DeepSpeedZeroOptimizer, "get_all_grad_tensors", note_gradients)  # stage 2, when the newest are added
    step = DeepSpeedEngine.step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        zero = self.optimizer
        weights = [[parameter.data, getattr(parameter, "ds_tensor", None)] for parameter in self.module.parameters()]
        note("weights", bytes_of(weights))
        note("optimizer", bytes_of([dict(state) for state in zero.optimizer.state.values()]))
        masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
        whole = storages_of(tensor for pair in weights for tensor in pair if tensor is not None)
        note("masters", bytes_of(masters, but=whole))
        if self.zero_optimization_stage() == 3:
            note("gradients", bytes_of(zero.grad_partitions_flat_buffer))
        return done

    DeepSpeedEngine.step = stepped
    for file in files:
        held.clear()
        worker.train(PhaseJob.read(file), RoundDir(file.parent))
        (file.parent / f"held.{os.environ['RANK']}").write_text(json.dumps(held))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


# -------------------------------------------------------------------------------------------------------- the command

# ruff: noqa: E501
SEVENTY = (
    "plan", "+method=hft", "model=llama2_70b", "engine=zero3", "engine.num_processes=64", "data=tulu_v2",
    "train.micro_batch_size=2", "train.gradient_checkpointing=true", "gpu_memory=80", "tflops=312", "rows=326154",
)  # fmt: skip


def test_seventy_billion_parameters_on_64_gpus_are_planned_in_under_6_seconds(tmp_path):
    start = os.times()  # of children's processor, not the clock: other tests run beside this one
    ended = hft(*SEVENTY, cwd=tmp_path)
    end = os.times()
    assert end.children_user + end.children_system - start.children_user - start.children_system < 6
    assert (ended.status, ended.err) == (0, "")
    for said in (
        "68.98B parameters", "ZeRO-3 on 64 GPUs", "| 1     | tulu-v2-sft-mixture |", "| feed forward |", "master weights",
        "AdamW's moments", "worst draw", "| zero3 ", "fits", "too much", "backward, for weights", "Network:", "Hours", "Disk:",
    ):  # fmt: skip
        assert said in ended.out, said
    assert list(tmp_path.iterdir()) == []


def test_planning_does_not_import_torch():
    code = (
        "import sys, hft_cli.cli.main as c\nsys.argv=['hft', *sys.argv[1:]]\ntry: c.main()\nexcept SystemExit: pass\n"
    )
    code += "print(sorted({'torch', 'transformers', 'deepspeed', 'trl', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *SEVENTY], capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("[]\n"), done.stdout[-300:] + done.stderr


def test_a_sweep_of_plans_is_one_table_and_writes_nothing(tmp_path):
    ended = hft("plan", "-m", "+method=hft", "engine=zero1,zero2,zero3", "engine.num_processes=2", "gpu_memory=1.5",
                "train.batch_size=32", "train.micro_batch_size=4", cwd=tmp_path)  # fmt: skip
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [re.split(r"\s*\|\s*", line)[1] for line in lines[2:5]] == [f"engine=zero{stage}" for stage in (1, 2, 3)]
    assert "1.5 GiB" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_rows_and_steps_of_data_that_are_here():
    (found,) = plan(planned(data="pocket_order", **{"train.max_steps": "null", "train.epochs": 3, "train.batch_size": 32,
                                                    "train.micro_batch_size": 4})).rounds  # fmt: skip
    assert found.rows == len(Path(resolve_path("pocket:skills/order/train.jsonl")).read_text().splitlines())
    assert found.steps == 3 * -(-found.rows // 32)


def test_a_plan_of_data_that_are_elsewhere_asks_for_rows_or_steps():
    config = planned(data="tulu_v2")
    assert plan(config).rounds[0].steps is None
    assert plan(replace(config, rows=1280)).rounds[0].steps == 20
    assert plan(replace(config, train=replace(config.train, max_steps=7))).rounds[0].steps == 7
    assert plan(replace(config, rows=1280, tflops=1.0)).rounds[0].hours > 0


@pytest.mark.parametrize("kind", ["half_reset", "sft_then_dpo", "trace"])
def test_other_methods_and_sequences_have_plans(kind):
    from hft_cli.plan.text import text

    overrides = {
        "half_reset": ("+method=half_reset", "model.path=pocket:model", "model.base=pocket:model"),
        "sft_then_dpo": ("+method=hft", "data=pocket_sft_then_dpo", "method.stages=[sft,dpo]"),
        "trace": ("+method=hft", "data=trace", "data.path=/data/TRACE", "continual=gem", "model=mixtral_8x7b"),
    }[kind]
    made = plan(as_plan(composed(*overrides)))
    assert len(made.rounds) == {"half_reset": 1, "sft_then_dpo": 2, "trace": 8}[kind]
    assert "Disk:" in text(made)
    if kind == "trace":
        assert made.heaviest is made.rounds[-1]  # GEM keeps gradients of all past tasks
        assert [fit.bytes for fit in made.fits if fit.engine == "zero3"] == [None, None]
    if kind == "half_reset":
        assert made.rounds[0].memory == Memory()


MISTAKES = {
    "no method": ((), r"No method: .* For instance: hft plan \+method=hft"),
    "hub": (("+method=hft", "model.path=meta/none"), r"model\.path=meta/none are not known here .*model\.architecture=FILE"),
    "folder": (("+method=hft", "model.path=./nowhere"), r"model\.path=\./nowhere are not known here \(there is no such folder\)"),
    "architecture": (("+method=hft", "model=llama2_7b", "model.architecture=llama2_70"), r"Did you mean 'llama2_70b'\?"),
    "file": (("+method=hft", "model.architecture=x.json", "model.path=a/b"), r"Cannot read x\.json"),
    "batch": (("+method=hft", "model=llama2_7b", "engine=zero3", "engine.num_processes=64"), r"Nearest that is: 256|not a multiple"),
    "share": (("+method=hft", "utilization=1.5"), r"utilization=1\.5 must be in \(0, 1\]"),
    "memory": (("+method=hft", "gpu_memory=0"), r"gpu_memory=0(\.0)? must be above 0"),
    "key": (("+method=hft", "gpu_memry=8"), r"Unknown key 'gpu_memry'\. Did you mean 'gpu_memory'\?"),
    "positions": (("+method=hft", "model=llama2_7b", "train.max_length=9999"), r"more than the 4096 positions of llama2_7b"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    arguments, said = MISTAKES[name]
    ended = hft("plan", *arguments, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert re.search(said, ended.err), ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_what_is_only_of_a_plan_is_unknown_to_train():
    ended = hft("train", "+method=hft", "gpu_memory=80")
    assert ended.status == 2
    assert "Unknown key 'gpu_memory'" in ended.err


def test_the_command_is_told_of():
    listed = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    assert "hft plan +method=hft" in listed
    assert "gpu_memory=null" in subprocess.run(command("plan", "--help"), capture_output=True, text=True).stdout


if __name__ == "__main__":
    rank([Path(file) for file in sys.argv[1:]])
