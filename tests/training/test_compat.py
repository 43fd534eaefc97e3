"""training/compat.py: what it relies on is still there, and the repairs are still needed.

Run as a program, this file is the rank of the tests with DeepSpeed: `torchrun … test_compat.py OUT`.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import BASE, torchrun
from model_types import tiny_config
from torch.nn.functional import cross_entropy
from trl.trainer.utils import add_fused_lm_head

from hft_cli.launch.compat import exit_rank
from hft_cli.launch.ranks import join_ranks
from hft_cli.live import compat as live
from hft_cli.training import compat


def tiny(**settings: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(**size, num_attention_heads=2, **settings))


IDS = torch.tensor([[5, 6, 7, 8, 9]])

# ----------------------------------------------------------------------------------- weights and gradients under ZeRO


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank of ZeRO-2 and one of ZeRO-3 have seen."""
    out = tmp_path_factory.mktemp("engines") / "seen.json"
    torchrun(1, __file__, out)
    return json.loads(out.read_text())


def rank(out: Path) -> None:
    """Train a step under both stages, and write down what the functions of compat find."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    join_ranks()
    seen: dict[str, Any] = {}
    for stage in (2, 3):
        model = tiny()
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        expected = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        config = {**settings, "zero_allow_untested_optimizer": True}
        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        parameters = dict(live.unwrapped(engine).named_parameters())
        found = seen[f"zero{stage}"] = {
            "unwrapped": live.unwrapped(engine) is model,
            "masters": all(torch.equal(live.master_value(value), start[name]) for name, value in parameters.items()),
            "local parts": sum(live.local_part(value).numel() for value in parameters.values()),
            "elements": sum(value.numel() for value in start.values()),
            "hidden": sum(value.numel() == 0 for value in parameters.values()),
            "torch's optimizer": type(optimizer.optimizer).__name__,
        }
        with live.gathered(parameters["lm_head.weight"]):
            found["gathered"] = torch.equal(parameters["lm_head.weight"], start["lm_head.weight"])
        engine.backward(engine(IDS, labels=IDS).loss)
        if stage == 2:
            pairs = zip(parameters.values(), expected, strict=True)
            found["gradients"] = all(torch.allclose(compat.gradient(value), grad, atol=1e-6) for value, grad in pairs)
            found["boundary"] = engine.is_gradient_accumulation_boundary()
            for name, value in parameters.items():
                compat.put_gradient(value, torch.ones_like(value) if name == "lm_head.weight" else 0 * value)
            found["put"] = bool((safe_get_full_grad(parameters["lm_head.weight"]) == 1).all())
            engine.step()
            found["moved"] = [
                name for name, value in parameters.items() if not torch.equal(live.master_value(value), start[name])
            ]
    out.write_text(json.dumps(seen))
    exit_rank()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_weights_are_found_under_zero(stage: str, engines: dict[str, Any]) -> None:
    seen = engines[stage]
    assert seen["unwrapped"]
    assert seen["masters"]
    assert seen["gathered"]
    assert seen["local parts"] == seen["elements"]
    assert (seen["hidden"] > 0) == (stage == "zero3")  # there a parameter itself is empty, and its shard is elsewhere
    assert seen["torch's optimizer"] == "AdamW"


def test_a_gradient_put_under_zero_is_that_of_the_step(engines: dict[str, Any]) -> None:
    seen = engines["zero2"]
    assert seen["gradients"]
    assert seen["boundary"]
    assert seen["put"]
    assert seen["moved"] == ["lm_head.weight"]


def test_a_gradient_in_another_place_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter._hp_mapping = parameter.grad = torch.ones(2)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="GEM would not change the step"):
        compat.gradient(parameter)


def test_plain_gradients_are_read_and_replaced() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    assert not compat.gradient(parameter).any()
    for value in (1.0, 2.0):
        compat.put_gradient(parameter, torch.full((2,), value))
        assert compat.gradient(parameter).tolist() == [value, value]


def test_transformers_clips_before_its_callback() -> None:
    from transformers import Trainer

    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("clip_grad_norm") < source.index("on_pre_optimizer_step")


def test_the_call_comes_between_backward_pass_and_step() -> None:
    calls: list[str] = []

    class Engine:
        def is_gradient_accumulation_boundary(self) -> bool:
            return True

        def step(self) -> None:
            calls.append("step")

    def training_step(engine: Engine) -> None:
        calls.append("backward")
        engine.step()

    trainer = SimpleNamespace(is_deepspeed_enabled=True, training_step=training_step)
    compat.call_before_steps(trainer, lambda: calls.append("call"))
    engine = Engine()
    trainer.training_step(engine)
    assert calls == ["backward", "call", "step"]
    assert "step" not in vars(engine)


def test_the_fused_head_gives_the_log_probabilities_of_labels(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = {"use_cpu": True, "bf16": False, "report_to": [], "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = SFTTrainer(
        model=tiny(), args=SFTConfig(str(tmp_path), **settings), processing_class=AutoTokenizer.from_pretrained(BASE),
        train_dataset=Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}),
    )  # fmt: skip
    labels = IDS.clone()
    labels[0, :2] = -100
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    found = compat.trained_log_probs(trainer, batch)
    logits = tiny()(IDS).logits[0, :-1]
    expected = -cross_entropy(logits, labels[0, 1:], reduction="none")
    assert torch.allclose(found[0], expected, atol=1e-5)


def trainers(tmp_path: Path, model_type: str, weight: float | None) -> list[Any]:
    """TRL's SFTTrainer and ours on the same small random model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = []
    for kind in (SFTTrainer, partial(compat.LossOnlyTrainer, batch_tokens=8 * 1024)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type))
        arguments = SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], router_aux_loss_coef=weight,
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_accumulation_steps=2,
        )  # fmt: skip
        rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}])
        tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
        made.append(kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer))
    return made


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize(("model_type", "weight"), [("llama", None), ("mixtral", 0.0), ("mixtral", 0.5)])
def test_our_trainer_has_the_loss_of_trls(model_type, weight, items, held, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8, 9], [7, 6, 5, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids < 6, -100)}
    theirs, ours = trainers(tmp_path, model_type, weight)
    assert ours.holds_logits  # of 8 rows of 1024 tokens and a small vocabulary
    ours.holds_logits = held
    losses = []
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 2
        count = None if items is None else torch.tensor(items)
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch), num_items_in_batch=count)
        loss.backward()
        gradient = trainer.model.get_output_embeddings().weight.grad
        losses.append((loss.detach(), gradient))
    for their_part, our_part in zip(*losses, strict=True):
        if held:
            assert our_part == pytest.approx(their_part, abs=1e-5, rel=1e-5)
        else:
            assert torch.equal(our_part, their_part)
    assert not ours._metrics["eval"]  # nothing was gathered
    assert theirs._metrics["eval"]["entropy"]


