"""Weights between memory (torch, ZeRO) and files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import StoredTensor, Writer
from hft_cli.checkpoint.text_part import load_options
from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.live.compat import master_value
from hft_cli.training.compat import base_name, fit_fused_head
from hft_cli.training.session import Session, diverged

# dtypes of safetensors files that models are trained from
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(path: str, config: RunConfig) -> PreTrainedModel:
    """The model at `path`, in the precision in which its weights are trained.

    Master weights are always float32. In a single process they are the model itself, computed under autocast; under
    DeepSpeed they are the optimizer's copy, beside a model in bfloat16.
    """
    low = config.model.dtype == "bfloat16" and config.engine.zero_stage is not None
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if low else torch.float32,
        attn_implementation=config.model.attention,
        **load_options(path, config.model.part),
    )
    model.config.use_cache = False
    fit_fused_head(model)
    # Checkpoints need none, and that of some models cannot be saved. The trained model has the file of its base.
    model.generation_config = GenerationConfig()
    return model


def freeze(model: PreTrainedModel, updated: Iterable[str], frozen: Iterable[str]) -> PreTrainedModel:
    """Set `requires_grad` by name, and return the model.

    Must be called before an engine or an optimizer exists: they ignore later changes without a message.

    Raises:
        UserError: if the names are not exactly those of the model's parameters.
    """
    requires_grad = dict.fromkeys(updated, True) | dict.fromkeys(frozen, False)
    parameters = dict(model.named_parameters())
    if requires_grad.keys() != parameters.keys():
        names = sorted(requires_grad.keys() ^ parameters.keys())
        raise UserError(
            f"The model has other parameters than the draw was made for: {', '.join(names[:3])}"
            f"{' …' if len(names) > 3 else ''} ({len(names)} differ). Do its weights and its config.json belong "
            "together?"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(requires_grad[name])
    return model


def copy_of_start(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with the weights that `model` has now. Frozen parameters are those of `model`, others are copies.

    `model` has its final `requires_grad`, and no trainer or engine yet.
    """
    # deepcopy keeps what is in its memo. The same Parameter, not another one on the same storage, stays one when it is
    # moved to a GPU or cast.
    return at_rest(copy.deepcopy(model, {id(value): value for value in model.parameters() if not value.requires_grad}))


def at_rest(model: PreTrainedModel) -> PreTrainedModel:
    """The model for inference: nothing requires a gradient, no dropout."""
    model.requires_grad_(False)
    model.eval()
    return model


def store_frozen_in_bfloat16(model: Any, params: Mapping[str, Param], path: str) -> None:
    """Hold frozen matrices as the bfloat16 values of the files in `path`: 2 bytes an element instead of 6.

    For a single process, whose autocast would otherwise make a copy in bfloat16 beside the float32 value. Only where
    autocast casts every use: weights of linear layers, without the head, which TRL's loss reads by itself.
    """
    files, head = stored_tensors(Path(path)), model.get_output_embeddings()
    for module_name, module in model.named_modules():
        if module is head or not isinstance(module, torch.nn.Linear | Conv1D) or module.weight.requires_grad:
            continue
        param = params.get(base_name(f"{module_name}.weight"))
        if param is not None and all(files[name].dtype == "BF16" for name in param.stored):
            module.weight.data = module.weight.data.to(torch.bfloat16)


def write_updated(model: Any, session: Session) -> None:
    """Write the updated parameters into the phase's delta. Collective over the ranks."""
    parameters = dict(model.named_parameters())
    if session.ranks.first:
        write_delta(model, session, lambda name: master_value(parameters[name]))
    else:
        for name in session.job.updated:
            master_value(parameters[name])


def write_delta(model: Any, session: Session, value: Callable[[str], torch.Tensor]) -> None:
    """Write the phase's delta, one parameter at a time, under the names and in the dtypes of the model's files.

    Args:
        model: the model without adapters.
        value: the whole value of an updated parameter, on the CPU.
    """
    job, params = session.job, session.params
    files = stored_tensors(Path(job.model))
    announced = {stored: files[stored] for name in job.updated for stored in params[name].stored}
    metadata = {"format": "pt", "round": str(job.phase.round), "base_sha256": job.base_sha256}
    with Writer(session.folder.delta, announced, metadata) as writer:
        for name in job.updated:
            tensors = to_stored(model, {name: value(name)}, [params[name]])
            for stored in params[name].stored:
                tensor = tensors[stored].to(DTYPES[announced[stored].dtype])
                if not torch.isfinite(tensor).all():
                    raise diverged(f"{stored} has values that {announced[stored].dtype} has no number for", job.config)
                writer.add(stored, [bytes_of(tensor)])


def restore_masters(model: Any, session: Session) -> None:
    """Give DeepSpeed's float32 master weights the values in the model's files, which it has rounded to bfloat16.

    Raises:
        UserError: for a parameter that the files hold in parts (experts) and in more than bfloat16.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    files = stored_tensors(Path(session.job.model))
    for name, parameter in model.named_parameters():
        param = session.params[name]
        if parameter.requires_grad and files[param.stored[0]].dtype != "BF16":
            safe_set_full_fp32_param(parameter, file_value(param, files).to(parameter.device))


def file_value(param: Param, files: Mapping[str, StoredTensor]) -> torch.Tensor:
    """The value that the files hold of a parameter, as float32 on the CPU.

    Raises:
        UserError: if they hold it in parts (experts).
    """
    tensor = files[param.stored[0]]
    if tensor.shape != param.shape:
        raise UserError(
            f"{param.name} is stored in parts and as {tensor.dtype}, which DeepSpeed would round to bfloat16. "
            "Convert the model to bfloat16 first, or set model.dtype=float32."
        )
    with safe_open(tensor.file, "pt") as opened:
        value: torch.Tensor = opened.get_tensor(param.stored[0])
    return value.float()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
