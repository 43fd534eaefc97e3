"""Private or undocumented behaviour of other packages that training relies on. Tests pin it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from hft_cli.plan.workload import HELD_LOGITS

# ----------------------------------------------------------------------------------- weights and gradients under ZeRO


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole gradient, averaged over the ranks, between backward pass and step; not under ZeRO-3. Collective.

    UPSTREAM: deepspeed 0.19.8: ZeRO-1 and 2 keep it in flat buffers that only `_hp_mapping` leads to.
    `safe_get_full_grad` would return a `.grad` or `_hp_grad` instead, and a change of those has no effect on the step.

    Raises:
        RuntimeError: if DeepSpeed keeps the gradient in one of those.
    """
    if not hasattr(parameter, "_hp_mapping"):
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    from deepspeed.utils import safe_get_full_grad

    if parameter.grad is not None or getattr(parameter, "_hp_grad", None) is not None:
        raise RuntimeError("DeepSpeed keeps a gradient in an unexpected place: GEM would not change the step.")
    value: torch.Tensor = safe_get_full_grad(parameter)
    return value


def put_gradient(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replace what `gradient` returns, in its precision. Each rank writes the part that it owns.

    UPSTREAM: deepspeed 0.19.8: as for `gradient`.
    """
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, value)
    elif parameter.grad is None:
        parameter.grad = value.to(parameter.dtype)
    else:
        parameter.grad.copy_(value)


def use_zero_optimizer() -> None:
    """Have ZeRO-1 in bfloat16 use the optimizer that the other cases use. Before the engine is made.

    UPSTREAM: deepspeed 0.19.8: with float32 sums of gradients, stage 1 without offload would take BF16_Optimizer. It
    holds all gradients twice, skips a step whose gradient is not finite without a word, and a gradient that GEM puts
    back has no effect. There is no setting for it. This can go when stage 1 uses DeepSpeedZeroOptimizer.
    """
    from deepspeed.runtime import engine

    check = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def wrapper(self: Any, optimizer: Any) -> Any:
        found = check(self, optimizer)
        return engine.ZERO_OPTIMIZATION if found == engine.BFLOAT16 and self.zero_optimization() else found

    engine.DeepSpeedEngine._do_optimizer_sanity_check = wrapper


def leave_frozen_out_of_checkpoints(trainer: Any) -> None:
    """Have checkpoints hold what is trained, once. Frozen weights are in the model's files. Before train().

    UPSTREAM: transformers 5.23.0: a checkpoint of DeepSpeed also gets all weights as model.safetensors, gathered
    through the first rank, which nothing reads. That of a single process is written under the names of the model's
    files, and read back by those in memory: merged experts would not be found, and keep the values that they had.
    UPSTREAM: deepspeed 0.19.8: `exclude_frozen_parameters` is an argument only, which transformers sets for PEFT alone.
    """
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}

    def save(folder: str, _internal_call: bool = True) -> None:
        if not trainer.is_deepspeed_enabled:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().contiguous() for name, value in trained.items()}, f"{folder}/{WEIGHTS}")

    def load(folder: str, model: Any = None) -> None:
        saved = load_file(f"{folder}/{WEIGHTS}")
        if missing := sorted(trained.keys() - saved.keys()):
            raise RuntimeError(f"The checkpoint {folder} has no weights of {missing[0]}.")
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(saved[name])

    trainer.save_model, trainer._load_from_checkpoint = save, load
    if trainer.is_deepspeed_enabled:
        from deepspeed.runtime.engine import DeepSpeedEngine

        def fixed(name: str, **option: bool) -> Callable[..., Any]:
            method = getattr(DeepSpeedEngine, name)
            return wraps(method)(lambda *arguments, **options: method(*arguments, **{**options, **option}))

        DeepSpeedEngine.save_checkpoint = fixed("save_checkpoint", exclude_frozen_parameters=True)
        DeepSpeedEngine.load_checkpoint = fixed("load_checkpoint", load_module_strict=False)


WEIGHTS = "model.safetensors"  # of a checkpoint of a single process


def call_before_steps(trainer: Any, function: Callable[[], None]) -> None:
    """Have `function` called before each optimizer step, when the gradient is complete and not yet clipped.

    UPSTREAM: transformers 5.23.0: no callback comes before clipping, neither here nor in DeepSpeed, which clips within
    `engine.step`. So `training_step` of the trainer is replaced, and in it `step` of the engine.
    """
    training_step = trainer.training_step

    def call_after(model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(model, *args, **kwargs)
        if trainer.accelerator.sync_gradients:  # after the last micro batch of a step
            function()
        return loss

    def call_within(engine: Any, *args: Any, **kwargs: Any) -> Any:
        engine_step = engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if engine.is_gradient_accumulation_boundary():
                function()
            return engine_step(*args, **kwargs)

        engine.step = step
        try:
            return training_step(engine, *args, **kwargs)
        finally:
            del engine.step  # the method of the class is in force again

    trainer.training_step = call_within if trainer.is_deepspeed_enabled else call_after


class LossOnlyTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer that computes the loss and nothing else in a step.

    UPSTREAM: trl 1.16.0: `compute_loss` also computes entropy and accuracy, gathers both from all ranks and waits for
    the device in each micro-batch (with four of them 16 all_gathers and 20 waits a step). There is no setting for it.
    Its head computes logits in tiles, and again in the backward pass, which is slow where all of them fit: those are
    computed by the model itself (on 2 CPU cores a step of a 20M model took 0.79 s with tiles, and 0.66 s without).
    """

    def __init__(self, *arguments: Any, batch_tokens: int, **options: Any) -> None:
        """`batch_tokens`: the most tokens of a micro-batch, with padding; 0 if not known. The rest is SFTTrainer's."""
        super().__init__(*arguments, **options)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_fused_lm_head(model)  # log-probabilities alone, over the head that has more outputs
        self.holds_logits = 0 < batch_tokens * model.config.get_text_config().vocab_size <= HELD_LOGITS
        self.anchor: Any = None  # anchors.KlAnchor
        self.divergences: list[torch.Tensor] = []  # of the micro-batches since the last log, in nats per trained token

    def hold(self, anchor: Any) -> None:
        """Add the divergence from the start to the loss. It needs the logits."""
        self.anchor, self.holds_logits = anchor, True

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log the divergence too, averaged over micro-batches and ranks."""
        if self.divergences:
            mean = torch.stack(self.divergences).mean()
            logs = {**logs, KL: float(self.accelerator.gather(mean).mean())}
            self.divergences.clear()
        super().log(logs, *arguments, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if self.holds_logits:
            labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
            outputs = model(**inputs)
            total = cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            tokens = (labels != -100).sum()
            if self.anchor is not None:
                divergence = self.anchor.divergence(inputs, outputs.logits, labels != -100)
                self.divergences.append(divergence.detach() / tokens.clamp(min=1))
                total = total + self.anchor.weight * divergence
        else:
            outputs = model(**inputs, fused_lm_head=True)
            total, tokens = -outputs.log_probs.sum(), outputs.label_mask.sum()
        if num_items_in_batch is not None:
            tokens = torch.as_tensor(num_items_in_batch)
        loss = total / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose mean over the ranks is the mean over all tokens
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss


KL = "kl"  # the divergence in logs, and in lines of metrics.jsonl


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that takes the steps, of whole tensors or of a rank's shards, within that of a trainer.

    UPSTREAM: deepspeed 0.19.8: torch's optimizer is within DeepSpeed's, and that within
    accelerate's, each as `optimizer`. Its hooks are called for each step.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def use_sampler(trainer: Any, sampler: Any) -> None:
    """Have the trainer take its rows in the order of a sampler. Before train().

    UPSTREAM: transformers 5.23.0: that of `train_sampling_strategy="group_by_length"` draws from torch's global
    generator, so that a resumed phase would see rows in another order. There is no other way to give one of our own.
    """
    trainer._get_train_sampler = lambda *_: sampler


def count_tokens(trainer: Any) -> Callable[[], int]:
    """Count the tokens of all batches, without padding. The function that is returned gives their number so far, over
    all ranks; it is collective.

    UPSTREAM: transformers 5.23.0: `_track_num_input_tokens` gathers the number from all ranks and waits for the device
    in each micro-batch. It is called in each of them, whatever `include_num_input_tokens_seen` says.
    """
    seen = torch.zeros(1, dtype=torch.int64, device=trainer.args.device)

    def track(inputs: Mapping[str, torch.Tensor]) -> None:
        mask = inputs.get("attention_mask")
        seen.add_(inputs["input_ids"].numel() if mask is None else mask.sum())

    trainer._track_num_input_tokens = track
    return lambda: int(trainer.accelerator.gather(seen).sum())


def fit_fused_head(model: Any) -> None:
    """Prepare a model for TRL's fused head.

    UPSTREAM: trl 1.16.0: the head multiplies logits by `logit_scale` of any config, which MPT in transformers ignores.
    And it bounds logits by `final_logit_softcapping`, for which two types have other names.
    UPSTREAM: transformers 5.23.0: `base_model` of Llama 4 is the whole model, whose backbone is `model` as in others.
    """
    if model.config.model_type == "mpt":
        model.config.logit_scale = None
    if name := {"recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap"}.get(model.config.model_type):
        model.config.final_logit_softcapping = getattr(model.config, name)
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


def trained_log_probs(trainer: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of a batch's labels by the plain model of TRL's SFTTrainer; 0 where a label is -100.

    UPSTREAM: trl 1.16.0: its models take the undocumented `fused_lm_head=True`, with which they never hold all logits.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each of shape (rows, tokens), on any device.
    """
    inputs = {key: value.to(trainer.args.device) for key, value in batch.items()}
    with trainer.compute_loss_context_manager():
        log_probs: torch.Tensor = trainer.model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    return log_probs


# ----------------------------------------------------------------------------------------------------------------- DPO

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # that TRL adds for a precomputed reference


class ExactReferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer for rows that are tokens, with a precomputed reference in its own precision.

    UPSTREAM: transformers 5.23.0: under DeepSpeed `_prepare_inputs` casts all floating-point inputs to the training
    dtype. In bfloat16, -1710.2 becomes -1712.
    """

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        exact = {key: inputs[key].to(self.args.device) for key in REFERENCE_COLUMNS if key in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The data set as it is.

        UPSTREAM: trl 1.16.0: rows are rendered and tokenized here into the columns that ours have already, and there is
        no setting that skips it, as SFTTrainer's `skip_prepare_dataset` does.
        """
        return dataset


def release_precompute_engine(trainer: Any) -> None:
    """Destroy the engine by which TRL has precomputed the reference.

    UPSTREAM: trl 1.16.0: it stays in `_precompute_engine`. Under ZeRO-3 its hooks would go on gathering and releasing
    weights beside those of training.
    """
    if trainer._precompute_engine is not None:
        trainer._precompute_engine.destroy()
        trainer._precompute_engine = None


def salted(dataset: Any, fingerprint: str) -> Any:
    """The data set with a fingerprint that also depends on the weights.

    UPSTREAM: trl 1.16.0: the file of a precomputed reference is named by hashes of the data set's `_fingerprint` and of
    the model. Under ZeRO-3 the latter is a hash of empty parameters, and values of another model would be read.
    """
    return dataset.select(range(len(dataset)), new_fingerprint=fingerprint)


# ---------------------------------------------------------------------------------------------------------------- PEFT

PREFIX = "base_model.model."  # that PEFT puts before the names of the model that it adapts


def base_name(name: str) -> str:
    """The name that a parameter of an adapted model has without PEFT.

    UPSTREAM: peft 0.21.2: the prefix, and `base_layer` for an adapted layer's own weight, are not documented.
    """
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, by their names in memory.

    UPSTREAM: peft 0.21.2: in the file the names lack the adapter's own, `default`, and lengths of DoRA also `weight`.
    """
    saved = load_file(folder / "adapter_model.safetensors")
    return {f"{name.removesuffix('.weight')}.default.weight": value for name, value in saved.items()}


def merged_value(model: Any, name: str, weight: torch.Tensor, adapters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter `name` with its adapter merged into it: W + (alpha / rank) B A, in float32.

    With DoRA each row of it (of the outputs) is scaled to its trained length.

    UPSTREAM: peft 0.21.2: the layer's `scaling` and `fan_in_fan_out` (the weight is stored as inputs by outputs), and
    the name of the lengths, are not documented. `merge` would take the matrices from memory, where they may be rounded.

    Args:
        weight: the value of the parameter without its adapter, float32.
        adapters: matrices A and B of all adapters, and with DoRA the lengths, by their names in memory.
    """
    module = PREFIX + name.removesuffix(".weight")
    a, b = (adapters[f"{module}.lora_{matrix}.default.weight"].float() for matrix in "AB")
    layer = model.get_submodule(module)
    transposed = bool(layer.fan_in_fan_out)
    value = (weight.T if transposed else weight) + float(layer.scaling["default"]) * (b @ a)
    lengths = adapters.get(f"{module}.lora_magnitude_vector.default.weight")
    if lengths is not None:
        value = value * (lengths.float() / torch.linalg.vector_norm(value, dim=1))[:, None]
    return value.T if transposed else value


# ----------------------------------------------------------------------------------------------- universal checkpoints

OPTIMIZER_STATES = ("fp32", "exp_avg", "exp_avg_sq")  # files of each parameter: master weight and AdamW's moments
MODEL_FILE = "mp_rank_00_model_states.pt"  # of ZeRO-1 and 2; DeepSpeed looks for one of these two names
SHARD_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # of ZeRO-3


def load_universal(arguments: Any) -> None:
    """Have DeepSpeed load the checkpoint to resume from in its universal format.

    UPSTREAM: transformers 5.23.0: DeepSpeed's settings are read once, into the undocumented
    `hf_deepspeed_config.config`, before the checkpoint is known.
    """
    arguments.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}