def test_the_trainer_counts_tokens_by_a_method_of_its_own(tmp_path):
    """If this name changes, `count_tokens` counts nothing."""
    import inspect as source

    trainer = trainers(tmp_path, "llama", None)[1]
    assert "self._track_num_input_tokens(inputs)" in source.getsource(transformers.Trainer)
    total = compat.count_tokens(trainer)
    trainer._track_num_input_tokens({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert total() == IDS.numel()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mpt", {"logit_scale": 3.0}), ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("xlstm", {"output_logit_soft_cap": 3.0}), ("llama4_text", {}),
    ],
)  # fmt: skip
def test_trls_head_needs_a_fit_for_some_models(model_type, fields):
    def losses(fit):
        torch.manual_seed(0)
        config = tiny_config(model_type)
        config.update(fields)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.get_output_embeddings().weight.data.mul_(20)
        fit(model)
        add_fused_lm_head(model)
        with torch.no_grad():
            fused = -model(input_ids=IDS, labels=IDS, fused_lm_head=True, use_cache=False).log_probs.mean()
            return fused.item(), model(input_ids=IDS, labels=IDS, use_cache=False).loss.item()

    fused, own = losses(compat.fit_fused_head)
    assert fused == pytest.approx(own, abs=1e-4)
    if model_type == "llama4_text":
        with pytest.raises(AttributeError):
            losses(lambda model: None)
    else:
        unfit, own = losses(lambda model: None)
        assert abs(unfit - own) > 0.01


