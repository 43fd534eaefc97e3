"""Memory: by property, against what autograd saves, and against what two ranks of DeepSpeed hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES
from helpers import phase_job, torchrun
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import PARAMS, SHAPES, enlarge, families, few, fft, selections, setups, train

from hft_cli.checkpoint.parameters import parameters_from_fields, parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.launch.jobs import PhaseJob, read_job, write_job
from hft_cli.launch.ranks import RANKS_TIMEOUT
from hft_cli.method.selection import draw
from hft_cli.paths import resolve_path
from hft_cli.plan.flops import flops
from hft_cli.plan.memory import PARTS, activations, host_memory, memory
from hft_cli.plan.traffic import checkpoint_bytes
from hft_cli.plan.workload import Setup, Workload, model_shape


@few
@given(families, setups)
def test_hft_at_ratio_1_needs_what_fft_does(family, setup):
    everything = draw(PARAMS[family], SelectionConfig(ratio=1.0), 1, 7).updated
    assert memory(train(family, everything, setup)) == memory(fft(family, setup))


@few
@given(families, setups, selections, st.integers(0, 10**6))
def test_training_less_never_needs_more(family, setup, selection, seed):
    updated = draw(PARAMS[family], replace(selection, redraw="independent"), 1, seed).updated
    half, full = memory(train(family, updated, setup)), memory(fft(family, setup))
    # ZeRO-2 keeps whole gradients of the parameters at both ends of a rank's part. The draw decides which those are.
    ends = 2 * max(p.elements for p in PARAMS[family]) * 4 * 2 if setup.zero_stage == 2 else 0
    slack = {"gradients": ends}
    assert all(getattr(half, part) <= getattr(full, part) + slack.get(part, 0) for part in PARTS)


@few
@given(families, setups)
def test_the_total_is_at_most_the_sum_and_at_least_what_stays(family, setup):
    planned = memory(fft(family, setup))
    assert planned.persistent + planned.step <= planned.total
    assert planned.persistent - planned.gradients < planned.total
    assert planned.total <= sum(getattr(planned, part) for part in PARTS) * (1 + 1e-12)


SHARDED = {
    1: ("optimizer", "masters", "step"),
    2: ("optimizer", "masters", "step", "gradients"),
    3: ("optimizer", "masters", "step", "gradients", "weights"),
}


@few
@given(families, setups, st.integers(2, 5))
def test_more_ranks_never_hold_more_of_what_is_sharded(family, setup, times):
    one, many = (memory(fft(family, replace(setup, ranks=setup.ranks * factor))) for factor in (1, times))
    assert all(getattr(many, part) <= getattr(one, part) for part in SHARDED.get(setup.zero_stage or 0, ()))


@given(families)
def test_zero_3_divides_18_bytes_a_parameter_over_the_ranks(family):
    """16 for weights, gradients, masters and moments (ZeRO, section 3), and 2 because gradients are float32."""
    work = enlarge(fft(family, Setup(3, 100, "bfloat16", 1, 8)))
    needed = memory(work)
    state = needed.weights + needed.gradients + needed.masters + needed.optimizer
    assert state == pytest.approx(18 * work.total_elements / 100, rel=1e-3)


def test_a_single_process_holds_16_bytes_a_parameter():
    work = fft("llama", Setup(None, 1, "float32", 1, 8))
    needed = memory(work)
    assert needed.weights + needed.gradients + needed.optimizer == 16 * work.total_elements
    assert (needed.masters, needed.step, needed.reference) == (0, 0, 0)


TORCH = {"adamw_torch": "AdamW", "adagrad": "Adagrad", "rmsprop": "RMSprop", "sgd": "SGD"}


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_a_step_of_all_at_once_makes_the_planned_copies(name, decay):
    param = torch.nn.Parameter(torch.ones(64))
    param.grad = torch.ones(64)
    optimizer = getattr(torch.optim, TORCH[name])([param], lr=0.1, weight_decay=0.1 * decay, foreach=True)
    made = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "_foreach" in str(func) and result is not None:  # it is None where a step changes what there is
                made.extend(tensor for tensor in result if tensor.numel() == 64)
            return result

    optimizer.step()  # makes the state
    with Count():
        optimizer.step()
    plain = fft("llama", Setup(None, 1, "float32", 2, 8, optimizer=name, decays=decay))
    assert memory(plain).step == 4 * len(made) * plain.total_elements


def test_an_anchor_takes_the_start_or_a_reference_and_logits():
    setup = Setup(None, 1, "float32", 64, 8)
    plain, l2_sp, kl = (fft("llama", replace(setup, anchor=name)) for name in ("none", "l2_sp", "kl"))
    assert memory(l2_sp).reference == memory(kl).reference == 4 * plain.total_elements
    assert memory(l2_sp).buffers == memory(plain).buffers
    logits = 64 * 8 * plain.head.shape[0]
    assert memory(kl).buffers - memory(plain).buffers == (12 + 4) * logits
    assert checkpoint_bytes(l2_sp) - checkpoint_bytes(plain) == 4 * plain.total_elements
    assert flops(kl, 2, 8).reference == flops(plain, 2, 8).forward
    assert memory(fft("llama", replace(setup, filtered=True))).step == 4 * plain.total_elements
    large = replace(setup, rows=10**6)
    assert not fft("llama", large).holds_logits
    assert fft("llama", replace(large, anchor="kl")).holds_logits


def test_offload_moves_the_optimizer_to_the_host():
    setup = Setup(3, 4, "bfloat16", 1, 8, offload_optimizer=True, offload_parameters=True)
    work = fft("llama", setup)
    needed = memory(work)
    assert (needed.optimizer, needed.masters, needed.gradients, needed.step) == (0, 0, 0, 0)
    # Masters, moments, gradients and new gradients in float32, weights in bfloat16.
    assert host_memory(work) == pytest.approx(22 * work.total_elements / 4, rel=1e-3)
    assert host_memory(replace(work, setup=replace(setup, offload_optimizer=False))) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_activations_are_saved_below_the_lowest_parameter(family):
    setup = Setup(None, 1, "float32", 1, 8)
    layers = [[p.name for p in PARAMS[family] if p.layer == layer] for layer in range(SHAPES[family].layers)]
    saved = [activations(train(family, names, setup)) for names in layers]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 2 * saved[-1]


# Against what autograd saves


@pytest.mark.parametrize("family", ["llama with groups", "qwen3", "olmo2", "mixtral"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_activations_are_what_autograd_saves(family, mode, ratio):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**FAMILIES[family], "attention_bias": False, "mlp_bias": False}
    params = parameters_from_fields(fields) or ()
    shape = model_shape(fields, params)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(torch.bfloat16 if mode == "bfloat16" else torch.float32).train()
    updated = frozenset(draw(params, SelectionConfig(ratio=ratio), 1, 3).updated)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in updated)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        cast = mode == "autocast" and tuple(tensor.shape) in sizes  # a weight in bfloat16 counts as a buffer
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not cast:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # an address is not used twice
    ids = torch.randint(5, 300, (2, 70))  # 140 tokens, each for two experts: numbers that no weight has as its size
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        model.model(input_ids=ids)
    # Without a padding mask keys and values are not repeated, as with flash attention.
    setup = Setup(
        2 if mode == "bfloat16" else None, 1, "float32" if mode == "float32" else "bfloat16", 2, 70,
        attention="flash_attention_2",
    )  # fmt: skip
    head_input = ids.numel() * setup.compute_bytes * shape.hidden  # the head is not called here
    expected = activations(Workload(params, updated, shape, setup)) - head_input
    assert expected == pytest.approx(sum(saved.values()), rel=0.1 if family == "mixtral" else 0.05)


# Against what the ranks of DeepSpeed hold

MEASURED = [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (3, "float32")]


def two_steps(folder: Path, model: Path, stage: int, dtype: str) -> PhaseJob:
    """Two steps of HFT with two micro-batches each, and a checkpoint after the first."""
    return phase_job(
        folder, model, "model=local", f"engine=zero{stage}", "engine.num_processes=2", "data=pocket_order",
        "data.test_path=null", "data.max_rows=16", "train.max_steps=2", "train.batch_size=8",
        "train.micro_batch_size=2", "train.max_length=64", "train.save_every=1", f"model.dtype={dtype}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that train a step under each stage and write down what they hold, in one launch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("ranks")
    model = Path(shutil.copytree(resolve_path("pocket:model"), out / "model"))
    fields = FAMILIES["llama with groups"] | {"attention_bias": False, "mlp_bias": False, "vocab_size": 512}
    config = LlamaConfig(**fields, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    files = []
    for stage, dtype in MEASURED:
        folder = out / f"zero{stage}-{dtype}"
        folder.mkdir()
        files.append(write_job(two_steps(folder, model, stage, dtype), folder))
    script = Path(__file__).with_name("measure_ranks.py")
    torchrun(2, script, *files)
    return out


@pytest.mark.end_to_end
@pytest.mark.xdist_group("plan")
@pytest.mark.parametrize(("stage", "dtype"), MEASURED)
def test_ranks_of_deepspeed_hold_what_is_planned(stage: int, dtype: str, measured: Path):
    folder = measured / f"zero{stage}-{dtype}"
    job: Any = read_job("PhaseJob", folder / "step.json")
    params = parameters_from_folder(job.model)
    shape = model_shape(json.loads((Path(job.model) / "config.json").read_text()), params)
    setup = Setup(stage, 2, dtype, 2, 64, accumulation=2)
    work = Workload(params, frozenset(job.updated), shape, setup)
    expected = asdict(memory(work))
    ranks = [json.loads((folder / f"held.{rank}").read_text()) for rank in (0, 1)]
    for part in ("weights", "gradients", "optimizer", "masters"):
        assert expected[part] == pytest.approx(max(held[part] for held in ranks), rel=0.05), part
    # The other ranks wait while the first one tokenizes or converts.
    assert [held["timeout"] for held in ranks] == [RANKS_TIMEOUT.total_seconds()] * 2
    # Only files of tensors: names and settings are large beside so small a model.
    files = [path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors") and "checkpoint" in str(path)]
    size = sum(path.stat().st_size for path in files)
    assert checkpoint_bytes(work) == pytest.approx(size, rel=0.05)