def complete_universal(folder: Path, stage: int) -> None:
    """Add to a universal checkpoint what the loader of ZeRO `stage` needs, and take out what every rank would read.

    UPSTREAM: deepspeed 0.19.8: `ds_to_universal` writes what the stage of the checkpoint needs. ZeRO-1 and 2 need a
    step for each parameter and another name of the model's file, ZeRO-3 needs the settings of the optimizer.
    """
    file = folder / "zero" / "optimizer_state.pt"
    state = torch.load(file, map_location="cpu")
    parameters = [path.parent for path in sorted((folder / "zero").rglob("exp_avg.pt"))]
    if "optimizer_state_dict" in state:  # by ZeRO-3: the whole share of the first rank, without names
        step = state["optimizer_state_dict"]["state"][0]["step"]
        state = {key: value for key, value in state.items() if key not in ("optimizer_state_dict", "fp32_flat_groups")}
        if stage < 3:
            for parameter in parameters:
                for name in OPTIMIZER_STATES:
                    value = torch.load(parameter / f"{name}.pt")
                    torch.save({"param": value}, parameter / f"{name}.pt")
                torch.save(step, parameter / "step.pt")
            (folder / SHARD_FILE).rename(folder / MODEL_FILE)
    else:
        step = torch.load(parameters[0] / "step.pt")
        if stage == 3:
            (folder / MODEL_FILE).rename(folder / SHARD_FILE)
    if stage == 3:
        # The loader gives all groups the settings of the first one: norms would get the weight decay of matrices.
        settings = {key: value for key, value in state["param_groups"][0].items() if key != "weight_decay"}
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": [settings]}
    else:
        from deepspeed import __version__

        state.setdefault("ds_version", __version__)
    torch.save(state, file)


def repair_step_counts(optimizer: Any, step: int) -> None:
    """Give each parameter group its own step count, on its device, after a universal checkpoint was loaded.

    UPSTREAM: deepspeed 0.19.8: the loaders leave the counts on the CPU, and that of ZeRO-3 gives all groups one tensor,
    which each group would count up.

    Raises:
        RuntimeError: if a count is not `step`.
    """
    for parameter, state in torch_optimizer(optimizer).state.items():
        state["step"] = torch.as_tensor(state["step"]).to(parameter.device, copy=True)
        if state["step"] != step:
            raise RuntimeError(f"DeepSpeed restored step {int(state['step'])} of a checkpoint at step {step}.")


def universal_value(folder: Path, name: str, state: str) -> torch.Tensor:
    """One of the `OPTIMIZER_STATES` of a parameter in a universal checkpoint, flat, on the CPU.

    UPSTREAM: deepspeed 0.19.8: the file holds a tensor, or a dict with it as `param`, depending on the ZeRO stage.
    """
    content = torch.load(folder / "zero" / name / f"{state}.pt", map_location="cpu")
    value: torch.Tensor = content["param"] if isinstance(content, dict) else content
    return value.reshape(-1)