def test_the_optimizer_of_torch_is_within_the_others() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    zero = SimpleNamespace(optimizer=inner)  # a ZeRO optimizer has it under this name (tests/training/test_anchors.py)
    wrapped = AcceleratedOptimizer(inner)
    for outer in (inner, wrapped, SimpleNamespace(optimizer=zero)):
        assert compat.torch_optimizer(outer) is inner
    calls: list[str] = []
    inner.register_step_pre_hook(lambda *_: calls.append("before"))
    wrapped.step()
    assert calls == ["before"]


# ----------------------------------------------------------------------------------------------------------------- DPO


def test_a_precomputed_reference_is_not_rounded() -> None:
    trainer = object.__new__(compat.ExactReferenceTrainer)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer.is_deepspeed_enabled = True
    inputs = dict.fromkeys([*compat.REFERENCE_COLUMNS, "other"], torch.tensor([-1710.2]))
    prepared = trainer._prepare_inputs(inputs)
    assert {key: value.item() for key, value in prepared.items()} == {
        **dict.fromkeys(compat.REFERENCE_COLUMNS, pytest.approx(-1710.2)),
        "other": -1712.0,
    }


def test_trl_keeps_the_engine_of_the_reference() -> None:
    from trl import DPOTrainer

    assert "self._precompute_engine = prepare_deepspeed(" in inspect.getsource(DPOTrainer._precompute_ref_logps)
    destroyed: list[bool] = []
    engine = SimpleNamespace(destroy=lambda: destroyed.append(True))
    trainer = SimpleNamespace(_precompute_engine=engine)
    for _ in range(2):
        compat.release_precompute_engine(trainer)
    assert destroyed == [True]


def test_trl_names_its_cache_by_the_fingerprint() -> None:
    from datasets import Dataset
    from trl import DPOTrainer

    assert compat.salted(Dataset.from_list([{"a": 1}]), "ours")._fingerprint == "ours"
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "Hasher.hash((dataset._fingerprint, model_hash))" in source
    assert "dataset._get_cache_file_path(fingerprint)" in source


# ---------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_adapters_are_found_by_their_names_and_merged(kind: str, dora: bool, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, GPT2Config

    transposed = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = tiny() if kind == "linear" else AutoModelForCausalLM.from_config(transposed)
    names = {name for name, _ in model.named_parameters()}
    module = "model.layers.0.mlp.up_proj" if kind == "linear" else "transformer.h.0.mlp.c_fc"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[module], init_lora_weights=False, use_dora=dora
    )
    adapted = peft.get_peft_model(model, config)
    adapters = {name: value.detach() for name, value in adapted.named_parameters() if value.requires_grad}

    assert {compat.base_name(name) for name, _ in adapted.named_parameters() if name not in adapters} == names
    assert {compat.base_name(name).split(".lora_")[0] for name in adapters} == {module}
    adapted.save_pretrained(tmp_path)
    saved = compat.load_adapter(tmp_path)
    assert saved.keys() == adapters.keys()
    assert all(torch.equal(saved[name], adapters[name]) for name in saved)
    layer = adapted.get_submodule(compat.PREFIX + module)
    if dora:  # lengths as after training
        key = next(key for key in adapters if "magnitude" in key)
        adapters[key].mul_(1 + torch.rand(adapters[key].shape))
    value = compat.merged_value(adapted, f"{module}.weight", layer.base_layer.weight.detach(), adapters)
    layer.merge()
    assert torch.allclose(value, layer.base_layer.weight, atol=1e-5)


# ----------------------------------------------------------------------------------------------- universal checkpoints


def test_transformers_reads_the_universal_format_from_the_config() -> None:
    from deepspeed.runtime import constants
    from transformers.integrations import deepspeed

    arguments = SimpleNamespace(hf_deepspeed_config=deepspeed.HfTrainerDeepSpeedConfig({"zero_optimization": {}}))
    compat.load_universal(arguments)
    block = arguments.hf_deepspeed_config.config[constants.CHECKPOINT]
    assert block == {constants.LOAD_UNIVERSAL_CHECKPOINT: True}
    assert "hf_deepspeed_config" in inspect.getsource(deepspeed.deepspeed_init)


def test_the_converter_and_the_loaders_have_the_expected_names() -> None:
    from deepspeed.checkpoint import constants, ds_to_universal
    from deepspeed.runtime.zero import stage3

    assert (constants.OPTIMIZER_STATE_DICT, constants.PARAM) == ("optimizer_state_dict", "param")
    assert constants.FP32_FLAT_GROUPS == "fp32_flat_groups"
    tool = inspect.getsource(ds_to_universal)
    assert all(name in tool for name in ("--inject_missing_state", "optimizer_state.pt", "step.pt", "latest_universal"))
    loader = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3)
    assert "['state'][0]['step']" in loader
    assert '["param_groups"][0].items()' in loader  # without a weight decay for each group: still to be left out


def universal(folder: Path, stage: int) -> Path:
    """What the tool writes of a checkpoint of `stage` with one parameter, at step 7."""
    parameter = folder / "zero" / "weight"
    parameter.mkdir(parents=True)
    for name in compat.OPTIMIZER_STATES:
        torch.save(torch.ones(2, 1) if stage == 3 else {"param": torch.ones(2, 1)}, parameter / f"{name}.pt")
    state: dict[str, Any] = {"param_groups": [{"lr": 0.5, "weight_decay": 0.1}]}
    if stage == 3:
        state |= {"optimizer_state_dict": {"state": {0: {"step": 7}}}, "fp32_flat_groups": [torch.ones(9)]}
    else:
        torch.save(7, parameter / "step.pt")
    torch.save(state, folder / "zero" / "optimizer_state.pt")
    (folder / (compat.SHARD_FILE if stage == 3 else compat.MODEL_FILE)).touch()
    return folder


@pytest.mark.parametrize("to", [2, 3])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_has_what_its_loader_reads(stage: int, to: int, tmp_path: Path) -> None:
    folder = universal(tmp_path / "universal", stage)
    compat.complete_universal(folder, to)
    state = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=False)
    assert "fp32_flat_groups" not in state
    assert (folder / (compat.SHARD_FILE if to == 3 else compat.MODEL_FILE)).exists()
    if to == 3:
        settings = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 0.5}]}
        assert state["optimizer_state_dict"] == settings
    else:
        assert "ds_version" in state
        assert torch.load(folder / "zero" / "weight" / "step.pt") == 7
        assert torch.load(folder / "zero" / "weight" / "exp_avg.pt")["param"].shape == (2, 1)
    assert compat.universal_value(folder, "weight", "fp32").tolist() == [1.0, 1.0]


def test_step_counts_are_checked_and_no_longer_shared() -> None:
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    shared = torch.tensor(7.0)
    state = {torch.nn.Parameter(torch.zeros(1)): {"step": shared} for _ in range(2)}
    zero = SimpleNamespace(optimizer=SimpleNamespace(state=state), param_groups=[], overflow=False)
    wrapper = object.__new__(DeepSpeedOptimizerWrapper)
    wrapper.optimizer = zero  # as AcceleratedOptimizer sets it
    compat.repair_step_counts(wrapper, 7)
    first, second = (each["step"] for each in state.values())
    first += 1
    assert (int(second), int(shared)) == (7, 7)
    with pytest.raises(RuntimeError, match="restored step 8 of a checkpoint at step 7"):
        compat.repair_step_counts(wrapper, 7)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
